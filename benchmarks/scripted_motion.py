"""Arms that follow random scripts of waypoints: motion of many kinds for `segmentation.py`.

Fifty tasks of one simulated robot teach a detector how these tasks are scripted. Here the legs,
gains, speeds, tolerances, pauses, turns, smoothing, noise and lag are drawn anew for every episode.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from wallwm_jax.geometry.poses import matrix_to_rot6d


def scripted(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """One episode: state, actions float32 [T, 10] (position m, rot6d, gripper 0..1) and labels int64
  [T], the step of the script that a command belongs to."""
  speed = rng.uniform(0.004, 0.015)  # m per frame
  gain = rng.uniform(0.1, 1.0)  # of the way that is left, per frame: small ones slow down early
  alpha = rng.uniform(0.2, 1.0)  # smoothing of commands
  beta = rng.uniform(0.3, 1.0)  # lag of the arm
  noise = speed * rng.uniform(0, 0.2)
  turning = rng.uniform() < 0.5
  position, turned, target = np.zeros(3), Rotation.identity(), Rotation.identity()
  velocity, smooth = np.zeros(3), np.zeros(3)
  grip, command = 1.0, 1.0
  closing = rng.uniform(0.05, 0.5)  # of the gripper's range per frame
  rows: list[tuple] = []
  for step in range(int(rng.integers(2, 9))):
    kind = 'dwell' if step and rng.uniform() < 0.3 else 'move'
    if kind == 'dwell':
      command = 1.0 - command
      frames, goal = int(rng.integers(5, 22)), position + 0.0
    else:
      frames, goal = 90, position + _leg(rng)
      if turning and rng.uniform() < 0.4:
        target = Rotation.from_rotvec(rng.normal(0, 0.6, 3)) * turned
    tolerance = speed * rng.uniform(0.5, 4)
    for _ in range(frames):
      left = goal - position
      if kind == 'move' and np.linalg.norm(left) < tolerance:
        break
      wanted = gain * left
      wanted *= min(1.0, speed / max(np.linalg.norm(wanted), 1e-9))
      smooth = smooth + alpha * (wanted - smooth)
      asked = smooth + noise * rng.standard_normal(3)
      rest = (target * turned.inv()).as_rotvec()
      turn = rest * min(1.0, 0.05 / max(np.linalg.norm(rest), 1e-9))
      asked_turn = Rotation.from_rotvec(turn) * turned
      rows.append((step, position, turned, grip, position + asked, asked_turn, command))
      velocity = velocity + beta * (asked - velocity)
      position, turned = position + velocity, asked_turn
      grip += float(np.clip(command - grip, -closing, closing))
  labels, position, turned, grip, asked, asked_turn, command = zip(*rows)
  return _pose(position, turned, grip), _pose(asked, asked_turn, command), np.array(labels)


def _leg(rng: np.random.Generator) -> np.ndarray:
  """A way of 3..35 cm; half of them along the vertical or within the horizontal plane."""
  way = rng.standard_normal(3)
  kind = rng.integers(4)
  if kind == 0:
    way[:2] *= 0.05
  elif kind == 1:
    way[2] *= 0.05
  return way * rng.uniform(0.03, 0.35) / np.linalg.norm(way)


def _pose(position, turned, grip) -> np.ndarray:
  turned = matrix_to_rot6d(Rotation.concatenate(turned).as_matrix())
  return np.concatenate([np.stack(position), turned, np.array(grip)[:, None]], 1).astype(np.float32)
