import dataclasses

import jax
import numpy as np
import pytest
from episode_factory import encode_text, make_store
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.config import DataConfig, ExperimentConfig, ModelConfig, TextConfig, VideoConfig
from wallwm_jax.data.encode import encode_store
from wallwm_jax.data.packing import PackedPlan, join_windows, pack
from wallwm_jax.data.pipeline import make_dataset, make_reader
from wallwm_jax.data.sampler import EventPlan
from wallwm_jax.data.transforms import Draw
from wallwm_jax.types import ConfigError, DataError, NormStats

IDENTITY = NormStats(*(np.full(n, v, np.float32) for n in (10, 10, 96) for v in (0, 1)))
CONFIG = ExperimentConfig(
  model=ModelConfig(
    image_size=(16, 16), text=TextConfig(tokens=1, width=1), video=VideoConfig(patch=(1, 2, 2))
  ),
  data=DataConfig(batch_size=2, buckets=(2, 4), threads=0, pack=11),
)
LENGTHS = (9, 17, 6, 2)  # frames: 2, 4, 2 and 1 future latents, a row holds 11 - events


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return make_store(tmp_path_factory.mktemp('packing') / 's', episodes=3, lengths=LENGTHS)


def lognormal_costs(size, seed=0):
  """Latent frames of events whose lengths are lognormal, 3..65 with a mean of 27."""
  drawn = np.random.default_rng(seed).lognormal(3.1, 0.72, size)
  return np.clip(np.round(drawn), 3, 65).astype(int)


def best_fit_decreasing(costs, budget):
  """Rows that the textbook algorithm needs, one item after the other."""
  rooms = []
  for cost in sorted(costs, reverse=True):
    fits = [i for i, room in enumerate(rooms) if room >= cost]
    if not fits:
      rooms.append(budget)
      fits = [len(rooms) - 1]
    rooms[min(fits, key=lambda i: rooms[i])] -= cost
  return sorted(rooms)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), budget=st.integers(1, 40))
def test_packing_is_best_fit_decreasing(data, budget):
  costs = np.array(data.draw(st.lists(st.integers(1, budget), min_size=1, max_size=60)))
  rows, count = pack(costs, budget)
  used = np.bincount(rows, costs, minlength=count)
  assert sorted((budget - used).astype(int).tolist()) == best_fit_decreasing(costs, budget)


@pytest.mark.parametrize('budget', [130, 260])
def test_rows_are_full(budget):
  costs = lognormal_costs(20_000)
  plan = PackedPlan(EventPlan(np.zeros(20_000, int), np.ones(1), 0), costs, budget, 0)
  for block in range(3):
    rows = len(plan.block(block).ends)
    assert costs[plan.block(block).events].sum() / (rows * budget) >= 0.99


def make_plan(seed=0, n=300):
  cells = np.arange(n) % 7
  plan = EventPlan(cells, 1.0 + np.arange(7), seed)
  return PackedPlan(plan, lognormal_costs(n), 130, seed), plan


def test_rows_hold_every_draw_once():
  packed, plan = make_plan()
  rows = packed.landmark(10**4)[1]  # all rows of whole blocks
  blocks = packed.landmark(10**4)[0]
  costs, events, draws = lognormal_costs(300), [], []
  for row in range(rows):
    here, numbers = packed.row(row)
    assert 1 <= len(here) and costs[here].sum() <= 130
    assert np.all(np.diff(numbers) > 0)
    events.append(here)
    draws.append(numbers)
  events, draws = np.concatenate(events), np.concatenate(draws)
  order = np.argsort(draws)
  assert np.array_equal(draws[order], np.arange(blocks * plan.block_size))
  want = np.concatenate([plan.block(block) for block in range(blocks)])
  assert np.array_equal(events[order], want)


def test_a_row_is_a_function_of_the_plan_and_its_number():
  first, again = make_plan()[0], make_plan()[0]
  rows = [0, 9000, 17, 4321, 8999, 2500]
  want = [first.row(row) for row in sorted(rows)]
  for row, (events, draws) in zip(sorted(rows, reverse=True), reversed(want)):
    got = again.row(row)
    assert np.array_equal(got[0], events) and np.array_equal(got[1], draws)
  other = make_plan(seed=1)[0]
  assert not np.array_equal(other.row(17)[0], first.row(17)[0])
  assert len(again._blocks) <= 2


def test_rows_of_a_block_are_mixed():
  """Packing sorts by length; batches may not."""
  packed, _ = make_plan()
  costs = lognormal_costs(300)
  longest = np.array([costs[packed.row(row)[0]].max() for row in range(len(packed.block(0).ends))])
  half = len(longest) // 2
  assert abs(longest[:half].mean() - longest[half:].mean()) < 5


def test_a_landmark_spares_the_blocks_before_it():
  packed, _ = make_plan()
  want, landmark = packed.row(9000), packed.landmark(9000)
  fresh, plan = make_plan()
  asked = []
  fresh._plan = type('Spy', (), {
    'block_size': plan.block_size, 'block': lambda _, b: (asked.append(b), plan.block(b))[1]
  })()
  fresh.seek(*landmark)
  assert np.array_equal(fresh.row(9000)[1], want[1])
  assert asked == [landmark[0]] and landmark[0] > 3
  assert np.array_equal(fresh.row(5)[1], packed.row(5)[1])  # and rows before it are still right


def test_events_longer_than_a_row_are_refused():
  plan = EventPlan(np.zeros(3, int), np.ones(1), 0)
  with pytest.raises(DataError, match=r'expected 1..10.*got 3..11'):
    PackedPlan(plan, np.array([3, 11, 4]), 10, 0)


def draws_of(store, rows):
  latents = np.array([2, 4, 2, 1])
  return tuple(Draw(r, int(latents[r % 4]), int(store.column('start')[r])) for r in rows)


def check_row(row, windows, rate=4):
  """Every event of a row is, by value, its own window; everything else is zero."""
  for g, window in enumerate(windows):
    n = window.actions.shape[0] // rate
    here, steps = row.segment == g + 1, row.step_segment == g + 1
    assert np.array_equal(row.position[here], np.arange(1 + n))
    assert np.array_equal(np.flatnonzero(row.anchor & here), np.flatnonzero(here)[:1])
    assert np.array_equal(row.step_position[steps], np.arange(rate * n))
    np.testing.assert_array_equal(row.actions[steps], window.actions)
    np.testing.assert_array_equal(row.action_mask[steps], window.action_mask)
    if window.latents is None:
      mine = row.frame_segment == g + 1
      np.testing.assert_array_equal(row.frames[:, mine], window.frames)
    else:
      np.testing.assert_array_equal(row.latents[:, here], window.latents)
    assert row.num_latents[g] == n == (window.num_frames - 1) // rate
    for name in ('raw_length', 'state', 'text', 'view_mask', 'pixel_mask', 'cameras', 'uid'):
      mine = jax.tree.map(lambda x, g=g: x[g], getattr(row, name))
      jax.tree.map(np.testing.assert_array_equal, mine, getattr(window, name))
  assert np.array_equal(row.event_mask, np.arange(len(row.event_mask)) < len(windows))
  for x, segment, axis in (
    (row.actions, row.step_segment, 0),
    (row.action_mask, row.step_segment, 0),
    (row.frames, row.frame_segment, 1),
    (row.latents, row.segment, 1),
  ):
    if x is not None:
      assert not np.compress(segment == 0, x, axis).any()
  padding = [row.raw_length, row.num_latents, row.state, row.text, row.uid, row.view_mask]
  assert not any(x[len(windows) :].any() for x in jax.tree.leaves(padding))


@pytest.mark.parametrize('rows', [(4, 6, 11), (1, 5), (7,), (3, 7, 11, 0, 3)])
def test_a_packed_row_is_its_windows_side_by_side(store, rows):
  draws = draws_of(store, rows)
  reader = make_reader(CONFIG, store, IDENTITY, encode_text)
  check_row(reader.packed(draws), [reader(draw) for draw in draws])


def test_windows_that_do_not_fit_are_refused(store):
  reader = make_reader(CONFIG, store, IDENTITY, encode_text)
  windows = [reader(draw) for draw in draws_of(store, (1, 5, 3))]
  with pytest.raises(DataError, match=r'1..5 events of 11 latent frames together, got 3 of 12'):
    join_windows(windows, 11, 4)


def with_data(**data):
  return dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **data))


def assert_specified(batch, spec):
  assert jax.tree.structure(batch) == jax.tree.structure(spec)
  for (path, got), want in zip(jax.tree.leaves_with_path(batch), jax.tree.leaves(spec)):
    assert (got.shape, got.dtype) == (want.shape, want.dtype), path


def test_batches_have_the_shapes_of_the_config(store):
  batch = next(make_dataset(CONFIG, store, IDENTITY, encode_text))
  assert_specified(batch, CONFIG.inputs_spec())
  assert_specified(CONFIG.fake_batch(), CONFIG.inputs_spec())
  fake = CONFIG.fake_batch()
  assert fake.num_latents.tolist() == [[4, 4, 0, 0, 0]] * 2
  assert (fake.action_mask.any(-1) == (fake.step_segment > 0)).all()


def test_precomputed_latents_are_packed_with_their_actions(store, tmp_path):
  def encode(frames):  # [B, V, T, H, W, 3] -> latents that name the frame they begin with
    first = np.asarray(frames)[:, :, ::4, :2, :2, :1].astype(np.float32)
    return np.tile(first, 96)

  encode_store(CONFIG, store, encode, tmp_path / 'latents', dtype='float32', batch_size=3)
  config = with_data(latents=str(tmp_path / 'latents'))
  reader = make_reader(config, store, IDENTITY, encode_text)
  draws = draws_of(store, (4, 6, 11))
  row = reader.packed(draws)
  assert row.frames is None and row.frame_segment is None
  check_row(row, [reader(draw) for draw in draws])
  # Frame t of an episode is filled with t: latents and commands come from the same moments.
  info = store.info(1)
  for g, draw in enumerate(draws[:2]):
    here = row.segment == g + 1
    n, last = draw.bucket, int(store.column('end')[draw.event]) - 1
    want = np.minimum(draw.anchor + 4 * np.arange(1 + n), last)
    np.testing.assert_array_equal(row.latents[0, here, 0, 0, 0], want)
    np.testing.assert_array_equal(row.state[g], info.state[draw.anchor])
  batch = next(make_dataset(config, store, IDENTITY, encode_text))
  assert_specified(batch, config.inputs_spec())


@pytest.mark.parametrize(
  'change,message',
  [
    ({'pack': 4}, 'data.pack: expected 0 or at least 5 latent frames'),
    ({'window': 'chunk'}, 'data.pack: rows hold whole events'),
    ({'recovery': 1.0, 'clusters': 'x'}, 'data.recovery: expected 0 <= x < 1'),
    ({'recovery': 0.1}, 'data.clusters is empty'),
    ({'sources': (('a', 1.0), ('a', 2.0)), 'clusters': 'x'}, 'every source once'),
    ({'sources': (('a', 0.0),), 'clusters': 'x'}, 'ratio > 0'),
    ({'balance_cap': 0.5}, 'data.balance_cap'),
  ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
  with pytest.raises(ConfigError, match=message):
    with_data(**change)


def test_moments_are_not_packed():
  with pytest.raises(ConfigError, match="data.pack: stage '4' reads moments"):
    dataclasses.replace(
      CONFIG,
      language=dataclasses.replace(CONFIG.language, kind='qwen'),
      train=dataclasses.replace(CONFIG.train, stage='4'),
    )
