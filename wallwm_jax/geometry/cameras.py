"""Pinhole cameras in NumPy or JAX (the answer is of the input's kind).

Extrinsics are camera-to-world [..., 4, 4] in m with OpenCV axes (x right, y down, z forward).
Pixel coordinates are continuous: (x, y) = (column, row), the image spans [0, W] x [0, H] and the
centre of the top-left pixel is (0.5, 0.5). Lens distortion is not modelled: calibrations belong to
rectified images.
"""

from __future__ import annotations

import numpy as np

from wallwm_jax.geometry.poses import array_namespace, rotate, transpose3


def look_at(eye, target, up=(0.0, 0.0, 1.0)):
  """Extrinsics [..., 4, 4] of a camera at `eye` [..., 3] m looking at `target` [..., 3] m.

  The image's y axis points against `up` [3] (world). A view along `up` has no defined roll:
  choose another `up`.
  """
  xp = array_namespace(eye, target)
  eye, target = xp.asarray(eye), xp.asarray(target)
  dtype = xp.result_type(eye, target, np.float32)
  eye, target = xp.broadcast_arrays(eye.astype(dtype), target.astype(dtype))
  forward = _normalise(xp, target - eye)
  right = _normalise(xp, xp.cross(forward, xp.asarray(up, dtype=dtype)))
  down = xp.cross(forward, right)
  top = xp.stack([right, down, forward, eye], axis=-1)
  bottom = xp.broadcast_to(xp.asarray([0.0, 0.0, 0.0, 1.0], dtype=dtype), (*top.shape[:-2], 1, 4))
  return xp.concatenate([top, bottom], axis=-2)


def project(points, intrinsics, extrinsics):
  """World points to pixels.

  Args:
    points: [..., N, 3] m. intrinsics: [..., 3, 3] px. extrinsics: [..., 4, 4].

  Returns:
    pixels [..., N, 2] and depth [..., N] m along the optical axis. A point is in view only if its
    depth is positive; at depth 0 the pixel is not finite.
  """
  from_world = transpose3(extrinsics[..., None, :3, :3])
  local = rotate(from_world, points - extrinsics[..., None, :3, 3])
  depth = local[..., 2]
  homogeneous = rotate(intrinsics[..., None, :, :], local)
  return homogeneous[..., :2] / depth[..., None], depth


def pixel_rays(pixels, intrinsics, extrinsics):
  """The sight line of each pixel.

  Args:
    pixels: [..., N, 2]. intrinsics: [..., 3, 3] px, upper triangular. extrinsics: [..., 4, 4].

  Returns:
    origin [..., 3] m and unit directions [..., N, 3], world frame.
  """
  xp = array_namespace(pixels, intrinsics, extrinsics)
  k = intrinsics[..., None, :, :]
  y = (pixels[..., 1] - k[..., 1, 2]) / k[..., 1, 1]
  x = (pixels[..., 0] - k[..., 0, 2] - k[..., 0, 1] * y) / k[..., 0, 0]
  local = _normalise(xp, xp.stack([x, y, xp.ones_like(x)], axis=-1))
  return extrinsics[..., :3, 3], rotate(extrinsics[..., None, :3, :3], local)


def resize_intrinsics(intrinsics, from_size: tuple[int, int], to_size: tuple[int, int]):
  """Intrinsics [..., 3, 3] after an image of (H, W) `from_size` was resampled to `to_size`."""
  scale = np.asarray([to_size[1] / from_size[1], to_size[0] / from_size[0], 1.0], intrinsics.dtype)
  return intrinsics * scale[:, None]


def _normalise(xp, vector):
  return vector / xp.sqrt((vector * vector).sum(-1, keepdims=True))
