"""Every fault of a store: its files against the manifest, its records against the index and their
own checksums, its pixels by decoding them."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import pyarrow as pa

from wallwm_jax.data import clips, index, ledger, manifest, records
from wallwm_jax.data.records import EpisodeInfo
from wallwm_jax.data.shards import open_shard
from wallwm_jax.types import CorruptStoreError, DataError

_UNREADABLE = (RuntimeError, ValueError, IndexError, OSError)  # what ArrayRecord raises
Check = Callable[[int, bytes], None]  # (record number, its bytes); raises CorruptStoreError


@dataclasses.dataclass(frozen=True)
class Fault:
  """file: path in the store; record: its number in that shard; None = the file as a whole."""

  file: str
  record: int | None
  reason: str

  def __str__(self) -> str:
    return f'{self.file}{"" if self.record is None else f", record {self.record}"}: {self.reason}'


def find_faults(path: str | os.PathLike) -> list[Fault]:
  """All faults of the event store at `path`, file by file; reads every byte.

  With a damaged manifest that is the only one: nothing else can be held against it.
  """
  return inspect(pathlib.Path(path).absolute(), manifest.EVENT_STORE, _Events)


def refuse(path: pathlib.Path, found: list[Fault]) -> None:
  """Raises CorruptStoreError naming all faults of the store at `path`, if there are any."""
  if found:
    lines = '\n'.join(map(str, found))
    raise CorruptStoreError(
      f'{path}: {len(found)} {"fault" if len(found) == 1 else "faults"}:\n{lines}'
    )


class Checks(Protocol):
  """How the records of one kind of store are checked; made of (folder, manifest, files that are
  damaged).

  faults: of the index itself.
  """

  faults: list[Fault]

  def of_shard(self, shard: int) -> Check:
    """The check of a shard's records, which are given to it in their order."""


def inspect(
  root: pathlib.Path, kind: str, make_checks: Callable[[pathlib.Path, dict, set[str]], Checks]
) -> list[Fault]:
  """All faults of a store of one kind; see `find_faults`."""
  try:
    promised = manifest.read_manifest(root, kind)
    if (root / 'manifest.json').read_text() != json.dumps(promised, indent=1):
      raise CorruptStoreError('its bytes are not those that were written.')
  except (DataError, CorruptStoreError) as error:
    return [Fault('manifest.json', None, f'{error} Nothing else was checked.')]
  found = [fault for entry in promised['files'] for fault in _file_faults(root, entry)]
  checks = make_checks(root, promised, {fault.file for fault in found})
  found += checks.faults
  for shard, entry in enumerate(promised['shards']):
    found += _file_faults(root, entry)
    found += _record_faults(root, entry, checks.of_shard(shard))
  return found


def _file_faults(root: pathlib.Path, entry: dict) -> Iterator[Fault]:
  try:
    manifest.check_size(root, entry)
    manifest.check_digest(root, entry)
  except CorruptStoreError as error:
    yield Fault(entry['path'], None, str(error))


def _record_faults(root: pathlib.Path, entry: dict, check: Check) -> Iterator[Fault]:
  path, promised = entry['path'], entry['records']
  if not (root / path).is_file():
    return  # reported as a file
  try:
    reader = open_shard(root / path)
    found = reader.num_records()
  except _UNREADABLE as error:
    yield Fault(path, None, f'records 0..{promised - 1} are lost: cannot be opened: {error}')
    return
  if found != promised:
    yield Fault(path, None, f'expected {promised} records, found {found}')
  for number in range(min(found, promised)):
    try:
      check(number, reader.read([number])[0])
    except CorruptStoreError as error:
      yield Fault(path, number, str(error))
    except _UNREADABLE as error:
      reader = open_shard(root / path)  # one that failed once fails for good records too
      yield Fault(path, number, f'cannot be read: {error}')


class _Events:
  """Checks of the records of an event store; without a sound index, that they follow each other."""

  def __init__(self, root: pathlib.Path, promised: dict, damaged: set[str]):
    self.faults: list[Fault] = []
    self._owners: dict[int, dict[int, tuple[int, int]]] = {}  # shard: {record: (episode, block)}
    names = {index.numbered(x, promised.get('write', 0)) for x in (index.EPISODES, index.EVENTS)}
    self._sound, self._checksums = not names & damaged, None
    codec = promised.get('settings', {}).get('codec', {'name': 'zstd'})
    self._codec = clips.make_codec(codec['name'], codec.get('crf'))
    if self._sound:
      self._read_index(root, promised, damaged)

  def _read_index(self, root: pathlib.Path, promised: dict, damaged: set[str]) -> None:
    write, counts = promised.get('write', 0), promised['counts']
    try:
      episodes, events = index.read(root, write)
      found = {'episodes': len(episodes), 'events': len(events)}
      if not damaged:
        found |= {kind: len(lines) for kind, lines in ledger.load(root, write).items()}
      wrong = {k: (counts.get(k, 0), n) for k, n in found.items() if counts.get(k, 0) != n}
      if wrong:
        raise CorruptStoreError(f'(promised, found) differ: {wrong}')
      ledger.check(counts, root)
      index.check_events(episodes, events, root)
    except (CorruptStoreError, pa.ArrowException, KeyError, ValueError) as error:
      self.faults.append(Fault('index', None, str(error)))
      self._sound = False
      return
    self._checksums = index.Checksums(episodes)
    columns = (episodes[name].to_pylist() for name in ('shard', 'record', 'frames'))
    for episode, (shard, first, frames) in enumerate(zip(*columns, strict=True)):
      blocks = range(records.HEADER, records.num_blocks(frames))
      places = {first + 1 + block: (episode, block) for block in blocks}
      self._owners.setdefault(shard, {}).update(places)

  def of_shard(self, shard: int) -> Check:
    owners = self._owners.get(shard, {})
    header: dict[int, EpisodeInfo] = {}  # of the episode that is being read
    last: list[tuple[int, int]] = []

    def place(number: int, raw: bytes) -> tuple[int, int]:
      if self._sound:
        if number not in owners:
          raise CorruptStoreError('no episode of the index has this record')
        return owners[number]
      episode, block = records.address(raw)
      expected = [(last[-1][0], last[-1][1] + 1), (last[-1][0] + 1, records.HEADER)] if last else []
      last.append((episode, block))
      if expected and last[-1] not in expected:
        raise CorruptStoreError(f'expected one of episode, block {expected}, got {last[-1]}')
      return episode, block

    def check(number: int, raw: bytes) -> None:
      episode, block = place(number, raw)
      promised = self._checksums and self._checksums(episode, block)
      try:
        if block == records.HEADER:
          header.clear()
          header[episode] = records.decode_header(raw, episode, promised)
        else:
          payload = records.unseal(raw, episode, block, promised)
          if episode in header:
            self._decode(payload, header[episode], block)
      except CorruptStoreError as error:
        raise CorruptStoreError(f'(episode {episode}, block {block}) {error}') from None

    return check

  def _decode(self, payload: dict, info: EpisodeInfo, block: int) -> None:
    count = records.block_length(info, block)
    out = {view: np.empty((count, *info.sizes[view], 3), np.uint8) for view in info.views}
    self._codec.decode(payload, count, info.sizes, np.arange(count), np.arange(count), out)
