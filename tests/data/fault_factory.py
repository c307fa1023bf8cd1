"""Damages stores in every way a disk, a copy or a careless tool does."""

import json
import pathlib
import shutil

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from episode_factory import make_episode

from wallwm_jax.data import manifest, records
from wallwm_jax.data.build import build_store
from wallwm_jax.data.store import EventStore
from wallwm_jax.types import CorruptStoreError, DataError


def make_stores(folder, codec, episodes=6):
  """(the store that will be damaged, another one) of several shards."""
  paths = []
  for name, first in (('store', 0), ('other', 100)):
    paths.append(folder / name)
    items = [make_episode(first + i, (9, 17, 14), size=(16, 16)) for i in range(episodes)]
    bad = make_episode(first + episodes)
    bad.actions[0, 0] = float('nan')
    size = 12_000 if codec == 'h264' else 60_000
    options = {'codec': codec, 'crf': 20 if codec == 'h264' else None, 'shard_bytes': size}
    build_store([*items, bad, items[0]], paths[-1], progress=False, **options)
  return paths


def shards_of(path):
  return sorted((path / 'shards').iterdir())


def records_of(shard):
  """The bytes of each record, None where it cannot be read; None if the shard cannot be opened."""
  try:
    count = ArrayRecordReader(str(shard)).num_records()
  except (RuntimeError, ValueError, OSError):
    return None
  found = []
  for number in range(count):
    try:
      found.append(ArrayRecordReader(str(shard)).read([number])[0])
    except (RuntimeError, ValueError, IndexError):
      found.append(None)
  return found


def _write(shard, raw):
  writer = ArrayRecordWriter(str(shard), 'group_size:1,uncompressed')
  for record in raw:
    writer.write(record)
  writer.close()


def _flip(path, rng):
  content = bytearray(path.read_bytes())
  content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
  path.write_bytes(content)


def _vouch(path, rng):
  """Half of the time: the tool that did it also wrote the manifest anew, for what is there now."""
  if rng.integers(2):
    return
  content = json.loads((path / 'manifest.json').read_text())
  entries = [
    manifest.describe(path, entry['path'], entry['records']) for entry in content['shards']
  ]
  for key in ('format', 'version', 'digest'):
    del content[key]
  manifest.write_manifest(path, content | {'shards': entries})


def _pick(items, rng):
  return items[rng.integers(len(items))]


def _files(path):
  return sorted(p for p in path.rglob('*') if p.is_file() and p.stat().st_size)


def flip_in_shard(path, other, rng):
  shard = _pick(shards_of(path), rng)
  _flip(shard, rng)
  return shard


def flip_in_index(path, other, rng):
  file = _pick([p for p in _files(path) if p.suffix in ('.parquet', '.jsonl')], rng)
  _flip(file, rng)
  return file


def flip_in_manifest(path, other, rng):
  _flip(path / 'manifest.json', rng)
  return path / 'manifest.json'


def truncate(path, other, rng):
  file = _pick(_files(path), rng)
  file.write_bytes(file.read_bytes()[: rng.integers(file.stat().st_size)])
  return file


def remove(path, other, rng):
  file = _pick(_files(path), rng)
  file.unlink()
  return file


def change_record_count(path, other, rng):
  shard = _pick(shards_of(path), rng)
  raw = records_of(shard)
  place = int(rng.integers(len(raw)))
  _write(shard, raw[:place] + raw[place + 1 :] if rng.integers(2) else [*raw, raw[place]])
  _vouch(path, rng)
  return shard


def swap_cameras(path, other, rng):
  """Two cameras of a block change places, and the record is sealed again."""
  shard = _pick(shards_of(path), rng)
  raw = records_of(shard)
  blocks = [i for i, x in enumerate(raw) if records.address(x)[1] != records.HEADER]
  place = int(_pick(blocks, rng))
  row, block = records.address(raw[place])
  payload = records.unseal(raw[place], row, block)
  if 'clips' in payload:
    views = payload['clips'][0][0]
    views[0], views[1] = views[1], views[0]
  else:
    first, second = rng.choice(sorted(payload), 2, replace=False)
    payload[first], payload[second] = payload[second], payload[first]
  raw[place] = records.seal(row, block, payload)
  _write(shard, raw)
  _vouch(path, rng)
  return shard


def swap_records(path, other, rng):
  shard = _pick(shards_of(path), rng)
  raw = records_of(shard)
  a, b = rng.choice(len(raw), 2, replace=False)
  raw[a], raw[b] = raw[b], raw[a]
  _write(shard, raw)
  _vouch(path, rng)
  return shard


def foreign_record(path, other, rng):
  """A record of another store, in its place."""
  place = int(rng.integers(len(shards_of(path))))
  shard, theirs = shards_of(path)[place], records_of(shards_of(other)[place])
  raw = records_of(shard)
  number = int(rng.integers(min(len(raw), len(theirs))))
  raw[number] = theirs[number]
  _write(shard, raw)
  _vouch(path, rng)
  return shard


def stale_index(path, other, rng):
  """Index files of another store, with its manifest or without."""
  names = ['episodes.parquet', 'events.parquet'][: rng.integers(1, 3)]
  for name in names:
    shutil.copy(other / 'index' / name, path / 'index' / name)
  if rng.integers(2):
    shutil.copytree(other / 'index', path / 'index', dirs_exist_ok=True)
    for name in ('manifest.json', 'quarantine.jsonl', 'rejected.jsonl'):
      shutil.copy(other / name, path / name)
    return shards_of(path)[0]
  return path / 'index' / names[0]


KINDS = (
  flip_in_shard,
  flip_in_index,
  flip_in_manifest,
  truncate,
  remove,
  change_record_count,
  swap_cameras,
  swap_records,
  foreign_record,
  stale_index,
)


def harmed_records(path, whole, shard):
  """Numbers of the records of a shard that are not what they were."""
  old, new = records_of(whole / shard.relative_to(path)), None
  if shard.is_file() and shard.suffix == '.array_record':
    new = records_of(shard)
  if new is None or old is None:
    return set()
  return {i for i, x in enumerate(old[: len(new)]) if new[i] != x}


def read_everything(path):
  """Content of each episode, None where reading is refused; None if the store does not open."""
  try:
    store = EventStore(path)
  except (CorruptStoreError, DataError):
    return None
  found = []
  for episode in range(len(store.episodes)):
    try:
      found.append(records.content_hash(store.episode(episode)))
    except CorruptStoreError:
      found.append(None)
  return found


def damage(kind, whole, other, folder, rng):
  """Copies `whole` to `folder` and damages it: (path of the copy, the file that was hit)."""
  path = pathlib.Path(shutil.copytree(whole, folder))
  return path, kind(path, other, rng)
