"""From a data set's own state and action vectors to canonical poses (schema.py)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from wallwm_jax.data.readers.features import Features, channel_indices
from wallwm_jax.data.readers.spec import (
  METRES,
  Action,
  DatasetSpec,
  Gripper,
  Position,
  Rotation,
  State,
)
from wallwm_jax.errors import DataError
from wallwm_jax.geometry.poses import matmul3, matrix_to_rot6d, rot6d_to_matrix, rotate

GRIPPER_SLACK = 0.05  # overshoot, of the range, that is clipped; more means another convention
_IDENTITY = np.array([1.0, 0, 0, 0, 1, 0])  # rot6d


def robot_poses(
  spec: DatasetSpec, features: Features, values: Mapping[str, np.ndarray]
) -> tuple[np.ndarray | None, np.ndarray | None]:
  """Measured poses and commanded target poses, float32 [T, 10 per arm] each or None.

  Args:
    values: {feature: [T, channels]} of spec.numeric_features. NaN and infinity stay what they are.

  Raises:
    DataError: a gripper outside the range of the spec, or a rotation that is none (a quaternion of
      length 0).
  """
  states, actions = [], []
  for arm in spec.arms:
    measured = _pose(arm.state, features, values)
    states.append(_join(*measured))
    if arm.action is not None:
      actions.append(_join(*_target(arm.action, measured, features, values)))
  return (
    np.concatenate(states, -1) if states else None,
    np.concatenate(actions, -1) if actions else None,
  )


def _pose(pose: State | Action, features: Features, values) -> tuple[np.ndarray, ...]:
  """Position [T, 3] m, rotation [T, 6], gripper [T, 1] as the channels say."""
  return (
    _position(pose.position, features, values),
    _rotation(pose.rotation, features, values),
    _gripper(pose.gripper, features, values),
  )


def _target(action: Action, measured, features: Features, values) -> tuple[np.ndarray, ...]:
  position, rotation, gripper = _pose(action, features, values)
  here, turned, _ = measured
  if action.convention == 'absolute':
    return position, turned if action.rotation.format == 'none' else rotation, gripper
  frame, turn = _matrix(turned), _matrix(rotation)
  if action.convention == 'delta_tool':
    position, result = rotate(frame, position), matmul3(frame, turn)
  else:
    result = matmul3(turn, frame)
  kept = action.rotation.format == 'none'
  return here + position, turned if kept else matrix_to_rot6d(result), gripper


def _matrix(rot6d: np.ndarray) -> np.ndarray:
  """[T, 3, 3]; NaN where the input is not finite, which Gram-Schmidt would turn into a rotation."""
  finite = np.isfinite(rot6d).all(-1)
  result = rot6d_to_matrix(np.where(finite[:, None], rot6d, _IDENTITY))
  result[~finite] = np.nan
  return result


def _channels(features: Features, values, name: str, channels) -> np.ndarray:
  x = np.asarray(values[name], np.float64)
  return x.reshape(len(x), -1)[:, channel_indices(features, name, channels)]


def _position(position: Position, features: Features, values) -> np.ndarray:
  x = _channels(features, values, position.feature, position.channels)
  return x * (METRES[position.unit] * position.scale)


def _gripper(gripper: Gripper, features: Features, values) -> np.ndarray:
  x = _channels(features, values, gripper.feature, (gripper.channel,))
  share = (x - gripper.closed) / (gripper.open - gripper.closed)
  if share.min() < -GRIPPER_SLACK or share.max() > 1 + GRIPPER_SLACK:
    low, high = sorted((gripper.open, gripper.closed))
    raise DataError(
      f'gripper: expected {low:g}..{high:g} ({gripper.open:g} = open), '
      f'got {x.min():.3g}..{x.max():.3g} in {gripper.feature}'
    )
  return np.clip(share, 0, 1) + 0.0  # not -0


def _rotation(rotation: Rotation, features: Features, values) -> np.ndarray:
  """[T, 6]; the identity where the format is none."""
  if rotation.format == 'none':
    length = len(next(iter(values.values())))
    return np.tile(_IDENTITY, (length, 1))
  x = _channels(features, values, rotation.feature, rotation.channels)
  if rotation.format == 'rot6d':
    return x
  if rotation.format == 'matrix':
    return matrix_to_rot6d(x.reshape(-1, 3, 3))
  result = np.full((len(x), 6), np.nan)
  finite = np.isfinite(x).all(-1)
  if finite.any():
    try:
      result[finite] = matrix_to_rot6d(_matrices(rotation, x[finite]))
    except ValueError as error:
      raise DataError(f'rotation: {rotation.feature} as {rotation.format}: {error}') from None
  return result


def _matrices(rotation: Rotation, x: np.ndarray) -> np.ndarray:
  from scipy.spatial.transform import Rotation as Turn  # slow to import

  degrees = rotation.unit == 'deg'
  if rotation.format == 'euler':
    turn = Turn.from_euler(rotation.order, x * rotation.scale, degrees=degrees)
  elif rotation.format == 'axis_angle':
    turn = Turn.from_rotvec(x * rotation.scale, degrees=degrees)
  else:
    turn = Turn.from_quat(x, scalar_first=rotation.format == 'quaternion_wxyz')
  return turn.as_matrix()


def _join(position: np.ndarray, rotation: np.ndarray, gripper: np.ndarray) -> np.ndarray:
  return np.concatenate([position, rotation, gripper], -1).astype(np.float32)
