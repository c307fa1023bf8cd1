"""Motion in words: what a robot did between two frames, from its measured poses alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from wallwm_jax.data.schema import ARM_WIDTH
from wallwm_jax.data.traces import axis_words
from wallwm_jax.geometry.poses import rot6d_to_matrix

_SLOW = 0.2  # of an episode's fast motion: below it an arm counts as still
_STILL, _OPENING, _CLOSING = 6, 7, 8  # codes of frames; 0..5 are -x, +x, -y, +y, -z, +z
_SPAN = 2  # frames before and after, over which motion is measured


@dataclasses.dataclass(frozen=True)
class Thresholds:
  """What counts as motion between two frames: distance m, turn rad, grip of its range 0..1."""

  distance: float = 0.015
  turn: float = 0.25
  grip: float = 0.2


@dataclasses.dataclass(frozen=True)
class Primitive:
  """text: an instruction to do the same; label: what it is for balancing."""

  text: str
  label: str


def describe(
  state: np.ndarray,
  source: str,
  held: str = '',
  wanted: str = '',
  limits: Thresholds = Thresholds(),
) -> Primitive:
  """The motion of a stretch of an episode.

  Args:
    state: [n, A] measured poses; source: data set, which says how its base frame is oriented.
    held: name of what is in the gripper; wanted: of what the gripper closes on; '' = unknown.
  """
  arms = [state[:, k : k + ARM_WIDTH] for k in range(0, state.shape[1], ARM_WIDTH)]
  found = [_describe_arm(arm, source, held, wanted, limits) for arm in arms]
  told = [(k, x) for k, x in enumerate(found) if x is not None]
  if not told:
    return Primitive('hold still', 'pause')
  if len(arms) == 1:
    return told[0][1]
  text = ' and '.join(f'{x.text} with arm {k + 1}' for k, x in told)
  return Primitive(text, told[0][1].label)


def motion_cuts(state: np.ndarray, shortest: int) -> np.ndarray:
  """Frames at which the kind of motion changes: direction along an axis, gripper, rest.

  Args:
    state: [T, A]; shortest: frames between two cuts, and between a cut and either end.

  Returns:
    int64 [n], increasing.
  """
  codes = np.zeros(len(state), np.int64)
  for first in range(0, state.shape[1], ARM_WIDTH):
    codes = 16 * codes + _codes(state[:, first : first + ARM_WIDTH].astype(np.float64))
  return merge_runs(codes, shortest)


def retries(arm: np.ndarray, grip: float, distance: float) -> list[tuple[int, int]]:
  """Where a gripper opens and closes again near to where it closed before.

  Args:
    arm: [T, 10]; grip: least range of a gripper that is used; distance: m between both closings.

  Returns:
    (opening, second closing) frames.
  """
  opening = arm[:, 9]
  if np.ptp(opening) < grip:
    return []
  closed = 2 * opening < opening.min() + opening.max()
  flips = np.flatnonzero(closed[1:] != closed[:-1]) + 1
  closings = flips[closed[flips]]
  return [
    (int(flips[np.searchsorted(flips, a) + 1]), int(b))
    for a, b in itertools.pairwise(closings)
    if np.linalg.norm(arm[a, :3] - arm[b, :3]) <= distance
  ]


def merge_runs(labels: np.ndarray, shortest: int) -> np.ndarray:
  """Where a sequence of labels [T] changes, int64 [n], when runs of fewer than `shortest` frames
  are given to the run before them (the first to the run after), the shortest first."""
  starts = [0, *(np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist()]
  values = [labels[s].item() for s in starts]
  while len(starts) > 1:
    lengths = np.diff([*starts, len(labels)])
    run = int(lengths.argmin())
    if lengths[run] >= shortest:
      break
    del values[run], starts[max(run, 1)]
    seam = max(run, 1)
    if seam < len(values) and values[seam] == values[seam - 1]:
      del values[seam], starts[seam]
  return np.array(starts[1:], np.int64)


def _codes(arm: np.ndarray) -> np.ndarray:
  """[T] kind of motion at each frame of one arm [T, 10]."""
  count = len(arm)
  before = np.maximum(np.arange(count) - _SPAN, 0)
  after = np.minimum(np.arange(count) + _SPAN, count - 1)
  way = arm[after, :3] - arm[before, :3]
  size = np.linalg.norm(way, axis=1)
  axis = np.abs(way).argmax(1)
  codes = 2 * axis + (way[np.arange(count), axis] > 0)
  codes[size <= max(_SLOW * np.quantile(size, 0.95), 1e-3)] = _STILL
  grip = arm[after, 9] - arm[before, 9]
  codes[grip > 0.1] = _OPENING
  codes[grip < -0.1] = _CLOSING
  return codes


def _describe_arm(
  arm: np.ndarray, source: str, held: str, wanted: str, limits: Thresholds
) -> Primitive | None:
  arm = arm.astype(np.float64)
  words = axis_words(source)
  parts: list[tuple[str, str]] = []
  way, grip = arm[-1, :3] - arm[0, :3], arm[-1, 9] - arm[0, 9]
  path = np.linalg.norm(np.diff(arm[:, :3], axis=0), axis=1).sum()
  distance = np.linalg.norm(way)
  if distance >= limits.distance:
    where = _direction(way, words)
    verb, thing = ('carry', held) if held and grip < limits.grip else ('move', 'the gripper')
    text = f'{verb} {thing} {" and ".join(where)} by {max(round(100 * distance), 1)} cm'
    parts.append((text, f'{verb} {where[0]}'))
  elif path >= 3 * limits.distance:
    parts.append(('move the gripper to and fro', 'move'))
  if turn := _turn(arm, words, limits.turn):
    parts.append((turn, 'turn'))
  if grip >= limits.grip:
    parts.append(('open the gripper' + (f' and release {held}' if held else ''), 'open'))
  elif grip <= -limits.grip:
    parts.append(('close the gripper' + (f' on {wanted}' if wanted else ''), 'close'))
  if not parts:
    return None
  # The gripper names an event in which it moves, whatever else does.
  return Primitive(' and '.join(text for text, _ in parts), max(parts, key=_weight)[1])


def _weight(part: tuple[str, str]) -> int:
  return part[1] in ('open', 'close')


def _direction(way: np.ndarray, words: Sequence[str]) -> list[str]:
  """One or two words, the largest part of the way first."""
  order = np.argsort(-np.abs(way))[:2]
  return [words[2 * k + (way[k] > 0)] for k in order if abs(way[k]) >= 0.5 * np.abs(way).max()]


def _turn(arm: np.ndarray, words: Sequence[str], least: float) -> str:
  first, last = rot6d_to_matrix(arm[[0, -1], 3:9])
  vector = Rotation.from_matrix(last @ first.T).as_rotvec()
  angle = float(np.linalg.norm(vector))
  if angle < least:
    return ''
  axis = int(np.abs(vector).argmax())
  positive = words[2 * axis + 1]
  name = {'up': 'vertical', 'forward': 'forward', 'back': 'forward'}.get(positive, 'sideways')
  return f'turn the gripper about the {name} axis by {round(np.degrees(angle))} degrees'
