"""The scripted expert: smooth, bounded-speed motion through the waypoints of each event. JAX, one
environment.

At the start of an event a plan of up to LEGS straight legs is laid from the measured pose; every
control period the next target on it is commanded. The plan's last step is the event's true
boundary. If the environment then says that the event is not done, the expert plans the same event
again from where it is (a recovery).

Two disturbances make the data cover more than the perfect path: a slowly varying offset is added to
what is executed (never to what is recorded), and now and then a grasp misses on purpose (recorded
as an event of its own).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.envs.tabletop import env, mjcf, physics, rubric, tasks
from wallwm_jax.envs.tabletop.config import TabletopConfig
from wallwm_jax.envs.tabletop.state import TabletopState
from wallwm_jax.types import PRNGKey, pytree_dataclass

LEGS = 4
MAX_EVENT_STEPS = 24
SETTLE = 2  # control periods at the end of every plan in which the target rests
TRIES = 3  # attempts at one event before the expert gives up
_SPEED, _PUSH_SPEED, _TRAVEL_SPEED = (
  0.022,
  0.018,
  0.027,
)  # mean m per control period, by kind of motion
_TRAVEL_CAP = 15  # control periods of the longest travel leg
_TURN_SPEED, _GRIP_SPEED = 0.2, 0.4  # rad and gripper opening per control period
GRASP_Z, PUSH_Z = 0.021, 0.020  # m, grasp centre above the table
_BEHIND = 0.066  # m from the cube's centre to where a push comes down
CONTACT = (
  mjcf.CUBE_HALF + 2 * mjcf.FINGER_HALF[1]
)  # m between grasp centre and cube centre while pushing
_MISS = 0.045  # m, along the pads
_NOISE_KEEP = 0.75  # per control period, of the executed offset
_NOISE_SCALE = (0.006, 0.006, 0.004, 0.04)  # m, m, m, rad


@pytree_dataclass
class ExpertState:
  """Plan and memory of the expert. waypoints [LEGS + 1, 5] are (x, y, z, yaw, gripper), the first
  one is where the plan began; ends [LEGS] are the control periods at which the legs end; t counts
  from the plan's start."""

  waypoints: Float[Array, '5 5']
  ends: Int[Array, '4']
  total: Int[Array, '']
  t: Int[Array, '']
  stage: Int[Array, '']
  tries: Int[Array, '']
  missing: Bool[Array, '']
  offset: Float[Array, '4']
  noise: Float[Array, '']
  miss_prob: Float[Array, '']
  done: Bool[Array, '']
  failed: Bool[Array, '']
  key: PRNGKey


def init(key: PRNGKey, noise: Float[Array, ''], miss_prob: Float[Array, '']) -> ExpertState:
  """An expert before its first step. noise: scale of the executed offset, 0 = none; miss_prob:
  chance that the first attempt at a grasp misses on purpose."""
  zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
  return ExpertState(
    jnp.zeros((LEGS + 1, 5)),
    jnp.zeros((LEGS,), jnp.int32),
    zero,
    zero,
    zero - 1,
    zero,
    no,
    jnp.zeros((4,)),
    jnp.asarray(noise, jnp.float32),
    jnp.asarray(miss_prob, jnp.float32),
    no,
    no,
    key,
  )


def folded_yaw(state: TabletopState, obj) -> Float[Array, '']:
  """A cube's yaw folded to -45..45 degrees, rad."""
  q = physics.cube_poses(state.physics)[1][obj]
  yaw = jnp.arctan2(2 * (q[0] * q[3] + q[1] * q[2]), 1 - 2 * (q[2] ** 2 + q[3] ** 2))
  return (yaw + jnp.pi / 4) % (jnp.pi / 2) - jnp.pi / 4


def _plan(state: TabletopState, event: Int[Array, '3'], missing: Bool[Array, '']):
  """Waypoints [LEGS + 1, 5] and the control periods of each leg [LEGS] for one event from the
  present state.
  """
  kind, obj, target = jnp.maximum(event, 0)
  stage, command = state.physics.qpos[: mjcf.NUM_STAGE], state.physics.ctrl
  start = jnp.append(stage[:4], command[4] / mjcf.FINGER_TRAVEL)
  tip = start[:3]
  cube = physics.cube_poses(state.physics)[0][obj]
  cube_yaw = folded_yaw(state, obj)
  zone = state.zones[jnp.minimum(target, mjcf.NUM_ZONES - 1)]
  way = jnp.asarray(tasks.DIRECTION_VECTORS)[target]

  def at(xy, z, yaw, gripper):
    return jnp.concatenate(
      [xy, jnp.stack([jnp.asarray(v, jnp.float32) for v in (z, yaw, gripper)])]
    )

  over = tip[:2] + zone - cube[:2]  # where the hand must be for the held cube to be over the zone
  beside = cube[:2] + jnp.where(missing, _MISS, 0.0) * jnp.stack(
    [jnp.cos(cube_yaw), jnp.sin(cube_yaw)]
  )
  low = tip[2] < rubric.HOVER_Z - 0.02
  up = at(tip[:2], jnp.where(low, rubric.HOVER_Z, tip[2]), start[3], 1.0)
  hover = at(cube[:2], rubric.HOVER_Z, cube_yaw, 1.0)
  # A grasp goes straight down unless it has to come back from a miss or a bad start.
  near = jnp.linalg.norm(tip[:2] - cube[:2]) < 0.02
  aligned = jnp.where(near & ~low, up, hover)
  rear, front = cube[:2] - _BEHIND * way, cube[:2] + (rubric.PUSH_DISTANCE - CONTACT) * way
  yaw = start[3]
  plans = [
    [up, hover],
    [up, aligned, at(beside, GRASP_Z, cube_yaw, 1.0), at(beside, GRASP_Z, cube_yaw, 0.0)],
    [at(tip[:2], rubric.LIFT_Z, yaw, 0.0)],
    [at(over, rubric.LIFT_Z, yaw, 0.0)],
    [at(over, tip[2] - cube[2] + mjcf.CUBE_HALF - 0.001, yaw, 0.0)],
    [at(tip[:2], tip[2], yaw, 1.0), at(tip[:2], rubric.HOVER_Z + 0.005, yaw, 1.0)],
    [
      at(rear, rubric.HOVER_Z, cube_yaw, 0.0),
      at(rear, PUSH_Z, cube_yaw, 0.0),
      at(front, PUSH_Z, cube_yaw, 0.0),
    ],
  ]
  padded = jnp.stack([jnp.stack(p + [p[-1]] * (LEGS - len(p))) for p in plans])[kind]
  waypoints = jnp.concatenate([start[None], padded])
  travel = (kind == tasks.REACH) | (kind == tasks.MOVE)
  speed = jnp.where(travel, _TRAVEL_SPEED, jnp.asarray([_SPEED, _SPEED, _PUSH_SPEED, _SPEED]))
  speed = jnp.where((kind == tasks.PUSH) | travel, speed, _SPEED)
  return waypoints, _leg_steps(waypoints, speed)


def _leg_steps(waypoints, speed):
  """Control periods of each leg [LEGS], 0 for a leg that goes nowhere."""
  change = jnp.abs(jnp.diff(waypoints, axis=0))
  distance = jnp.linalg.norm(change[:, :3], axis=-1)
  steps = jnp.stack(
    [
      jnp.minimum(jnp.ceil(distance / speed), _TRAVEL_CAP),
      jnp.ceil(change[:, 3] / _TURN_SPEED),
      jnp.ceil(change[:, 4] / _GRIP_SPEED),
    ]
  ).max(0)
  moves = (distance > 0.004) | (change[:, 3] > 0.03) | (change[:, 4] > 0.05)
  return jnp.where(moves, jnp.maximum(steps, 1), 0).astype(jnp.int32)


def _target(expert: ExpertState) -> Float[Array, '5']:
  """The plan's (x, y, z, yaw, gripper) for control period t."""
  leg = jnp.minimum((expert.t + 1 > expert.ends).sum(), LEGS - 1)
  begin = jnp.where(leg > 0, expert.ends[leg - 1], 0)
  s = jnp.clip((expert.t + 1 - begin) / jnp.maximum(expert.ends[leg] - begin, 1), 0, 1)
  s = s * s * (3 - 2 * s)
  return (1 - s) * expert.waypoints[leg] + s * expert.waypoints[leg + 1]


def _replan(state: TabletopState, expert: ExpertState) -> ExpertState:
  """Takes up the next event, or the same one again; ends the episode when the script is done or
  given up.
  """
  key, miss_key = jax.random.split(expert.key)
  again = state.stage == expert.stage
  tries = jnp.where(again, expert.tries + 1, 0)
  event = rubric.current_event(state)
  missing = (
    (jax.random.uniform(miss_key) < expert.miss_prob) & (event[0] == tasks.GRASP) & (tries == 0)
  )
  waypoints, steps = _plan(state, event, missing)
  ends = jnp.cumsum(steps)
  return dataclasses.replace(
    expert,
    waypoints=waypoints,
    ends=ends,
    total=jnp.minimum(ends[-1] + SETTLE, MAX_EVENT_STEPS),
    t=jnp.zeros_like(expert.t),
    stage=state.stage,
    tries=tries,
    missing=missing,
    key=key,
    done=state.stage >= state.task.length,
    failed=tries >= TRIES,
  )


def _executed(expert: ExpertState, event_kind, target):
  """The target with the expert's slow random offset [4], and the offset."""
  key, noise_key = jax.random.split(expert.key)
  fresh = (
    jax.random.normal(noise_key, (4,)) * jnp.asarray(_NOISE_SCALE) * np.sqrt(1 - _NOISE_KEEP**2)
  )
  offset = _NOISE_KEEP * expert.offset + fresh
  delicate = ~jnp.isin(event_kind, jnp.asarray([tasks.REACH, tasks.MOVE, tasks.LIFT]))
  left = jnp.clip(
    (expert.total - SETTLE - expert.t) / 4, 0, 1
  )  # fades out towards the end of the event
  scale = expert.noise * left * jnp.where(delicate, 0.35, 1.0)
  noisy = target.at[:4].add(scale * offset)
  return noisy, dataclasses.replace(expert, offset=offset, key=key)


def _pose(target: Float[Array, '5']) -> Float[Array, '10']:
  finger = target[4] * mjcf.FINGER_TRAVEL
  return physics.pose_of(jnp.concatenate([target[:4], jnp.stack([finger, finger])]))


def step(state: TabletopState, expert: ExpertState, config: TabletopConfig):
  """One control period of the expert.

  Returns:
    The next environment and expert states and a record of this period: `state` [A] measured pose
      before it, `action`
    [A] the expert's own target (without the executed offset), `stage`, `attempt`, `missing`,
    `begins` (first period of an event) and `active` (False once the episode is over: nothing moves
    any more).
  """
  begins = expert.t >= expert.total
  expert = jax.tree.map(
    lambda new, old: jnp.where(begins & ~finished(expert), new, old), _replan(state, expert), expert
  )
  active = ~finished(expert)
  target = _target(expert)
  noisy, moved = _executed(expert, rubric.current_event(state)[0], target)
  record = {
    'state': physics.gripper_pose(state.physics),
    'action': _pose(target),
    'stage': expert.stage,
    'attempt': expert.tries,
    'missing': expert.missing,
    'begins': begins & active,
    'active': active,
    'ends': expert.ends,
  }
  after = env.step(state, _pose(noisy), config)
  moved = dataclasses.replace(moved, t=moved.t + 1)

  def keep(new, old):
    return jnp.where(active, new, old)

  return jax.tree.map(keep, after, state), jax.tree.map(keep, moved, expert), record


def finished(expert: ExpertState) -> Bool[Array, '']:
  """Whether the expert has finished or given up."""
  return expert.done | expert.failed
