"""RLDS / TFDS data sets in TFRecord or ArrayRecord form, read without TensorFlow (or TFDS).

`features.json` says what there is, `dataset_info.json` which files; a record is one episode as a
tf.train.Example whose names are paths ('steps/observation/state') and whose lists run over all
steps. What the numbers mean says a DatasetSpec (detected for BridgeData V2).
"""

from __future__ import annotations

import io
import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from wallwm_jax.data.readers import annotations
from wallwm_jax.data.readers.canonical import robot_poses
from wallwm_jax.data.readers.features import Feature, Features, check_spec
from wallwm_jax.data.readers.layouts import rlds_layout
from wallwm_jax.data.readers.spec import DatasetSpec, Text
from wallwm_jax.data.readers.tfrecord import Values, parse_example, read_tfrecords
from wallwm_jax.data.schema import EpisodeRecord, Quarantined
from wallwm_jax.errors import DataError

METADATA = 'episode_metadata/'
FORMATS = ('tfrecord', 'array_record')


class RldsReader:
  """Iterates over the episodes of one split as EpisodeRecord | Quarantined.

  Args:
    source: directory with features.json and the record files (or its parent, if that holds one
      version).
    split: TFDS split; spec: None detects the Bridge layout.

  Raises:
    UnknownLayoutError: no spec, and not the Bridge layout.
    DataError: not such a directory, a spec that does not fit the features, or (while iterating) a
      file that is truncated, has a corrupt record length, or fewer records than promised.
  """

  def __init__(
    self, source: str | os.PathLike, split: str = 'train', spec: DatasetSpec | None = None
  ):
    self.info = RldsInfo(source)
    self._files = self.info.files(split)
    self.spec = spec or rlds_layout(self.info.folder, self.info.features)
    check_spec(self.spec, self.info.features)
    self.name = self.spec.name or self.info.name
    if self.spec.fps is None:
      raise DataError(f'{self.info.folder}: RLDS records no frame rate; set fps (Hz) in the spec.')

  def __len__(self) -> int:
    return sum(count for _, count in self._files)

  def __iter__(self) -> Iterator[EpisodeRecord | Quarantined]:
    for path, expected in self._files:
      found = 0
      for raw in self.info.records(path):
        yield self._read(f'{path.name}#{found}', raw)
        found += 1
      if found != expected:
        raise DataError(
          f'{path}: expected {expected} records, found {found}. Download the file again.'
        )

  def _read(self, place: str, raw: bytes | None) -> EpisodeRecord | Quarantined:
    if raw is None:
      return Quarantined(place, self.name, 'record payload does not match its checksum')
    try:
      episode = Episode(parse_example(raw), self.info.features)
    except DataError as error:
      return Quarantined(place, self.name, f'record cannot be decoded ({error})')
    file_path = episode.metadata_text('file_path')
    name = f'{file_path}#{place}' if file_path else place
    try:
      return self._record(name, episode)
    except DataError as error:
      return Quarantined(name, self.name, str(error))

  def _record(self, name: str, episode: Episode) -> EpisodeRecord:
    spec = self.spec
    values = {feature: episode.numbers(feature) for feature in spec.numeric_features}
    frames = self._present({c.view: episode.images(c.feature) for c in spec.cameras}, episode)
    lengths = {len(x) for x in (*values.values(), *frames.values())}
    if len(lengths) != 1 or min(lengths) < 2:
      raise DataError(f'expected one length of at least 2 steps, got {sorted(lengths)}')
    (length,) = lengths
    state, actions = robot_poses(spec, self.info.features, values)
    captions = tuple(
      span
      for text in spec.captions or ()
      for span in annotations.caption_spans(text.level, episode.spans(text, length))
    )
    marked = spec.events.feature if spec.events else ''
    marks = episode.spans(spec.events, length, ids=marked) if marked else []
    events = annotations.marked_events(marks, length)
    return EpisodeRecord(
      episode_id=name,
      source=self.name,
      fps=spec.fps,
      views=tuple(frames),
      frames=frames,
      state=state,
      actions=actions,
      events=events or annotations.whole_episode(captions, length),
      calibration={view: None for view in frames},
      captions=captions,
      provenance={'read': {'format': 'rlds', 'events': marked if events else ''}},
    )

  def _present(self, frames: dict[str, np.ndarray], episode: Episode) -> dict[str, np.ndarray]:
    """Cameras that really recorded. Where the flags are set they decide, and a flagged but blank
    camera is an error; where none is set (published samples leave them all False) the pixels
    decide. Cameras without a flag must have recorded."""
    flags = {c.view: not c.present or episode.flag(c.present) for c in self.spec.cameras}
    blank = {view: int(x.min()) == int(x.max()) for view, x in frames.items()}
    if any(flags.values()):
      broken = [view for view in frames if flags[view] and blank[view]]
      if broken:
        raise DataError(f'missing camera: {broken} are flagged as present but blank')
      return {view: x for view, x in frames.items() if flags[view]}
    views = {view: x for view, x in frames.items() if not blank[view]}
    if not views:
      raise DataError(f'missing camera: all of {sorted(frames)} are blank')
    return views


class RldsInfo:
  """What a TFDS directory says about itself; raises DataError if it is none.

  features: {name: Feature}, paths below `steps`, and 'episode_metadata/...'.
  """

  def __init__(self, source: str | os.PathLike):
    self.folder = _version_dir(pathlib.Path(source))
    self._info = _load_json(self.folder / 'dataset_info.json')
    self.features: Features = _features(_load_json(self.folder / 'features.json'))
    self.name, self.version = self._info.get('name', self.folder.parent.name), self._info['version']
    self.format = self._info.get('fileFormat', 'tfrecord')
    if self.format not in FORMATS:
      raise DataError(f'{self.folder}: expected files of format {FORMATS}, got {self.format!r}.')
    self.splits = {
      s['name']: [int(n) for n in s['shardLengths']] for s in self._info.get('splits', ())
    }

  def files(self, split: str) -> list[tuple[pathlib.Path, int]]:
    """Record files of a split and how many records each holds; raises DataError."""
    if split not in self.splits:
      raise DataError(f'{self.folder}: expected split {split!r}, found {sorted(self.splits)}.')
    shards = self.splits[split]
    paths = [self._path(split, i, len(shards)) for i in range(len(shards))]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
      raise DataError(
        f'{self.folder}: expected {len(paths)} files of split {split!r}, {absent} are missing. '
        'Download them again.'
      )
    return list(zip(paths, shards, strict=True))

  def _path(self, split: str, shard: int, count: int) -> pathlib.Path:
    template = next(s for s in self._info['splits'] if s['name'] == split).get(
      'filepathTemplate', '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    )
    names = {'DATASET': self.name, 'SPLIT': split, 'FILEFORMAT': self.format}
    names['SHARD_X_OF_Y'] = f'{shard:05d}-of-{count:05d}'
    try:
      return self.folder / template.format(**names)
    except (KeyError, IndexError, ValueError):
      raise DataError(f'{self.folder}: cannot read the file name template {template!r}.') from None

  def records(self, path: pathlib.Path) -> Iterator[bytes | None]:
    """Payloads of one file; None where a checksum fails."""
    return read_tfrecords(path) if self.format == 'tfrecord' else _read_array_records(path)


class Episode:
  """The lists of one record, shaped as its features say. Every method raises DataError."""

  def __init__(self, lists: dict[str, Values], features: Features):
    self._lists, self._features = lists, features

  def numbers(self, name: str) -> np.ndarray:
    """[T, ...] of a number feature of the steps."""
    x, shape = self._list(f'steps/{name}'), self._features[name].shape
    if not isinstance(x, np.ndarray) or min(shape, default=1) < 1 or x.size % int(np.prod(shape)):
      raise DataError(f'{name}: expected numbers of shape {shape} per step, got {len(x)} values')
    return x.reshape(-1, *shape)

  def texts(self, name: str) -> list[str]:
    """Text per step."""
    return [_text(value) for value in self._list(f'steps/{name}')]

  def images(self, name: str) -> np.ndarray:
    """uint8 [T, H, W, 3] of a camera."""
    frames = []
    for i, encoded in enumerate(self._list(f'steps/{name}')):
      try:
        frames.append(np.asarray(Image.open(io.BytesIO(encoded)).convert('RGB')))
      except (OSError, TypeError, SyntaxError) as error:
        raise DataError(f'{name}: image of step {i} cannot be decoded ({error})') from None
    shapes = {frame.shape for frame in frames}
    declared = self._features[name].shape
    if len(shapes) != 1 or any(d not in (-1, g) for d, g in zip(declared, next(iter(shapes)))):
      raise DataError(f'{name}: expected images of shape {declared}, got {sorted(shapes)}')
    return np.stack(frames)

  def spans(self, text: Text, length: int, ids: str = '') -> list[annotations.Span]:
    """Where a text holds. ids: events are wanted: name an id without a label by it."""
    name = text.feature
    if name not in self._features:
      raise DataError(f'expected a feature {name!r}, got {sorted(self._features)}')
    if name.startswith(METADATA):
      return annotations.text_spans([self.metadata_text(name.removeprefix(METADATA))] * length)
    if self._features[name].kind == 'text':
      values = self.texts(name)
      spans = annotations.text_spans(values)
    elif text.labels or ids:
      values = self.numbers(name).reshape(-1).tolist()
      spans = annotations.id_spans(values, text.labels, ids)
    else:
      raise DataError(f'{name}: expected text, got numbers. Give their labels in the spec')
    if len(values) != length:
      raise DataError(f'{name}: expected {length} steps, got {len(values)}')
    return spans

  def flag(self, name: str) -> bool:
    """A boolean of the episode's metadata; False where the record has none."""
    value = self._lists.get(name, ())
    return bool(len(value) and value[0])

  def metadata_text(self, name: str) -> str:
    """A text of the episode's metadata; '' where the record has none."""
    value = self._lists.get(METADATA + name, ())
    return _text(value[0]) if isinstance(value, list) and value else ''

  def _list(self, path: str) -> Values:
    if path not in self._lists or not len(self._lists[path]):
      raise DataError(f'expected {path!r}, the record has {sorted(self._lists)}')
    return self._lists[path]


def _features(tree: dict) -> Features:
  found = dict(_walk(tree, ''))
  if not any(path.startswith('steps/') for path in found):
    raise DataError(f'features.json: expected RLDS steps, got {sorted(found)}.')
  kept = ('steps/', METADATA)
  return {path.removeprefix('steps/'): f for path, f in found.items() if path.startswith(kept)}


def _walk(node: dict, path: str) -> Iterator[tuple[str, Feature]]:
  """Leaves of features.json by path."""
  if 'featuresDict' in node:
    for name, child in node['featuresDict']['features'].items():
      yield from _walk(child, f'{path}/{name}' if path else name)
  elif path == 'steps' and 'sequence' in node:
    yield from _walk(node['sequence']['feature'], path)
  else:
    yield path, _leaf(node)


def _leaf(node: dict) -> Feature:
  body = node.get('tensor') or node.get('image') or {}
  shape = tuple(int(n) for n in body.get('shape', {}).get('dimensions', ()))
  dtype = body.get('dtype', '')
  if 'text' in node:
    return Feature('text', 'string', ())
  if 'classLabel' in node:
    return Feature('number', 'int64', ())
  if 'image' in node and dtype in ('', 'uint8') and shape[2:] == (3,):
    return Feature('camera', 'uint8', shape)
  if 'tensor' in node and dtype in ('string', 'object'):
    return Feature('text' if not shape else 'other', 'string', shape)
  plain = 'tensor' in node and body.get('encoding', 'none') == 'none'
  return Feature('number' if plain else 'other', dtype, shape)


def _read_array_records(path: pathlib.Path) -> Iterator[bytes | None]:
  from array_record.python.array_record_module import ArrayRecordReader

  try:
    reader = ArrayRecordReader(str(path))
    count = reader.num_records()
  except (RuntimeError, ValueError, IndexError) as error:
    raise DataError(f'{path}: expected an ArrayRecord file ({error}).') from None
  for i in range(count):
    try:
      yield reader.read([i])[0]
    except (RuntimeError, ValueError, IndexError):
      yield None
  try:
    reader.close()
  except RuntimeError:  # how it tells that it stopped before the end of the file
    raise DataError(f'{path}: damaged ArrayRecord file, {count} records found.') from None


def _text(value: bytes | str) -> str:
  return value.decode('utf-8', 'replace') if isinstance(value, bytes) else str(value)


def _load_json(path: pathlib.Path) -> dict:
  try:
    return json.loads(path.read_text('utf-8'))
  except (OSError, ValueError) as error:
    raise DataError(f'{path}: expected a JSON file of TFDS ({error}).') from None


def _version_dir(source: pathlib.Path) -> pathlib.Path:
  candidates = [source, *sorted(source.glob('*/'))] if source.is_dir() else []
  found = [path for path in candidates if (path / 'features.json').is_file()]
  if len(found) != 1:
    raise DataError(
      f'{source}: expected one TFDS directory with features.json, found {len(found)}. '
      'Name the version directory.'
    )
  return found[0]
