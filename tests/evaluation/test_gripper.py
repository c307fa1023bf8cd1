"""Finding the gripper in video: on a scene whose truth is known, and the distances by hand."""

import numpy as np
import pytest

from wallwm_jax.evaluation import gripper
from wallwm_jax.geometry import cameras
from wallwm_jax.geometry.epipolar import epipolar_distance, fundamental_matrix
from wallwm_jax.types import DataError

SIZE = (48, 48)
INTRINSICS = np.tile(np.array([[60.0, 0, 24], [0, 60, 24], [0, 0, 1]]), (1, 2, 1, 1))
EYES = np.array([[0.0, -0.5, 0.5], [0.5, 0.0, 0.45]])
EXTRINSICS = cameras.look_at(EYES, np.zeros((2, 3)))[None]
FRAMES = 9


@pytest.fixture(scope='module')
def scene():
  """(video [1, 2, T, H, W, 3] of a textured blob on a fixed background, its path [1, 2, T, 2])."""
  rng = np.random.default_rng(0)
  positions = np.linspace([-0.06, 0.02, 0.05], [0.07, -0.05, 0.12], FRAMES)[None]
  path, depth = gripper.project_path(positions, INTRINSICS, EXTRINSICS)
  assert gripper.visible(path, depth, SIZE).all()
  background = rng.uniform(0.36, 0.44, (1, 2, 1, *SIZE, 3))
  y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
  video = np.repeat(background, FRAMES, axis=2)
  for shift, colour in (((-1.5, 0), (0.9, 0.5, 0.1)), ((1.5, 1), (0.1, 0.2, 0.9))):
    centre = path + shift
    squared = (x - centre[..., 0, None, None]) ** 2 + (y - centre[..., 1, None, None]) ** 2
    weight = np.exp(-squared / 6)[..., None]
    video = (1 - weight) * video + weight * np.array(colour)
  return video, path


def everywhere(frames=FRAMES):
  valid = np.ones((1, frames), bool)
  return np.ones((1, 2), bool), valid, np.ones((1, 2, frames), bool)


def test_a_moving_gripper_is_found_to_half_a_pixel(scene):
  video, path = scene
  found = gripper.find(video, video[:, :, 0], path[:, :, 0])
  np.testing.assert_allclose(found[:, :, 0], path[:, :, 0], atol=0.1)
  assert np.linalg.norm(found - path, axis=-1).max() < 0.8
  usable, valid, inside = everywhere()
  assert gripper.path_error(found, path, usable, valid, inside)[0] < 0.5
  assert gripper.epipolar_error(found, usable, valid, INTRINSICS, EXTRINSICS)[0] < 0.5


def test_views_of_different_motion_do_not_fit_each_other(scene):
  video, path = scene
  mixed = video.copy()
  mixed[:, 1] = np.repeat(video[:, 1, :1], FRAMES, axis=1)  # one view stands still
  found = gripper.find(mixed, video[:, :, 0], path[:, :, 0])
  usable, valid, inside = everywhere()
  fit = gripper.epipolar_error(path, usable, valid, INTRINSICS, EXTRINSICS)[0]
  assert fit < 1e-6
  assert gripper.epipolar_error(found, usable, valid, INTRINSICS, EXTRINSICS)[0] > 1.5
  still = gripper.path_error(found, path, usable, valid, inside)[0]
  assert still > 1.5


def test_what_is_not_usable_does_not_count(scene):
  _, path = scene
  usable, valid, inside = everywhere()
  off = path.copy()
  off[:, 1] += 5
  usable[:, 1] = False
  assert gripper.path_error(off, path, usable, valid, inside)[0] == 0
  assert np.isnan(gripper.epipolar_error(off, usable, valid, INTRINSICS, EXTRINSICS)[0])
  usable[:] = True
  inside[:, 1, 1:] = False
  np.testing.assert_allclose(
    gripper.path_error(off, path, usable, valid, inside)[0], np.sqrt(50) / (FRAMES + 1)
  )


def test_epipolar_distance_is_that_from_the_line():
  point = np.array([[0.03, -0.02, 0.08]])
  pixels = [
    cameras.project(point, INTRINSICS[0, v], EXTRINSICS[0, v])[0][0] for v in range(2)
  ]
  matrix = fundamental_matrix(
    INTRINSICS[0, 0], EXTRINSICS[0, 0], INTRINSICS[0, 1], EXTRINSICS[0, 1]
  )
  assert epipolar_distance(*pixels, matrix) < 1e-6
  # Other depths of the same pixel stay on the line; a move across it is seen in full.
  origin, ray = cameras.pixel_rays(pixels[0][None], INTRINSICS[0, 0], EXTRINSICS[0, 0])
  along = cameras.project(origin + 0.6 * ray, INTRINSICS[0, 1], EXTRINSICS[0, 1])[0][0]
  assert epipolar_distance(pixels[0], along, matrix) < 1e-5
  direction = (along - pixels[1]) / np.linalg.norm(along - pixels[1])
  across = pixels[1] + 3 * np.array([-direction[1], direction[0]])
  np.testing.assert_allclose(epipolar_distance(pixels[0], across, matrix), 3, rtol=1e-5)


def test_shapes_that_do_not_fit_are_refused(scene):
  video, path = scene
  with pytest.raises(DataError, match=r'expected video \[B, V, T, H, W, 3\]'):
    gripper.find(video, video, path[:, :, 0])
