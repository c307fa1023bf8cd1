"""Newton-Schulz iteration: the nearest orthogonal matrix of many matrices at once, by matmuls only.

Each step maps X to (a I + P) X with P = b A + c A^2 and A = X X^T, which moves every singular value
s to a s + b s^3 + c s^5 and keeps the singular vectors; after all steps every one is close to 1.

Two forms of the same iteration. The direct one applies every step to X. The Gram form iterates on
the small square A and collects the steps in Q = (a I + P_k) ... (a I + P_1), because A also becomes
(a I + P) A (a I + P); X <- Q X follows only at a few restarts, where A is computed anew. That saves
work on long matrices, but rounding makes A and Q drift from X X^T: in bfloat16 restarts after the
second and fourth of five steps are needed to keep singular values bounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wallwm_jax.config import nearest
from wallwm_jax.kernels.syrk.api import syrk
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
      (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS
    ),
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
  norm: upper bound of the largest singular value that the matrix is divided by first. Both are read
  off the first Gram matrix; 'schatten4', the fourth root of sum s^4, is tighter than 'frobenius'
  and leaves the small singular values nearer to 1 (arXiv 2506.10935).
  form: 'direct', 'gram', or 'auto' = the one with less work for the shape.
  restarts: steps after which the Gram form applies Q; the last step always does.

  Raises:
    ConfigError: a restart beyond the steps, or not in increasing order.
  """

  coefficients: Coefficients
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  norm: Literal['schatten4', 'frobenius'] = 'schatten4'
  form: Literal['auto', 'direct', 'gram'] = 'auto'
  restarts: tuple[int, ...] = (2, 4)

  def __post_init__(self):
    steps = len(self.coefficients)
    if list(self.restarts) != sorted(set(self.restarts)) or any(r < 1 for r in self.restarts):
      raise ConfigError(
        f'Newton-Schulz restarts: expected increasing steps >= 1, got {self.restarts}.'
      )
    if self.form == 'gram' and any(r > steps for r in self.restarts):
      raise ConfigError(f'Newton-Schulz restarts: {self.restarts} reach beyond the {steps} steps.')

  def segments(self) -> tuple[Coefficients, ...]:
    """The steps between two restarts of the Gram form."""
    ends = [*(r for r in self.restarts if r < len(self.coefficients)), len(self.coefficients)]
    return tuple(self.coefficients[i:j] for i, j in zip([0, *ends[:-1]], ends, strict=True))

  def form_for(self, rows: int, cols: int) -> Literal['direct', 'gram']:
    """The form of a matrix [rows, cols]."""
    if self.form != 'auto':
      return self.form
    return min(('direct', 'gram'), key=lambda form: self.flops(rows, cols, form))

  def flops(
    self, rows: int, cols: int, form: str | None = None, *, symmetric: float = 1.0, parts: int = 1
  ) -> float:
    """Matmul FLOPs of one matrix on each of the `parts` devices that share its long side.

    Args:
      form: None = `form_for`. symmetric: cost of a symmetric product over that of a full one.
    """
    m, n = sorted((rows, cols))
    form = form or self.form_for(rows, cols)
    long, square = 2.0 * m * m * n / parts, 2.0 * m**3
    if form == 'direct':
      return len(self.coefficients) * ((1 + symmetric) * long + symmetric * square)
    segments = self.segments()
    squares = sum(4 * len(steps) - 3 for steps in segments)
    return len(segments) * (1 + symmetric) * long + squares * symmetric * square


def orthogonalize(
  x: Float[Array, '... m n'], how: NewtonSchulz, total: Callable[[Array], Array] | None = None
) -> Float[Array, '... m n']:
  """U V^T (approximately) of every matrix U S V^T in `x`; `how.dtype`.

  Independent of the scale of each matrix, as long as the squares of its entries stay inside the
  range of float32 (1e-19 to 1e17). A zero matrix stays zero; a NaN stays in its own matrix.

  Args:
    total: sums an array over the devices that each hold some columns of the same matrices (m <= n);
      None = whole matrices.
  """
  if x.shape[-2] > x.shape[-1] and total is None:
    return orthogonalize(x.swapaxes(-1, -2), how).swapaxes(-1, -2)
  x = x.astype(how.dtype)
  form = how.form_for(*x.shape[-2:]) if total is None else 'gram'

  def gram(x):
    part = syrk(x, x)
    return part if total is None else total(part)

  a = gram(x)
  root = _inverse_norm(a, how.norm)
  a = (a.astype(jnp.float32) * root * root).astype(a.dtype)
  segments = how.segments() if form == 'gram' else [(step,) for step in how.coefficients]
  for i, steps in enumerate(segments):
    if i:
      # X is what was rounded: XLA would otherwise carry a float32 copy from step to step.
      x = jax.lax.optimization_barrier(x)
    # The division of X itself is left to the first polynomial: a pass over X less.
    q, p = _collect(gram(x) if i else a, steps, 1.0 if i else root)
    x = _apply(q, p, x)
  return x


def _inverse_norm(gram, kind):
  """1 / ||X|| of every X from its Gram matrix [..., m, m]; [..., 1, 1] float32; 1 for X = 0."""
  gram = gram.astype(jnp.float32)
  # Divided by its largest entry (a diagonal one), no square of a Gram matrix overflows.
  peak = jnp.max(jnp.abs(gram), axis=(-2, -1), keepdims=True)
  peak = jnp.where(peak == 0, 1.0, peak)
  if kind == 'frobenius':
    squared = peak * jnp.sum(jnp.where(_eye(gram), gram / peak, 0.0), axis=(-2, -1), keepdims=True)
  else:
    squared = peak * jnp.sqrt(jnp.sum(jnp.square(gram / peak), axis=(-2, -1), keepdims=True))
  return jax.lax.rsqrt(jnp.where(squared == 0, 1.0, squared))


def _collect(gram, steps: Coefficients, root):
  """(q, P) with q I + P = root * (a_k I + P_k) ... (a_1 I + P_1); q None = 0."""
  (a, b, c), *rest = steps
  if not rest:
    return a * root, syrk(gram, gram, gram, alpha=c * root, beta=b * root)
  factor = _add_identity(syrk(gram, gram, gram, alpha=c, beta=b), a)
  q = factor
  for i, (a, b, c) in enumerate(rest):
    # A <- (a I + P) A (a I + P); every product is a polynomial of A, hence symmetric.
    gram = syrk(syrk(factor, gram), factor)
    p = syrk(gram, gram, gram, alpha=c, beta=b)
    if i == len(rest) - 1:
      return None, syrk(p, q, q, alpha=root, beta=a * root)
    factor = _add_identity(p, a)
    q = syrk(factor, q)


def _apply(q, p, x):
  """(q I + P) X, accumulated in float32; q None = 0."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  y = jnp.matmul(p, x, precision=precision, preferred_element_type=jnp.float32)
  return (y if q is None else y + q * x.astype(jnp.float32)).astype(x.dtype)


def _add_identity(p, a):
  return (p.astype(jnp.float32) + jnp.where(_eye(p), a, 0.0)).astype(p.dtype)


def _eye(x):
  """True on the diagonal of every matrix of `x`."""
  rows, cols = (jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - i) for i in (2, 1))
  return rows == cols
