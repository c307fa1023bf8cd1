"""PSNR and SSIM of predicted video, per frame and at the event's end, beside what they must beat.

Each (event, view, frame) has its own score; averages are over those. References on the same frames:
the last observed frame repeated, and the codec's own reconstruction of the true video (the
ceiling).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from wallwm_jax.evaluation import frechet
from wallwm_jax.types import DataError

# Mean squared error of rounding to 8 bits, the least an 8-bit frame can tell apart: a still frame
# copied exactly would otherwise score infinity and drown every average. PSNR is therefore at most
# 58.9 dB.
ROUNDING = (1 / 255) ** 2 / 12
WINDOW = 11  # SSIM window, Gaussian of sigma 1.5 px
SIGMA = 1.5


@dataclasses.dataclass(frozen=True)
class FrameScores:
  """Scores of n events: psnr (dB), ssim [n, V, T]; scored [n, V, T] True where they count.

  Frames up to and including the anchor are observed, not predicted, and do not count.
  """

  psnr: np.ndarray
  ssim: np.ndarray
  scored: np.ndarray


@dataclasses.dataclass(frozen=True)
class VideoResult:
  """Means of one predictor.

  psnr, ssim: over all scored frames; psnr_end, ssim_end: over each event's last valid frame;
  psnr_curve, ssim_curve: [T], by frame (NaN where nothing is predicted); n: events; frechet:
  squared Frechet distance of its clips (one per event and view) to the true ones on the random
  features of `frechet.NAME`, NaN for fewer than two clips.
  """

  psnr: float
  ssim: float
  psnr_end: float
  ssim_end: float
  psnr_curve: np.ndarray
  ssim_curve: np.ndarray
  n: int
  frechet: float = float('nan')


def psnr(
  predicted: Float[Array, '... H W 3'],
  true: Float[Array, '... H W 3'],
  mask: Bool[Array, '... H W'] | None = None,
) -> Float[Array, '...']:
  """Peak signal-to-noise ratio in dB of images in 0..1, over the pixels of `mask` (None = all)."""
  squared = jnp.mean((predicted - true) ** 2, axis=-1)
  if mask is None:
    error = jnp.mean(squared, axis=(-2, -1))
  else:
    error = jnp.sum(squared * mask, axis=(-2, -1)) / jnp.maximum(jnp.sum(mask, axis=(-2, -1)), 1)
  return -10 * jnp.log10(jnp.maximum(error, ROUNDING))


def ssim(
  predicted: Float[Array, '... H W 3'], true: Float[Array, '... H W 3']
) -> Float[Array, '...']:
  """Structural similarity of images in 0..1, mean over channels and the pixels whose window lies
  inside.

  Raises:
    DataError: images smaller than the 11-pixel window.

  Source: Wang et al. (2004), eq. 13, with its constants K1 = 0.01, K2 = 0.03.
  """
  if min(true.shape[-3:-1]) < WINDOW:
    raise DataError(
      f'ssim: expected images of at least {WINDOW}x{WINDOW} px, got {true.shape[-3:-1]}.'
    )
  c1, c2 = 0.01**2, 0.03**2
  mean_x, mean_y = _blur(predicted), _blur(true)
  var_x = _blur(predicted**2) - mean_x**2
  var_y = _blur(true**2) - mean_y**2
  covariance = _blur(predicted * true) - mean_x * mean_y
  luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
  structure = (2 * covariance + c2) / (var_x + var_y + c2)
  return jnp.mean(luminance * structure, axis=(-3, -2, -1))


def _blur(x: Float[Array, '... H W 3']) -> Float[Array, '... H-10 W-10 3']:
  """Gaussian window mean where the whole window lies inside the image."""
  offsets = np.arange(WINDOW) - WINDOW // 2
  weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
  weights = (weights / weights.sum()).astype(np.float32)
  for axis in (-3, -2):
    inside = x.shape[axis] - WINDOW + 1
    pieces = [jax.lax.slice_in_dim(x, i, i + inside, axis=axis % x.ndim) for i in range(WINDOW)]
    x = sum(w * piece for w, piece in zip(weights, pieces))
  return x


@jax.jit
def _scores(predicted, true, pixel_mask):
  masked = pixel_mask[:, :, None]
  # SSIM has no mask of its own: pixels outside count as predicted exactly.
  blended = jnp.where(masked[..., None], predicted, true)
  return psnr(predicted, true, masked), ssim(blended, true)


def score_video(
  predicted, true, *, num_frames, view_mask, pixel_mask, anchor: int = 0
) -> FrameScores:
  """Scores a batch of predicted videos.

  Args:
    predicted: [B, V, T, H, W, 3] in 0..1 (clipped here); true: the same, or uint8.
    num_frames: [B] valid frames; view_mask: [B, V]; pixel_mask: [B, V, H, W], False on synthetic
      borders.
    anchor: index of the last observed frame; scoring starts after it.

  Raises:
    DataError: shapes that differ.
  """
  predicted, true = unit_range(predicted), unit_range(true)
  if predicted.shape != true.shape or true.ndim != 6:
    raise DataError(
      f'score_video: expected two videos [B, V, T, H, W, 3], got predicted {predicted.shape}, '
      f'true {true.shape}.'
    )
  frame_psnr, frame_ssim = _scores(predicted, true, jnp.asarray(pixel_mask))
  frames = np.arange(true.shape[2])
  valid = (frames > anchor) & (frames < np.asarray(num_frames)[:, None])
  scored = valid[:, None, :] & np.asarray(view_mask, bool)[:, :, None]
  return FrameScores(np.asarray(frame_psnr), np.asarray(frame_ssim), scored)


def copy_last(true, anchor: int = 0) -> np.ndarray:
  """The last observed frame repeated over the whole window [B, V, T, H, W, 3], same dtype."""
  true = np.asarray(true)
  return np.broadcast_to(true[:, :, anchor : anchor + 1], true.shape)


def unit_range(video) -> np.ndarray:
  """Frames as float32 in 0..1: uint8 is divided by 255, floats are clipped."""
  video = np.asarray(video)
  if video.dtype == np.uint8:
    return video.astype(np.float32) / 255
  return np.clip(video.astype(np.float32), 0, 1)


def summarise(parts: Iterable[FrameScores]) -> VideoResult:
  """Means over the events of all parts; curves are as long as the longest part's T.

  Raises:
    DataError: no frame was predicted.
  """
  parts = list(parts)
  if not parts or not any(p.scored.any() for p in parts):
    raise DataError('video evaluation: expected at least one predicted frame, got none.')
  frames = max(p.scored.shape[-1] for p in parts)
  psnr_all, ssim_all, scored = (
    np.concatenate([_pad_frames(getattr(p, name), frames) for p in parts])
    for name in ('psnr', 'ssim', 'scored')
  )
  later = np.cumsum(scored[..., ::-1], axis=-1)[..., ::-1]
  end = scored & (later == 1)
  return VideoResult(
    psnr=float(psnr_all[scored].mean()),
    ssim=float(ssim_all[scored].mean()),
    psnr_end=float(psnr_all[end].mean()),
    ssim_end=float(ssim_all[end].mean()),
    psnr_curve=_curve(psnr_all, scored),
    ssim_curve=_curve(ssim_all, scored),
    n=int(scored.any((1, 2)).sum()),
  )


def _pad_frames(values: np.ndarray, frames: int) -> np.ndarray:
  """[n, V, T] filled up with zeros (not scored) to `frames`."""
  return np.pad(values, ((0, 0), (0, 0), (0, frames - values.shape[-1])))


def _curve(values: np.ndarray, scored: np.ndarray) -> np.ndarray:
  count = scored.sum((0, 1))
  total = np.where(scored, values, 0).sum((0, 1))
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def evaluate(
  batches: Iterable[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]], anchor: int = 0
) -> dict[str, VideoResult]:
  """Scores several predictors over the same windows.

  Args:
    batches: pairs (truth, predictions). truth: frames uint8 [B, V, T, H, W, 3], num_frames [B],
      view_mask [B, V], pixel_mask [B, V, H, W]. predictions: {name: video [B, V, T, H, W, 3] in
      0..1}, e.g. 'model' and 'codec'.

  Returns:
    {name: VideoResult} of every predictor and of 'copy_last'.
  """
  parts: dict[str, list[FrameScores]] = {}
  clips: dict[str, list[np.ndarray]] = {}
  true_clips: list[np.ndarray] = []
  for truth, predictions in batches:
    masks = {name: truth[name] for name in ('num_frames', 'view_mask', 'pixel_mask')}
    videos = dict(predictions) | {'copy_last': copy_last(truth['frames'], anchor)}
    true_clips.append(_clips(truth['frames'], truth, np.zeros(truth['frames'].shape[:3], bool)))
    for name, video in videos.items():
      scores = score_video(video, truth['frames'], **masks, anchor=anchor)
      parts.setdefault(name, []).append(scores)
      clips.setdefault(name, []).append(_clips(video, truth, scores.scored))
  if not parts:
    raise DataError('video evaluation: expected at least one held-out window, got none.')
  real = np.concatenate(true_clips)
  results = {}
  for name, scores in parts.items():
    results[name] = summarise(scores)
    if len(real) > 1:
      distance = frechet.frechet_distance(np.concatenate(clips[name]), real)
      results[name] = dataclasses.replace(results[name], frechet=distance)
  return results


def _clips(video, truth: Mapping[str, np.ndarray], scored: np.ndarray) -> np.ndarray:
  """Features [m, D] of the clips of present views; frames and pixels that do not count are the true
  ones."""
  true = unit_range(truth['frames'])
  counted = scored[..., None, None] & np.asarray(truth['pixel_mask'], bool)[:, :, None]
  shown = np.where(counted[..., None], unit_range(video), true)
  batch, views = shown.shape[:2]
  features = frechet.clip_features(shown.reshape(batch * views, *shown.shape[2:]))
  return np.asarray(features)[np.asarray(truth['view_mask'], bool).reshape(-1)]


def to_json(results: Mapping[str, VideoResult]) -> dict:
  """Flat keys for scripts: psnr_<name>, psnr_end_<name>, ssim_<name>, ssim_end_<name>,
  frechet_<name>, n, the curves, and which net the Frechet distances are of."""
  flat: dict = {'n': max(result.n for result in results.values()), 'frechet_net': frechet.NAME}
  for name, result in results.items():
    for key in ('psnr', 'psnr_end', 'ssim', 'ssim_end', 'psnr_curve', 'ssim_curve', 'frechet'):
      flat[f'{key}_{name}'] = getattr(result, key)
  return flat
