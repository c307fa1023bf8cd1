"""The definition of the op, in float32 throughout."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def syrk(a, b, c, alpha, beta):
  """See `api.syrk`."""
  product = jnp.einsum(
    '...ik,...jk->...ij',
    a.astype(jnp.float32),
    b.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  out = alpha * product
  if c is not None:
    out += beta * c.astype(jnp.float32)
  return out.astype(a.dtype)
