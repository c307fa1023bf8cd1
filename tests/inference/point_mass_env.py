"""A pure-JAX stand-in for a robot environment: a point that must go right, then up."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from wallwm_jax.types import EnvFns, Observation, pytree_dataclass

GO_RIGHT, GO_UP, INSTRUCTION = 0, 1, 2
NUM_CAPTIONS = 3


@pytree_dataclass
class State:
  """position [3] in 0..1, goal [] along both axes, stage [] int32: events finished so far."""

  position: jax.Array
  goal: jax.Array
  stage: jax.Array


def make_env(views: int, size: int) -> EnvFns:
  """Goal = task (float); the start is drawn from the key."""
  return EnvFns(
      reset=_reset, observe=functools.partial(_observe, views, size), step=_step,
      execute=functools.partial(_execute, views, size),
      caption=lambda s: jnp.minimum(s.stage, GO_UP), task_caption=lambda s: jnp.int32(INSTRUCTION),
      script=lambda s: jnp.array([GO_RIGHT, GO_UP, -1], jnp.int32),
      progress=lambda s: 50.0 * s.stage, success=lambda s: s.stage == 2)


def _reset(key, task):
  start = jax.random.uniform(key, (3,), maxval=0.2)
  return State(start, jnp.float32(task), jnp.int32(0))


def _pose(state):
  return jnp.concatenate([state.position, jnp.array([1.0, 0, 0, 0, 1.0, 0, 1.0])])


def _render(views, size, state):
  """A bright column at x and a bright row at y, each view a little darker than the one before."""
  pixels = (jnp.arange(size) + 0.5) / size
  image = 200.0 * jnp.exp(-20.0 * jnp.abs(pixels - state.position[0]))[None, :]
  image = image + 50.0 * jnp.exp(-20.0 * jnp.abs(pixels - state.position[1]))[:, None]
  shades = 1.0 - 0.2 * jnp.arange(views)
  return jnp.broadcast_to(shades[:, None, None, None] * image[None, :, :, None],
                          (views, size, size, 3)).astype(jnp.uint8)


def _observe(views, size, state):
  return Observation(_render(views, size, state)[:, None], _pose(state), jnp.ones((views,), bool))


def _step(state, target):
  position = jnp.clip(target[:3], 0.0, 1.0)
  reached = position[jnp.minimum(state.stage, 1)] >= state.goal
  stage = jnp.where(reached, jnp.minimum(state.stage + 1, 2), state.stage)
  return dataclasses.replace(state, position=position, stage=stage)


def _execute(views, size, state, actions, mask):
  anchor = state.position

  def step(state, inputs):
    action, valid = inputs
    moved = _step(state, jnp.concatenate([anchor + action[:3], action[3:]]))
    state = jax.tree.map(lambda new, old: jnp.where(valid, new, old), moved, state)
    return state, (_render(views, size, state), _pose(state))

  state, (frames, poses) = jax.lax.scan(step, state, (actions, mask))
  return state, jnp.moveaxis(frames, 0, 1), poses
