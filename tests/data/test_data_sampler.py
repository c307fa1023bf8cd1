import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.data.sampler import (
  LABEL_PERIOD,
  EventPlan,
  StratifiedStream,
  apportion,
  assign_buckets,
)
from wallwm_jax.types import ConfigError, DataError


def test_buckets_are_the_shortest_that_hold_the_event():
  lengths = [2, 5, 6, 9, 10, 17, 18, 400]
  assert assign_buckets(lengths, (1, 2, 4), 4, 1).tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
  assert assign_buckets([9, 10, 17, 18], (1, 2, 4), 4, 2).tolist() == [0, 1, 1, 2]


@settings(deadline=None, max_examples=50)
@given(weights=st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=20), extra=st.integers(0, 500))
def test_apportion_is_exact_and_fair(weights, extra):
  total = len(weights) + extra
  counts = apportion(np.array(weights), total)
  quota = np.array(weights) / np.sum(weights) * total
  assert counts.sum() == total and counts.min() >= 1
  if quota.min() >= 1:
    assert (np.abs(counts - quota) < 1).all()


def test_apportion_needs_one_draw_each():
  with pytest.raises(ConfigError, match='3 categories'):
    apportion(np.ones(3), 2)


def test_stream_ordinals_count_earlier_draws():
  stream = StratifiedStream(np.array([3.0, 1.0]), 8, (0,))
  seen = collections.Counter()
  for i in range(40):
    category, ordinal = stream.locate(i)
    assert ordinal == seen[category]
    seen[category] += 1
    if i % 8 == 7:
      assert seen == {0: 6 * (i // 8 + 1), 1: 2 * (i // 8 + 1)}


def _plan(balance=0.5, batch_size=8, seed=0, labels=None, buckets=None):
  labels = np.array(['a'] * 80 + ['b'] * 16 + ['c'] * 4) if labels is None else labels
  buckets = np.zeros(len(labels), int) if buckets is None else buckets
  return EventPlan(labels, buckets, batch_size, balance, seed), labels


def _draw(plan, steps, batch_size=8):
  return [[plan.event(step, slot) for slot in range(batch_size)] for step in steps]


@pytest.mark.parametrize('balance', [0.0, 0.5, 1.0])
def test_label_shares_follow_the_temperature(balance):
  plan, labels = _plan(balance)
  drawn = labels[
    np.ravel(_draw(plan, range(2 * 4100 // 8)))
  ]  # two periods of 4100 draws (100 events * 41)
  share = np.array([np.mean(drawn == label) for label in 'abc'])
  want = np.array([80, 16, 4.0]) ** (1 - balance)
  np.testing.assert_allclose(share, want / want.sum(), atol=1e-3)


def test_natural_sampling_is_one_pass_over_every_event_per_epoch():
  plan, labels = _plan(balance=0.0, batch_size=1)
  period = 100 * -(-LABEL_PERIOD // 100)
  counts = np.bincount([plan.event(step, 0) for step in range(period)], minlength=100)
  assert (counts == period // 100).all()


def test_a_label_is_drawn_without_replacement_inside_its_epoch():
  plan, labels = _plan(balance=1.0)
  flat = np.ravel(_draw(plan, range(300)))
  for label in 'abc':
    own, size = flat[labels[flat] == label], (labels == label).sum()
    epochs = own[: len(own) // size * size].reshape(-1, size)
    assert len(epochs) > 2
    assert (np.sort(epochs, 1) == np.flatnonzero(labels == label)).all()
    assert not (epochs[0] == epochs[1]).all()  # a new order each time


def test_plan_is_a_function_of_seed_and_place():
  first, again, other = _plan()[0], _plan()[0], _plan(seed=1)[0]
  steps = [0, 7, 3, 10_000, 10**12]
  assert _draw(first, steps) == _draw(again, steps[::-1])[::-1]  # any order of access
  assert _draw(first, steps) != _draw(other, steps)
  numbers = [first.uniform(step, slot, 10) for step in range(50) for slot in range(8)]
  assert numbers == [again.uniform(step, slot, 10) for step in range(50) for slot in range(8)]
  assert np.bincount(numbers, minlength=10).min() > 15


def test_every_batch_is_of_one_bucket_and_labels_stay_balanced_over_buckets():
  rng = np.random.default_rng(0)
  labels = rng.choice(['a', 'b', 'c'], 300, p=[0.7, 0.2, 0.1])
  buckets = np.where(labels == 'a', rng.integers(0, 3, 300), 2)  # short events are all 'a'
  plan, _ = _plan(1.0, labels=labels, buckets=buckets)
  counts = collections.Counter()
  for step in range(1024):
    events = [plan.event(step, slot) for slot in range(8)]
    assert {buckets[e] for e in events} == {plan.bucket(step)}
    counts.update(labels[events].tolist())
  np.testing.assert_allclose([counts[k] / 8192 for k in 'abc'], 1 / 3, atol=0.01)


def test_empty_split():
  with pytest.raises(DataError, match='empty'):
    _plan(labels=np.array([], str), buckets=np.array([], int))
