"""MJX stepping of the tabletop and the low-level controller, one environment at a time (vmap for
more).

Only what changes between control periods is carried: qpos, qvel, the solver's warm start and the
actuator command.
"""

from __future__ import annotations

import contextlib
import functools
import io

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wallwm_jax.envs.tabletop import mjcf
from wallwm_jax.geometry import poses
from wallwm_jax.types import pytree_dataclass

# MJX prints on stdout that its optional Warp backend is absent; results are printed there.
with contextlib.redirect_stdout(io.StringIO()):
  from mujoco import mjx

# Largest change of the command in one control period: x, y, z m; yaw rad; fingers m.
_MAX_CHANGE = (0.08, 0.08, 0.08, 0.5, mjcf.FINGER_TRAVEL, mjcf.FINGER_TRAVEL)


@pytree_dataclass
class Physics:
  """qpos [34] (stage 6, then position 3 and quaternion 4 per cube), qvel [30], warmstart [30], ctrl
  [6].
  """

  qpos: Float[Array, '34']
  qvel: Float[Array, '30']
  warmstart: Float[Array, '30']
  ctrl: Float[Array, '6']


@functools.cache
def _template():
  """The MJX model and an empty Data, built once outside any trace."""
  with jax.ensure_compile_time_eval():
    model = mjx.put_model(mjcf.load_model())
    return model, mjx.make_data(model)


def from_positions(
  stage: Float[Array, '6'], command: Float[Array, '6'], cubes: Float[Array, '4 7']
) -> Physics:
  """A world at rest: stage joints, actuator command, and per cube position 3 m + quaternion 4 (w
  first).
  """
  nv = mjcf.load_model().nv
  return Physics(
    jnp.concatenate([stage, cubes.reshape(-1)]).astype(jnp.float32),
    jnp.zeros(nv),
    jnp.zeros(nv),
    command.astype(jnp.float32),
  )


def stage_of(pose: Float[Array, '10']) -> Float[Array, '6']:
  """The stage joints (x, y, z, yaw, finger, finger) that realise a pose, within the limits of the
  stage.

  Only the yaw part of the rotation can be realised: it is read from where the gripper's x axis
  points.
  """
  matrix = poses.rot6d_to_matrix(pose[3:9])
  position = jnp.clip(pose[:3], jnp.asarray(mjcf.STAGE_LOW), jnp.asarray(mjcf.STAGE_HIGH))
  yaw = jnp.clip(jnp.arctan2(matrix[1, 0], matrix[0, 0]), -mjcf.YAW_LIMIT, mjcf.YAW_LIMIT)
  finger = jnp.clip(pose[9], 0, 1) * mjcf.FINGER_TRAVEL
  return jnp.concatenate([position, jnp.stack([yaw, finger, finger])])


def pose_of(stage: Float[Array, '6']) -> Float[Array, '10']:
  """The pose (position 3 m, rot6d 6, gripper 0..1) of stage joints; the gripper is the mean finger
  opening.
  """
  zero = jnp.zeros(())
  cos, sin = jnp.cos(stage[3]), jnp.sin(stage[3])
  rotation = jnp.stack([cos, sin, zero, -sin, cos, zero])
  opening = jnp.clip((stage[4] + stage[5]) / (2 * mjcf.FINGER_TRAVEL), 0, 1)
  return jnp.concatenate([stage[:3], rotation, opening[None]])


def gripper_pose(physics: Physics) -> Float[Array, '10']:
  """Measured pose."""
  return pose_of(physics.qpos[: mjcf.NUM_STAGE])


def cube_poses(physics: Physics) -> tuple[Float[Array, '4 3'], Float[Array, '4 4']]:
  """Positions m and quaternions (w first) of the cubes."""
  free = physics.qpos[mjcf.NUM_STAGE :].reshape(mjcf.NUM_CUBES, 7)
  return free[:, :3], free[:, 3:]


def control_step(physics: Physics, target: Float[Array, '10'], substeps: int) -> Physics:
  """Tracks an absolute target pose for one control period; the command moves there linearly and
  rate-limited.
  """
  model, data = _template()
  limit = jnp.asarray(_MAX_CHANGE)
  change = jnp.clip(stage_of(target) - physics.ctrl, -limit, limit)

  def substep(carry, fraction):
    qpos, qvel, warmstart = carry
    now = data.replace(
      qpos=qpos, qvel=qvel, qacc_warmstart=warmstart, ctrl=physics.ctrl + fraction * change
    )
    new = mjx.step(model, now)
    return (new.qpos, new.qvel, new.qacc_warmstart), None

  fractions = jnp.arange(1, substeps + 1) / substeps
  (qpos, qvel, warmstart), _ = jax.lax.scan(
    substep, (physics.qpos, physics.qvel, physics.warmstart), fractions
  )
  return Physics(qpos, qvel, warmstart, physics.ctrl + change)
