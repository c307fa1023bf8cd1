"""Records as a LeRobot v3.0 data set that the LeRobot library and our reader read.

State and action are canonical poses (schema.py) with named channels. An event is a subtask
(`subtask_index`, meta/subtasks.parquet), an L3 caption the task. What LeRobot has no place for
goes along in a column of meta/episodes (readers/carried.py), so that reading gives the record back:
exactly but for the frames, which are as the codec keeps them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wallwm_jax.data.readers import carried
from wallwm_jax.data.readers.layouts import ACTION, COUNTERS, STATE, pose_names
from wallwm_jax.data.readers.lerobot_meta import RECORD_COLUMN
from wallwm_jax.data.schema import ARM_WIDTH, EpisodeRecord, Quarantined, validate
from wallwm_jax.data.writers.feature_stats import FeatureStats
from wallwm_jax.data.writers.rotating import CODECS, Place, RotatingParquet, RotatingVideo
from wallwm_jax.errors import ConfigError, DataError

VERSION = 'v3.0'
DATA = 'data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet'
EPISODES = 'meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet'
VIDEO = 'videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4'


@dataclasses.dataclass(frozen=True)
class WriteSettings:
  """codec: of the videos; crf: its constant quality, lower is better; gop: frames between key
  frames (LeRobot's 2 suits random frames, 16 whole events); data_mb, video_mb: size at which the
  next file starts; files_per_chunk: files in a folder; robot: info.json's robot_type."""

  codec: Literal['h264', 'av1'] = 'h264'
  crf: int = 18
  gop: int = 2
  data_mb: float = 100
  video_mb: float = 200
  files_per_chunk: int = 1000
  robot: str = 'unknown'

  def __post_init__(self):
    if self.codec not in CODECS:
      raise ConfigError(f'codec: expected one of {sorted(CODECS)}, got {self.codec!r}.')
    for name in ('gop', 'data_mb', 'video_mb', 'files_per_chunk'):
      if getattr(self, name) <= 0:
        raise ConfigError(f'{name}: expected > 0, got {getattr(self, name)}.')
    if not 0 <= self.crf <= 51:
      raise ConfigError(f'crf: expected 0..51, got {self.crf}.')


def write_lerobot(
  records: Iterable[EpisodeRecord | Quarantined],
  out: str | os.PathLike,
  settings: WriteSettings | None = None,
) -> dict[str, Any]:
  """Writes every valid record; all must have the views, sizes, rate and arms of the first.

  Args:
    records: a reader, say. out: folder to create; it appears when everything is written.

  Returns:
    {'out', 'episodes', 'frames', 'quarantined', 'reasons': {episode id: reason}}; what was refused
    is in meta/quarantine.jsonl too.

  Raises:
    DataError: `out` is taken, or no record could be written; nothing is left behind.
  """
  out = pathlib.Path(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise DataError(f'{out}: expected a folder that does not exist or is empty.')
  partial = out.with_name(f'.{out.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    report = _write(records, partial, settings or WriteSettings())
    partial.replace(out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return {'out': str(out)} | report


def _write(records, root: pathlib.Path, settings: WriteSettings) -> dict[str, Any]:
  refused: list[Quarantined] = []
  writer = None
  with contextlib.ExitStack() as stack:
    for item in records:
      if isinstance(item, Quarantined):
        refused.append(item)
        continue
      try:
        validate(item)
        if writer is None:
          writer = stack.enter_context(contextlib.closing(_Writer(root, Layout.of(item), settings)))
        writer.layout.check(item)
      except DataError as error:
        refused.append(Quarantined(item.episode_id, item.source, str(error)))
      else:
        writer.add(item)
  if writer is None:
    raise DataError(f'no record to write; reasons: {[entry.reason for entry in refused]}.')
  if refused:
    lines = [json.dumps(dataclasses.asdict(entry)) for entry in refused]
    (root / 'meta' / 'quarantine.jsonl').write_text('\n'.join(lines) + '\n', 'utf-8')
  return {
    'episodes': writer.episodes,
    'frames': writer.frames,
    'quarantined': len(refused),
    'reasons': {entry.episode_id: entry.reason for entry in refused},
  }


@dataclasses.dataclass(frozen=True)
class Layout:
  """What all episodes of a data set share."""

  fps: float
  sizes: tuple[tuple[str, tuple[int, int]], ...]  # (view, (H, W))
  arms: int
  commanded: bool

  @classmethod
  def of(cls, record: EpisodeRecord) -> Layout:
    """Raises DataError: an odd size, which video cannot hold."""
    sizes = tuple((view, record.frames[view].shape[1:3]) for view in record.views)
    odd = [f'{view} {h}x{w}' for view, (h, w) in sizes if h % 2 or w % 2]
    if odd:
      raise DataError(f'expected cameras of even height and width, got {odd}. Letterbox them.')
    arms = 0 if record.state is None else record.state.shape[1] // ARM_WIDTH
    return cls(float(record.fps), sizes, arms, record.actions is not None)

  def check(self, record: EpisodeRecord) -> None:
    """Raises DataError if a record differs."""
    other = Layout.of(record)
    for field in dataclasses.fields(self):
      want, got = getattr(self, field.name), getattr(other, field.name)
      if want != got:
        raise DataError(
          f'{field.name}: a LeRobot data set has one for all episodes; expected that of the first '
          f'written, {want}, got {got}. Write it to another folder.'
        )

  @property
  def cameras(self) -> dict[str, str]:
    """{view: feature}."""
    return {view: f'observation.images.{view}' for view, _ in self.sizes}

  @property
  def vectors(self) -> list[str]:
    """Features that are pose vectors."""
    return [STATE] * (self.arms > 0) + [ACTION] * self.commanded

  def schema(self) -> pa.Schema:
    """Of the data files."""
    pose = pa.list_(pa.float32(), self.arms * ARM_WIDTH)
    kinds = {'float32': pa.float32(), 'int64': pa.int64()}
    fields = [(name, pose) for name in self.vectors]
    fields += [(name, kinds[dtype]) for name, dtype in COUNTERS.items()]
    row = {'feature': _value('float32'), 'length': self.arms * ARM_WIDTH, '_type': 'List'}
    features = {name: row for name in self.vectors}
    features |= {name: _value(dtype) for name, dtype in COUNTERS.items()}
    metadata = {'huggingface': json.dumps({'info': {'features': features}})}
    return pa.schema(fields, metadata=metadata)

  def features(self, settings: WriteSettings) -> dict[str, Any]:
    """info.json's."""
    pose = {
      'dtype': 'float32',
      'shape': [self.arms * ARM_WIDTH],
      'names': list(pose_names(self.arms)),
    }
    cameras = {
      self.cameras[view]: _video_feature(size, self.fps, settings) for view, size in self.sizes
    }
    counters = {
      name: {'dtype': dtype, 'shape': [1], 'names': None} for name, dtype in COUNTERS.items()
    }
    return cameras | {name: pose for name in self.vectors} | counters


class _Writer:
  """The files of one data set, written episode by episode."""

  def __init__(self, root: pathlib.Path, layout: Layout, settings: WriteSettings):
    self._root, self.layout, self._settings = root, layout, settings
    self.episodes = self.frames = 0
    self._tasks: dict[str, int] = {}
    self._subtasks: dict[str, int] = {}
    self._stats = FeatureStats()
    per_chunk, limit = settings.files_per_chunk, int(settings.data_mb * 2**20)
    self._data = RotatingParquet(Place(root, DATA, per_chunk), layout.schema(), limit)
    self._rows: RotatingParquet | None = None  # its columns are known with the first episode
    self._videos = {
      view: RotatingVideo(
        Place(root, VIDEO, per_chunk, video_key=key),
        settings.codec,
        layout.fps,
        settings.crf,
        settings.gop,
        int(settings.video_mb * 2**20),
      )
      for view, key in layout.cameras.items()
    }

  def add(self, record: EpisodeRecord) -> None:
    length, stats = record.num_frames, {}
    columns = self._columns(record)
    place = self._data.start()
    self._data.write(_table(columns, self.layout.schema()))
    row = {
      'episode_index': self.episodes,
      'tasks': list(dict.fromkeys(_task_per_frame(record))),
      'length': length,
      **{f'data/{k}': v for k, v in place.items()},
      'dataset_from_index': self.frames,
      'dataset_to_index': self.frames + length,
    }
    for view, key in self.layout.cameras.items():
      written = self._videos[view].write(record.frames[view])
      row |= {f'videos/{key}/{k}': v for k, v in written.items()}
      stats[key] = self._stats.add_frames(key, record.frames[view])
    for name, values in columns.items():
      stats[name] = self._stats.add_numbers(name, values)
    row |= {f'stats/{name}/{k}': v for name, values in stats.items() for k, v in values.items()}
    self._add_row(row | {RECORD_COLUMN: carried.pack(record)})
    self.episodes += 1
    self.frames += length

  def _columns(self, record: EpisodeRecord) -> dict[str, np.ndarray]:
    length = record.num_frames
    tasks = [self._tasks.setdefault(t, len(self._tasks)) for t in _task_per_frame(record)]
    subtasks = [
      self._subtasks.setdefault(t, len(self._subtasks)) for t in _subtask_per_frame(record)
    ]
    frame = np.arange(length)
    poses = {STATE: record.state, ACTION: record.actions}
    return {name: poses[name] for name in self.layout.vectors} | {
      'timestamp': (frame / self.layout.fps).astype(np.float32),
      'frame_index': frame,
      'episode_index': np.full(length, self.episodes),
      'index': frame + self.frames,
      'task_index': np.array(tasks),
      'subtask_index': np.array(subtasks),
    }

  def _add_row(self, row: dict[str, Any]) -> None:
    names = ('chunk_index', 'file_index')
    if self._rows is None:
      full = row | {f'meta/episodes/{name}': 0 for name in names}
      schema = pa.Table.from_pylist([full]).schema
      place = Place(self._root, EPISODES, self._settings.files_per_chunk)
      self._rows = RotatingParquet(place, schema, int(self._settings.data_mb * 2**20))
      self._schema = schema
    row |= {f'meta/episodes/{name}': x for name, x in self._rows.start().items()}
    self._rows.write(pa.Table.from_pylist([row], schema=self._schema))

  def close(self) -> None:
    for file in (self._data, self._rows, *self._videos.values()):
      if file is not None:
        file.close()
    meta = self._root / 'meta'
    meta.mkdir(exist_ok=True)
    for name, texts in (('task', self._tasks), ('subtask', self._subtasks)):
      pq.write_table(_text_table(name, texts), meta / f'{name}s.parquet', compression='snappy')
    if self.episodes:
      _write_json(meta / 'stats.json', self._stats.total())
    fps = self.layout.fps
    info = {
      'codebase_version': VERSION,
      'robot_type': self._settings.robot,
      'total_episodes': self.episodes,
      'total_frames': self.frames,
      'total_tasks': len(self._tasks),
      'chunks_size': self._settings.files_per_chunk,
      'data_files_size_in_mb': self._settings.data_mb,
      'video_files_size_in_mb': self._settings.video_mb,
      'fps': int(fps) if fps.is_integer() else fps,
      'splits': {'train': f'0:{self.episodes}'},
      'data_path': DATA,
      'video_path': VIDEO,
      'features': self.layout.features(self._settings),
    }
    _write_json(meta / 'info.json', info)


def _table(columns: dict[str, np.ndarray], schema: pa.Schema) -> pa.Table:
  arrays = []
  for name, x in columns.items():
    kind = schema.field(name).type
    if pa.types.is_fixed_size_list(kind):
      x = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), type=kind)
    arrays.append(pa.array(x, kind) if isinstance(x, np.ndarray) else x)
  return pa.Table.from_arrays(arrays, schema=schema)


def _task_per_frame(record: EpisodeRecord) -> list[str]:
  """The L3 caption of each frame, '' without one."""
  texts = [''] * record.num_frames
  for span in reversed([s for s in record.captions if s.level == 'L3']):
    texts[span.start : span.end] = [span.text] * (span.end - span.start)
  for event in record.events:
    if 'L3' in event.captions:
      texts[event.start : event.end] = [event.captions['L3']] * (event.end - event.start)
  return texts


def _subtask_per_frame(record: EpisodeRecord) -> list[str]:
  """The finest text of the event that a frame's action belongs to, its label without text; ''
  between events."""
  texts = [''] * record.num_frames
  for event in record.events:
    captions = record.event_captions(event)
    text = next((captions[level] for level in ('L1', 'L2') if level in captions), event.label)
    texts[event.start : event.end] = [text] * (event.end - event.start)
  return texts


def _text_table(name: str, texts: dict[str, int]) -> pa.Table:
  """Texts by index, such that pandas makes the text the index, as LeRobot expects."""
  text = {'name': name, 'field_name': name, 'pandas_type': 'unicode', 'numpy_type': 'object'}
  index = {
    'name': f'{name}_index',
    'field_name': f'{name}_index',
    'pandas_type': 'int64',
    'numpy_type': 'int64',
  }
  pandas = {
    'index_columns': [name],
    'column_indexes': [],
    'columns': [{**index, 'metadata': None}, {**text, 'metadata': None}],
  }
  columns = {f'{name}_index': list(texts.values()), name: list(texts)}
  schema = pa.schema(
    [(f'{name}_index', pa.int64()), (name, pa.string())], {'pandas': json.dumps(pandas)}
  )
  return pa.table(columns, schema=schema)


def _video_feature(size: tuple[int, int], fps: float, settings: WriteSettings) -> dict[str, Any]:
  height, width = size
  info = {
    'video.height': height,
    'video.width': width,
    'video.codec': settings.codec,
    'video.pix_fmt': 'yuv420p',
    'video.is_depth_map': False,
    'video.fps': fps,
    'video.channels': 3,
    'has_audio': False,
    'video.g': settings.gop,
    'video.crf': settings.crf,
  }
  names = ['height', 'width', 'channels']
  return {'dtype': 'video', 'shape': [height, width, 3], 'names': names, 'info': info}


def _value(dtype: str) -> dict[str, str]:
  return {'dtype': dtype, '_type': 'Value'}


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=4), 'utf-8')
