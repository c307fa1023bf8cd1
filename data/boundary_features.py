"""What one arm's motion shows about event boundaries: directions and cues, frame by frame.

Everything is measured in units of the episode itself (its fast frames), and nothing depends on how
the base frame is turned about its vertical but the directions, so that a detector trained in one
cell is of use in another.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.spatial.transform import Rotation

from wallwm_jax.geometry.poses import matmul3, rot6d_to_matrix, transpose3

_LAGS = (1, 2, 4, 8)  # frames before and after, over which motion is compared
_WINDOWS = (4, 8, 14)  # frames on either side of a change point
_FAST = 0.95  # quantile of an episode's frames that sets its unit of motion
# Motion below these is noise, per frame: m, m (of the command ahead of the pose), rad, rad.
_FLOORS = {'move': 2e-4, 'ahead': 1e-3, 'turn': 3e-3, 'turn_ahead': 5e-3, 'command': 2e-4}
_GRIP_FLOOR = 0.1  # of the gripper's range
_CHANGE_NOISE = 0.05  # in units of motion, what a change point must stand out from


def arm_features(state: np.ndarray, actions: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
  """Directions and cues of one arm.

  Args:
    state: [T, 10] measured poses; actions: [T, 10] commanded poses, or None.

  Returns:
    Directions float32 [T, V, 3] in the base frame (V = 5 with actions, 2 without), about -1..1, and
    cues float32 [T, S] that do not change when the base frame is turned.
  """
  vectors, grips = _motion(state.astype(np.float64), actions)
  directions = np.stack(list(vectors.values()), 1)
  cues = [_grip_cues(grip) for grip in grips]
  for name, x in vectors.items():
    cues.append(_speed_cues(x))
    if name in ('move', 'ahead', 'command'):
      cues += [_direction_change(x, lag) for lag in _LAGS]
  together = np.concatenate([*vectors.values(), *(g[:, None] for g in grips)], 1)
  observed = np.concatenate([vectors['move'], vectors['turn'], grips[0][:, None]], 1)
  for x in (together, observed) if actions is not None else (observed,):
    cues += [_change_point(x, window, order) for window in _WINDOWS for order in (0, 1)]
  return directions.astype(np.float32), np.concatenate(cues, 1).astype(np.float32)


def moves(state: np.ndarray) -> bool:
  """Whether an arm [T, 10] does anything at all: 1 cm of way, 3 degrees of turn or a tenth of the
  gripper's range."""
  spread = state.max(0) - state.min(0)
  return bool(spread[:3].max() > 0.01 or spread[3:9].max() > 0.05 or spread[9] > 0.1)


def _motion(state: np.ndarray, actions: np.ndarray | None):
  """Vectors {name: [T, 3]} in units of the episode and grips ([T], ...) in 0..1."""
  rotation = rot6d_to_matrix(state[:, 3:9])
  vectors = {
    'move': _forward(state[:, :3]),
    'turn': _hold(_turn(rotation[:-1], rotation[1:])),
  }
  grips = [_grip(state[:, 9])]
  if actions is not None:
    target = actions.astype(np.float64)
    vectors['ahead'] = target[:, :3] - state[:, :3]
    vectors['turn_ahead'] = _turn(rotation, rot6d_to_matrix(target[:, 3:9]))
    vectors['command'] = np.diff(target[:, :3], axis=0, prepend=target[:1, :3])
    grips.append(_grip(target[:, 9]))
  for name, x in vectors.items():
    unit = max(np.quantile(np.linalg.norm(x, axis=1), _FAST), _FLOORS[name])
    vectors[name] = np.clip(x / unit, -3, 3)
  return vectors, grips


def _forward(x: np.ndarray) -> np.ndarray:
  """x[t + 1] - x[t], the last one held."""
  return _hold(np.diff(x, axis=0))


def _hold(x: np.ndarray) -> np.ndarray:
  return np.concatenate([x, x[-1:]])


def _turn(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Rotation vectors [n, 3] rad of b a^-1 in the base frame."""
  return Rotation.from_matrix(matmul3(b, transpose3(a))).as_rotvec()


def _grip(x: np.ndarray) -> np.ndarray:
  """Gripper opening over the episode's own range."""
  x = x.astype(np.float64)
  return (x - x.min()) / max(np.ptp(x), _GRIP_FLOOR)


def _speed_cues(x: np.ndarray) -> np.ndarray:
  """[T, 4]: speed, its logarithm, how it compares with its neighbourhood, acceleration."""
  speed = np.linalg.norm(x, axis=1)
  near = sliding_window_view(np.pad(speed, 6, mode='edge'), 13)
  valley = (speed + 0.02) / (near.max(1) + 0.02)
  jump = np.linalg.norm(x - np.concatenate([x[:1], x[:-1]]), axis=1)
  return np.stack([speed, np.log(speed + 0.03), valley, jump], 1)


def _grip_cues(grip: np.ndarray) -> np.ndarray:
  """[T, 5]: opening, and its change over four lags."""
  columns = [grip]
  for lag in _LAGS:
    padded = np.pad(grip, lag, mode='edge')
    columns.append(padded[2 * lag :] - padded[: -2 * lag])
  return np.stack(columns, 1)


def _direction_change(x: np.ndarray, lag: int) -> np.ndarray:
  """[T, 3]: cosine between the mean motion of the `lag` frames before and from a frame on, the
  relative change of its size, and the size of the change."""
  total = np.cumsum(np.pad(x, ((lag + 1, lag), (0, 0)), mode='edge'), axis=0)
  mean = (total[lag:] - total[:-lag]) / lag
  before, after = mean[: len(x)], mean[lag : lag + len(x)]
  size_before, size_after = np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)
  cosine = (before * after).sum(1) / (size_before * size_after + 1e-2)
  growth = (size_after - size_before) / (size_after + size_before + 5e-2)
  return np.stack([cosine, growth, np.linalg.norm(after - before, axis=1)], 1)


def _change_point(x: np.ndarray, window: int, order: int) -> np.ndarray:
  """[T, 1]: log likelihood ratio (scaled) of two polynomials of `order` in time, that meet at a
  frame, against one over the whole window: Gaussian noise, least squares."""
  padded = np.pad(x, ((window, window - 1), (0, 0)), mode='edge')
  half = _residual(padded, window, order)
  joint = _residual(padded, 2 * window, order)
  count = len(x)
  separate = half[:count] + half[window : window + count]
  noise = 2 * window * x.shape[1] * _CHANGE_NOISE**2
  return np.log((joint[:count] + noise) / (separate + noise))[:, None]


def _residual(x: np.ndarray, window: int, order: int) -> np.ndarray:
  """Squared residual of a polynomial fit to every window of x [n, d]: [n - window + 1]."""
  basis, _ = np.linalg.qr(np.vander(np.arange(window) - (window - 1) / 2, order + 1))
  views = sliding_window_view(x, window, axis=0)  # [n - window + 1, d, window]
  energy = (views**2).sum((1, 2))
  explained = ((views @ basis) ** 2).sum((1, 2))
  return np.maximum(energy - explained, 0)
