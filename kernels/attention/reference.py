"""The definition of the attention op: clear, float32 throughout, never fast."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(q, k, v, mask, bias, segments=None):
  """See `api.dot_product_attention`. Computes in float32 and returns the dtype of q."""
  precision = jax.lax.Precision.HIGHEST
  qf, kf, vf = (x.astype(jnp.float32) for x in (q, k, v))
  logits = jnp.einsum('bqnh,bknh->bnqk', qf, kf, precision=precision) / jnp.sqrt(q.shape[-1])
  if bias is not None:
    logits = logits + bias.astype(jnp.float32)
  if segments is not None:
    owner, owned = segments[0][:, None, :, None], segments[1][:, None, None]
    logits = jnp.where((owner == owned) & (owned > 0), logits, -jnp.inf)
  if mask is not None:
    logits = jnp.where(mask, logits, -jnp.inf)
  visible = logits > -jnp.inf
  some = visible.any(-1, keepdims=True)
  # A row without any visible key is given harmless logits, then zero probabilities.
  probabilities = jax.nn.softmax(jnp.where(some, logits, 0.0), axis=-1) * visible
  return jnp.einsum('bnqk,bknh->bqnh', probabilities, vf, precision=precision).astype(q.dtype)
