"""Images against the camera model: what geometry.cameras projects must be what the renderer
draws.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.envs.tabletop import SINGLE_KINDS, VIEWS, TabletopConfig, env_fns, task_suite
from wallwm_jax.envs.tabletop.env import camera_calibration
from wallwm_jax.envs.tabletop.mjcf import CUBE_HALF
from wallwm_jax.envs.tabletop.render import CUBE_RGB, render
from wallwm_jax.geometry import cameras

SIZE = (48, 48)


@pytest.fixture(scope='module')
def scenes():
  """States, images [N, V, H, W, 3] and calibrations of single-event start states, as NumPy."""
  config = TabletopConfig(image_size=SIZE)
  env = env_fns(config)
  suite = task_suite(jax.random.key(0), SINGLE_KINDS, 4)
  states = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(1), len(suite.kind)), suite)

  def look(s):
    return (env.observe(s).frames[:, 0], camera_calibration(s, config))

  frames, calibration = jax.jit(jax.vmap(look))(states)
  return jax.device_get((states, frames, calibration))


def hue_matches(pixel, cube):
  """Whether a pixel has the cube's chromaticity (brightness aside)."""
  colour, wanted = pixel.astype(float) + 1, CUBE_RGB[cube]
  return np.abs(colour / colour.sum() - wanted / wanted.sum()).max() < 0.08


def cube_positions(states, i):
  return states.physics.qpos[i, 6:].reshape(4, 7)[:, :3]


@pytest.mark.parametrize('view', [0, 1])
def test_cube_tops_are_drawn_where_they_project(scenes, view):
  states, frames, calibration = scenes
  hits = total = 0
  for i in range(len(frames)):
    tops = cube_positions(states, i) + np.array([0, 0, CUBE_HALF])
    pixels, depth = cameras.project(
      tops, calibration.intrinsics[i, view], calibration.extrinsics[i, view]
    )
    for cube in np.flatnonzero(states.cube_present[i]):
      if cube == states.task.script[i, 0, 1]:  # the gripper is over it, or holds it
        continue
      column, row = np.floor(pixels[cube]).astype(int)
      assert depth[cube] > 0.2 and 0 <= column < SIZE[1] and 0 <= row < SIZE[0]
      hits += hue_matches(frames[i, view, row, column], cube)
      total += 1
  assert total > 50 and hits > 0.9 * total  # the gripper hides some


def test_wrist_camera_sees_the_held_cube(scenes):
  states, frames, calibration = scenes
  for i in np.flatnonzero(np.isin(states.task.script[:, 0, 0], [2, 3, 4, 5])):
    cube = states.task.script[i, 0, 1]
    pixels, depth = cameras.project(
      cube_positions(states, i)[cube][None],
      calibration.intrinsics[i, 2],
      calibration.extrinsics[i, 2],
    )
    column, row = np.floor(pixels[0]).astype(int)
    assert depth[0] > 0
    assert hue_matches(frames[i, 2, row, column], cube)


def test_absent_cubes_are_not_drawn(scenes):
  states, frames, _ = scenes
  checked = 0
  for i in range(len(frames)):
    for cube in np.flatnonzero(~states.cube_present[i]):
      if cube == 1:  # the green zone shares the green cube's hue
        continue
      pixels = frames[i, :2].reshape(-1, 3).astype(float) + 1
      off = np.abs(
        pixels / pixels.sum(1, keepdims=True) - CUBE_RGB[cube] / CUBE_RGB[cube].sum()
      ).max(1)
      assert (off > 0.05).all()
      checked += 1
  assert checked > 10


def test_extrinsics_are_rigid_and_only_the_wrist_moves(scenes):
  _, _, calibration = scenes
  rotation = calibration.extrinsics[..., :3, :3]
  assert np.allclose(rotation @ np.swapaxes(rotation, -1, -2), np.eye(3), atol=1e-5)
  assert np.allclose(np.linalg.det(rotation), 1, atol=1e-5)
  spread = calibration.extrinsics.std(0).max((1, 2))
  assert (spread[:2] < 1e-6).all() and spread[2] > 0.05
  assert calibration.valid.all() and len(VIEWS) == calibration.valid.shape[1]


def test_images_of_other_sizes_show_the_same_scene(scenes):
  states, frames, _ = scenes
  state = jax.tree.map(lambda x: jnp.asarray(x[0]), dataclasses.replace(states, task=None))
  large = np.asarray(jax.jit(lambda s: render(s, (96, 96)))(state)).astype(float)
  assert large.shape == (3, 96, 96, 3)
  halved = large.reshape(3, 48, 2, 48, 2, 3).mean((2, 4))
  assert np.abs(halved - frames[0]).mean() < 4


def test_a_lifted_cube_casts_its_shadow(scenes):
  """Raising a cube must change the table below it, not only the cube: the cue for height."""
  states, _, _ = scenes
  state = jax.tree.map(lambda x: jnp.asarray(x[0]), dataclasses.replace(states, task=None))
  far = (
    state.physics.qpos.at[0:3]
    .set(jnp.asarray([0.2, 0.2, 0.25]))
    .at[6:9]
    .set(jnp.asarray([0.0, 0.0, 0.1]))
  )
  present = jnp.asarray([True, False, False, False])
  bare = dataclasses.replace(
    state,
    physics=dataclasses.replace(state.physics, qpos=far),
    cube_present=present,
    zone_present=jnp.zeros(3, bool),
  )
  empty = dataclasses.replace(bare, cube_present=jnp.zeros(4, bool))
  draw = jax.jit(lambda s: render(s, SIZE))
  with_cube, without = np.asarray(draw(bare)).astype(int), np.asarray(draw(empty)).astype(int)
  darker = ((without - with_cube).min(-1) > 15) & (np.ptp(with_cube, axis=-1) < 60)
  assert darker[0].sum() >= 6 and darker[1].sum() >= 6
