"""Recovery starts: the robot somewhere near the contact of an event that went wrong. JAX, one
environment.

p_train(q, e) = (1 - a) p_nominal + a E_e[p(q | e)]: an event e is drawn, and the robot is put into
a small ball around e's contact pose (where the hand meets the cube), with another yaw and opening.
An event that needs the cube in the hand starts without it: the cube has slipped, so the script
begins with a new grasp.

Source: WALL-WM (arXiv 2606.01955), recovery initialisation.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from wallwm_jax.envs.tabletop import expert, mjcf, physics, rubric, tasks
from wallwm_jax.envs.tabletop.config import TabletopConfig
from wallwm_jax.envs.tabletop.state import TabletopState
from wallwm_jax.types import PRNGKey

_CANDIDATES = 8  # draws from the ball; the first without a finger in a cube is taken
_YAW = 0.3  # rad, largest turn away from the contact pose
_LEAST_OPEN = 0.3  # gripper opening
_MARGIN = 0.002  # m between fingers and cubes where the hand starts
_CLEAR = 2 * mjcf.CUBE_HALF + mjcf.PAD_SPREAD + mjcf.FINGER_HALF[1] + _MARGIN  # m, over cubes

# Events that need the cube in the hand; one of them and those before it follow a new grasp.
_HELD = (tasks.LIFT, tasks.MOVE, tasks.PLACE, tasks.RELEASE)


def _scripts() -> tuple[np.ndarray, np.ndarray]:
  """Kinds of the events that recover each kind [kinds, MAX_EVENTS], -1 beyond their number
  [kinds]."""
  rows = []
  for kind in range(len(tasks.EVENT_KINDS)):
    rows.append((tasks.GRASP, *_HELD[: _HELD.index(kind) + 1]) if kind in _HELD else (kind,))
  padded = [row + (-1,) * (tasks.MAX_EVENTS - len(row)) for row in rows]
  return np.array(padded, np.int32), np.array([len(row) for row in rows], np.int32)


_KINDS, _LENGTHS = _scripts()


def recovery_task(key: PRNGKey, share: Float[Array, '']) -> tasks.Task:
  """An event to recover, of the kind at `share` (0..1) of EVENT_KINDS: the instruction is the
  event's, the script leads there from a bad start."""
  kinds = len(tasks.EVENT_KINDS)
  kind = jnp.minimum((share * kinds).astype(jnp.int32), kinds - 1)
  task = tasks.sample_task(key, kind, True)
  rows = jnp.asarray(_KINDS)[kind]
  needs_zone = jnp.isin(rows, jnp.asarray((tasks.MOVE, tasks.PLACE, tasks.RELEASE)))
  obj, target = task.script[0, 1], task.script[0, 2]
  script = jnp.stack(
    [
      rows,
      jnp.where(rows >= 0, obj, -1),
      jnp.where(needs_zone | (rows == tasks.PUSH), target, -1),
    ],
    -1,
  )
  return dataclasses.replace(task, script=script, length=jnp.asarray(_LENGTHS)[kind])


def contact_pose(state: TabletopState) -> Float[Array, '5']:
  """(x, y, z, yaw, gripper) where the hand meets the cube of the script's first event: hovering
  over it (reach), around it (grasp) or behind it (push)."""
  kind, obj, target = jnp.maximum(state.task.script[0], 0)
  centre = physics.cube_poses(state.physics)[0][obj, :2]
  way = jnp.asarray(tasks.DIRECTION_VECTORS)[target]
  push = kind == tasks.PUSH
  xy = jnp.where(push, centre - expert.CONTACT * way, centre)
  z = jnp.where(kind == tasks.REACH, rubric.HOVER_Z, jnp.where(push, expert.PUSH_Z, expert.GRASP_Z))
  yaw, opening = expert.folded_yaw(state, obj), jnp.where(push, 0.0, 1.0)
  return jnp.concatenate([xy, jnp.stack([z, yaw, opening])])


def blocked(state: TabletopState, hand: Float[Array, '5']) -> Bool[Array, '']:
  """Whether a pad of a hand at (x, y, z, yaw, gripper) would be inside a cube, seen from above."""
  centres, quaternions = physics.cube_poses(state.physics)
  yaw = 2 * jnp.arctan2(quaternions[:, 3], quaternions[:, 0])
  cos, sin = jnp.cos(hand[3]), jnp.sin(hand[3])
  reach = hand[4] * mjcf.FINGER_TRAVEL + mjcf.FINGER_HALF[1]
  corners = jnp.asarray([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
  along = corners * jnp.stack([jnp.asarray(mjcf.PAD_SPREAD), reach])  # in the hand's x, y
  pads = hand[:2] + along @ jnp.asarray([[cos, sin], [-sin, cos]])  # [4, 2]
  offset = pads[:, None] - centres[:, :2]  # [4, cubes, 2]
  cos, sin = jnp.cos(yaw), jnp.sin(yaw)
  local = jnp.stack(
    [cos * offset[..., 0] + sin * offset[..., 1], cos * offset[..., 1] - sin * offset[..., 0]], -1
  )
  near = mjcf.CUBE_HALF + mjcf.FINGER_HALF[1] + _MARGIN
  return (jnp.abs(local) < near).all(-1).any()


def perturb(key: PRNGKey, state: TabletopState, config: TabletopConfig) -> TabletopState:
  """A start state with an empty hand in the ball of config.recovery_radius around the contact pose
  of the script's first event; above the cubes where no draw keeps the fingers out of them."""
  draws = tasks.Draws(key, 6 * _CANDIDATES)
  contact = contact_pose(state)
  direction = jax.scipy.special.ndtri(draws(_CANDIDATES, 3, low=1e-4, high=1 - 1e-4))
  direction /= jnp.linalg.norm(direction, axis=-1, keepdims=True)
  length = config.recovery_radius * jnp.cbrt(draws(_CANDIDATES, 1))  # uniform in the ball
  low, high = jnp.asarray(mjcf.STAGE_LOW), jnp.asarray(mjcf.STAGE_HIGH)
  tips = jnp.clip(contact[:3] + length * direction, low, high)
  turns = contact[3] + draws(_CANDIDATES, 1, low=-_YAW, high=_YAW)
  openings = jnp.where(contact[4] > 0, draws(_CANDIDATES, 1, low=_LEAST_OPEN), 0.0)
  hands = jnp.concatenate([tips, turns, openings], -1)
  inside = jax.vmap(lambda hand: blocked(state, hand))(hands) & (hands[:, 2] < _CLEAR)
  hand = hands[jnp.argmin(inside)]
  hand = hand.at[2].set(jnp.where(inside.all(), _CLEAR, hand[2]))
  finger = hand[4] * mjcf.FINGER_TRAVEL
  stage = jnp.concatenate([hand[:4], jnp.stack([finger, finger])])
  free = state.physics.qpos[mjcf.NUM_STAGE :].reshape(mjcf.NUM_CUBES, 7)
  return dataclasses.replace(state, physics=physics.from_positions(stage, stage, free))
