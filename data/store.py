"""The event store: ArrayRecord shards of episodes, an index of their events, and a manifest that
vouches for both.

  manifest.json            format, version, counts, and size and sha256 of every other file
  shards/episodes-*        header and 16-frame block records (records.py), group_size:1
  index/episodes.parquet   one row per episode
  index/events.parquet     one row per event
  quarantine.jsonl         what was read but not stored, and why

Writing happens in a hidden directory that is renamed into place at the end, manifest last: an
interrupted build leaves nothing that opens.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pathlib
import shutil
import threading
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wallwm_jax.data import manifest, records
from wallwm_jax.data.records import BLOCK_FRAMES, EpisodeInfo
from wallwm_jax.data.schema import LEVELS, EpisodeRecord, Quarantined, validate
from wallwm_jax.data.shards import ShardReader, ShardWriter
from wallwm_jax.types import CorruptStoreError, DataError

EPISODES, EVENTS, QUARANTINE = 'index/episodes.parquet', 'index/events.parquet', 'quarantine.jsonl'
SPLITS = ('train', 'heldout')

_EPISODE_SCHEMA = pa.schema(
  [
    ('episode_id', pa.string()),
    ('source', pa.string()),
    ('fps', pa.float64()),
    ('frames', pa.int32()),
    ('views', pa.list_(pa.string())),
    ('heights', pa.list_(pa.int32())),
    ('widths', pa.list_(pa.int32())),
    ('calibrated', pa.list_(pa.string())),
    ('state_width', pa.int32()),
    ('has_actions', pa.bool_()),
    ('shard', pa.int32()),
    ('record', pa.int64()),
    ('split', pa.string()),
  ]
)
_EVENT_SCHEMA = pa.schema(
  [
    ('uid', pa.uint64()),
    ('episode', pa.int32()),
    ('start', pa.int32()),
    ('end', pa.int32()),
    ('length', pa.int32()),
    ('label', pa.string()),
    *((level, pa.string()) for level in LEVELS),
    ('flags', pa.list_(pa.string())),
    ('split', pa.string()),
  ]
)


class EpisodeStoreWriter:
  """Writes one store; use as a context manager, the store appears at `out` when the block ends
  without an error.

  Args:
    out: directory to create; must not exist (or be empty).
    heldout: fraction of episodes of the 'heldout' split, chosen by a hash of their id (at least
      one if > 0).
    shard_bytes: a shard is closed when it is larger than this.

  Raises:
    DataError: `out` is taken, or (from `add`) an episode breaks the schema or repeats an id.
    OSError: the shards cannot be written.
  """

  def __init__(self, out: str | os.PathLike, heldout: float = 0.1, shard_bytes: int = 2**28):
    self._out = pathlib.Path(out).absolute()
    if self._out.exists() and (not self._out.is_dir() or any(self._out.iterdir())):
      raise DataError(
        f'store {self._out}: expected a new directory, but it exists. Remove it or choose another.'
      )
    if not 0 <= heldout < 1:
      raise DataError(f'heldout: expected a fraction 0 <= x < 1, got {heldout}.')
    self._out.parent.mkdir(parents=True, exist_ok=True)
    self._dir = self._out.parent / f'.{self._out.name}.building-{uuid.uuid4().hex}'
    (self._dir / 'shards').mkdir(parents=True)
    (self._dir / 'index').mkdir()
    self._heldout = heldout
    self._shards = ShardWriter(self._dir, 'episodes', shard_bytes)
    self._episodes: list[dict] = []
    self._events: list[dict] = []
    self._quarantined: list[Quarantined] = []
    self._ids: set[str] = set()

  def __enter__(self) -> EpisodeStoreWriter:
    return self

  def __exit__(self, kind, value, traceback) -> None:
    try:
      if kind is None:
        self._finish()
    finally:
      if self._dir.exists():
        shutil.rmtree(self._dir)

  def add(self, record: EpisodeRecord) -> None:
    """Validates and stores one episode."""
    validate(record)
    if record.episode_id in self._ids:
      raise DataError(f'episode {record.episode_id!r}: duplicate id.')
    row = len(self._episodes)
    shard, first = self._shards.append(records.encode_header(record, row))
    for block in range(records.num_blocks(record.num_frames)):
      self._shards.append(records.encode_block(record, row, block))
    self._ids.add(record.episode_id)
    self._episodes.append(_episode_row(record) | {'shard': shard, 'record': first})
    self._events.extend(_event_row(record, event) | {'episode': row} for event in record.events)
    self._shards.roll()

  def quarantine(self, entry: Quarantined) -> None:
    """Notes an episode that was read but may not be stored."""
    self._quarantined.append(entry)

  def counts(self) -> dict[str, int]:
    stored, quarantined = len(self._episodes), len(self._quarantined)
    return {
      'read': stored + quarantined,
      'episodes': stored,
      'quarantined': quarantined,
      'events': len(self._events),
      'frames': sum(e['frames'] for e in self._episodes),
    }

  def _finish(self) -> None:
    self._shards.close()
    splits = _split([e['episode_id'] for e in self._episodes], self._heldout)
    for episode, split in zip(self._episodes, splits, strict=True):
      episode['split'] = split
    for event in self._events:
      event['split'] = splits[event['episode']]
    pq.write_table(pa.Table.from_pylist(self._episodes, _EPISODE_SCHEMA), self._dir / EPISODES)
    pq.write_table(pa.Table.from_pylist(self._events, _EVENT_SCHEMA), self._dir / EVENTS)
    lines = [json.dumps(vars(entry)) + '\n' for entry in self._quarantined]
    (self._dir / QUARANTINE).write_text(''.join(lines))
    rows = {EPISODES: len(self._episodes), EVENTS: len(self._events), QUARANTINE: len(lines)}
    files = [manifest.describe(self._dir, name, count) for name, count in rows.items()]
    manifest.write_manifest(
      self._dir,
      {
        'block_frames': BLOCK_FRAMES,
        'counts': self.counts(),
        'shards': self._shards.entries,
        'files': files,
      },
    )
    os.rename(self._dir, self._out)


class EventStore:
  """Read access to a store; picklable, safe to read from several threads.

  events, episodes: the index tables (pyarrow); `column` gives one column as NumPy.

  Raises:
    DataError: no store at `path`, or one of a newer format version.
    CorruptStoreError: a file is missing, of the wrong size or of the wrong record count, naming it.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path).absolute()
    self.manifest = manifest.read_manifest(self.path)
    for entry in self.manifest['shards'] + self.manifest['files']:
      manifest.check_size(self.path, entry)
    for entry in self.manifest['files']:
      manifest.check_digest(self.path, entry)
    self.events = pq.read_table(self.path / EVENTS)
    self.episodes = pq.read_table(self.path / EPISODES)
    self._records = self.column('record', 'episodes')
    self._shard_of = self.column('shard', 'episodes')
    self._lock = threading.Lock()
    self._shards = ShardReader(self.path, self.manifest['shards'])
    self._infos: collections.OrderedDict[int, EpisodeInfo] = collections.OrderedDict()
    self._check_counts()

  def __getstate__(self):
    return {'path': self.path}

  def __setstate__(self, state):
    self.__init__(state['path'])

  def __repr__(self) -> str:
    return f'EventStore({str(self.path)!r}, {self.manifest["counts"]})'

  @property
  def digest(self) -> str:
    """Hex digest of the whole store's content."""
    return self.manifest['digest']

  def column(self, name: str, table: str = 'events') -> np.ndarray:
    """One index column as NumPy, table 'events' or 'episodes'."""
    return getattr(self, table).column(name).to_numpy()

  def quarantine(self) -> list[Quarantined]:
    lines = (self.path / QUARANTINE).read_text().splitlines()
    return [Quarantined(**json.loads(line)) for line in lines]

  def info(self, episode: int) -> EpisodeInfo:
    """Everything but the pixels of one episode (the last 1024 asked for are kept in memory)."""
    with self._lock:
      if episode in self._infos:
        self._infos.move_to_end(episode)
        return self._infos[episode]
    (raw,) = self._read(episode, [records.HEADER])
    info = self._decode(episode, records.HEADER, records.decode_header, raw, episode)
    with self._lock:
      self._infos[episode] = info
      while len(self._infos) > 1024:
        self._infos.popitem(last=False)
    return info

  def frames(self, episode: int, indices: np.ndarray, views) -> dict[str, np.ndarray]:
    """{view: uint8 [len(indices), H, W, 3]}; decodes only the blocks that hold the asked frames."""
    info = self.info(episode)
    indices = np.asarray(indices)
    owner = indices // BLOCK_FRAMES
    blocks = np.unique(owner).tolist()
    result = {view: np.empty((len(indices), *info.sizes[view], 3), np.uint8) for view in views}
    for block, raw in zip(blocks, self._read(episode, blocks), strict=True):
      pixels = self._decode(episode, block, records.decode_block, raw, episode, block, info, views)
      here = np.flatnonzero(owner == block)
      for view in views:
        result[view][here] = pixels[view][indices[here] - block * BLOCK_FRAMES]
    return result

  def episode(self, episode: int) -> EpisodeRecord:
    """One whole episode as it was stored."""
    info = self.info(episode)
    fields = {k: v for k, v in vars(info).items() if k not in ('num_frames', 'sizes')}
    return EpisodeRecord(
      frames=self.frames(episode, np.arange(info.num_frames), info.views), **fields
    )

  def verify(self) -> None:
    """Checks the sha256 of every file and decodes every record; raises CorruptStoreError."""
    for entry in self.manifest['shards'] + self.manifest['files']:
      manifest.check_size(self.path, entry)
      manifest.check_digest(self.path, entry)
    for episode in range(len(self.episodes)):
      self.episode(episode)

  def _check_counts(self) -> None:
    counts = self.manifest['counts']
    found = {
      'events': len(self.events),
      'episodes': len(self.episodes),
      'quarantined': len(self.quarantine()),
    }
    for name, count in found.items():
      if counts[name] != count:
        raise CorruptStoreError(
          f'store {self.path}: manifest promises {counts[name]} {name}, found {count}.'
        )
    if counts['read'] != counts['episodes'] + counts['quarantined']:
      raise CorruptStoreError(f'store {self.path}: read != episodes + quarantined in {counts}.')

  def _read(self, episode: int, blocks: list[int]) -> list[bytes]:
    shard = int(self._shard_of[episode])
    first = int(self._records[episode]) + 1  # block -1, the header, sits at `record`
    try:
      return self._shards.read(shard, [first + block for block in blocks])
    except CorruptStoreError as error:
      raise self._corrupt(episode, blocks, str(error)) from None

  def _decode(self, episode: int, block: int, decode, *args):
    try:
      return decode(*args)
    except CorruptStoreError as error:
      raise self._corrupt(episode, [block], str(error)) from None

  def _corrupt(self, episode: int, blocks: list[int], reason: str) -> CorruptStoreError:
    shard = self._shards.path(int(self._shard_of[episode]))
    numbers = [int(self._records[episode]) + 1 + block for block in blocks]
    return CorruptStoreError(
      f'shard {shard}, record {numbers} (episode {episode}): {reason}. '
      'Copy the shard again or rebuild the store.'
    )


def _episode_row(record: EpisodeRecord) -> dict:
  sizes = [record.frames[view].shape[1:3] for view in record.views]
  return {
    'episode_id': record.episode_id,
    'source': record.source,
    'fps': float(record.fps),
    'frames': record.num_frames,
    'views': list(record.views),
    'heights': [h for h, _ in sizes],
    'widths': [w for _, w in sizes],
    'calibrated': [v for v, c in record.calibration.items() if c is not None],
    'state_width': 0 if record.state is None else record.state.shape[1],
    'has_actions': record.actions is not None,
  }


def _event_row(record: EpisodeRecord, event) -> dict:
  captions = record.event_captions(event)
  return {
    'uid': record.event_uid(event),
    'start': event.start,
    'end': event.end,
    'length': event.end - event.start,
    'label': event.label,
    'flags': list(event.flags),
  } | {level: captions.get(level, '') for level in LEVELS}


def _split(ids: list[str], heldout: float) -> list[str]:
  """Held out: the round(heldout * n) episodes with the smallest hash of their id."""
  count = max(round(heldout * len(ids)), 1) if heldout > 0 and len(ids) > 1 else 0
  ranked = sorted(
    range(len(ids)), key=lambda i: hashlib.blake2b(ids[i].encode(), digest_size=8).digest()
  )
  held = set(ranked[:count])
  return [SPLITS[i in held] for i in range(len(ids))]
