"""Where the gripper is in predicted video, found without a learned tracker, and how well that fits
calibration, recorded path and predicted actions. Distances in px of the model's images.

A patch is cut from the observed frame around the projected position of the gripper and looked for
in every later frame near where it was found before (normalised cross-correlation, sub-pixel). The
finder errs, most of all when the gripper turns or is hidden: its error on the true frames is the
floor that every number must be read beside.
"""

from __future__ import annotations

import itertools

import numpy as np

from wallwm_jax.evaluation.video import unit_range
from wallwm_jax.geometry.cameras import project
from wallwm_jax.geometry.epipolar import epipolar_distance, fundamental_matrix
from wallwm_jax.types import DataError

# Half patch, and farthest move between frames, of the image height. Larger patches hold more of the
# background, which does not move along; chosen by the error on true frames of two worlds.
PATCH, REACH = 1 / 12, 1 / 12


def visible(pixels, depth, size: tuple[int, int]) -> np.ndarray:
  """Bool [...]: projected points [..., 2] in front of the camera and inside an image of (H, W)."""
  x, y = pixels[..., 0], pixels[..., 1]
  with np.errstate(invalid='ignore'):
    return (depth > 0) & (x >= 0) & (x <= size[1]) & (y >= 0) & (y <= size[0])


def project_path(positions, intrinsics, extrinsics) -> tuple[np.ndarray, np.ndarray]:
  """Positions [B, T, 3] m in every view: pixels [B, V, T, 2] and depth [B, V, T] m.

  intrinsics: [B, V, 3, 3]; extrinsics: [B, V, 4, 4], of cameras that stand still.
  """
  points = np.asarray(positions, np.float64)[:, None]
  return project(points, np.asarray(intrinsics, np.float64), np.asarray(extrinsics, np.float64))


def find(video, observed, start) -> np.ndarray:
  """Pixels [B, V, T, 2] (x, y) of the gripper in every frame.

  Args:
    video: [B, V, T, H, W, 3], uint8 or 0..1; observed: [B, V, H, W, 3], the true first frame, from
      which the patch is cut; start: [B, V, 2] where the gripper is there.

  Raises:
    DataError: shapes that do not go together.
  """
  video, observed = unit_range(video), unit_range(observed)
  batch, views, frames, height, width, _ = video.shape
  if observed.shape != (batch, views, height, width, 3) or np.shape(start) != (batch, views, 2):
    raise DataError(
      f'gripper.find: expected video [B, V, T, H, W, 3], observed [B, V, H, W, 3] and start '
      f'[B, V, 2], got {video.shape}, {observed.shape}, {np.shape(start)}.'
    )
  half, reach = max(3, round(PATCH * height)), max(2, round(REACH * height))
  top = np.array([width - 1, height - 1])
  start = np.asarray(start, np.float64).reshape(-1, 2)
  at = np.clip(np.floor(start), 0, top).astype(int)
  rest = start - at
  margin = half + reach
  pad = [(0, 0), (margin, margin), (margin, margin), (0, 0)]
  patch = _unit(_cut(np.pad(observed.reshape(-1, height, width, 3), pad, 'edge'), at, margin, half))
  found = np.empty((len(start), frames, 2))
  for t in range(frames):
    image = np.pad(video[:, :, t].reshape(-1, height, width, 3), pad, 'edge')
    scores = _scores(image, at, margin, half, reach, patch)
    best, offset = _peak(scores, reach)
    found[:, t] = at + best + offset + rest
    at = np.clip(at + best, 0, top)
  return found.reshape(batch, views, frames, 2)


def epipolar_error(found, usable, valid, intrinsics, extrinsics) -> np.ndarray:
  """Mean distance [B] px between where one view shows the gripper and the line on which another
  view says it must lie, over frames and ordered pairs of views; NaN where there is none.

  Motion along that line is not seen. A gripper that never moves is consistent.

  Args:
    found: [B, V, T, 2]; usable: [B, V] calibrated, standing still, gripper in view at first;
      valid: [B, T] predicted frames; intrinsics, extrinsics: [B, V, ...].
  """
  total, count = np.zeros(len(found)), np.zeros(len(found))
  for a, b in itertools.permutations(range(found.shape[1]), 2):
    cameras = (x[:, v] for v in (a, b) for x in (intrinsics, extrinsics))
    matrix = fundamental_matrix(*cameras)
    distance = epipolar_distance(found[:, a], found[:, b], matrix[:, None])
    counted = valid & (usable[:, a] & usable[:, b])[:, None]
    total += np.where(counted, distance, 0).sum(1)
    count += counted.sum(1)
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def path_error(found, path, usable, valid, inside) -> np.ndarray:
  """Mean distance [B] px between found and projected true pixels [B, V, T, 2], over usable views
  [B, V], valid frames [B, T], where the true gripper is inside the image [B, V, T]; NaN where there
  is none."""
  counted = usable[:, :, None] & valid[:, None] & inside
  distance = np.linalg.norm(found - path, axis=-1)
  total, count = np.where(counted, distance, 0).sum((1, 2)), counted.sum((1, 2))
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _cut(image, at, margin: int, half: int) -> np.ndarray:
  """Patches [N, P] of padded images [N, H, W, 3] centred on pixel indices `at` [N, 2] (x, y)."""
  side = np.arange(-half, half + 1) + margin
  rows, columns = at[:, 1, None] + side, at[:, 0, None] + side
  patches = image[np.arange(len(at))[:, None, None], rows[:, :, None], columns[:, None]]
  return patches.reshape(len(at), -1)


def _unit(patches) -> np.ndarray:
  """Patches without mean, of length 1."""
  patches = patches - patches.mean(1, keepdims=True)
  return patches / np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-6)


def _scores(image, at, margin: int, half: int, reach: int, patch) -> np.ndarray:
  """Correlation [N, 2R+1, 2R+1] (dy, dx) of the patch with the images around `at`."""
  steps = range(-reach, reach + 1)
  rows = [
    [(_unit(_cut(image, at + (dx, dy), margin, half)) * patch).sum(1) for dx in steps]
    for dy in steps
  ]
  return np.moveaxis(np.array(rows), -1, 0)


def _peak(scores, reach: int) -> tuple[np.ndarray, np.ndarray]:
  """Best whole-pixel move [N, 2] (x, y) and the sub-pixel rest of a parabola through its
  neighbours, -0.5..0.5."""
  size, index = 2 * reach + 1, np.arange(len(scores))
  side = np.arange(-reach, reach + 1)
  scores = scores - 1e-6 * (side[:, None] ** 2 + side**2)  # where all is alike nothing moved
  y, x = np.divmod(scores.reshape(len(scores), -1).argmax(1), size)
  rest = np.zeros((len(scores), 2))
  for axis, (place, step) in enumerate(((x, (0, 1)), (y, (1, 0)))):
    inner = (place > 0) & (place < size - 1)
    dy, dx = step
    low, mid, high = (
      scores[index, np.clip(y + s * dy, 0, size - 1), np.clip(x + s * dx, 0, size - 1)]
      for s in (-1, 0, 1)
    )
    curve = low - 2 * mid + high
    shift = np.where(curve < -1e-9, 0.5 * (low - high) / np.minimum(curve, -1e-9), 0)
    rest[:, axis] = np.where(inner, np.clip(shift, -0.5, 0.5), 0)
  return np.stack([x, y], 1) - reach, rest
