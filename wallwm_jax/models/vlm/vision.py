"""Qwen3.5's image encoder: frames to patches, patches to tokens of the text model.

Each frame is encoded on its own. Patches are ordered by merge block: the merge x merge patches that
become one token stand next to each other, blocks row by row.

Sources: Qwen3-VL (arXiv 2511.21631) without its DeepStack; ViT (arXiv 2010.11929).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from wallwm_jax.config import VisionTowerConfig
from wallwm_jax.kernels.attention.api import dot_product_attention
from wallwm_jax.models.layers import AffineLayerNorm, Embedding, Linear
from wallwm_jax.models.rope import Rotation
from wallwm_jax.models.stack import scan_blocks, stack_blocks
from wallwm_jax.models.vlm.rotary import rotate
from wallwm_jax.parallel.constraints import constrain
from wallwm_jax.types import ConfigError

_THETA = 10_000.0


def frames_to_patches(
  frames: UInt8[Array, 'N H W 3'], size: tuple[int, int], config: VisionTowerConfig
) -> Float[Array, 'N P pixels']:
  """Every frame as a still image: float32 patches in -1..1, in merge-block order, values ordered
  (colour, frame of the patch, row, column).

  Args:
    size: (H, W) to resize to; static. Cubic and antialiased, columns before rows, each rounded to
      whole levels, as image libraries do.

  Raises:
    ConfigError: a size that does not divide into tokens.
  """
  h, w = size
  if min(size) <= 0 or h % config.factor or w % config.factor:
    raise ConfigError(
      f'frames of {h} x {w} px: expected sides in multiples of {config.factor}, the pixels of one '
      f'token ({config.merge} patches of {config.patch}).'
    )
  x = frames.astype(jnp.float32)
  for shape in ((*x.shape[:2], w, 3), (len(x), h, w, 3)):
    if x.shape != shape:
      x = jnp.clip(jnp.round(jax.image.resize(x, shape, 'cubic')), 0.0, 255.0)
  x = x / 127.5 - 1.0  # /255, then mean 0.5 and deviation 0.5
  m, p = config.merge, config.patch
  x = x.reshape(len(frames), h // (m * p), m, p, w // (m * p), m, p, 3)
  x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # block row, block column, row, column, colour, pixel
  x = x.reshape(len(frames), (h // p) * (w // p), 3, 1, p, p)
  x = jnp.broadcast_to(x, (*x.shape[:3], config.temporal, p, p))
  return x.reshape(*x.shape[:2], config.pixels)


def patch_coordinates(grid: tuple[int, int], merge: int) -> tuple[np.ndarray, np.ndarray]:
  """(row, column) of every patch of a frame [P], in merge-block order."""
  index = np.arange(grid[0] * grid[1]).reshape(grid[0] // merge, merge, grid[1] // merge, merge)
  return np.divmod(index.transpose(0, 2, 1, 3).ravel(), grid[1])


def position_taps(
  grid: tuple[int, int], config: VisionTowerConfig
) -> tuple[np.ndarray, np.ndarray]:
  """The entries of the square position table that surround every patch, and their bilinear weights:
  int32 and float32 [P, 4].

  The table is stretched over the grid corner to corner.
  """
  side = round(config.positions**0.5)
  taps = []
  for index, count in zip(patch_coordinates(grid, config.merge), grid):
    at = index * (side - 1) / max(count - 1, 1)
    low = np.floor(at).astype(np.int32)
    taps.append((np.stack([low, np.minimum(low + 1, side - 1)], -1), at - low))
  (rows, down), (columns, right) = taps
  entries = rows[:, :, None] * side + columns[:, None, :]
  weights = np.stack([1 - down, down], -1)[:, :, None] * np.stack([1 - right, right], -1)[:, None]
  return entries.reshape(-1, 4), weights.reshape(-1, 4).astype(np.float32)


def rotation_angles(grid: tuple[int, int], config: VisionTowerConfig) -> np.ndarray:
  """[P, hd / 2] angles of every patch: the first half turns with its row, the second with its
  column."""
  quarter = config.width // config.heads // 4
  frequency = _THETA ** (-np.arange(quarter) / quarter)
  coordinates = np.stack(patch_coordinates(grid, config.merge), -1)  # [P, 2]
  return (coordinates[..., None] * frequency).reshape(len(coordinates), 2 * quarter)


class VisionTower(nnx.Module):
  """Patches of single frames to tokens of width `out`.

  Matmuls and the residual stream in `dtype`; norms, softmax and rotation float32.
  """

  def __init__(self, config: VisionTowerConfig, out: int, dtype, *, rngs: nnx.Rngs):
    self.config, self.dtype = config, jnp.dtype(dtype)
    self.patch_embed = Linear(config.pixels, config.width, dtype=self.dtype, rngs=rngs)
    self.positions = Embedding(config.positions, config.width, std=0.02, rngs=rngs)
    self.blocks = stack_blocks(
      lambda rngs: VisionBlock(config, self.dtype, rngs=rngs), config.layers, rngs
    )
    self.merger = Merger(config, out, self.dtype, rngs=rngs)

  def __call__(
    self, patches: Float[Array, 'N P pixels'], grid: tuple[int, int]
  ) -> Float[Array, 'N tokens out']:
    """N frames of `grid` = (rows, columns) patches each (static), P = rows * columns.

    Returns:
      [N, P / merge^2, out] in `dtype`.

    Raises:
      ConfigError: patches that are not those of the grid.
    """
    return self.layers(patches, grid)[0]

  def layers(self, patches, grid):
    """(tokens, the residual stream after every block [L, N, P, D])."""
    c = self.config
    rows, columns = grid
    if rows % c.merge or columns % c.merge or patches.shape[1:] != (rows * columns, c.pixels):
      raise ConfigError(
        f'patches of shape {patches.shape}: a grid of {rows} x {columns} (multiples of {c.merge}) '
        f'has [N, {rows * columns}, {c.pixels}].'
      )
    x = self.patch_embed(patches) + self.position_embedding(grid).astype(self.dtype)
    rotation = Rotation.of(rotation_angles(grid, c)[None])
    x, each = scan_blocks(self.blocks, lambda block, x: block(x, rotation), x, 'none')
    return self.merger(x), each

  def position_embedding(self, grid: tuple[int, int]) -> Float[Array, 'P D']:
    """The learned positions, interpolated to `grid`; float32."""
    entries, weights = position_taps(grid, self.config)
    return jnp.sum(self.positions(entries) * weights[..., None], 1)


class VisionBlock(nnx.Module):
  """x + attention(norm x), then x + MLP(norm x), within one frame."""

  def __init__(self, config: VisionTowerConfig, dtype, *, rngs: nnx.Rngs):
    width = config.width
    self.heads = config.heads
    self.norm1, self.norm2 = (AffineLayerNorm(width, config.eps) for _ in range(2))
    self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
    self.proj = Linear(width, width, dtype=dtype, rngs=rngs)
    self.fc1 = Linear(width, config.ffn, dtype=dtype, rngs=rngs)
    self.fc2 = Linear(config.ffn, width, dtype=dtype, rngs=rngs)

  def __call__(self, x, rotation):
    """x [N, P, D]; rotation [1, P, hd / 2]."""
    x = constrain(x + self.attend(self.norm1(x), rotation), 'batch', None, None)
    h = jax.nn.gelu(self.fc1(self.norm2(x)), approximate=True)
    return constrain(x + self.fc2(h), 'batch', None, None)

  def attend(self, h, rotation):
    """Attention of every patch to all patches of its frame; h [N, P, D] normalised."""
    qkv = self.qkv(h).reshape(*h.shape[:2], 3, self.heads, -1)
    q, k = (rotate(qkv[:, :, i], rotation) for i in range(2))
    out = dot_product_attention(q, k, qkv[:, :, 2])
    return self.proj(out.reshape(h.shape))


class Merger(nnx.Module):
  """The merge x merge patches of a block, side by side, to one token."""

  def __init__(self, config: VisionTowerConfig, out: int, dtype, *, rngs: nnx.Rngs):
    block = config.merge**2 * config.width
    self.block = block
    self.norm = AffineLayerNorm(config.width, config.eps)
    self.fc1 = Linear(block, block, dtype=dtype, rngs=rngs)
    self.fc2 = Linear(block, out, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    x = self.norm(x).reshape(len(x), -1, self.block)
    return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
