"""The metadata of a LeRobot data set, v2.x or v3.x, in one form.

v2.x: one Parquet file and one video per camera for each episode, lists in meta/*.jsonl.
v3.x: many episodes to a Parquet file and to a video; meta/episodes/ says which rows and seconds.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wallwm_jax.data.readers.annotations import Span
from wallwm_jax.data.readers.features import Feature
from wallwm_jax.errors import DataError

SARM = ('sparse_subtask', 'dense_subtask')
RECORD_COLUMN = 'wallwm/record'  # what writers.lerobot adds to an episode's row
_NUMBERS = re.compile(r'(float|u?int)\d+|bool')


@dataclasses.dataclass(frozen=True)
class Clip:
  """A stretch of a video file, s; end is infinite where the file holds one episode."""

  path: pathlib.Path
  start: float
  end: float


@dataclasses.dataclass(frozen=True)
class Entry:
  """An episode as the metadata lists it.

  data: Parquet file with its rows; clips: {camera feature: Clip}; subtasks: spans of the SARM
  columns; record: text of RECORD_COLUMN or None.
  """

  index: int
  length: int
  data: pathlib.Path
  clips: Mapping[str, Clip]
  subtasks: Mapping[str, list[Span]] = dataclasses.field(default_factory=dict)
  record: str | None = None

  @property
  def name(self) -> str:
    return episode_name(self.index)


def episode_name(index: int) -> str:
  return f'episode_{index:06d}'


class LeRobotMeta:
  """Everything under meta/.

  Attributes:
    info: info.json; version: 'v2.1', ..; fps: Hz; features: {name: Feature}; videos: names of the
    video features; episodes: entries by index; problems: {episode index: why it has no entry};
    tasks, subtasks: {index: text}.

  Raises:
    DataError: not a LeRobot data set, an unknown version, or damaged metadata.
  """

  def __init__(self, source: str | os.PathLike):
    self.root = pathlib.Path(source)
    self.info = read_json(self.root / 'meta' / 'info.json')
    lacking = {'codebase_version', 'fps', 'features', 'data_path'} - set(self.info)
    if lacking:
      raise DataError(f'{self.root}/meta/info.json: expected {sorted(lacking)}, they are missing.')
    self.version = self.info['codebase_version']
    match = re.fullmatch(r'v?([23])\.\d+', self.version)
    if not match:
      raise DataError(
        f'{self.root}: expected LeRobot v2.x or v3.x, got {self.version!r}. '
        "Convert it with LeRobot's own converter."
      )
    self.fps = float(self.info['fps'])
    self.features = {name: _feature(f) for name, f in self.info['features'].items()}
    self.videos = [n for n, f in self.info['features'].items() if f['dtype'] == 'video']
    if self.videos and not self.info.get('video_path'):
      raise DataError(f'{self.root}/meta/info.json: video features, but no video_path.')
    self.tasks = self._table('task')
    self.subtasks = self._table('subtask')
    self._list(self._entries_v2() if match[1] == '2' else self._entries_v3())

  def _list(self, entries: list[Entry]) -> None:
    """Sorts entries; a duplicate or a gap in the numbers is a problem of that episode."""
    counts = collections.Counter(entry.index for entry in entries)
    self.episodes = sorted(
      (entry for entry in entries if counts[entry.index] == 1), key=lambda entry: entry.index
    )
    self.problems = {
      index: f'duplicate episode id {index}: listed {count} times'
      for index, count in counts.items()
      if count > 1
    }
    total = int(self.info.get('total_episodes', len(counts)))
    for index in sorted(set(range(total)) - set(counts)):
      self.problems[index] = f'info.json counts {total} episodes, meta/episodes has no {index}'

  def _table(self, name: str) -> dict[int, str]:
    """meta/<name>s.parquet or .jsonl as {index: text}; {} without one."""
    path = self.root / 'meta' / f'{name}s.parquet'
    if path.is_file():
      table = read_parquet(path)
      texts = [f.name for f in table.schema if pa.types.is_string(f.type) or _large(f.type)]
      if f'{name}_index' not in table.column_names or not texts:
        raise DataError(f'{path}: expected {name}_index and a text, got {table.column_names}.')
      column = name if name in texts else texts[0]  # a pandas index may have lost its name
      return dict(zip(table[f'{name}_index'].to_pylist(), table[column].to_pylist()))
    path = path.with_suffix('.jsonl')
    if path.is_file():
      return {row[f'{name}_index']: row[name] for row in read_lines(path, f'{name}_index', name)}
    return {}

  def _entries_v2(self) -> list[Entry]:
    rows = read_lines(self.root / 'meta' / 'episodes.jsonl', 'episode_index', 'length')
    size = int(self.info.get('chunks_size', 1000))
    entries = []
    for row in rows:
      index = row['episode_index']
      place = {'episode_chunk': index // size, 'episode_index': index}
      clips = {
        key: Clip(self._path('video_path', video_key=key, **place), 0.0, math.inf)
        for key in self.videos
      }
      subtasks = _sarm_spans(row)
      entries.append(Entry(index, row['length'], self._path('data_path', **place), clips, subtasks))
    return entries

  def _entries_v3(self) -> list[Entry]:
    paths = sorted((self.root / 'meta' / 'episodes').glob('*/*.parquet'))
    if not paths:
      raise DataError(f'{self.root}/meta/episodes: expected Parquet files, found none.')
    rows = []
    for path in paths:
      names = [n for n in open_parquet(path).schema_arrow.names if not n.startswith('stats/')]
      rows += read_parquet(path, names).to_pylist()
    return [self._entry_v3(row) for row in rows]

  def _entry_v3(self, row: dict[str, Any]) -> Entry:
    def place(prefix: str) -> dict[str, int]:
      return {k: row[f'{prefix}/{k}'] for k in ('chunk_index', 'file_index')}

    try:
      clips = {}
      for key in self.videos:
        prefix = f'videos/{key}'
        path = self._path('video_path', video_key=key, **place(prefix))
        times = row[f'{prefix}/from_timestamp'], row[f'{prefix}/to_timestamp']
        clips[key] = Clip(path, *times)
      data = self._path('data_path', **place('data'))
      return Entry(
        row['episode_index'], row['length'], data, clips, _sarm_spans(row), row.get(RECORD_COLUMN)
      )
    except KeyError as error:
      raise DataError(f'{self.root}/meta/episodes: expected a column {error}.') from None

  def _path(self, template: str, **values) -> pathlib.Path:
    try:
      return self.root / self.info[template].format(**values)
    except (KeyError, IndexError, ValueError) as error:
      raise DataError(
        f'{self.root}/meta/info.json: {template} {self.info[template]!r} cannot be filled in '
        f'with {sorted(values)} ({error!r}).'
      ) from None


@contextlib.contextmanager
def damage(path: pathlib.Path) -> Iterator[None]:
  """Turns what pyarrow raises on damaged bytes into a DataError."""
  try:
    yield
  except (pa.ArrowException, OSError) as error:
    raise DataError(f'{path}: damaged ({str(error).splitlines()[0]}).') from None


def open_parquet(path: pathlib.Path) -> pq.ParquetFile:
  """Raises DataError: absent or without the footer that finalising a recording writes."""
  if not path.is_file():
    raise DataError(f'{path}: expected a Parquet file, there is none.')
  try:
    return pq.ParquetFile(path)
  except (pa.ArrowException, OSError) as error:
    raise DataError(
      f'{path}: not a complete Parquet file ({str(error).splitlines()[0]}). A recording that was '
      'not finalised has no footer: finalise or record it again.'
    ) from None


def read_parquet(path: pathlib.Path, columns: list[str] | None = None) -> pa.Table:
  """The whole of a small file; raises DataError."""
  file = open_parquet(path)
  with damage(path):
    return file.read(columns)


def _large(kind: pa.DataType) -> bool:
  return pa.types.is_large_string(kind)


def _feature(entry: dict[str, Any]) -> Feature:
  names = entry.get('names')
  if isinstance(names, dict):  # {'motors': [..]}
    names = next(iter(names.values()), None)
  names = tuple(names) if isinstance(names, list) else ()
  dtype, shape = entry['dtype'], tuple(entry.get('shape') or ())
  if dtype in ('video', 'image'):
    if names[:1] in (('channels',), ('channel',)):
      shape = (*shape[1:], shape[0])
    details = {**entry, **(entry.get('info') or {}), **(entry.get('video_info') or {})}
    depth = details.get('is_depth_map') or details.get('video.is_depth_map')
    return Feature('other' if depth or shape[2:] != (3,) else 'camera', dtype, shape, names)
  if dtype in ('string', 'language'):
    return Feature({'string': 'text', 'language': 'language'}[dtype], dtype, shape, names)
  return Feature('number' if _NUMBERS.fullmatch(dtype) else 'other', dtype, shape, names)


def _sarm_spans(row: dict[str, Any]) -> dict[str, list[Span]]:
  """Spans of the columns '<sparse|dense>_subtask_<names|start_frames|end_frames>' of an episode.
  Ends are exclusive; one frame between two spans (ends counted inclusively) belongs to the
  first."""
  result = {}
  for kind in SARM:
    names, starts, ends = (row.get(f'{kind}_{x}') for x in ('names', 'start_frames', 'end_frames'))
    if not names:
      continue
    following = [*starts[1:], row['length']]
    result[kind] = [
      Span(start, after if after - end == 1 else min(end, after), name)
      for name, start, end, after in zip(names, starts, ends, following)
    ]
  return result


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Raises DataError."""
  try:
    return json.loads(path.read_text('utf-8'))
  except (OSError, ValueError) as error:
    raise DataError(f'{path}: expected the JSON file of a LeRobot data set ({error}).') from None


def read_lines(path: pathlib.Path, *fields: str) -> list[dict[str, Any]]:
  """Objects of a JSON lines file that all have `fields`; raises DataError."""
  try:
    rows = [json.loads(line) for line in path.read_text('utf-8').splitlines() if line.strip()]
  except (OSError, ValueError) as error:
    raise DataError(f'{path}: expected one JSON object per line ({error}).') from None
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict) or any(field not in row for field in fields):
      raise DataError(f'{path}: line {number}: expected {fields}, got {row!r}.')
  return rows
