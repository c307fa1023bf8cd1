"""Letterboxing: any camera image, or a crop of it, onto the model's pixel grid, keeping aspect,
borders known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from wallwm_jax.geometry.cameras import resize_intrinsics

Size = tuple[int, int]  # (H, W)


class Box(NamedTuple):
  """A part of an image, px from its top-left corner; of the image's own aspect."""

  top: float
  left: float
  bottom: float
  right: float


def fit(source: Size, target: Size) -> tuple[Size, Size]:
  """Largest centred image of the source's aspect inside the target: (its (H, W), its top-left
  (row, column))."""
  scale = min(target[0] / source[0], target[1] / source[1])
  size = tuple(max(1, min(t, round(s * scale))) for s, t in zip(source, target))
  return size, tuple((t - s) // 2 for s, t in zip(size, target))


def letterbox(frames: np.ndarray, target: Size, box: Box | None = None) -> np.ndarray:
  """uint8 [T, H, W, 3], or the part `box` of them, resized (antialiased bilinear) onto black
  [T, *target, 3]."""
  source = frames.shape[1:3]
  if box is None and source == tuple(target):
    return frames
  (height, width), (top, left) = fit(source, target)
  result = np.zeros((len(frames), *target, 3), np.uint8)
  region = box and (box.left, box.top, box.right, box.bottom)
  for frame, out in zip(frames, result):
    image = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, region)
    out[top : top + height, left : left + width] = image
  return result


def letterbox_mask(
  source: Size, target: Size, mask: np.ndarray | None = None, box: Box | None = None
) -> np.ndarray:
  """bool [*target], False on borders: those letterboxing adds and those of `mask` [*source]."""
  (height, width), (top, left) = fit(source, target)
  part = box or Box(0, 0, *source)
  result = np.zeros(target, bool)
  inside = result[top : top + height, left : left + width]
  if mask is None:
    inside[:] = True
  else:
    rows = (part.top + (np.arange(height) + 0.5) * (part.bottom - part.top) / height).astype(int)
    columns = (part.left + (np.arange(width) + 0.5) * (part.right - part.left) / width).astype(int)
    inside[:] = mask[np.ix_(rows, columns)]
  return result


def letterbox_intrinsics(
  intrinsics: np.ndarray, source: Size, target: Size, box: Box | None = None
) -> np.ndarray:
  """Intrinsics [3, 3] px of the letterboxed image."""
  size, (top, left) = fit(source, target)
  part = box or Box(0, 0, *source)
  result = np.array(intrinsics, np.float32)
  result[:2, 2] -= part.left, part.top
  result = resize_intrinsics(result, (part.bottom - part.top, part.right - part.left), size)
  result[:2, 2] += left, top
  return result
