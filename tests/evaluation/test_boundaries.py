"""Boundary scores: closed forms, and the matching against an assignment solver."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from wallwm_jax.evaluation import boundary_page
from wallwm_jax.evaluation.boundaries import (
  BoundaryScore,
  boundary_score,
  chance_score,
  match_boundaries,
  mean_f1,
  score_by_seconds,
  score_by_share,
  uniform_boundaries,
)
from wallwm_jax.types import DataError

FRAMES = st.lists(st.integers(0, 40), max_size=9)


@pytest.mark.parametrize(
  'predicted, true, tolerance, pairs',
  [
    ([10, 20], [12, 30], 3, [(10, 12)]),
    ([9, 11], [10], 3, [(9, 10)]),  # one true boundary is found once
    ([10], [8, 12], 3, [(10, 8)]),
    ([5, 8], [7, 4], 1, [(5, 4), (8, 7)]),  # any order
    ([4, 6], [6, 9], 3, [(4, 6), (6, 9)]),  # the nearest first would leave one without a partner
    ([13], [10], 3, [(13, 10)]),
    ([14], [10], 3, []),
    ([], [3], 5, []),
  ],
)
def test_pairs(predicted, true, tolerance, pairs):
  found = match_boundaries(predicted, true, tolerance)
  assert found.dtype == np.int64 and found.shape == (len(pairs), 2)
  assert [tuple(pair) for pair in found.tolist()] == pairs


@settings(deadline=None, max_examples=200)
@given(FRAMES, FRAMES, st.integers(0, 6))
def test_matching_is_largest_and_one_to_one(predicted, true, tolerance):
  pairs = match_boundaries(predicted, true, tolerance)
  assert (np.abs(pairs[:, 0] - pairs[:, 1]) <= tolerance).all()
  for column, frames in zip(pairs.T, (predicted, true)):
    values, counts = np.unique(column, return_counts=True)
    assert all(frames.count(v) >= c for v, c in zip(values.tolist(), counts.tolist()))
  near = np.abs(np.subtract.outer(np.array(predicted, int), np.array(true, int))) <= tolerance
  rows, columns = linear_sum_assignment(~near)
  assert len(pairs) == near[rows, columns].sum()


def test_scores_are_pooled_over_episodes():
  score = boundary_score([([10, 50], [11]), ([], [5, 9]), ([7], [7])], 2)
  assert score == BoundaryScore(matched=2, predicted=3, true=4)
  assert score.precision == pytest.approx(2 / 3)
  assert score.recall == 0.5
  assert score.f1 == pytest.approx(4 / 7)


@pytest.mark.parametrize(
  'score, expected',
  [
    (BoundaryScore(0, 0, 0), (1, 1, 1)),
    (BoundaryScore(0, 0, 3), (1, 0, 0)),
    (BoundaryScore(0, 3, 0), (0, 1, 0)),
    (BoundaryScore(3, 3, 3), (1, 1, 1)),
  ],
)
def test_empty_sides(score, expected):
  assert (score.precision, score.recall, score.f1) == expected


def test_uniform_boundaries_cut_into_equal_parts():
  assert uniform_boundaries(100, 3).tolist() == [25, 50, 75]
  assert uniform_boundaries(90, 0).tolist() == []


def test_chance_of_even_events_is_perfect_and_of_uneven_ones_is_not():
  assert chance_score([(100, [26, 50, 73])], 3).f1 == 1
  assert chance_score([(100, [5, 10, 15])], 3).f1 == 0


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: match_boundaries([1], [1], -1), 'tolerance >= 0'),
    (lambda: match_boundaries([[1]], [1], 1), r'predicted \[n\] frames, got shape \[1, 1\]'),
    (lambda: uniform_boundaries(0, 1), 'num_frames >= 1'),
    (lambda: uniform_boundaries(9, -1), 'count >= 0'),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(DataError, match=message):
    call()


def test_tolerances_in_seconds_at_several_frame_rates():
  """At 10 fps an offset of 3 frames is 0.3 s, at 30 fps 0.1 s."""
  episodes = [([13], [10], 10.0), ([23], [20], 30.0)]
  scores = score_by_seconds(episodes)
  assert list(scores) == [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]
  found = [score.matched for score in scores.values()]
  assert found == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2]
  assert mean_f1(scores) == pytest.approx((4 * 0.5 + 5) / 10)
  for bad in (([([1], [1], 0.0)], (0.1,)), ([([1], [1], 10.0)], ()), ([], (-0.1,))):
    with pytest.raises(DataError, match='expected tolerances >= 0 s and fps > 0'):
      score_by_seconds(*bad)


def test_tolerances_as_shares_of_an_episode():
  """An offset of 3 frames is 0.3 of 10 frames and 0.1 of 30."""
  episodes = [([6], [9], 10), ([23], [20], 30)]
  scores = score_by_share(episodes)
  assert [score.matched for score in scores.values()] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2]
  with pytest.raises(DataError, match='expected shares >= 0 and num_frames >= 1'):
    score_by_share([([1], [1], 0)])


def test_the_page_shows_proposals_beside_chance():
  episodes = [
    boundary_page.Segmented('first', [10, 22], [10, 20], 40, 10.0),
    boundary_page.Segmented('<second>', [], [7], 30, 10.0),
  ]
  found = boundary_page.to_json(boundary_page.boundary_curves(episodes))
  assert found['seconds']['proposed']['f1']['0.05'] == pytest.approx(2 * 1 / (2 + 3))
  assert found['seconds']['proposed']['f1']['0.2'] == pytest.approx(2 * 2 / (2 + 3))
  assert found['share']['chance']['mean_f1'] <= 1
  text = boundary_page.render(episodes, 'a title')
  assert text.count('<img ') == 2 and '<second>' not in text
