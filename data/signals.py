"""What moves in an episode, as two kinds of signals: visual per camera, robot motion per arm.

Both are taken between frames STRIDE apart, so that entry t of either is about frame t + 1.
Comparing every second frame keeps the alternation of coded frame types (every other frame of a
video with GOP 2 differs more from its neighbours) out of the visual signal.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from wallwm_jax.data.schema import ARM_WIDTH
from wallwm_jax.geometry.poses import geodesic_angle, rot6d_to_matrix

STRIDE = 2  # frames between the two that are compared
_PIXELS = 64  # images are averaged down to about this many a side
_CHUNK = 64  # frames in float at a time
_FLOOR = 0.02  # quantile of the frame differences that counts as sensor noise
_OUTLIER = 3.0  # times the 98 % quantile: more is a glitch, cut off


def visual_motion(frames: np.ndarray) -> np.ndarray:
  """Grey levels by which the picture changes, without the noise floor: uint8 [T, H, W, 3] ->
  float32 [T - STRIDE]."""
  block = max(min(frames.shape[1:3]) // _PIXELS, 1)
  small = np.concatenate(
    [_shrink(frames[t : t + _CHUNK], block) for t in range(0, len(frames), _CHUNK)]
  )
  change = np.abs(small[STRIDE:] - small[:-STRIDE]).mean((1, 2))
  floor = np.quantile(change, _FLOOR)
  return _cut(np.sqrt(np.maximum(change**2 - floor**2, 0))).astype(np.float32)


def robot_motion(poses: np.ndarray, turn_arm: float, grip_arm: float) -> np.ndarray:
  """Metres that each arm moves: [T, A] -> float32 [arms, T - STRIDE].

  Rotation counts as `turn_arm` m per rad, the gripper as `grip_arm` m for its whole range.
  Rows that are no numbers count as rest.
  """
  poses = np.asarray(poses, np.float64).reshape(len(poses), -1, ARM_WIDTH)
  poses = np.where(np.isfinite(poses).all(-1, keepdims=True), poses, 0)
  before, after = poses[:-STRIDE], poses[STRIDE:]
  rotation = [rot6d_to_matrix(x[..., 3:9]) for x in (before, after)]
  moved = np.linalg.norm(after[..., :3] - before[..., :3], axis=-1)
  turned = turn_arm * geodesic_angle(*rotation)
  gripped = grip_arm * np.abs(after[..., 9] - before[..., 9])
  speed = np.sqrt(moved**2 + turned**2 + gripped**2)
  return np.stack([_cut(x) for x in speed.T]).astype(np.float32)


def channels(signal: np.ndarray) -> np.ndarray:
  """The ways in which motion is compared: non-negative [..., N] -> [..., 4, N]: its root (so that
  slow motion counts), the change of it and of the root, and the change of the change."""
  root = np.sqrt(signal)
  smooth, smooth_root = (ndimage.gaussian_filter1d(x, 1.0, axis=-1) for x in (signal, root))
  bend = np.gradient(ndimage.gaussian_filter1d(signal, 1.5, axis=-1), axis=-1)
  changes = [np.gradient(x, axis=-1) for x in (smooth, smooth_root, bend)]
  return np.stack([root, *changes], axis=-2)


def lagged_correlation(a: np.ndarray, b: np.ndarray, max_lag: int) -> np.ndarray:
  """Correlation of a[t] with b[t + lag] over the frames that both have: [..., N] each ->
  [..., 2 max_lag + 1]; 0 where one of them is constant."""
  n, out = a.shape[-1], []
  for lag in range(-max_lag, max_lag + 1):
    x, y = a[..., max(0, -lag) : n - max(0, lag)], b[..., max(0, lag) : n + min(0, lag)]
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    out.append(np.where(scale > 0, (x * y).sum(-1) / np.maximum(scale, 1e-30), 0))
  return np.stack(out, -1)


def _shrink(frames: np.ndarray, block: int) -> np.ndarray:
  """Grey, averaged over block x block px: uint8 [T, H, W, 3] -> float32 [T, H', W']."""
  t, h, w = len(frames), frames.shape[1] // block, frames.shape[2] // block
  grey = frames[:, : h * block, : w * block].mean(-1, dtype=np.float32)
  return grey.reshape(t, h, block, w, block).mean((2, 4))


def _cut(signal: np.ndarray) -> np.ndarray:
  return np.minimum(signal, _OUTLIER * np.quantile(signal, 0.98)) if len(signal) else signal
