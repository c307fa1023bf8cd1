"""How stored parameters are cut: into chunks that single devices read, and files that hold them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import AbstractMesh

from wallwm_jax.config import MeshConfig
from wallwm_jax.parallel.mesh import MESH_AXES
from wallwm_jax.parallel.rules import (
  PARAM_RULES,
  QWEN_RULES,
  UMT5_RULES,
  LogicalAxes,
  logical_axes,
  mesh_rules,
  partition_spec,
)
from wallwm_jax.types import ConfigError

BLOCK_BYTES = 64 * 2**20  # of one file: bounds the memory of a conversion
SMALL_BYTES = 4 * 2**20  # stacked parameters up to this size are one block, not one per layer
_RULES = {'text': UMT5_RULES, 'vlm': QWEN_RULES}  # of the other components: PARAM_RULES

Shape = tuple[int, ...]
Box = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Grid:
  """block: shape of a file, a multiple of `chunk`: shape of what is read at once."""

  block: Shape
  chunk: Shape


def parse_mesh(text: str) -> dict[str, int]:
  """Axis sizes of `fsdp=8,tensor=2`, for hosts that do not have those devices.

  Raises:
    ConfigError: an unknown or repeated axis, or no size >= 1.
  """
  sizes: dict[str, int] = {}
  for part in filter(None, text.split(',')):
    axis, _, size = part.partition('=')
    if axis not in MESH_AXES or axis in sizes or not size.isdigit() or int(size) < 1:
      raise ConfigError(
        f'--mesh {text}: expected each of {", ".join(MESH_AXES)} at most once with a size >= 1, '
        f'e.g. fsdp=8,tensor=2; got {part!r}.'
      )
    sizes[axis] = int(size)
  return sizes


def grids(
  component: str,
  shapes: Mapping[str, Shape],
  itemsizes: Mapping[str, int],
  stacked: frozenset[str],
  mesh: Mapping[str, int],
) -> dict[str, Grid]:
  """Grid per parameter path.

  Args:
    component: first part of the path that the sharding rules see.
    stacked: paths with a leading layer axis; a block of them holds one layer, unless they are
      small.
    mesh: axis sizes; chunks divide the shards of the default sharding rules on it. Parameters
      without a rule are not split.

  Raises:
    ConfigError: a size that the mesh does not divide.
  """
  devices = AbstractMesh(tuple(mesh.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
  table = mesh_rules(MeshConfig().rules, devices)
  result = {}
  for path, shape in shapes.items():
    shard = _shard_shape(component, path, shape, devices, table)
    small = path not in stacked or math.prod(shape) * itemsizes[path] <= SMALL_BYTES
    rows = shape[:1] if small else (1,)
    chunk = shard if small else (1, *shard[1:])
    chunk = _fit(chunk, BLOCK_BYTES // itemsizes[path])
    block = _grow(chunk, (*rows, *shape[1:]), BLOCK_BYTES // itemsizes[path])
    result[path] = Grid(block, chunk)
  return result


def boxes(shape: Shape, block: Shape) -> Iterator[Box]:
  """The blocks of an array, in C order."""
  starts = [range(0, size, step) for size, step in zip(shape, block, strict=True)]
  for corner in itertools.product(*starts):
    yield tuple(slice(i, min(i + b, n)) for i, b, n in zip(corner, block, shape))


def component_axes(component: str, path: str, ndim: int) -> LogicalAxes:
  """Logical axes of a parameter of a component.

  Raises:
    ConfigError: it has no sharding rule.
  """
  return logical_axes(f'{component}/{path}', ndim, _RULES.get(component, PARAM_RULES))


def _shard_shape(component: str, path: str, shape: Shape, mesh: AbstractMesh, table) -> Shape:
  try:
    axes = component_axes(component, path, len(shape))
  except ConfigError:
    return shape
  axes = tuple(a if size > 1 else None for a, size in zip(axes, shape, strict=True))
  where = f'parameter {component + "/" + path!r}'
  spec = partition_spec(axes, shape, table, mesh, where)
  return jax.sharding.NamedSharding(mesh, spec).shard_shape(shape)


def _fit(chunk: Shape, limit: int) -> Shape:
  """`chunk` with leading axes divided until it has at most `limit` elements."""
  sizes = list(chunk)
  for axis in range(len(sizes)):
    while math.prod(sizes) > limit and sizes[axis] > 1:
      sizes[axis] //= _smallest_factor(sizes[axis])
  return tuple(sizes)


def _grow(chunk: Shape, whole: Shape, limit: int) -> Shape:
  """The largest multiple of `chunk` within `whole` with at most `limit` elements, or `chunk`."""
  sizes = list(chunk)
  for axis in reversed(range(len(sizes))):
    room = max(1, limit // math.prod(sizes))
    wanted = -(-whole[axis] // sizes[axis])
    sizes[axis] *= min(room, wanted)
    if room < wanted:
      break
  return tuple(sizes)


def _smallest_factor(n: int) -> int:
  return next((k for k in range(2, math.isqrt(n) + 1) if n % k == 0), n)
