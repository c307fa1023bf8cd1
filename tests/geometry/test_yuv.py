import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from av.video.reformatter import Interpolation, VideoReformatter
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.geometry import yuv


def _planes(height, width, seed=0, low=16, high=236):
  return np.random.default_rng(seed).integers(low, high, (height * 3 // 2, width), np.uint8)


def _ffmpeg(planes, space, full, flags):
  """RGB of FFmpeg's converter."""
  return (
    VideoReformatter()
    .reformat(
      av.VideoFrame.from_ndarray(planes, format='yuv420p'),
      format='rgb24',
      interpolation=flags,
      src_colorspace=space,
      dst_colorspace=space,
      src_color_range='JPEG' if full else 'MPEG',
      dst_color_range='JPEG',
    )
    .to_ndarray()
  )


@pytest.mark.parametrize('size', [(16, 16), (48, 64), (50, 46), (192, 224)])
@pytest.mark.parametrize(
  'standard, space, full', [('bt601', 'ITU601', False), ('bt709', 'ITU709', False),
                            ('bt601', 'ITU601', True)]
)  # fmt: skip
def test_agrees_with_ffmpeg_within_rounding(size, standard, space, full):
  planes = _planes(*size, low=0 if full else 16, high=256 if full else 236)
  ours = yuv.i420_to_rgb(planes, standard, full)
  assert ours.shape == (*size, 3) and ours.dtype == np.float32
  exact = Interpolation.POINT | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
  # Its exact path rounds to nearest: half a level, and the width of its fixed-point numbers.
  assert np.abs(ours - _ffmpeg(planes, space, full, exact)).max() < 0.55
  # Its fast path, the one that stores decode with, rounds towards zero in three places.
  error = _ffmpeg(planes, space, full, Interpolation.POINT) - ours
  assert -3 < error.min() and error.max() < 1 and -1 < error.mean() < 0


@pytest.mark.parametrize(
  'colour, expected',
  [
    ((16, 128, 128), (0, 0, 0)),
    ((235, 128, 128), (255, 255, 255)),
    ((81, 90, 240), (255, 0, 0)),  # BT.601 colour bars
    ((145, 54, 34), (0, 255, 0)),
    ((41, 240, 110), (0, 0, 255)),
  ],
)
def test_primaries(colour, expected):
  planes = np.full((6, 4), colour[0], np.uint8)
  planes[4], planes[5] = colour[1], colour[2]
  np.testing.assert_allclose(yuv.i420_to_rgb(planes), np.full((4, 4, 3), expected), atol=2)


def test_jax_and_numpy_agree():
  planes = np.random.default_rng(0).integers(0, 256, (2, 3, 12, 6), np.uint8)
  ours = jax.jit(yuv.i420_to_rgb)(jnp.asarray(planes))
  assert isinstance(ours, jax.Array) and ours.shape == (2, 3, 8, 6, 3)
  np.testing.assert_allclose(ours, yuv.i420_to_rgb(planes), atol=1e-3)


@settings(deadline=None, max_examples=50)
@given(
  half=st.tuples(st.integers(1, 9), st.integers(1, 9)), count=st.integers(1, 3), seed=st.integers(0)
)
def test_any_even_size_and_each_picture_alone(half, count, seed):
  shape = (1, count, 3 * half[0], 2 * half[1])
  planes = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
  rgb = yuv.i420_to_rgb(planes)
  assert rgb.shape == (1, count, 2 * half[0], 2 * half[1], 3)
  assert rgb.min() >= 0 and rgb.max() <= 255
  for i in range(count):
    np.testing.assert_array_equal(rgb[0, i], yuv.i420_to_rgb(planes[0, i]))


def test_a_colour_covers_its_four_pixels():
  planes = np.full((6, 4), 128, np.uint8)
  planes[4, 1] = 240  # U of the top right 2 x 2 pixels
  blue = yuv.i420_to_rgb(planes)[..., 2]
  grey = blue[0, 0]
  assert (blue[:2, 2:] > grey).all() and (blue[:, :2] == grey).all() and (blue[2:] == grey).all()


@pytest.mark.parametrize('shape', [(7, 4), (6, 5), (4, 4)])
def test_odd_sizes_are_refused(shape):
  with pytest.raises(ValueError, match='even H and W'):
    yuv.i420_to_rgb(np.zeros(shape, np.uint8))


def test_frames_of_a_batch_in_either_layout():
  rgb = np.zeros((2, 3, 5, 4, 6, 3), np.uint8)
  assert yuv.rgb_frames(rgb) is rgb
  planes = np.broadcast_to(yuv.black((4, 6)), (2, 3, 5, 6, 6))
  converted = yuv.rgb_frames(planes)
  assert converted.dtype == np.uint8
  np.testing.assert_array_equal(converted, rgb)
