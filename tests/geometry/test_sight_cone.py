"""Sight cones against float64 loops, by hand on parallel axes, and by what cameras see."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from wallwm_jax.geometry import cameras as cam
from wallwm_jax.geometry.sight_cone import Cones, patch_cones, sight_cone_mask
from wallwm_jax.types import Cameras, ConfigError

IMAGE, GRID, BAND = (48, 64), (3, 4), (0.2, 2.5)


def rig(rng, views=3, batch=()):
  """Cameras spread around the origin, all looking roughly at it, with different focal lengths."""
  eyes = rng.normal(size=(*batch, views, 3))
  eyes *= rng.uniform(0.8, 1.2, (*batch, views, 1)) / np.linalg.norm(eyes, axis=-1, keepdims=True)
  extrinsics = cam.look_at(eyes, rng.uniform(-0.1, 0.1, size=eyes.shape))
  focal = rng.uniform(50, 90, (*batch, views))
  intrinsics = np.zeros((*batch, views, 3, 3))
  intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = focal
  intrinsics[..., :2, 2] = 32, 24
  intrinsics[..., 2, 2] = 1
  valid = np.ones((*batch, views), bool)
  return Cameras(intrinsics.astype(np.float32), extrinsics.astype(np.float32), valid)


@functools.partial(jax.jit, static_argnums=1)
def mask_of(cameras, slack=1.2):
  return sight_cone_mask(patch_cones(cameras, IMAGE, GRID, slack), *BAND)


def reference_cones(cameras, slack):
  """Per patch (apex, axis, half angle): loops, matrix inverse, arccos."""
  cones = []
  calibrations = np.float64(cameras.intrinsics), np.float64(cameras.extrinsics)
  for k, pose in zip(*calibrations, strict=True):
    def ray(column, row, k=k, pose=pose):
      local = np.linalg.inv(k) @ [column * IMAGE[1] / GRID[1], row * IMAGE[0] / GRID[0], 1.0]
      return pose[:3, :3] @ local / np.linalg.norm(local)
    view = []
    for row in range(GRID[0]):
      for column in range(GRID[1]):
        axis = ray(column + 0.5, row + 0.5)
        angles = [np.arccos(axis @ ray(column + i, row + j)) for i in (0, 1) for j in (0, 1)]
        view.append((pose[:3, 3], axis, slack * max(angles)))
    cones.append(view)
  return cones


def reference_margin(first, second):
  """threshold - distance of one ordered pair; co-visible iff >= 0."""
  (p, v, angle), (p2, v2, angle2) = first, second
  depths, *_ = np.linalg.lstsq(np.stack([v, -v2], axis=-1), p2 - p, rcond=None)
  t1 = min(max(depths[0], BAND[0]), BAND[1])
  t2 = min(max(v2 @ (p + t1 * v - p2), BAND[0]), BAND[1])
  return t1 * angle + t2 * angle2 - np.linalg.norm(p + t1 * v - p2 - t2 * v2)


@pytest.mark.parametrize('seed', range(4))
def test_matches_float64_loops(seed):
  cameras = rig(np.random.default_rng(seed))
  got = np.asarray(mask_of(cameras))
  cones = reference_cones(cameras, 1.2)
  views, patches = len(cones), len(cones[0])
  assert got.shape == (views, patches, views, patches)
  decided = 0
  for a, b, i, j in np.ndindex(views, views, patches, patches):
    if a == b:
      assert got[a, i, b, j]
      continue
    margin = reference_margin(cones[a][i], cones[b][j])
    if abs(margin) > 1e-5:  # nearer to the border float32 may fall on either side
      assert got[a, i, b, j] == (margin > 0), (a, i, b, j, margin)
      decided += 1
  assert decided > 0.99 * views * (views - 1) * patches**2
  across = got[~np.broadcast_to(np.eye(views, dtype=bool)[:, None, :, None], got.shape)]
  assert 0.05 < across.mean() < 0.85  # the mask says something


def test_a_point_seen_by_two_cameras_makes_their_patches_co_visible():
  rng = np.random.default_rng(10)
  cameras = rig(rng, views=4)
  mask = np.asarray(mask_of(cameras, 1.5))
  points = rng.uniform(-0.3, 0.3, size=(300, 3))
  pixels, depth = cam.project(points, cameras.intrinsics, cameras.extrinsics)
  inside = ((pixels >= 0) & (pixels < [IMAGE[1], IMAGE[0]])).all(-1) & (depth > 0)
  cell = (pixels // [IMAGE[1] / GRID[1], IMAGE[0] / GRID[0]]).astype(int)
  patch = cell[..., 1] * GRID[1] + cell[..., 0]
  pairs = [(a, patch[a, n], b, patch[b, n]) for n, a, b in np.ndindex(len(points), 4, 4)
           if a != b and inside[a, n] and inside[b, n]]
  assert len(pairs) > 500
  assert all(mask[pair] for pair in pairs)


def beam(apex, axis, angle):
  """A one-patch view."""
  return np.float32(apex), np.float32(axis), angle


@pytest.mark.parametrize('first,second,expected', [
    # Side by side: the cones touch at depth 0.2 / (2 * angle).
    (beam([0, 0, 0], [0, 0, 1], 0.06), beam([0.2, 0, 0], [0, 0, 1], 0.06), True),
    (beam([0, 0, 0], [0, 0, 1], 0.03), beam([0.2, 0, 0], [0, 0, 1], 0.03), False),
    # One behind the other on the same line, in both orders.
    (beam([0, 0, 0], [0, 0, 1], 0.01), beam([0, 0, 1], [0, 0, 1], 0.01), True),
    (beam([0, 0, 1], [0, 0, 1], 0.01), beam([0, 0, 0], [0, 0, 1], 0.01), True),
    # Face to face in range, face to face too far apart, and back to back.
    (beam([0, 0, 0], [0, 0, 1], 0.01), beam([0, 0, 2], [0, 0, -1], 0.01), True),
    (beam([0, 0, 0], [0, 0, 1], 0.01), beam([0, 0, 9], [0, 0, -1], 0.01), False),
    (beam([0, 0, 0], [0, 0, 1], 0.01), beam([0, 0, -2], [0, 0, -1], 0.01), False),
])
def test_parallel_axes(first, second, expected):
  apex, axis, angle = (np.stack(x) for x in zip(first, second, strict=True))
  cones = Cones(apex, axis[:, None], np.float32(angle)[:, None], np.ones(2, bool))
  mask = np.asarray(sight_cone_mask(cones, *BAND))
  assert mask[0, 0, 1, 0] == expected and mask[1, 0, 0, 0] == expected
  assert mask[0, 0, 0, 0] and mask[1, 0, 1, 0]


def test_uncalibrated_views_are_never_masked_even_with_garbage_calibration():
  rng = np.random.default_rng(5)
  cameras = rig(rng, batch=(2,))
  extrinsics = cameras.extrinsics.copy()
  extrinsics[0, 1] = np.nan
  valid = np.array([[True, False, True], [True, True, True]])
  full = np.asarray(mask_of(cameras))
  cameras = dataclasses.replace(cameras, extrinsics=extrinsics, valid=valid)
  mask = np.asarray(mask_of(cameras))
  assert mask[0, 1].all() and mask[0, :, :, 1].all()
  np.testing.assert_array_equal(mask[0, 0, :, 2], full[0, 0, :, 2])
  np.testing.assert_array_equal(mask[1], full[1])


def test_batch_axes_change_nothing():
  cameras = rig(np.random.default_rng(6), batch=(2,))
  batched = np.asarray(mask_of(cameras))
  for b in range(2):
    single = np.asarray(mask_of(jax.tree.map(lambda x, b=b: x[b], cameras)))
    assert (batched[b] == single).mean() > 0.999  # ties may round differently


def test_bad_settings_are_refused():
  cameras = rig(np.random.default_rng(0))
  with pytest.raises(ConfigError, match='cone_slack'):
    patch_cones(cameras, IMAGE, GRID, 0.9)
  with pytest.raises(ConfigError, match='cone_depth'):
    sight_cone_mask(patch_cones(cameras, IMAGE, GRID, 1.0), 1.0, 1.0)
