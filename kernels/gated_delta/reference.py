"""The definition of the rule, one token after another in float32; also its form for decoding.

Per value head, state S [dk, dv], token (q, k, v, g <= 0, beta in 0..1):

  S <- exp(g) S;   S <- S + k (beta (v - S^T k))^T;   o = S^T q

Source: Gated Delta Networks (arXiv 2412.06464).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gated_delta(q, k, v, g, beta, state):
  """See `api.gated_delta`."""
  dtype, group = v.dtype, v.shape[2] // k.shape[2]
  q, k = (jnp.repeat(x, group, 2) for x in (q, k))

  def step(state, token):
    q, k, v, g, beta = token
    state = state * jnp.exp(g)[..., None, None]
    error = v - jnp.einsum('bhkv,bhk->bhv', state, k, precision='highest')
    state = state + k[..., None] * (beta[..., None] * error)[..., None, :]
    return state, jnp.einsum('bhkv,bhk->bhv', state, q, precision='highest')

  tokens = (jnp.moveaxis(x, 1, 0).astype(jnp.float32) for x in (q, k, v, g, beta))
  state, out = jax.lax.scan(step, state, tuple(tokens))
  return jnp.moveaxis(out, 0, 1).astype(dtype), state
