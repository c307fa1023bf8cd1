"""The environment's state."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.envs.tabletop.physics import Physics
from wallwm_jax.envs.tabletop.tasks import Task
from wallwm_jax.types import pytree_dataclass


@pytree_dataclass
class TabletopState:
  """One tabletop.

  physics: the moving world; cube_present [4], zone_present [3]: what is on the table; zones: [3, 2]
  centres, m.
  task: the script; stage: events of it completed so far; dwell: control periods for which the next
  event's condition has held without a break; event_start: [4, 3] cube positions when the current
  event began, m.
  """

  physics: Physics
  cube_present: Bool[Array, '4']
  zone_present: Bool[Array, '3']
  zones: Float[Array, '3 2']
  task: Task
  stage: Int[Array, '']
  dwell: Int[Array, '']
  event_start: Float[Array, '4 3']
