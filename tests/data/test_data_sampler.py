import collections
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.data.permutation import fold, mix64, mix64_array, permute, shuffled
from wallwm_jax.data.sampler import (
  BLOCK,
  BatchPlan,
  CellStream,
  EventPlan,
  assign_buckets,
  cell_mass,
  label_weights,
)
from wallwm_jax.types import DataError


def test_buckets_are_the_shortest_that_hold_the_event():
  lengths = [2, 5, 6, 9, 10, 17, 18, 400]
  assert assign_buckets(lengths, (1, 2, 4), 4, 1).tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
  assert assign_buckets([9, 10, 17, 18], (1, 2, 4), 4, 2).tolist() == [0, 1, 1, 2]


def test_hash_is_splitmix64():
  # First outputs of the generator seeded with 0, of its public reference implementation.
  golden = 0x9E3779B97F4A7C15
  want = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
  states = [i * golden % 2**64 for i in range(4)]
  assert [mix64(state) for state in states] == want
  assert mix64_array(np.array(states, np.uint64)).tolist() == want


def test_keys_depend_on_order_and_length():
  keys = [fold(), fold(0), fold(0, 0), fold(1, 2), fold(2, 1), fold(1, 2, 0)]
  assert len(set(keys)) == len(keys)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutations_are_bijections(size, key):
  index = np.arange(size)
  order = permute(index, np.full(size, size), np.full(size, key, np.uint64))
  assert np.array_equal(np.sort(order), index)
  assert np.array_equal(np.sort(shuffled(size, key)), index)


def test_permutations_are_pinned():
  """A stored state means the same events for ever."""
  order = permute(np.arange(10), np.full(10, 10), np.full(10, 7, np.uint64))
  assert order.tolist() == [1, 0, 5, 2, 8, 9, 4, 7, 3, 6]
  assert shuffled(10, 7).tolist() == [4, 2, 0, 9, 3, 8, 6, 5, 1, 7]


@pytest.mark.parametrize('size', [2, 3, 10, 97])
def test_permutations_are_uniform(size):
  """Every element goes everywhere equally often over keys (chi-square)."""
  keys = mix64_array(np.arange(4000, dtype=np.uint64))
  index = np.tile(np.arange(size), len(keys))
  order = permute(index, np.full(len(index), size), np.repeat(keys, size))
  counts = np.bincount(index * size + order, minlength=size * size)
  expected, freedom = len(keys) / size, (size - 1) ** 2
  chi2 = ((counts - expected) ** 2 / expected).sum()
  assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


@settings(deadline=None, max_examples=40)
@given(
  mass=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40),
  blocks=st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
)
def test_counts_add_up_never_decrease_and_follow_the_shares(mass, blocks):
  stream = CellStream(np.array(mass), 128, 5)
  share = np.array(mass) / np.sum(mass)
  for block in blocks:
    counts = stream.counts(block)
    assert counts.sum() == 128 * block and (counts >= 0).all()
    assert (stream.counts(block + 1) >= counts).all()
    # Worst case of a rounding tree; 2**-32 is the resolution of its shares.
    assert (np.abs(counts - share * 128 * block) < 2 + 128 * block * 40 * 2**-32).all()


def test_stream_ordinals_count_earlier_draws():
  stream = CellStream(np.array([3.0, 1.0]), 8, 0)
  seen = collections.Counter()
  for i in range(40):
    category, ordinal = stream.locate(i)
    assert ordinal == seen[category]
    seen[category] += 1
    if i % 8 == 7:
      assert seen == {0: 6 * (i // 8 + 1), 1: 2 * (i // 8 + 1)}


def zipf_clusters(events=300_000, first=512, second=64):
  """Cell (first label * 64 + second label) of events whose labels are Zipf distributed."""
  share = np.outer(1 / np.arange(1, first + 1), 1 / np.arange(1, second + 1)).ravel()
  return np.random.default_rng(0).choice(first * second, events, p=share / share.sum())


@pytest.mark.parametrize('power', [0.4, 1.0])
def test_clusters_are_balanced_to_less_than_a_draw(power):
  labels = zipf_clusters()
  count = np.bincount(labels, minlength=512 * 64)
  weights = count[labels] ** (power - 1.0)  # a label is drawn in proportion to count ** power
  cells, mass = cell_mass(weights, labels)
  ids, share = np.unique(labels), mass / mass.sum()
  plan, draws = EventPlan(cells, mass, 11), 4 * BLOCK
  events = np.concatenate([plan.block(block) for block in range(4)])
  drawn = np.bincount(cells[events], minlength=len(mass))
  assert np.array_equal(drawn, plan.counts(4))
  assert np.abs(drawn - share * draws).max() < 1
  variation = 0.5 * np.abs(drawn / draws - share).sum()
  fraction = share * draws % 1
  least = 0.5 * np.minimum(fraction, 1 - fraction).sum() / draws  # no integers come closer
  random = np.random.default_rng(1).multinomial(draws, share)
  assert variation < 1.4 * least
  assert variation < 0.25 * 0.5 * np.abs(random / draws - share).sum()
  for margin in (ids // 64, ids % 64):
    error = np.bincount(margin, drawn / draws) - np.bincount(margin, share)
    assert 0.5 * np.abs(error).sum() < 0.003


def test_clusters_that_can_be_drawn_exactly_are():
  cells = np.arange(70_000) % 64
  plan = EventPlan(cells, np.ones(64), 0)
  assert (plan.counts(10**6) == 10**6 * BLOCK // 64).all()


def make_plan(balance=0.5, batch_size=8, seed=0, labels=None, buckets=None):
  labels = np.array(['a'] * 80 + ['b'] * 16 + ['c'] * 4) if labels is None else labels
  buckets = np.zeros(len(labels), int) if buckets is None else buckets
  return BatchPlan(*label_weights(labels, balance), buckets, batch_size, seed), labels


def draw(plan, steps, batch_size=8):
  return [[plan.event(step, slot) for slot in range(batch_size)] for step in steps]


@pytest.mark.parametrize('balance', [0.0, 0.5, 1.0])
def test_label_shares_follow_the_temperature(balance):
  plan, labels = make_plan(balance)
  # Two blocks of 4100 draws (100 events * 41).
  drawn = labels[np.ravel(draw(plan, range(2 * 4100 // 8)))]
  share = np.array([np.mean(drawn == label) for label in 'abc'])
  want = np.array([80, 16, 4.0]) ** (1 - balance)
  np.testing.assert_allclose(share, want / want.sum(), atol=1 / 8200)


def test_natural_sampling_shows_every_event_equally_often_in_every_block():
  plan, labels = make_plan(balance=0.0, batch_size=1)
  for start in (0, 4100, 41 * 4100):
    events = [plan.event(start + step, 0) for step in range(4100)]
    assert (np.bincount(events, minlength=100) == 41).all()


def test_a_label_is_drawn_without_replacement_inside_its_epoch():
  plan, labels = make_plan(balance=1.0)
  flat = np.ravel(draw(plan, range(300)))
  for label in 'abc':
    own, size = flat[labels[flat] == label], (labels == label).sum()
    epochs = own[: len(own) // size * size].reshape(-1, size)
    assert len(epochs) > 2
    assert (np.sort(epochs, 1) == np.flatnonzero(labels == label)).all()
    # A new order each time, until there are no others.
    assert len(np.unique(epochs, axis=0)) == min(len(epochs), math.factorial(size))


def test_large_cells_are_walked_through_over_many_blocks():
  n = 100_000
  plan = EventPlan(np.zeros(n, int), np.ones(1), 3)
  events = np.concatenate([plan.block(block) for block in range(5)])[: 3 * n].reshape(3, n)
  assert (np.sort(events, 1) == np.arange(n)).all()
  assert (events[0] == events[1]).mean() < 1e-3
  assert abs(np.corrcoef(events[0], np.arange(n))[0, 1]) < 0.02


def test_plan_is_a_function_of_seed_and_place():
  first, again, other = make_plan()[0], make_plan()[0], make_plan(seed=1)[0]
  steps = [0, 7, 3, 10_000, 10**12]
  assert draw(first, steps) == draw(again, steps[::-1])[::-1]  # any order of access
  assert draw(first, steps) != draw(other, steps)


def test_only_a_few_blocks_are_kept():
  plan = EventPlan(np.arange(50) % 5, np.ones(5), 0)
  far = [plan.event(place) for place in range(0, 10**6, 10**4)]
  assert len(plan._blocks) <= 2 and not plan._stream._located
  fresh = EventPlan(np.arange(50) % 5, np.ones(5), 0)
  assert [fresh.event(place) for place in range(0, 10**6, 10**4)] == far


def test_every_batch_is_of_one_bucket_and_labels_stay_balanced_over_buckets():
  rng = np.random.default_rng(0)
  labels = rng.choice(['a', 'b', 'c'], 300, p=[0.7, 0.2, 0.1])
  buckets = np.where(labels == 'a', rng.integers(0, 3, 300), 2)  # short events are all 'a'
  plan, _ = make_plan(1.0, labels=labels, buckets=buckets)
  counts = collections.Counter()
  for step in range(1024):
    events = [plan.event(step, slot) for slot in range(8)]
    assert {buckets[e] for e in events} == {plan.bucket(step)}
    counts.update(labels[events].tolist())
  np.testing.assert_allclose([counts[k] / 8192 for k in 'abc'], 1 / 3, atol=0.01)


def test_digest_is_of_what_is_drawn():
  cells, mass = np.arange(50) % 5, np.arange(1.0, 6.0)
  same = EventPlan(cells, mass, 0).digest()
  assert same == EventPlan(cells, 3 * mass, 1).digest()
  assert same != EventPlan(cells, mass[::-1], 0).digest()
  assert same != EventPlan(cells[::-1], mass, 0).digest()


def test_cells_of_mass_zero_are_never_drawn():
  plan = EventPlan(np.arange(30) % 3, np.array([1.0, 0.0, 2.0]), 0)
  assert set(plan.block(0) % 3) == {0, 2}
  assert plan.counts(1).tolist() == [plan.block_size / 3, 0, plan.block_size * 2 / 3]


def test_what_cannot_be_drawn_is_refused():
  with pytest.raises(DataError, match='empty'):
    make_plan(labels=np.array([], str), buckets=np.array([], int))
  with pytest.raises(DataError, match=r'1 cells shall be drawn but have no events, first \[1\]'):
    EventPlan(np.array([0, 0, 2]), np.ones(3), 0)
  for mass in ([1.0, np.nan], [1.0, -1.0], [0.0, 0.0]):
    with pytest.raises(DataError, match='finite'):
      EventPlan(np.array([0, 1]), np.array(mass), 0)
  with pytest.raises(DataError, match='event 2: expected 1.0.*cell 7, got 2.0'):
    cell_mass(np.array([1.0, 1.0, 2.0]), np.array([7, 3, 7]))
