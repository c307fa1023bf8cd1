"""One optimisation step: loss, gradients of the trainable subtrees, update, EMA."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wallwm_jax.config import DISTILL_STAGES, ExperimentConfig
from wallwm_jax.optim import make_schedule
from wallwm_jax.parallel import aot, rules
from wallwm_jax.parallel.constraints import activation_sharding
from wallwm_jax.training import distill
from wallwm_jax.training.stages import split_trainable, stage_loss
from wallwm_jax.training.state import TrainState, update_ema
from wallwm_jax.types import EventBatch, Frozen, LanguageBatch


def make_train_step(
    config: ExperimentConfig, mesh: Mesh, optimizer: optax.GradientTransformation,
    abstract: TrainState
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Jitted step(state, batch, frozen) -> (state, metrics) on `mesh`; the state is donated.

  Gradients, optimizer and EMA see only the trainable subtrees; frozen ones are passed through, so
  no update can reach them. Buckets of different length compile once each.

  Returns:
    metrics: the loss and its parts, grad_norm (before clipping), update_norm, lr; float32 scalars.
    nonfinite_leaf: int32, which leaf of the trainable tree has the first gradient that is not
    finite; -1 = none.
  """
  schedule = make_schedule(config.optim, config.train.steps)
  distils = config.train.stage in DISTILL_STAGES

  def step(state: TrainState, batch: EventBatch | LanguageBatch, frozen: Frozen):
    trainable, resting = split_trainable(state.params, config)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

    if distils:
      loss = functools.partial(distill.stage_loss, step=state.step, config=config)
    else:
      loss = functools.partial(stage_loss, config=config)

    def loss_fn(trainable):
      with activation_sharding(mesh, config.mesh.rules):
        return loss(resting | trainable, batch, frozen, key)

    grads, metrics = jax.grad(loss_fn, has_aux=True)(trainable)
    updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    squares = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
    finite = jnp.isfinite(squares)
    metrics |= {
        'grad_norm': jnp.sqrt(jnp.sum(squares)),
        'nonfinite_leaf': jnp.where(jnp.all(finite), -1, jnp.argmin(finite)),
        'update_norm': optax.tree.norm(updates),
        'lr': schedule(state.step),
    }
    ema = update_ema(state.ema, trainable, state.step, config.train.ema)
    return TrainState(state.step + 1, resting | trainable, ema, opt_state, state.key), metrics

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  replicated = NamedSharding(mesh, PartitionSpec())
  batches = rules.batch_shardings(config.inputs_spec(), mesh, config.mesh.rules)
  return jax.jit(
      step,
      in_shardings=(shardings, batches, None),  # what is frozen lies where it was put
      out_shardings=(shardings, replicated),
      donate_argnums=0,
      compiler_options=aot.compiler_options(mesh),
  )
