"""The optimizer of a run, from its config and the routing table."""

from __future__ import annotations

from typing import Any

import jax
import optax

from wallwm_jax.config import OptimConfig
from wallwm_jax.optim.muon import muon
from wallwm_jax.optim.newton_schulz import NewtonSchulz, coefficients
from wallwm_jax.optim.schedules import make_schedule
from wallwm_jax.types import ConfigError


def make_optimizer(
    config: OptimConfig, shapes: Any, labels: Any, total_steps: int
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

  Raises:
    ConfigError: labels of another tree, or an illegal schedule or Newton-Schulz setting.
  """
  if jax.tree.structure(labels) != jax.tree.structure(shapes):
    raise ConfigError(
        'make_optimizer: labels and parameters are different trees. Route these parameters again.')
  schedule = make_schedule(config, total_steps)

  def adamw(weight_decay: float):
    return optax.adamw(
        schedule, config.adam_b1, config.adam_b2, config.adam_eps, weight_decay=weight_decay)

  if config.optimizer == 'muon':
    steps = coefficients(config.ns_coefficients, config.ns_steps)
    matrices = muon(
        schedule, NewtonSchulz(steps, config.ns_dtype), momentum=config.momentum,
        nesterov=config.nesterov, update_scale=config.update_scale,
        weight_decay=config.weight_decay)
  else:
    matrices = adamw(config.weight_decay)
  update = optax.partition(
      {'muon': matrices, 'adamw': adamw(0.0), 'frozen': optax.set_to_zero()}, labels)
  if not config.clip_norm:
    return update
  trainable = jax.tree.map(lambda label: label != 'frozen', labels)
  return optax.chain(optax.masked(optax.clip_by_global_norm(config.clip_norm), trainable), update)
