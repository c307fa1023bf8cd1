"""Activation sharding by logical axis names; models say what an axis is, never where it lives."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


def splits_only_batch(size: int) -> bool:
  """Whether every device holds whole samples, as far as arrays with `size` leading entries go: no
  mesh, one device, or a mesh whose devices all split the batch, evenly.
  """
  if _ACTIVE.get() is None:
    return True
  mesh, table = _ACTIVE.get()
  parts = math.prod(mesh.shape[axis] for axis in table.get('batch', ()))
  return mesh.size == parts and size % parts == 0


def map_batch(run: Callable, batched: Sequence[Any], *arrays: Any) -> jax.Array:
  """run(*arrays), by each device on its own part of the batch: for kernels, which the compiler
  cannot split over devices.

  Args:
    run: of arrays (or trees of them), to one array that leads with the batch. No sample may depend
      on another.
    batched: like `arrays`, True for those that lead with the batch, or with batch and further axes
      merged, batch first; every device sees all of the others.

  Raises:
    ConfigError: the mesh splits more than the batch (see `splits_only_batch`).
  """
  if _ACTIVE.get() is None or _ACTIVE.get()[0].size == 1:
    return run(*arrays)
  flags = zip(jax.tree.leaves(arrays), jax.tree.leaves(tuple(batched)), strict=True)
  sizes = [x.shape[0] for x, own in flags if own]
  if not all(map(splits_only_batch, sizes)):
    raise ConfigError(f'map_batch: the mesh in context does not split leading axes {sizes} alone.')
  mesh, table = _ACTIVE.get()
  split = PartitionSpec(table['batch'])
  specs = jax.tree.map(lambda own: split if own else PartitionSpec(), tuple(batched))
  return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)(*arrays)
