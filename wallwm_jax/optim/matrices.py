"""How a parameter tensor is read as independent matrices [B, m, n], fan-in first.

Muon orthogonalises matrices, and what is one matrix of a tensor is a modelling choice: a stack of
layers is many, a fused QKV projection three or one per head, a convolution a single flattened one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import einops
import jax
from jax.sharding import PartitionSpec

from wallwm_jax.types import ConfigError

MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Matrix:
  """An einops pattern from the tensor's axes to (stack, fan_in, fan_out).

  Examples:
    Matrix()                                              stacked layers [L, m, n]
    Matrix('m n -> 1 m n')                                one matrix
    Matrix('l m (p n) -> (p l) m n', (('p', 3),))         a fused QKV kernel, per projection
    Matrix('l m (h d) -> (h l) m d', (('h', 24),))        per head; h leads, so that heads split
                                                          over a mesh axis stay where they are
    Matrix('h w i o -> 1 (h w i) o')                      a convolution, flattened

  sizes: lengths of the pattern's axes that the shape of the tensor leaves open.
  """

  pattern: str = 'l m n -> l m n'
  sizes: tuple[tuple[str, int], ...] = ()

  def shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(stack, fan_in, fan_out) of a tensor of `shape`.

    Raises:
      ConfigError: the pattern does not fit the shape, or does not end in three axes.
    """
    lengths = _axis_lengths(self, tuple(shape))
    return tuple(math.prod(lengths[name] for name in names) for names in self._sides()[1])

  def split(self, x: jax.Array) -> jax.Array:
    """[B, m, n] matrices of a tensor."""
    return einops.rearrange(x, self.pattern, **dict(self.sizes))

  def merge(self, matrices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The tensor of `shape` that `split` makes these matrices of."""
    source, target = self.pattern.split('->')
    lengths = dict(_axis_lengths(self, tuple(shape)))
    del lengths['1']  # einops knows it
    return einops.rearrange(matrices, f'{target} -> {source}', **lengths)

  def spec(
    self, spec: PartitionSpec, shape: tuple[int, ...], mesh_sizes: dict[str, int]
  ) -> tuple[MeshAxes, MeshAxes, MeshAxes]:
    """Mesh axes that split (stack, fan_in, fan_out) when `spec` splits the tensor.

    An axis that would have to split a later factor of a composed axis is dropped: the tensor is
    gathered over it before it is read as matrices.
    """
    lengths = _axis_lengths(self, tuple(shape))
    sources, targets = self._sides()
    leaders = [_leader(names) for names in targets]
    placed: list[MeshAxes] = [()] * len(targets)
    for names, entry in zip(sources, (*spec, *(None,) * len(sources)), strict=False):
      axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
      axes = tuple(a for a in axes if mesh_sizes[a] > 1)
      name = _leader(names)
      if axes and name in leaders and lengths[name] % math.prod(mesh_sizes[a] for a in axes) == 0:
        placed[leaders.index(name)] = axes
    return tuple(placed)

  def _sides(self) -> tuple[list[list[str]], list[list[str]]]:
    if self.pattern.count('->') != 1:
      raise ConfigError(f'Matrix({self.pattern!r}): expected one "->".')
    source, target = (
      [(group or name).split() for group, name in re.findall(r'\(([^)]*)\)|(\S+)', side)]
      for side in self.pattern.split('->')
    )
    if len(target) != 3:
      raise ConfigError(
        f'Matrix({self.pattern!r}): expected three axes (stack, fan_in, fan_out) on the right, '
        f'got {len(target)}.'
      )
    return source, target


@functools.cache
def _axis_lengths(matrix: Matrix, shape: tuple[int, ...]) -> dict[str, int]:
  sources, targets = matrix._sides()
  where = f'Matrix({matrix.pattern!r}) on a tensor of shape {shape}'
  if len(sources) != len(shape):
    raise ConfigError(f'{where}: expected {len(sources)} axes, got {len(shape)}.')
  lengths = {'1': 1} | dict(matrix.sizes)
  for names, size in zip(sources, shape, strict=True):
    unknown = [name for name in names if name not in lengths]
    known = math.prod(lengths[name] for name in names if name in lengths)
    if len(unknown) > 1:
      raise ConfigError(f'{where}: give the sizes of all but one of {unknown}.')
    if unknown:
      lengths[unknown[0]] = size // known
    if math.prod(lengths[name] for name in names) != size:
      raise ConfigError(f'{where}: the axes {names} do not multiply to {size}.')
  if unused := dict(matrix.sizes).keys() - {name for names in sources for name in names}:
    raise ConfigError(f'{where}: sizes are given for {sorted(unused)}, which are not on the left.')
  used, made = ({n for names in side for n in names} - {'1'} for side in (sources, targets))
  if used != made:
    raise ConfigError(f'{where}: the sides name different axes: {sorted(used ^ made)}.')
  return lengths


def _leader(names: list[str]) -> str | None:
  """The slowest-varying axis of a composed one; None if there is none."""
  return next((name for name in names if name != '1'), None)
