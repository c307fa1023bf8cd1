"""Everything a run carries from step to step, created already sharded."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from wallwm_jax.config import DISTILL_STAGES, ExperimentConfig
from wallwm_jax.models import functional, language
from wallwm_jax.optim import make_optimizer, route
from wallwm_jax.parallel import rules
from wallwm_jax.training import distill
from wallwm_jax.training.stages import BESIDE_STUDENT, parts, split_trainable
from wallwm_jax.types import Params, PRNGKey, pytree_dataclass


@pytree_dataclass
class TrainState:
  """One optimisation run after `step` updates.

  params: the whole model. ema: running average of the trainable top-level subtrees only (that of a
  frozen subtree is the subtree itself). opt_state: of the trainable subtrees. key: raw root key
  data; the key of a step is fold_in(key, step).
  """

  step: Int[Array, ""]
  params: Params
  ema: Params
  opt_state: Any
  key: UInt32[Array, "2"]


def param_shapes(config: ExperimentConfig) -> Params:
  """Tree of ShapeDtypeStruct of the run's parameters."""
  return jax.tree.map(lambda x: x, _param_shapes(config))  # dicts of the caller's own


@functools.lru_cache(maxsize=4)
def _param_shapes(config: ExperimentConfig) -> Params:
  # Every part of a starting run asks, and tracing all initialisers takes seconds.
  return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def init_params(config: ExperimentConfig, key: PRNGKey) -> Params:
  """Random float32 parameters of every part of a run; a staircase starts as the upper layers of a
  random VLM, for `train` to replace by those of the real one.
  """
  c, keys, names = config.language, jax.random.split(key, 4), parts(config)
  params = functional.init_params(config.model, key) if 'video' in names else {}
  make = {
      **{name: lambda: {'video': params['video']} for name in BESIDE_STUDENT},
      'vlm': lambda: language.init_qwen(c.vlm, keys[0]),
      'reader': lambda: language.init_qwen(c.reader, keys[1]),
      'heads': lambda: language.init_heads(c, config.model.text, keys[0]),
      'projector': lambda: language.init_projector(c, keys[1]),
      'staircase': lambda: language.init_staircase(
          c, language.init_qwen(c.vlm, keys[2]), keys[3]),
  }
  return params | {name: init() for name, init in make.items() if name in names}


def build_optimizer(config: ExperimentConfig, mesh: Mesh) -> optax.GradientTransformation:
  """The optimizer over the stage's trainable subtrees, with Muon's matrices spread over `mesh`;
  frozen subtrees have no state and no update. In distillation the critic has one of its own.
  """
  def over(shapes: Params, steps: int) -> optax.GradientTransformation:
    shardings = rules.param_shardings(shapes, mesh, config.mesh.rules)
    return make_optimizer(config.optim, shapes, route(shapes), steps, shardings)

  shapes, _ = split_trainable(param_shapes(config), config)
  if config.train.stage not in DISTILL_STAGES:
    return over(shapes, config.train.steps)
  critic, student = distill.split_critic(shapes)
  turns = -(-config.train.steps // config.distill.critic_updates)
  return distill.take_turns(
      over(critic, config.train.steps), over(student, turns), config.distill.critic_updates)


def abstract_state(
    config: ExperimentConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """TrainState of ShapeDtypeStructs that carry their shardings; nothing is allocated.

  Raises:
    ConfigError: a parameter without a rule or a dimension that its mesh axes do not divide.
  """
  shapes = jax.eval_shape(functools.partial(fresh_state, config, optimizer))
  shardings = TrainState(
      step=NamedSharding(mesh, PartitionSpec()),
      params=rules.param_shardings(shapes.params, mesh, config.mesh.rules),
      ema=rules.param_shardings(shapes.ema, mesh, config.mesh.rules),
      opt_state=rules.param_shardings(shapes.opt_state, mesh, config.mesh.rules),
      key=NamedSharding(mesh, PartitionSpec()),
  )
  return jax.tree.map(
      lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
      shapes, shardings)


def init_state(
    config: ExperimentConfig, optimizer: optax.GradientTransformation, abstract: TrainState,
    start: Params | None = None
) -> TrainState:
  """A fresh state at step 0, every leaf created on the devices that `abstract` gives it.

  Args:
    start: top-level subtrees that replace the random ones (`train.init_from`), sharded like them;
      a video tower without grafts is completed by `functional.adopt_video`.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  create = jax.jit(functools.partial(fresh_state, config, optimizer), out_shardings=shardings)
  return create(start=start or {})


def fresh_state(
    config: ExperimentConfig, optimizer: optax.GradientTransformation, start: Params | None = None
) -> TrainState:
  """A state at step 0 on one device; `init_state` gives the same, sharded."""
  root = jax.random.key(config.train.seed)
  fresh = init_params(config, jax.random.fold_in(root, 0))
  start = dict(start or {})
  if 'video' in start:
    start['video'] = functional.adopt_video(config.model, fresh['video'], start['video'])
  params = fresh | start
  for name in set(BESIDE_STUDENT) & params.keys():  # both begin as the student does
    params[name] = {'video': jax.tree.map(jnp.copy, params['video'])}
  trainable, _ = split_trainable(params, config)
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      # Copies: the step donates the state, and one buffer cannot be donated twice.
      ema=jax.tree.map(jnp.copy, trainable),
      opt_state=optimizer.init(trainable),
      key=jax.random.key_data(jax.random.fold_in(root, 1)),
  )


def update_ema(ema: Params, params: Params, step, limit: float) -> Params:
  """ema <- d ema + (1 - d) params with d = min(limit, (1 + step) / (10 + step)).

  The warm-up of the decay lets short runs forget their random start.
  """
  decay = jnp.minimum(limit, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda average, x: x + decay * (average - x), ema, params)


def count(tree) -> int:
  """Number of scalars in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
