"""What a conversion is made of: one entry per tensor of a public checkpoint, in both directions.

A family (`wan_dit`, `wan_vae`, `umt5`, `qwen`) lists every tensor that a model of a given config
has: its key in each public naming, its torch shape, and the parameter (and row of a stacked one) it
becomes. Missing, unexpected and misshaped keys, the conversion and its inverse all follow from that
list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from wallwm_jax.types import Params, nest

# The two public namings of a model. 'diffusers': of diffusers or transformers; 'original': of the
# authors' own files. Qwen3.5 has transformers' names only: there 'diffusers' are those of the whole
# model and 'original' those of its text-only class, which has no vision tower.
Naming = Literal['diffusers', 'original']
# same: unchanged. linear: [out, in] -> [in, out]. conv: [O, I, *k] -> [*k, I, O]. flat: a 1x1 or
# depthwise convolution, or one over whole patches, as a matrix, [O, *rest] -> [prod(rest), O].
# patch: [D, C, 1, ph, pw] -> [ph * pw * C, D]. squeeze: sides of 1 removed.
Layout = Literal['same', 'linear', 'conv', 'flat', 'patch', 'squeeze']


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor.

  diffusers, original: its key in either naming, '' where that naming has no such tensor. shape: in
  torch. path: of our parameter; layer: its row of the leading axis, None = not stacked.
  """

  diffusers: str
  original: str
  shape: tuple[int, ...]
  path: str
  layout: Layout = 'same'
  layer: int | None = None

  def key(self, naming: Naming) -> str:
    return getattr(self, naming)

  def to_jax(self, x: np.ndarray) -> np.ndarray:
    """The torch tensor [shape] in our layout, without the layer axis."""
    match self.layout:
      case 'linear':
        return x.T
      case 'conv':
        return np.moveaxis(x, (0, 1), (-1, -2))
      case 'flat':
        return x.reshape(x.shape[0], -1).T
      case 'patch':
        return np.moveaxis(x[:, :, 0], (0, 1), (3, 2)).reshape(-1, x.shape[0])
      case 'squeeze':
        return x.reshape([n for n in x.shape if n > 1] or [1])
    return x

  def to_torch(self, x: np.ndarray) -> np.ndarray:
    """Inverse of `to_jax`."""
    match self.layout:
      case 'linear':
        return x.T
      case 'conv':
        return np.moveaxis(x, (-1, -2), (0, 1))
      case 'flat':
        return x.T.reshape(self.shape)
      case 'patch':
        d, c, _, ph, pw = self.shape
        return np.moveaxis(x.reshape(ph, pw, c, d), (3, 2), (0, 1))[:, :, None]
      case 'squeeze':
        return x.reshape(self.shape)
    return x

  def jax_shape(self) -> tuple[int, ...]:
    """Shape of `to_jax`'s result; nothing is allocated."""
    return self.to_jax(np.broadcast_to(np.int8(0), self.shape)).shape


def parameter_shapes(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
  """{path: shape} of the parameters, stacked ones with their layer axis."""
  shapes, rows = {}, {}
  for entry in entries:
    shapes[entry.path] = entry.jax_shape()
    if entry.layer is not None:
      rows[entry.path] = max(rows.get(entry.path, 0), entry.layer + 1)
  return {path: (rows[path], *s) if path in rows else s for path, s in shapes.items()}


def assemble(
  entries: Iterable[Entry], tensors: Mapping[str, np.ndarray], naming: Naming = 'diffusers'
) -> Params:
  """The parameter tree of a checkpoint that fits in memory; KeyError where a tensor is missing."""
  entries = list(entries)
  leaves: dict[str, np.ndarray] = {}
  for entry in entries:
    x = entry.to_jax(np.asarray(tensors[entry.key(naming)]))
    if entry.layer is None:
      leaves[entry.path] = np.ascontiguousarray(x)
    else:
      leaves.setdefault(entry.path, []).append((entry.layer, x))
  for path, rows in leaves.items():
    if isinstance(rows, list):
      leaves[path] = np.stack([x for _, x in sorted(rows, key=lambda row: row[0])])
  return nest(leaves)
