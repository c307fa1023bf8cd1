"""Pictures and videos for a Qwen prompt, on the host: sizes, patches, times of frames.

The layout of patches is that of `models.vlm.vision.frames_to_patches`, which does the same to
cameras inside a jitted step.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from wallwm_jax.config import VisionTowerConfig
from wallwm_jax.types import ConfigError, DataError

_ASPECT = 200  # the longest side over the shortest that the public processor takes


class Frames(NamedTuple):
  """One image, or the merged frames of one video: patches [N, P, pixels] float32 in -1..1, and how
  many (rows, columns) of them a frame has."""

  patches: Float[np.ndarray, 'N P pixels']
  grid: tuple[int, int]

  @property
  def grid3(self) -> tuple[int, int, int]:
    """(frames, rows, columns), as `chat.encode_chat` wants it."""
    return len(self.patches), *self.grid


def smart_resize(
  size: tuple[int, int],
  config: VisionTowerConfig,
  *,
  least: int = 65_536,
  most: int = 16_777_216,
) -> tuple[int, int]:
  """(H, W) in multiples of `config.factor`, of about the same aspect, with an area in least..most
  px.

  Raises:
    DataError: a picture without pixels or more than 200 times longer than wide. ConfigError: bounds
      that no multiple of the factor can meet.
  """
  h, w = size
  factor = config.factor
  if not factor**2 <= most or least > most:
    raise ConfigError(
      f'expected least <= most and room for a token of {factor} x {factor} px, got least={least}, '
      f'most={most}.'
    )
  if min(size) < 1 or max(size) > _ASPECT * min(size):
    raise DataError(
      f'picture of {h} x {w} px: expected sides >= 1, neither more than {_ASPECT} times the other.'
    )
  sides = [round(side / factor) * factor for side in size]
  if sides[0] * sides[1] > most:
    shrink = math.sqrt(h * w / most)
    sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in size]
  elif sides[0] * sides[1] < least:
    grow = math.sqrt(least / (h * w))
    sides = [math.ceil(side * grow / factor) * factor for side in size]
  return sides[0], sides[1]


def image_patches(
  image: np.ndarray | pathlib.Path | str,
  config: VisionTowerConfig,
  size: tuple[int, int] | None = None,
) -> Frames:
  """One picture as a still frame.

  Args:
    image: uint8 [H, W, 3], or a file. size: (H, W) to resize to; None = `smart_resize`.

  Raises:
    DataError: no such picture, or another dtype or shape. ConfigError: a size that does not divide
      into tokens.
  """
  if not isinstance(image, np.ndarray):
    image = _read(pathlib.Path(image))
  frames = _resized(image[None], config, size)
  return _patches(np.repeat(frames, config.temporal, 0), config)


def video_patches(
  frames: np.ndarray, config: VisionTowerConfig, size: tuple[int, int] | None = None
) -> Frames:
  """A video uint8 [T, H, W, 3] as merged frames of `config.temporal` frames each; the last frame is
  repeated until they come out even.

  Raises: as `image_patches`.
  """
  frames = _resized(frames, config, size)
  missing = -len(frames) % config.temporal
  return _patches(np.concatenate([frames, np.repeat(frames[-1:], missing, 0)]), config)


def timestamps(times: Sequence[float], temporal: int) -> tuple[float, ...]:
  """Seconds of every merged frame, midway between its first and its last frame.

  Args:
    times: seconds of every frame before merging.

  Raises:
    DataError: no times, or times that run backwards or are not finite.
  """
  times = np.asarray(times, np.float64)
  if not len(times) or not np.isfinite(times).all() or (np.diff(times) < 0).any():
    raise DataError(f'times of video frames: expected finite, not decreasing seconds, got {times}.')
  times = np.pad(times, (0, -len(times) % temporal), mode='edge').reshape(-1, temporal)
  return tuple(((times[:, 0] + times[:, -1]) / 2).tolist())


def model_inputs(
  media: Sequence[Frames], config: VisionTowerConfig
) -> tuple[tuple[np.ndarray, ...], tuple[tuple[int, int], ...]]:
  """(images, grids) for `language.embed`: media that follow each other and share a size together.

  Args:
    media: of all rows of a batch, in the order of their placeholders.

  Raises:
    DataError: patches that are not those of their grid.
  """
  images, grids = [], []
  for index, (patches, grid) in enumerate(media):
    expected = (grid[0] * grid[1], config.pixels)
    if patches.shape[1:] != expected or grid[0] % config.merge or grid[1] % config.merge:
      raise DataError(
        f'picture {index}: a grid of {grid} patches (multiples of {config.merge}) has patches '
        f'[frames, {expected[0]}, {expected[1]}], got {list(patches.shape)}.'
      )
    if grids and grids[-1] == tuple(grid):
      images[-1].append(patches)
    else:
      images.append([patches])
      grids.append(tuple(grid))
  return tuple(map(np.concatenate, images)), tuple(grids)


def _read(path: pathlib.Path) -> np.ndarray:
  try:
    with PILImage.open(path) as image:
      return np.asarray(image.convert('RGB'))
  except (OSError, UnidentifiedImageError) as error:
    raise DataError(f'{path}: expected a picture, got {error}.') from None


def _resized(frames: np.ndarray, config: VisionTowerConfig, size) -> np.ndarray:
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
    raise DataError(
      f'pictures: expected uint8 [..., H, W, 3], got {frames.dtype} {list(frames.shape[1:])}.'
    )
  h, w = size = smart_resize(frames.shape[1:3], config) if size is None else tuple(size)
  if min(size) < 1 or h % config.factor or w % config.factor:
    raise ConfigError(
      f'size {size}: expected sides in multiples of {config.factor} px, one token.'
    )
  if frames.shape[1:3] == size:
    return frames
  cubic = PILImage.Resampling.BICUBIC
  return np.stack([np.asarray(PILImage.fromarray(f).resize((w, h), cubic)) for f in frames])


def _patches(frames: np.ndarray, config: VisionTowerConfig) -> Frames:
  """Frames [T, H, W, 3], T a multiple of `temporal`, as patches in merge-block order with values in
  the order (colour, frame, row, column)."""
  m, p, t = config.merge, config.patch, config.temporal
  n, (rows, columns) = len(frames) // t, (side // p for side in frames.shape[1:3])
  x = frames.astype(np.float32) / np.float32(127.5) - np.float32(1)
  x = x.reshape(n, t, rows // m, m, p, columns // m, m, p, 3)
  x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
  return Frames(x.reshape(n, rows * columns, config.pixels), (rows, columns))
