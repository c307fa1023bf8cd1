"""Poses: round trips, conventions, precision, and that NumPy and JAX agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.geometry import poses
from wallwm_jax.types import DataError


def random_pose(rng, *shape, arms=1):
  parts = [np.concatenate([
      rng.uniform(-1, 1, (*shape, 3)),
      poses.matrix_to_rot6d(poses.euler_to_matrix(rng.uniform(-np.pi, np.pi, (*shape, 3)))),
      rng.uniform(0, 1, (*shape, 1)),
  ], axis=-1) for _ in range(arms)]
  return np.concatenate(parts, axis=-1)


def test_euler_angles_come_back():
  rng = np.random.default_rng(3)
  angles = rng.uniform(-np.pi, np.pi, (50, 3)) * [1, 0.49, 1]
  np.testing.assert_allclose(
    poses.matrix_to_euler(poses.euler_to_matrix(angles)), angles, atol=1e-12
  )
  straight_up = poses.euler_to_matrix(np.array([0.3, np.pi / 2, -0.4]))
  again = poses.euler_to_matrix(poses.matrix_to_euler(straight_up))
  np.testing.assert_allclose(again, straight_up, atol=1e-7)


def test_euler_is_rotation_about_fixed_axes_x_then_y_then_z():
  quarter = np.pi / 2
  x, y, z = np.eye(3)
  np.testing.assert_allclose(poses.euler_to_matrix(np.array([quarter, 0, 0])) @ y, z, atol=1e-12)
  np.testing.assert_allclose(poses.euler_to_matrix(np.array([0, quarter, 0])) @ z, x, atol=1e-12)
  np.testing.assert_allclose(poses.euler_to_matrix(np.array([0, 0, quarter])) @ x, y, atol=1e-12)
  roll, pitch, yaw = 0.3, -0.7, 1.1
  combined = poses.euler_to_matrix(np.array([roll, pitch, yaw]))
  one_by_one = np.eye(3)
  for axis, angle in enumerate((roll, pitch, yaw)):
    step = np.zeros(3)
    step[axis] = angle
    one_by_one = poses.euler_to_matrix(step) @ one_by_one
  np.testing.assert_allclose(combined, one_by_one, atol=1e-12)


def test_rot6d_is_the_first_two_columns():
  matrix = poses.euler_to_matrix(np.array([0.2, 0.5, -1.0]))
  rot6d = poses.matrix_to_rot6d(matrix)
  np.testing.assert_array_equal(rot6d, np.concatenate([matrix[:, 0], matrix[:, 1]]))
  np.testing.assert_allclose(poses.rot6d_to_matrix(rot6d), matrix, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6))
def test_any_rot6d_becomes_a_rotation(values):
  matrix = poses.rot6d_to_matrix(np.array(values))
  np.testing.assert_allclose(matrix.T @ matrix, np.eye(3), atol=1e-6)
  assert np.linalg.det(matrix) > 0.99


def test_zero_rot6d_is_identity_with_finite_gradient():
  np.testing.assert_array_equal(poses.rot6d_to_matrix(np.zeros(6)), np.eye(3))
  gradient = jax.jit(jax.jacobian(poses.rot6d_to_matrix))(jnp.zeros(6))
  assert np.isfinite(gradient).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([1, 2]), st.integers(1, 5))
def test_relative_then_apply_is_identity(seed, arms, steps):
  rng = np.random.default_rng(seed)
  anchor, target = random_pose(rng, 3, 1, arms=arms), random_pose(rng, 3, steps, arms=arms)
  relative = poses.relative_pose(anchor, target)
  assert relative.shape == (3, steps, 10 * arms)
  np.testing.assert_allclose(poses.apply_relative(anchor, relative), target, atol=1e-9)


def test_relative_pose_of_the_anchor_itself_and_of_a_known_move():
  rng = np.random.default_rng(0)
  anchor = random_pose(rng)
  own = poses.relative_pose(anchor, anchor)
  np.testing.assert_allclose(own, [0, 0, 0, 1, 0, 0, 0, 1, 0, anchor[9]], atol=1e-9)
  rotation = poses.rot6d_to_matrix(anchor[3:9])
  forward = anchor.copy()
  forward[:3] += 0.25 * rotation[:, 2]  # 25 cm along the tool's own z axis
  np.testing.assert_allclose(poses.relative_pose(anchor, forward)[:3], [0, 0, 0.25], atol=1e-9)


def test_jax_under_jit_matches_numpy_and_mixed_input_is_jax():
  rng = np.random.default_rng(1)
  anchor, target = random_pose(rng, 4, arms=2), random_pose(rng, 4, arms=2)
  expected = poses.relative_pose(anchor, target)
  got = jax.jit(poses.relative_pose)(anchor, target)
  np.testing.assert_allclose(got, expected, atol=1e-6)
  assert isinstance(poses.relative_pose(anchor.astype(np.float32), jnp.asarray(target)), jax.Array)
  assert isinstance(expected, np.ndarray)


@pytest.mark.parametrize('angle', [0.0, 1e-6, 0.4, np.pi / 2, 3.0, np.pi - 1e-6])
def test_geodesic_angle(angle):
  base = poses.euler_to_matrix(np.array([0.3, -0.2, 0.9]))
  turned = base @ poses.euler_to_matrix(np.array([0.0, angle, 0.0]))
  np.testing.assert_allclose(poses.geodesic_angle(base, turned), angle, atol=1e-12)


@pytest.mark.parametrize('width', [0, 7, 9, 19])
def test_wrong_width_is_refused(width):
  with pytest.raises(DataError, match='multiple of 10'):
    poses.relative_pose(np.zeros((2, width)), np.zeros((2, width)))
