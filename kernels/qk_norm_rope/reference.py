"""The definition of the op, in float32 throughout."""

from __future__ import annotations

import jax.numpy as jnp


def qk_norm_rope(x, scale, cos, sin, heads: int, eps: float):
  """See `api.qk_norm_rope`. Computes in float32 and returns the dtype of x."""
  y = x.astype(jnp.float32)
  y = y / jnp.sqrt((y * y).mean(-1, keepdims=True) + eps) * scale
  pairs = y.reshape(*x.shape[:-1], heads, -1, 2)
  a, b = pairs[..., 0], pairs[..., 1]
  cos, sin = cos[..., None, :], sin[..., None, :]
  turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], -1)
  return turned.reshape(*x.shape[:-1], heads, -1).astype(x.dtype)
