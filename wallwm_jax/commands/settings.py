"""Experiment files and their command-line overrides: `--config F --config.section.field=value`."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
from typing import Any

PREFIX = '--config.'


def load_experiment(path: str | pathlib.Path, overrides: list[str] = ()):
  """The validated config of an experiment file with overrides applied.

  Args:
    path: a Python file that defines `get_config()` returning a ConfigDict (or an ExperimentConfig).
    overrides: arguments of the form `--config.optim.lr=1e-4`.

  Returns:
    ExperimentConfig.

  Raises:
    ConfigError: no such file, no `get_config`, an argument that is not an override, an unknown
      field (with the nearest name) or a value of the wrong type.
  """
  from wallwm_jax.config import ExperimentConfig, from_config_dict, to_config_dict

  config = _get_config(pathlib.Path(path))()
  if isinstance(config, ExperimentConfig):
    config = to_config_dict(config)
  return from_config_dict(apply_overrides(config, overrides))


def _get_config(path: pathlib.Path):
  from wallwm_jax.types import ConfigError

  if not path.is_file():
    raise ConfigError(
      f'--config {path}: expected a Python file that defines get_config(), found none.'
      f'{_others(path)}'
    )
  spec = importlib.util.spec_from_file_location(f'wallwm_experiment_{path.stem}', path)
  if spec is None:
    raise ConfigError(f'--config {path}: expected a Python file (.py).')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not callable(getattr(module, 'get_config', None)):
    raise ConfigError(f'--config {path}: expected a function get_config() in this file.')
  return module.get_config


def _others(path: pathlib.Path) -> str:
  from wallwm_jax.config import nearest

  names = sorted(str(p) for p in path.parent.glob('*.py') if not p.name.startswith('_'))
  return nearest(str(path), names) if names else ''


def apply_overrides(config, overrides: list[str]):
  """A ConfigDict with `--config.a.b=value` arguments applied; values are Python literals.

  The field decides how its text is read: strings are taken as they stand, true/false become bools,
  and a single value given to a tuple field becomes a tuple of one. Types are checked by
  `from_config_dict`.
  """
  import ml_collections

  values = config.to_dict()
  for override in overrides:
    name, text = _split(override)
    section, field = _find(values, name)
    section[field] = _parse(text, section[field])
  return ml_collections.ConfigDict(values, type_safe=False)


def _split(override: str) -> tuple[str, str]:
  from wallwm_jax.types import ConfigError

  name, equals, text = override.removeprefix(PREFIX).partition('=')
  if not override.startswith(PREFIX) or not equals:
    raise ConfigError(
      f'unknown argument {override!r}: expected --config.section.field=value, '
      'e.g. --config.optim.lr=1e-4.'
    )
  return name, text


def _find(values: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
  """(the dict that holds the field, its key)."""
  from wallwm_jax.config import nearest
  from wallwm_jax.types import ConfigError

  *sections, field = name.split('.')
  seen = 'config'
  for key in sections:
    if not isinstance(values.get(key), dict):
      options = [k for k, v in values.items() if isinstance(v, dict)]
      raise ConfigError(f'{seen}.{key}: unknown section.{nearest(key, options)}')
    values, seen = values[key], f'{seen}.{key}'
  if field not in values:
    raise ConfigError(f'{seen}.{field}: unknown field.{nearest(field, values)}')
  if isinstance(values[field], dict):
    raise ConfigError(
      f'{seen}.{field} is a section: set one of its fields, {", ".join(values[field])}.'
    )
  return values, field


def _parse(text: str, current: Any) -> Any:
  if isinstance(current, str):
    return text
  if text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text
  return (value,) if isinstance(current, tuple) and not isinstance(value, (tuple, list)) else value
