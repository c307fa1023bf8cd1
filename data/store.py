"""The event store: ArrayRecord shards of episodes, an index of their events, and a manifest that
vouches for both.

  manifest.json            format, version, settings, counts; size and sha256 of every other file
  shards/episodes-*        header and 16-frame block records (records.py), group_size:1
  index/episodes.parquet   one row per episode
  index/events.parquet     one row per event
  quarantine.jsonl         what was read but may not be stored, and why
  rejected.jsonl           what was read and sound but not wanted (duplicates), and why

`store_writer` writes it, `faults` checks every byte of it.
"""

from __future__ import annotations

import collections
import os
import pathlib
import threading

import numpy as np

from wallwm_jax.data import faults, index, ledger, manifest, records
from wallwm_jax.data.clips import make_codec
from wallwm_jax.data.ledger import Rejected
from wallwm_jax.data.records import BLOCK_FRAMES, EpisodeInfo
from wallwm_jax.data.schema import EpisodeRecord, Quarantined
from wallwm_jax.data.shards import ShardReader
from wallwm_jax.data.store_writer import EpisodeStoreWriter
from wallwm_jax.types import CorruptStoreError

__all__ = ['EpisodeStoreWriter', 'EventStore']


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
    self._write = self.manifest.get('write', 0)
    self.episodes, self.events = index.read(self.path, self._write)
    self._records = self.column('record', 'episodes')
    self._shard_of = self.column('shard', 'episodes')
    self._checksums = index.Checksums(self.episodes)
    codec = self.manifest.get('settings', {}).get('codec', {'name': 'zstd'})
    self._codec = make_codec(codec['name'], codec.get('crf'))
    self._lock = threading.Lock()
    self._shards = ShardReader(self.path, self.manifest['shards'])
    self._infos: collections.OrderedDict[int, EpisodeInfo] = collections.OrderedDict()
    self._check_counts()

  def __getstate__(self):
    return {'path': self.path, 'digest': self.digest}

  def __setstate__(self, state):
    self.__init__(state['path'])
    if self.digest != state['digest']:
      raise CorruptStoreError(
        f'store {self.path}: it was written to since this process opened it (digest '
        f'{state["digest"][:16]} then, {self.digest[:16]} now). Start again.'
      )

  def __repr__(self) -> str:
    return f'EventStore({str(self.path)!r}, {self.manifest["counts"]})'

  @property
  def digest(self) -> str:
    """Hex digest of the whole store's content."""
    return self.manifest['digest']

  def column(self, name: str, table: str = 'events') -> np.ndarray:
    """One index column as NumPy, table 'events' or 'episodes'."""
    return getattr(self, table).column(name).to_numpy()

  def codes(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(distinct texts of an event column, sorted; int [events], which one each event has)."""
    return index.text_codes(self.events[name])

  @property
  def codec(self) -> dict:
    """'name' of the codec of the pixels, and its settings."""
    return self._codec.settings()

  def quarantine(self) -> list[Quarantined]:
    return self._lost('quarantined')

  def rejected(self) -> list[Rejected]:
    return self._lost('rejected')

  def _lost(self, kind: str) -> list:
    return [ledger.entry(kind, x) for x in ledger.load(self.path, self._write)[kind]]

  def info(self, episode: int) -> EpisodeInfo:
    """Everything but the pixels of one episode (the last 1024 asked for are kept in memory)."""
    with self._lock:
      if episode in self._infos:
        self._infos.move_to_end(episode)
        return self._infos[episode]
    (raw,) = self._read(episode, [records.HEADER])
    promised = self._checksums(episode, records.HEADER)
    try:
      info = records.decode_header(raw, episode, promised)
    except CorruptStoreError as error:
      raise self._corrupt(episode, [records.HEADER], str(error)) from None
    with self._lock:
      self._infos[episode] = info
      while len(self._infos) > 1024:
        self._infos.popitem(last=False)
    return info

  def frames(
    self, episode: int, indices: np.ndarray, views, planes: bool = False
  ) -> dict[str, np.ndarray]:
    """{view: uint8 [len(indices), H, W, 3]}; decodes only the blocks that hold the asked frames.

    Args:
      planes: I420 [len(indices), H * 3/2, W] as decoded instead, of a store of codec h264
        (`geometry.yuv` converts them).
    """
    sizes = self.info(episode).sizes
    shapes = {v: (sizes[v][0] * 3 // 2, sizes[v][1]) if planes else (*sizes[v], 3) for v in views}
    result = {v: np.empty((len(indices), *shape), np.uint8) for v, shape in shapes.items()}
    self.read_frames(episode, indices, result)
    return result

  def read_frames(self, episode: int, indices: np.ndarray, out: dict[str, np.ndarray]) -> None:
    """`frames` into given arrays: out[view] is uint8 [len(indices), H, W, 3] or I420 planes."""
    info, indices = self.info(episode), np.asarray(indices)
    order = np.argsort(indices, kind='stable')
    ascending = indices[order]
    blocks, starts = np.unique(ascending // BLOCK_FRAMES, return_index=True)
    blocks, ends = blocks.tolist(), np.append(starts[1:], len(order))
    for block, raw, start, end in zip(blocks, self._read(episode, blocks), starts, ends):
      promised = self._checksums(episode, block)
      try:
        self._codec.decode(
          records.unseal(raw, episode, block, promised),
          records.block_length(info, block),
          info.sizes,
          order[start:end],
          ascending[start:end] - block * BLOCK_FRAMES,
          out,
        )
      except CorruptStoreError as error:
        raise self._corrupt(episode, [block], str(error)) from None

  def episode(self, episode: int) -> EpisodeRecord:
    """One whole episode as it was stored."""
    info = self.info(episode)
    fields = {k: v for k, v in vars(info).items() if k not in ('num_frames', 'sizes')}
    return EpisodeRecord(
      frames=self.frames(episode, np.arange(info.num_frames), info.views), **fields
    )

  def verify(self) -> None:
    """Checks the sha256 of every file and decodes every record.

    Raises:
      CorruptStoreError: naming every fault (`faults.find_faults` gives them one by one).
    """
    faults.refuse(self.path, faults.find_faults(self.path))

  def _check_counts(self) -> None:
    counts = self.manifest['counts']
    lost = ledger.load(self.path, self._write)
    found = {
      'events': len(self.events),
      'episodes': len(self.episodes),
      **{kind: len(lines) for kind, lines in lost.items()},
    }
    for name, count in found.items():
      if counts.get(name, 0) != count:
        raise CorruptStoreError(
          f'store {self.path}: manifest promises {counts.get(name, 0)} {name}, found {count}.'
        )
    ledger.check(counts, self.path)
    index.check_events(self.episodes, self.events, self.path)

  def _read(self, episode: int, blocks: list[int]) -> list[bytes]:
    shard = int(self._shard_of[episode])
    first = int(self._records[episode]) + 1  # block -1, the header, sits at `record`
    try:
      return self._shards.read(shard, [first + block for block in blocks])
    except CorruptStoreError as error:
      raise self._corrupt(episode, blocks, str(error)) from None

  def _corrupt(self, episode: int, blocks: list[int], reason: str) -> CorruptStoreError:
    shard = self._shards.path(int(self._shard_of[episode]))
    numbers = [int(self._records[episode]) + 1 + block for block in blocks]
    return CorruptStoreError(
      f'shard {shard}, record {numbers} (episode {episode}): {reason}. '
      'Copy the shard again or rebuild the store.'
    )
