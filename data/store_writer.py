"""Writes event stores: new ones, additions to finished ones, and what a killed write left undone.

The bytes of a store depend on its settings and on what was read, in which order, never on how often
the write was interrupted. Shards that are full are journalled (journal.py); the index and the
ledger follow at the end, the manifest last and in one step, so that there is a whole store or the
one of before.
"""

from __future__ import annotations

import os
import pathlib

import pyarrow as pa

from wallwm_jax.data import index, ledger, manifest, records
from wallwm_jax.data.clips import make_codec
from wallwm_jax.data.journal import Journal
from wallwm_jax.data.ledger import DuplicateError, Ledger, Rejected
from wallwm_jax.data.schema import EpisodeRecord, Quarantined, validate
from wallwm_jax.data.shards import ShardWriter
from wallwm_jax.types import ConfigError, DataError

HELDOUT = 0.1
KNOWN = 'known'  # what became of an episode that an earlier write settled


class EpisodeStoreWriter:
  """Writes one store; use as a context manager, the store (or what is added to it) appears at `out`
  when the block ends without an error.

  Args:
    out: directory to create; must not exist (or be empty), unless `append`.
    heldout: fraction of episodes of the 'heldout' split, chosen by a hash of their id (at least
      one if > 0); default 0.1. Appending never moves an episode from one split to the other.
    shard_bytes: a shard is closed when it is larger than this.
    codec, crf: 'zstd' (exact, the default) or 'h264' of this rate factor (see clips.py).
    append: add to the finished store at `out`, whose heldout and codec are kept. What it has
      already is not read again; a store that gains nothing is not touched.
    resume: go on where a killed write of the same settings stopped, and keep what is finished if
      this one is interrupted too. `settled` says which episodes not to give again.
    reader: name noted for episodes whose provenance does not say what read them.

  Raises:
    ConfigError: settings out of range, or not those of the store that is appended to.
    DataError: `out` is taken or (append) not a store; an interrupted write has other settings.
    CorruptStoreError: the store to append to is damaged.
    OSError: the shards cannot be written.
  """

  def __init__(
    self,
    out: str | os.PathLike,
    heldout: float | None = None,
    shard_bytes: int = 2**28,
    *,
    codec: str | None = None,
    crf: int | None = None,
    append: bool = False,
    resume: bool = False,
    reader: str = '',
  ):
    self._out = pathlib.Path(out).absolute()
    self._base = _Base(self._out) if append else None
    if not append and self._out.exists():
      if not self._out.is_dir() or any(self._out.iterdir()):
        raise DataError(
          f'store {self._out}: expected a new directory, but it exists. Remove it, choose another, '
          'or append to it.'
        )
    self.settings = writer_settings(self._base, heldout, codec, crf)
    self._codec = make_codec(self.settings['codec']['name'], self.settings['codec'].get('crf'))
    self._reader, self._resume = reader, resume
    self._journal = Journal(
      self._out,
      {
        **self.settings,
        'shard_bytes': shard_bytes,
        'reader': reader,
        'version': manifest.VERSIONS[manifest.EVENT_STORE],
        'onto': self._base and self._base.manifest['digest'],
      },
      resume,
      self._out if append else None,
    )
    self._root = self._journal.store
    for folder in ('shards', 'index'):
      (self._root / folder).mkdir(parents=True, exist_ok=True)
    self._restore(shard_bytes)

  def _restore(self, shard_bytes: int) -> None:
    """The state after the store that is appended to, and what the journal has finished."""
    base, done = self._base, self._journal.entries
    shards = (base.manifest['shards'] if base else []) + [entry['shard'] for entry in done]
    keep = {entry['path'] for entry in shards + (base.manifest['files'] if base else [])}
    _remove_unlisted(self._root, keep)
    self._shards = ShardWriter(self._root, 'episodes', shard_bytes, shards)
    self._ledger = Ledger(base and base.manifest['counts'], base and base.entries)
    self._episodes = base.episodes.to_pylist() if base else []
    self._events: list[dict] = []
    self._old = len(self._episodes)
    self.settled: list[str] = []
    for entry in done:
      self.settled += entry['settled']
      self._episodes += entry['episodes']
      self._events += entry['events']
      self._ledger.restore(entry)
    self._contents = {row['episode_id']: row['content'] for row in self._episodes}
    self._pending = self._blank()

  def __enter__(self) -> EpisodeStoreWriter:
    return self

  def __exit__(self, kind, value, traceback) -> None:
    finished = False
    try:
      if kind is None:
        self._finish()
        finished = True
    finally:
      self._journal.close(keep=self._resume and not finished)
      if not finished and not self._resume and self._base:
        listed = self._base.manifest['shards'] + self._base.manifest['files']
        _remove_unlisted(self._root, {entry['path'] for entry in listed})

  def offer(self, item: EpisodeRecord | Quarantined) -> Quarantined | Rejected | str | None:
    """Settles one episode that was read.

    Returns:
      None = stored; Quarantined or Rejected = noted, not stored; KNOWN = an earlier write settled
      it in the same way.
    """
    if isinstance(item, Quarantined):
      return self.quarantine(item)
    try:
      self.add(item)
    except DuplicateError as error:
      return self._reject(item, str(error))
    except DataError as error:
      return self.quarantine(Quarantined(item.episode_id, item.source, str(error)), item)
    return KNOWN if self._is_old(item) else None

  def add(self, record: EpisodeRecord) -> None:
    """Validates and stores one episode (nothing, where an earlier write stored the same).

    Raises:
      DuplicateError: another episode of that id is stored.
      DataError: it breaks the schema, or does not suit the codec.
    """
    validate(record)
    content = records.content_hash(record)
    if record.episode_id in self._contents:
      if self._is_old(record) and self._contents[record.episode_id] == content:
        self._pending['settled'].append(record.episode_id)
        return
      raise DuplicateError(f'episode {record.episode_id!r}: duplicate id.')
    row = len(self._episodes)
    blocks = range(records.num_blocks(record.num_frames))
    raw = [records.encode_header(record, row)]
    raw += [records.encode_block(record, row, block, self._codec) for block in blocks]
    shard, first = [self._shards.append(x) for x in raw][0]
    episode = index.episode_row(record, self._reader) | {
      'shard': shard,
      'record': first,
      'content': content,
      'checksums': [records.checksum(x) for x in raw],
    }
    events = [index.event_row(record, event) | {'episode': row} for event in record.events]
    self._contents[record.episode_id] = content
    self._episodes.append(episode)
    self._events += events
    self._account(record.episode_id, len(events))
    self._pending['episodes'].append(episode)
    self._pending['events'] += events
    if (entry := self._shards.roll()) is not None:
      self._note(entry)

  def quarantine(
    self, entry: Quarantined, record: EpisodeRecord | None = None
  ) -> Quarantined | str:
    """Notes an episode that was read but may not be stored; the record, where there is one.

    Returns:
      The entry, or KNOWN where an earlier write noted the same.
    """
    return self._lose('quarantined', entry, record)

  def _reject(self, record: EpisodeRecord, reason: str) -> Rejected | str:
    return self._lose('rejected', Rejected(record.episode_id, record.source, reason), record)

  def _lose(self, kind: str, entry, record: EpisodeRecord | None):
    if self._base and entry in self._base.lost[kind]:
      self._pending['settled'].append(entry.episode_id)
      return KNOWN
    events = ledger.events_of(record)
    self._pending[kind].append(self._ledger.note(kind, entry, events))
    self._account(entry.episode_id, events)
    return entry

  def counts(self) -> dict[str, int]:
    old = self._base.manifest['counts']['events'] if self._base else 0
    frames = sum(e['frames'] for e in self._episodes)
    return self._ledger.counts(len(self._episodes), old + len(self._events), frames)

  def _is_old(self, record: EpisodeRecord) -> bool:
    return self._base is not None and record.episode_id in self._base.ids

  def _account(self, episode_id: str, events: int) -> None:
    self._ledger.read += 1
    self._ledger.events_read += events
    self._pending['settled'].append(episode_id)

  def _blank(self) -> dict:
    """What the next line of the journal will say."""
    return {'settled': [], 'episodes': [], 'events': [], 'quarantined': [], 'rejected': []}

  def _note(self, shard: dict) -> None:
    self._journal.note({'shard': shard, **self._pending})
    self._pending = self._blank()

  def _finish(self) -> None:
    self._shards.close()
    counts = self.counts()
    if self._base and counts['read'] == self._base.manifest['counts']['read']:
      return  # nothing new: not a byte changes
    ledger.check(counts, self._out)
    write = self._base.manifest.get('write', 0) + 1 if self._base else 0
    rows = index.save(self._root, write, *self._tables()) | self._ledger.save(self._root, write)
    files = [manifest.describe(self._root, name, count) for name, count in rows.items()]
    manifest.write_manifest(
      self._root,
      {
        'block_frames': records.BLOCK_FRAMES,
        'settings': self.settings,
        'write': write,
        'counts': counts,
        'shards': self._shards.entries,
        'files': files,
      },
    )
    if not self._base:
      os.replace(self._root, self._out)
      manifest.sync_folder(self._out.parent)

  def _tables(self) -> tuple[pa.Table, pa.Table]:
    """(episodes, events) of the whole store."""
    given = [row['split'] for row in self._episodes[: self._old]]
    ids = [row['episode_id'] for row in self._episodes]
    splits = index.splits(ids, self.settings['heldout'], given)
    for row, split in zip(self._episodes, splits, strict=True):
      row['split'] = split
    for row in self._events:
      row['split'] = splits[row['episode']]
    episodes = pa.Table.from_pylist(self._episodes, index.EPISODE_SCHEMA)
    events = pa.Table.from_pylist(self._events, index.EVENT_SCHEMA)
    if self._base:
      events = pa.concat_tables([self._base.events.cast(index.EVENT_SCHEMA), events])
    return episodes, events


class _Base:
  """The finished store that is appended to."""

  def __init__(self, path: pathlib.Path):
    self.manifest = manifest.read_manifest(path)
    for entry in self.manifest['shards'] + self.manifest['files']:
      manifest.check_size(path, entry)
    for entry in self.manifest['files']:
      manifest.check_digest(path, entry)
    write = self.manifest.get('write', 0)
    self.episodes, self.events = index.read(path, write)
    self.ids = set(self.episodes['episode_id'].to_pylist())
    self.entries = ledger.load(path, write)
    self.lost = {
      kind: {ledger.entry(kind, line) for line in lines} for kind, lines in self.entries.items()
    }


def writer_settings(base: _Base | None, heldout, codec, crf) -> dict:
  """heldout and codec: as asked for, or those of the store that is appended to."""
  given = base and base.manifest.get('settings')
  if given is None:  # a new store, or one of version 1
    given = {'heldout': HELDOUT, 'codec': {'name': 'zstd'}}
  name = given['codec']['name'] if codec is None else codec
  if crf is None and name == given['codec']['name']:
    crf = given['codec'].get('crf')
  settings = {
    'heldout': given['heldout'] if heldout is None else heldout,
    'codec': make_codec(name, crf).settings(),
  }
  if not 0 <= settings['heldout'] < 1:
    raise ConfigError(f'heldout: expected a fraction 0 <= x < 1, got {heldout}.')
  if base and settings['codec'] != given['codec']:
    raise ConfigError(
      f'codec: the store holds {given["codec"]}, got {settings["codec"]}. A store has one codec: '
      'append without --codec and --crf.'
    )
  return settings


def _remove_unlisted(root: pathlib.Path, keep: set[str]) -> None:
  """Removes what earlier writes left behind in a store: shards and indices no manifest lists."""
  for pattern in ('shards/episodes-*.array_record', 'index/*.parquet', '*.jsonl'):
    for path in root.glob(pattern):
      if path.relative_to(root).as_posix() not in keep:
        path.unlink()
