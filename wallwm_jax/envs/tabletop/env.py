"""The tabletop behind the project's environment interface."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.envs.tabletop import physics, rubric
from wallwm_jax.envs.tabletop.config import TabletopConfig
from wallwm_jax.envs.tabletop.render import VIEWS, calibration, render
from wallwm_jax.envs.tabletop.reset import reset
from wallwm_jax.envs.tabletop.state import TabletopState
from wallwm_jax.envs.tabletop.tasks import event_caption
from wallwm_jax.geometry import poses
from wallwm_jax.types import Cameras, EnvFns, Observation


def step(state: TabletopState, target: Float[Array, 'A'], config: TabletopConfig) -> TabletopState:
  """Tracks an absolute target pose [A = 10] for one control period and updates the script's
  bookkeeping.

  A target that is not finite is replaced by the present command: the robot stays.
  """
  hold = physics.pose_of(state.physics.ctrl)
  target = jnp.where(jnp.isfinite(target).all(), target, hold)
  moved = physics.control_step(state.physics, target, config.substeps)
  return rubric.advance(dataclasses.replace(state, physics=moved))


def execute(
  state: TabletopState, actions: Float[Array, 'K A'], mask: Bool[Array, 'K'], config: TabletopConfig
):
  """Runs a chunk of actions relative to the pose at the call.

  Args:
    actions: [K, A] relative to the measured pose at the call (geometry.poses.relative_pose); mask:
      [K], steps where it is False hold the last target (the present command before the first one).

  Returns:
    The state after K control periods, the frames [V, K, H, W, 3] uint8 and measured poses [K, A]
    after each.
  """
  targets = poses.apply_relative(physics.gripper_pose(state.physics), actions)

  def body(carry, inputs):
    state, last = carry
    target, valid = inputs
    target = jnp.where(valid & jnp.isfinite(target).all(), target, last)
    state = step(state, target, config)
    return (state, target), state.physics

  hold = physics.pose_of(state.physics.ctrl)
  (final, _), worlds = jax.lax.scan(body, (state, hold), (targets, mask))
  # Rendering comes after the scan, so that a caller who drops the frames does not pay for them.
  frames = jax.vmap(
    lambda world: render(dataclasses.replace(state, physics=world), config.image_size)
  )(worlds)
  return final, frames.swapaxes(0, 1), jax.vmap(physics.gripper_pose)(worlds)


def observe(state: TabletopState, config: TabletopConfig) -> Observation:
  """What a policy sees, without the batch axis: frames [V, 1, H, W, 3], state [A], view_mask
  [V].
  """
  frames = render(state, config.image_size)[:, None]
  return Observation(frames, physics.gripper_pose(state.physics), jnp.ones((len(VIEWS),), bool))


def camera_calibration(state: TabletopState, config: TabletopConfig) -> Cameras:
  """Calibration of the views for the present state, without the batch axis."""
  intrinsics, extrinsics = calibration(state, config.image_size)
  return Cameras(intrinsics, extrinsics, jnp.ones((len(VIEWS),), bool))


def caption(state: TabletopState) -> Int[Array, '']:
  """Index into CAPTIONS of the script's next event (the last one when all are done)."""
  return event_caption(rubric.current_event(state))


def task_caption(state: TabletopState) -> Int[Array, '']:
  """Index into CAPTIONS of the instruction."""
  return state.task.instruction


def script(state: TabletopState) -> Int[Array, 'S']:
  """Indices into CAPTIONS of the task's events in order, -1 behind the last."""
  rows = jax.vmap(event_caption)(state.task.script)
  return jnp.where(jnp.arange(len(rows)) < state.task.length, rows, -1)


@functools.cache
def env_fns(config: TabletopConfig = TabletopConfig()) -> EnvFns:
  """The environment as pure functions (see EnvFns); equal configs give the very same functions."""
  return EnvFns(
    reset=functools.partial(reset, config=config),
    observe=functools.partial(observe, config=config),
    step=functools.partial(step, config=config),
    execute=functools.partial(execute, config=config),
    caption=caption,
    task_caption=task_caption,
    script=script,
    progress=rubric.progress,
    success=rubric.success,
  )
