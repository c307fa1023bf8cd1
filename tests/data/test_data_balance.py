"""Two-way balance: margins, caps and shares as exact statements; the optimum against a general
solver."""

import math

import numpy as np
import pytest
from episode_factory import make_episode
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from wallwm_jax.data.balance import (
  BalanceSettings,
  balance_metrics,
  balance_store,
  cells,
  event_weights,
  two_way,
)
from wallwm_jax.data.build import build_store
from wallwm_jax.data.cluster import Labels
from wallwm_jax.data.schema import EventSpan
from wallwm_jax.data.store import EventStore
from wallwm_jax.types import ConfigError, DataError


def dependent_labels(count=200_000, rows=512, columns=64, seed=0):
  """Zipf vl clusters, each with a different preference over about a third of the act clusters."""
  rng = np.random.default_rng(seed)
  p_row, p_column = (1 / np.arange(1, n + 1) ** s for n, s in ((rows, 1.2), (columns, 0.9)))
  p_column /= p_column.sum()
  vl, act = [], []
  for v, n in enumerate(rng.multinomial(count, p_row / p_row.sum())):
    chosen = rng.choice(columns, 24, replace=False, p=p_column)
    p = 0.03 * p_column
    p[chosen] += 0.97 * rng.dirichlet(np.full(24, 0.7))
    vl.append(np.full(n, v))
    act.append(rng.choice(columns, n, p=p / p.sum()))
  return np.concatenate(vl), np.concatenate(act)


@pytest.fixture(scope='module')
def zipf():
  return dependent_labels()


def power_margin(labels, tau):
  p = np.bincount(labels) ** float(tau)
  return p / p.sum()


# --- goals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('tau', [0.0, 0.3, (0.5, 0.0)])
def test_both_margins_are_met_within_a_millionth(zipf, tau):
  weights = two_way(*zipf, tau, math.inf)
  for labels, power in zip(zipf, tau if isinstance(tau, tuple) else (tau, tau)):
    np.testing.assert_allclose(
      np.bincount(labels, weights), power_margin(labels, power), atol=1e-6, rtol=1e-6
    )


def test_a_cap_bounds_repeats_and_keeps_feasible_margins(zipf):
  count = len(zipf[0])
  assert two_way(*zipf, 0.3, math.inf).max() * count > 20
  weights = two_way(*zipf, 0.3, 16.0)
  assert weights.max() * count <= 16 * (1 + 1e-9)
  for labels in zipf:
    np.testing.assert_allclose(np.bincount(labels, weights), power_margin(labels, 0.3), atol=1e-6)


def test_balance_beats_the_product_of_inverse_counts(zipf):
  vl, act = zipf
  product = 1.0 / (np.bincount(vl)[vl] * np.bincount(act)[act])
  plain = BalanceSettings(0.0, 0.0, math.inf)
  ours = balance_metrics(vl, act, two_way(vl, act, 0.0, math.inf), plain)
  theirs = balance_metrics(vl, act, product / product.sum(), plain)
  assert ours['vl']['effective'] == pytest.approx(512)
  assert ours['act']['effective'] == pytest.approx(64)
  assert theirs['vl']['tv'] > 0.01 and theirs['act']['tv'] > 0.01


# --- the optimum ---------------------------------------------------------------------------------


def reference(counts, row_target, column_target, cap):
  """argmin KL(P || n) with both margins and P <= cap n, by a general solver."""
  natural = counts / counts.sum()
  live = natural > 0

  def spread(p):
    table = np.zeros(counts.shape)
    table[live] = p
    return table

  result = minimize(
    lambda p: (p * np.log(np.maximum(p, 1e-300) / natural[live])).sum(),
    natural[live],
    jac=lambda p: np.log(np.maximum(p, 1e-300) / natural[live]) + 1,
    bounds=[(1e-12, cap * n) for n in natural[live]],
    constraints=[
      {'type': 'eq', 'fun': lambda p: spread(p).sum(1) - row_target},
      {'type': 'eq', 'fun': lambda p: spread(p).sum(0)[:-1] - column_target[:-1]},
    ],
    method='SLSQP',
    options={'maxiter': 500, 'ftol': 1e-14},
  )
  assert result.success, result.message
  return spread(result.x)


@pytest.mark.parametrize('cap', [math.inf, 2.5])
def test_shares_are_the_closest_to_the_natural_ones(cap):
  counts = np.array([[60, 8, 1], [7, 20, 4], [0, 3, 6]])
  row, column = np.nonzero(counts)
  repeats = counts[row, column]
  vl, act = np.repeat(row, repeats), np.repeat(column, repeats)
  weights = two_way(vl, act, 0.4, cap)
  got = np.zeros(counts.shape)
  np.add.at(got, (vl, act), weights)
  expected = reference(counts, power_margin(vl, 0.4), power_margin(act, 0.4), cap)
  np.testing.assert_allclose(got, expected, atol=2e-6)
  if cap < math.inf:  # the bound is at work, and changes the optimum
    assert weights.max() * len(vl) == pytest.approx(cap)
    assert np.abs(two_way(vl, act, 0.4, math.inf) - weights).max() > 1e-3 / len(vl)


def test_natural_frequency_and_equal_shares_are_the_ends(zipf):
  np.testing.assert_allclose(two_way(*zipf, 1.0, math.inf), 1 / len(zipf[0]), rtol=1e-9)
  vl, act = np.repeat([0, 0, 1, 1], [50, 20, 5, 2]), np.repeat([0, 1, 0, 1], [50, 20, 5, 2])
  weights = two_way(vl, act, 0.0, math.inf)
  np.testing.assert_allclose(np.bincount(vl * 2 + act, weights), 0.25, atol=1e-9)
  np.testing.assert_allclose(two_way(vl, act, 0.0, 1.0), 1 / len(vl), rtol=1e-9)


def test_a_cap_lowers_the_targets_of_small_clusters():
  vl = np.repeat([0, 1, 2], [900, 90, 10])
  weights = two_way(vl, np.zeros_like(vl), 0.0, 4.0)
  # cluster 2 may have 4 * 1 % and cluster 1 4 * 9 % = 36 % at most, 0 takes the rest
  np.testing.assert_allclose(np.bincount(vl, weights), [0.6, 0.36, 0.04], atol=1e-9)


labels_strategy = st.lists(
  st.tuples(st.integers(0, 5), st.integers(-1, 4)), min_size=1, max_size=60
)


@settings(max_examples=25, deadline=None)
@given(labels_strategy, st.floats(0, 1), st.floats(1, 20), st.randoms())
def test_weights_of_any_labels(pairs, tau, cap, random):
  """A distribution, constant on cells, within the cap, blind to the order and names of things."""
  vl, act = np.array(pairs).T
  weights = two_way(vl, act, tau, cap, tolerance=1.0)
  assert np.isfinite(weights).all() and (weights >= 0).all()
  assert weights.sum() == pytest.approx(1)
  assert weights.max() * len(vl) <= cap * (1 + 1e-6)
  cell = cells(vl, act)
  for c in range(cell.max() + 1):
    assert len(set(zip(vl[cell == c], act[cell == c]))) == 1
    assert np.ptp(weights[cell == c]) == 0
  order = np.array(random.sample(range(len(vl)), len(vl)))
  renamed = two_way(10 - vl[order], act[order], tau, cap, tolerance=1.0)
  np.testing.assert_allclose(renamed, weights[order], rtol=1e-6, atol=1e-9)


# --- refusals ------------------------------------------------------------------------------------


def test_margins_that_exclude_each_other_are_refused():
  vl, act = np.repeat([0, 1, 2], [50, 30, 20]), np.repeat([0, 0, 1], [50, 30, 20])
  # act 0 occurs with vl 0 and 1 only: 1/2 for it and 2/3 for them cannot both be
  with pytest.raises(ConfigError, match=r'margin stays 0.08.* worst is .*lower data.balance'):
    two_way(vl, act, 0.0, math.inf)
  weights = two_way(vl, act, 0.0, math.inf, tolerance=0.1)
  np.testing.assert_allclose(np.bincount(act, weights), [7 / 12, 5 / 12], atol=1e-6)
  two_way(vl, act, 1.0, math.inf)


@pytest.mark.parametrize(
  'change',
  [
    {'cap': 0.5},
    {'cap': math.nan},
    {'tau_vl': -0.1},
    {'tau_act': 1.1},
    {'tolerance': math.nan},
    {'sources': {'a': 0.0}},
    {'sources': {'a': math.inf}},
    {'recovery': 0.0},
    {'recovery': 1.0},
  ],
)
def test_settings_are_checked(change):
  with pytest.raises(ConfigError, match=f'balance.{next(iter(change))}'):
    BalanceSettings(**change)


def test_labels_are_checked():
  with pytest.raises(DataError, match='one length n > 0'):
    two_way(np.zeros(3, int), np.zeros(2, int), 0.3, 8.0)
  with pytest.raises(DataError, match='one length n > 0'):
    two_way(np.zeros(0, int), np.zeros(0, int), 0.3, 8.0)


# --- shares of blocks ----------------------------------------------------------------------------


def mixed(seed=0, count=4000):
  rng = np.random.default_rng(seed)
  vl, act = np.minimum(rng.integers(0, 6, count), 3), rng.integers(0, 4, count)
  source = np.array(['arm', 'web', 'rig'])[rng.integers(0, 3, count)]
  act[source == 'web'] = -1
  recovery = (rng.random(count) < 0.1) & (source == 'arm')
  return vl, act, source, recovery


def test_shares_of_sources_and_of_recovery_are_exact():
  vl, act, source, recovery = mixed()
  ratios = {'arm': 2.0, 'web': 1.0, 'rig': 1.0}
  plan = BalanceSettings(0.3, 0.3, 16.0, sources=ratios, recovery=0.2)
  weights = event_weights(vl, act, plan, source, recovery)
  for name, ratio in ratios.items():
    assert weights[source == name].sum() == pytest.approx(ratio / 4, abs=1e-9)
  assert weights[recovery].sum() == pytest.approx(0.2, abs=1e-9)
  inside = (source == 'rig') & ~recovery
  margin = np.bincount(vl[inside], weights[inside]) / 0.25
  np.testing.assert_allclose(margin, power_margin(vl[inside], 0.3), atol=1e-9)


def test_video_without_actions_keeps_its_share_and_is_balanced_by_what_it_shows():
  vl, act, _, _ = mixed()
  weights = two_way(vl, act, 0.0, math.inf)
  free = act < 0
  assert weights[free].sum() == pytest.approx(free.mean())
  np.testing.assert_allclose(np.bincount(vl[free], weights[free]) / free.mean(), 1 / 4)


def test_shares_that_cannot_be_had_are_refused():
  vl, act, source, recovery = mixed()
  ratios = {'arm': 0.1, 'web': 0.5, 'rig': 0.4}
  with pytest.raises(ConfigError, match=r"recovery=0.2 cannot be had.* are in \['arm'\]"):
    plan = BalanceSettings(sources=ratios, recovery=0.2)
    event_weights(vl, act, plan, source, recovery)
  with pytest.raises(ConfigError, match='recovery=0.2 cannot be had'):
    event_weights(vl, act, BalanceSettings(recovery=0.2), None, np.zeros(len(vl), bool))
  with pytest.raises(ConfigError, match=r"missing \['rig'\], not in the split \['moon'\]"):
    plan = BalanceSettings(sources={'arm': 1, 'web': 1, 'moon': 1})
    event_weights(vl, act, plan, source)
  with pytest.raises(DataError, match='source: settings ask for shares'):
    event_weights(vl, act, BalanceSettings(sources=ratios))


def test_cells_share_one_weight():
  vl, act, source, recovery = mixed()
  plan = BalanceSettings(
    0.2, 0.2, sources={'arm': 1, 'web': 2, 'rig': 3}, recovery=0.05
  )
  weights = event_weights(vl, act, plan, source, recovery)
  cell = cells(vl, act, source, recovery)
  assert cell.dtype == np.int64 and set(cell.tolist()) == set(range(cell.max() + 1))
  assert cell.max() + 1 == len(set(zip(vl, act, source, recovery)))
  low, high = np.full(cell.max() + 1, np.inf), np.zeros(cell.max() + 1)
  np.minimum.at(low, cell, weights)
  np.maximum.at(high, cell, weights)
  np.testing.assert_array_equal(low, high)


def test_a_store_is_balanced_by_its_own_sources_and_flags(tmp_path):
  def episode(i, source):
    events = tuple(
      EventSpan(8 * j, 8 * j + 8, 'x', flags=('recovery',) if j == 3 else ()) for j in range(4)
    )
    return make_episode(i, lengths=(8,) * 4, source=source, events=events)

  episodes = [episode(i, 'a' if i < 4 else 'b') for i in range(6)]
  build_store(episodes, tmp_path / 's', heldout=0.0, progress=False)
  store = EventStore(tmp_path / 's')
  vl, act = np.arange(24, dtype=np.int32) % 2, np.arange(24, dtype=np.int32) // 2 % 2
  labels = Labels(store.column('uid'), vl, act, np.zeros(24), np.zeros(24))
  rows = np.arange(4, 24)
  plan = BalanceSettings(0, 0, 1e3, 1.0, sources={'a': 1, 'b': 1}, recovery=0.5)
  balance = balance_store(store, labels, rows, plan)
  assert balance.weights.shape == balance.cells.shape == (20,)
  assert balance.weights[12:].sum() == pytest.approx(0.5)
  assert balance.weights[rows % 4 == 3].sum() == pytest.approx(0.5)
  assert set(balance.metrics) == {'vl', 'act', 'kish', 'max_repeat', 'p99_repeat', 'unseen'}


# --- metrics -------------------------------------------------------------------------------------


def test_metrics_by_hand():
  vl, act = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
  weights = np.array([0.25, 0.25, 0.25, 0.25])
  m = balance_metrics(vl, act, weights, BalanceSettings(0.0, 0.0))
  entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
  assert m['vl'] == pytest.approx(
    {
      'clusters': 2,
      'effective': math.exp(entropy),
      'entropy': entropy / math.log(2),
      'max_over_min': 3.0,
      'tv': 0.25,
    }
  )
  assert m['act']['tv'] == pytest.approx(0) and m['act']['entropy'] == pytest.approx(1)
  assert (m['kish'], m['max_repeat'], m['unseen']) == pytest.approx((1, 1, 0))
  m = balance_metrics(vl, act, np.array([0, 0, 0.5, 0.5]), BalanceSettings(0.0, 0.0))
  assert (m['kish'], m['max_repeat'], m['unseen']) == pytest.approx((0.5, 2, 0.5))


def test_one_cluster_is_balanced():
  m = balance_metrics(np.zeros(3, int), np.zeros(3, int), np.full(3, 1 / 3), BalanceSettings())
  assert m['vl']['entropy'] == 1 and m['vl']['effective'] == pytest.approx(1)
