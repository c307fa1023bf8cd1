"""The two-way bridge between config dataclasses and ml_collections."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

import ml_collections

from wallwm_jax.config.run import ExperimentConfig
from wallwm_jax.types import ConfigError


def to_config_dict(config: ExperimentConfig) -> ml_collections.ConfigDict:
  """A locked, type-safe ConfigDict of every field, ready for `--config.a.b=value` overrides."""
  result = ml_collections.ConfigDict(dataclasses.asdict(config))
  return result.lock()


def from_config_dict(config: ml_collections.ConfigDict) -> ExperimentConfig:
  """The validated dataclass tree of a ConfigDict.

  Raises:
    ConfigError: unknown field (with the nearest name), wrong type or an illegal value, naming the
      field.
  """
  return _build(ExperimentConfig, config.to_dict(), 'config')


def _build(cls, values: dict[str, Any], path: str):
  hints = typing.get_type_hints(cls)
  names = [f.name for f in dataclasses.fields(cls)]
  for key in values:
    if key not in names:
      raise ConfigError(f'{path}.{key}: unknown field.{nearest(key, names)}')
  try:
    return cls(
      **{key: _coerce(hints[key], value, f'{path}.{key}') for key, value in values.items()}
    )
  except ConfigError as error:
    raise error if str(error).startswith('config') else ConfigError(f'config: {error}') from None


def _coerce(hint, value, path: str):
  """`value` as the annotated type; ints widen to floats and lists to tuples, nothing else is
  converted.
  """
  origin = typing.get_origin(hint)
  if dataclasses.is_dataclass(hint):
    return _build(hint, dict(value), path)
  if origin is Literal:
    if value not in typing.get_args(hint):
      raise ConfigError(f'{path}: expected one of {typing.get_args(hint)}, got {value!r}.')
    return value
  if origin is tuple:
    return _coerce_tuple(hint, value, path)
  if origin in (types.UnionType, typing.Union):
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise ConfigError(f'{path}: expected {hint.__name__}, got {value!r} ({type(value).__name__}).')
  return value


def _coerce_tuple(hint, value, path: str):
  if not isinstance(value, (list, tuple)):
    raise ConfigError(f'{path}: expected a tuple, got {value!r} ({type(value).__name__}).')
  args = typing.get_args(hint)
  if len(args) == 2 and args[1] is Ellipsis:
    args = (args[0],) * len(value)
  if len(args) != len(value):
    raise ConfigError(f'{path}: expected {len(args)} entries, got {len(value)}: {value!r}.')
  return tuple(_coerce(a, v, f'{path}[{i}]') for i, (a, v) in enumerate(zip(args, value)))


def nearest(name: str, options) -> str:
  """' Did you mean ...?' for the closest option, or the list of options."""
  import difflib

  close = difflib.get_close_matches(name, [str(o) for o in options], n=1)
  return f' Did you mean {close[0]!r}?' if close else f' Known: {", ".join(map(str, options))}.'
