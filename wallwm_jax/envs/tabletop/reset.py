"""Start states: a random layout, prepared so that exactly the script's first event is next.

Cubes and zones lie on a jittered, rotated 3 x 3 grid, which keeps them apart without rejection
loops. Several layouts are drawn and the first with a free lane for every push of the script is
taken.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax.envs.tabletop import mjcf, physics, rubric, tasks
from wallwm_jax.envs.tabletop.config import TabletopConfig
from wallwm_jax.envs.tabletop.state import TabletopState
from wallwm_jax.types import PRNGKey

_SPACING, _JITTER, _SHIFT, _TURN = 0.112, 0.008, 0.015, 0.8
_CANDIDATES = 24
_NUM_DRAWS = _CANDIDATES * (9 + 2 * 7 + 3) + 64
_CLEARANCE = 0.058  # m between a pushed cube's lane and other cubes' centres
_GRASP_Z = mjcf.CUBE_HALF
_MIN_TRAVEL = 0.08  # m between the start of a reach or move and its goal


def _layout(draws: tasks.Draws):
  """Centres of the cubes [4, 2] and zones [3, 2], m, for each of the candidates: [_CANDIDATES,
  ...].
  """
  count, items = _CANDIDATES, mjcf.NUM_CUBES + mjcf.NUM_ZONES
  grid = (
    np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), -1).reshape(9, 2).astype(np.float32) * _SPACING
  )
  cells = jnp.asarray(grid)[jax.vmap(tasks.ranks)(draws(count, len(grid)))[:, :items]]
  x, y = jnp.moveaxis(cells + draws(count, items, 2, low=-_JITTER, high=_JITTER), -1, 0)
  turn = draws(count, 1, low=-_TURN, high=_TURN)
  cos, sin = jnp.cos(turn), jnp.sin(turn)
  centres = jnp.stack([cos * x - sin * y, sin * x + cos * y], -1) + draws(
    count, 1, 2, low=-_SHIFT, high=_SHIFT
  )
  return centres[:, : mjcf.NUM_CUBES], centres[:, mjcf.NUM_CUBES :]


def _push_fits(cubes, zones, present, script):
  """Whether every push of the script has a free lane inside the stage's reach."""

  def row_fits(row):
    kind, obj, target = jnp.maximum(row, 0)
    way = jnp.asarray(tasks.DIRECTION_VECTORS)[target]
    start, goal = cubes[obj] - 0.075 * way, cubes[obj] + (rubric.PUSH_DISTANCE + 0.01) * way
    inside = (jnp.abs(start) < mjcf.STAGE_HIGH[0]).all() & (
      jnp.abs(goal) < mjcf.STAGE_HIGH[0] - 0.01
    ).all()
    offset = cubes - start
    along = jnp.clip(offset @ way, 0, jnp.linalg.norm(goal - start))
    gap = jnp.linalg.norm(offset - along[:, None] * way, axis=-1)
    free = jnp.where(present & (jnp.arange(mjcf.NUM_CUBES) != obj), gap, jnp.inf).min() > _CLEARANCE
    return (kind != tasks.PUSH) | (inside & free)

  return jax.vmap(row_fits)(script).all()


def _presence(draws: tasks.Draws, size: int, at_least: int, needed):
  """Bool [size]: the `needed` entries and random others, `at_least`..size in all."""
  count = at_least + jnp.floor(draws() * (size + 1 - at_least))
  return (tasks.ranks(-draws(size) - needed) < count) | needed


def _needed(script, column: int, size: int, kinds):
  """Bool [size]: ids in `column` of the rows of `kinds`."""
  used = jnp.isin(script[:, 0], jnp.asarray(kinds))
  return ((script[:, column, None] == jnp.arange(size)) & used[:, None]).any(0)


def _away_from(points, goal):
  """One of `points` [N, 2] that is at least _MIN_TRAVEL from `goal` [2]; the farthest if none
  is.
  """
  distance = jnp.linalg.norm(points - goal, axis=-1)
  return points[jnp.argmax(jnp.minimum(distance, _MIN_TRAVEL))]


def _gripper_start(
  draws: tasks.Draws, config: TabletopConfig, task: tasks.Task, cube, cube_yaw, zone
):
  """Where the first event begins: grasp centre [3], yaw, and whether the event's cube is held.

  cube: [2] centre of the event's object; zone: [2] centre of its zone.
  """
  kind, spread = task.script[0, 0], config.start_spread
  points = draws(12, 2, low=-1)
  disc, height = draws(2, low=-1) * spread, draws(low=-1) * spread
  any_yaw = draws(low=-1) * config.yaw_range
  near_yaw = cube_yaw + draws(low=-0.08, high=0.08) * spread
  angle = draws(high=2 * np.pi)
  around = cube + jnp.stack([jnp.cos(angle), jnp.sin(angle)]) * (0.035 + 0.012 * disc[0])
  hover = jnp.append(cube + 0.008 * disc, rubric.HOVER_Z + 0.006 * height)
  ball = jnp.append(around, 0.082 + 0.012 * height)
  at_table = jnp.append(cube, _GRASP_Z + 0.003 * height)
  starts = jnp.stack(
    [
      jnp.where(
        task.recovery, ball, jnp.append(_away_from(0.19 * points, cube), 0.14 + 0.05 * height)
      ),
      jnp.where(task.recovery, ball, hover),
      at_table,
      jnp.append(_away_from(0.17 * points, zone), rubric.LIFT_Z + 0.012 * height),
      jnp.append(zone + 0.012 * disc, rubric.LIFT_Z + 0.012 * height),
      jnp.append(zone + 0.015 * disc, _GRASP_Z + 0.003 * height),
      hover,
    ]
  )
  held = jnp.isin(kind, jnp.asarray([tasks.LIFT, tasks.MOVE, tasks.PLACE, tasks.RELEASE]))
  scattered = (kind == tasks.REACH) | ((kind == tasks.GRASP) & task.recovery)
  return starts[kind], jnp.where(held, cube_yaw, jnp.where(scattered, any_yaw, near_yaw)), held


def reset(key: PRNGKey, task: tasks.Task, config: TabletopConfig) -> TabletopState:
  """A random start state for a task: cubes and zones placed, gripper where the first event
  begins.
  """
  draws = tasks.Draws(key, _NUM_DRAWS)
  cube_ids = _needed(task.script, 1, mjcf.NUM_CUBES, range(len(tasks.EVENT_KINDS)))
  zone_ids = _needed(task.script, 2, mjcf.NUM_ZONES, (tasks.MOVE, tasks.PLACE, tasks.RELEASE))
  present = _presence(draws, mjcf.NUM_CUBES, 2, cube_ids)
  zone_present = _presence(draws, mjcf.NUM_ZONES, 2, zone_ids)
  layouts = _layout(draws)
  fits = jax.vmap(lambda cubes, zones: _push_fits(cubes, zones, present, task.script))(*layouts)
  cubes, zones = jax.tree.map(lambda x: x[jnp.argmax(fits)], layouts)
  yaw = draws(mjcf.NUM_CUBES, low=-1) * config.yaw_range

  obj, target = (
    jnp.maximum(task.script[0, 1], 0),
    jnp.clip(task.script[0, 2], 0, mjcf.NUM_ZONES - 1),
  )
  tip, tip_yaw, held = _gripper_start(draws, config, task, cubes[obj], yaw[obj], zones[target])
  slip = draws(2, low=-1) * jnp.asarray([0.004, 0.003]) * config.start_spread
  along = jnp.stack([jnp.cos(tip_yaw), jnp.sin(tip_yaw)])
  # A held cube may sit a little off centre along the pads, and on the table its height is the
  # table's.
  held_at = jnp.append(tip[:2] + slip[0] * along, jnp.maximum(tip[2] + slip[1], mjcf.CUBE_HALF))
  held_at = jnp.where(tip[2] < 0.04, held_at.at[2].set(mjcf.CUBE_HALF), held_at)

  parked = jnp.stack([mjcf.PARKING[0] + 0.5 * jnp.arange(4.0), jnp.full((4,), mjcf.PARKING[1])], -1)
  centres = jnp.concatenate(
    [jnp.where(present[:, None], cubes, parked), jnp.full((4, 1), mjcf.CUBE_HALF)], -1
  )
  centres = centres.at[obj].set(jnp.where(held, held_at, centres[obj]))
  zeros = jnp.zeros_like(yaw)
  free = jnp.concatenate(
    [centres, jnp.stack([jnp.cos(yaw / 2), zeros, zeros, jnp.sin(yaw / 2)], -1)], -1
  )
  finger = jnp.where(held, mjcf.CUBE_HALF - 0.0004, mjcf.FINGER_TRAVEL)
  stage = jnp.concatenate([tip, jnp.stack([tip_yaw, finger, finger])])
  command = stage.at[4:].set(jnp.where(held, 0.0, mjcf.FINGER_TRAVEL))
  world = physics.from_positions(stage, command, free)
  zero = jnp.zeros((), jnp.int32)
  return TabletopState(world, present, zone_present, zones, task, zero, zero, centres)
