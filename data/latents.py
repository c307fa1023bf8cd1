"""Precomputed codec latents of the events of a store: one record per event.

  manifest.json          what was encoded (source store, codec, window geometry) and the shards
  shards/latents-*       records of latents [V, F, h, w, C], float16 or float32
  index.parquet          event row -> shard, record, latent frames F, length bucket

The codec is causal, so the latents of a shorter window of an event are the first ones of a longer
one: what was encoded for the longest length bucket serves all of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import numpy as np
import pyarrow.parquet as pq

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.data import manifest, records
from wallwm_jax.data.faults import Check, Fault, inspect, refuse
from wallwm_jax.data.shards import ShardReader
from wallwm_jax.data.store import EventStore
from wallwm_jax.types import ConfigError, CorruptStoreError

INDEX = 'index.parquet'
BLOCK = 0  # of the record address: latents of an event are one record


def describe(config: ExperimentConfig, store: EventStore, codec_digest: str = '') -> dict:
  """What latents depend on, as JSON.

  Args:
    codec_digest: identity of the codec's weights; '' = none, or not at hand.
  """
  model = config.model
  codec = dataclasses.asdict(model.codec)
  del codec['weights'], codec['vae']['chunk']  # where they lie and how they are read
  return json.loads(json.dumps({
    'store': store.digest,
    'codec': codec,
    'codec_digest': codec_digest,
    'views': model.views,
    'image_size': model.image_size,
    'stride': config.data.stride,
  }))


def holds_latents(path: str | os.PathLike) -> bool:
  """Whether `path` is a folder of latents (and not, say, an event store)."""
  file = pathlib.Path(path) / 'manifest.json'
  return file.is_file() and manifest.LATENT_STORE in file.read_text()


def read_index(root: pathlib.Path) -> dict[int, list[int]]:
  """Event row -> [shard, record, latent frames, length bucket]."""
  table = pq.read_table(root / INDEX).to_pydict()
  columns = (table[name] for name in ('event', 'shard', 'record', 'frames', 'bucket'))
  return {event: place for event, *place in zip(*columns, strict=True)}


class LatentStore:
  """Reads what `encode_store` wrote; thread-safe, picklable.

  Raises:
    DataError: no latents at `path`, or of a newer version.
    CorruptStoreError: a file is missing or is not the one that was written.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path).absolute()
    self.manifest = manifest.read_manifest(self.path, manifest.LATENT_STORE)
    (index,) = self.manifest['files']
    for entry in [*self.manifest['shards'], index]:
      manifest.check_size(self.path, entry)
    manifest.check_digest(self.path, index)
    self._rows = read_index(self.path)
    self._shards = ShardReader(self.path, self.manifest['shards'])

  @property
  def digest(self) -> str:
    """Hex digest of the whole content."""
    return self.manifest['digest']

  def __getstate__(self):
    return {'path': self.path}

  def __setstate__(self, state):
    self.__init__(state['path'])

  def check(self, description: dict, events: np.ndarray, bucket: int) -> None:
    """Raises ConfigError unless these latents serve windows of `bucket` future latents of `events`
    under `description` (see `describe`), naming every difference."""
    theirs = self.manifest['description']
    differ = [
      f'{key}: expected {description[key]}, encoded {theirs.get(key)}'
      for key in description
      if description[key] != theirs.get(key)
      and (key != 'codec_digest' or description[key])  # training does not need the codec
    ]
    missing = [int(e) for e in events if int(e) not in self._rows]
    if missing:
      differ.append(f'{len(missing)} events are missing, first {missing[:5]}')
    longest = self.manifest['longest_bucket']
    if bucket > longest:
      differ.append(f'longest bucket: expected {bucket}, encoded {longest}')
    if differ:
      raise ConfigError(
        f'config.data.latents={str(self.path)!r} are not those of this run: {"; ".join(differ)}. '
        'Encode again with `wallwm data encode`.'
      )

  def latents(self, event: int) -> np.ndarray:
    """float32 [V, F, h, w, C] of one event, F = 1 + its future latents."""
    return self.stored(event).astype(np.float32)

  def stored(self, event: int) -> np.ndarray:
    """`latents` in the type that they are stored in."""
    shard, record, frames, _ = self._rows[event]
    try:
      (raw,) = self._shards.read(shard, [record])
      x = records.unseal(raw, event, BLOCK)['latents']
    except CorruptStoreError as error:
      raise CorruptStoreError(
        f'shard {self._shards.path(shard)}, record {record} (event {event}): {error}. Copy the '
        'shard again or encode again.'
      ) from None
    if x.shape[1] != frames:
      raise CorruptStoreError(
        f'event {event} of {self.path}: expected {frames} latent frames, got {x.shape[1]}.'
      )
    return x

  def verify(self) -> None:
    """Checks the sha256 of every file and reads every record; raises CorruptStoreError naming
    every fault."""
    refuse(self.path, find_faults(self.path))


def find_faults(path: str | os.PathLike) -> list[Fault]:
  """All faults of the latents at `path`, see `faults.find_faults`."""
  return inspect(pathlib.Path(path).absolute(), manifest.LATENT_STORE, _Checks)


class _Checks:
  """Checks of the records of precomputed latents."""

  def __init__(self, root: pathlib.Path, promised: dict, damaged: set[str]):
    self.faults: list[Fault] = []
    self._owners: dict[int, dict[int, tuple[int, int]]] | None = None
    if not damaged:
      self._owners = {}
      for event, (shard, record, frames, _) in read_index(root).items():
        self._owners.setdefault(shard, {})[record] = event, frames

  def of_shard(self, shard: int) -> Check:
    def check(number: int, raw: bytes) -> None:
      if self._owners is None:
        records.unseal(raw, *records.address(raw))
        return
      if number not in self._owners.get(shard, {}):
        raise CorruptStoreError('no event of the index has this record')
      event, frames = self._owners[shard][number]
      try:
        got = records.unseal(raw, event, BLOCK)['latents'].shape[1]
        if got != frames:
          raise CorruptStoreError(f'expected {frames} latent frames, got {got}')
      except CorruptStoreError as error:
        raise CorruptStoreError(f'(event {event}) {error}') from None

    return check
