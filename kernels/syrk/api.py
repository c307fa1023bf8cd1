"""Entry point of the symmetric product (BLAS: syrk; with two factors, cuBLAS: syrkx)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from wallwm_jax.kernels.syrk import pallas_tpu, xla
from wallwm_jax.types import ConfigError

Implementation = Literal['pallas_tpu', 'xla']

_BACKENDS = {'pallas_tpu': pallas_tpu.syrk, 'xla': xla.syrk}


def syrk(
  a: jax.Array,
  b: jax.Array,
  c: jax.Array | None = None,
  *,
  alpha: jax.Array | float = 1.0,
  beta: jax.Array | float = 0.0,
  implementation: Implementation | None = None,
) -> jax.Array:
  """alpha * a b^T + beta * c, for a product that is symmetric in exact arithmetic.

  That is so for b = a, and for two polynomials of one symmetric matrix. Which triangle is computed
  and which is mirrored is up to the backend, so an unsymmetric product is garbage, not an error.

  Args:
    a, b: [..., m, k], one dtype; bfloat16 accumulates in float32.
    c: symmetric [..., m, m] of the same dtype, or None.
    alpha, beta: scalars, or [..., 1, 1] factors of every matrix; float32.
    implementation: a backend by name. None takes the TPU kernel in programs compiled for a TPU when
      it supports the shapes, XLA otherwise.

  Returns:
    [..., m, m], dtype of `a`.

  Raises:
    ConfigError: shapes or dtypes that do not fit together, or an unknown implementation.
    NotImplementedError: the named implementation does not support this call.
  """
  _check(a, b, c)
  alpha, beta = (_per_matrix(x, a) for x in (alpha, beta))
  if implementation is not None:
    if implementation not in _BACKENDS:
      raise ConfigError(
        f'syrk implementation: expected None or one of {sorted(_BACKENDS)}, got {implementation!r}.'
      )
    return _BACKENDS[implementation](a, b, c, alpha, beta)
  if not pallas_tpu.supports(a):
    return xla.syrk(a, b, c, alpha, beta)
  operands = (a, b, c, alpha, beta)
  return jax.lax.platform_dependent(*operands, tpu=pallas_tpu.syrk, default=xla.syrk)


def _per_matrix(x, a):
  return jnp.broadcast_to(jnp.asarray(x, jnp.float32), (*a.shape[:-2], 1, 1))


def _check(a, b, c):
  if a.ndim < 2 or a.shape != b.shape or a.dtype != b.dtype:
    raise ConfigError(
      'syrk: expected two factors [..., m, k] of one shape and dtype, '
      f'got {a.shape} {a.dtype} and {b.shape} {b.dtype}.'
    )
  square = (*a.shape[:-1], a.shape[-2])
  if c is not None and (c.shape != square or c.dtype != a.dtype):
    raise ConfigError(f'syrk: expected c {square} {a.dtype}, got {c.shape} {c.dtype}.')
