"""Attention left to XLA: two matmuls around a float32 softmax that is normalised after the second.

Not `jax.nn.dot_product_attention`: there a fully masked row attends uniformly to masked keys, and
the probabilities [B, heads, Sq, Sk] are divided in one more pass over them. Long sequences go by
blocks of queries, which are computed again in the backward pass: no [Sq, Sk] array is ever stored.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Queries of a block, and the logits per head from which on there are blocks. A block's logits stay
# near the cores of a CPU and in a fraction of an accelerator's memory.
_BLOCK = 256
_LONG = 1 << 20


def attention(q, k, v, mask, bias, segments=None):
  """See `api.dot_product_attention`. Matmuls in the input dtype with float32 accumulation."""
  # Heads first: on CPU the products of [S, hd] matrices run several times faster than strided ones.
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  mask, bias = (None if x is None else x.reshape((1,) * (4 - x.ndim) + x.shape)
                for x in (mask, bias))
  owner, owned = (None, None) if segments is None else (
      segments[0][:, None, :, None], segments[1][:, None, None])
  if q.shape[2] * k.shape[2] < _LONG or q.shape[2] <= _BLOCK:
    out = _attend(q, k, v, mask, bias, owner, owned)
  else:
    out = _attend_by_blocks(q, k, v, mask, bias, owner, owned)
  return out.swapaxes(1, 2)


def _attend(q, k, v, mask, bias, owner, owned):
  """All arrays [B, heads, Sq or Sk, ...]; mask and bias broadcast to [B, heads, Sq, Sk], as do the
  segments of queries, owner [B, 1, Sq, 1], and of keys, owned [B, 1, 1, Sk]."""
  if owner is not None:
    same = (owner == owned) & (owned > 0)
    mask = same if mask is None else mask & same
  logits = jnp.einsum('bnqh,bnkh->bnqk', q, k, preferred_element_type=jnp.float32)
  logits *= q.shape[-1] ** -0.5
  if bias is not None:
    logits += bias.astype(jnp.float32)
  if mask is not None:
    logits = jnp.where(mask, logits, -jnp.inf)
  peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  weights = jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak))
  total = weights.sum(-1, keepdims=True)
  out = jnp.einsum(
      'bnqk,bnkh->bnqh', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return (out / jnp.where(total == 0, 1.0, total)).astype(q.dtype)


def _attend_by_blocks(q, k, v, mask, bias, owner, owned):
  queries = q.shape[2]
  blocks = -(-queries // _BLOCK)
  rows = -(-queries // blocks)

  def split(x):
    """[B, heads, Sq, ...] as [blocks, B, heads, rows, ...]; None for what broadcasts over Sq.

    A block takes every blocks-th query, so that a sequence that is split over devices stays split.
    """
    if x is None or x.shape[2] != queries:
      return None
    x = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * rows - queries), (0, 0)))
    return jnp.moveaxis(x.reshape(*x.shape[:2], rows, blocks, x.shape[3]), 3, 0)

  def block(of_block):
    q, *of_queries = of_block
    own = (whole if part is None else part for whole, part in zip((mask, bias, owner), of_queries))
    return _attend(q, k, v, *own, owned)

  out = jax.lax.map(
      jax.checkpoint(block, prevent_cse=False), (split(q), split(mask), split(bias), split(owner)))
  out = jnp.moveaxis(out, 0, 3).reshape(*q.shape[:2], blocks * rows, q.shape[3])
  return out[:, :, :queries]
