"""What the robot does while its policy computes: hold still, or run on along the chunk before.

A policy that needs `delay` control steps for an answer gives actions for the robot it saw, not for
the robot that will carry them out. Who holds loses the time and nothing else. Who runs on carries
out the last `delay` targets of the chunk before (its tail), takes the new actions relative to the
pose that was observed, and leaves out as many of them as steps have passed; a policy that is told
its tail (`committed`) can plan to follow on it.
Source: real-time chunking (arXiv 2506.07339), sections 3 and 4.1, without its gradient guidance.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from wallwm_jax.geometry.poses import apply_relative, relative_pose
from wallwm_jax.types import ActionChunk, pytree_dataclass

HOLD, RUN = WAITING = ('hold', 'run')


@pytree_dataclass
class Tail:
  """What is still to come of a chunk when the next is asked for: absolute targets [d, A] and which
  of them are meant, mask [d]: the first few, none where the chunk had ended."""

  targets: Float[Array, 'K A']
  mask: Bool[Array, 'K']


class Followed(NamedTuple):
  """One turn of a robot that runs on.

  actions [K - d, A], mask [K - d]: to carry out until the next observation, relative to the pose
  observed; own: [K], steps of the new chunk that this turn or its tail carries out; tail: what is
  left for the time of the next answer.
  """

  actions: Float[Array, 'K A']
  mask: Bool[Array, 'K']
  own: Bool[Array, 'K']
  tail: Tail


def no_tail(delay: int, width: int) -> Tail:
  """Before the first chunk: the robot stands."""
  return Tail(jnp.zeros((delay, width)), jnp.zeros(delay, bool))


def held(chunk: ActionChunk, delay: int) -> tuple[Array, Array]:
  """Actions [d + K, A] and mask [d + K] of a chunk [K, A] after `delay` steps without a target."""
  actions = jnp.pad(chunk.actions, [(delay, 0), (0, 0)])
  return actions, jnp.pad(chunk.mask, (delay, 0))  # False = hold the last target


def committed(tail: Tail, pose: Float[Array, 'A'], steps: int) -> ActionChunk:
  """A tail as the first actions of the chunk [1, K, A] that is asked for at `pose`."""
  rest = steps - tail.mask.shape[0]
  actions = jnp.pad(relative_pose(pose, tail.targets), [(0, rest), (0, 0)])
  return ActionChunk(actions[None], jnp.pad(tail.mask, (0, rest))[None])


def follow(chunk: ActionChunk, tail: Tail, pose: Float[Array, 'A']) -> Followed:
  """Joins a chunk [K, A], asked for at `pose` [A], to the tail [d] of the one before; K >= 2d.

  Where the tail is empty (the robot stood) nothing has passed and no action is left out.
  """
  steps, delay = chunk.mask.shape[0], tail.mask.shape[0]
  passed = jnp.sum(tail.mask)
  index = passed + jnp.arange(steps - delay)
  inside = jnp.minimum(index, steps - 1)
  actions, mask = chunk.actions[inside], chunk.mask[inside] & (index < steps)
  now = steps - 2 * delay  # of the new steps; the others are the next tail
  place = jnp.arange(steps)
  return Followed(
    jnp.concatenate([relative_pose(pose, tail.targets), actions[:now]]),
    jnp.concatenate([tail.mask, mask[:now]]),
    chunk.mask & (place >= passed) & (place < passed + steps - delay),
    Tail(apply_relative(pose, actions[now:]), mask[now:]),
  )
