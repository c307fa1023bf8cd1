"""What the numbers of a raw data set mean: one small YAML file per data set.

A data set says how its features are called and shaped, hardly ever whether an action is a target
or an increment, in which frame, in which unit, and which end of the gripper's range is open. A
spec says it, and nothing is assumed where it is silent:

  cameras:                                       # views, in this order
  - {feature: observation.images.corner, view: corner}
  arms:                                          # one or two; [] reads video only
  - state:
      position: {feature: observation.state, channels: [x, y, z], unit: m}
      rotation: {format: none}                   # the gripper never turns
      gripper: {feature: observation.state, channel: gripper, open: 1, closed: 0}
    action:                                      # leave out where nothing was commanded
      convention: delta_base
      position: {feature: action, channels: [dx, dy, dz], unit: m, scale: 0.01}
      rotation: {format: none}
      gripper: {feature: action, channel: grip, open: -1, closed: 1}
  captions:
  - {level: L3, feature: task}
  events: {feature: phase}

Features of RLDS are paths below `steps` ('observation/state'), those of an episode start with
'episode_metadata/'. Channels are names (where the data set has them) or indices.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import yaml

from wallwm_jax.data.schema import LEVELS
from wallwm_jax.errors import ConfigError

Convention = Literal['absolute', 'delta_base', 'delta_tool']
RotationFormat = Literal[
  'none', 'euler', 'axis_angle', 'quaternion_xyzw', 'quaternion_wxyz', 'rot6d', 'matrix'
]
CHANNELS = {
  'none': 0,
  'euler': 3,
  'axis_angle': 3,
  'quaternion_xyzw': 4,
  'quaternion_wxyz': 4,
  'rot6d': 6,
  'matrix': 9,
}
ANGLES = ('euler', 'axis_angle')  # formats that have a unit
METRES = {'m': 1.0, 'cm': 1e-2, 'mm': 1e-3}


@dataclasses.dataclass(frozen=True)
class Camera:
  """A camera feature and the view it becomes; present: the episode's flag that says whether it
  recorded ('' = it always did)."""

  feature: str
  view: str
  present: str = ''


@dataclasses.dataclass(frozen=True)
class Position:
  """Three channels; metres = raw * scale * unit. scale: m per raw unit of e.g. a normalised
  action."""

  feature: str
  channels: tuple[str | int, ...]
  unit: Literal['m', 'cm', 'mm']
  scale: float = 1.0

  def __post_init__(self):
    _require(len(self.channels) == 3, f'position.channels: expected 3, got {list(self.channels)}.')
    _require(self.scale != 0, 'position.scale: expected a factor that is not 0.')


@dataclasses.dataclass(frozen=True)
class Rotation:
  """Rotation channels in a format.

  none: the state never turns, or the action commands no rotation (it keeps the measured one).
  euler: angles about the axes of `order`, lower case about fixed, upper case about moving axes
  ('xyz' = roll, pitch, yaw). matrix: row-major 3 x 3. rot6d: its first two columns. scale: as of a
  position, for angles.
  """

  format: RotationFormat
  feature: str = ''
  channels: tuple[str | int, ...] = ()
  unit: Literal['rad', 'deg'] | None = None
  order: str = ''
  scale: float = 1.0

  def __post_init__(self):
    count = CHANNELS[self.format]
    _require(
      len(self.channels) == count and bool(self.feature) == bool(count),
      f'rotation: {self.format} expects a feature and {count} channels, got '
      f'{self.feature!r} and {list(self.channels)}.'
      if count
      else f'rotation: none expects no feature and no channels, got {self.feature!r}.',
    )
    angles = self.format in ANGLES
    _require(
      (self.unit is not None) == angles,
      f'rotation.unit: expected {"rad or deg" if angles else "none"} for {self.format}, '
      f'got {self.unit}.',
    )
    _require(angles or self.scale == 1, f'rotation.scale: only angles have one, not {self.format}.')
    euler = self.format == 'euler'
    good = len(self.order) == 3 and (self.order.islower() or self.order.isupper())
    good = good and set(self.order.lower()) <= set('xyz')
    _require(
      good if euler else not self.order,
      'rotation.order: expected three axes such as xyz (fixed) or ZYX (moving) '
      f'for euler and nothing otherwise, got {self.order!r} for {self.format}.',
    )


@dataclasses.dataclass(frozen=True)
class Gripper:
  """One channel; open, closed: its raw values at the ends of its range (canonical 1 and 0)."""

  feature: str
  channel: str | int
  open: float
  closed: float

  def __post_init__(self):
    _require(
      self.open != self.closed,
      f'gripper: open and closed are both {self.open}; expected the two ends of its range.',
    )


@dataclasses.dataclass(frozen=True)
class State:
  """The measured end-effector pose of one arm, absolute in the robot base frame."""

  position: Position
  rotation: Rotation
  gripper: Gripper


@dataclasses.dataclass(frozen=True)
class Action:
  """What is commanded. convention: absolute target poses in the base frame, or increments of the
  pose measured in the same frame, expressed in the base frame or in the tool's. The gripper is
  always an absolute command."""

  convention: Convention
  position: Position
  rotation: Rotation
  gripper: Gripper


@dataclasses.dataclass(frozen=True)
class Arm:
  """One arm; action None: nothing was commanded or recorded."""

  state: State
  action: Action | None = None


@dataclasses.dataclass(frozen=True)
class Text:
  """Text that holds for a time. feature: a text feature, an id per frame, or one of LeRobot's
  tables: task, subtask, sparse_subtask, dense_subtask, language_persistent (with the style of its
  rows). labels: text of an id, where the data set has none."""

  feature: str
  style: str = ''
  labels: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Caption(Text):
  """Text that captions one level of schema.LEVELS."""

  level: str = ''

  def __post_init__(self):
    _require(self.level in LEVELS, f'caption.level: expected one of {LEVELS}, got {self.level!r}.')


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
  """How to read one data set.

  name: its name in the store ('' = the data set's own); fps: Hz, None = the data set's own.
  captions and events (what marks them): None = what the conventions of the format offer; nothing
  is () and a feature ''.
  """

  cameras: tuple[Camera, ...]
  arms: tuple[Arm, ...]
  name: str = ''
  fps: float | None = None
  captions: tuple[Caption, ...] | None = None
  events: Text | None = None

  def __post_init__(self):
    views = [camera.view for camera in self.cameras]
    _require(len(views) > 0, 'cameras: expected at least one, got none.')
    _require(
      all(views) and len(set(views)) == len(views),
      f'cameras: expected distinct view names, got {views}.',
    )
    _require(len(self.arms) <= 2, f'arms: expected at most 2, got {len(self.arms)}.')
    _require(
      len({arm.action is None for arm in self.arms}) <= 1,
      'arms: expected an action for every arm or for none.',
    )
    _require(self.fps is None or self.fps > 0, f'fps: expected > 0 Hz, got {self.fps}.')

  @property
  def numeric_features(self) -> tuple[str, ...]:
    """Features that poses are made of, each once."""
    poses = [p for arm in self.arms for p in (arm.state, arm.action) if p is not None]
    names = [part.feature for p in poses for part in (p.position, p.rotation, p.gripper)]
    return tuple(dict.fromkeys(name for name in names if name))


def load_spec(path: str | os.PathLike) -> DatasetSpec:
  """Reads a spec; raises ConfigError that names the file, the field, what was expected and got."""
  try:
    data = yaml.safe_load(pathlib.Path(path).read_text('utf-8'))
  except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
    raise ConfigError(f'{path}: expected a YAML file with a data set spec ({error}).') from None
  try:
    return from_plain(data)
  except ConfigError as error:
    raise ConfigError(f'{path}: {error}') from None


def from_plain(data: Any) -> DatasetSpec:
  """The spec of plain dicts and lists; raises ConfigError."""
  return _build(DatasetSpec, data, 'spec')


def to_plain(spec: DatasetSpec) -> dict[str, Any]:
  """Inverse of `from_plain`; fields at their default are left out."""
  return _plain(spec)


def dump_spec(spec: DatasetSpec) -> str:
  """The YAML text of a spec."""
  return yaml.safe_dump(to_plain(spec), sort_keys=False, width=100)


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def _build(kind: Any, value: Any, where: str) -> Any:
  """A value of the annotated type from plain data."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    return _build_union(args, value, where)
  if origin is Literal:
    _require(value in args, f'{where}: expected one of {list(args)}, got {value!r}.')
    return value
  if origin is tuple:
    _require(isinstance(value, list), f'{where}: expected a list, got {value!r}.')
    return tuple(_build(args[0], x, f'{where}[{i}]') for i, x in enumerate(value))
  if origin is Mapping:
    _require(isinstance(value, dict), f'{where}: expected a mapping, got {value!r}.')
    return {str(k): str(v) for k, v in value.items()}
  if dataclasses.is_dataclass(kind):
    return _build_dataclass(kind, value, where)
  return _build_scalar(kind, value, where)


def _build_union(options, value: Any, where: str) -> Any:
  if value is None:
    _require(type(None) in options, f'{where}: expected a value, got nothing.')
    return None
  options = [kind for kind in options if kind is not type(None)]
  if set(options) == {str, int}:  # a channel
    good = isinstance(value, (str, int)) and not isinstance(value, bool)
    _require(good, f'{where}: expected a channel name or index, got {value!r}.')
    return value
  return _build(options[0], value, where)


def _build_dataclass(kind: type, value: Any, where: str) -> Any:
  _require(isinstance(value, dict), f'{where}: expected fields of {kind.__name__}, got {value!r}.')
  hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
  for name in value:
    if name not in fields:
      close = difflib.get_close_matches(str(name), fields, n=1)
      hint = f'Did you mean {close[0]!r}?' if close else f'Known: {", ".join(fields)}.'
      raise ConfigError(f'{where}: unknown field {name!r}. {hint}')
  missing = [name for name, field in fields.items() if name not in value and _required(field)]
  _require(not missing, f'{where}: expected {missing}, got only {sorted(value)}.')
  built = {name: _build(hints[name], x, f'{where}.{name}') for name, x in value.items()}
  try:
    return kind(**built)
  except ConfigError as error:
    raise ConfigError(f'{where}: {error}') from None


def _required(field: dataclasses.Field) -> bool:
  return field.default is field.default_factory is dataclasses.MISSING


def _build_scalar(kind: type, value: Any, where: str) -> Any:
  if kind is float and not isinstance(value, bool):
    try:
      return float(value)  # YAML 1.1 reads 1e-2 as text
    except (TypeError, ValueError):
      pass
  elif isinstance(value, kind):
    return value
  raise ConfigError(f'{where}: expected {kind.__name__}, got {value!r}.')


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    fields = [
      (f, getattr(value, f.name))
      for f in dataclasses.fields(value)
      if _required(f) or getattr(value, f.name) not in (f.default, {})
    ]
    return {f.name: _plain(x) for f, x in fields}
  if isinstance(value, tuple):
    return [_plain(x) for x in value]
  return dict(value) if isinstance(value, Mapping) else value
