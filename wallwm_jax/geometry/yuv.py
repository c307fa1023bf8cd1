"""Video planes (I420: luma, and both colours at half resolution) to RGB, in NumPy or JAX (the
answer is of the input's kind).

An I420 image [H * 3/2, W] uint8 holds Y in its first H rows, then U and V [H/2, W/2] each, packed
row by row. Colours are repeated over their 2 x 2 pixels. Source: ITU-R BT.601-7 (section 2.5) and
BT.709-6 (section 3): kr, kb weigh red and blue in luma; limited range means Y in 16..235 and U, V
in 16..240, as cameras and codecs use, full range means 0..255.
"""

from __future__ import annotations

import numpy as np

from wallwm_jax.geometry.poses import array_namespace

LUMA_WEIGHTS = {'bt601': (0.299, 0.114), 'bt709': (0.2126, 0.0722)}  # (kr, kb)


def i420_to_rgb(planes, standard: str = 'bt601', full_range: bool = False):
  """RGB float32 [..., H, W, 3] in 0..255 (clipped, not rounded) of I420 uint8 [..., H * 3/2, W].

  Args:
    standard: 'bt601' or 'bt709'; full_range: Y, U and V use 0..255 instead of the limited range.

  Raises:
    ValueError: odd sizes, or rows that are not three halves of a height.
  """
  xp = array_namespace(planes)
  (rows, width), lead = planes.shape[-2:], planes.shape[:-2]
  height = rows * 2 // 3
  if rows % 3 or width % 2:
    raise ValueError(
      f'I420 planes: expected [..., H * 3/2, W] with even H and W, got {list(planes.shape)}.'
    )
  scale_y, scale_c, black = (1.0, 1.0, 0.0) if full_range else (255 / 219, 255 / 224, 16.0)
  y = (planes[..., :height, :].astype(np.float32) - black) * np.float32(scale_y)
  colour = planes[..., height:, :].reshape(*lead, 2, height // 2, width // 2)
  colour = (colour.astype(np.float32) - 128) * np.float32(scale_c)
  colour = xp.repeat(xp.repeat(colour, 2, axis=-2), 2, axis=-1)
  u, v = colour[..., 0, :, :], colour[..., 1, :, :]
  kr, kb = LUMA_WEIGHTS[standard]
  red = y + np.float32(2 * (1 - kr)) * v
  blue = y + np.float32(2 * (1 - kb)) * u
  green = y - np.float32(2 * kb * (1 - kb) / (1 - kr - kb)) * u
  green = green - np.float32(2 * kr * (1 - kr) / (1 - kr - kb)) * v
  return xp.clip(xp.stack([red, green, blue], axis=-1), 0.0, 255.0)


def black(size: tuple[int, int]) -> np.ndarray:
  """I420 uint8 [H * 3/2, W] of a black picture of size (H, W), limited range."""
  planes = np.full((size[0] * 3 // 2, size[1]), 128, np.uint8)
  planes[: size[0]] = 16
  return planes


def rgb_frames(frames):
  """uint8 [B, V, ..., H, W, 3] of the frames of a batch in either layout.

  Args:
    frames: RGB uint8 [B, V, T, H, W, 3], returned as it is, or I420 planes [B, V, T, H * 3/2, W]
      of a store's clips (BT.601, limited range).
  """
  if frames.ndim == 6:
    return frames
  return array_namespace(frames).rint(i420_to_rgb(frames)).astype(np.uint8)
