"""When an event counts as done, task progress and success. All JAX, one environment.

An event is done when its condition has held for DWELL control periods in a row while the gripper
hardly moves: a policy must arrive and stop, so passing through by chance does not count.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.envs.tabletop import mjcf, physics, tasks
from wallwm_jax.envs.tabletop.state import TabletopState

HOVER_Z = 0.085  # m, grasp centre above the table after reaching
LIFT_Z = 0.12  # m, grasp centre after lifting
PUSH_DISTANCE = 0.08  # m, how far the expert pushes
DWELL = 2  # control periods

REACH_RADIUS = 0.02
REACH_BAND = (0.062, 0.115)
HELD_OPENING = (0.38, 0.64)  # a cube between the pads: 0.51
HELD_COMMAND = 0.42
LIFTED_Z = mjcf.CUBE_HALF + 0.05
RESTING_Z = mjcf.CUBE_HALF + 0.006
OVER_RADIUS = 0.03
ON_RADIUS = 0.038
CLEAR_Z = 0.07
OPEN = 0.8
PUSHED, PUSHED_ASIDE = 0.05, 0.035
STILL_SPEED = 0.12  # m/s


def holding(state: TabletopState, obj: Int[Array, '']) -> Bool[Array, '']:
  """The object sits between the pads and the gripper is told to close on it."""
  pose = physics.gripper_pose(state.physics)
  cube = physics.cube_poses(state.physics)[0][obj]
  offset = cube - pose[:3]
  near = (jnp.hypot(offset[0], offset[1]) < 0.018) & (jnp.abs(offset[2]) < 0.02)
  squeezed = (pose[9] > HELD_OPENING[0]) & (pose[9] < HELD_OPENING[1])
  commanded = state.physics.ctrl[4] < HELD_COMMAND * mjcf.FINGER_TRAVEL
  return near & squeezed & commanded


def _released(state: TabletopState, obj, zone) -> Bool[Array, '']:
  """The object rests on the zone."""
  cube = physics.cube_poses(state.physics)[0][obj]
  return (jnp.linalg.norm(cube[:2] - state.zones[zone]) < ON_RADIUS) & (cube[2] < RESTING_Z)


def condition(state: TabletopState, event: Int[Array, '3']) -> Bool[Array, '']:
  """Whether one event (kind, object, target) is accomplished by the present state."""
  kind, obj, target = jnp.maximum(event, 0)
  pose = physics.gripper_pose(state.physics)
  tip, opening = pose[:3], pose[9]
  cubes, _ = physics.cube_poses(state.physics)
  cube = cubes[obj]
  held, resting = holding(state, obj), cube[2] < RESTING_Z
  zone = state.zones[jnp.minimum(target, mjcf.NUM_ZONES - 1)]
  to_zone = jnp.linalg.norm(cube[:2] - zone)

  distance = jnp.where(
    state.cube_present, jnp.linalg.norm(cubes[:, :2] - tip[:2], axis=-1), jnp.inf
  )
  reach = (
    (distance[obj] < REACH_RADIUS)
    & (jnp.argmin(distance) == obj)
    & (tip[2] > REACH_BAND[0])
    & (tip[2] < REACH_BAND[1])
    & (opening > OPEN)
    & resting
  )
  grasp = held & (tip[2] < 0.05)
  lift = held & (cube[2] > LIFTED_Z)
  move = held & (to_zone < OVER_RADIUS) & (cube[2] > LIFTED_Z - 0.01)
  place = held & (to_zone < ON_RADIUS) & resting
  release = (
    _released(state, obj, jnp.minimum(target, mjcf.NUM_ZONES - 1))
    & (opening > OPEN)
    & (tip[2] > CLEAR_Z)
  )
  way = jnp.asarray(tasks.DIRECTION_VECTORS)[target]
  shift = (cube - state.event_start[obj])[:2]
  along, aside = shift @ way, jnp.abs(shift[0] * way[1] - shift[1] * way[0])
  push = (along > PUSHED) & (aside < PUSHED_ASIDE) & resting
  return jnp.stack([reach, grasp, lift, move, place, release, push])[kind] & (event[0] >= 0)


def current_event(state: TabletopState) -> Int[Array, '3']:
  """The next event to do; the last one once the script is complete."""
  return state.task.script[jnp.minimum(state.stage, state.task.length - 1)]


def advance(state: TabletopState) -> TabletopState:
  """Updates `dwell` and, when the current event is done, moves on to the next one. Call after every
  control step.
  """
  speed = jnp.linalg.norm(state.physics.qvel[:3])
  met = (
    condition(state, current_event(state))
    & (speed < STILL_SPEED)
    & (state.stage < state.task.length)
  )
  dwell = jnp.where(met, state.dwell + 1, 0)
  done = dwell >= DWELL
  stage = state.stage + done
  fresh = done & (stage < state.task.length)
  cubes, _ = physics.cube_poses(state.physics)
  return dataclasses.replace(
    state,
    stage=stage,
    dwell=jnp.where(done, 0, dwell),
    event_start=jnp.where(fresh, cubes, state.event_start),
  )


def progress(state: TabletopState) -> Float[Array, '']:
  """Completed events of the script in percent, 0..100; never decreases within an episode."""
  return 100.0 * state.stage / state.task.length


def success(state: TabletopState) -> Bool[Array, '']:
  """Every event was done in order, the last one still holds, and every cube put down is still on
  its zone.
  """
  rows = state.task.script
  stays = jnp.stack(
    [
      (rows[i, 0] != tasks.RELEASE)
      | _released(state, jnp.maximum(rows[i, 1], 0), jnp.maximum(rows[i, 2], 0))
      for i in range(tasks.MAX_EVENTS)
    ]
  )
  return (state.stage == state.task.length) & condition(state, current_event(state)) & stays.all()
