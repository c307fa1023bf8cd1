"""Activation sharding by logical axis names; models say what an axis is, never where it lives."""

from __future__ import annotations

import contextlib
import contextvars

import jax
from jax.sharding import Mesh, NamedSharding

from wallwm_jax.config import nearest
from wallwm_jax.parallel.rules import LOGICAL_AXES, MeshRules, mesh_rules, partition_spec
from wallwm_jax.types import ConfigError

_ACTIVE: contextvars.ContextVar = contextvars.ContextVar('activation_sharding', default=None)


@contextlib.contextmanager
def activation_sharding(mesh: Mesh, rules: MeshRules):
  """While active, `constrain` shards activations over `mesh` by `rules` (`MeshConfig.rules`).

  Enter it inside the function that is jitted: the choice then belongs to the trace. Around the call
  of a function that was traced before, it has no effect.
  """
  token = _ACTIVE.set((mesh, mesh_rules(rules, mesh)))
  try:
    yield
  finally:
    _ACTIVE.reset(token)


def partitioned() -> bool:
  """Whether activations are split over several devices: the compiler cannot split a kernel."""
  return _ACTIVE.get() is not None and _ACTIVE.get()[0].size > 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Asks the compiler to shard `x` by one logical axis (or None) per dimension; identity without a
  mesh.

  Raises:
    ConfigError: a name that is no logical axis, a number of names other than x.ndim (checked with
      or without a mesh), or a dimension its mesh axes do not divide.
  """
  if len(axes) != x.ndim:
    raise ConfigError(
        f'constrain: expected one axis per dimension of {x.shape}, got {len(axes)}: {axes}.')
  for axis in axes:
    if axis is not None and axis not in LOGICAL_AXES:
      raise ConfigError(f'constrain: unknown logical axis {axis!r}.{nearest(axis, LOGICAL_AXES)}')
  if _ACTIVE.get() is None:
    return x
  mesh, table = _ACTIVE.get()
  spec = partition_spec(axes, x.shape, table, mesh, f'activation of axes {axes}')
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
