"""Demonstrations of the scripted expert."""

import dataclasses

import numpy as np
import pytest

from wallwm_jax.data.schema import validate
from wallwm_jax.envs.tabletop import CAPTIONS, EVENT_KINDS, TabletopConfig, collect
from wallwm_jax.envs.tabletop.collect import MIXES, _Collector
from wallwm_jax.envs.tabletop.expert import MAX_EVENT_STEPS
from wallwm_jax.types import ConfigError

CONFIG = TabletopConfig(image_size=(16, 16))
BATCH = 14

pytestmark = pytest.mark.slow


def test_the_expert_rarely_fails():
  collector = _Collector(3, BATCH, 'mixed', CONFIG)
  ended = {}
  while len(ended) < 40:
    ended.update(dict(collector.advance()))
    collector.refill(40)
  failed = [number for number, record in ended.items() if record is None]
  assert len(failed) <= 2, failed


def test_records_are_valid_and_events_leave_no_gap(episodes):
  for record in episodes:
    validate(record)
    assert record.fps == 10
    assert record.events[0].start == 0 and record.events[-1].end == record.num_frames
    for before, after in zip(record.events, record.events[1:]):
      assert after.start == before.end - 1  # they share the boundary frame
    lengths = [event.end - event.start - 1 for event in record.events]
    assert min(lengths) >= 2 and max(lengths) <= MAX_EVENT_STEPS


def test_every_frame_has_captions_of_all_levels(episodes):
  known = set(CAPTIONS)
  for record in episodes:
    for level in ('L3', 'L2', 'L1', 'L0'):
      covered = np.zeros(record.num_frames, bool)
      for span in record.captions:
        if span.level == level:
          covered[span.start : span.end] = True
      assert covered.all(), level
    assert next(span.text for span in record.captions if span.level == 'L3') in known
    for event in record.events:
      text = event.captions['L1']
      assert text.removeprefix('fail to ') in known
      assert (event.label == 'miss') == ('failed' in event.flags) == text.startswith('fail to ')
      if event.label != 'miss':
        kind, colour = event.label.split()
        assert kind in EVENT_KINDS and text.startswith(f'{kind} the {colour} cube')


def test_actions_lead_the_measured_state(episodes):
  """The target commanded at t is where the robot is at t + 1, up to tracking lag and injected
  noise.
  """
  error = np.concatenate([r.actions[:-1, :3] - r.state[1:, :3] for r in episodes])
  still = np.concatenate([r.actions[:-1, :3] - r.state[:-1, :3] for r in episodes])
  assert np.abs(error).mean() < 0.006
  assert np.linalg.norm(error, axis=1).mean() < 0.7 * np.linalg.norm(still, axis=1).mean()
  speed = np.concatenate(
    [np.linalg.norm(np.diff(r.actions[:, :3], axis=0), axis=1) for r in episodes]
  )
  assert speed.max() < 0.06


def test_recordings_depend_on_seed_and_number_not_on_the_batch(episodes):
  again = list(collect(6, 3, mix='mixed', batch=6, config=CONFIG))
  for a, b in zip(episodes, again):
    assert a.episode_id == b.episode_id and a.captions == b.captions
    assert [dataclasses.astuple(e) for e in a.events] == [dataclasses.astuple(e) for e in b.events]
    np.testing.assert_allclose(a.state, b.state, atol=1e-4)
    np.testing.assert_allclose(a.actions, b.actions, atol=1e-4)
    for view in a.views:
      assert np.abs(a.frames[view].astype(int) - b.frames[view]).mean() < 0.1
  other = next(iter(collect(6, 4, mix='mixed', batch=6, config=CONFIG)))
  assert other.episode_id != episodes[0].episode_id
  assert not np.array_equal(other.state[0], episodes[0].state[0])


def test_the_same_call_gives_the_same_bits(episodes):
  again = collect(20, 3, mix='mixed', batch=BATCH, config=CONFIG)
  for a, b in zip(episodes, again):
    np.testing.assert_array_equal(a.state, b.state)
    np.testing.assert_array_equal(a.actions, b.actions)
    for view in a.views:
      np.testing.assert_array_equal(a.frames[view], b.frames[view])


def test_the_single_mix_holds_one_event_per_episode():
  seen = []
  records = list(
    collect(
      BATCH,
      0,
      mix='single',
      batch=BATCH,
      config=CONFIG,
      progress=lambda n, of: seen.append((n, of)),
    )
  )
  assert seen == [(i + 1, BATCH) for i in range(BATCH)]
  for record in records:
    done = [event for event in record.events if event.label != 'miss']
    assert len(done) == 1
  assert len({record.events[-1].label.split()[0] for record in records}) >= 4


def test_bad_requests_are_refused():
  with pytest.raises(ConfigError, match="'all'"):
    next(collect(1, 0, mix='all'))
  with pytest.raises(ConfigError, match='num_episodes'):
    next(collect(0, 0))
  assert set(MIXES) == {'mixed', 'single', 'multi'}
