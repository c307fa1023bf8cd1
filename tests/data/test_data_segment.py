"""Segmentation: decoding against brute force, features against their symmetries, whole records."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest
from episode_factory import make_episode
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.data import boundary_net
from wallwm_jax.data.boundary_features import arm_features, moves
from wallwm_jax.data.schema import CaptionSpan, EventSpan, validate
from wallwm_jax.data.segment import (
  SegmentSettings,
  best_boundaries,
  expected_boundaries,
  segment,
  windowed,
)
from wallwm_jax.evaluation.boundaries import boundary_score, chance_score
from wallwm_jax.types import ConfigError

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures/data'
CORNERS = (20, 45, 60, 85)  # where `motion` turns, closes its gripper, lifts and goes on


def motion(seed=0, noise=0.0):
  """(state, actions) [110, 10]: bounded-speed legs with a grasp, commands one step ahead."""
  rng = np.random.default_rng(seed)
  way = np.zeros((110, 3))
  angle = rng.uniform(0, 2 * np.pi)
  c, s = np.cos(angle), np.sin(angle)
  legs = [(0, 20, (c, s, 0)), (20, 45, (-s, c, -0.4)), (60, 85, (0, 0, 1)), (85, 110, (-c, -s, 0))]
  for a, b, direction in legs:
    way[a:b] = 0.008 * np.array(direction)
  way += noise * 0.008 * rng.standard_normal(way.shape)
  position = np.cumsum(np.concatenate([np.zeros((1, 3)), way]), 0)
  command = np.where(np.arange(110) < 45, 1.0, 0.0)
  grip = np.convolve(np.pad(command, (4, 0), mode='edge'), np.ones(5) / 5, 'valid')
  upright = np.tile([1, 0, 0, 0, 1, 0], (110, 1))
  state = np.concatenate([position[:-1], upright, grip[:, None]], 1)
  actions = np.concatenate([position[1:], upright, command[:, None]], 1)
  return state.astype(np.float32), actions.astype(np.float32)


def episode(state, actions, **changes):
  return make_episode(
    lengths=(len(state),),
    views=('front',),
    size=(8, 8),
    **{'state': state, 'actions': actions, 'events': (), 'captions': ()} | changes,
  )


def edges(record):
  return [e.start for e in record.events] + [record.events[-1].end - 1]


# Decoding


def worth(expected, chosen, settings):
  """Expected boundaries in the union of the windows, less the threshold for each."""
  frames = np.arange(len(expected))
  near = np.zeros(len(expected), bool)
  for boundary in chosen:
    near |= abs(frames - boundary) <= settings.window
  return float(expected[near].sum() - settings.threshold * len(chosen))


def brute_force(expected, settings):
  """Worth of the best allowed set of boundaries, by enumeration."""
  best, last = -np.inf, len(expected) - 1
  for count in range(len(expected) // settings.min_frames + 1):
    for chosen in itertools.combinations(range(1, last), count):
      gaps = np.diff([0, *chosen, last])
      single = not chosen and last < settings.min_frames
      if single or (gaps >= settings.min_frames).all() and (gaps < settings.max_frames).all():
        best = max(best, worth(expected, chosen, settings))
  return best


@settings(deadline=None, max_examples=60)
@given(
  st.lists(st.integers(0, 16), min_size=2, max_size=16),
  st.integers(2, 4),
  st.integers(0, 4),
  st.integers(0, 3),
)
def test_no_allowed_set_of_boundaries_is_better(thirtieths, shortest, extra, window):
  expected = np.array(thirtieths) / 30
  chosen = SegmentSettings(
    min_frames=shortest, max_frames=2 * shortest + 1 + extra, threshold=0.4, window=window
  )
  found = best_boundaries(expected, len(expected), chosen)
  gaps = np.diff([0, *found, len(expected) - 1])
  assert len(found) == 0 or gaps.min() >= shortest
  assert gaps.max() < chosen.max_frames
  assert worth(expected, found, chosen) == pytest.approx(brute_force(expected, chosen))


def test_short_events_are_merged_and_long_ones_cut_at_their_best_frame():
  expected = np.zeros(100)
  expected[[30, 33, 70]] = [0.9, 0.7, 0.2]
  exact = SegmentSettings(min_frames=5, window=0)
  assert best_boundaries(expected, 100, exact).tolist() == [30]
  bounded = dataclasses.replace(exact, max_frames=50)
  assert best_boundaries(expected, 100, bounded).tolist() == [30, 70]


def test_what_a_neighbour_has_found_is_not_counted_again():
  expected = np.zeros(60)
  expected[[28, 29, 30, 31, 32]] = 0.2  # one boundary, spread over more than min_frames
  assert len(best_boundaries(expected, 60, SegmentSettings(min_frames=2, window=3))) == 1


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 300), st.integers(1, 4), st.integers(0, 60), st.integers(0, 9))
def test_lengths_hold_at_any_stride(num_frames, stride, extra, seed):
  chosen = SegmentSettings(min_frames=8, max_frames=16 + 2 * stride + extra, stride=stride)
  expected = np.random.default_rng(seed).uniform(0, 1, -(-num_frames // stride))
  found = best_boundaries(expected, num_frames, chosen)
  lengths = np.diff([0, *found, num_frames - 1]) + 1
  assert lengths.max() <= chosen.max_frames
  assert len(found) == 0 or lengths.min() > chosen.min_frames
  assert (found % stride == 0).all()


def test_windowed_sums():
  x = np.random.default_rng(0).uniform(0, 1, 30)
  np.testing.assert_allclose(windowed(x, 3), np.convolve(x, np.ones(7), 'same'), rtol=1e-6)
  np.testing.assert_allclose(windowed(x, 0), x, atol=1e-12)


# Features and network


@pytest.mark.parametrize('with_actions', [True, False])
def test_features_turn_with_the_base_frame(with_actions):
  state, actions = motion(noise=0.3)
  angle = 1.1
  c, s = np.cos(angle), np.sin(angle)
  turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])

  def moved(x):
    x = x.astype(np.float64).copy()
    for part in (slice(0, 3), slice(3, 6), slice(6, 9)):
      x[:, part] = x[:, part] @ turn.T
    x[:, :3] += [0.3, -2, 1]
    return x.astype(np.float32)

  given_actions = (actions, moved(actions)) if with_actions else (None, None)
  directions, cues = arm_features(state, given_actions[0])
  turned, same = arm_features(moved(state), given_actions[1])
  np.testing.assert_allclose(turned, directions @ turn.T, atol=2e-3)
  np.testing.assert_allclose(same, cues, atol=5e-3)
  assert directions.shape == (110, 5 if with_actions else 2, 3)


@pytest.mark.parametrize('count', [2, 3, 9])
def test_features_of_short_episodes_are_finite(count):
  state, actions = motion()
  for given_actions in (actions[:count], None):
    for part in arm_features(state[:count], given_actions):
      assert len(part) == count and np.isfinite(part).all()


def test_the_network_is_the_one_described():
  """Against explicit loops over frames, taps and blocks."""
  rng = np.random.default_rng(0)
  inputs, width, layers = 3, 4, len(boundary_net.DILATIONS)
  shapes = {
    'mean': (inputs,),
    'scale': (inputs,),
    'in': (inputs, width),
    'in_bias': (width,),
    'taps': (layers, 3 * width, width),
    'taps_bias': (layers, width),
    'mix': (layers, width, width),
    'mix_bias': (layers, width),
    'out': (width,),
    'out_bias': (),
  }
  member = {name: 0.4 * rng.standard_normal(shape) for name, shape in shapes.items()}
  x = rng.standard_normal((11, inputs))
  h = [((row - member['mean']) * member['scale']) @ member['in'] + member['in_bias'] for row in x]
  for i, dilation in enumerate(boundary_net.DILATIONS):
    after = []
    for t in range(len(h)):
      taps = [
        h[t + d] if 0 <= t + d < len(h) else np.zeros(width) for d in (-dilation, 0, dilation)
      ]
      inner = np.maximum(np.concatenate(taps) @ member['taps'][i] + member['taps_bias'][i], 0)
      after.append(h[t] + inner @ member['mix'][i] + member['mix_bias'][i])
    h = after
  want = [np.maximum(row, 0) @ member['out'] + member['out_bias'] for row in h]
  np.testing.assert_allclose(boundary_net.logits(member, x), want, rtol=1e-9)
  padded = np.concatenate([x, rng.standard_normal((6, inputs))])
  inside = (np.arange(17) < 11)[:, None]
  np.testing.assert_allclose(boundary_net.logits(member, padded, inside)[:11], want, rtol=1e-9)


@pytest.mark.parametrize('variant, vectors', [('actions', 5), ('proprio', 2)])
def test_the_networks_come_with_the_package(variant, vectors):
  weights = pathlib.Path(boundary_net.__file__).with_name('boundaries.npz')
  assert weights.stat().st_size < 400_000
  members = boundary_net.load_members(variant)
  state, actions = motion()
  x = boundary_net.network_input(*arm_features(state, actions if vectors == 5 else None))
  assert len(members) > 1
  assert all(np.isfinite(part).all() for member in members for part in member.values())
  assert all(member['in'].shape[0] == x.shape[1] for member in members)
  assert all((member['mean'][: 3 * vectors] == 0).all() for member in members)
  packed = boundary_net.pack({variant: members})
  assert all(x.dtype == np.float16 for x in packed.values())
  with np.load(weights) as stored:
    for name, x in packed.items():
      np.testing.assert_array_equal(x, stored[name])


# Records


def tabletop_pairs(with_actions):
  """(found, true) of the demonstrations of `collect(20, seed=12)` of wallwm_jax.envs.tabletop, a
  seed that no network was fitted to; and their (frames, true)."""
  stored = np.load(FIXTURES / 'tabletop_events.npz')
  ends = np.cumsum(stored['length'])[:-1]
  columns = [np.split(stored[name], ends) for name in ('state', 'actions', 'starts')]
  pairs, lengths = [], []
  for state, actions, starts in zip(*columns, strict=True):
    found = segment(episode(state, actions if with_actions else None))
    pairs.append((edges(found)[1:-1], np.flatnonzero(starts[1:]) + 1))
    lengths.append(len(state))
  return pairs, [(n, true) for n, (_, true) in zip(lengths, pairs, strict=True)]


@pytest.mark.parametrize('with_actions', [True, False])
def test_the_tabletops_events_are_found_without_its_annotations(with_actions):
  pairs, lengths = tabletop_pairs(with_actions)
  assert len(pairs) == 20
  assert boundary_score(pairs, 3).f1 >= 0.95
  # Its events are short, and even guesses are often within 3 frames: hence within 1 as well.
  assert boundary_score(pairs, 1).f1 >= 0.85 > 0.6 > chance_score(lengths, 1).f1


def test_the_same_record_gives_the_same_events():
  state, actions = motion(1, noise=0.2)
  once, between, again = (
    expected_boundaries(*x) for x in ((state, actions), (state[:50], None), (state, actions))
  )
  assert once.dtype == between.dtype == np.float32
  np.testing.assert_array_equal(once, again)


@pytest.mark.parametrize('with_actions, least', [(True, 0.95), (False, 0.95)])
def test_boundaries_are_where_the_motion_changes(with_actions, least):
  pairs = []
  for seed in range(12):
    state, actions = motion(seed, noise=0.15)
    record = segment(episode(state, actions if with_actions else None))
    validate(record)
    assert edges(record)[-1] == 109
    assert all(a.end == b.start + 1 for a, b in itertools.pairwise(record.events))
    pairs.append((edges(record)[1:-1], CORNERS))
  assert boundary_score(pairs, 3).f1 >= least
  assert chance_score([(110, CORNERS)], 3).f1 < 0.8


def test_what_was_found_is_told():
  state, actions = motion()
  record = segment(episode(state, actions, provenance={'sync': {'lag': 2}}))
  told = record.provenance['segment']
  assert record.provenance['sync'] == {'lag': 2}
  assert told['method'] == 'detector' and told['variant'] == 'actions'
  assert told['boundaries'] == edges(record)[1:-1]
  assert len(told['expected']) == len(told['boundaries']) and told['forced'] == 0
  json.dumps(told)
  assert segment(episode(state, None)).provenance['segment']['variant'] == 'proprio'


def test_annotations_win():
  state, actions = motion()
  events = (EventSpan(0, 31, 'reach'), EventSpan(30, 110, 'lift'))
  record = segment(episode(state, actions, events=events))
  assert record.events == events
  assert record.provenance['segment'] == {'events': 2, 'method': 'given'}
  named = (EventSpan(0, 110, 'reach', {'L1': 'reach the cube'}),)
  assert segment(episode(state, actions, events=named)).events == named


@pytest.mark.parametrize(
  'events',
  [
    (EventSpan(0, 110, 'put', {}),),  # a whole episode in which nothing is marked
    (
      EventSpan(0, 65, 'unlabelled', {'L3': 'put it down', 'L1': 'put it down'}, ('fixed_span',)),
      EventSpan(64, 110, 'unlabelled', {}, ('fixed_span',)),
    ),
  ],
)
def test_spans_that_mark_nothing_are_replaced_and_their_words_kept(events):
  state, actions = motion()
  captions = (CaptionSpan('L3', 0, 110, 'tidy up'),)
  record = segment(episode(state, actions, events=events, captions=captions))
  assert edges(record) == edges(segment(episode(state, actions))) and len(record.events) > 2
  assert all(e.label == 'unlabelled' and not e.flags and not e.captions for e in record.events)
  assert record.captions[0] == captions[0]
  kept = [(s.level, s.start, s.end, s.text) for s in record.captions[1:]]
  assert kept == ([('L3', 0, 65, 'put it down')] if len(events) == 2 else [])


def test_video_only_records_keep_fixed_spans():
  state, _ = motion()
  record = dataclasses.replace(episode(state, None), state=None)
  fixed = segment(record, SegmentSettings(fixed_frames=40))
  assert edges(fixed) == [0, 39, 78, 109]
  assert all(e.flags == ('fixed_span',) for e in fixed.events)
  assert fixed.provenance['segment']['method'] == 'fixed'
  assert segment(fixed).events == fixed.events


def test_an_arm_at_rest_does_not_disturb_the_other():
  state, actions = motion(3)
  rest = np.repeat(state[:1], 110, 0)
  rest[::2, 0] += 1e-4
  assert not moves(rest)
  alone = expected_boundaries(state, actions)
  both = expected_boundaries(np.concatenate([rest, state], 1), np.concatenate([rest, actions], 1))
  np.testing.assert_array_equal(both, alone)
  assert expected_boundaries(rest, rest).max() == 0


@pytest.mark.parametrize('count', [2, 4, 7])
def test_short_and_still_episodes_are_one_event(count):
  state, actions = motion()
  record = segment(episode(state[:count], actions[:count]))
  validate(record)
  assert edges(record) == [0, count - 1]


def test_a_stride_finds_the_same_in_a_faster_recording():
  state, actions = motion(5)
  fast = [np.repeat(x, 3, 0) for x in (state, actions)]
  for x in fast:  # a straight line between the frames of the slow one
    x[:-3, :3] += (np.arange(len(x) - 3) % 3)[:, None] / 3 * (x[3:, :3] - x[:-3, :3])
  chosen = SegmentSettings(stride=3, min_frames=15, window=9, max_frames=387)
  slow = segment(episode(state, actions))
  found = segment(episode(*fast), chosen)
  assert boundary_score([(edges(found)[1:-1], [3 * b for b in edges(slow)[1:-1]])], 9).f1 == 1


@pytest.mark.parametrize(
  'change, message',
  [
    ({'threshold': 0.0}, 'threshold'),
    ({'window': -1}, 'window'),
    ({'stride': 0}, 'stride'),
    ({'min_frames': 1}, 'min_frames'),
    ({'stride': 3}, 'min_frames: expected >= 2 strides = 6 frames, got 5'),
    ({'max_frames': 10}, 'max_frames: expected >= 2 .* = 11'),
    ({'fixed_frames': 1}, 'fixed_frames'),
  ],
)
def test_bad_settings(change, message):
  with pytest.raises(ConfigError, match=message):
    SegmentSettings(**change)
