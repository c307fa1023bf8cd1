"""What was read is accounted for, however often a store is written to or interrupted."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from episode_factory import make_episode

from wallwm_jax.data import ledger, manifest
from wallwm_jax.data.build import build_store
from wallwm_jax.data.ledger import Rejected
from wallwm_jax.data.schema import Quarantined
from wallwm_jax.data.store import EpisodeStoreWriter, EventStore
from wallwm_jax.data.store_writer import KNOWN
from wallwm_jax.types import ConfigError, CorruptStoreError, DataError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
SMALL = {'shard_bytes': 30_000, 'progress': False}  # one episode fills a shard


def _bad(index):
  record = make_episode(index)
  record.actions[3, 0] = np.nan
  return record


def _mixed(count=6):
  """Every third episode is bad, one comes twice."""
  items = [_bad(i) if i % 3 == 1 else make_episode(i) for i in range(count)]
  return [*items, make_episode(0), Quarantined('lost', 'synthetic', 'unreadable')]


def _tree(path):
  """{relative path: sha256} of every file below `path`."""
  return {
    p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
    for p in path.rglob('*')
    if p.is_file()
  }


def _ids(store):
  return store.column('episode_id', 'episodes').tolist()


def test_everything_read_ends_in_one_place(tmp_path):
  report = build_store(_mixed(), tmp_path / 's', progress=False)
  store = EventStore(tmp_path / 's')
  places = [_ids(store), [q.episode_id for q in store.quarantine()],
            [r.episode_id for r in store.rejected()]]  # fmt: skip
  assert places == [
    [f'episode-{i}' for i in (0, 2, 3, 5)], ['episode-1', 'episode-4', 'lost'], ['episode-0']
  ]  # fmt: skip
  assert store.rejected() == [
    Rejected('episode-0', 'synthetic', "episode 'episode-0': duplicate id.")
  ]
  assert report | {'read': 8, 'quarantined': 3, 'rejected': 1} == report
  # Three events each; nobody knows how many the unreadable episode had.
  counts = [report[k] for k in ('events_read', 'events', 'events_quarantined', 'events_rejected')]
  assert counts == [21, 12, 6, 3]


@pytest.mark.parametrize('name', ['read', 'rejected', 'events_read', 'events_quarantined'])
def test_a_ledger_that_does_not_add_up_does_not_open(tmp_path, name):
  build_store(_mixed(), tmp_path / 's', progress=False)
  content = EventStore(tmp_path / 's').manifest
  content['counts'][name] += 1
  del content['format'], content['version'], content['digest']
  manifest.write_manifest(tmp_path / 's', content)  # a sound digest
  with pytest.raises(CorruptStoreError, match='does not add up|promises 2 rejected, found 1'):
    EventStore(tmp_path / 's')


def test_index_keeps_where_an_episode_comes_from(tmp_path):
  view = make_episode(0).views[0]
  found = {'sync': {'lags': {view: 2, 'other': 3}, 'r': 0.8}, 'clean': {'checks': ['blank']}}
  records = [
    make_episode(0, rig='arm-3', provenance=found),
    make_episode(1, provenance={'read': {'format': 'teleop'}, 'sync': {'verdict': 'not judged'}}),
    make_episode(2),
  ]
  build_store(records, tmp_path / 's', progress=False)
  rows = EventStore(tmp_path / 's').episodes.to_pylist()
  columns = ('rig', 'lag', 'cleaning', 'reader', 'events')
  assert [[row[name] for name in columns] for row in rows] == [
    ['arm-3', 2.0, 'passed', 'list', 3],
    ['', None, '', 'teleop', 3],
    ['', None, '', 'list', 3],
  ]
  assert all(row['pipeline'] for row in rows)


def test_a_store_of_version_1_opens_and_grows(tmp_path):
  """As the first version wrote it: fewer columns, no rejections, no settings."""
  import pyarrow.parquet as pq

  from wallwm_jax.data import index

  path = tmp_path / 's'
  build_store([make_episode(i) for i in range(3)], path, heldout=0, progress=False)
  table = pq.read_table(path / index.EPISODES)
  later = ('events', 'content', 'checksums', 'rig', 'lag', 'cleaning', 'pipeline', 'reader')
  pq.write_table(table.drop_columns(list(later)), path / index.EPISODES)
  (path / 'rejected.jsonl').unlink()
  new = json.loads((path / 'manifest.json').read_text())
  names = ('read', 'episodes', 'quarantined', 'events', 'frames')
  rows = {index.EPISODES: 3, index.EVENTS: 9, 'quarantine.jsonl': 0}
  old = {
    'format': manifest.EVENT_STORE,
    'version': 1,
    'block_frames': 16,
    'counts': {name: new['counts'][name] for name in names},
    'shards': new['shards'],
    'files': [manifest.describe(path, name, count) for name, count in rows.items()],
  }
  old['digest'] = manifest._digest(old)
  (path / 'manifest.json').write_text(json.dumps(old, indent=1))

  store = EventStore(path)
  np.testing.assert_array_equal(store.episode(1).frames['side'], make_episode(1).frames['side'])
  assert store.codec['name'] == 'zstd' and store.rejected() == []
  store.verify()
  build_store([make_episode(i) for i in (3, 4)], path, append=True, progress=False)
  store = EventStore(path)
  assert store.manifest['version'] == 2 and len(store.episodes) == 5
  store.verify()


def test_appending_keeps_what_is_there(tmp_path):
  path = tmp_path / 's'
  build_store([make_episode(i) for i in range(8)], path, heldout=0.25, **SMALL)
  before, old = _tree(path), EventStore(path)
  report = build_store([make_episode(i) for i in range(6, 16)], path, append=True, **SMALL)
  store = EventStore(path)
  store.verify()
  assert report['new'] == 8 and report['read'] == 16 and _ids(store)[:8] == _ids(old)
  assert {k: v for k, v in _tree(path).items() if k.startswith('shards') and k in before} == {
    k: v for k, v in before.items() if k.startswith('shards')
  }
  split = store.column('split', 'episodes').tolist()
  assert split[:8] == old.column('split', 'episodes').tolist()
  assert split.count('heldout') == 4
  owner = store.column('episode')
  assert store.column('split').tolist() == [split[i] for i in owner]
  for i in (3, 12):
    np.testing.assert_array_equal(store.episode(i).frames['side'], make_episode(i).frames['side'])
  # What was opened before still reads its old self.
  np.testing.assert_array_equal(old.episode(5).frames['side'], make_episode(5).frames['side'])


def test_appending_the_same_again_changes_nothing(tmp_path):
  path = tmp_path / 's'
  build_store(_mixed(), path, **SMALL)
  # The second copy of an episode was rejected; given alone it is the stored one.
  items = [item for item in _mixed() if not isinstance(item, Quarantined)][:-1]
  before = _tree(path)
  for _ in range(2):
    report = build_store([*items, _mixed()[-1]], path, append=True, **SMALL)
    assert report['new'] == 0 and report['reasons'] == {} and _tree(path) == before
  assert [p.name for p in tmp_path.iterdir()] == ['s']


def test_another_episode_of_a_stored_name_is_rejected_once(tmp_path):
  path = tmp_path / 's'
  build_store([make_episode(0), make_episode(1)], path, **SMALL)
  other = dataclasses.replace(make_episode(5), episode_id='episode-0')
  brighter = make_episode(1)
  brighter.frames['side'][3, 0, 0, 0] ^= 1
  for new in (2, 0):
    report = build_store([other, brighter], path, append=True, **SMALL)
    assert sum(report['reasons'].values()) == new
    assert (report['read'], report['episodes'], report['rejected']) == (4, 2, 2)
  with EpisodeStoreWriter(path, append=True) as writer:
    assert writer.offer(other) == KNOWN and writer.offer(make_episode(0)) == KNOWN


def test_a_store_has_one_codec(tmp_path):
  path = tmp_path / 's'
  build_store([make_episode(0)], path, codec='h264', crf=30, progress=False)
  with pytest.raises(ConfigError, match='codec: the store holds'):
    build_store([make_episode(1)], path, codec='zstd', append=True, progress=False)
  build_store([make_episode(1)], path, append=True, progress=False)
  store = EventStore(path)
  assert store.codec['crf'] == 30
  store.verify()


@pytest.mark.parametrize('point', ['describe', 'write_manifest'])
def test_an_append_that_fails_leaves_the_old_store(tmp_path, monkeypatch, point):
  path = tmp_path / 's'
  build_store([make_episode(i) for i in range(3)], path, **SMALL)
  before = _tree(path)

  def fails(*args):
    raise OSError('no space left')

  with monkeypatch.context() as patched:
    patched.setattr(manifest, point, fails)
    with pytest.raises(OSError, match='no space'):
      build_store([make_episode(3)], path, append=True, **SMALL)
  assert _tree(path) == before and [p.name for p in tmp_path.iterdir()] == ['s']


def _killed(path, stop, mode):
  """Builds or appends in a process that is killed at episode `stop`."""
  code = textwrap.dedent(f"""
    import sys
    sys.path.insert(0, {os.path.dirname(__file__)!r})
    from test_data_ledger import SMALL, _Counting, _mixed, build_store
    build_store(_Counting(_mixed(8), {stop}), {str(path)!r}, {mode}=True, **SMALL)
  """)
  environment = os.environ | {'PYTHONPATH': ROOT}
  result = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert result.returncode == -signal.SIGKILL, result.stderr


class _Counting:
  """A reader that can begin anywhere, and knows what it was asked for; kill -9 at `stop`."""

  def __init__(self, items, stop=None):
    self.items, self.given, self.stop = items, [], stop

  def starting_at(self, count):
    for place, item in enumerate(self.items[count:], count):
      if place == self.stop:
        os.kill(os.getpid(), signal.SIGKILL)
      self.given.append(item.episode_id)
      yield item

  def __iter__(self):
    return self.starting_at(0)


def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path):
  whole, path = tmp_path / 'whole', tmp_path / 's'
  build_store(_Counting(_mixed(8)), whole, **SMALL)
  for stop in (4, 7):  # killed twice, the second time after it had gone on
    _killed(path, stop, 'resume')
    with pytest.raises(DataError, match='no event store'):
      EventStore(path)
  with open(tmp_path / '.s.building/journal.jsonl', 'a') as f:
    f.write('{"shard": ')  # a line that the kill cut short
  reader = _Counting(_mixed(8))
  report = build_store(reader, path, resume=True, **SMALL)
  # Episodes 0, 2, 3, 5 and 6 fill a shard each: 7 things are settled before the kill at 7.
  assert reader.given == ['episode-7', 'episode-0', 'lost']
  assert report['read'] == 10 and _tree(path) == _tree(whole)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['s', 'whole']
  again = build_store(reader, path, resume=True, **SMALL)
  assert again['new'] == 0 and _tree(path) == _tree(whole)


def test_a_killed_append_leaves_the_store_and_goes_on(tmp_path):
  whole, path = tmp_path / 'whole', tmp_path / 's'
  for out in (whole, path):
    build_store([make_episode(0)], out, **SMALL)
  build_store(_Counting(_mixed(8)), whole, append=True, **SMALL)
  before = EventStore(path)
  _killed(path, 6, 'append')
  assert EventStore(path).digest == before.digest
  EventStore(path).verify()
  build_store(_Counting(_mixed(8)), path, append=True, resume=True, **SMALL)
  assert _tree(path) == _tree(whole)


def test_a_resumed_source_must_be_the_same(tmp_path):
  path, items = tmp_path / 's', [make_episode(i) for i in range(3)]
  with pytest.raises(RuntimeError, match='stopped'):
    with EpisodeStoreWriter(path, shard_bytes=30_000, resume=True, reader='list') as writer:
      for item in items:
        writer.add(item)
      raise RuntimeError('stopped')
  with pytest.raises(DataError, match="episode 0 was 'episode-0'.*now it is 'episode-1'"):
    build_store(items[1:], path, resume=True, **SMALL)
  with pytest.raises(DataError, match='other settings .codec'):
    build_store(items, path, resume=True, codec='h264', **SMALL)
  shard = sorted((tmp_path / '.s.building/store/shards').iterdir())[1]
  shard.write_bytes(shard.read_bytes()[:-1])  # lost by the disk: written again
  report = build_store(items, path, resume=True, **SMALL)
  assert report['new'] == 2
  EventStore(path).verify()
  with pytest.raises(ConfigError, match='was finished with'):
    build_store(items, path, resume=True, codec='h264', **SMALL)


def test_two_writers_at_once_are_refused(tmp_path):
  with EpisodeStoreWriter(tmp_path / 's') as writer:
    writer.add(make_episode(0))
    with pytest.raises(DataError, match='another process is writing'):
      EpisodeStoreWriter(tmp_path / 's')
  assert len(EventStore(tmp_path / 's').episodes) == 1


def test_a_reader_of_an_older_state_does_not_change_under_its_workers(tmp_path):
  import pickle

  path = tmp_path / 's'
  build_store([make_episode(0)], path, progress=False)
  sent = pickle.dumps(EventStore(path))
  pickle.loads(sent)
  build_store([make_episode(1)], path, append=True, progress=False)
  with pytest.raises(CorruptStoreError, match='written to since'):
    pickle.loads(sent)


def test_ledger_identity_is_checked_by_itself():
  ledger.check({'read': 3, 'episodes': 1, 'quarantined': 1, 'rejected': 1}, 'here')
  with pytest.raises(CorruptStoreError, match='read = 3'):
    ledger.check({'read': 3, 'episodes': 1, 'quarantined': 1, 'rejected': 0}, 'here')
