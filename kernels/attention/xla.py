"""Attention left to XLA: two matmuls around a float32 softmax that is normalised after the second.

Not `jax.nn.dot_product_attention`: there a fully masked row attends uniformly to masked keys, and
the probabilities [B, heads, Sq, Sk] are divided in one more pass over them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(q, k, v, mask, bias):
  """See `api.dot_product_attention`. Matmuls in the input dtype with float32 accumulation."""
  logits = jnp.einsum('bqnh,bknh->bnqk', q, k, preferred_element_type=jnp.float32)
  logits *= q.shape[-1] ** -0.5
  if bias is not None:
    logits += bias.astype(jnp.float32)
  if mask is not None:
    logits = jnp.where(mask, logits, -jnp.inf)
  peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  weights = jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak))
  total = weights.sum(-1)[..., None].swapaxes(1, 2)  # [B, Sq, heads, 1]
  out = jnp.einsum(
      'bnqk,bknh->bqnh', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return (out / jnp.where(total == 0, 1.0, total)).astype(q.dtype)
