"""Scores of plans and traces against hand-computed values."""

import numpy as np
import pytest

from wallwm_jax.evaluation.language import score_plans, score_traces
from wallwm_jax.types import DataError


def test_plans_by_hand():
  score = score_plans(
    named=[0, 1, 2, 2],
    truth=[0, 1, 2, 1],
    seconds=[1.0, 2.0, 0.5, 0.0],
    remaining=[1.0, 1.0, 0.5, 1.0],
    duration=[2.0, 4.0, 1.0, 2.0],
    kinds=['reach', 'reach', 'lift', 'lift'],
    groups=[0, 0, 1, 1],
  )
  assert score.n == 4 and score.top1.value == 0.75
  assert score.time_mae.value == pytest.approx(0.5)
  assert score.relative.value == pytest.approx((0 + 1 / 4 + 0 + 1 / 2) / 4)
  assert score.by_kind['reach'][0].value == 1.0
  assert score.by_kind['lift'][1].value == pytest.approx(0.25)
  # The mean of a kind: 1 s for reaching (both right), 0.75 s for lifting.
  assert score.relative_mean == pytest.approx((0 + 0 + 0.25 / 1 + 0.25 / 2) / 4)
  assert score.relative.n == 2  # episodes, not moments
  assert score.to_json()['kinds']['lift']['n'] == 2


def test_traces_by_hand():
  truth = np.array([[1, 2, 3, 0], [4, 5, 0, 0]])
  mask = truth > 0
  score = score_traces([[1, 2, 9, 7], [4, 5, 8, 8]], truth, mask)
  assert score.tokens.value == pytest.approx(4 / 5)
  assert score.exact.value == 0.5 and score.n == 2


def test_nothing_to_score():
  with pytest.raises(DataError, match='n >= 1'):
    score_plans([], [], [], [], [], [], [])
  with pytest.raises(DataError, match='lengths'):
    score_plans([0], [0, 1], [0.0], [0.0], [1.0], ['a'], [0])
  with pytest.raises(DataError, match='real tokens'):
    score_traces(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 3), bool))
