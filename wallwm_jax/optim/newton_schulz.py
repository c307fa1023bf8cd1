"""Newton-Schulz iteration: the nearest orthogonal matrix of many matrices at once, by matmuls only.

Each step maps X to a X + (b A + c A^2) X with A = X X^T, which moves every singular value s to
a s + b s^3 + c s^5 and keeps the singular vectors; after all steps every one is close to 1.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wallwm_jax.config import nearest
from wallwm_jax.types import ConfigError

Coefficients = tuple[tuple[float, float, float], ...]

_JORDAN = (3.4445, -4.7750, 2.0315)
# You Jiacheng's per-step coefficients (modded-nanogpt).
_YOU = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Amsel et al., "The Polar Express" (arXiv 2505.16932), smallest singular value 1e-3.
_POLAR_EXPRESS = (
    (8.287212, -23.595887, 17.300387),
    (4.107059, -2.947850, 0.544843),
    (3.948691, -2.908902, 0.551819),
    (3.318420, -2.488488, 0.510049),
    (2.300652, -1.668904, 0.418807),
)
# Polynomials are evaluated at s / safety, so that bfloat16 rounding cannot push s out of range.
_SAFETY = 1.05


def coefficients(name: str, steps: int) -> Coefficients:
  """The (a, b, c) of every step: 'jordan' (any number of steps), 'you' or 'polar_express' (five).

  Raises:
    ConfigError: unknown name, or a number of steps the set does not define.
  """
  tables = {
      'jordan': (_JORDAN,) * max(steps, 1),
      'you': _YOU,
      'polar_express': tuple(
          (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS),
  }
  if name not in tables:
    raise ConfigError(f'optim.ns_coefficients: unknown set {name!r}.{nearest(name, tables)}')
  if steps != len(tables[name]):
    defined = '1 or more' if name == 'jordan' else len(tables[name])
    raise ConfigError(f'optim.ns_steps: {name!r} defines {defined} steps, got {steps}.')
  return tables[name]


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
  """How to orthogonalise.

  coefficients: one (a, b, c) per step.
  dtype: of the matmul operands; bfloat16 accumulates in float32.
  norm: upper bound of the largest singular value that the matrix is divided by first. 'schatten4',
  the fourth root of sum s^4, is read off the first Gram matrix; it is tighter than 'frobenius' and
  leaves the small singular values nearer to 1 (arXiv 2506.10935).
  """

  coefficients: Coefficients
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  norm: Literal['schatten4', 'frobenius'] = 'schatten4'


def orthogonalize(x: Float[Array, "... m n"], how: NewtonSchulz) -> Float[Array, "... m n"]:
  """U V^T (approximately) of every matrix U S V^T in `x`; float32.

  Independent of the scale of each matrix. A zero matrix stays zero; a NaN stays in its own matrix.
  """
  if x.shape[-2] > x.shape[-1]:
    return orthogonalize(x.swapaxes(-1, -2), how).swapaxes(-1, -2)
  x = _unit_frobenius(x.astype(jnp.float32)).astype(how.dtype)
  for step, (a, b, c) in enumerate(how.coefficients):
    gram = _matmul(x, x.swapaxes(-1, -2))
    if step == 0 and how.norm == 'schatten4':
      squared = jnp.sqrt(jnp.sum(gram * gram, axis=(-2, -1), keepdims=True))
      squared = jnp.where(squared == 0, 1.0, squared)
      gram, x = gram / squared, (x * jax.lax.rsqrt(squared)).astype(how.dtype)
    gram = gram.astype(how.dtype)
    polynomial = (b * gram + c * _matmul(gram, gram)).astype(how.dtype)
    x = (a * x.astype(jnp.float32) + _matmul(polynomial, x)).astype(how.dtype)
  return x.astype(jnp.float32)


def _unit_frobenius(x):
  """x / ||x||_F without overflow or underflow; zero stays zero."""
  peak = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
  x = x / jnp.where(peak == 0, 1.0, peak)
  norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
  return x / jnp.where(norm == 0, 1.0, norm)


def _matmul(a, b):
  """Batched product accumulated in float32; float32 operands are not rounded on any platform."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)
