"""Intervals against closed forms and SciPy; JSON output; latency."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.evaluation import base, closed_loop, latency
from wallwm_jax.types import DataError


@settings(deadline=None, max_examples=40)
@given(
  trials=st.integers(1, 400), share=st.floats(0, 1), confidence=st.sampled_from([0.8, 0.95, 0.99])
)
def test_wilson_is_scipys_score_interval(trials, share, confidence):
  successes = round(share * trials)
  got = base.wilson_interval(successes, trials, confidence)
  want = scipy.stats.binomtest(successes, trials).proportion_ci(confidence, method='wilson')
  np.testing.assert_allclose([got.low, got.high], [want.low, want.high], atol=1e-12)
  assert got.low <= got.value == successes / trials <= got.high and got.n == trials


@pytest.mark.parametrize('successes, trials', [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_impossible_counts(successes, trials):
  with pytest.raises(DataError, match='expected 0 <= successes <= trials'):
    base.wilson_interval(successes, trials)


def test_bootstrap_of_independent_values_matches_the_normal_interval():
  values = np.random.default_rng(0).normal(3.0, 2.0, 400)
  got = base.bootstrap_interval(values, resamples=4000, seed=1)
  error = values.std(ddof=1) / math.sqrt(len(values))
  assert got.value == pytest.approx(values.mean())
  assert got.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
  assert got.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_bootstrap_by_group_counts_groups_not_values():
  rng = np.random.default_rng(0)
  levels = rng.normal(0, 1, 30)
  values, groups = (
    np.repeat(levels, 20),
    np.repeat(np.arange(30), 20),
  )  # all events of an episode agree
  grouped = base.bootstrap_interval(values, groups)
  alone = base.bootstrap_interval(levels)
  naive = base.bootstrap_interval(values)
  assert grouped.n == 30
  assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.1)
  assert naive.high - naive.low < 0.4 * (grouped.high - grouped.low)


def test_bootstrap_refuses_mismatched_groups():
  with pytest.raises(DataError, match='one group each'):
    base.bootstrap_interval([1.0, 2.0], [0])


def test_skill():
  assert base.skill(0.5, 1.0) == 0.5
  assert base.skill(2.0, 1.0) == -1.0
  assert math.isnan(base.skill(0.0, 0.0))


def test_json_is_plain_whole_and_replaces_the_old_file(tmp_path):
  path = tmp_path / 'deep' / 'scores.json'
  base.write_json(path, {'old': 1})
  results = {
    'interval': base.Interval(0.5, 0.25, math.inf, 4),
    'array': jnp.arange(3),
    'x': np.float32(2.5),
  }
  base.write_json(path, results)
  assert json.loads(path.read_text()) == {
    'interval': {'value': 0.5, 'low': 0.25, 'high': None, 'n': 4},
    'array': [0, 1, 2],
    'x': 2.5,
  }
  assert [p.name for p in path.parent.iterdir()] == ['scores.json']


def test_failed_write_leaves_the_old_results(tmp_path):
  path = tmp_path / 'scores.json'
  base.write_json(path, {'kept': True})
  with pytest.raises(TypeError):
    base.write_json(path, {'bad': object()})
  assert json.loads(path.read_text()) == {'kept': True}


def test_environment_names_versions_and_device():
  found = base.environment()
  assert found['jax'] and found['python'] and found['device']


def test_closed_loop_scores_by_kind_and_overall():
  success = np.array([1, 1, 0, 0, 0, 1], bool)
  progress = np.array([100, 100, 40, 0, 20, 100.0])
  kinds = ['push', 'push', 'push', 'lift', 'lift', 'lift']
  result = closed_loop.evaluate(success, progress, kinds)
  assert list(result.by_kind) == ['push', 'lift']
  assert result.success == base.wilson_interval(3, 6)
  assert result.by_kind['push'][0] == base.wilson_interval(2, 3)
  assert result.by_kind['lift'][1].value == pytest.approx(40)
  assert result.macro_success == pytest.approx(0.5)
  flat = result.to_json()
  assert flat['n'] == 6 and flat['success'] == 0.5 and flat['kinds']['lift']['n'] == 3
  assert flat['success_low'] < 0.5 < flat['success_high']


def test_closed_loop_says_how_often_a_planner_was_right():
  success, progress = np.zeros(3, bool), np.zeros(3)
  result = closed_loop.evaluate(success, progress, planned=[1.0, 0.5, np.nan])
  assert result.planned == base.bootstrap_interval([1.0, 0.5])
  assert result.to_json()['planned'] == 0.75 and result.planned.n == 2
  for planned in (None, [np.nan] * 3):
    silent = closed_loop.evaluate(success, progress, planned=planned)
    assert silent.planned is None and 'planned' not in silent.to_json()
  for wrong in ([0.5], [0.5, 1.5, 0.0]):
    with pytest.raises(DataError, match='expected planned'):
      closed_loop.evaluate(success, progress, planned=wrong)


@pytest.mark.parametrize(
  'success, progress, match',
  [
    ([], [], 'n >= 1'),
    ([True], [1.0, 2.0], 'success, progress and kinds'),
    ([True], [101.0], '0..100'),
    ([True], [np.nan], '0..100'),
  ],
)
def test_closed_loop_refuses_bad_rollouts(success, progress, match):
  with pytest.raises(DataError, match=match):
    closed_loop.evaluate(success, progress)


@settings(deadline=None, max_examples=30)
@given(only_first=st.integers(0, 20), only_second=st.integers(0, 20), both=st.integers(0, 5))
def test_mcnemar_is_the_exact_binomial_test(only_first, only_second, both):
  first = np.array([1] * only_first + [0] * only_second + [1] * both, bool)
  second = np.array([0] * only_first + [1] * only_second + [1] * both, bool)
  discordant = only_first + only_second
  want = scipy.stats.binomtest(only_first, discordant).pvalue if discordant else 1.0
  assert closed_loop.mcnemar(first, second) == pytest.approx(want)


def test_seam_jump_is_the_first_step_over_the_pace():
  actions = np.zeros((3, 3, 4, 10))
  actions[:, :, :, 0] = 0.01 * np.arange(1, 5)  # pace 0.01 m a step
  actions[0, 1, :, 0] += 0.02  # the second turn starts 0.03 m away
  actions[0, 2, :, 0] += 9  # never carried out
  mask = np.ones((3, 3, 4), bool)
  acted = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
  jumps = closed_loop.seam_jump(actions, mask, acted)
  assert jumps[0] == pytest.approx(3) and np.isnan(jumps[1]) and jumps[2] == pytest.approx(1)
  assert np.isnan(closed_loop.seam_jump(1e-8 * actions, mask, acted)).all()
  with pytest.raises(DataError, match='expected actions'):
    closed_loop.seam_jump(actions, mask[:2], acted)


def test_time_to_success_counts_turns_of_successes():
  times = closed_loop.time_to_success([True, False, True], [1, 4, 3], 0.8)
  np.testing.assert_allclose(times, [0.8, np.nan, 2.4])
  with pytest.raises(DataError, match='turn_time > 0'):
    closed_loop.time_to_success([True], [1], 0.0)


def test_latency_of_the_copy_leaves_the_computation_out():
  import time

  calls = []

  def slow():
    calls.append(None)
    time.sleep(0.01)
    return jnp.ones(4) * len(calls)

  copied = latency.measure_copy(slow, calls=3, warmup=1)
  assert len(calls) == 5 and 0 < copied.p50_ms < 5
  assert copied.hz == pytest.approx(1000 / copied.p50_ms)


def test_latency_counts_calls_and_orders_percentiles():
  calls = []

  def call():
    calls.append(None)
    return jnp.ones(4) * len(calls)

  result = latency.measure_parts({'square': call}, calls=20, warmup=2)
  timed = result['parts']['square']
  assert len(calls) == 1 + 2 + 20 and timed.n == 20 and result['device']
  assert 0 < timed.p50_ms <= timed.p90_ms <= timed.p99_ms <= timed.max_ms
