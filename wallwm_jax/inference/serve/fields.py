"""What a request holds, read field by field: each is what it should be, or an error names it, says
what was expected and what came."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from wallwm_jax.config import ExperimentConfig, nearest
from wallwm_jax.types import DataError

EVENT, PROMPT = 'event', 'prompt'  # the next event, the whole task
TEXTS = (EVENT, PROMPT)
LONGEST = 2000  # characters of a text
_SHOWN = 80  # characters of a field's name in an error


@dataclasses.dataclass(frozen=True)
class Keys:
  """What requests call things. views: {view of the model: field}; state: field of the state [A]."""

  views: Mapping[str, str]
  state: str = 'observation/state'

  @classmethod
  def of(cls, config: ExperimentConfig) -> Keys:
    """'observation/' and the model's own names."""
    return cls({view: f'observation/{view}' for view in config.model.views})


def check_names(request: Mapping[str, Any], known: Collection[str]) -> None:
  """Raises DataError where a field is none of the known ones."""
  for name in request:
    if name not in known:
      shown = str(name)[:_SHOWN]
      raise DataError(f'{shown}: not a field of this policy.{nearest(shown, sorted(known))}')


def flag(request: Mapping[str, Any], name: str) -> bool:
  """True or false, false where it is missing."""
  value = request.get(name, False)
  if not isinstance(value, bool):
    raise DataError(f'{name}: expected true or false, got {type(value).__name__}.')
  return value


def claim(request: Mapping[str, Any], name: str, true: Any) -> None:
  """Raises DataError where a request counts on another value than the true one."""
  value = request.get(name, true)
  if type(value) is not type(true) or value != true:
    raise DataError(f'{name}: expected {true!r}, that of this model, got {reprlib.repr(value)}.')


def choice(request: Mapping[str, Any], name: str, known: Collection[str], default: str) -> str:
  """One of the known names."""
  value = request.get(name, default)
  if not isinstance(value, str) or value not in known:
    raise DataError(f'{name}: expected one of {list(known)}, got {reprlib.repr(value)}.')
  return value


def text(request: Mapping[str, Any], name: str) -> str:
  """A text of 1..LONGEST characters, '' where it is missing."""
  if name not in request:
    return ''
  value = request[name]
  if not isinstance(value, str) or not value.strip() or len(value) > LONGEST:
    got = f'{len(value)} characters' if isinstance(value, str) else type(value).__name__
    raise DataError(f'{name}: expected a text of 1..{LONGEST} characters, got {got}.')
  return value


def numbers(request: Mapping[str, Any], name: str, dim: int) -> np.ndarray:
  """Finite numbers, as float32 [dim]."""
  if name not in request:
    raise DataError(f'{name}: missing. Expected numbers [{dim}].')
  try:
    values = np.asarray(request[name])
  except ValueError:
    raise DataError(f'{name}: expected numbers [{dim}], got lists of unequal lengths.') from None
  if values.shape != (dim,) or values.dtype.kind not in 'fiu':
    raise DataError(f'{name}: expected numbers [{dim}], got {values.dtype} {list(values.shape)}.')
  with np.errstate(over='ignore'):
    values = values.astype(np.float32)
  if not np.isfinite(values).all():
    raise DataError(f'{name}: NaN or infinite values at {np.flatnonzero(~np.isfinite(values))}.')
  return values


def steps(request: Mapping[str, Any], name: str) -> int:
  """A number of steps >= 0."""
  value = request.get(name)
  if type(value) is not int or value < 0:
    raise DataError(f'{name}: expected a number of steps >= 0, got {reprlib.repr(value)}.')
  return value


def pictures(request: Mapping[str, Any], name: str) -> np.ndarray:
  """uint8 [T, H, W, 3] of one camera."""
  if name not in request:
    raise DataError(f'{name}: missing. Expected a picture uint8 [H, W, 3].')
  x = request[name]
  if not isinstance(x, np.ndarray):
    raise DataError(f'{name}: expected an array uint8 [H, W, 3], got {type(x).__name__}.')
  if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.shape[-1] != 3 or not x.size:
    raise DataError(
      f'{name}: expected uint8 [H, W, 3], or [T, H, W, 3] since the last request, got '
      f'{x.dtype} {list(x.shape)}.'
    )
  return x if x.ndim == 4 else x[None]
