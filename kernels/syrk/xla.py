"""The whole product, left to XLA: both triangles are computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def syrk(a, b, c, alpha, beta):
  """See `api.syrk`. Operands in their dtype, float32 accumulation and epilogue."""
  # float32 operands are not rounded on any platform
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  out = alpha * jnp.einsum(
    '...ik,...jk->...ij', a, b, precision=precision, preferred_element_type=jnp.float32
  )
  if c is not None:
    out += beta * c.astype(jnp.float32)
  return out.astype(a.dtype)
