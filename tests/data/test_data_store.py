import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import fault_factory
import numpy as np
import pytest
from episode_factory import make_episode, make_store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wallwm_jax.data import clips, shards
from wallwm_jax.data.build import build_store
from wallwm_jax.data.faults import find_faults
from wallwm_jax.data.schema import Quarantined
from wallwm_jax.data.store import EpisodeStoreWriter, EventStore
from wallwm_jax.types import CorruptStoreError, DataError


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
  path = tmp_path_factory.mktemp('stores') / 'pristine'
  make_store(path)
  return path


@pytest.fixture
def copied(pristine, tmp_path):
  return shutil.copytree(pristine, tmp_path / 'store')


def _shard(path):
  return sorted((path / 'shards').iterdir())[0]


def _assert_same(a, b):
  """Two records, field by field and bit by bit."""
  for field in dataclasses.fields(a):
    x, y = getattr(a, field.name), getattr(b, field.name)
    if field.name == 'frames' or field.name == 'pixel_mask':
      assert x.keys() == y.keys()
      for view in x:
        np.testing.assert_array_equal(x[view], y[view])
    elif field.name == 'calibration':
      for view in x:
        np.testing.assert_array_equal(x[view].intrinsics, y[view].intrinsics)
        np.testing.assert_array_equal(x[view].extrinsics, y[view].extrinsics)
    elif field.name == 'events':
      for old, new in zip(x, y, strict=True):
        assert (old.start, old.end, old.label, old.flags) == (
          new.start,
          new.end,
          new.label,
          new.flags,
        )
        assert a.event_captions(old) == new.captions
    elif isinstance(x, np.ndarray):
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y)
    else:
      assert x == y


def test_round_trip_is_exact(pristine):
  store = EventStore(pristine)
  for i in range(6):
    _assert_same(make_episode(i), store.episode(i))
  store.verify()


@pytest.mark.parametrize(
  'changes',
  [
    {'actions': None},
    {'actions': None, 'state': None},
    {'calibration': {}},
    {'times': np.arange(32) / 9.9, 'rig': 'arm-3', 'provenance': {'sync': {'lag': 2, 'r': 0.75}}},
    {'pixel_mask': {'side': np.arange(256).reshape(16, 16) % 3 == 0, 'front': None}},
  ],
)
def test_round_trip_of_optional_parts(tmp_path, changes):
  record = make_episode(**changes)
  build_store([record], tmp_path / 's', progress=False)
  _assert_same(record, EventStore(tmp_path / 's').episode(0))


def test_index_describes_every_event(pristine):
  store = EventStore(pristine)
  rows = store.events.to_pylist()
  assert len(rows) == 18
  assert {
    k: rows[4][k] for k in ('episode', 'start', 'end', 'length', 'label', 'L1', 'L3', 'L0', 'split')
  } == {
    'episode': 1,
    'start': 9,
    'end': 26,
    'length': 17,
    'label': 'grasp',
    'L1': 'grasp it, episode 1',
    'L3': 'task 1',
    'L0': '',
    'split': 'train',
  }
  record = make_episode(1)
  assert rows[4]['uid'] == record.event_uid(record.events[1])


def test_a_window_decodes_only_its_blocks(pristine, monkeypatch):
  store, decoded = EventStore(pristine), []
  original = clips.Zstd.decode
  monkeypatch.setattr(
    clips.Zstd,
    'decode',
    lambda *args: decoded.append((args[5].tolist(), tuple(args[6]))) or original(*args),
  )
  got = store.frames(2, np.array([17, 18, 18, 31]), ['side'])
  np.testing.assert_array_equal(got['side'], make_episode(2).frames['side'][[17, 18, 18, 31]])
  assert decoded == [([1, 2, 2, 15], ('side',))]


def test_store_is_picklable_and_thread_safe(pristine):
  store = pickle.loads(pickle.dumps(EventStore(pristine)))
  failures = []

  def read(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
      episode, indices = int(rng.integers(6)), rng.integers(0, 32, 5)
      want = make_frames[episode][indices]
      if not np.array_equal(store.frames(episode, indices, ['wrist'])['wrist'], want):
        failures.append(episode)

  make_frames = [make_episode(i).frames['wrist'] for i in range(6)]
  threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert not failures


def test_many_shards(tmp_path):
  with EpisodeStoreWriter(tmp_path / 's', shard_bytes=30_000) as writer:
    for i in range(5):
      writer.add(make_episode(i))
  store = EventStore(tmp_path / 's')
  assert len(store.manifest['shards']) == 5
  for i in range(5):
    _assert_same(make_episode(i), store.episode(i))


@settings(
  deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_of_a_shard_is_detected(pristine, tmp_path_factory, where, bit):
  path = tmp_path_factory.mktemp('flip') / 'store'
  shutil.copytree(pristine, path)
  shard = _shard(path)
  content = bytearray(shard.read_bytes())
  content[int(where * len(content))] ^= 1 << bit
  shard.write_bytes(content)
  with pytest.raises(CorruptStoreError, match='episodes-00000'):
    EventStore(path).verify()
  # Reading alone (no sha256) may miss a flip in padding, but never returns other data.
  try:
    store = EventStore(path)
    for i in range(6):
      _assert_same(make_episode(i), store.episode(i))
  except CorruptStoreError as error:
    assert 'episodes-00000' in str(error)


def test_a_flip_in_the_pixels_is_found_by_reading_and_spares_other_episodes(copied):
  shard = _shard(copied)
  content = bytearray(shard.read_bytes())
  content[len(content) // 20] ^= 16  # early in the file: episode 0
  shard.write_bytes(content)
  store = EventStore(copied)
  with pytest.raises(CorruptStoreError, match=r'episodes-00000.*record \[.*episode 0'):
    store.episode(0)
  _assert_same(make_episode(5), store.episode(5))


def test_records_out_of_place_are_found(copied):
  """Two valid records that changed places pass every checksum of their own."""
  from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

  shard = _shard(copied)
  reader = ArrayRecordReader(str(shard))
  raw = [reader.read([i])[0] for i in range(reader.num_records())]
  raw[1], raw[4] = raw[4], raw[1]  # block 0 of episodes 0 and 1
  writer = ArrayRecordWriter(str(shard), shards._WRITER_OPTIONS)
  for record in raw:
    writer.write(record)
  writer.close()
  with pytest.raises(CorruptStoreError, match='expected episode 0 block 0, got episode 1 block 0'):
    EventStore(copied).episode(0)


@pytest.mark.parametrize('keep', [0.0, 0.3, 0.99])
def test_truncated_shard_does_not_open(copied, keep):
  shard = _shard(copied)
  os.truncate(shard, int(shard.stat().st_size * keep))
  with pytest.raises(CorruptStoreError, match='truncated'):
    EventStore(copied)


def test_shard_of_the_right_size_but_unreadable_does_not_open(copied):
  shard = _shard(copied)
  size = shard.stat().st_size
  os.truncate(shard, size // 2)
  os.truncate(shard, size)  # zeros instead of the second half, footer included
  with pytest.raises(CorruptStoreError, match='records'):
    EventStore(copied)


@pytest.mark.parametrize(
  'name',
  ['index/events.parquet', 'index/episodes.parquet', 'quarantine.jsonl', 'rejected.jsonl'],
)
def test_missing_file_is_named(copied, name):
  (copied / name).unlink()
  with pytest.raises(CorruptStoreError, match=name):
    EventStore(copied)


def test_changed_index_or_manifest_does_not_open(copied):
  manifest = copied / 'manifest.json'
  text = manifest.read_text()
  manifest.write_text(text.replace('"episodes": 6', '"episodes": 7'))
  with pytest.raises(CorruptStoreError, match='digest'):
    EventStore(copied)
  manifest.write_text(text[:100])
  with pytest.raises(CorruptStoreError, match='JSON'):
    EventStore(copied)
  manifest.write_text(text)
  index = copied / 'index/events.parquet'
  content = bytearray(index.read_bytes())
  content[len(content) // 2] ^= 1
  index.write_bytes(content)
  with pytest.raises(CorruptStoreError, match='sha256'):
    EventStore(copied)


def test_newer_format_and_absent_store_say_what_to_do(copied, tmp_path):
  manifest = json.loads((copied / 'manifest.json').read_text())
  (copied / 'manifest.json').write_text(json.dumps(manifest | {'version': 3}))
  with pytest.raises(DataError, match='version 3.*Upgrade'):
    EventStore(copied)
  with pytest.raises(DataError, match='no event store'):
    EventStore(tmp_path / 'nowhere')


def test_invalid_episodes_are_quarantined_and_counts_add_up(tmp_path):
  nan = make_episode(1)
  nan.actions[3, 0] = np.nan
  items = [
    make_episode(0),
    nan,
    make_episode(2, views=('front',)),
    make_episode(0),
    Quarantined('lost', 'synthetic', 'unreadable'),
    dataclasses.replace(make_episode(3), views=('front', 'rear')),
  ]
  report = build_store(items, tmp_path / 's', progress=False)
  kinds = ('read', 'episodes', 'quarantined', 'rejected')
  assert [report[kind] for kind in kinds] == [6, 2, 3, 1]
  assert sum(report['reasons'].values()) == 4
  store = EventStore(tmp_path / 's')
  lost = store.quarantine() + store.rejected()
  reasons = {(entry.episode_id, entry.reason) for entry in lost}
  for name, reason in [
    ('episode-1', 'NaN'),
    ('episode-0', 'duplicate id'),
    ('lost', 'unreadable'),
    ('episode-3', "missing camera 'rear'"),
  ]:
    assert any(name == who and reason in why for who, why in reasons)
  assert store.column('episode_id', 'episodes').tolist() == ['episode-0', 'episode-2']


def test_nothing_valid_leaves_no_store(tmp_path):
  with pytest.raises(DataError, match='no valid episode'):
    build_store([Quarantined('a', 'b', 'c')], tmp_path / 's', progress=False)
  assert list(tmp_path.iterdir()) == []


def test_interrupted_build_leaves_nothing(tmp_path):
  def episodes():
    yield make_episode(0)
    raise RuntimeError('camera fell off')

  with pytest.raises(RuntimeError, match='fell off'):
    build_store(episodes(), tmp_path / 's', progress=False)
  assert list(tmp_path.iterdir()) == []


def test_full_disk_is_not_taken_for_a_bad_episode(tmp_path, monkeypatch):
  class Short:
    def num_records(self):
      return 1

  monkeypatch.setattr(shards, 'open_shard', lambda path: Short())
  with pytest.raises(OSError, match='wrote 3 records, 1 can be read back'):
    build_store([make_episode(0)], tmp_path / 's', progress=False)
  assert list(tmp_path.iterdir()) == []


def test_killed_build_leaves_no_store_that_opens(tmp_path):
  code = textwrap.dedent(f"""
    import os, signal, sys
    sys.path.insert(0, {os.path.dirname(__file__)!r})
    from episode_factory import make_episode
    from wallwm_jax.data.build import build_store
    def episodes():
      yield make_episode(0)
      os.kill(os.getpid(), signal.SIGKILL)
    build_store(episodes(), {str(tmp_path / 's')!r}, progress=False)
  """)
  root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
  result = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True)
  assert result.returncode == -signal.SIGKILL
  leftovers = list(tmp_path.iterdir())
  assert [p.name for p in leftovers] == ['.s.building']
  for path in (tmp_path / 's', leftovers[0], leftovers[0] / 'store'):
    with pytest.raises(DataError, match='no event store'):
      EventStore(path)
  make_store(tmp_path / 's', episodes=1).verify()


def test_existing_store_is_not_overwritten(copied):
  with pytest.raises(DataError, match='exists'):
    build_store([make_episode(9)], copied, progress=False)
  EventStore(copied).verify()


def test_split_is_an_exact_fraction_and_does_not_depend_on_the_order(tmp_path):
  episodes = [make_episode(i, lengths=(4,), views=('front',)) for i in range(20)]
  split = {}
  for name, items in (('a', episodes), ('b', episodes[::-1])):
    build_store(items, tmp_path / name, heldout=0.25, progress=False)
    table = EventStore(tmp_path / name).episodes
    split[name] = dict(zip(table['episode_id'].to_pylist(), table['split'].to_pylist()))
  assert split['a'] == split['b']
  assert sorted(split['a'].values()) == ['heldout'] * 5 + ['train'] * 15


@pytest.fixture(scope='module')
def targets(tmp_path_factory):
  """By codec: a store of several shards, another one, and the content of every episode."""
  found = {}
  for codec in ('zstd', 'h264'):
    whole, other = fault_factory.make_stores(tmp_path_factory.mktemp(codec), codec)
    assert len(fault_factory.shards_of(whole)) > 1 and not find_faults(whole)
    found[codec] = whole, other, fault_factory.read_everything(whole)
  return found


@pytest.mark.parametrize('codec', ['zstd', 'h264'])
@pytest.mark.parametrize('kind', fault_factory.KINDS, ids=lambda kind: kind.__name__)
def test_injected_faults_are_named_and_never_read(targets, tmp_path, kind, codec):
  whole, other, content = targets[codec]
  for seed in range(3):
    rng = np.random.default_rng((seed, len(kind.__name__)))
    path, hit = fault_factory.damage(kind, whole, other, tmp_path / str(seed), rng)
    found, name = find_faults(path), hit.relative_to(path).as_posix()
    assert any(fault.file == name and fault.reason for fault in found)
    named = {fault.record for fault in found if fault.file == name}
    assert fault_factory.harmed_records(path, whole, hit) <= named
    for now, then in zip(fault_factory.read_everything(path) or (), content):
      assert now in (None, then)


def test_records_out_of_order_are_found_without_an_index(targets, tmp_path):
  path = shutil.copytree(targets['zstd'][0], tmp_path / 'store')
  (path / 'index/episodes.parquet').write_bytes(b'gone')
  shard = fault_factory.shards_of(path)[1]
  raw = fault_factory.records_of(shard)
  fault_factory._write(shard, [*raw[:2], raw[3], raw[2], *raw[4:]])
  found = {(fault.file, fault.record) for fault in find_faults(path)}
  name = f'shards/{shard.name}'
  assert {('index/episodes.parquet', None), (name, None), (name, 2), (name, 3)} <= found


def test_every_fault_is_listed(pristine, targets, tmp_path, capsys):
  from wallwm_jax.cli import main

  path = shutil.copytree(targets['zstd'][0], tmp_path / 'store')
  first, second, *_ = fault_factory.shards_of(path)
  raw = fault_factory.records_of(first)
  fault_factory._write(first, [raw[1], raw[0], *raw[2:]])
  second.unlink()
  (path / 'rejected.jsonl').write_text('')
  assert main(['data', 'verify', str(path)]) == 1
  said = capsys.readouterr().err
  for part in (
    r'5 faults', r'rejected.jsonl: .*expected \d+ bytes, got 0',
    r'episodes-00000.array_record: .*sha256', r'episodes-00000.array_record, record 0: ',
    r'episodes-00000.array_record, record 1: ', r'episodes-00001.array_record: .*missing',
  ):  # fmt: skip
    assert re.search(part, said), (part, said)
  assert main(['data', 'verify', str(pristine)]) == 0
  assert 'complete and unchanged' in capsys.readouterr().out
