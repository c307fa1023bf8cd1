"""Pictures and videos as patches, against the public image processor and a slow loop."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from wallwm_jax.config import VisionTowerConfig
from wallwm_jax.models.vlm.vision import frames_to_patches
from wallwm_jax.text import media
from wallwm_jax.types import ConfigError, DataError

PATH = pathlib.Path(__file__).parents[1] / 'fixtures' / 'data' / 'qwen_media.safetensors'
META = json.loads(safe_open(PATH, 'np').metadata()['config'])
TENSORS = load_file(PATH)
CONFIG = VisionTowerConfig(patch=4, temporal=2, merge=2)
ODD = VisionTowerConfig(patch=3, temporal=3, merge=3)


def slow_patches(frames, config):
  """frames [T, H, W, 3] of one patch in time, value by value."""
  size, merge, (h, w) = config.patch, config.merge, frames.shape[1:3]
  patches = []
  for top in range(0, h, size * merge):
    for left in range(0, w, size * merge):
      for y in range(top, top + size * merge, size):
        for x in range(left, left + size * merge, size):
          block = frames[:, y : y + size, x : x + size].astype(np.float64) / 255
          patches.append([
            (block[t, i, j, c] - 0.5) / 0.5
            for c in range(3) for t in range(config.temporal)
            for i in range(size) for j in range(size)
          ])  # fmt: skip
  return np.array(patches)


@pytest.mark.parametrize('index', range(META['images']))
def test_pictures_match_the_public_processor(index):
  image, want = TENSORS[f'inputs.image_{index}'], TENSORS[f'outputs.patches_{index}']
  bounds = dict(least=META['least'], most=META['most'])
  size = media.smart_resize(image.shape[:2], CONFIG, **bounds)
  frames = media.image_patches(image, CONFIG, size)
  assert frames.grid3 == tuple(TENSORS[f'outputs.grid_{index}'])
  np.testing.assert_allclose(frames.patches[0], want, atol=1e-6)
  jitted = jax.jit(frames_to_patches, static_argnums=(1, 2))(image[None], size, CONFIG)[0]
  levels = np.abs(np.asarray(jitted) - want) * 127.5
  if size[0] < image.shape[0] and size[1] > image.shape[1]:
    assert levels.mean() < 1  # Pillow then resizes rows first, which rounds elsewhere
  else:
    assert levels.max() < 2.01 and (levels > 0.5).mean() < 0.02


def test_sizes_match_the_public_processor():
  for index, (patch, merge, least, most) in enumerate(META['resizes']):
    config = VisionTowerConfig(patch=patch, merge=merge)
    sides = TENSORS['inputs.sides'].tolist()
    got = [media.smart_resize(tuple(side), config, least=least, most=most) for side in sides]
    np.testing.assert_array_equal(got, TENSORS[f'outputs.sizes_{index}'])


@pytest.mark.parametrize('config', [CONFIG, ODD])
def test_patches_are_those_of_a_slow_loop(config):
  factor = config.factor
  rng = np.random.default_rng(3)
  image = rng.integers(0, 256, (2, 2 * factor, 3 * factor, 3), dtype=np.uint8)
  size = image.shape[1:3]
  jitted = jax.jit(frames_to_patches, static_argnums=(1, 2))(image, size, config)
  for n in range(2):
    want = slow_patches(np.stack([image[n]] * config.temporal), config)
    np.testing.assert_allclose(jitted[n], want, atol=1e-6)
    on_host = media.image_patches(image[n], config, size).patches[0]
    np.testing.assert_allclose(on_host, want, atol=1e-6)
  video = rng.integers(0, 256, (2 * config.temporal - 1, *size, 3), dtype=np.uint8)
  frames = media.video_patches(video, config, size)
  padded = np.concatenate([video, video[-1:]]).reshape(2, config.temporal, *size, 3)
  assert frames.grid3 == (2, size[0] // config.patch, size[1] // config.patch)
  for n in range(2):
    np.testing.assert_allclose(frames.patches[n], slow_patches(padded[n], config), atol=1e-6)


def test_times_match_the_public_processor():
  found = [name for name in TENSORS if name.startswith('outputs.times_')]
  assert len(found) == 4
  for name in found:
    frames, merge = map(int, name.split('_')[1:])
    times = media.timestamps([3 * n / 24 for n in range(frames)], merge)
    np.testing.assert_allclose(times, TENSORS[name], rtol=1e-15)


def test_files_are_read(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
  image[..., 3] = 255
  Image.fromarray(image).save(tmp_path / 'a.png')
  frames = media.image_patches(tmp_path / 'a.png', CONFIG, (16, 24))
  want = media.image_patches(image[..., :3], CONFIG, (16, 24))
  np.testing.assert_array_equal(frames.patches, want.patches)


def test_media_of_one_size_that_follow_each_other_run_together():
  square, wide = np.zeros((16, 16, 3), np.uint8), np.full((3, 8, 24, 3), 9, np.uint8)
  a = media.image_patches(square, CONFIG, (16, 16))
  b = media.video_patches(wide, CONFIG, (8, 24))
  images, grids = media.model_inputs([a, a, b, a], CONFIG)
  assert grids == ((4, 4), (2, 6), (4, 4))
  assert [x.shape for x in images] == [(2, 16, 96), (2, 12, 96), (1, 16, 96)]
  assert media.model_inputs([], CONFIG) == ((), ())


@pytest.mark.parametrize(
  ('call', 'error', 'match'),
  [
    (lambda: media.smart_resize((2010, 10), CONFIG), DataError, '2010 x 10 px'),
    (lambda: media.smart_resize((0, 10), CONFIG), DataError, '0 x 10 px'),
    (lambda: media.smart_resize((9, 9), CONFIG, most=63), ConfigError, 'room for a token of 8 x 8'),
    (lambda: _picture(np.uint8, (9, 9, 3), (12, 16)), ConfigError, 'multiples of 8 px'),
    (lambda: _picture(np.uint8, (9, 9, 3), (0, 16)), ConfigError, 'multiples of 8 px'),
    (lambda: _picture(np.float32, (8, 8, 3), (8, 8)), DataError, 'expected uint8'),
    (lambda: _picture(np.uint8, (8, 8), (8, 8)), DataError, 'expected uint8'),
    (lambda: _picture(np.uint8, (8, 8, 4), (8, 8)), DataError, 'expected uint8'),
    (
      lambda: media.video_patches(np.zeros((0, 8, 8, 3), np.uint8), CONFIG, (8, 8)),
      DataError,
      'expected uint8',
    ),
    (lambda: media.timestamps([], 2), DataError, 'expected finite'),
    (lambda: media.timestamps([1.0, 0.5], 2), DataError, 'not decreasing'),
    (lambda: _inputs((1, 16, 96), (4, 2)), DataError, r'patches \[frames, 8, 96\], got \[1, 16'),
    (lambda: _inputs((1, 16, 95), (4, 4)), DataError, 'got .1, 16, 95'),
    (lambda: _inputs((1, 15, 96), (3, 5)), DataError, 'multiples of 2'),
    (
      lambda: frames_to_patches(np.zeros((1, 9, 8, 3), np.uint8), (9, 8), CONFIG),
      ConfigError,
      'frames of 9 x 8 px: expected sides in multiples of 8',
    ),
  ],
)
def test_what_cannot_be_encoded_is_refused(call, error, match):
  with pytest.raises(error, match=match):
    call()


def _picture(dtype, shape, size):
  return media.image_patches(np.zeros(shape, dtype), CONFIG, size)


def _inputs(shape, grid):
  return media.model_inputs([media.Frames(np.zeros(shape, np.float32), grid)], CONFIG)


def test_a_file_that_is_no_picture_is_refused(tmp_path):
  (tmp_path / 'a.png').write_text('no picture')
  for name in ('a.png', 'b.png'):
    with pytest.raises(DataError, match=f'{name}: expected a picture'):
      media.image_patches(tmp_path / name, CONFIG)
