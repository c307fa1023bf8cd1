"""Cameras: projection, sight lines and resizing agree with each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.geometry import cameras

K = np.array([[60.0, 0.5, 30.0], [0.0, 50.0, 20.0], [0.0, 0.0, 1.0]])


def test_look_at_puts_target_in_front_and_up_upwards():
  extrinsics = cameras.look_at(np.array([2.0, 0.0, 1.0]), np.array([0.0, 0.0, 1.0]))
  np.testing.assert_allclose(extrinsics[:3, 2], [-1, 0, 0], atol=1e-12)
  np.testing.assert_allclose(extrinsics[:3, 1], [0, 0, -1], atol=1e-12)  # y of the image is down
  assert np.linalg.det(extrinsics[:3, :3]) == pytest.approx(1)
  above, depth = cameras.project(np.array([[0.0, 0.0, 1.5]]), K, extrinsics)
  centre, _ = cameras.project(np.array([[0.0, 0.0, 1.0]]), K, extrinsics)
  np.testing.assert_allclose(centre[0], [30, 20], atol=1e-9)
  assert above[0, 1] < centre[0, 1]
  assert depth[0] == pytest.approx(2)


def test_look_at_broadcasts_and_keeps_float32():
  eyes = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  extrinsics = cameras.look_at(eyes, np.zeros(3, np.float32))
  assert extrinsics.shape == (4, 4, 4) and extrinsics.dtype == np.float32
  single = cameras.look_at(eyes[2], np.zeros(3, np.float32))
  np.testing.assert_allclose(extrinsics[2], single, atol=1e-6)


@pytest.mark.parametrize('convert', [np.asarray, jnp.asarray])
def test_points_along_a_pixel_ray_project_back_to_the_pixel(convert):
  rng = np.random.default_rng(1)
  eyes = rng.normal(size=(5, 3))
  extrinsics = convert(cameras.look_at(eyes, eyes + rng.normal(size=(5, 3))))
  pixels = convert(rng.uniform(0, 60, size=(5, 7, 2)))
  intrinsics = convert(K)
  origin, direction = cameras.pixel_rays(pixels, intrinsics, extrinsics)
  np.testing.assert_allclose(np.linalg.norm(direction, axis=-1), 1, atol=1e-5)
  points = origin[:, None] + 1.7 * direction
  back, depth = cameras.project(points, intrinsics, extrinsics)
  np.testing.assert_allclose(back, pixels, atol=1e-3 if convert is jnp.asarray else 1e-9)
  assert (np.asarray(depth) > 0).all()


def test_resized_intrinsics_see_the_same_directions():
  rng = np.random.default_rng(2)
  extrinsics = cameras.look_at(np.array([1.0, 2.0, 3.0]), np.zeros(3))
  small = cameras.resize_intrinsics(K, (40, 60), (10, 30))
  pixels = rng.uniform(0, 40, size=(6, 2))
  scaled = pixels * np.array([30 / 60, 10 / 40])
  _, before = cameras.pixel_rays(pixels, K, extrinsics)
  _, after = cameras.pixel_rays(scaled, small, extrinsics)
  np.testing.assert_allclose(after, before, atol=1e-12)
