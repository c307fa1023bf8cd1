"""LeRobot data sets (v2.x and v3.x), read with pyarrow and PyAV, one episode at a time.

Nothing is trusted that can be checked: rows and decoded frames are counted, numbered and timed
against what the metadata promises. An episode that fails is yielded as Quarantined with the reason.
"""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from PIL import Image

from wallwm_jax.data.readers import annotations, carried
from wallwm_jax.data.readers.canonical import robot_poses
from wallwm_jax.data.readers.clips import decode_clip
from wallwm_jax.data.readers.features import check_spec
from wallwm_jax.data.readers.layouts import lerobot_layout
from wallwm_jax.data.readers.lerobot_meta import (
  SARM,
  Entry,
  LeRobotMeta,
  damage,
  episode_name,
  open_parquet,
)
from wallwm_jax.data.readers.spec import Caption, DatasetSpec, Text
from wallwm_jax.data.schema import EpisodeRecord, Quarantined
from wallwm_jax.errors import DataError

PERSISTENT = 'language_persistent'  # annotation rows, repeated at every frame
TABLES = {'task': 'task_index', 'subtask': 'subtask_index'}  # text by id: the column of the ids
_INDEX = ('episode_index', 'frame_index', 'timestamp')


class LeRobotReader:
  """Iterates over the episodes as EpisodeRecord | Quarantined.

  Args:
    source: folder with meta/info.json. spec: what state, action and annotations mean; None
      detects Meta-World and canonical poses (writers.lerobot).

  Raises:
    UnknownLayoutError: no spec, and the metadata does not say enough; the message has a spec to
      fill in.
    DataError: not a LeRobot data set, damaged metadata, or a spec that does not fit it.
  """

  def __init__(self, source: str | os.PathLike, spec: DatasetSpec | None = None):
    self.meta = meta = LeRobotMeta(source)
    self.spec = spec or lerobot_layout(meta.root, meta.features, meta.info.get('robot_type'))
    check_spec(self.spec, meta.features)
    self.name = self.spec.name or meta.root.resolve().name
    if self.spec.fps is not None and abs(self.spec.fps / meta.fps - 1) > 1e-3:
      raise DataError(f'{meta.root}: recorded at {meta.fps} Hz, the spec says {self.spec.fps} Hz.')
    self._captions = self.spec.captions
    if self._captions is None:
      self._captions = conventional_captions(meta)
    self._events = self.spec.events or conventional_events(meta)
    for text in (*self._captions, self._events):
      self._check_text(text)

  def __len__(self) -> int:
    return len(self.meta.episodes) + len(self.meta.problems)

  def __iter__(self) -> Iterator[EpisodeRecord | Quarantined]:
    rows = EpisodeRows(self._columns())
    for entry in self.meta.episodes:
      try:
        yield self._read(entry, rows)
      except DataError as error:
        yield Quarantined(entry.name, self.name, str(error))
    listed = {entry.index for entry in self.meta.episodes} | set(self.meta.problems)
    for index in sorted(rows.seen - listed):
      yield Quarantined(episode_name(index), self.name, 'has rows, but meta/episodes lacks it')
    for index, problem in self.meta.problems.items():
      yield Quarantined(episode_name(index), self.name, problem)

  def _check_text(self, text: Text | None) -> None:
    if text is None or text.feature in ('', *SARM):
      return
    name, features = TABLES.get(text.feature, text.feature), self.meta.features
    if name not in features or (text.feature == 'subtask' and not self.meta.subtasks):
      raise DataError(
        f'{self.meta.root}: expected text in {text.feature!r}, got no such feature or table. '
        f'There are {sorted(features)}, {", ".join((*TABLES, *SARM))}.'
      )

  def _columns(self) -> list[str]:
    """Columns of the data files that this spec needs."""
    texts = [text.feature for text in (*self._captions, self._events) if text and text.feature]
    columns = [TABLES.get(name, name) for name in texts if name not in SARM]
    images = [
      c.feature for c in self.spec.cameras if self.meta.features[c.feature].dtype == 'image'
    ]
    return list(dict.fromkeys((*_INDEX, *self.spec.numeric_features, *images, *columns)))

  def _read(self, entry: Entry, rows: EpisodeRows) -> EpisodeRecord:
    table = rows.read(entry.data, entry.index)
    times = self._check_rows(entry, table)
    values = {name: self._numbers(table, name) for name in self.spec.numeric_features}
    state, actions = robot_poses(self.spec, self.meta.features, values)
    frames = {c.view: self._frames(entry, table, c.feature, times) for c in self.spec.cameras}
    nominal = np.arange(entry.length) / self.meta.fps
    fields = {
      'episode_id': entry.name,
      'source': self.name,
      'calibration': {view: None for view in frames},
      'times': None if np.abs(times - nominal).max() < 1e-3 / self.meta.fps else times,
    }
    fields |= self._annotations(entry, table)
    if entry.record is not None:
      fields |= carried.unpack(entry.record, self.spec, tuple(frames))
    return EpisodeRecord(
      fps=self.meta.fps, views=tuple(frames), frames=frames, state=state, actions=actions, **fields
    )

  def _check_rows(self, entry: Entry, table: pa.Table) -> np.ndarray:
    """Recorded times float64 [T] s."""
    if len(table) != entry.length:
      raise DataError(f'{entry.data}: expected {entry.length} rows, got {len(table)}.')
    frame = table['frame_index'].to_numpy()
    if not np.array_equal(frame, np.arange(entry.length)):
      raise DataError(
        f'{entry.data}: expected frame_index 0..{entry.length - 1}, got {_brief(frame)}.'
      )
    times = table['timestamp'].to_numpy().astype(np.float64)
    if not np.isfinite(times).all():
      raise DataError(f'{entry.data}: timestamp: NaN, infinite or absent values.')
    return times

  def _numbers(self, table: pa.Table, name: str) -> np.ndarray:
    """[T, ...] of a column; raises DataError on nulls and on another shape than info.json's."""
    column, shape = table[name].combine_chunks(), self.meta.features[name].shape
    width = int(np.prod(shape)) if shape else 1
    values = column
    while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
      values = values.flatten()
    if column.null_count or values.null_count or len(values) != width * len(table):
      raise DataError(
        f'{name}: expected shape {list(shape)} in every row, got {len(values)} numbers in '
        f'{len(table)} rows of type {column.type} ({column.null_count} null).'
      )
    return values.to_numpy(zero_copy_only=False).reshape(len(table), width)

  def _frames(self, entry: Entry, table: pa.Table, name: str, times: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] of a camera."""
    if name in entry.clips:
      clip, slack = entry.clips[name], 0.5 / self.meta.fps
      frames, shown = decode_clip(clip.path, clip.start, clip.end, entry.length, self.meta.fps)
      late = np.flatnonzero(np.abs(shown - times) > slack + 1e-6)
      if len(late):
        k = late[0]
        raise DataError(
          f'{name}: frame {k} is at {shown[k]:.4f} s of {clip.path}, its row at {times[k]:.4f} s; '
          f'expected within {slack:.4f} s ({len(late)} of {entry.length} frames are off).'
        )
    else:
      frames = self._images(table, name)
    declared = self.meta.features[name].shape
    if frames.shape[1:] != declared:
      raise DataError(f'{name}: expected frames {declared}, got {frames.shape[1:]}.')
    return frames

  def _images(self, table: pa.Table, name: str) -> np.ndarray:
    images = []
    for k, item in enumerate(table[name].to_pylist()):
      try:
        file = io.BytesIO(item['bytes']) if item['bytes'] else self.meta.root / item['path']
        images.append(np.asarray(Image.open(file).convert('RGB')))
      except (OSError, TypeError, KeyError) as error:
        raise DataError(f'{name}: image of frame {k} cannot be decoded ({error!r}).') from None
    sizes = {image.shape for image in images}
    if len(sizes) != 1:
      raise DataError(f'{name}: images of several sizes {sorted(sizes)}.')
    return np.stack(images)

  def _annotations(self, entry: Entry, table: pa.Table) -> dict:
    captions = tuple(
      span
      for text in self._captions
      for span in annotations.caption_spans(text.level, self._spans(text, entry, table))
    )
    source = self._events.feature if self._events else ''
    marks = self._spans(self._events, entry, table, ids=source) if source else []
    events = annotations.marked_events(marks, entry.length)
    found = {'format': f'lerobot {self.meta.version}', 'events': source if events else ''}
    if PERSISTENT in table.column_names:
      rephrased = [row['content'] for row in _rows_of_style(table, 'task_aug')]
      found |= {'task_aug': rephrased} if rephrased else {}
    return {
      'captions': captions,
      'events': events or annotations.whole_episode(captions, entry.length),
      'provenance': {'read': found},
    }

  def _spans(self, text: Text, entry: Entry, table: pa.Table, ids: str = ''):
    """Where a text holds. ids: events are wanted: name an id without a label by it."""
    name = text.feature
    if name in SARM:
      return entry.subtasks.get(name, [])
    if name == PERSISTENT:
      return self._persistent(text, table)
    values = table[TABLES.get(name, name)].to_pylist()
    if name in TABLES:
      known = self.meta.tasks if name == 'task' else self.meta.subtasks
      unknown = sorted({v for v in values if v not in known and v != -1})
      if unknown:
        raise DataError(f'{TABLES[name]} {unknown}: expected an index of meta/{name}s, got none.')
      return annotations.id_spans(values, {str(k): v for k, v in known.items()})
    if self.meta.features[name].kind == 'text':
      return annotations.text_spans(values)
    if not text.labels and not ids:
      raise DataError(f'{name}: expected text, got numbers. Give their labels in the spec.')
    return annotations.id_spans(values, text.labels, ids)

  def _persistent(self, text: Text, table: pa.Table) -> list[annotations.Span]:
    """Rows of one style, each active from its time to the next one's."""
    rows = sorted(_rows_of_style(table, text.style), key=lambda row: row['timestamp'])
    starts = [round(row['timestamp'] * self.meta.fps) for row in rows] + [len(table)]
    return [
      annotations.Span(start, min(end, len(table)), row['content'])
      for row, start, end in zip(rows, starts, starts[1:])
      if start < min(end, len(table)) and row['content']
    ]


class EpisodeRows:
  """Rows of one episode after the other; a file is opened once and a row group read once, as long
  as the episodes come in the order of the files."""

  def __init__(self, columns: list[str]):
    self._columns, self._path = columns, None
    self.seen: set[int] = set()  # episode ids of all files opened

  def read(self, path: pathlib.Path, episode: int) -> pa.Table:
    """Raises DataError: no such file or episode, damaged, missing columns, scattered rows."""
    if path != self._path:
      self._open(path)
    rows = np.flatnonzero(self._index == episode)
    if not len(rows):
      raise DataError(f'{path}: expected rows of episode {episode}, got none.')
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 != len(rows):
      raise DataError(f'{path}: rows of episode {episode} are scattered over {first}..{last}.')
    wanted = range(
      int(np.searchsorted(self._starts, first, 'right')) - 1,
      int(np.searchsorted(self._starts, last, 'right')),
    )
    with damage(path):
      self._groups = {
        g: self._groups.get(g) or self._file.read_row_group(g, self._columns) for g in wanted
      }
    table = pa.concat_tables(self._groups.values())
    return table.slice(first - int(self._starts[wanted[0]]), len(rows))

  def _open(self, path: pathlib.Path) -> None:
    file = open_parquet(path)
    absent = sorted(set(self._columns) - set(file.schema_arrow.names))
    if absent:
      raise DataError(f'{path}: expected columns {absent}, got {file.schema_arrow.names}.')
    with damage(path):
      self._index = file.read(['episode_index'])['episode_index'].to_numpy()
    counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    self._path, self._file, self._groups = path, file, {}
    self._starts = np.cumsum([0, *counts[:-1]])
    self.seen.update(self._index.tolist())


def conventional_captions(meta: LeRobotMeta) -> tuple[Caption, ...]:
  """Where LeRobot's own conventions put text, and its level."""
  found = [Caption('task', level='L3')] if meta.tasks else []
  if meta.subtasks and 'subtask_index' in meta.features:
    found.append(Caption('subtask', level='L2'))
  if PERSISTENT in meta.features:
    found += [Caption(PERSISTENT, s, level=lv) for s, lv in (('subtask', 'L2'), ('motion', 'L1'))]
  kinds = {kind for entry in meta.episodes for kind in entry.subtasks}
  levels = {'sparse_subtask': 'L2', 'dense_subtask': 'L1'}
  return tuple([*found, *(Caption(kind, level=levels[kind]) for kind in SARM if kind in kinds)])


def conventional_events(meta: LeRobotMeta) -> Text | None:
  """The finest of the conventional texts that divide an episode."""
  finest = sorted(conventional_captions(meta), key=lambda caption: caption.level)
  return next((Text(c.feature, c.style) for c in finest if c.feature != 'task'), None)


def _rows_of_style(table: pa.Table, style: str) -> list[dict]:
  return [row for row in table[PERSISTENT][0].as_py() or () if row['style'] == style]


def _brief(x: np.ndarray) -> str:
  return f'{x[:3].tolist()} .. {x[-3:].tolist()}'
