"""Calibration of MuJoCo's cameras in the project's convention (geometry.cameras)."""

from __future__ import annotations

import numpy as np

VIEWS = ('corner', 'corner2', 'gripperPOV')
HAND_VIEW = 'gripperPOV'  # moves with the hand: one pose per frame
TURNED = ('corner', 'corner2')  # mounted upside down: their images are turned by 180 degrees


def intrinsics_of(fovy: float, size: tuple[int, int]) -> np.ndarray:
  """[3, 3] px of an image (H, W) with square pixels and a vertical field of view in degrees."""
  height, width = size
  focal = height / (2 * np.tan(np.deg2rad(fovy) / 2))
  return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)


def extrinsics_of(position: np.ndarray, rotation: np.ndarray, turned: bool) -> np.ndarray:
  """Camera-to-world [4, 4] m with OpenCV axes.

  Args:
    position: [3] m. rotation: [3, 3], columns are MuJoCo's camera axes (x right, y up, z backward)
      in the world. turned: whether the image is shown turned by 180 degrees.
  """
  signs = (-1.0, 1.0, -1.0) if turned else (1.0, -1.0, -1.0)
  pose = np.eye(4, dtype=np.float32)
  pose[:3, :3] = rotation * np.array(signs)
  pose[:3, 3] = position
  return pose
