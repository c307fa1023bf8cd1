"""Scores of event boundaries: one-to-one matching within a tolerance, and what chance reaches.

A boundary is the frame at which an event starts; the first frame of an episode is none. A tolerance
of some frames makes evenly spaced guesses look good (events are short), so every score is
reported beside `uniform_boundaries` with the true count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from wallwm_jax.types import DataError

TOLERANCES = tuple(round(0.05 * i, 2) for i in range(1, 11))  # s
SHARES = TOLERANCES  # of the length of an episode


@dataclasses.dataclass(frozen=True)
class BoundaryScore:
  """Pooled counts over episodes: boundaries predicted, true, and matched one to one."""

  matched: int
  predicted: int
  true: int

  @property
  def precision(self) -> float:
    """matched / predicted; 1 where nothing was predicted."""
    return self.matched / self.predicted if self.predicted else 1.0

  @property
  def recall(self) -> float:
    """matched / true; 1 where there was nothing to find."""
    return self.matched / self.true if self.true else 1.0

  @property
  def f1(self) -> float:
    """2 matched / (predicted + true); 1 where both are none."""
    total = self.predicted + self.true
    return 2 * self.matched / total if total else 1.0


def match_boundaries(
  predicted: Sequence[int] | np.ndarray, true: Sequence[int] | np.ndarray, tolerance: int
) -> np.ndarray:
  """A largest one-to-one matching of boundaries that are at most `tolerance` frames apart.

  All windows have the same width, so taking the earliest partner still free, in order of time, is
  optimal (Glover 1967, "Maximum matching in a convex bipartite graph").

  Args:
    predicted: [p] frames; true: [t] frames; any order.

  Returns:
    int64 [n, 2]: matched (predicted, true) frames in order of time.

  Raises:
    DataError: not one-dimensional, or tolerance < 0.
  """
  if tolerance < 0:
    raise DataError(f'match_boundaries: expected tolerance >= 0 frames, got {tolerance}.')
  p, t = _frames(predicted, 'predicted'), _frames(true, 'true')
  pairs, i, j = [], 0, 0
  while i < len(p) and j < len(t):
    if abs(p[i] - t[j]) <= tolerance:
      pairs.append((p[i], t[j]))
      i, j = i + 1, j + 1
    elif p[i] < t[j]:
      i += 1
    else:
      j += 1
  return np.array(pairs, np.int64).reshape(-1, 2)


def boundary_score(episodes: Iterable[tuple], tolerance: int) -> BoundaryScore:
  """Micro-averaged score: counts are pooled over episodes.

  Args:
    episodes: (predicted [p], true [t]) frames of each episode; tolerance: frames.

  Raises:
    DataError: as `match_boundaries`.
  """
  matched = predicted = true = 0
  for p, t in episodes:
    matched += len(match_boundaries(p, t, tolerance))
    predicted += len(p)
    true += len(t)
  return BoundaryScore(matched, predicted, true)


def score_by_seconds(
  episodes: Iterable[tuple], tolerances: Sequence[float] = TOLERANCES
) -> dict[float, BoundaryScore]:
  """Scores at tolerances in seconds, pooled over episodes of any frame rate.

  Args:
    episodes: (predicted [p], true [t], fps) of each episode, in frames; tolerances: s. A tolerance
      reaches as many whole frames as fit into it.

  Returns:
    {tolerance: score}; `mean_f1` averages them.

  Raises:
    DataError: no or negative tolerances, fps <= 0, and as `match_boundaries`.
  """
  episodes = list(episodes)
  if not tolerances or min(tolerances) < 0 or any(not fps > 0 for *_, fps in episodes):
    raise DataError(
      f'score_by_seconds: expected tolerances >= 0 s and fps > 0, got {tolerances} and '
      f'{sorted({fps for *_, fps in episodes})}.'
    )
  return _by_tolerance(episodes, tolerances)


def score_by_share(
  episodes: Iterable[tuple], shares: Sequence[float] = SHARES
) -> dict[float, BoundaryScore]:
  """Scores at tolerances that are shares of the episode's length, pooled over episodes.

  Args:
    episodes: (predicted [p], true [t], num_frames) of each episode, in frames; shares: theta.

  Returns:
    {theta: score}; `mean_f1` averages them.

  Raises:
    DataError: no or negative shares, num_frames < 1, and as `match_boundaries`.

  Source: the GEBD protocol (arXiv 2101.10511), relative distance |predicted - true| / L <= theta.
  """
  episodes = list(episodes)
  if not shares or min(shares) < 0 or any(frames < 1 for *_, frames in episodes):
    raise DataError(
      f'score_by_share: expected shares >= 0 and num_frames >= 1, got {shares} and '
      f'{sorted({frames for *_, frames in episodes})}.'
    )
  return _by_tolerance(episodes, shares)


def _by_tolerance(episodes: Sequence[tuple], tolerances) -> dict[float, BoundaryScore]:
  """Pooled scores of (predicted, true, unit), the tolerance counted in units of frames."""
  scores = {}
  for tolerance in tolerances:
    matched = predicted = true = 0
    for p, t, unit in episodes:
      # 0.3 s at 10 fps are 3 frames, also where the product is 2.9999.
      matched += len(match_boundaries(p, t, math.floor(tolerance * unit + 1e-9)))
      predicted, true = predicted + len(p), true + len(t)
    scores[tolerance] = BoundaryScore(matched, predicted, true)
  return scores


def mean_f1(scores: Mapping[float, BoundaryScore]) -> float:
  """Mean F1 over the tolerances of `score_by_seconds`."""
  return sum(score.f1 for score in scores.values()) / len(scores)


def uniform_boundaries(num_frames: int, count: int) -> np.ndarray:
  """`count` boundaries that cut an episode into equal parts, int64 [count]: with the true count,
  the chance line.

  Raises:
    DataError: num_frames < 1 or count < 0.
  """
  if num_frames < 1 or count < 0:
    raise DataError(
      f'uniform_boundaries: expected num_frames >= 1 and count >= 0, got {num_frames}, {count}.'
    )
  return np.round(np.arange(1, count + 1) * num_frames / (count + 1)).astype(np.int64)


def chance_score(episodes: Iterable[tuple], tolerance: int) -> BoundaryScore:
  """Score of `uniform_boundaries` with each episode's true count.

  Args:
    episodes: (num_frames, true [t]) of each episode.
  """
  return boundary_score(((uniform_boundaries(n, len(t)), t) for n, t in episodes), tolerance)


def _frames(x: Sequence[int] | np.ndarray, name: str) -> np.ndarray:
  x = np.asarray(x, np.int64)
  if x.ndim != 1:
    raise DataError(f'match_boundaries: expected {name} [n] frames, got shape {list(x.shape)}.')
  return np.sort(x)
