"""Muon: orthogonalised momentum, an optax transformation for trees of matrices.

Source: Jordan et al., "Muon" (2024); update scale and weight decay: "Muon is Scalable for LLM
Training" (arXiv 2502.16982).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from wallwm_jax.optim.distribute import orthogonalize_tree
from wallwm_jax.optim.matrices import Matrix
from wallwm_jax.optim.newton_schulz import NewtonSchulz
from wallwm_jax.optim.normuon import normalize_neurons
from wallwm_jax.optim.plan import Plan, make_plan
from wallwm_jax.types import ConfigError

UpdateScale = Literal['rms', 'jordan', 'spectral']


class MuonState(NamedTuple):
  """count: updates so far. mu: momentum, like the parameters in structure, shape and sharding.

  Neither the plan nor the coefficients are state: a checkpoint restores on any mesh, and settings
  may change on resume.
  """

  count: Int[Array, '']
  mu: Any


def muon(
  learning_rate: optax.ScalarOrSchedule,
  newton_schulz: NewtonSchulz,
  *,
  plan: Plan | None = None,
  momentum: float = 0.95,
  nesterov: bool = True,
  bias_correction: bool = False,
  update_scale: UpdateScale = 'rms',
  weight_decay: float = 0.0,
  weight_decay_mask: Any | None = None,
  mu_dtype: str | None = None,
  normuon_b2: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """p <- p - lr * (scale(m, n) * orthogonalise(M') + weight_decay * p).

  See `scale_by_muon` for M' and scale. Weight decay is decoupled and uses the plain learning rate.
  Composes like any optax transformation: `optax.partition`, `chain`, `MultiSteps`, `masked`.

  Args:
    plan: who orthogonalises what, from `make_plan`; None = stacks [L, m, n] on one device.
    weight_decay_mask: tree of bool, or a function of the parameters; None decays every leaf.
    normuon_b2: decay of NorMuon's second moments, which needs a plan; 0 = plain Muon.

  Raises:
    ConfigError: NorMuon without a plan; see `scale_by_muon` for the rest.
  """
  scale = scale_by_muon(
    newton_schulz,
    plan,
    momentum=momentum,
    nesterov=nesterov,
    bias_correction=bias_correction,
    update_scale=update_scale,
    mu_dtype=mu_dtype,
  )
  if normuon_b2:
    if plan is None:
      raise ConfigError(f'normuon_b2={normuon_b2}: expected a plan, got none. Make one: make_plan.')
    scale = optax.chain(scale, normalize_neurons(normuon_b2, [leaf.view for leaf in plan.leaves]))
  return optax.with_extra_args_support(
    optax.chain(
      scale,
      optax.add_decayed_weights(weight_decay, weight_decay_mask),
      optax.scale_by_learning_rate(learning_rate),
    )
  )


def scale_by_muon(
  newton_schulz: NewtonSchulz,
  plan: Plan | None = None,
  *,
  momentum: float = 0.95,
  nesterov: bool = True,
  bias_correction: bool = False,
  update_scale: UpdateScale = 'rms',
  mu_dtype: str | None = None,
) -> optax.GradientTransformation:
  """Gradients G -> scale(m, n) * orthogonalise(M') of every matrix.

  M <- momentum M + (1 - momentum) G, and M' = momentum M + (1 - momentum) G with Nesterov, else M.
  The orthogonal factor does not depend on the scale of M', so this equals the heavy-ball form
  M <- momentum M + G. With `bias_correction`, M and G in M' are divided by 1 - momentum^(t + 2) and
  1 - momentum^(t + 1) (Dozat 2016, as in optax.contrib.muon); that changes M' early on.

  Raises:
    ConfigError: a tree or mesh other than the plan's, or without a plan, leaves that are no stacks.
  """

  def init(params):
    if plan is not None:
      plan.check(params)

    def zeros(p):
      sharding = getattr(p, 'sharding', None)  # None under a trace: jit's out_shardings decide
      return jnp.zeros(p.shape, mu_dtype or p.dtype, device=sharding)

    return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params))

  def update(updates, state, params=None):
    del params
    work = plan or _plan_for_one_device(updates, newton_schulz)
    count = state.count + 1

    def average(mu, g):
      wide = jnp.promote_types(mu.dtype, g.dtype)
      return momentum * mu.astype(wide) + (1 - momentum) * g.astype(wide)

    mu = jax.tree.map(average, state.mu, updates)
    if bias_correction:
      now, ahead = (1 / (1 - momentum ** (count + i)) for i in (0, 1))
    else:
      now = ahead = 1.0
    if nesterov:
      direction = jax.tree.map(
        lambda m, g: ahead * momentum * m + now * (1 - momentum) * g, mu, updates
      )
    else:
      direction = jax.tree.map(lambda m: now * m, mu)
    factors = orthogonalize_tree(direction, work, newton_schulz)
    treedef = jax.tree.structure(updates)
    scales = [_scale(update_scale, *leaf.view.shape(leaf.shape)[1:]) for leaf in work.leaves]
    scaled = jax.tree.map(
      lambda x, g, scale: scale * x.astype(g.dtype), factors, updates, treedef.unflatten(scales)
    )
    mu = jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu)
    return scaled, MuonState(count, mu)

  return optax.GradientTransformation(init, update)


def _plan_for_one_device(tree, how: NewtonSchulz) -> Plan:
  return make_plan(tree, [Matrix()] * len(jax.tree.leaves(tree)), how)


def _scale(kind: UpdateScale, fan_in: int, fan_out: int) -> float:
  """Factor on an orthogonal update; 'rms' gives entries of RMS 0.2, about that of Adam updates.

  Raises:
    ConfigError: unknown kind.
  """
  if kind == 'rms':
    return 0.2 * math.sqrt(max(fan_in, fan_out))
  if kind == 'jordan':
    return math.sqrt(max(1.0, fan_out / fan_in))
  if kind == 'spectral':
    return math.sqrt(fan_out / fan_in)
  raise ConfigError(f"optim.update_scale: expected 'rms', 'jordan' or 'spectral', got {kind!r}.")
