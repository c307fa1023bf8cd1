"""Matrices in eight bits, as `layers.Linear` multiplies with them.

In parameter trees such a matrix is a plain dict in the place of the float one:

  q       [..., I, O] int8 or float8_e4m3fn
  scale   [..., N, O] float32, of each block of input channels and each output channel
  smooth  [..., I] float32, what inputs are multiplied by; only where inputs are quantised too

W ~ q * scale / smooth. The N blocks are as equal as can be, the last may be shorter; a leading axis
is that of stacked layers. Whether inputs are quantised is read off the keys: never a flag beside
the weights. XLA fuses the dequantisation of weights into the matrix product.
Source of the smoothing: SmoothQuant (arXiv 2211.10438), eqs. 3-4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax.types import CheckpointError, ConfigError, Params, pytree_dataclass

LARGEST = {'int8': 127.0, 'float8_e4m3fn': 448.0}  # by storage dtype
_SUMS = {'int8': jnp.int32, 'float8_e4m3fn': jnp.float32}  # what products are added up in


@pytree_dataclass
class Quantised:
  """One matrix (or a stack of them) of the module's form; smooth None = inputs stay as they are."""

  q: jax.Array
  scale: jax.Array
  smooth: jax.Array | None = None

  def matmul(self, x, dtype):
    """x [..., I] times the matrix, in `dtype`; with `smooth`, inputs are quantised as well, by a
    scale for each token and block."""
    inputs, (blocks, out) = self.q.shape[0], self.scale.shape
    rows = _block_rows(inputs, blocks)
    x = x.astype(dtype) if self.smooth is None else x.astype(jnp.float32) * self.smooth
    x = _pad(x, -1, blocks * rows).reshape(*x.shape[:-1], blocks, rows)
    step = jnp.ones((), jnp.float32)
    if self.smooth is not None:
      step = _steps(jnp.max(jnp.abs(x), axis=-1, keepdims=True), self.q.dtype)
      x = _rounded(x / step, self.q.dtype)
    step = jnp.broadcast_to(step, (*x.shape[:-1], 1))
    if blocks == 1:
      return (_product(x[..., 0, :], self.q) * step[..., 0, :] * self.scale[0]).astype(dtype)

    def add(total, block):
      x, step, q, scale = block
      return total + _product(x, q) * step * scale, None

    # One block after the other: all sums of all blocks at once would be `blocks` times the output,
    # and the compiler does not fuse scales of blocks into the product: it writes the matrix out.
    q = _pad(self.q, 0, blocks * rows).reshape(blocks, rows, out)
    xs = (jnp.moveaxis(x, -2, 0), jnp.moveaxis(step, -2, 0), q, self.scale)
    zeros = jnp.zeros((*x.shape[:-2], out), jnp.float32)
    return jax.lax.scan(add, zeros, xs)[0].astype(dtype)

  def dequantised(self):
    """float32 [I, O] q * scale, smoothing left in."""
    inputs = self.q.shape[0]
    scale = jnp.repeat(self.scale, _block_rows(inputs, len(self.scale)), axis=0)[:inputs]
    return self.q.astype(jnp.float32) * scale


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['kernel', 'index'], meta_fields=['probe']
)
@dataclasses.dataclass(frozen=True)
class Probed:
  """A matrix whose inputs are looked at: probe(index, x) is called while a program that multiplies
  with it is traced. index: int32 [...] of the matrix, one per layer of a stack.
  """

  kernel: Any
  index: jax.Array
  probe: Callable[[jax.Array, jax.Array], None]

  def matmul(self, x, dtype):
    self.probe(self.index, x)
    return matmul(x, self.kernel, dtype)


def matmul(x, kernel, dtype):
  """x [..., I] times a matrix [I, O] of any form, computed in and returned as `dtype`."""
  if isinstance(kernel, (Quantised, Probed)):
    return kernel.matmul(x, dtype)
  return x.astype(dtype) @ kernel.astype(dtype)


def pack(kernel, dtype: str, block: int | None, smooth=None) -> dict[str, jax.Array]:
  """A float matrix in the module's form.

  Args:
    kernel: [..., I, O]. dtype: 'int8' or 'float8_e4m3fn'. block: input channels that share a scale,
      None = all. smooth: [..., I] > 0 where inputs are to be quantised as well.

  Returns:
    {'q', 'scale'} and, if given, 'smooth'. Every entry of q * scale / smooth is within half a step
    of the matrix (int8: scale / 2 / smooth; float8: 1/16 of the entry, or 2**-10 * scale / smooth).
    A block of zeros stays zeros.

  Raises:
    ConfigError: an unknown dtype, or a block below 1.
  """
  if dtype not in LARGEST or (block is not None and block < 1):
    raise ConfigError(
      f'quantised matrix: expected a dtype of {sorted(LARGEST)} and a block >= 1 or None, got '
      f'{dtype!r} and {block}.'
    )
  kernel = jnp.asarray(kernel, jnp.float32)
  if smooth is not None:
    kernel = kernel / smooth[..., None]
  inputs, out = kernel.shape[-2:]
  blocks = 1 if block is None else -(-inputs // block)
  rows = _block_rows(inputs, blocks)
  whole = _pad(kernel, -2, blocks * rows).reshape(*kernel.shape[:-2], blocks, rows, out)
  scale = _steps(jnp.max(jnp.abs(whole), axis=-2, keepdims=True), dtype)
  q = _rounded(whole / scale, dtype)
  q = q.reshape(*kernel.shape[:-2], blocks * rows, out)[..., :inputs, :]
  packed = {'q': q, 'scale': scale[..., 0, :]}
  return packed if smooth is None else packed | {'smooth': jnp.asarray(smooth, jnp.float32)}


def is_packed(node: Any) -> bool:
  """Whether a node of a parameter tree is a matrix in the module's form."""
  return isinstance(node, Mapping) and 'q' in node and not isinstance(node['q'], Mapping)


def as_leaves(params: Params, path: str = '') -> Params:
  """The tree with every packed matrix as one leaf, a `Quantised`, as modules hold it.

  Raises:
    CheckpointError: a packed matrix whose parts do not fit together, naming it.
  """
  tree = {}
  for name, node in params.items():
    where = f'{path}/{name}' if path else name
    if is_packed(node):
      _check(node, where)
      tree[name] = Quantised(**node)
    else:
      tree[name] = as_leaves(node, where) if isinstance(node, Mapping) else node
  return tree


def _product(x, q):
  """float32 x @ q: added up in the integers or floats of q, or, of other x, in float32."""
  if x.dtype == q.dtype:
    return jnp.matmul(x, q, preferred_element_type=_SUMS[str(q.dtype)]).astype(jnp.float32)
  return jnp.matmul(x, q.astype(x.dtype), preferred_element_type=jnp.float32)


def _check(packed: Mapping, where: str) -> None:
  if packed.keys() - {'smooth'} != {'q', 'scale'}:
    raise CheckpointError(
      f'quantised matrix {where}: expected q, scale and perhaps smooth, got {sorted(packed)}. '
      'Quantise the run again.'
    )
  q, scale, smooth = (packed.get(name) for name in ('q', 'scale', 'smooth'))
  *lead, inputs, out = q.shape if q.ndim > 1 else (0, 0)
  blocks = scale.shape[-2] if scale.ndim > 1 else 0
  fits = (
    str(q.dtype) in LARGEST
    and scale.shape == (*lead, blocks, out)
    and 0 < blocks <= inputs
    and (smooth is None or smooth.shape == (*lead, inputs))
    and all(x.dtype == jnp.float32 for x in (scale, smooth) if x is not None)
  )
  if not fits:
    got = {name: f'{x.dtype}{list(x.shape)}' for name, x in packed.items()}
    raise CheckpointError(
      f'quantised matrix {where}: expected q [..., I, O] of {sorted(LARGEST)}, float32 scale '
      f'[..., N, O] and smooth [..., I], got {got}. Quantise the run again.'
    )


def _block_rows(inputs: int, blocks: int) -> int:
  return -(-inputs // blocks)


def _pad(x, axis: int, size: int):
  width = [(0, 0)] * x.ndim
  width[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, width)


def _steps(largest, dtype):
  """Scales that make `largest` the largest number of `dtype`; 1 where there is nothing to scale."""
  top = LARGEST[str(np.dtype(dtype))]
  # Not `largest > ...`: what is not a number must stay that, and show in the result.
  return jnp.where(largest <= top * jnp.finfo(jnp.float32).tiny, 1.0, largest / top)


def _rounded(x, dtype):
  """x, within the range of `dtype` up to rounding, in it."""
  top = LARGEST[str(np.dtype(dtype))]
  x = jnp.clip(x, -top, top)
  return (jnp.round(x) if np.dtype(dtype) == np.int8 else x).astype(dtype)
