"""Rotary embeddings: Wan's 3-D table, the 4-way Camera RoPE of the cross-view branch, and 1-D for
actions.

All are for interleaved pairs (x[2i], x[2i+1]), as `kernels/qk_norm_rope` rotates them. Tables are
angles of shape [..., pairs].
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Rotation(NamedTuple):
  """cos and sin of rotary angles, [..., S, pairs] float32; made once and shared by all layers."""

  cos: Float[Array, '... S pairs']
  sin: Float[Array, '... S pairs']

  @classmethod
  def of(cls, angles) -> 'Rotation':
    """Of traced angles in their dtype; of NumPy ones in float64 on the host, rounded at the end."""
    if isinstance(angles, np.ndarray):
      angles = angles.astype(np.float64)
      return cls(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    return cls(jnp.cos(angles), jnp.sin(angles))


def axis_angles(positions: np.ndarray, pairs: int, theta: float) -> np.ndarray:
  """[S, pairs] angles position * theta^(-i / pairs), i = 0..pairs-1, computed in float64."""
  return positions[:, None] * theta ** (-np.arange(pairs) / max(pairs, 1))


def video_angles(
  frames: np.ndarray, grid: tuple[int, int], head_dim: int, theta: float
) -> np.ndarray:
  """[F * P, head_dim / 2] float64 for tokens ordered (frame, row, column).

  Wan's split of the head: rows and columns get 2 * (d // 6) features each, time the rest.
  """
  spatial = head_dim // 6
  f, y, x = _grid_positions(frames, grid)
  parts = [
    axis_angles(f, head_dim // 2 - 2 * spatial, theta),
    axis_angles(y, spatial, theta),
    axis_angles(x, spatial, theta),
  ]
  return np.concatenate(parts, axis=-1)


def camera_pairs(head_dim: int) -> tuple[int, int, int]:
  """Rotation pairs of the cross-view branch for (frame, row or column, view)."""
  pairs = head_dim // 2
  view = max(1, pairs // 4)
  spatial = (pairs - view) // 3
  return pairs - view - 2 * spatial, spatial, view


def camera_angles(
  frames: np.ndarray,
  grid: tuple[int, int],
  view_table: Float[Array, 'V pairs'],
  head_dim: int,
  theta: float,
) -> Float[Array, 'F VP pairs']:
  """[F, V * P, head_dim / 2]: (frame, row, column) angles as in `video_angles`, then the learned
  view rotation.

  Source: WALL-WM (arXiv 2606.01955), Camera RoPE: the bank of each head is split over (frame, row,
  column, view).
  """
  time, spatial, view = camera_pairs(head_dim)
  f, y, x = _grid_positions(frames, grid)
  fixed = np.concatenate(
    [axis_angles(f, time, theta), axis_angles(y, spatial, theta), axis_angles(x, spatial, theta)],
    -1,
  )
  views, patches = view_table.shape[0], grid[0] * grid[1]
  shape = (len(frames), views, patches)
  fixed = np.broadcast_to(
    fixed.astype(np.float32).reshape(len(frames), 1, patches, -1), (*shape, fixed.shape[-1])
  )
  learned = jnp.broadcast_to(view_table[None, :, None], (*shape, view))
  return jnp.concatenate([fixed, learned], -1).reshape(len(frames), views * patches, -1)


def _grid_positions(frames: np.ndarray, grid: tuple[int, int]):
  f, y, x = np.meshgrid(frames, np.arange(grid[0]), np.arange(grid[1]), indexing='ij')
  return f.ravel().astype(np.float64), y.ravel().astype(np.float64), x.ravel().astype(np.float64)
