"""Shape and timing of predicted motion, apart from each other: dynamic time warping of paths,
gripper transitions matched within a tolerance, and durations."""

from __future__ import annotations

import numpy as np

from wallwm_jax.evaluation.boundaries import match_boundaries
from wallwm_jax.types import DataError

HALF_OPEN = 0.5  # a gripper is open above this
TRANSITION_STEPS = 2  # a transition is found when it lies at most this many action steps away


def dtw(first, second, first_length=None, second_length=None) -> np.ndarray:
  """Mean distance along the cheapest monotone alignment of two paths: zero for paths of one shape
  gone through at different paces.

  The first points are aligned and so are the last; each step of the alignment advances one path or
  both. The sum of distances is minimal; among equal sums the alignment with fewer pairs is taken,
  and the sum is divided by its number of pairs.

  Args:
    first: [B, P, D]; second: [B, T, D], same unit (positions: m).
    first_length: [B] valid points 0..P; second_length: [B] 0..T; None = all.

  Returns:
    float64 [B], in the unit of the points; NaN where a path has no point.

  Raises:
    DataError: shapes that do not go together, or lengths outside.

  Source: Sakoe & Chiba (1978), "Dynamic programming algorithm optimization for spoken word
  recognition", symmetric form without slope weights.
  """
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  if first.ndim != 3 or second.ndim != 3 or first.shape[::2] != second.shape[::2]:
    raise DataError(
      f'dtw: expected paths [B, P, D] and [B, T, D], got {first.shape} and {second.shape}.'
    )
  batch, p, t = len(first), first.shape[1], second.shape[1]
  rows, columns = _lengths(first_length, batch, p), _lengths(second_length, batch, t)
  # cost[:, i, j]: distances summed over the best alignment of the first i and j points.
  cost = np.full((batch, p + 1, t + 1), np.inf)
  pairs = np.zeros((batch, p + 1, t + 1))
  cost[:, 0, 0] = 0
  for i in range(1, p + 1):
    distance = np.linalg.norm(first[:, i - 1, None] - second, axis=-1)
    for j in range(1, t + 1):
      came = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
      costs = np.stack([cost[:, a, b] for a, b in came])
      counts = np.stack([pairs[:, a, b] for a, b in came])
      best = costs.min(0)
      fewest = np.where(costs == best, counts, np.inf).min(0)
      cost[:, i, j], pairs[:, i, j] = best + distance[:, j - 1], fewest + 1
  known = (rows > 0) & (columns > 0)
  row = np.arange(batch)
  ends = cost[row, rows, columns], pairs[row, rows, columns]
  return np.where(known, ends[0] / np.maximum(ends[1], 1), np.nan)


def transitions(gripper) -> tuple[np.ndarray, np.ndarray]:
  """Steps at which a gripper opens and at which it closes.

  Args:
    gripper: [K] opening 0..1, open above HALF_OPEN.

  Returns:
    Two int64 arrays: the first step that is open after a closed one, and the other way round.
  """
  change = np.diff((np.asarray(gripper) > HALF_OPEN).astype(np.int8))
  return np.flatnonzero(change == 1) + 1, np.flatnonzero(change == -1) + 1


def gripper_f1(predicted, true, start, valid, tolerance: int = TRANSITION_STEPS) -> np.ndarray:
  """F1 of gripper transitions of each event, openings matched to openings and closings to closings.

  Args:
    predicted, true: [B, K, R] openings 0..1 of each arm; valid: [B, K, R], True where supervised.
    start: [B, R] the opening before the first step, so that a change at step 0 counts.
    tolerance: action steps.

  Returns:
    float64 [B], over all arms; NaN where neither has a transition.

  Raises:
    DataError: shapes that do not go together.
  """
  predicted, true, valid = np.asarray(predicted), np.asarray(true), np.asarray(valid, bool)
  start = np.asarray(start)
  alike = predicted.shape == true.shape == valid.shape and true.ndim == 3
  if not alike or start.shape != true.shape[::2]:
    raise DataError(
      f'gripper_f1: expected predicted, true and valid [B, K, R] and start [B, R], got '
      f'{predicted.shape}, {true.shape}, {valid.shape} and {start.shape}.'
    )
  scores = np.full(len(true), np.nan)
  for b in range(len(true)):
    matched = total = 0
    for arm in range(true.shape[2]):
      keep = valid[b, :, arm]
      sides = [
        transitions(np.concatenate([start[b, arm, None], side[b, keep, arm]]))
        for side in (predicted, true)
      ]
      for guess, truth in zip(*sides):
        matched += len(match_boundaries(guess, truth, tolerance))
        total += len(guess) + len(truth)
    if total:
      scores[b] = 2 * matched / total
  return scores


def duration_error(predicted, true) -> np.ndarray:
  """|predicted - true| / true of durations [n] in one unit, float64 [n].

  Raises:
    DataError: lengths that differ, or a true duration that is not positive.
  """
  predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
  if predicted.shape != true.shape or true.ndim != 1 or not (true > 0).all():
    raise DataError(
      f'duration_error: expected two arrays [n] and true durations > 0, got {predicted.shape} and '
      f'{true.shape}, least {true.min(initial=np.inf)}.'
    )
  return np.abs(predicted - true) / true


def _lengths(given, batch: int, most: int) -> np.ndarray:
  lengths = np.full(batch, most) if given is None else np.asarray(given, np.int64)
  if lengths.shape != (batch,) or ((lengths < 0) | (lengths > most)).any():
    raise DataError(f'dtw: expected {batch} lengths in 0..{most}, got {lengths}.')
  return lengths
