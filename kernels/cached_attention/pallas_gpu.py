"""GPU form: split-KV. One program per cached head and part of the slots leaves an unnormalised
result; XLA merges the parts, so that a few heads and rows fill the whole chip.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from wallwm_jax.kernels.cached_attention.rows import Rows

_MIN_ROWS, _MAX_ROWS = 16, 128  # of a matrix product; of the registers of a program
_MAX_DIM = 256
_BLOCK = 64  # slots of one step
_PROGRAMS = 264  # two for each multiprocessor of an H100
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def cached_attention(rows: Rows, q, k, v, lengths, layer, latents, interpret=False):
  """See `api.cached_attention`; q and the result are laid out as `Rows` says, the cache is
  stacked.

  Raises:
    NotImplementedError: heads whose width is no power of two, or too many rows.
  """
  dim, tall = rows.dim, max(_MIN_ROWS, pl.next_power_of_2(rows.count))
  if dim & (dim - 1) or not _MIN_ROWS <= dim <= _MAX_DIM or tall > _MAX_ROWS:
    raise NotImplementedError(
      f'cached_attention on GPU: expected heads of a power of two from {_MIN_ROWS} to {_MAX_DIM} '
      f'and at most {_MAX_ROWS} rows (queries of one cached head), got {dim} and {rows.count}.'
    )
  slots, batch = k.shape[-2], rows.batch
  blocks = pl.cdiv(slots, _BLOCK)
  splits = min(blocks, max(1, _PROGRAMS // (batch * rows.heads)))
  steps = pl.cdiv(blocks, splits)  # of one program
  lengths = jnp.full(batch, slots, jnp.int32) if lengths is None else lengths
  # Said outright: a default of the process for all matrix products is none that kernels have.
  exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  scale = dim**-0.5 * math.log2(math.e)

  def body(layer, lengths, q, k, v, out, peak, total):
    cache, head, split = (pl.program_id(i) for i in range(3))
    length, at = lengths[cache], layer[0]
    channels = pl.ds(head * dim, dim)
    queries = q[cache, :, channels]

    def step(i, carry):
      before, sums, result = carry
      start = (split * steps + i) * _BLOCK
      column = start + jnp.arange(_BLOCK)
      seen = column < length
      here = (at, cache, pl.ds(start, _BLOCK), channels)
      mask = jnp.broadcast_to(seen[:, None], (_BLOCK, dim))
      keys = plgpu.load(k.at[here], mask=mask, other=0).astype(queries.dtype)
      scores = plgpu.dot(queries, keys, trans_b=True, precision=exact) * scale
      scores = jnp.where(seen[None], scores, _HIDDEN)
      after = jnp.maximum(before, scores.max(1))
      # A row may have seen nothing yet: its peak is _HIDDEN too.
      weights = jnp.where(seen[None], jnp.exp2(scores - after[:, None]), 0.0)
      values = plgpu.load(v.at[here], mask=mask, other=0).astype(queries.dtype)
      fade = jnp.exp2(before - after)
      product = plgpu.dot(weights.astype(queries.dtype), values, precision=exact)
      return after, fade * sums + weights.sum(1), fade[:, None] * result + product

    stop = jnp.clip(pl.cdiv(length, _BLOCK) - split * steps, 0, steps)
    empty = (
      jnp.full(tall, _HIDDEN, jnp.float32),
      jnp.zeros(tall, jnp.float32),
      jnp.zeros((tall, dim), jnp.float32),
    )
    peak[...], total[...], out[...] = jax.lax.fori_loop(0, stop, step, empty)

  def part(*tail):
    block = (None, None, None, *tail)
    shape = jax.ShapeDtypeStruct((batch, rows.heads, splits, *tail), jnp.float32)
    return pl.BlockSpec(block, lambda *at: (*at, *(0,) * len(tail))), shape

  parted = [part(tall, dim), part(tall), part(tall)]
  q = q.reshape(batch, rows.tokens, rows.heads, rows.group, dim)
  q = jnp.moveaxis(q, 3, 1).reshape(batch, rows.count, -1)  # rows (member of the group, token)
  parts = pl.pallas_call(
    body,
    grid=(batch, rows.heads, splits),
    out_specs=[spec for spec, _ in parted],
    out_shape=[shape for _, shape in parted],
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name=f'cached_attention_{rows.count}x{slots}',
  )(layer[None], lengths, jnp.pad(q, ((0, 0), (0, tall - rows.count), (0, 0))), k, v)
  parts = [x[:, :, :, : rows.count] for x in parts]
  if latents is not None:
    new = _new_tokens(rows, q, latents, scale)
    parts = [jnp.concatenate([x, y[:, :, None]], 2) for x, y in zip(parts, new, strict=True)]
  out = _merge(*parts).astype(q.dtype)  # [Bk, heads, R, D]
  out = out.reshape(batch, rows.heads, rows.group, rows.tokens, dim)
  return jnp.moveaxis(out, 3, 1).reshape(batch, rows.tokens, -1)


def _new_tokens(rows: Rows, q, latents, scale):
  """The part of a few new tokens, [Bk, heads, R, ...], in XLA: sums, peaks and totals."""
  q, k, v = (x.reshape(*x.shape[:2], rows.heads, rows.dim) for x in (q, *latents))
  exact = {'precision': jax.lax.Precision.HIGHEST, 'preferred_element_type': jnp.float32}
  scores = jnp.einsum('brhd,bnhd->bhrn', q, k, **exact) * scale
  visible = np.tile(rows.visible(), (rows.group, 1))  # every token sees itself
  scores = jnp.where(visible, scores, -jnp.inf)
  peak = scores.max(-1)
  weights = jnp.exp2(scores - peak[..., None])
  sums = jnp.einsum('bhrn,bnhd->bhrd', weights.astype(q.dtype), v, **exact)
  return sums, peak, weights.sum(-1)


def _merge(sums, peaks, totals):
  """Parts [Bk, heads, splits, R, ...] as the normalised [Bk, heads, R, D]."""
  share = jnp.exp2(peaks - peaks.max(2, keepdims=True))
  total = (share * totals).sum(2)[..., None]
  return (share[..., None] * sums).sum(2) / jnp.where(total == 0, 1.0, total)
