"""Where a point of one calibrated view may lie in another (NumPy)."""

from __future__ import annotations

import numpy as np


def fundamental_matrix(intrinsics_a, extrinsics_a, intrinsics_b, extrinsics_b) -> np.ndarray:
  """F [..., 3, 3] with b^T F a = 0 for homogeneous pixels a, b of one world point.

  Args:
    intrinsics: [..., 3, 3] px; extrinsics: [..., 4, 4] camera-to-world, m, of views a and b.

  Source: Hartley & Zisserman, "Multiple View Geometry", section 9.2.4.
  """
  intrinsics_a, intrinsics_b = (np.asarray(x, np.float64) for x in (intrinsics_a, intrinsics_b))
  to_b = np.linalg.inv(np.asarray(extrinsics_b, np.float64)) @ np.asarray(extrinsics_a, np.float64)
  x, y, z = np.moveaxis(to_b[..., :3, 3], -1, 0)
  zero = np.zeros_like(x)
  rows = [np.stack(row, -1) for row in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
  essential = np.stack(rows, -2) @ to_b[..., :3, :3]
  return np.swapaxes(np.linalg.inv(intrinsics_b), -1, -2) @ essential @ np.linalg.inv(intrinsics_a)


def epipolar_distance(pixels_a, pixels_b, fundamental) -> np.ndarray:
  """Distance [...] px of pixels_b [..., 2] from the line on which the points seen at pixels_a
  [..., 2] must lie; fundamental: [..., 3, 3] of `fundamental_matrix`."""
  a, b = (np.concatenate([x, np.ones((*np.shape(x)[:-1], 1))], -1) for x in (pixels_a, pixels_b))
  line = (np.asarray(fundamental) @ a[..., None])[..., 0]
  return np.abs((line * b).sum(-1)) / np.maximum(np.linalg.norm(line[..., :2], axis=-1), 1e-12)
