"""Warping, transitions and durations against plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.evaluation import alignment
from wallwm_jax.types import DataError


def every_alignment(i, j):
  """All monotone alignments of points 0..i with 0..j as lists of pairs."""
  if i == j == 0:
    return [[(0, 0)]]
  before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
  return [
    path + [(i, j)] for a, b in before if a >= 0 and b >= 0 for path in every_alignment(a, b)
  ]


@settings(deadline=None, max_examples=25)
@given(p=st.integers(1, 4), t=st.integers(1, 4), seed=st.integers(0, 99))
def test_dtw_is_the_best_of_all_alignments(p, t, seed):
  rng = np.random.default_rng(seed)
  first, second = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 4, 3))
  got = alignment.dtw(first, second, [p, p], [t, t])
  for b in range(2):
    costs = [
      (sum(np.linalg.norm(first[b, i] - second[b, j]) for i, j in path), len(path))
      for path in every_alignment(p - 1, t - 1)
    ]
    best, pairs = min(costs)
    assert got[b] == pytest.approx(best / pairs)


def test_dtw_forgives_pace_but_not_shape():
  path = np.linspace(0, 1, 6)[:, None] * [1.0, 0, 0]
  slow = np.repeat(path, 2, axis=0)
  assert alignment.dtw(path[None], slow[None])[0] == 0
  assert alignment.dtw(path[None], slow[None] + [0, 0.1, 0])[0] == pytest.approx(0.1)
  assert np.isnan(alignment.dtw(path[None], slow[None], [0], [3])[0])


def test_transitions_are_matched_by_kind_within_the_tolerance():
  true = np.array([1, 1, 0, 0, 0, 0, 1, 1.0])
  valid, start = np.ones((1, 8, 1), bool), np.ones((1, 1))

  def score(guess):
    return alignment.gripper_f1(guess[None, :, None], true[None, :, None], start, valid)[0]

  assert score(true) == 1
  assert score(np.array([1, 1, 1, 1, 0, 0, 0, 0.0])) == pytest.approx(2 / 3)  # never opens
  assert score(np.array([1, 1, 1, 1, 1, 0, 1, 1.0])) == pytest.approx(1 / 2)  # closes too late
  # Closes at 0 and 6, opens at 2: only the first closing is within two steps of its own kind.
  assert score(1 - true) == pytest.approx(2 / 5)


def test_no_transition_has_no_score():
  still = np.ones((1, 4, 1))
  assert np.isnan(alignment.gripper_f1(still, still, still[:, 0], still > 0)[0])
  first = alignment.gripper_f1(0 * still, 0 * still, still[:, 0], still > 0)
  assert first[0] == 1  # both close at the first step


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0.1, 50)), min_size=1, max_size=5))
def test_duration_error_is_relative(pairs):
  predicted, true = np.array(pairs).T
  want = [abs(p - t) / t for p, t in pairs]
  np.testing.assert_allclose(alignment.duration_error(predicted, true), want)


@pytest.mark.parametrize(
  'call',
  [
    lambda: alignment.dtw(np.zeros((2, 3, 3)), np.zeros((1, 3, 3))),
    lambda: alignment.dtw(np.zeros((1, 3, 3)), np.zeros((1, 3, 3)), [4]),
    lambda: alignment.gripper_f1(np.zeros((1, 3, 1)), np.zeros((1, 3)), 0, 0),
    lambda: alignment.duration_error([1.0], [0.0]),
    lambda: alignment.duration_error([1.0, 2.0], [1.0]),
  ],
)
def test_bad_input_is_refused(call):
  with pytest.raises(DataError, match='expected'):
    call()
