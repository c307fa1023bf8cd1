"""Entry point of the gated delta rule."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wallwm_jax.kernels.gated_delta import pallas_tpu, reference, xla
from wallwm_jax.types import ConfigError

# exp(-20) is nothing beside float32 rounding, but sums of decays that lie far below it lose the
# differences between weak ones.
_LEAST_DECAY = -20.0

Implementation = Literal['pallas_tpu', 'recurrent', 'xla']


def gated_delta(
  q: Float[Array, 'B S Hk dk'],
  k: Float[Array, 'B S Hk dk'],
  v: Float[Array, 'B S Hv dv'],
  g: Float[Array, 'B S Hv'],
  beta: Float[Array, 'B S Hv'],
  state: Float[Array, 'B Hv dk dv'],
  *,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, 'B S Hv dv'], Float[Array, 'B Hv dk dv']]:
  """S tokens of the rule of `reference`, from `state` on. Key head h serves the value heads
  h Hv / Hk and on.

  A token with g = 0 and beta = 0 leaves the state as it is, whatever finite numbers its q, k and v
  hold; numbers that are not finite must be set to 0 by the caller.

  Args:
    q, k, v: of one dtype; q and k of unit length (q also scaled by dk^-0.5).
    g: log of what the state keeps, <= 0, float32; below -20 it counts as -20.
    beta: strength of the write, 0..1, float32.
    state: float32.
    implementation: by name. None takes `recurrent` for one token; for more the TPU kernel in
      programs compiled for a TPU, when it supports the shapes, `xla` otherwise. The kernel rounds
      to bfloat16 what it multiplies if v is bfloat16, everything else is float32.

  Returns:
    (o, dtype of v; the float32 state after the last token). Gradients are those of the `xla` form.

  Raises:
    ConfigError: shapes or dtypes that do not fit together, or an unknown implementation.
    NotImplementedError: the named implementation does not support this call.
  """
  _check(q, k, v, g, beta, state)
  inputs = q, k, v, jnp.maximum(g, _LEAST_DECAY), beta, state
  if implementation is not None:
    if implementation not in _BACKENDS:
      raise ConfigError(
        f'gated_delta implementation: expected None or one of {sorted(_BACKENDS)}, '
        f'got {implementation!r}.'
      )
    return _BACKENDS[implementation](*inputs)
  if q.shape[1] == 1:
    return reference.gated_delta(*inputs)
  return _best(*inputs) if pallas_tpu.supports(q, v) else xla.gated_delta(*inputs)


def _differentiable(rule):
  """`rule` with the gradients of the XLA form, which computes its chunks once more for them."""
  rule = jax.custom_vjp(rule)
  rule.defvjp(lambda *inputs: (rule(*inputs), inputs), _backward)
  return rule


def _backward(inputs, cotangents):
  return jax.vjp(xla.gated_delta, *inputs)[1](cotangents)


@_differentiable
def _best(*inputs):
  return jax.lax.platform_dependent(
    *inputs, tpu=pallas_tpu.gated_delta, default=xla.gated_delta
  )


_BACKENDS = {
  'pallas_tpu': _differentiable(pallas_tpu.gated_delta),
  'recurrent': reference.gated_delta,
  'xla': xla.gated_delta,
}


def _check(q, k, v, g, beta, state):
  float32 = all(x.dtype == jnp.float32 for x in (g, beta, state))
  if not (q.dtype == k.dtype == v.dtype and float32):
    raise ConfigError(
      'gated_delta: expected q, k, v of one dtype and float32 g, beta, state, got '
      f'{", ".join(str(x.dtype) for x in (q, k, v, g, beta, state))}.'
    )
  fits = q.ndim == v.ndim == 4 and q.shape == k.shape and q.shape[:2] == v.shape[:2]
  fits = fits and v.shape[2] % q.shape[2] == 0 and g.shape == beta.shape == v.shape[:3]
  if not fits or state.shape != (v.shape[0], v.shape[2], q.shape[3], v.shape[3]):
    raise ConfigError(
      'gated_delta: expected q, k [B, S, Hk, dk], v [B, S, Hv, dv] with Hv a multiple of Hk, g, '
      f'beta [B, S, Hv] and state [B, Hv, dk, dv], got q {q.shape}, k {k.shape}, v {v.shape}, '
      f'g {g.shape}, beta {beta.shape}, state {state.shape}.'
    )
