"""Attention over a cache left to XLA: two matmuls around a float32 softmax.

The layer is sliced out of the stacked cache, scores [Bk, heads, group, T, N] are stored.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from wallwm_jax.kernels.cached_attention.rows import Rows


def cached_attention(rows: Rows, q, k, v, lengths, layer, latents):
  """See `api.cached_attention`; q and the result are laid out as `Rows` says, the cache is
  stacked.
  """
  k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False).astype(q.dtype) for x in (k, v))
  shape, seen = q.shape, None
  if lengths is not None:
    seen = jnp.arange(k.shape[1]) < lengths[:, None]  # [Bk, N]
    v = jnp.where(seen[..., None], v, 0)  # 0 * NaN is NaN
    seen = seen[:, None, None, None]
  q = q.reshape(rows.batch, rows.tokens, rows.heads, rows.group, rows.dim)
  parts, values = [_scores(q, _heads(k, rows), seen)], [_heads(v, rows)]
  if latents is not None:
    parts.append(_scores(q, _heads(latents[0], rows), rows.visible()))
    values.append(_heads(latents[1], rows))
  peak = functools.reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in parts])
  peak = jax.lax.stop_gradient(jnp.where(peak == -jnp.inf, 0.0, peak))
  weights = [jnp.exp(x - peak) for x in parts]
  total = sum(w.sum(-1, keepdims=True) for w in weights)
  out = sum(
    jnp.einsum('bhgtn,bnhd->bhgtd', w.astype(q.dtype), x, **_exact(q))
    for w, x in zip(weights, values, strict=True)
  )
  out = (out / jnp.where(total == 0, 1.0, total)).astype(q.dtype)
  return jnp.moveaxis(out, 3, 1).reshape(shape)


def _heads(x, rows: Rows):
  return x.reshape(*x.shape[:2], rows.heads, rows.dim)


def _scores(q, k, seen):
  logits = jnp.einsum('bthgd,bnhd->bhgtn', q, k, **_exact(q)) * q.shape[-1] ** -0.5
  return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


def _exact(q):
  # float32 operands are not rounded on any platform
  precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
  return {'precision': precision, 'preferred_element_type': jnp.float32}
