"""The symmetric product of Newton-Schulz: 'MxK', 'MxK_c' with its epilogue alpha a a^T + beta c."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernel_cases import KERNEL, Case
from wallwm_jax.kernels.syrk import pallas_tpu, xla

NAMES = ('3072x3072', '3072x3072_c', '3072x14336', '5120x13824_c')


def case(name: str) -> Case:
  """Raises ValueError on sizes that the kernel does not take."""
  size, _, epilogue = name.partition('_')
  m, k = (int(side) for side in size.split('x'))
  a, c, scale = (
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (((m, k), jnp.bfloat16), ((m, m), jnp.bfloat16), ((1, 1), jnp.float32))
  )
  tiles = pallas_tpu._tiles(m, k, epilogue=bool(epilogue))
  if tiles is None:
    raise ValueError(f'the syrk kernel does not take {name}')
  side, pairs = tiles[0], pallas_tpu._pairs(m // tiles[0]).shape[1]
  # both factors of every pair of blocks, c, and the result
  moved = 2 * (pairs * side * (2 * k + side * bool(epilogue)) + m * m)
  ideal = 2 * (m * k + m * m * (1 + bool(epilogue)))
  if not epilogue:
    programs = {KERNEL: _kernel, 'xla': lambda a, scale: xla.syrk(a, a, None, scale, 0.0)}
    return Case(programs, (a, scale), {'syrk': moved}, ideal)
  programs = {KERNEL: _kernel_c, 'xla, fused': _fused_c, 'xla, two passes': _two_passes_c}
  return Case(programs, (a, scale, scale, c), {'syrk': moved}, ideal)


def _kernel(a, alpha):
  return pallas_tpu.syrk(a, a, None, alpha, jnp.zeros_like(alpha))


def _kernel_c(a, alpha, beta, c):
  return pallas_tpu.syrk(a, a, c, alpha, beta)


def _fused_c(a, alpha, beta, c):
  return xla.syrk(a, a, c, alpha, beta)


def _two_passes_c(a, alpha, beta, c):
  product = jax.lax.optimization_barrier(xla.syrk(a, a, None, 1.0, beta))
  return (alpha * product.astype(jnp.float32) + beta * c.astype(jnp.float32)).astype(a.dtype)
