"""The op left to XLA: norm and rotation in float32, one rounding at the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def forward(x, scale, cos, sin, heads: int, eps: float):
  """See `api.qk_norm_rope`."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps) * scale
  pairs = y.reshape(*x.shape[:-1], heads, -1, 2)
  a, b = pairs[..., 0], pairs[..., 1]
  cos, sin = cos[..., None, :], sin[..., None, :]
  turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], -1)
  return turned.reshape(*x.shape[:-1], heads, -1).astype(x.dtype)
