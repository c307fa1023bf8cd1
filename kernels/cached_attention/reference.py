"""The definition of the op, in float32 throughout."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cached_attention(q, k, v, lengths=None, layer=None, latents=None, scales=None):
  """See `api.cached_attention`."""
  if layer is not None:
    k, v = k[layer], v[layer]
    scales = None if scales is None else tuple(x[layer] for x in scales)
  b, steps, query_heads, dim = q.shape
  k, v = (x.astype(jnp.float32) for x in (k, v))
  if scales is not None:
    k, v = (x * scale[:, None] for x, scale in zip((k, v), scales, strict=True))
  slots = k.shape[1]
  lengths = jnp.full(len(k), slots) if lengths is None else lengths
  cached = jnp.arange(slots) < lengths[:, None]  # [Bk, N]
  # What lies behind the length may be anything, NaN included.
  k, v = (jnp.where(cached[..., None], x, 0.0) for x in (k, v))
  k, v, cached = (jnp.repeat(x, b // len(x), axis=0) for x in (k, v, cached))
  seen = jnp.repeat(cached[:, None], steps, axis=1)  # [B, S, N]
  if latents is not None:
    k, v = (jnp.concatenate([x, new.astype(jnp.float32)], 1) for x, new in zip((k, v), latents))
    causal = jnp.tril(jnp.ones((steps, steps), bool))
    seen = jnp.concatenate([seen, jnp.repeat(causal[None], b, axis=0)], -1)
  k, v = (x.reshape(*x.shape[:2], -1, dim) for x in (k, v))
  k, v = (jnp.repeat(x, query_heads // x.shape[2], axis=2) for x in (k, v))
  precision = jax.lax.Precision.HIGHEST
  logits = jnp.einsum('bshd,bnhd->bhsn', q.astype(jnp.float32), k, precision=precision)
  logits = jnp.where(seen[:, None], logits * dim**-0.5, -jnp.inf)
  some = seen.any(-1)[:, None, :, None]
  probabilities = jax.nn.softmax(jnp.where(some, logits, 0.0), axis=-1) * seen[:, None]
  return jnp.einsum('bhsn,bnhd->bshd', probabilities, v, precision=precision).astype(q.dtype)
