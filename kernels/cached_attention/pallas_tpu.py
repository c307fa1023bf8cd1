"""TPU kernel: the cache streams by once, in blocks of slots; all rows of a head are done together.

The grid runs over (cache, group of heads, block of slots). The layer of a stacked cache is a
prefetched scalar, so a loop over layers copies nothing. New tokens are one more tile at the end.
Matrix products, softmax updates and second products of several heads are issued in phases: one
head's softmax would leave the matrix units idle.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from wallwm_jax.kernels.cached_attention.rows import Rows
from wallwm_jax.kernels.static import is_static

_LANES = 128
_SUBLANES = 16  # of a bfloat16 tile
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: the difference of two is not NaN
_VMEM = 15 * 2**20  # 1 MiB less than XLA gives one kernel
_MAX_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Config:
  """lanes: widest group of heads; block: bytes of a block of keys; interleave: heads of a phase."""

  lanes: int
  block: int
  interleave: int


# Chosen by static cost: v5p has more, smaller matrix units than v6e.
_CONFIG = Config(lanes=1536, block=3 * 2**19, interleave=4)
_CONFIG_V6 = Config(lanes=1536, block=3 * 2**19, interleave=12)


def supports(rows: Rows, q: jax.Array, k: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Whether the kernel takes queries laid out as `Rows` says and a cache [L, Bk, N, Hkv * D].

  Depends on the chip: that of the mesh in context, else the default device. Tracing for a TPU
  elsewhere, and without its mesh, means a v5p.
  """
  taken = q.dtype == jnp.bfloat16 and rows.dim % _LANES == 0 and is_static(q, k)
  return taken and _tiles(rows, k) is not None


def cached_attention(rows: Rows, q, k, v, lengths, layer, latents, interpret=False):
  """See `api.cached_attention`; q and the result are laid out as `Rows` says, the cache is
  stacked.

  Raises:
    NotImplementedError: heads of another width, or more rows than fit beside a block.
  """
  if not (interpret or supports(rows, q, k)) or _tiles(rows, k) is None:
    raise NotImplementedError(
      f'cached_attention on TPU: expected bfloat16 queries, heads of a multiple of {_LANES} and at '
      f'most {_MAX_ROWS} rows (queries of one cached head), got {q.dtype}, heads of {rows.dim}, '
      f'{rows.count} rows.'
    )
  return _attend(rows, q, k, v, lengths, layer, latents, interpret)


def _config() -> Config:
  """That of the chip that is traced for, as far as it is known."""
  try:
    generation = pltpu.get_tpu_info().generation
  except ValueError:  # not a TPU
    return _CONFIG
  return _CONFIG_V6 if generation >= 6 else _CONFIG


def _tiles(rows: Rows, k) -> tuple[int, int] | None:
  """(heads of a group, slots of a block), or None where nothing fits in VMEM."""
  config, slots, wide = _config(), k.shape[-2], jnp.dtype(k.dtype).itemsize
  if rows.count > _MAX_ROWS:
    return None
  groups = [n for n in range(rows.heads, 0, -1) if rows.heads % n == 0]
  even = [n for n in groups if (rows.heads // n) * rows.batch % 2 == 0]  # one half for each core
  for heads in [*even, *groups]:
    lanes = heads * rows.dim
    if lanes > max(config.lanes, rows.dim) or (lanes % _LANES and heads != rows.heads):
      continue
    block = max(_LANES, config.block // (lanes * wide) // _LANES * _LANES)
    block = min(1 << int(math.log2(block)), -(-slots // _LANES) * _LANES)
    while block >= _LANES:
      if _bytes(rows, heads, block, wide, config.interleave) <= _VMEM:
        return heads, block
      block = block // 2 // _LANES * _LANES
  return None


def _bytes(rows: Rows, heads: int, block: int, wide: int, interleave: int) -> int:
  """VMEM of one program, with new tokens, at most."""
  lanes, tall = heads * rows.dim, -(-rows.count // _SUBLANES) * _SUBLANES
  new = -(-rows.tokens // _SUBLANES) * _SUBLANES
  streamed = 2 * 2 * lanes * (block * wide + 2 * tall + 2 * new)
  kept = 4 * tall * (heads * 2 * (_LANES + rows.dim) + 2 * max(new, _LANES))
  phase = min(interleave, heads) * block * (6 * tall + 2 * rows.dim * (wide == 1))
  return streamed + kept + phase


def _attend(rows: Rows, q, k, v, lengths, layer, latents, interpret):
  slots, dim = k.shape[-2], rows.dim
  heads, block = _tiles(rows, k)
  blocks, lanes = pl.cdiv(slots, block), heads * dim
  ragged = lengths is not None or slots % block != 0
  scale = dim**-0.5 * math.log2(math.e)
  # Said outright: a default of the process for all matrix products is none that kernels have.
  exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  interleave = _config().interleave
  # Query heads that read one cached head lie under each other: (head, its rows, its lanes).
  places = [
    (i // rows.group, pl.ds(i % rows.group * rows.tokens, rows.tokens), pl.ds(i * dim, dim))
    for i in range(heads * rows.group)
  ]

  def product(a, b, axis):
    return jax.lax.dot_general(
      a, b, (((1,), (axis,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )

  def body(_, length, q, k, v, *refs):
    out, peak, total, sums, folded = refs[-5:]
    cache, at = pl.program_id(0), pl.program_id(2)
    left = (slots if lengths is None else length[cache]) - at * block

    def tile(keys, values, hide):
      """All heads against one tile of keys: base-2 online softmax, in phases."""
      for first in range(0, heads, interleave):
        mine = range(first, min(first + interleave, heads))
        part = [pl.ds(h * dim, dim) for h in mine]
        scores = [
          product(folded[h].astype(q.dtype), keys(p).astype(q.dtype), 1)
          for h, p in zip(mine, part)
        ]
        scores = [hide(s * scale) for s in scores]
        peaks = [jnp.maximum(peak[h], s.max(1, keepdims=True)) for h, s in zip(mine, scores)]
        weights = [jnp.exp2(s - _wide(m, s.shape[1])) for s, m in zip(scores, peaks)]
        fades = [jnp.exp2(peak[h] - m) for h, m in zip(mine, peaks)]
        added = [w.sum(1, keepdims=True) for w in weights]
        products = [
          product(w.astype(q.dtype), values(p).astype(q.dtype), 0)
          for p, w in zip(part, weights)
        ]
        for h, m, fade, more, o in zip(mine, peaks, fades, added, products):
          peak[h] = m
          total[h] = fade * total[h] + more
          sums[h] = _wide(fade, dim) * sums[h] + o

    def hide(scores):
      column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
      return jnp.where(column < left, scores, _HIDDEN) if ragged else scores

    def clear(values):
      """Masked weights are 0, but 0 * NaN is not."""
      row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
      return jnp.where(row < left, values, jnp.zeros_like(values)) if ragged else values

    @pl.when(at == 0)
    def _start():
      peak[...] = jnp.full_like(peak, _HIDDEN)
      total[...] = jnp.zeros_like(total)
      sums[...] = jnp.zeros_like(sums)
      for h, own, part in places:
        folded[h, own] = q[:, part].astype(folded.dtype)

    # Every row sees the first slot of a tile that is done at all, so none is fully masked.
    pl.when(left > 0)(lambda: tile(lambda p: k[:, p], lambda p: clear(v[:, p]), hide))

    @pl.when(at == blocks - 1)
    def _finish():
      if latents is not None:
        new_k, new_v, visible = refs[:3]

        def whole(new):
          """All of a tile: the simulation of schedules aborts on products over parts of one."""
          rest = jnp.zeros((visible.shape[1] - new.shape[0], dim), new.dtype)
          return lambda p: jnp.concatenate([new[:, p], rest], 0)

        tile(whole(new_k), whole(new_v), lambda s: jnp.where(visible[...] > 0, s, _HIDDEN))
      for h, own, part in places:
        by = total[h, own]
        by = _wide(jnp.where(by == 0, 1.0, by), dim)
        out[:, part] = (sums[h, own] / by).astype(out.dtype)

  def streamed(cache, group, at, layer, length):
    if lengths is not None:  # no block behind the length is fetched
      at = jnp.minimum(at, jax.lax.div(jnp.maximum(length[cache] - 1, 0), block))
    return layer[0], cache, at, group

  def of_group(tall, wide):
    return pl.BlockSpec((None, tall, wide), lambda cache, group, *_: (cache, 0, group))

  of_queries = of_group(rows.tokens, lanes * rows.group)
  of_slots = pl.BlockSpec((None, None, block, lanes), streamed)
  specs, operands = [of_queries, of_slots, of_slots], [q, k, v]
  if latents is not None:
    padding = -rows.tokens % _SUBLANES
    visible = np.tile(rows.visible(), (rows.group, 1)).astype(np.float32)
    visible = np.pad(visible, ((0, 0), (0, -rows.tokens % _LANES)))
    of_new = of_group(rows.tokens + padding, lanes)
    specs += [of_new, of_new, pl.BlockSpec(visible.shape, lambda *_: (0, 0))]
    operands += [jnp.pad(x, ((0, 0), (0, padding), (0, 0))) for x in latents]
    operands.append(visible)
  length = jnp.zeros(rows.batch, jnp.int32) if lengths is None else lengths
  # Parts of a tile are moved in float32 only.
  kept = jnp.float32 if rows.group > 1 and rows.tokens % _SUBLANES else q.dtype
  scratch = [
    *(pltpu.VMEM((heads, rows.count, wide), jnp.float32) for wide in (_LANES, _LANES, dim)),
    pltpu.VMEM((heads, rows.count, dim), kept),
  ]
  scores = rows.batch * rows.heads * rows.count * slots
  return pl.pallas_call(
    body,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(rows.batch, rows.heads // heads, blocks),
      in_specs=specs,
      out_specs=of_queries,
      scratch_shapes=scratch,
    ),
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * scores * dim,
      bytes_accessed=2 * rows.batch * slots * k.shape[-1] * k.dtype.itemsize,
      transcendentals=scores,
    ),
    interpret=interpret,
    name=f'cached_attention_{rows.count}x{slots}',
  )(layer[None], length, *operands)


def _wide(x, lanes: int):
  """[R, 128] of equal lanes as [R, lanes]."""
  if lanes <= _LANES:
    return x[:, :lanes]
  return jnp.concatenate([x] * (lanes // _LANES), 1)
