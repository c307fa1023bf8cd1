"""Layouts whose meaning is known although their metadata does not spell it out."""

from __future__ import annotations

import re

from wallwm_jax.data.readers.features import Features, cameras, unknown_layout
from wallwm_jax.data.readers.spec import (
  Action,
  Arm,
  Camera,
  Caption,
  DatasetSpec,
  Gripper,
  Position,
  Rotation,
  State,
  Text,
)

STATE, ACTION = 'observation.state', 'action'  # LeRobot's names
POSE_NAMES = ('x', 'y', 'z', *(f'rot6d_{i}' for i in range(6)), 'gripper')  # of one arm
COUNTERS = {  # the columns that every LeRobot data set has, or may have: dtype
  'timestamp': 'float32',
  'frame_index': 'int64',
  'episode_index': 'int64',
  'index': 'int64',
  'task_index': 'int64',
  'subtask_index': 'int64',
}
METAWORLD_METRES = 0.01  # mocap displacement per unit of action (Meta-World's action_scale)


def pose_names(arms: int) -> tuple[str, ...]:
  """Channel names of canonical poses [10 * arms]; the second arm's have a suffix."""
  return POSE_NAMES + tuple(f'{name}_1' for name in POSE_NAMES) * (arms - 1)


def rlds_layout(where, features: Features) -> DatasetSpec:
  """The spec of BridgeData V2's RLDS layout, with whatever image_k cameras the data set has.

  Measured on real clips: position and rotation of an action are increments in the robot base frame
  (rotation applied from the left) that bring state[t] towards state[t + 1], the gripper is the
  absolute command, 1 = open.

  Raises:
    UnknownLayoutError: another layout.
  """
  expected = {'observation/state': (7,), 'action': (7,), 'language_instruction': ()}
  reasons = []
  for name, shape in expected.items():
    got = features[name].shape if name in features else f'only {sorted(features)}'
    if got != shape:
      reasons.append(
        f'BridgeData V2 has a feature {name.split("/")[-1]!r} of shape {shape}, got {got}'
      )
  images = sorted(c for c in cameras(features) if re.fullmatch(r'observation/image_\d+', c))
  if not images:
    reasons.append(f'BridgeData V2 has cameras observation/image_0.., got {cameras(features)}')
  if reasons:
    raise unknown_layout(where, features, reasons)
  text = 'language_instruction'
  return DatasetSpec(
    cameras=tuple(_bridge_camera(name, features) for name in images),
    arms=(
      Arm(State(*_bridge_pose('observation/state')), Action('delta_base', *_bridge_pose('action'))),
    ),
    fps=5.0,
    captions=(Caption(text, level='L3'), Caption(text, level='L1')),
  )


def _bridge_camera(name: str, features: Features) -> Camera:
  view = name.removeprefix('observation/')
  flag = f'episode_metadata/has_{view}'
  return Camera(name, view, flag if flag in features else '')


def _bridge_pose(name: str) -> tuple[Position, Rotation, Gripper]:
  return (
    Position(name, (0, 1, 2), 'm'),
    Rotation('euler', name, (3, 4, 5), 'rad', 'xyz'),
    Gripper(name, 6, open=1.0, closed=0.0),
  )


def lerobot_layout(where, features: Features, robot: str | None) -> DatasetSpec:
  """The spec of a LeRobot data set of canonical poses (writers.lerobot), of video only, or of
  Meta-World.

  Meta-World: the hand never turns; the action moves its mocap target by action / 100 m, its last
  channel drives the fingers from -1 (open) to 1 (closed).

  Raises:
    UnknownLayoutError: another layout.
  """
  names = {name: features[name].names for name in (STATE, ACTION) if name in features}
  if set(features) <= {*cameras(features), *COUNTERS}:
    return DatasetSpec(_all_cameras(features), ())
  for arms in (1, 2):
    if set(names.values()) == {pose_names(arms)} and STATE in names:
      return DatasetSpec(_all_cameras(features), _canonical_arms(arms, ACTION in names))
  if robot == 'sawyer' and names == {
    STATE: ('x', 'y', 'z', 'gripper'),
    ACTION: ('dx', 'dy', 'dz', 'grip'),
  }:
    return _metaworld(features)
  raise unknown_layout(
    where,
    features,
    [
      f'canonical poses have channels {POSE_NAMES[0]}, .. {POSE_NAMES[-1]}',
      'Meta-World has robot_type sawyer, state [x, y, z, gripper] and action [dx, dy, dz, grip]',
      f'got robot_type {robot} and { ({k: list(v) for k, v in names.items()}) }',
    ],
  )


def _all_cameras(features: Features) -> tuple[Camera, ...]:
  prefixes = ('observation.images.', 'observation.image.', 'observation.')
  views = []
  for name in cameras(features):
    prefix = next((p for p in prefixes if name.startswith(p)), '')
    views.append(Camera(name, name.removeprefix(prefix)))
  return tuple(views)


def _canonical_arms(count: int, commanded: bool) -> tuple[Arm, ...]:
  arms = []
  for k in range(count):
    state, action = (
      (
        Position(name, (10 * k, 10 * k + 1, 10 * k + 2), 'm'),
        Rotation('rot6d', name, tuple(range(10 * k + 3, 10 * k + 9))),
        Gripper(name, 10 * k + 9, open=1.0, closed=0.0),
      )
      for name in (STATE, ACTION)
    )
    arms.append(Arm(State(*state), Action('absolute', *action) if commanded else None))
  return tuple(arms)


def _metaworld(features: Features) -> DatasetSpec:
  state = State(
    Position(STATE, (0, 1, 2), 'm'), Rotation('none'), Gripper(STATE, 3, open=1.0, closed=0.0)
  )
  action = Action(
    'delta_base',
    Position(ACTION, (0, 1, 2), 'm', METAWORLD_METRES),
    Rotation('none'),
    Gripper(ACTION, 3, open=-1.0, closed=1.0),
  )
  phases = 'phase' in features and features['phase'].dtype == 'int64'
  return DatasetSpec(
    _all_cameras(features), (Arm(state, action),), events=Text('phase') if phases else None
  )
