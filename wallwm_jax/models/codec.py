"""Frame codecs. The weight-free block-DCT codec obeys the causal-VAE rule: 1 + 4N frames <-> 1 + N
latents.

Each latent cell holds the lowest-frequency coefficients of an orthonormal 3-D DCT over a block of
`temporal` frames x `spatial` x `spatial` pixels in an orthonormal opponent colour space. The first
frame stands alone: it is coded as if repeated `temporal` times, so one coefficient list serves
every latent frame. Encoding then decoding is the orthogonal projection onto the kept coefficients;
with all of them kept it is exact.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import scipy.fft
from jaxtyping import Array, Float, UInt8

from wallwm_jax.config import CodecConfig
from wallwm_jax.types import Packing

# Luma, red-green, and yellow-blue axes; rows orthonormal.
_OPPONENT = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]], np.float64)
_OPPONENT /= np.linalg.norm(_OPPONENT, axis=1, keepdims=True)

# Cost of one step of frequency along time and of leaving luma, in steps of spatial frequency.
_TIME_COST, _CHROMA_COST = 1.6, 1.5


@functools.lru_cache
def dct_basis(config: CodecConfig) -> np.ndarray:
  """[temporal * spatial * spatial * 3, C] float32 with orthonormal columns, lowest frequency
  first.
  """
  t, s = config.temporal, config.spatial
  time, space = (scipy.fft.dct(np.eye(n), axis=0, norm='ortho') for n in (t, s))
  full = np.einsum('at,by,cx,de->abcdtyxe', time, space, space, _OPPONENT)
  full = full.reshape(t * s * s * 3, t * s * s * 3)
  a, b, c, d = np.meshgrid(*map(np.arange, (t, s, s, 3)), indexing='ij')
  cost = np.hypot(b, c) + _TIME_COST * a + _CHROMA_COST * (d > 0)
  order = np.argsort(cost.ravel(), kind='stable')[: config.channels]
  return full[order].T.astype(np.float32)


def encode(config: CodecConfig, frames: UInt8[Array, 'B V T H W 3']) -> Float[Array, 'B V F h w C']:
  """Latents of uint8 frames, T = 1 + 4N, in the units of an orthonormal transform of pixels in [-1,
  1].

  Raises:
    ValueError: T is not 1 + temporal * N, or H, W are not multiples of the block.
  """
  b, v, t, height, width, _ = frames.shape
  r, s = config.temporal, config.spatial
  if (t - 1) % r or height % s or width % s:
    raise ValueError(
      f'codec.encode: expected 1 + {r}N frames and sizes in multiples of {s}, got T={t}, '
      f'H={height}, W={width}. Cut or pad the clip first.'
    )
  first = jnp.repeat(frames[:, :, :1], r, axis=2)
  return _encode_blocks(config, jnp.concatenate([first, frames[:, :, 1:]], axis=2))


def encode_rows(
  config: CodecConfig, frames: UInt8[Array, 'B V T H W 3'], packing: Packing
) -> Float[Array, 'B V F h w C']:
  """`encode` of packed rows: every event's 1 + 4N frames on their own. Padding is coded as well."""
  r = config.temporal
  # An event has r - 1 frames less than r times its latents: where its latent f ends in the row.
  latent = jnp.arange(packing.frame_event.shape[1])
  last = r * latent - (r - 1) * (packing.frame_event - 1)
  back = jnp.where(packing.frame_index[..., None] > 0, jnp.arange(1 - r, 1), 0)
  index = jnp.clip(last[..., None] + back, 0, frames.shape[2] - 1).reshape(len(frames), -1)
  return _encode_blocks(
    config, jnp.take_along_axis(frames, index[:, None, :, None, None, None], axis=2)
  )


def _encode_blocks(config: CodecConfig, frames):
  """Latents of uint8 [B, V, F * temporal, H, W, 3], each of a block of its own."""
  b, v, t, height, width, _ = frames.shape
  r, s = config.temporal, config.spatial
  x = frames.astype(jnp.float32) / 127.5 - 1.0
  x = x.reshape(b, v, t // r, r, height // s, s, width // s, s, 3)
  x = x.transpose(0, 1, 2, 4, 6, 3, 5, 7, 8).reshape(*x.shape[:3], height // s, width // s, -1)
  return x @ dct_basis(config)


def decode(
  config: CodecConfig, latents: Float[Array, 'B V F h w C']
) -> Float[Array, 'B V T H W 3']:
  """Frames in [0, 1] float32, T = 1 + temporal * (F - 1); values are clipped to the display
  range.
  """
  b, v, f, h, w, _ = latents.shape
  r, s = config.temporal, config.spatial
  x = (latents @ dct_basis(config).T).reshape(b, v, f, h, w, r, s, s, 3)
  x = x.transpose(0, 1, 2, 5, 3, 6, 4, 7, 8).reshape(b, v, f * r, h * s, w * s, 3)
  return jnp.clip(0.5 * x[:, :, r - 1 :] + 0.5, 0.0, 1.0)
