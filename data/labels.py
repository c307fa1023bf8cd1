"""Cluster labels of the events of a store, frozen to disk: the loader reads these, never vectors.

  clusters/<name>/labels.parquet   uid, vl and act label, distance of each event to its two centres
  clusters/<name>/meta.json        how they were made, of which store, and the sha256 of the labels

`vl` clusters (observation, caption) vectors, `act` action trajectories; events without actions have
act = -1. Clusters are numbered by size, 0 is the largest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wallwm_jax.data import manifest
from wallwm_jax.data.store import EventStore
from wallwm_jax.types import CorruptStoreError, DataError

FORMAT, VERSION = 'wallwm-clusters', 1
LABELS, META = 'labels.parquet', 'meta.json'
NO_ACTION = -1  # act label of events without actions

_SCHEMA = pa.schema(
  [
    ('uid', pa.uint64()),
    ('vl', pa.int32()),
    ('act', pa.int32()),
    ('vl_distance', pa.float32()),
    ('act_distance', pa.float32()),
  ]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
  """Cluster labels of all events of a store, in the order of its index.

  uid: uint64 [n]; vl, act: int32 [n], act -1 = no actions; vl_distance, act_distance: float32 [n]
  to the centre in feature space, NaN without actions. meta: content of meta.json.
  """

  uid: np.ndarray
  vl: np.ndarray
  act: np.ndarray
  vl_distance: np.ndarray
  act_distance: np.ndarray
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def sha256(self) -> str:
    """Hex digest of uids and labels."""
    digest = hashlib.sha256()
    for values, dtype in ((self.uid, '<u8'), (self.vl, '<i4'), (self.act, '<i4')):
      digest.update(np.ascontiguousarray(values, dtype).tobytes())
    return digest.hexdigest()

  @classmethod
  def load(cls, path: str | os.PathLike, store: EventStore) -> Labels:
    """The labels at `path`, in the order of the store's index.

    Raises:
      DataError: there are none, they are of a newer version, or of other events than the store's,
        naming the difference.
      CorruptStoreError: they are not what was written.
    """
    path = pathlib.Path(path)
    meta = _read_meta(path)
    (entry,) = meta['files']
    manifest.check_size(path, entry)
    manifest.check_digest(path, entry)
    table = pq.read_table(path / LABELS, schema=_SCHEMA)
    stored = cls(*(table.column(name).to_numpy() for name in _SCHEMA.names), meta)
    if stored.sha256 != meta['labels_sha256']:
      raise CorruptStoreError(
        f'{path / LABELS}: labels have sha256 {stored.sha256[:16]}..., {META} promises '
        f'{meta["labels_sha256"][:16]}... Copy both again or cluster again.'
      )
    rows = _align(stored.uid, store, path)
    columns = (getattr(stored, name)[rows] for name in _SCHEMA.names)
    return cls(*columns, meta)

  def save(self, out: str | os.PathLike) -> None:
    """Writes labels.parquet and meta.json into the new folder `out`, which appears when whole.

    Raises:
      DataError: `out` exists.
    """
    out = pathlib.Path(out).absolute()
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.parent / f'.{out.name}.building-{uuid.uuid4().hex}'
    building.mkdir()
    try:
      columns = {name: getattr(self, name) for name in _SCHEMA.names}
      pq.write_table(pa.table(columns, schema=_SCHEMA), building / LABELS)
      entry = manifest.describe(building, LABELS, len(self.uid))
      content = self.meta | {'labels_sha256': self.sha256, 'files': [entry]}
      (building / META).write_text(json.dumps(content, indent=1) + '\n')
      os.rename(building, out)
    except BaseException:
      shutil.rmtree(building, ignore_errors=True)
      raise


def cluster_sizes(labels: Labels) -> dict[str, np.ndarray]:
  """Events per cluster: {'vl': int64 [K], 'act': int64 [K']}; those without actions in none."""
  return {'vl': np.bincount(labels.vl), 'act': np.bincount(labels.act[labels.act >= 0])}


def examples(labels: Labels, side: Literal['vl', 'act'], count: int) -> list[np.ndarray]:
  """For every cluster of a side, rows of the event index of its (at most) `count` events nearest
  to the centre, nearest first."""
  label, distance = getattr(labels, side), getattr(labels, f'{side}_distance')
  order = np.lexsort((np.arange(len(label)), distance, label))
  ends = np.searchsorted(label[order], np.arange(label.max() + 2))
  return [order[a:b][:count] for a, b in zip(ends, ends[1:])]


def check_free(out: pathlib.Path) -> None:
  """Raises DataError if clusters cannot be written to `out`."""
  if out.exists():
    raise DataError(f'clusters {out}: expected a new folder, but it exists. Choose another name.')


def _read_meta(path: pathlib.Path) -> dict[str, Any]:
  file = path / META
  if not file.is_file():
    raise DataError(f'no clusters at {path}: {META} not found. Cluster the store first.')
  try:
    meta = json.loads(file.read_text())
  except ValueError as error:
    raise CorruptStoreError(f'{file}: not valid JSON ({error}).') from None
  if not isinstance(meta, dict) or meta.get('format') != FORMAT:
    got = meta.get('format') if isinstance(meta, dict) else None
    raise DataError(f'{file}: expected format {FORMAT!r}, got {got!r}.')
  if not isinstance(meta.get('version'), int) or meta['version'] > VERSION:
    raise DataError(
      f'{file}: version {meta.get("version")}, this code reads up to {VERSION}. Upgrade wallwm_jax.'
    )
  missing = [key for key in ('files', 'labels_sha256', 'store') if key not in meta]
  if missing:
    raise CorruptStoreError(f'{file}: {missing} missing. Copy it again or cluster again.')
  return meta


def _align(uid: np.ndarray, store: EventStore, path: pathlib.Path) -> np.ndarray:
  """Rows of `uid` in the order of the store's index."""
  wanted = store.column('uid')
  order = np.argsort(uid, kind='stable')
  place = np.minimum(np.searchsorted(uid[order], wanted), max(len(uid) - 1, 0))
  unlabelled = wanted[uid[order][place] != wanted] if len(uid) else wanted
  unknown = np.setdiff1d(uid, wanted)
  if len(unlabelled) or len(unknown):
    raise DataError(
      f'clusters {path} are not those of store {store.path}: of {len(wanted)} events '
      f'{len(unlabelled)} have no label (first uids {unlabelled[:3].tolist()}), {len(unknown)} '
      f'labels are of other events (first uids {unknown[:3].tolist()}). Cluster this store again.'
    )
  return order[place]
