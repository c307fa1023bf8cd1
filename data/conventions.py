"""What a store's robot data are in: units, absolute or per step, which way the gripper counts.

A wrong convention passes every check of form: numbers are finite and rotations orthonormal. It
shows in magnitudes, in how commands and measured poses follow each other, and in what events are
called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from wallwm_jax.data.records import EpisodeInfo
from wallwm_jax.data.schema import ARM_WIDTH
from wallwm_jax.geometry.poses import geodesic_angle, rot6d_to_matrix

REACH = 5.0  # m from its base; no robot gets there
FAST = 1.0  # rad between two frames; no hand turns so
UNEQUAL = 30  # ratio of spreads of state and actions that no tracking error explains
EVIDENCE = 5  # events that contradict their names before a gripper is called inverted
_CLOSES, _OPENS = ('grasp', 'grip', 'grab', 'pick'), ('release', 'drop', 'let go')


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """One finding.

  check: its name; severity: 'severe' = do not train on this; channel: e.g. 'state[2] z', '' = not
  of one channel; value, expected: what was found and what should be; message: what it means and
  what to do.
  """

  check: str
  severity: Literal['severe', 'warning', 'info']
  channel: str
  value: str
  expected: str
  message: str


def conventions(infos: Sequence[EpisodeInfo]) -> Iterator[Diagnosis]:
  """Findings about episodes that have state and actions of one width."""
  if not infos:
    return
  for check in (_sizes, _deltas, _spreads):  # each explains what the next ones would find
    found = list(check(infos))
    yield from found
    if found:
      break
  for check in (_rotation, _gripper, _gripper_use):
    yield from check(infos)


def _sizes(infos: Sequence[EpisodeInfo]) -> Iterator[Diagnosis]:
  """Metres, from magnitudes."""
  for name in ('state', 'actions'):
    size = float(np.quantile(np.abs(_arms(infos, name)[:, :3]), 0.99))
    if size > REACH:
      unit, factor = ('millimetres', 1000) if size > 100 else ('centimetres', 100)
      yield Diagnosis(
        'units', 'severe', f'{name} position', f'{size:.3g}', f'< {REACH:g} m',
        f'Positions look like {unit}: divide by {factor} in the reader (the spec of the data set).',
      )  # fmt: skip


def _spreads(infos: Sequence[EpisodeInfo]) -> Iterator[Diagnosis]:
  """Equal units of state and actions."""
  spread = {}
  for name in ('state', 'actions'):
    low, high = np.quantile(_arms(infos, name)[:, :3], [0.05, 0.95], axis=0)
    spread[name] = float((high - low).max())
  if 0 < min(spread.values()) < max(spread.values()) / UNEQUAL:
    yield Diagnosis(
      'units', 'severe', 'position', ', '.join(f'{k} {v:.3g}' for k, v in spread.items()),
      'equal spreads, m',
      'Measured and commanded positions are of different units. Convert both to absolute metres in '
      'the reader.',
    )  # fmt: skip


def _rotation(infos: Sequence[EpisodeInfo]) -> Iterator[Diagnosis]:
  """Radians, from how fast the hand seems to turn and from how state and actions compare."""
  turned, step = {'state': [], 'actions': []}, {'state': [], 'actions': []}
  for info in infos:
    for name in turned:
      r = rot6d_to_matrix(
        getattr(info, name).astype(np.float64).reshape(info.num_frames, -1, ARM_WIDTH)[..., 3:9]
      )
      turned[name].append(geodesic_angle(r, r[:1]).ravel())
      step[name].append(geodesic_angle(r[1:], r[:-1]).ravel())
  for name, angles in step.items():
    fast = float(np.quantile(np.concatenate(angles), 0.9))
    if fast > FAST:
      yield Diagnosis(
        'units', 'severe', f'{name} rotation', f'{fast:.2g} rad per frame',
        f'< {FAST:g} rad per frame',
        'The hand jumps from one orientation to another: angles in degrees were taken for radians, '
        'or another order of Euler angles. Correct the rotation of the data set in its spec.',
      )  # fmt: skip
  far = {name: float(np.quantile(np.concatenate(a), 0.9)) for name, a in turned.items()}
  if max(far.values()) > 0.1 and min(far.values()) < max(far.values()) / UNEQUAL:
    yield Diagnosis(
      'units', 'severe', 'rotation', ', '.join(f'{k} {v:.2g} rad' for k, v in far.items()),
      'equal angles',
      'State and actions turn by different angles: one is in degrees (a factor of 57.3), or one is '
      'a change per step. Convert both to absolute rotations in the reader.',
    )  # fmt: skip


def _deltas(infos: Sequence[EpisodeInfo]) -> Iterator[Diagnosis]:
  """Whether actions[t] is where state[t + 1] is, or the way there; and the reverse."""
  here, after, command, change = (np.concatenate(x) for x in zip(*map(_steps, infos)))
  moving = np.linalg.norm(command - here, axis=-1) > 1e-6
  if not moving.any():
    return

  def typical(x):
    return float(np.median(np.linalg.norm(x[moving], axis=-1)))

  absolute = typical(after - command)
  for check, error, step, text in (
    ('delta_actions', typical(after - here - command), typical(after - here),
     'Actions are changes per step, but absolute targets are expected. Add the state in the reader '
     "(the spec's action kind 'delta')."),
    ('delta_state', typical(after - change), typical(change),
     'The state is a change per step, but the measured absolute pose is expected. Use the pose of '
     'the robot, or integrate the changes from a known start.'),
  ):  # fmt: skip
    if error < min(0.3 * absolute, 0.8 * step):
      yield Diagnosis(
        check, 'severe', 'position', f'{error:.2g} m off as a change, {absolute:.2g} m as a target',
        'an absolute target close to the next state', text,
      )  # fmt: skip


def _steps(info: EpisodeInfo) -> tuple[np.ndarray, ...]:
  """Positions [n, 3] of state, next state, command, and the command's change to it."""
  s, a = (x.reshape(len(x), -1, ARM_WIDTH)[..., :3] for x in (info.state, info.actions))
  parts = s[1:-1], s[2:], a[1:-1], a[1:-1] - a[:-2]
  return tuple(x.reshape(-1, 3) for x in parts)


def _gripper(infos: Sequence[EpisodeInfo]) -> Iterator[Diagnosis]:
  """The range of the gripper, and whether state and actions mean the same by it."""
  x = {name: _arms(infos, name)[:, 9] for name in ('state', 'actions')}
  for name, grip in x.items():
    low, high = float(grip.min()), float(grip.max())
    if 0.02 < high - low < 0.5 and high < 0.5:
      yield Diagnosis(
        'gripper_range', 'severe', f'{name} gripper', f'{low:.3g}..{high:.3g}',
        '0 (closed) .. 1 (open)',
        'The opening is in another unit (m?) than the fraction of the widest opening. Divide by '
        'the opening of the open gripper in the reader.',
      )  # fmt: skip
  state = np.concatenate([_per_arm(i.state)[1:, :, 9].ravel() for i in infos])
  command = np.concatenate([_per_arm(i.actions)[:-1, :, 9].ravel() for i in infos])
  if state.std() > 0.05 and command.std() > 0.05:
    together = float(np.corrcoef(state, command)[0, 1])
    if together < -0.3:
      yield Diagnosis(
        'gripper_inverted', 'severe', 'gripper', f'correlation {together:.2f}', '> 0',
        'One of state and actions has 1 = closed. Invert it (1 - x) in the reader.',
      )  # fmt: skip


def _gripper_use(infos: Sequence[EpisodeInfo]) -> Iterator[Diagnosis]:
  """Whether the gripper closes in events that are called a grasp and opens in a release."""
  right = wrong = 0
  for info in infos:
    for event in info.events:
      name = (event.captions.get('L1') or event.label).lower()
      way = any(w in name for w in _OPENS) - any(w in name for w in _CLOSES)
      grip = _per_arm(info.state)[[event.start, event.end - 1], :, 9]
      change = grip[1] - grip[0]
      change = float(change[np.argmax(np.abs(change))])
      if way and abs(change) > 0.1:
        right, wrong = right + (way * change > 0), wrong + (way * change < 0)
  if wrong >= EVIDENCE and wrong > 2 * right:
    yield Diagnosis(
      'gripper_inverted', 'severe', 'state gripper', f'{wrong} of {right + wrong} events',
      'closes in grasps, opens in releases',
      'The gripper has 1 = closed: invert it (1 - x) in state and actions in the reader.',
    )  # fmt: skip


def _per_arm(x: np.ndarray) -> np.ndarray:
  return x.reshape(len(x), -1, ARM_WIDTH)


def _arms(infos: Sequence[EpisodeInfo], name: str) -> np.ndarray:
  """[n, 10]: all poses of all arms."""
  return np.concatenate([getattr(info, name).reshape(-1, ARM_WIDTH) for info in infos])
