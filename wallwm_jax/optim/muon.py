"""Muon: orthogonalised momentum, an optax transformation for trees of stacked matrices [..., m, n].

Source: Jordan et al., "Muon" (2024); update scale and weight decay: "Muon is Scalable for LLM
Training" (arXiv 2502.16982).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wallwm_jax.optim.newton_schulz import NewtonSchulz, orthogonalize

UpdateScale = Literal['rms', 'jordan', 'spectral']


class MuonState(NamedTuple):
  """mu: momentum, like the parameters in structure, shape, dtype and sharding; nothing else."""

  mu: Any


def muon(
    learning_rate: optax.ScalarOrSchedule,
    newton_schulz: NewtonSchulz,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    update_scale: UpdateScale = 'rms',
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """p <- p - lr * (scale(m, n) * orthogonalise(M') + weight_decay * p).

  See `scale_by_muon` for M' and scale. Weight decay is decoupled and uses the plain learning rate.
  """
  return optax.with_extra_args_support(optax.chain(
      scale_by_muon(newton_schulz, momentum, nesterov, update_scale),
      optax.add_decayed_weights(weight_decay),
      optax.scale_by_learning_rate(learning_rate),
  ))


def scale_by_muon(
    newton_schulz: NewtonSchulz, momentum: float, nesterov: bool, update_scale: UpdateScale
) -> optax.GradientTransformation:
  """Gradients G [..., m, n] -> scale(m, n) * orthogonalise(M').

  M <- momentum M + (1 - momentum) G, and M' = momentum M + (1 - momentum) G with Nesterov, else M.
  The orthogonal factor does not depend on the scale of M', so this equals the heavy-ball form
  M <- momentum M + G. Leading axes stack independent matrices; kernels are [fan_in, fan_out].
  """

  def init(params):
    return MuonState(jax.tree.map(lambda p: jnp.zeros_like(p), params))

  def update(updates, state, params=None):
    del params

    def average(mu, g):
      return momentum * mu + (1 - momentum) * g

    mu = jax.tree.map(average, state.mu, updates)
    direction = jax.tree.map(average, mu, updates) if nesterov else mu

    def finish(m):
      return (_scale(update_scale, *m.shape[-2:]) * orthogonalize(m, newton_schulz)).astype(m.dtype)

    return jax.tree.map(finish, direction), MuonState(mu)

  return optax.GradientTransformation(init, update)


def _scale(kind: UpdateScale, fan_in: int, fan_out: int) -> float:
  """Factor on an orthogonal update; 'rms' gives entries of RMS 0.2, about that of Adam updates."""
  if kind == 'rms':
    return 0.2 * math.sqrt(max(fan_in, fan_out))
  if kind == 'jordan':
    return math.sqrt(max(1.0, fan_out / fan_in))
  return math.sqrt(fan_out / fan_in)
