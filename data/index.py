"""The index of an event store: one row per episode, one row per event.

Files of a store that was appended to carry the number of the write in their names, so that the old
index is there until the new manifest is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wallwm_jax.data.schema import LEVELS, EpisodeRecord, EventSpan
from wallwm_jax.types import CorruptStoreError

EPISODES, EVENTS = 'index/episodes.parquet', 'index/events.parquet'
SPLITS = ('train', 'heldout')
_TEXTS = ['label', *LEVELS, 'split']  # kept as dictionaries: they repeat

EPISODE_SCHEMA = pa.schema(
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
    ('events', pa.int32()),
    ('content', pa.string()),  # hash of everything in the record
    ('checksums', pa.list_(pa.uint32())),  # crc32c of its records: header, then blocks
    ('rig', pa.string()),
    ('lag', pa.float64()),  # frames that the robot stream was late; null = not estimated
    ('cleaning', pa.string()),  # 'passed'; '' = not cleaned
    ('pipeline', pa.string()),  # version that wrote the record
    ('reader', pa.string()),
  ]
)
EVENT_SCHEMA = pa.schema(
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


def numbered(name: str, write: int) -> str:
  """`name` itself for the first write of a store, else with the write's number before the
  suffix."""
  path = pathlib.PurePosixPath(name)
  return name if write == 0 else str(path.with_suffix(f'.{write}{path.suffix}'))


def read(root: pathlib.Path, write: int) -> tuple[pa.Table, pa.Table]:
  """(episodes, events); columns that an older version did not write are null, texts ''."""
  episodes = pq.read_table(root / numbered(EPISODES, write))
  for field in EPISODE_SCHEMA:
    if field.name not in episodes.column_names:
      value = '' if field.type == pa.string() else None
      empty = pa.array([value] * len(episodes), field.type)
      episodes = episodes.append_column(field, empty)
  return episodes, pq.read_table(root / numbered(EVENTS, write), read_dictionary=_TEXTS)


def save(root: pathlib.Path, write: int, episodes: pa.Table, events: pa.Table) -> dict[str, int]:
  """Rows of each file that it writes below `root`."""
  files = {}
  for name, table, schema in (
    (EPISODES, episodes, EPISODE_SCHEMA),
    (EVENTS, events, EVENT_SCHEMA),
  ):
    files[numbered(name, write)] = len(table)
    pq.write_table(table.select(schema.names).cast(schema), root / numbered(name, write))
  return files


def episode_row(record: EpisodeRecord, reader: str) -> dict:
  """What the index knows of an episode without its place in the shards.

  Args:
    reader: what read it, where its provenance does not say.
  """
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
    'events': len(record.events),
    'pipeline': importlib.metadata.version('wallwm-jax'),
  } | _provenance(record, reader)


def _provenance(record: EpisodeRecord, reader: str) -> dict:
  found = record.provenance
  lags = found.get('sync', {}).get('lags', {})
  return {
    'rig': record.rig,
    'lag': float(lags[record.views[0]]) if record.views[0] in lags else None,
    'cleaning': 'passed' if 'clean' in found else '',
    'reader': str(found.get('read', {}).get('format') or reader),
  }


def event_row(record: EpisodeRecord, event: EventSpan) -> dict:
  captions = record.event_captions(event)
  return {
    'uid': record.event_uid(event),
    'start': int(event.start),
    'end': int(event.end),
    'length': int(event.end - event.start),
    'label': event.label,
    'flags': list(event.flags),
  } | {level: captions.get(level, '') for level in LEVELS}


def splits(ids: list[str], heldout: float, given: list[str] | None = None) -> list[str]:
  """'train' or 'heldout' of every episode: those of `given` stay, and of the others the ones with
  the smallest hash of their id fill up round(heldout * n), at least one of several."""
  given = given or []
  count = max(round(heldout * len(ids)), 1) if heldout > 0 and len(ids) > 1 else 0
  new = range(len(given), len(ids))
  ranked = sorted(
    new, key=lambda i: hashlib.blake2b(ids[i].encode(), digest_size=8).digest()
  )
  held = set(ranked[: max(count - given.count(SPLITS[1]), 0)])
  return given + [SPLITS[i in held] for i in new]


def text_codes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
  """(distinct texts, sorted; int [n] which one each row is), like np.unique with its inverse."""
  if not pa.types.is_dictionary(column.type):
    column = column.dictionary_encode()
  column = column.unify_dictionaries().combine_chunks()
  values = column.dictionary.to_numpy(zero_copy_only=False).astype(object)
  return only_used(values, column.indices.to_numpy())


def only_used(texts: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(distinct texts that `codes` [n] name, sorted; int [n], which one each is).

  Counts instead of sorting: a million events in milliseconds.
  """
  used = np.flatnonzero(np.bincount(codes, minlength=len(texts)))
  distinct, rank = np.unique(texts[used], return_inverse=True)
  new = np.zeros(len(texts), np.int32)
  new[used] = rank
  return distinct, new[codes]


class Checksums:
  """crc32c of each record of a store, from the episodes table; None where the index has none."""

  def __init__(self, episodes: pa.Table):
    column = episodes['checksums'].combine_chunks()
    self._known = column.is_valid().to_numpy(zero_copy_only=False)
    self._values = column.values.to_numpy(zero_copy_only=False)
    self._starts = column.offsets.to_numpy()

  def __call__(self, episode: int, block: int) -> int | None:
    place = self._starts[episode] + block + 1  # the header is block -1
    inside = self._known[episode] and place < self._starts[episode + 1]
    return int(self._values[place]) if inside else None


def check_events(episodes: pa.Table, events: pa.Table, where) -> None:
  """Raises CorruptStoreError unless every episode has as many events as it says."""
  owner = events['episode'].to_numpy()
  if len(owner) and not 0 <= owner.min() <= owner.max() < len(episodes):
    raise CorruptStoreError(f'store {where}: events of episodes that the index does not have.')
  promised = episodes['events']
  known = promised.is_valid().to_numpy()
  found = np.bincount(owner, minlength=len(episodes))
  wrong = np.flatnonzero(known & (promised.fill_null(0).to_numpy() != found))
  if len(wrong):
    first = int(wrong[0])
    raise CorruptStoreError(
      f'store {where}: {len(wrong)} episodes have another number of events than they say, first '
      f'episode {first}: expected {promised[first]}, found {found[first]}.'
    )
