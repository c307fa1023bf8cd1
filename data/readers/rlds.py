"""RLDS / TFDS data sets in TFRecord form, read without TensorFlow.

The layout understood is BridgeData V2's: one record per episode with `steps` of 7-D state (x, y, z
m, roll, pitch, yaw rad, gripper 0..1, 1 = open) and 7-D action. What its action means was checked
on real clips: position and rotation are increments in the robot base frame (rotation applied from
the left) that bring state[t] towards state[t + 1], the gripper is the absolute command.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import struct
from collections.abc import Iterator
from typing import Any, Literal

import google_crc32c
import numpy as np
import tensorflow_datasets as tfds

from wallwm_jax.data.schema import EpisodeRecord, EventSpan, Quarantined
from wallwm_jax.geometry.poses import euler_to_matrix, matmul3, matrix_to_rot6d
from wallwm_jax.types import DataError

GRIPPER_SLACK = 0.05  # sensor overshoot that is clipped; more means another convention
UNLABELLED = 'unlabelled'


@dataclasses.dataclass(frozen=True)
class RldsSpec:
  """Which feature of a data set is what.

  cameras: image features of `observation`, they name the views; present: episode_metadata flag of a
  camera ('{}' is its name). state, instruction: feature names. action: 'delta' (base-frame
  increments) or 'absolute' target poses.
  """

  cameras: tuple[str, ...]
  present: str = 'has_{}'
  state: str = 'state'
  instruction: str = 'language_instruction'
  action: Literal['delta', 'absolute'] = 'delta'
  fps: float = 5.0

  @classmethod
  def detect(cls, features: Any) -> RldsSpec:
    """The Bridge layout with whatever cameras the data set has; raises DataError if it has another
    one."""
    steps = features['steps'].feature
    expected = {'observation': None, 'action': (7,), 'language_instruction': ()}
    for name, shape in expected.items():
      if name not in steps or (shape is not None and tuple(steps[name].shape) != shape):
        got = tuple(steps[name].shape) if name in steps else f'only {sorted(steps)}'
        raise DataError(
          f'RLDS steps: expected feature {name!r} of shape {shape}, got {got}. Pass an RldsSpec.'
        )
    observation = steps['observation']
    if 'state' not in observation or tuple(observation['state'].shape) != (7,):
      raise DataError(
        f'RLDS observation: expected a 7-D state, got {sorted(observation)}. Pass an RldsSpec.'
      )
    cameras = tuple(
      sorted(k for k in observation if isinstance(observation[k], tfds.features.Image))
    )
    if not cameras:
      raise DataError(f'RLDS observation: expected image features, got {sorted(observation)}.')
    return cls(cameras)


class RldsReader:
  """Iterates over the episodes of one split as EpisodeRecord | Quarantined.

  Args:
    source: directory with features.json and the TFRecord files (or its parent, if that holds one
      version).
    split: TFDS split; spec: None detects the Bridge layout.

  Raises:
    DataError: not such a directory, features that do not fit, or (while iterating) a file that is
      truncated, has a corrupt record length, or fewer records than promised.
  """

  def __init__(self, source: str | os.PathLike, split: str = 'train', spec: RldsSpec | None = None):
    self._dir = _version_dir(pathlib.Path(source))
    self._info = tfds.builder_from_directory(str(self._dir)).info
    if split not in self._info.splits:
      raise DataError(f'{self._dir}: expected split {split!r}, found {sorted(self._info.splits)}.')
    self._files = [pathlib.Path(path) for path in self._info.splits[split].filepaths]
    bad = [path.name for path in self._files if '.tfrecord' not in path.name]
    if bad:
      raise DataError(f'{self._dir}: expected TFRecord files, got {bad[0]}.')
    self._shard_lengths = self._info.splits[split].shard_lengths
    self.spec = spec or RldsSpec.detect(self._info.features)
    self.name = self._info.name

  def __len__(self) -> int:
    return sum(self._shard_lengths)

  def __iter__(self) -> Iterator[EpisodeRecord | Quarantined]:
    for path, expected in zip(self._files, self._shard_lengths, strict=True):
      found = 0
      for raw in read_tfrecords(path):
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
      episode = self._info.features.deserialize_example_np(raw)
      steps = list(episode['steps'])
    except Exception as error:  # tfds raises whatever the malformed bytes provoke
      return Quarantined(place, self.name, f'record cannot be decoded ({type(error).__name__})')
    metadata = episode.get('episode_metadata', {})
    name = f'{_text(metadata["file_path"])}#{place}' if 'file_path' in metadata else place
    try:
      return self._record(name, steps, metadata)
    except DataError as error:
      return Quarantined(name, self.name, str(error))

  def _record(self, name: str, steps: list[dict], metadata: dict) -> EpisodeRecord:
    if len(steps) < 2:
      raise DataError(f'expected at least 2 steps, got {len(steps)}')
    frames = {
      camera: np.stack([s['observation'][camera] for s in steps]) for camera in self.spec.cameras
    }
    views = self._present(frames, metadata)
    raw_state = np.stack([s['observation'][self.spec.state] for s in steps])
    state = canonical_pose(raw_state)
    actions = commanded_pose(raw_state, np.stack([s['action'] for s in steps]), self.spec.action)
    instruction = _text(steps[0][self.spec.instruction])
    captions = {'L3': instruction, 'L1': instruction} if instruction else {}
    event = EventSpan(
      0, len(steps), leading_verb(instruction), captions, () if instruction else ('no_caption',)
    )
    return EpisodeRecord(
      episode_id=name,
      source=self.name,
      fps=self.spec.fps,
      views=views,
      frames={view: frames[view] for view in views},
      state=state,
      actions=actions,
      events=(event,),
      calibration={view: None for view in views},
    )

  def _present(self, frames: dict[str, np.ndarray], metadata: dict) -> tuple[str, ...]:
    """Cameras that really recorded. Where the flags are set they decide, and a flagged but blank
    camera is an error; where none is set (published samples leave them all False) the pixels
    decide."""
    flags = {
      camera: bool(metadata.get(self.spec.present.format(camera), False)) for camera in frames
    }
    blank = {camera: int(x.min()) == int(x.max()) for camera, x in frames.items()}
    if any(flags.values()):
      broken = [camera for camera in frames if flags[camera] and blank[camera]]
      if broken:
        raise DataError(f'missing camera: {broken} are flagged as present but blank')
      return tuple(camera for camera in frames if flags[camera])
    views = tuple(camera for camera in frames if not blank[camera])
    if not views:
      raise DataError(f'missing camera: all of {sorted(frames)} are blank')
    return views


def canonical_pose(x: np.ndarray) -> np.ndarray:
  """[T, 7] (x y z m, roll pitch yaw rad, gripper) -> float32 [T, 10]; raises DataError on another
  gripper range."""
  x = np.asarray(x, np.float64)
  return _pose(x[:, :3], euler_to_matrix(x[:, 3:6]), x[:, 6:])


def commanded_pose(state: np.ndarray, action: np.ndarray, convention: str) -> np.ndarray:
  """Absolute targets, float32 [T, 10], of actions [T, 7] given the measured states [T, 7]."""
  if convention == 'absolute':
    return canonical_pose(action)
  state, action = np.asarray(state, np.float64), np.asarray(action, np.float64)
  rotation = matmul3(euler_to_matrix(action[:, 3:6]), euler_to_matrix(state[:, 3:6]))
  return _pose(state[:, :3] + action[:, :3], rotation, action[:, 6:])


def leading_verb(instruction: str) -> str:
  """The balancing label of an imperative instruction: its first word."""
  words = re.findall(r'[a-z]+', instruction.lower())
  return words[0] if words else UNLABELLED


def read_tfrecords(path: pathlib.Path) -> Iterator[bytes | None]:
  """Payloads of a TFRecord file; None for a record whose payload checksum fails.

  Raises:
    DataError: the file ends inside a record or a record's length is corrupt (nothing after it can
      be found).
  """
  with open(path, 'rb') as f:
    number = 0
    while header := f.read(12):
      if len(header) < 12:
        raise DataError(f'{path}: truncated in the header of record {number}.')
      length, length_crc = struct.unpack('<QI', header)
      if _masked_crc(header[:8]) != length_crc:
        raise DataError(f'{path}: length of record {number} does not match its checksum.')
      payload, tail = f.read(length), f.read(4)
      if len(payload) < length or len(tail) < 4:
        raise DataError(f'{path}: truncated in record {number} ({len(payload)} of {length} bytes).')
      yield payload if _masked_crc(payload) == struct.unpack('<I', tail)[0] else None
      number += 1


def _masked_crc(data: bytes) -> int:
  """TFRecord's crc32c: rotated right by 15 bits plus a constant."""
  crc = google_crc32c.value(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _pose(position: np.ndarray, rotation: np.ndarray, gripper: np.ndarray) -> np.ndarray:
  if gripper.min() < -GRIPPER_SLACK or gripper.max() > 1 + GRIPPER_SLACK:
    raise DataError(
      f'gripper: expected 0..1 (1 = open), got {gripper.min():.3g}..{gripper.max():.3g}'
    )
  return np.concatenate([position, matrix_to_rot6d(rotation), np.clip(gripper, 0, 1)], -1).astype(
    np.float32
  )


def _text(value: bytes | str) -> str:
  return value.decode('utf-8', 'replace') if isinstance(value, bytes) else str(value)


def _version_dir(source: pathlib.Path) -> pathlib.Path:
  candidates = [source, *sorted(source.glob('*/'))] if source.is_dir() else []
  found = [path for path in candidates if (path / 'features.json').is_file()]
  if len(found) != 1:
    raise DataError(
      f'{source}: expected one TFDS directory with features.json, found {len(found)}. '
      'Name the version directory.'
    )
  return found[0]
