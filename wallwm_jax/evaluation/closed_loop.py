"""Closed-loop scores from arrays of rollouts: success with Wilson intervals, progress with
bootstrap ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from wallwm_jax.evaluation.base import Interval, bootstrap_interval, wilson_interval
from wallwm_jax.geometry.poses import POSE_WIDTH
from wallwm_jax.types import DataError

STILL = 1e-5  # m per step: targets that stay within this do not move


@dataclasses.dataclass(frozen=True)
class ClosedLoopResult:
  """Scores of n rollouts.

  success: rate; progress: mean task progress 0..100; by_kind: {kind: (success, progress)} in order
  of first appearance; macro_success: mean of the kinds' success rates; planned: share of turns for
  which a planner named the environment's own next event, mean over rollouts, None where no planner
  spoke.
  """

  n: int
  success: Interval
  progress: Interval
  by_kind: dict[str, tuple[Interval, Interval]]
  macro_success: float
  planned: Interval | None = None

  def to_json(self) -> dict:
    """Flat keys for scripts: success, success_low, success_high, progress, ..., n, kinds, and
    planned, ... of a planner."""
    kinds = {kind: _flat(*pair) for kind, pair in self.by_kind.items()}
    result = _flat(self.success, self.progress) | {
      'macro_success': self.macro_success,
      'kinds': kinds,
    }
    if self.planned is not None:
      planned = self.planned
      result |= {
        'planned': planned.value,
        'planned_low': planned.low,
        'planned_high': planned.high,
      }
    return result


def _flat(success: Interval, progress: Interval) -> dict:
  return {
    'n': success.n,
    'success': success.value,
    'success_low': success.low,
    'success_high': success.high,
    'progress': progress.value,
    'progress_low': progress.low,
    'progress_high': progress.high,
  }


def evaluate(
  success, progress, kinds: Sequence[str] | None = None, planned=None
) -> ClosedLoopResult:
  """Scores rollouts.

  Args:
    success: [n] bool; progress: [n] in 0..100; kinds: [n] names (event kinds, tasks), None = one
      kind.
    planned: [n] share of each rollout's turns that a planner named rightly, NaN where it had no
      turn; None = no planner.

  Raises:
    DataError: no rollouts, lengths that differ, progress outside 0..100 or not finite, shares
      outside 0..1.
  """
  success, progress = np.asarray(success, bool), np.asarray(progress, np.float64)
  kinds = np.asarray(['all'] * len(success) if kinds is None else list(kinds))
  if success.ndim != 1 or not len(success) or not len(success) == len(progress) == len(kinds):
    raise DataError(
      f'closed-loop evaluation: expected success, progress and kinds [n] with n >= 1, got '
      f'{success.shape}, {progress.shape}, {kinds.shape}.'
    )
  if not (np.isfinite(progress) & (progress >= 0) & (progress <= 100)).all():
    raise DataError(
      f'closed-loop evaluation: expected progress in 0..100, got {progress.min()} to '
      f'{progress.max()}.'
    )

  def score(chosen):
    wins, trials = int(success[chosen].sum()), int(chosen.sum())
    return wilson_interval(wins, trials), bootstrap_interval(progress[chosen])

  by_kind = {kind: score(kinds == kind) for kind in dict.fromkeys(kinds.tolist())}
  overall = score(np.ones(len(success), bool))
  macro = float(np.mean([pair[0].value for pair in by_kind.values()]))
  return ClosedLoopResult(
    len(success), *overall, by_kind, macro, None if planned is None else _shares(planned, success)
  )


def _shares(planned, success) -> Interval | None:
  planned = np.asarray(planned, np.float64)
  known = planned[~np.isnan(planned)]
  if planned.shape != success.shape or not ((known >= 0) & (known <= 1)).all():
    raise DataError(
      f'closed-loop evaluation: expected planned {success.shape} in 0..1 or NaN, got '
      f'{planned.shape}: {planned}.'
    )
  return bootstrap_interval(known) if len(known) else None


def seam_jump(actions, mask, acted, moved=None) -> np.ndarray:
  """How far the first target of a turn lies from where the robot is by then, over the median step
  within turns: 1 is a motion that goes on at its pace, 0 one that stops.

  Actions are relative to the pose reached when they are asked for, so without waiting the distance
  is the length of the first one. Positions of all arms count as one vector.

  Args:
    actions: [n, T, K, A] relative, position m first in every 10 channels; mask: [n, T, K] steps
      carried out; acted: [n, T] turns that were carried out.
    moved: [n, T, A] pose reached just before the first of those steps, relative like the actions;
      None = the pose they are relative to.

  Returns:
    float64 [n]: mean over an attempt's seams; NaN where it has none, or its targets do not move by
      more than STILL.

  Raises:
    DataError: shapes that do not go together.
  """
  actions, mask, acted = np.asarray(actions, np.float64), np.asarray(mask, bool), np.asarray(acted)
  if actions.ndim != 4 or mask.shape != actions.shape[:3] or acted.shape != mask.shape[:2]:
    raise DataError(
      f'seam_jump: expected actions [n, T, K, A], mask [n, T, K] and acted [n, T], got '
      f'{actions.shape}, {mask.shape}, {acted.shape}.'
    )
  arms = actions.reshape(*actions.shape[:3], -1, POSE_WIDTH)
  position = arms[..., :3].reshape(*actions.shape[:3], -1)
  steps = np.linalg.norm(np.diff(position, axis=2), axis=-1)
  valid = mask[:, :, 1:] & mask[:, :, :-1] & acted.astype(bool)[:, :, None]
  seams = acted.astype(bool)[:, 1:] & acted.astype(bool)[:, :-1] & mask[:, 1:].any(-1)
  place = mask.argmax(-1)[:, :, None, None]
  target = np.take_along_axis(position, place, axis=2)[:, :, 0]
  if moved is not None:
    parts = np.asarray(moved, np.float64).reshape(*mask.shape[:2], -1, POSE_WIDTH)
    target = target - parts[..., :3].reshape(target.shape)
  first = np.linalg.norm(target[:, 1:], axis=-1)
  jumps = np.full(len(actions), np.nan)
  for i in range(len(actions)):
    pace = np.median(steps[i][valid[i]]) if valid[i].any() else 0.0
    if pace > STILL and seams[i].any():
      jumps[i] = first[i][seams[i]].mean() / pace
  return jumps


def time_to_success(success, turns, turn_time: float) -> np.ndarray:
  """Seconds until success was seen, to the turn: float64 [n], NaN for attempts that failed.

  Args:
    success: [n] bool; turns: [n] turns acted on; turn_time: s of one turn, waiting included.

  Raises:
    DataError: lengths that differ, or turn_time <= 0.
  """
  success, turns = np.asarray(success, bool), np.asarray(turns, np.float64)
  if success.shape != turns.shape or success.ndim != 1 or not turn_time > 0:
    raise DataError(
      f'time_to_success: expected success and turns [n] and turn_time > 0, got {success.shape}, '
      f'{turns.shape}, {turn_time}.'
    )
  return np.where(success, turns * turn_time, np.nan)


def progress_reached(progress, kinds: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """How far attempts get: {kind: (percent [m], share [m])}, the share of its attempts that reached
  at least so much progress, for 0, every value that occurs, and 100.

  Args:
    progress: [n] in 0..100; kinds: [n] names.
  """
  progress, kinds = np.asarray(progress, np.float64), np.asarray(list(kinds))
  curves = {}
  for kind in dict.fromkeys(kinds.tolist()):
    own = progress[kinds == kind]
    percent = np.unique(np.concatenate([[0.0], own, [100.0]]))
    curves[kind] = percent, (own[:, None] >= percent - 1e-6).mean(0)
  return curves


def mcnemar(first, second) -> float:
  """Exact two-sided p-value that two policies succeed equally often on the same n seeds.

  Args:
    first, second: [n] bool successes, paired.

  Source: McNemar (1947), exact binomial form.
  """
  first, second = np.asarray(first, bool), np.asarray(second, bool)
  if first.shape != second.shape or first.ndim != 1:
    raise DataError(
      f'mcnemar: expected paired successes [n], got {first.shape} and {second.shape}.'
    )
  only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
  discordant = only_first + only_second
  tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
  return min(1.0, 2 * tail / 2**discordant)
