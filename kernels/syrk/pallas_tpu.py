"""TPU kernel: the blocks on and below the diagonal are computed, the others are their transposes.

The grid runs over (core, block pair, step along k). Each core has its own list of block pairs
(i >= j), prefetched as scalars; both cores of a v4 or v5p work at once, one core runs the two lists
in turn. A pair's mirror image is transposed and written while the MXU starts on the next pair, so
every list ends with a diagonal block, which is its own mirror image.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_CORES = 2
# Sides of a block, best first: large enough to keep the MXU busy, small enough to skip a triangle.
# With the bytes of VMEM to fill: 2 MiB less than XLA gives one kernel, for intermediate sums.
_BLOCKS = (768, 640, 512), 14 * 2**20
_BLOCKS_V6 = (1024,), 30 * 2**20  # its larger MXUs make smaller blocks lose to XLA
_MIN_STEP, _MAX_STEP = 512, 1280  # along k; smaller ones wait for the sums, larger ones spill
_MIN_BLOCKS = 3  # fewer blocks a side leave too little to skip


def supports(a: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Whether the kernel takes factors of this shape and dtype, which it does where it beats XLA.

  Depends on the chip: that of the mesh in context, else the default device. Tracing for a TPU
  elsewhere, and without its mesh, means a v5p.
  """
  return a.dtype == jnp.bfloat16 and _tiles(*a.shape[-2:], epilogue=True) is not None


def syrk(a, b, c, alpha, beta, interpret: bool = False):
  """See `api.syrk`; alpha and beta are [..., 1, 1]. Leading axes become grid axes.

  Raises:
    NotImplementedError: a dtype other than bfloat16, sides no block divides, or a short sum.
  """
  if not supports(a):
    raise NotImplementedError(
      f'syrk on TPU: expected bfloat16 [..., m, k] with m = {_MIN_BLOCKS} or more blocks of a side '
      f'in {_blocks()[0]}, and k = two or more sides in equal steps of {_MIN_STEP} to {_MAX_STEP}, '
      f'got {a.shape} {a.dtype}.'
    )
  call = functools.partial(_syrk, interpret=interpret)
  for _ in a.shape[:-2]:
    call = jax.vmap(call, in_axes=(0, 0, None if c is None else 0, 0))
  return call(a, b, c, jnp.concatenate([alpha, beta], -1))


def _tiles(m: int, k: int, *, epilogue: bool) -> tuple[int, int] | None:
  """(block side, step along k), or None; `epilogue`: a block of c is held too."""
  sides, vmem = _blocks()
  for side in sides:
    if m % side or m // side < _MIN_BLOCKS or k < 2 * side:  # shorter sums cannot hide the mirror
      continue
    # float32 sums of two pairs, two bfloat16 outputs, two blocks of c; the rest is for a and b
    left = vmem - side * side * (2 * 4 + 2 * 2 + 2 * 2 * epilogue)
    for step in range(min(_MAX_STEP, left // (side * 8)) // 128 * 128, _MIN_STEP - 1, -128):
      if k % step == 0 and k // step >= 2:
        return side, step
  return None


def _blocks() -> tuple[tuple[int, ...], int]:
  """`_BLOCKS` of the chip that is traced for, as far as it is known."""
  try:
    generation = pltpu.get_tpu_info().generation
  except ValueError:  # not a TPU
    return _BLOCKS
  return _BLOCKS_V6 if generation >= 6 else _BLOCKS


def _pairs(blocks: int) -> np.ndarray:
  """[2, _CORES * n]: row and column of every core's block pairs, the diagonal ones last."""
  below = [(i, j) for i in range(blocks) for j in range(i)]
  count = -(-(len(below) + blocks) // _CORES)
  lists = []
  for core in range(_CORES):
    diagonal = [(i, i) for i in range(core, blocks, _CORES)]
    mine, below = below[: count - len(diagonal)], below[count - len(diagonal) :]
    pairs = mine + diagonal
    lists.append(pairs + pairs[-1:] * (count - len(pairs)))
  assert not below
  return np.array(sum(lists, []), np.int32).T


def _syrk(a, b, c, scalars, *, interpret):
  m, k = a.shape
  side, step = _tiles(m, k, epilogue=c is not None)
  pairs = _pairs(m // side)
  count, steps = pairs.shape[1] // _CORES, k // step

  def body(rows, cols, scalars, a, b, *refs):
    del rows, cols
    (c, out, sums) = refs if len(refs) == 3 else (None, *refs)
    pair, at = pl.program_id(1), pl.program_id(2)
    slot = jax.lax.rem(pair, 2)

    def product():
      return jax.lax.dot_general(
        a[...], b[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
      )

    @pl.when((at == 0) & (pair == 0))
    def _start():
      sums[slot] = product()

    @pl.when((at == 0) & (pair > 0))
    def _start_and_mirror():
      sums[slot] = product()
      out[...] = sums[1 - slot].T.astype(out.dtype)

    @pl.when((at > 0) & (at < steps - 1))
    def _add():
      sums[slot] += product()

    @pl.when(at == steps - 1)
    def _finish():
      total = scalars[0, 0] * (sums[slot] + product())
      if c is not None:
        total += scalars[0, 1] * c[...].astype(jnp.float32)
      sums[slot] = total
      out[...] = total.astype(out.dtype)

  def written(core, pair, at, rows, cols):
    """Output block of a grid step: the previous pair's mirror image until the last step."""
    own = (at == steps - 1) | (pair == 0)
    index = core * count + pair - jnp.where(own, 0, 1)
    return jnp.where(own, rows[index], cols[index]), jnp.where(own, cols[index], rows[index])

  def of(lists, core, pair):
    return lists[core * count + pair]

  block = functools.partial(pl.BlockSpec, (side, side))
  inputs = [
    pl.BlockSpec(memory_space=pltpu.SMEM),
    pl.BlockSpec((side, step), lambda i, p, s, rows, cols: (of(rows, i, p), s)),
    pl.BlockSpec((side, step), lambda i, p, s, rows, cols: (of(cols, i, p), s)),
  ]
  operands = [scalars, a, b]
  if c is not None:
    inputs.append(block(lambda i, p, s, rows, cols: (of(rows, i, p), of(cols, i, p))))
    operands.append(c)
  executed = pairs.shape[1] * side * side * k
  return pl.pallas_call(
    body,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(_CORES, count, steps),
      in_specs=inputs,
      out_specs=block(written),
      scratch_shapes=[pltpu.VMEM((2, side, side), jnp.float32)],
    ),
    out_shape=jax.ShapeDtypeStruct((m, m), a.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary', 'arbitrary')
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * executed, bytes_accessed=4 * executed // side + 2 * m * m, transcendentals=0
    ),
    interpret=interpret,
    name=f'syrk_{m}x{k}' if c is None else f'syrk_{m}x{k}_c',
  )(pairs[0], pairs[1], *operands)
