"""Encodes the events of a store into latents (see latents.py).

An interrupted encoding goes on after its last complete shard; the store appears by one rename.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.data import manifest, records
from wallwm_jax.data.latents import BLOCK, INDEX, describe
from wallwm_jax.data.pipeline import event_buckets, make_reader
from wallwm_jax.data.shards import ShardWriter
from wallwm_jax.data.stats import identity, no_text
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import Draw
from wallwm_jax.types import CorruptStoreError, DataError

_PLAN, _PROGRESS = 'plan.json', 'progress.jsonl'  # of an encoding that is not finished

EncodeVideo = Callable[[np.ndarray], np.ndarray]  # uint8 [B, V, T, H, W, 3] -> [B, V, F, h, w, C]


def encode_store(
  config: ExperimentConfig,
  store: EventStore,
  encode: EncodeVideo,
  out: str | os.PathLike,
  *,
  codec_digest: str = '',
  batch_size: int = 4,
  dtype: str = 'float16',
  shard_bytes: int = 2**28,
) -> dict:
  """Writes the latents of every event of `store`, each as long as its length bucket; shows
  progress.

  Args:
    config: views, image size, stride and buckets of the windows; encode: its codec.
    codec_digest: identity of the codec's weights.

  Returns:
    {'events', 'latent_frames', 'bytes', 'resumed': events that an earlier run had finished}.

  Raises:
    DataError: `out` is taken, or a latent is not finite in `dtype`, naming the event.
  """
  out = pathlib.Path(out).absolute()
  if out.exists():
    raise DataError(f'latents {out}: expected a new folder, but it exists. Choose another.')
  reader = make_reader(config, store, identity(config), no_text)
  draws, starts = _draws(config, store), store.column('start')
  description = describe(config, store, codec_digest)
  plan = {'description': description, 'events': draws, 'dtype': dtype}
  root, rows, done = _open_partial(out, plan)
  writer, resumed, unsaved = ShardWriter(root, 'latents', shard_bytes, done), len(rows), []
  batches = list(_batches(draws[resumed:], batch_size))
  for batch in track(batches, 'encoding', disable=not batches):
    windows = [Draw(event, bucket, int(starts[event])) for event, bucket in batch]
    encoded = _encode(encode, [reader.frames(w) for w in windows], batch_size)
    for window, latents in zip(windows, encoded, strict=True):
      frames = 1 + (reader.window(window).num_frames - 1) // config.model.steps_per_latent
      stored = _narrow(latents[:, :frames], dtype, window.event)
      shard, record = writer.append(records.seal(window.event, BLOCK, {'latents': stored}))
      unsaved.append({'event': window.event, 'shard': shard, 'record': record,
                      'frames': frames, 'bucket': window.bucket})
    if (entry := writer.roll()) is not None:
      rows, unsaved = rows + _note(root, entry, unsaved), []
  if (entry := writer.close()) is not None:
    rows += _note(root, entry, unsaved)
  return _finish(root, out, writer, rows, description, dtype) | {'resumed': resumed}


def _draws(config: ExperimentConfig, store: EventStore) -> list[list[int]]:
  """[event row, bucket] of every event, bucket by bucket."""
  buckets = event_buckets(store, config)
  return [[int(e), config.data.buckets[buckets[e]]] for e in np.argsort(buckets, kind='stable')]


def _batches(draws: list[list[int]], size: int) -> Iterator[list[list[int]]]:
  """Consecutive draws of one bucket each."""
  start = 0
  while start < len(draws):
    stop = start + 1
    while stop < min(start + size, len(draws)) and draws[stop][1] == draws[start][1]:
      stop += 1
    yield draws[start:stop]
    start = stop


def _encode(encode: EncodeVideo, frames: list[np.ndarray], batch_size: int) -> np.ndarray:
  """`encode` of a batch filled up to `batch_size`, so that every bucket compiles once."""
  rows = np.minimum(np.arange(batch_size), len(frames) - 1)
  return np.asarray(encode(np.stack(frames)[rows]))[: len(frames)]


def _narrow(latents: np.ndarray, dtype: str, event: int) -> np.ndarray:
  with np.errstate(over='ignore'):  # found just below
    stored = np.ascontiguousarray(latents, dtype)
  if not np.isfinite(stored).all():
    raise DataError(
      f'event {event}: its latents are not finite in {dtype} (largest magnitude '
      f'{np.abs(latents).max():.3g}). Store float32, or check the codec weights.'
    )
  return stored


def _open_partial(out: pathlib.Path, plan: dict) -> tuple[pathlib.Path, list[dict], list[dict]]:
  """(hidden folder, index rows and shards that an interrupted run of the same plan finished)."""
  root = out.parent / f'.{out.name}.encoding'
  note = root / _PLAN
  if not note.is_file() or json.loads(note.read_text()) != json.loads(json.dumps(plan)):
    shutil.rmtree(root, ignore_errors=True)
    (root / 'shards').mkdir(parents=True)
    note.write_text(json.dumps(plan))
  finished = []
  log = root / _PROGRESS
  for line in log.read_text().splitlines() if log.is_file() else ():
    try:
      entry = json.loads(line)
      manifest.check_size(root, entry['shard'])
    except (ValueError, CorruptStoreError):
      break  # the line that a crash cut short, and what came after it
    finished.append(entry)
  log.write_text(''.join(json.dumps(entry) + '\n' for entry in finished))
  return root, [r for entry in finished for r in entry['rows']], [e['shard'] for e in finished]


def _note(root: pathlib.Path, shard: dict, rows: list[dict]) -> list[dict]:
  with open(root / _PROGRESS, 'a') as f:
    f.write(json.dumps({'shard': shard, 'rows': rows}) + '\n')
    f.flush()
    os.fsync(f.fileno())
  return rows


def _finish(root, out, writer: ShardWriter, rows, description: dict, dtype: str) -> dict:
  pq.write_table(pa.Table.from_pylist(rows), root / INDEX)
  frames = sum(row['frames'] for row in rows)
  manifest.write_manifest(
    root,
    {
      'description': description,
      'dtype': dtype,
      'longest_bucket': max(row['bucket'] for row in rows),
      'counts': {'events': len(rows), 'latent_frames': frames},
      'shards': writer.entries,
      'files': [manifest.describe(root, INDEX, len(rows))],
    },
    manifest.LATENT_STORE,
  )
  os.replace(root, out)
  for name in (_PROGRESS, _PLAN):
    (out / name).unlink()
  size = sum(entry['bytes'] for entry in writer.entries)
  return {'events': len(rows), 'latent_frames': frames, 'bytes': size}
