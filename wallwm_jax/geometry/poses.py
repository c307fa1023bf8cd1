"""End-effector poses: 6D rotations, anchor-relative actions, angles.

A pose vector [..., A] holds 10 numbers per arm: position 3 m, rotation 6 (the first two columns of
the rotation matrix, concatenated), gripper 1 (0 closed, 1 open). Every function takes NumPy or JAX
arrays and answers in kind. Products of 3x3 matrices are written as multiply-and-sum: a matmul on
accelerators would round the operands to bfloat16, which is millimetres at arm's length.
"""

from __future__ import annotations

import sys

import numpy as np

from wallwm_jax.errors import DataError

POSE_WIDTH = 10  # per arm: 3 position + 6 rotation + 1 gripper
_TINY = 1e-12  # squared length below which a direction is considered undefined


def array_namespace(*arrays):
  """`jax.numpy` if any of the arrays is a JAX array (or tracer), else `numpy`."""
  jax = sys.modules.get('jax')  # not imported: none of the arrays can be one of its
  return jax.numpy if jax and any(isinstance(x, jax.Array) for x in arrays) else np


def matmul3(a, b):
  """Full-precision product of small matrices [..., i, j] and [..., j, k] -> [..., i, k]."""
  return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def rotate(matrix, vector):
  """Full-precision product of [..., 3, 3] and [..., 3] -> [..., 3]."""
  return (matrix * vector[..., None, :]).sum(-1)


def transpose3(matrix):
  """Swaps the last two axes."""
  return matrix.swapaxes(-1, -2)


def rot6d_to_matrix(rot6d):
  """The rotation closest to a 6D representation by Gram-Schmidt.

  Args:
    rot6d: [..., 6], two columns that need be neither unit nor orthogonal.

  Returns:
    [..., 3, 3], always a rotation: an undefined first column counts as x, an undefined second one
    as an axis orthogonal to the first, so all-zero input is the identity. Differentiable.

  Source: Zhou et al., "On the Continuity of Rotation Representations" (arXiv 1812.07035), eq. 15.
  """
  xp = array_namespace(rot6d)
  x, y, z = np.eye(3, dtype=rot6d.dtype)
  first = _unit(xp, rot6d[..., :3], x)
  spare = xp.where(xp.abs(first[..., 1:2]) < 0.9, y, z)
  second = _unit(xp, _reject(rot6d[..., 3:], first), _reject(spare, first))
  return xp.stack([first, second, xp.cross(first, second)], axis=-1)


def matrix_to_rot6d(matrix):
  """The first two columns of [..., 3, 3], concatenated: [..., 6]."""
  xp = array_namespace(matrix)
  return xp.concatenate([matrix[..., :, 0], matrix[..., :, 1]], axis=-1)


def euler_to_matrix(rpy):
  """Roll, pitch, yaw [..., 3] rad about fixed x, then y, then z -> Rz Ry Rx [..., 3, 3]."""
  xp = array_namespace(rpy)
  cos, sin = xp.cos(rpy), xp.sin(rpy)
  (cr, cp, cy), (sr, sp, sy) = (tuple(t[..., i] for i in range(3)) for t in (cos, sin))
  rows = [
      [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
      [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
      [-sp, cp * sr, cp * cr],
  ]
  return xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_euler(matrix):
  """Inverse of `euler_to_matrix`: [..., 3, 3] -> roll, pitch, yaw [..., 3] rad, pitch within a
  right angle; at the right angle itself roll and yaw turn about one axis, and their split is
  arbitrary."""
  xp = array_namespace(matrix)
  roll = xp.arctan2(matrix[..., 2, 1], matrix[..., 2, 2])
  pitch = xp.arctan2(-matrix[..., 2, 0], xp.hypot(matrix[..., 0, 0], matrix[..., 1, 0]))
  yaw = xp.arctan2(matrix[..., 1, 0], matrix[..., 0, 0])
  return xp.stack([roll, pitch, yaw], axis=-1)


def relative_pose(anchor, target):
  """Target poses as seen from the anchor pose.

  Args:
    anchor: [..., A] absolute poses, broadcast against `target` (e.g. [B, 1, A] against [B, K, A]).
    target: [..., A] absolute poses.

  Returns:
    [..., A]: position R_a^T (p - p_a) m, rotation R_a^T R, gripper of the target unchanged.

  Raises:
    DataError: if A is not a multiple of 10.
  """
  xp, anchor, target = _per_arm(anchor, target)
  from_world = transpose3(rot6d_to_matrix(anchor[..., 3:9]))
  position = rotate(from_world, target[..., :3] - anchor[..., :3])
  rotation = matmul3(from_world, rot6d_to_matrix(target[..., 3:9]))
  return _join(xp, position, rotation, target[..., 9:])


def apply_relative(anchor, relative):
  """Inverse of `relative_pose`: absolute poses [..., A] of relative ones; same broadcasting."""
  xp, anchor, relative = _per_arm(anchor, relative)
  to_world = rot6d_to_matrix(anchor[..., 3:9])
  position = anchor[..., :3] + rotate(to_world, relative[..., :3])
  rotation = matmul3(to_world, rot6d_to_matrix(relative[..., 3:9]))
  return _join(xp, position, rotation, relative[..., 9:])


def geodesic_angle(a, b):
  """Angle [...] in rad, 0..pi, of the rotation between matrices a and b [..., 3, 3]."""
  xp = array_namespace(a, b)
  r = matmul3(transpose3(a), b)
  twice_sin = xp.stack([r[..., i, j] - r[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0))], axis=-1)
  twice_cos = r[..., 0, 0] + r[..., 1, 1] + r[..., 2, 2] - 1
  return xp.arctan2(xp.sqrt((twice_sin**2).sum(-1)), twice_cos)


def _unit(xp, vector, fallback):
  """`vector` [..., 3] scaled to length 1; `fallback` where it has no direction."""
  defined = (vector * vector).sum(-1, keepdims=True) > _TINY
  vector = xp.where(defined, vector, fallback)
  return vector / xp.sqrt((vector * vector).sum(-1, keepdims=True))


def _reject(vector, axis):
  """The part of `vector` [..., 3] orthogonal to the unit `axis` [..., 3]."""
  return vector - (vector * axis).sum(-1, keepdims=True) * axis


def _per_arm(*poses):
  """The array namespace, then the poses broadcast together as [..., arms, 10]."""
  xp = array_namespace(*poses)
  for pose in poses:
    if pose.shape[-1] == 0 or pose.shape[-1] % POSE_WIDTH:
      raise DataError(
          f'pose width: expected a multiple of {POSE_WIDTH} (3 position, 6 rotation, 1 gripper per '
          f'arm), got an array of shape {pose.shape}. Convert to the canonical layout first.')
  poses = xp.broadcast_arrays(*poses)
  return xp, *(p.reshape(*p.shape[:-1], p.shape[-1] // POSE_WIDTH, POSE_WIDTH) for p in poses)


def _join(xp, position, rotation, gripper):
  """[..., A] from per-arm parts [..., arms, 3], [..., arms, 3, 3], [..., arms, 1]."""
  pose = xp.concatenate([position, matrix_to_rot6d(rotation), gripper], axis=-1)
  return pose.reshape(*pose.shape[:-2], pose.shape[-2] * pose.shape[-1])
