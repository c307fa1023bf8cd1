"""Letterboxing: any camera image onto the model's pixel grid, keeping aspect, borders known."""

from __future__ import annotations

import numpy as np
from PIL import Image

from wallwm_jax.geometry.cameras import resize_intrinsics

Size = tuple[int, int]  # (H, W)


def fit(source: Size, target: Size) -> tuple[Size, Size]:
  """Largest centred image of the source's aspect inside the target: (its (H, W), its top-left
  (row, column))."""
  scale = min(target[0] / source[0], target[1] / source[1])
  size = tuple(max(1, min(t, round(s * scale))) for s, t in zip(source, target))
  return size, tuple((t - s) // 2 for s, t in zip(size, target))


def letterbox(frames: np.ndarray, target: Size) -> np.ndarray:
  """uint8 [T, H, W, 3] resized (antialiased bilinear) onto black [T, *target, 3]."""
  source = frames.shape[1:3]
  if source == tuple(target):
    return frames
  (height, width), (top, left) = fit(source, target)
  result = np.zeros((len(frames), *target, 3), np.uint8)
  for frame, out in zip(frames, result):
    image = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
    out[top : top + height, left : left + width] = image
  return result


def letterbox_mask(source: Size, target: Size, mask: np.ndarray | None = None) -> np.ndarray:
  """bool [*target], False on borders: those letterboxing adds and those of `mask` [*source]."""
  (height, width), (top, left) = fit(source, target)
  result = np.zeros(target, bool)
  inside = result[top : top + height, left : left + width]
  if mask is None:
    inside[:] = True
  else:
    rows = np.arange(height) * source[0] // height
    inside[:] = mask[np.ix_(rows, np.arange(width) * source[1] // width)]
  return result


def letterbox_intrinsics(intrinsics: np.ndarray, source: Size, target: Size) -> np.ndarray:
  """Intrinsics [3, 3] px of the letterboxed image."""
  size, (top, left) = fit(source, target)
  result = np.array(resize_intrinsics(np.asarray(intrinsics, np.float32), source, size))
  result[:2, 2] += left, top
  return result
