"""Preparation: steps in their order, lags of rigs, and every refusal with its reason."""

import dataclasses

import numpy as np
import pytest
from scene_factory import make_scene

from wallwm_jax.data.build import build_store
from wallwm_jax.data.prepare import Prepared, PrepareSettings, rig_lags
from wallwm_jax.data.schema import EventSpan, Quarantined, validate
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.sync import SyncSettings
from wallwm_jax.types import ConfigError

LAG = 3


def scene(index, num_frames=60, lags=LAG, **changes):
  """Unmarked, as a data set without events comes."""
  record = make_scene(index, num_frames=num_frames, lags=lags, **changes)
  return dataclasses.replace(record, events=(EventSpan(0, num_frames, 'unlabelled'),))


@pytest.fixture(scope='module')
def raw():
  return [scene(i) for i in range(4)]


def test_all_steps_leave_their_findings(raw):
  prepared = Prepared(raw)
  records = list(prepared)
  assert len(prepared) == len(records) == 4
  assert [set(lag.lags.values()) for lag in prepared.lags.values()] == [{LAG}]
  for before, record in zip(raw, records):
    validate(record)
    assert record.num_frames == before.num_frames - LAG
    assert list(record.provenance) == ['sync', 'clean', 'segment', 'caption']
    assert len(record.events) > 1 and all(event.captions['L1'] for event in record.events)
    np.testing.assert_array_equal(record.state, before.state[LAG:])


def test_named_steps_only(raw):
  settings = PrepareSettings.of(['clean', 'prune'])
  assert settings.sync is settings.segment is settings.caption is None
  (record, *_) = Prepared(raw, settings)
  assert list(record.provenance) == ['clean', 'prune']
  assert record.events[0].end == record.num_frames
  assert Prepared(raw, settings).lags == {}
  with pytest.raises(ConfigError, match="got 'sinc'. Did you mean 'sync'"):
    PrepareSettings.of(['sinc'])


def test_every_rig_has_its_own_lag(raw):
  other = [scene(i, lags=0, rig='new clocks') for i in range(10, 13)]
  lags = rig_lags(raw + other, SyncSettings())
  assert {rig: set(lag.lags.values()) for (_, rig), lag in lags.items()} == {
    raw[0].rig: {LAG},
    'new clocks': {0},
  }


def test_short_episodes_follow_their_rig_and_pass_where_it_has_no_long_one(raw):
  short = scene(20, num_frames=30)
  assert list(Prepared([*raw, short]))[-1].num_frames == 30 - LAG
  (alone,) = Prepared([short])
  assert alone.num_frames == 30
  assert alone.provenance['sync'] == {
    'verdict': 'not judged: no episode of its rig has 40 frames'
  }


def test_what_cannot_be_compared_is_refused_by_the_name_of_its_defect(raw):
  cut = dataclasses.replace(raw[0], episode_id='cut', state=raw[0].state[:-4])
  blind = dataclasses.replace(raw[0], episode_id='blind', frames={}, views=())
  given = Quarantined('gone', 'disk', 'cannot be read')
  *_, refused, gone = Prepared([*raw, cut, given])
  assert isinstance(refused, Quarantined) and refused.reason.startswith('cleaning: length_mismatch')
  assert gone is given
  for steps in (['sync'], ['sync', 'segment']):
    *_, refused = Prepared([*raw, cut], PrepareSettings.of(steps))
    assert isinstance(refused, Quarantined) and refused.reason.startswith('sync: ')
  (refused,) = Prepared([cut], PrepareSettings.of(['sync']))
  assert isinstance(refused, Quarantined) and 'sync' in refused.reason
  (refused,) = Prepared([blind])
  assert isinstance(refused, Quarantined)


def test_a_store_of_prepared_episodes_adds_up_and_resumes_to_the_same_bytes(raw, tmp_path):
  frozen = dict(raw[1].frames)
  frozen['front'] = np.repeat(frozen['front'][:1], raw[1].num_frames, 0)
  broken = dataclasses.replace(raw[1], frames=frozen)
  episodes = [raw[0], broken, *raw[2:]]
  report = build_store(Prepared(episodes), tmp_path / 'whole', progress=False)
  assert (report['read'], report['episodes'], report['quarantined']) == (4, 3, 1)
  assert next(iter(report['reasons'])).startswith('cleaning: frozen')

  class Killed(Prepared):
    def __iter__(self):
      for i, item in enumerate(super().__iter__()):
        if i == 2:
          raise KeyboardInterrupt
        yield item

  with pytest.raises(KeyboardInterrupt):
    build_store(Killed(episodes), tmp_path / 'again', progress=False)
  build_store(Prepared(episodes), tmp_path / 'again', resume=True, progress=False)
  assert EventStore(tmp_path / 'again').digest == EventStore(tmp_path / 'whole').digest
