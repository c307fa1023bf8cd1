"""Long sequences on a TPU: JAX's splash attention, which visits the blocks a table names, forward
and backward, under tables made at run time. New masks compile nothing.

The samples of a batch are laid end to end, and the table of a block of queries names blocks of its
own sample only. A block of keys is skipped unless some query may attend to one of its keys: events
of a packed row do not pay for each other, nor a patch for views outside its sight cone. Within a
visited block segments and the mask decide, patch by patch, so the result is that of the definition.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as tables

from wallwm_jax.kernels.static import is_static

_BLOCK = 512  # queries, or keys, of a block
_LANES = 128
_LONG = 1 << 20  # logits per head; XLA keeps fewer near the cores
_MAX_TABLE = 1 << 17  # entries of one table, which lies in scalar memory


class _Sight(NamedTuple):
  """Who may attend to whom: segments [B, Sq] and [B, Sk] (0: nobody), pairs [B, Sq, Sk] or None."""

  owner: jax.Array
  owned: jax.Array
  pairs: jax.Array | None


def supports(q, k, mask, bias) -> bool:
  """Whether the backend takes this call: long, bfloat16, heads of multiples of 128, no bias, a mask
  that all heads share.
  """
  if not is_static(q, k):
    return False
  batch, queries, _, width = q.shape
  keys = k.shape[1]
  blocks = batch * pl.cdiv(queries, _BLOCK), batch * pl.cdiv(keys, _BLOCK)
  return (
    q.dtype == jnp.bfloat16
    and width % _LANES == 0
    and queries * keys >= _LONG
    and min(queries, keys) >= 2 * _LANES
    and bias is None
    and (mask is None or mask.ndim < 3 or mask.shape[-3] == 1)
    and (mask is None or mask.shape[-1] == keys)
    and (mask is None or mask.ndim < 2 or mask.shape[-2] in (1, queries))
    and max(blocks) * _LANES <= _MAX_TABLE
  )


def attention(q, k, v, mask, bias, segments=None, interpret=False):
  """See `api.dot_product_attention`. Matmuls in bfloat16, softmax in float32.

  Raises:
    NotImplementedError: a call that `supports` does not take.
  """
  if not supports(q, k, mask, bias):
    raise NotImplementedError(
      'attention by splash: expected bfloat16 with heads of a multiple of 128, 2^20 or more logits '
      f'a head, no bias and one mask for all heads, got q {q.shape} {q.dtype}, k {k.shape}, mask '
      f'{None if mask is None else mask.shape}.'
    )
  batch, queries, heads, width = q.shape
  sight = _sight(q, k, mask, segments)
  seen = _seen(sight)
  rows, columns = (min(_BLOCK, pl.cdiv(n, _LANES) * _LANES) for n in (queries, k.shape[1]))
  # What nobody attends to, and who attends to nothing, may hold anything but must not spread.
  q = jnp.where(seen[..., None, None], q.astype(jnp.float32) * width**-0.5, 0).astype(q.dtype)
  k, v = (jnp.where((sight.owned > 0)[..., None, None], x, 0) for x in (k, v))
  sight = _Sight(
    _padded(sight.owner, rows), _padded(sight.owned, columns),
    None if sight.pairs is None else _padded(_padded(sight.pairs, rows), columns, 2),
  )  # fmt: skip
  kernel = splash.SplashAttentionKernel(
    *_mask_infos(sight, rows, columns),
    block_sizes=splash.BlockSizes(
      block_q=rows, block_kv=columns, block_kv_compute=columns,
      block_q_dkv=rows, block_kv_dkv=columns, block_kv_dkv_compute=columns,
      block_q_dq=rows, block_kv_dq=columns,
    ),
    is_mqa=False, save_residuals=False, mask_value=splash.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None, residual_checkpoint_name=None, mask_function=None,
    interpret=interpret,
  )  # fmt: skip
  ends = splash.SegmentIds(sight.owner.reshape(-1), sight.owned.reshape(-1))
  out = kernel(_end_to_end(q, rows), _end_to_end(k, columns), _end_to_end(v, columns), ends)
  out = jnp.moveaxis(out.reshape(heads, batch, -1, width)[:, :, :queries], 0, 2)
  return jnp.where(seen[..., None, None], out, 0)


def visited(sight: _Sight, rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
  """Blocks [B, Sq / rows, Sk / columns] that some query of may attend to, and those of them where
  the pairs hide nothing; rounded out: segments are compared by their range within a block.
  """
  low, high = [], []
  for ids, size in ((sight.owner, rows), (sight.owned, columns)):
    ids = ids.reshape(len(ids), -1, size)
    low.append(jnp.where(ids > 0, ids, jnp.iinfo(ids.dtype).max).min(-1))
    high.append(ids.max(-1))
  some = (high[0][:, :, None] >= low[1][:, None]) & (high[1][:, None] >= low[0][:, :, None])
  if sight.pairs is None:
    return some, some
  pairs = sight.pairs.reshape(len(some), some.shape[1], rows, some.shape[2], columns)
  return some & pairs.any((2, 4)), some & pairs.all((2, 4))


def _mask_infos(sight: _Sight, rows: int, columns: int):
  """Tables of the forward pass, of the gradient of q (the same) and of that of k and v."""
  some, every = visited(sight, rows, columns)
  batch, down, across = some.shape
  state = some.astype(jnp.int32) + every
  # A block of queries that visits no keys at all would divide by nothing: its result is not used.
  idle = ~some.any(-1, keepdims=True) & (jnp.arange(across) == 0)
  sample = jnp.arange(batch)[:, None, None]
  forward_state = jnp.where(idle, 2, state)
  j = _next(forward_state > 0, 2)
  i = _next(some, 1)
  # Pairs are looked at in blocks where they hide something, and fetched for those alone.
  at = (sample * down + jnp.arange(down)[:, None]) * across + _next(forward_state == 1, 2)
  at_back = (sample * down + _next(state == 1, 1)) * across + jnp.arange(across)
  blocks = blocks_back = None
  if sight.pairs is not None:
    blocks = sight.pairs.reshape(batch, down, rows, across, columns).swapaxes(2, 3)
    blocks = blocks.reshape(-1, rows, columns)
    blocks_back = blocks.swapaxes(1, 2)

  def along_queries(x):
    return x.astype(jnp.int32).reshape(1, batch * down, across)

  def along_keys(x):
    return x.astype(jnp.int32).swapaxes(0, 1).reshape(1, down, batch * across)

  forward = tables.MaskInfo(
    along_queries(sample * across + j),
    None if blocks is None else along_queries(at),
    along_queries(forward_state), blocks, None,
  )  # fmt: skip
  back = tables.MaskInfo(
    along_keys(sample * down + i),
    None if blocks is None else along_keys(at_back),
    along_keys(state), blocks_back, None,
  )  # fmt: skip
  return forward, forward, back


def _next(taken, axis: int):
  """Index along `axis` of the next taken entry, this one included; after the last one, of that.

  A skipped block then waits on data that is fetched anyway.
  """
  size = taken.shape[axis]
  index = jax.lax.broadcasted_iota(jnp.int32, taken.shape, axis)
  ahead = jax.lax.cummin(jnp.where(taken, index, size), axis, reverse=True)
  last = jnp.where(taken, index, 0).max(axis, keepdims=True)
  return jnp.where(ahead < size, ahead, last)


def _sight(q, k, mask, segments) -> _Sight:
  (batch, queries), keys = q.shape[:2], k.shape[1]
  ones = (jnp.ones((batch, n), jnp.int32) for n in (queries, keys))
  owner, owned = ones if segments is None else (x.astype(jnp.int32) for x in segments)
  if mask is None:
    return _Sight(owner, owned, None)
  mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)[:, 0]
  if mask.shape[1] == 1:
    return _Sight(owner, jnp.where(mask[:, 0], owned, 0), None)
  return _Sight(owner, owned, jnp.broadcast_to(mask, (batch, queries, keys)))


def _seen(sight: _Sight):
  """[B, Sq]: queries that may attend to anything."""
  same = (sight.owner[:, :, None] == sight.owned[:, None]) & (sight.owned > 0)[:, None]
  return (same if sight.pairs is None else same & sight.pairs).any(-1)


def _padded(x, size: int, axis: int = 1):
  """`axis` filled up with zeros to a multiple of `size`."""
  fill = -x.shape[axis] % size
  return jnp.pad(x, [(0, fill if n == axis else 0) for n in range(x.ndim)])


def _end_to_end(x, size: int):
  """[B, S, heads, hd] -> [heads, B * S', hd], every sample in whole blocks."""
  x = jnp.moveaxis(_padded(x, size), 2, 0)
  return x.reshape(x.shape[0], -1, x.shape[-1])
