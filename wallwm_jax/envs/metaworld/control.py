"""From what the robot measures to canonical poses, and from target poses to Meta-World's commands.

A command is 4 numbers in -1..1: displacement of the hand's target in METRES per unit, and the
fingers' effort from -1 (open) to 1 (close). The hand never turns.
"""

from __future__ import annotations

import numpy as np

from wallwm_jax.data.schema import ARM_WIDTH
from wallwm_jax.errors import DataError

METRES = 0.01  # per unit of a command
PROPRIO = 4  # leading entries of an observation that a robot measures; the others are privileged
UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # rot6d of the identity


def pose_of(observation: np.ndarray) -> np.ndarray:
  """Canonical pose, float32 [10], of obs[:4] alone: hand position m and gripper opening 0..1.

  The rest of an observation (poses of the objects, the goal) is not looked at.
  """
  return _pose(np.asarray(observation)[:3], np.asarray(observation)[3])


def target_of(pose: np.ndarray, command: np.ndarray) -> np.ndarray:
  """The absolute target, float32 [10], that a command [4] asks for at a measured pose [10]."""
  command = np.clip(np.asarray(command, np.float64), -1, 1)
  return _pose(np.asarray(pose, np.float64)[:3] + METRES * command[:3], (1 - command[3]) / 2)


def command_of(pose: np.ndarray, target: np.ndarray) -> np.ndarray:
  """The command, float32 [4] in -1..1, that leads from a measured pose towards an absolute target,
  both [10]. A target that is not finite keeps hand and fingers where they are.

  Raises:
    DataError: not one pose of ten numbers.
  """
  target = np.asarray(target, np.float64)
  if target.shape != (ARM_WIDTH,):
    raise DataError(f'target: expected one pose [{ARM_WIDTH}], got shape {list(target.shape)}.')
  pose = np.asarray(pose, np.float64)
  if not np.isfinite(target).all():
    target = pose
  way = (target[:3] - pose[:3]) / METRES
  return np.clip(np.append(way, 1 - 2 * target[9]), -1, 1).astype(np.float32)


def _pose(position: np.ndarray, opening: float) -> np.ndarray:
  return np.concatenate([position, UPRIGHT, [np.clip(opening, 0, 1)]]).astype(np.float32)
