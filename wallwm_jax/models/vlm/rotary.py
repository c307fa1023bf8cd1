"""Interleaved multimodal rotary embedding of Qwen3.5: part of a head rotates, and its frequencies
take turns in following the time, the row and the column of a token.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wallwm_jax.config import QwenConfig
from wallwm_jax.models.rope import Rotation


def _axes(section: tuple[int, int, int], pairs: int) -> np.ndarray:
  """[pairs] 0, 1 or 2: does a frequency follow the time, the row or the column?"""
  turn, index = np.arange(pairs) % 3, np.arange(pairs)
  rows = (turn == 1) & (index < 3 * section[1])
  columns = (turn == 2) & (index < 3 * section[2])
  return np.where(rows, 1, np.where(columns, 2, 0))


def rotation(config: QwenConfig, positions: Int[Array, '3 B S']) -> Rotation:
  """cos and sin, float32 [B, S, rotary_dims / 2], of positions (time, row, column).

  Text has the same position on all axes; the embedding is then the ordinary one-axis one.
  """
  pairs = config.rotary_dims // 2
  frequency = (config.rope_theta ** (-np.arange(pairs) / pairs)).astype(np.float32)
  axis = _axes(config.mrope_section, pairs)
  followed = jnp.moveaxis(positions, 0, -1)[..., axis]
  return Rotation.of(followed.astype(jnp.float32) * frequency)


def text_positions(start: Int[Array, 'B'], n: int) -> Int[Array, '3 B n']:
  """Positions of n text tokens from `start` on."""
  steps = start[:, None] + jnp.arange(n, dtype=start.dtype)
  return jnp.broadcast_to(steps, (3, *steps.shape))


def rotate(x: Float[Array, 'B S heads hd'], turn: Rotation) -> Float[Array, 'B S heads hd']:
  """x with its first `2 * pairs` dimensions rotated, (i, i + pairs) by pair; dtype of x."""
  cos, sin = turn.cos[:, :, None], turn.sin[:, :, None]
  pairs = cos.shape[-1]
  a, b, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  turned = (a * cos - b * sin, b * cos + a * sin)
  return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], -1)
