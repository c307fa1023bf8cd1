"""Numbered ArrayRecord files of one store: written one after the other, read at random."""

from __future__ import annotations

import pathlib
import threading

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from wallwm_jax.data import manifest
from wallwm_jax.types import CorruptStoreError

_WRITER_OPTIONS = 'group_size:1,uncompressed'


class ShardWriter:
  """Appends records to shards/<name>-00000.array_record and on.

  Args:
    root: folder of the store, with a folder `shards`; done: entries of shards that are already
      there (a resumed write).
    shard_bytes: `roll` closes a shard that is at least this large.
  """

  def __init__(
    self, root: pathlib.Path, name: str, shard_bytes: int, done: list[dict] | None = None
  ):
    self.entries = list(done or [])
    self._root, self._name, self._limit = root, name, shard_bytes
    self._writer: ArrayRecordWriter | None = None
    self._bytes = self._records = 0

  def append(self, raw: bytes) -> tuple[int, int]:
    """(shard, record number) where `raw` went."""
    if self._writer is None:
      self._writer = ArrayRecordWriter(str(self._root / self._path()), _WRITER_OPTIONS)
      self._bytes = self._records = 0
    self._writer.write(raw)
    self._bytes += len(raw)
    self._records += 1
    return len(self.entries), self._records - 1

  def roll(self) -> dict | None:
    """Closes the shard if it is full; the manifest entry of what was closed."""
    return self.close() if self._bytes >= self._limit else None

  def close(self) -> dict | None:
    """Closes the shard, if one is open, and checks that it can be read back.

    Raises:
      OSError: it cannot (a full disk does not always raise on writing).
    """
    if self._writer is None:
      return None
    self._writer.close()
    path, self._writer, self._bytes = self._path(), None, 0
    found = open_shard(self._root / path).num_records()
    if found != self._records:
      raise OSError(
        f'shard {path}: wrote {self._records} records, {found} can be read back. Disk full?'
      )
    self.entries.append(manifest.describe(self._root, path, found))
    return self.entries[-1]

  def _path(self) -> str:
    return f'shards/{self._name}-{len(self.entries):05d}.array_record'


class ShardReader:
  """Records of the shards that a manifest lists; thread-safe.

  Raises:
    CorruptStoreError: a shard cannot be opened or has another number of records than promised.
  """

  def __init__(self, root: pathlib.Path, entries: list[dict]):
    self._root, self._entries = root, entries
    self._lock = threading.Lock()
    self._readers: dict[int, ArrayRecordReader] = {}
    for shard in range(len(entries)):
      self._reader(shard)

  def path(self, shard: int) -> pathlib.Path:
    return self._root / self._entries[shard]['path']

  def read(self, shard: int, numbers: list[int]) -> list[bytes]:
    """The records with these numbers; raises CorruptStoreError."""
    reader = self._reader(shard)
    try:
      # One by one: reading several at once goes through a thread pool, twice the cost for records
      # of this size.
      return [reader.read([number])[0] for number in numbers]
    except (RuntimeError, ValueError, IndexError) as error:
      with self._lock:
        self._readers.pop(shard, None)  # a reader that failed once fails for good records too
      raise CorruptStoreError(str(error)) from None

  def _reader(self, shard: int) -> ArrayRecordReader:
    with self._lock:
      if shard not in self._readers:
        promised = self._entries[shard]['records']
        try:
          reader = open_shard(self.path(shard))
          found = reader.num_records()
        except (RuntimeError, ValueError, OSError) as error:
          raise CorruptStoreError(f'shard {self.path(shard)}: cannot be opened: {error}') from None
        if found != promised:
          raise CorruptStoreError(
            f'shard {self.path(shard)}: expected {promised} records, '
            f'found {found}. Copy the shard again or rebuild the store.'
          )
        self._readers[shard] = reader
      return self._readers[shard]


def open_shard(path: pathlib.Path) -> ArrayRecordReader:
  # No read-ahead: access is random (the default costs 4-5x on warm records of this size).
  return ArrayRecordReader(
    str(path), options='readahead_buffer_size:0', file_reader_buffer_size=32768
  )
