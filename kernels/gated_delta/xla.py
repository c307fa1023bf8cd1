"""The rule by chunks of tokens: dense products inside a chunk, a scan over chunks.

Section 3.3 of Gated Delta Networks (arXiv 2412.06464) and DeltaNet (arXiv 2406.06484). Everything
is float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# States are sums over thousands of tokens and the inverse below amplifies errors: on accelerators
# float32 products must not be made of bfloat16 ones.
_matmul = functools.partial(jnp.matmul, precision='highest')


def gated_delta(q, k, v, g, beta, state, chunk: int = 64):
  """See `api.gated_delta`."""
  dtype, tokens, group = v.dtype, q.shape[1], v.shape[2] // k.shape[2]
  chunk = min(chunk, tokens)
  q, k = (jnp.repeat(x, group, 2) for x in (q, k))
  q, k, v, g, beta = (_by_chunks(x.astype(jnp.float32), chunk) for x in (q, k, v, g, beta))
  decay = jnp.cumsum(g, -1)  # log of what is left at a token of the state before the chunk
  order = np.arange(chunk)[:, None] - np.arange(chunk)
  # Hidden before the exponential: above the diagonal it may overflow, and so would its gradient.
  pair = jnp.exp(jnp.where(order >= 0, decay[..., :, None] - decay[..., None, :], -jnp.inf))
  weighted = k * beta[..., None]
  overlap = _matmul(weighted, k.swapaxes(-1, -2)) * pair
  solve = unit_lower_inverse(jnp.where(order > 0, overlap, 0.0))
  values = _matmul(solve, v * beta[..., None])
  reads = _matmul(solve, weighted * jnp.exp(decay)[..., None])
  scores = _matmul(q, k.swapaxes(-1, -2)) * pair
  queries = q * jnp.exp(decay)[..., None]
  keys = k * jnp.exp(decay[..., -1:] - decay)[..., None]
  left = jnp.exp(decay[..., -1])[..., None, None]

  def step(state, part):
    values, reads, scores, queries, keys, left = part
    values = values - _matmul(reads, state)
    out = _matmul(queries, state) + _matmul(scores, values)
    return state * left + _matmul(keys.swapaxes(-1, -2), values), out

  state, out = jax.lax.scan(step, state, (values, reads, scores, queries, keys, left))
  out = jnp.transpose(out, (1, 0, 3, 2, 4))  # [chunks, B, H, chunk, dv] -> [B, chunks, chunk, ...]
  return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :tokens].astype(dtype), state


def _by_chunks(x, chunk: int):
  """[B, S, H, ...] as [chunks, B, H, chunk, ...]; zeros behind the last token change nothing."""
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)) + ((0, 0),) * (x.ndim - 2))
  x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
  return jnp.moveaxis(x, (1, 3), (0, 2))


@jax.custom_jvp
def unit_lower_inverse(lower: Float[Array, '... n n']) -> Float[Array, '... n n']:
  """(1 + lower)^-1 for a strictly lower triangular matrix.

  Inverses of the diagonal blocks of side 1, 2, 4, ...: two of them and what lies below make the
  next, [[P, 0], [M, Q]]^-1 = [[P^-1, 0], [-Q^-1 M P^-1, Q^-1]]. As stable as substitution, which
  the product (1 - a)(1 + a^2)(1 + a^4)... is not: with equal keys its terms cancel from 1e18. All
  in dense products, because a row-by-row solve is slow on every accelerator.
  """
  n = lower.shape[-1]
  row, column = np.arange(n)[:, None], np.arange(n)
  inverse = jnp.broadcast_to(jnp.eye(n, dtype=lower.dtype), lower.shape)
  side = 1
  while side < n:
    below = (row // side % 2 == 1) & (column // side == row // side - 1)
    corner = jnp.where(below, lower, 0.0)
    # Blocks of side 1 are their own inverses.
    inverse -= corner if side == 1 else _matmul(_matmul(inverse, corner), inverse)
    side *= 2
  return inverse


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
  inverse = unit_lower_inverse(*primals)
  return inverse, -_matmul(_matmul(inverse, tangents[0]), inverse)
