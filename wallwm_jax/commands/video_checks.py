"""What `wallwm eval video` asks beside PSNR and SSIM: is the predicted gripper one thing in all
views, does it go where it went, does it go where the predicted actions lead, and how much does the
caption decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

from wallwm_jax.commands.evaluators import Predict, Windows, anchor_frame
from wallwm_jax.evaluation import gripper, open_loop, video
from wallwm_jax.evaluation.base import bootstrap_interval
from wallwm_jax.geometry.poses import apply_relative
from wallwm_jax.types import EventBatch

CHECKS = ('epipolar', 'path', 'action_video')


@dataclasses.dataclass
class Geometry:
  """Collects, batch by batch, where the first arm's gripper is found in each video.

  Views whose camera moves or is not calibrated are left out, and events whose gripper is not in
  view at first.
  """

  windows: Windows
  act: Predict
  errors: dict[str, dict[str, list]] = dataclasses.field(
    default_factory=lambda: {check: {} for check in CHECKS}
  )
  episodes: list = dataclasses.field(default_factory=list)

  def watch(self, batch: EventBatch, videos: Mapping[str, np.ndarray]) -> None:
    """videos: {'model', 'codec', ...: [B, V, T, H, W, 3] from the anchor frame on}."""
    config = self.windows.config
    anchor = anchor_frame(config)
    frames = np.asarray(batch.frames)[:, :, anchor:]
    path = self.windows.states(batch)[:, anchor:]
    cameras = batch.cameras
    shape = (cameras.intrinsics, cameras.extrinsics)
    truth, depth = gripper.project_path(path[..., :3], *shape)
    inside = gripper.visible(truth, depth, config.model.image_size)
    usable = self.windows.fixed_views(batch) & inside[:, :, 0]
    start = np.where(usable[..., None], truth[:, :, 0], 0)
    ahead = np.arange(frames.shape[2])
    end = np.asarray(batch.num_frames) - 1 - anchor
    valid = (ahead > 0) & (ahead <= end[:, None])

    shown = {'true': frames, **videos, 'copy_last': video.copy_last(frames)}
    found = {
      name: gripper.find(shown_frames, frames[:, :, 0], start)
      for name, shown_frames in shown.items()
    }
    mixed, both = _other_events(found['model'], usable)
    at_end = (np.arange(len(end)), slice(None), end)
    reached = self._reached(batch, path[:, 0], end)
    for name, at in found.items():
      self._add('epipolar', name, gripper.epipolar_error(at, usable, valid, *shape))
      self._add('path', name, gripper.path_error(at, truth, usable, valid, inside))
    self._add('epipolar', 'other event', gripper.epipolar_error(mixed, both, valid, *shape))
    for name, (video_name, position) in reached.items():
      pixels, deep = gripper.project_path(position[:, None], *shape)
      seen = gripper.visible(pixels, deep, config.model.image_size)
      last = found[video_name][at_end][:, :, None]
      always = np.ones((len(end), 1), bool)
      self._add('action_video', name, gripper.path_error(last, pixels, usable, always, seen))
    self.episodes += self.windows.facts(batch, 'episode')

  def to_json(self) -> dict:
    """{check: {video: {value, low, high (px, 95 % by episode), n}}}; {} if nothing was usable."""
    result: dict = {}
    for check, videos in self.errors.items():
      for name, values in videos.items():
        values = np.asarray(values)
        known = np.isfinite(values)
        if known.any():
          interval = bootstrap_interval(values[known], np.asarray(self.episodes)[known])
          result.setdefault(check, {})[name] = dataclasses.asdict(interval) | {
            'n': int(known.sum())
          }
    return result

  def _add(self, check: str, name: str, values: np.ndarray) -> None:
    self.errors[check].setdefault(name, []).extend(values.tolist())

  def _reached(self, batch: EventBatch, pose: np.ndarray, end: np.ndarray):
    """{row: (video to compare with, positions [B, 3] at the end)} by predicted and by demonstrated
    actions, by those of another event of the batch, and by none."""
    norm = self.windows.norm
    predicted = np.asarray(self.act(batch), np.float64)
    true = open_loop.denormalise(batch.actions, norm.action_mean, norm.action_scale)
    rows, last = np.arange(len(end)), end - 1
    led = {
      'model': ('model', predicted[rows, last]),
      'true': ('true', true[rows, last]),
      'other event': ('model', np.roll(predicted[rows, last], -1, 0)),
    }
    positions = {
      name: (shown, apply_relative(pose, action)[:, :3]) for name, (shown, action) in led.items()
    }
    if len(end) < 2:
      del positions['other event']
    return positions | {'hold still': ('model', pose[:, :3])}


def _other_events(found: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Each odd view taken from the next event of the batch, and where both are usable; none in a
  batch of one."""
  odd = np.arange(found.shape[1]) % 2 == 1
  mixed, both = found.copy(), usable.copy()
  mixed[:, odd], both[:, odd] = np.roll(found, -1, 0)[:, odd], np.roll(usable, -1, 0)[:, odd]
  return mixed, both & (len(found) > 1)


def caption_gap(windows: Windows, predict: Callable[[EventBatch], np.ndarray]) -> dict:
  """PSNR over predicted frames under each window's own caption and under that of the next window of
  its batch, where the two differ; first frame, noise and length stay.

  Returns:
    caption_gap: {psnr_own, psnr_other, gap, gap_low, gap_high (dB, 95 % by episode), n}; {} where
    no batch has two captions.
  """
  own: list = []
  other: list = []
  episodes: list = []
  anchor = anchor_frame(windows.config)
  for batch in windows.batches():
    captions = windows.captions(batch)
    differs = np.array([a != b for a, b in zip(captions, captions[1:] + captions[:1])])
    if not differs.any():
      continue
    text = jax.tree.map(lambda x: np.roll(np.asarray(x), -1, 0), batch.text)
    told = (batch, dataclasses.replace(batch, text=text))
    for scores, seen in zip((own, other), told):
      scores += _event_psnr(batch, predict(seen), anchor)[differs].tolist()
    episodes += np.array(windows.facts(batch, 'episode'))[differs].tolist()
  if not own:
    return {}
  gap = bootstrap_interval(np.array(own) - np.array(other), episodes)
  return {
    'caption_gap': {
      'psnr_own': float(np.mean(own)),
      'psnr_other': float(np.mean(other)),
      'gap': gap.value,
      'gap_low': gap.low,
      'gap_high': gap.high,
      'n': len(own),
    }
  }


def _event_psnr(batch: EventBatch, predicted: np.ndarray, anchor: int) -> np.ndarray:
  """Mean PSNR [B] over the predicted frames and present views of each window."""
  scores = video.score_video(
    predicted,
    np.asarray(batch.frames)[:, :, anchor:],
    num_frames=np.asarray(batch.num_frames) - anchor,
    view_mask=batch.view_mask,
    pixel_mask=batch.pixel_mask,
  )
  counted = scores.scored
  return np.where(counted, scores.psnr, 0).sum((1, 2)) / np.maximum(counted.sum((1, 2)), 1)
