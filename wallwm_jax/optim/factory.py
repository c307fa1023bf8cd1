"""The optimizer of a run, from its config and the routing table."""

from __future__ import annotations

from typing import Any

import jax
import optax

from wallwm_jax.config import OptimConfig
from wallwm_jax.optim.matrices import Matrix
from wallwm_jax.optim.muon import muon
from wallwm_jax.optim.newton_schulz import NewtonSchulz, coefficients
from wallwm_jax.optim.plan import Plan, make_plan
from wallwm_jax.optim.routing import optimizer_of
from wallwm_jax.optim.schedules import make_schedule
from wallwm_jax.types import ConfigError


def make_optimizer(
  config: OptimConfig, shapes: Any, labels: Any, total_steps: int, shardings: Any | None = None
) -> optax.GradientTransformationExtraArgs:
  """Clipping, then Muon for 'muon' leaves, AdamW for 'adamw' leaves, nothing for 'frozen' ones.

  The gradient norm is clipped over the trainable leaves only (clip_norm 0 = off). Weight decay
  applies to the matrices labelled 'muon', whichever optimizer updates them: with
  `optimizer='adamw'` that is AdamW with the same schedule. Frozen leaves have no state and their
  update is exactly 0.

  Args:
    shapes: tree of arrays or ShapeDtypeStructs, checked against `labels`.
    labels: tree of labels from `routing.route`.
    total_steps: updates of the run, for the schedule.
    shardings: tree of NamedShardings of the parameters, to spread Newton-Schulz over their mesh;
      None = one device.

  Raises:
    ConfigError: labels of another tree, shardings of several meshes, or an illegal schedule or
      Newton-Schulz setting.
  """
  if jax.tree.structure(labels) != jax.tree.structure(shapes):
    raise ConfigError(
      'make_optimizer: labels and parameters are different trees. Route these parameters again.'
    )
  schedule = make_schedule(config, total_steps)

  def adamw(weight_decay: float):
    return optax.adamw(
      schedule, config.adam_b1, config.adam_b2, config.adam_eps, weight_decay=weight_decay
    )

  if config.optimizer == 'muon':
    matrices = muon(
      schedule,
      newton_schulz(config),
      plan=make_muon_plan(config, shapes, labels, shardings),
      momentum=config.momentum,
      nesterov=config.nesterov,
      update_scale=config.update_scale,
      weight_decay=config.weight_decay,
      mu_dtype=config.mu_dtype,
      normuon_b2=config.normuon_b2,
    )
  else:
    matrices = adamw(config.weight_decay)
  update = optax.partition(
    {'muon': matrices, 'adamw': adamw(0.0), 'frozen': optax.set_to_zero()},
    jax.tree.map(optimizer_of, labels),
  )
  if not config.clip_norm:
    return update
  trainable = jax.tree.map(lambda label: label != 'frozen', labels)
  return optax.chain(optax.masked(optax.clip_by_global_norm(config.clip_norm), trainable), update)


def newton_schulz(config: OptimConfig) -> NewtonSchulz:
  """How a run orthogonalises.

  Raises:
    ConfigError: unknown coefficients, or a number of steps they do not define.
  """
  return NewtonSchulz(coefficients(config.ns_coefficients, config.ns_steps), config.ns_dtype)


def make_muon_plan(
  config: OptimConfig, shapes: Any, labels: Any, shardings: Any | None = None
) -> Plan:
  """The plan of the leaves that `labels` gives to Muon; arguments as in `make_optimizer`."""

  def keep(tree):
    return jax.tree.map(
      lambda label, leaf: leaf if isinstance(label, Matrix) else optax.MaskedNode(), labels, tree
    )

  views = [label for label in jax.tree.leaves(labels) if isinstance(label, Matrix)]
  return make_plan(
    keep(shapes), views, newton_schulz(config), None if shardings is None else keep(shardings)
  )
