"""TPU kernels: forward and backward each read and write every token once, at the memory's pace.

A grid step holds some tokens at full width. One sweep over the heads sums what a token's norm
needs, a second one applies it. Lanes find the other half of their pair by a gather along the lanes,
before bfloat16 is widened: two tokens per move. The 64 cosines and 64 sines of a token lie side by
side and are spread over the 128 lanes inside, at half the bytes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from wallwm_jax.kernels.static import is_static

_HEAD = 128  # width of a head: the lanes of a register
_CHUNK = 64  # tokens in flight
_MAX_BLOCK = 256  # tokens of a grid step
_VMEM = 11 * 2**20  # bytes of its blocks, twice each; XLA gives one kernel 16 MiB


def supports(x: jax.Array | jax.ShapeDtypeStruct, heads: int) -> bool:
  """Whether the kernels take x [N, S, D]: heads of 128, enough tokens to beat XLA."""
  taken = x.dtype in (jnp.bfloat16, jnp.float32) and x.shape[-1] == heads * _HEAD and is_static(x)
  return taken and x.shape[-2] >= 2 * _CHUNK and _block(x, 3) is not None


def forward(x, scale, table, eps: float, interpret=False):
  """x [N, S, D], scale [D], table [1 or N, S, 128] (cosines, then sines) float32 -> [N, S, D]."""
  width, block = x.shape[2], _block(x, 2)

  def part(rows, x_ref, scale_ref, swapped_ref, table_ref, out_ref):
    cos, sin = _spread(table_ref[rows, :])
    square = sum(jnp.square(_wide(x_ref[rows, h])) for h in _heads(width))
    r = jax.lax.rsqrt(square.sum(-1, keepdims=True) / width + eps)
    cos, sin = cos * r, sin * r
    for h in _heads(width):
      own, other = x_ref[rows, h], _swap(x_ref[rows, h])
      turned = _wide(own) * scale_ref[:, h] * cos + _wide(other) * swapped_ref[:, h] * sin
      out_ref[rows, h] = turned.astype(out_ref.dtype)

  def body(x_ref, scale_ref, table_ref, out_ref, swapped_ref):
    for h in _heads(width):
      swapped_ref[:, h] = _swap(jnp.broadcast_to(scale_ref[:, h], (8, _HEAD)))[:1]
    _chunks(block, lambda rows, _: part(rows, x_ref, scale_ref, swapped_ref, table_ref, out_ref))

  return pl.pallas_call(
    body,
    grid=_grid(x, block),
    in_specs=[_tokens(x, block), _vector(width), _tokens(table, block)],
    out_specs=_tokens(x, block),
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    scratch_shapes=[pltpu.VMEM((1, width), jnp.float32)],
    compiler_params=_parallel(),
    interpret=interpret,
    name='qk_norm_rope',
  )(x, scale[None], table)


def backward(x, scale, table, g, eps: float, with_table: bool, interpret=False):
  """Cotangents of x, scale and, if asked for, table (else None), from g [N, S, D] of the output.

  With y = R n s and n = r x: the rotated-back h = R^T g gives d scale = sum h n and
  d x = r (h s - n mean(h s n)).
  """
  (count, tokens, width), block = x.shape, _block(x, 3)
  ragged = tokens % block != 0

  def part(rows, left, sums_ref, x_ref, scale_ref, table_ref, g_ref, dx_ref, dtable_ref=None):
    cos, sin = _spread(table_ref[rows, :])
    square = along = by_cos = by_sin = 0.0
    back = []
    for h in _heads(width):
      own, grad, other = _wide(x_ref[rows, h]), _wide(g_ref[rows, h]), _wide(_swap(g_ref[rows, h]))
      back.append(grad * cos - other * sin)
      scaled = own * scale_ref[:, h]
      square += jnp.square(own)
      along += back[-1] * scaled
      if with_table:
        by_cos += grad * scaled
        by_sin += other * scaled
    r = jax.lax.rsqrt(square.sum(-1, keepdims=True) / width + eps)
    pull = r * r * r * (along.sum(-1, keepdims=True) / width)
    real = jax.lax.broadcasted_iota(jnp.int32, (_CHUNK, 1), 0) < left
    for h, turned in zip(_heads(width), back, strict=True):
      own = _wide(x_ref[rows, h])
      dx_ref[rows, h] = (r * scale_ref[:, h] * turned - pull * own).astype(dx_ref.dtype)
      share = r * own * turned
      share = jnp.where(real, share, 0.0) if ragged else share
      sums_ref[:, h] += share.reshape(-1, 8, _HEAD).sum(0)
    if with_table:
      dtable_ref[rows, :] = _gather_pairs(r * by_cos, r * by_sin)

  def body(*refs):
    *refs, sums_ref = refs
    dscale_ref = refs.pop(5)
    sums_ref[...] = jnp.zeros_like(sums_ref)
    start = pl.program_id(0) * block

    def each(rows, first):
      part(rows, tokens - start - first, sums_ref, *refs)

    _chunks(block, each)
    dscale_ref[...] = sums_ref[...].sum(0, keepdims=True)

  steps = _grid(x, block)
  like_table = jax.ShapeDtypeStruct((count, tokens, _HEAD), jnp.float32)
  each_step = jax.ShapeDtypeStruct((*steps, 1, width), jnp.float32)
  dx, dscale, *dtable = pl.pallas_call(
    body,
    grid=steps,
    in_specs=[_tokens(x, block), _vector(width), _tokens(table, block), _tokens(x, block)],
    out_specs=[
      _tokens(x, block),
      pl.BlockSpec((None, None, 1, width), lambda s, n: (s, n, 0, 0)),
      *([_tokens(like_table, block)] if with_table else []),
    ],
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype), each_step, *([like_table] if with_table else [])
    ],
    scratch_shapes=[pltpu.VMEM((8, width), jnp.float32)],
    compiler_params=_parallel(),
    interpret=interpret,
    name='qk_norm_rope_backward',
  )(x, scale[None], table, g)  # fmt: skip
  dscale = dscale.sum((0, 1, 2))
  if not with_table:
    return dx, dscale, None
  return dx, dscale, dtable[0] if len(table) == count else dtable[0].sum(0, keepdims=True)


def _block(x, arrays: int) -> int | None:
  """Tokens of a grid step that holds `arrays` like x, or None if not even one chunk fits."""
  per_token = 2 * (arrays * x.shape[-1] * x.dtype.itemsize + 2 * 4 * _HEAD)
  most = min(_MAX_BLOCK, _VMEM // per_token) // _CHUNK * _CHUNK
  if most == 0:
    return None
  blocks = pl.cdiv(x.shape[-2], most)
  return pl.cdiv(pl.cdiv(x.shape[-2], blocks), _CHUNK) * _CHUNK  # of nearly one size


def _grid(x, block: int) -> tuple[int, int]:
  """Blocks of tokens, then rows of the batch: a table that all rows share is fetched once."""
  return pl.cdiv(x.shape[1], block), x.shape[0]


def _tokens(x, block: int) -> pl.BlockSpec:
  shared = x.shape[0] == 1
  return pl.BlockSpec((None, block, x.shape[2]), lambda s, n: (0 if shared else n, s, 0))


def _vector(width: int) -> pl.BlockSpec:
  return pl.BlockSpec((1, width), lambda s, n: (0, 0))


def _parallel() -> pltpu.CompilerParams:
  return pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel'))


def _chunks(block: int, body) -> None:
  """body(rows, first) for every chunk of a block's rows."""

  def run(i, carry):
    first = pl.multiple_of(i * _CHUNK, _CHUNK)
    body(pl.ds(first, _CHUNK), first)
    return carry

  jax.lax.fori_loop(0, block // _CHUNK, run, None)


def _heads(width: int) -> list[slice]:
  return [slice(i, i + _HEAD) for i in range(0, width, _HEAD)]


def _wide(x):
  return x.astype(jnp.float32)


def _lanes(shape):
  return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _swap(x):
  """x [rows, 128] with the lanes of every pair exchanged."""
  if x.dtype == jnp.float32:
    return jnp.take_along_axis(x, _lanes(x.shape) ^ 1, 1)
  packed = pltpu.bitcast(x, jnp.int32)  # two rows in one
  return pltpu.bitcast(jnp.take_along_axis(packed, _lanes(packed.shape) ^ 1, 1), x.dtype)


def _spread(table):
  """[rows, 128] of pairs -> cosines of the lanes, and sines with the sign a lane takes them by."""
  lane = _lanes(table.shape)
  cos = jnp.take_along_axis(table, lane >> 1, 1)
  sin = jnp.take_along_axis(table, (lane >> 1) + _HEAD // 2, 1)
  return cos, jnp.where(lane & 1 == 0, -sin, sin)


def _gather_pairs(by_cos, by_sin):
  """Transpose of `_spread`, where lanes of by_sin have been taken from the swapped cotangent."""
  lane = _lanes(by_cos.shape)
  by_sin = jnp.where(lane & 1 == 0, by_sin, -by_sin)
  cos, sin = by_cos + _swap(by_cos), by_sin + _swap(by_sin)
  first = (2 * lane) & (_HEAD - 1)
  return jnp.where(
    lane < _HEAD // 2, jnp.take_along_axis(cos, first, 1), jnp.take_along_axis(sin, first, 1)
  )
