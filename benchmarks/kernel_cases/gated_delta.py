"""Prefill by the gated delta rule: 'TxKxV', T tokens, K key heads and V value heads of 128 numbers.

From what the projections emit, [1, T, heads 128] in bfloat16, to the same. 'xla, solve' solves the
triangular systems of the chunks instead of inverting their matrices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np

from kernel_cases import KERNEL, Case
from wallwm_jax.kernels.gated_delta import pallas_tpu, xla

NAMES = ('2048x16x32',)
_DIM, _CHUNK = 128, 64


def case(name: str) -> Case:
  """Raises ValueError on sizes that the kernel does not take."""
  tokens, keys, values = (int(n) for n in name.split('x'))
  q, v = (
    jax.ShapeDtypeStruct((1, tokens, heads * _DIM), jnp.bfloat16) for heads in (keys, values)
  )
  gate = jax.ShapeDtypeStruct((1, tokens, values), jnp.float32)
  state = jax.ShapeDtypeStruct((1, values, _DIM, _DIM), jnp.float32)
  heads = (jax.ShapeDtypeStruct((1, tokens, n, _DIM), jnp.bfloat16) for n in (keys, values))
  if not pallas_tpu.supports(*heads):
    raise ValueError(f'the gated_delta kernel does not take {name}')
  programs = {
    KERNEL: _by_heads(pallas_tpu.gated_delta),
    'xla': _by_heads(xla.gated_delta),
    'xla, solve': _by_heads(_solve),
  }
  operands = (q, q, v, gate, gate, state)
  moved = sum(x.size * x.dtype.itemsize for x in (*operands, v, state))
  # the kernel's own copies of g and beta, one of which fills a quarter of its lanes
  gates = tokens * values * 4 * (128 // (values // 2) + 2)
  return Case(programs, operands, {'gated_delta': moved + gates}, moved)


def _by_heads(rule):
  def run(q, k, v, g, beta, state):
    q, k, v = (x.reshape(*x.shape[:2], -1, _DIM) for x in (q, k, v))
    out, state = rule(q, k, v, g, beta, state)
    return out.reshape(*out.shape[:2], -1), state

  return run


def _solve(q, k, v, g, beta, state):
  tokens, group = v.shape[1], v.shape[2] // k.shape[2]
  q, k = (jnp.repeat(x, group, 2) for x in (q, k))
  q, k, v, g, beta = (xla._by_chunks(x.astype(jnp.float32), _CHUNK) for x in (q, k, v, g, beta))
  decay = jnp.cumsum(g, -1)
  order = np.arange(_CHUNK)[:, None] - np.arange(_CHUNK)
  pair = jnp.exp(jnp.where(order >= 0, decay[..., :, None] - decay[..., None, :], -jnp.inf))
  weighted = k * beta[..., None]
  lower = jnp.where(order > 0, xla._matmul(weighted, k.swapaxes(-1, -2)) * pair, 0.0)
  sides = jnp.concatenate([v * beta[..., None], weighted * jnp.exp(decay)[..., None]], -1)
  solved = jax.scipy.linalg.solve_triangular(
    lower + jnp.eye(_CHUNK), sides, lower=True, unit_diagonal=True
  )

  def step(state, part):
    q, k, solved, pair, decay = part
    values, reads = jnp.split(solved, 2, -1)
    values = values - xla._matmul(reads, state)
    scores = xla._matmul(q, k.swapaxes(-1, -2)) * pair
    out = xla._matmul(q * jnp.exp(decay)[..., None], state) + xla._matmul(scores, values)
    keys = k * jnp.exp(decay[..., -1:] - decay)[..., None]
    left = jnp.exp(decay[..., -1])[..., None, None]
    return state * left + xla._matmul(keys.swapaxes(-1, -2), values), out

  state, out = jax.lax.scan(step, state, (q, k, solved, pair, decay))
  out = jnp.transpose(out, (1, 0, 3, 2, 4))
  return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :tokens].astype(jnp.bfloat16), state
