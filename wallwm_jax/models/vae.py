"""Wan's causal video VAEs: Wan2.1 (4 x 8 x 8) and Wan2.2 (4 x 16 x 16, residual levels).

1 + r n frames <-> 1 + n latent frames, r = `VAEConfig.temporal`. A clip is coded in pieces of
`VAEConfig.chunk` latent frames under `lax.scan`, with the frames that the convolutions still need
carried along: memory and compile time do not grow with the clip, and the result does not depend on
the pieces. `chunk` >= the latent frames of a clip codes it in one piece.

Source: Wan2.1 and Wan2.2 (their public VAEs), which code one latent frame at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from wallwm_jax.config import CodecConfig, VAEConfig
from wallwm_jax.models.vae_layers import (
  AverageDown,
  CausalConv,
  ChannelNorm,
  Downsample,
  DuplicateUp,
  Middle,
  ResBlock,
  Stages,
  Upsample,
  patchify,
  run,
  unpatchify,
)
from wallwm_jax.parallel.constraints import constrain
from wallwm_jax.types import ConfigError

Split = Callable[[jax.Array], jax.Array]


class Level(nnx.Module):
  """Residual blocks and, but for the last level, a resampling; Wan2.2 adds a shortcut around it."""

  def __init__(self, widths: list[int], sample, short, *, dtype, rngs: nnx.Rngs):
    self.names = tuple(f'res_{r}' for r in range(len(widths) - 1))
    for name, c_in, c_out in zip(self.names, widths, widths[1:]):
      setattr(self, name, ResBlock(c_in, c_out, dtype=dtype, rngs=rngs))
    if sample is not None:
      self.sample, self.names = sample, (*self.names, 'sample')
    self.short = short

  def stages(self) -> Stages:
    return [(name, getattr(self, name)) for name in self.names]

  def __call__(self, x, cache):
    y, after = run(self.stages(), x, cache)
    return y if self.short is None else y + self.short(x, start=cache is None), after


class Coder(nnx.Module):
  """What encoder and decoder share: `names` in order, norm, silu and the last convolution."""

  names: tuple[str, ...]

  def stages(self) -> Stages:
    return [(name, getattr(self, name)) for name in self.names]

  def __call__(self, x, cache, split: Split = lambda x: x):
    """The next piece x and the cache of those before it -> (float32 piece, cache).

    split: how activations are sharded.
    """
    after, x = {}, split(x)
    for name, stage in self.stages():
      x, after[name] = stage(x, None if cache is None else cache[name])
      x = split(x)
    x = jax.nn.silu(self.norm_out(x))
    x, after['conv_out'] = self.conv_out(x, None if cache is None else cache['conv_out'])
    return x, after

  def _last(self, width: int, c_out: int, **kw):
    self.norm_out = ChannelNorm(width)
    self.conv_out = CausalConv(width, c_out, 3, 3, out=jnp.float32, **kw)


class Encoder(Coder):
  """Patchified frames -> 2 C moments before the quantising convolution."""

  def __init__(self, vae: VAEConfig, channels: int, **kw):
    widths = [vae.base * m for m in (1, *vae.dim_mult)]
    levels = len(vae.dim_mult)
    self.names = ('conv_in', *(f'down_{i}' for i in range(levels)), 'mid')
    self.conv_in = CausalConv(3 * vae.patch**2, widths[0], 3, 3, **kw)
    for i, (c_in, c_out) in enumerate(zip(widths, widths[1:])):
      last = i == levels - 1
      temporal = not last and vae.temporal_downsample[i]
      sample = None if last else Downsample(c_out, temporal, **kw)
      short = AverageDown(c_in, c_out, 1 + temporal, 2 - last) if vae.residual else None
      blocks = [c_in] + [c_out] * vae.res_blocks
      setattr(self, f'down_{i}', Level(blocks, sample, short, **kw))
    self.mid = Middle(widths[-1], **kw)
    self._last(widths[-1], 2 * channels, **kw)


class Decoder(Coder):
  """Latents after the de-quantising convolution -> patchified frames."""

  def __init__(self, vae: VAEConfig, channels: int, **kw):
    widths = [vae.decoder_base * m for m in (vae.dim_mult[-1], *vae.dim_mult[::-1])]
    levels = len(vae.dim_mult)
    self.names = ('conv_in', 'mid', *(f'up_{i}' for i in range(levels)))
    self.conv_in = CausalConv(channels, widths[0], 3, 3, **kw)
    self.mid = Middle(widths[0], **kw)
    for i, (c_in, c_out) in enumerate(zip(widths, widths[1:])):
      last = i == levels - 1
      temporal = not last and vae.temporal_downsample[levels - 2 - i]
      # Wan2.1's upsampling convolutions halve the channels.
      up = c_out if vae.residual else c_out // 2
      sample = None if last else Upsample(c_out, up, temporal, **kw)
      short = DuplicateUp(c_in, c_out, 1 + temporal, 2) if vae.residual and not last else None
      entering = c_in if vae.residual or i == 0 else c_in // 2
      blocks = [entering] + [c_out] * (vae.res_blocks + 1)
      setattr(self, f'up_{i}', Level(blocks, sample, short, **kw))
    self._last(widths[-1], 3 * vae.patch**2, **kw)


class WanVAE(nnx.Module):
  """Frames in [-1, 1] <-> posterior means, both float32, latents unnormalised.

  Parameters are float32 unless loaded otherwise; convolutions run in `config.vae.dtype`. Under
  `activation_sharding`, activations are split over the batch and over image rows (logical axis
  'patch'), or columns where the mesh does not divide the latent rows; a size it does not divide
  either way stays whole.

  Raises:
    ConfigError: `config` is no VAE, or its widths do not fit a residual level's shortcut.
  """

  def __init__(self, config: CodecConfig, rngs: nnx.Rngs):
    if config.kind != 'wan':
      raise ConfigError(f"WanVAE: expected model.codec.kind='wan', got {config.kind!r}.")
    self.config, vae, c = config, config.vae, config.channels
    kw = {'dtype': jnp.dtype(vae.dtype), 'rngs': rngs}
    self.encoder, self.decoder = Encoder(vae, c, **kw), Decoder(vae, c, **kw)
    self.quant_conv = CausalConv(2 * c, 2 * c, 1, 1, dtype=jnp.float32, rngs=rngs)
    self.post_quant_conv = CausalConv(c, c, 1, 1, dtype=jnp.float32, rngs=rngs)

  def encode(self, x: Float[Array, 'B T H W 3']) -> Float[Array, 'B F h w C']:
    """Posterior means of frames in [-1, 1], T = 1 + temporal * (F - 1).

    Raises:
      ValueError: T is not 1 + temporal * n, H or W are not multiples of `spatial`, or the last
        axis is not RGB.
    """
    self._check_frames(x)
    r, chunk, vae = self.config.temporal, self.config.vae.chunk, self.config.vae
    later = (x.shape[1] - 1) // r
    split = _splitter(x.shape[0], *(n // self.config.spatial for n in x.shape[2:4]))

    def step(piece, cache):
      piece = patchify(piece.astype(jnp.dtype(vae.dtype)), vae.patch)
      moments, cache = self.encoder(piece, cache, split)
      return self.quant_conv(moments, None)[0][..., : self.config.channels], cache

    return _in_pieces(step, x, 1 + later % chunk * r, chunk * r)

  def decode(self, z: Float[Array, 'B F h w C']) -> Float[Array, 'B T H W 3']:
    """Frames in [-1, 1] of unnormalised latents, T = 1 + temporal * (F - 1).

    Raises:
      ValueError: no latent frame, or another number of channels.
    """
    return jnp.clip(self._decode(z), -1.0, 1.0)

  def tiled_encode(self, x, tile: int = 256, overlap: int = 64):
    """`encode` by overlapping square tiles whose latents are blended with linear ramps.

    Every tile sees only itself, so the result differs from `encode` unless one tile holds the
    frame. The last tile of a row or column is moved inwards, so all are of one size.

    Args:
      x: [B, T, H, W, 3] as in `encode`.
      tile, overlap: pixels, multiples of `spatial`, 0 <= overlap < tile.

    Raises:
      ValueError: see `encode`, and tile or overlap are no such sizes.
    """
    self._check_frames(x)
    s, tile, overlap = self.config.spatial, *self._tile(tile, overlap)
    frames = 1 + (x.shape[1] - 1) // self.config.temporal
    grid = x.shape[2] // s, x.shape[3] // s
    shape = (x.shape[0], frames, *grid, self.config.channels)
    return _in_tiles(self.encode, x, shape, grid, (s, 1), tile, overlap)

  def tiled_decode(self, z, tile: int = 256, overlap: int = 64):
    """`decode` by overlapping tiles, as `tiled_encode`; tile and overlap in pixels of the frame.

    Raises:
      ValueError: see `decode`, and tile or overlap are no such sizes.
    """
    self._check_latents(z)
    s, tile, overlap = self.config.spatial, *self._tile(tile, overlap)
    b, f, h, w, _ = z.shape
    shape = (b, 1 + (f - 1) * self.config.temporal, h * s, w * s, 3)
    return jnp.clip(_in_tiles(self._decode, z, shape, (h, w), (1, s), tile, overlap), -1.0, 1.0)

  def _decode(self, z):
    self._check_latents(z)
    vae, later = self.config.vae, z.shape[1] - 1
    split = _splitter(z.shape[0], *z.shape[2:4])

    def step(piece, cache):
      piece = self.post_quant_conv(piece, None)[0].astype(jnp.dtype(vae.dtype))
      frames, cache = self.decoder(piece, cache, split)
      return unpatchify(frames, vae.patch), cache

    return _in_pieces(step, z, 1 + later % vae.chunk, vae.chunk)

  def _check_frames(self, x) -> None:
    r, s = self.config.temporal, self.config.spatial
    if x.ndim != 5 or x.shape[-1] != 3:
      raise ValueError(f'WanVAE.encode: expected frames [B, T, H, W, 3], got shape {x.shape}.')
    _, t, height, width, _ = x.shape
    if t < 1 or (t - 1) % r or height % s or width % s or not height * width:
      raise ValueError(
        f'WanVAE.encode: expected T = 1 + {r}N frames and H, W in multiples of {s}, got T={t}, '
        f'H={height}, W={width}. Cut or pad the clip first.'
      )

  def _check_latents(self, z) -> None:
    if z.ndim != 5 or z.shape[-1] != self.config.channels or 0 in z.shape:
      raise ValueError(
        f'WanVAE.decode: expected latents [B, F, h, w, {self.config.channels}] with at least one '
        f'frame and cell, got shape {z.shape}.'
      )

  def _tile(self, tile: int, overlap: int) -> tuple[int, int]:
    """Both in latent cells."""
    s = self.config.spatial
    if tile % s or overlap % s or not 0 <= overlap < tile:
      raise ValueError(
        f'WanVAE: expected tile and overlap in multiples of {s} pixels, 0 <= overlap < tile, got '
        f'tile={tile}, overlap={overlap}.'
      )
    return tile // s, overlap // s


def _in_pieces(step, x, head: int, size: int):
  """step(piece, cache) -> (y, cache) over x [B, T, ...]: `head` frames first, then `size` at a
  time; the y joined along time.
  """
  y, cache = step(x[:, :head], None)
  count = (x.shape[1] - head) // size
  if not count:
    return y

  def body(cache, i):
    piece = jax.lax.dynamic_slice_in_dim(x, head + i * size, size, axis=1)
    out, cache = step(piece, cache)
    return cache, out

  rest = jnp.moveaxis(jax.lax.scan(body, cache, jnp.arange(count))[1], 0, 1)
  rest = rest.reshape(rest.shape[0], -1, *rest.shape[3:])
  return jnp.concatenate([y, rest], 1)


def _in_tiles(call, x, shape, grid, scale, tile: int, overlap: int):
  """call over overlapping tiles of x, blended into an array of `shape`.

  grid: cells along both sides; scale: pixels per cell of x and of the result; tile, overlap: cells.
  """
  into, out = scale
  starts, weights = zip(*(tile_weights(n, tile, overlap, out) for n in grid))
  sides = [min(tile, n) for n in grid]
  pairs = np.stack(np.meshgrid(*(np.arange(len(s)) for s in starts), indexing='ij'), -1)
  rows, columns = (jnp.asarray(w, jnp.float32) for w in weights)
  at = [jnp.asarray(s) for s in starts]

  def body(total, pair):
    cell = at[0][pair[0]], at[1][pair[1]]
    piece = jax.lax.dynamic_slice(
      x,
      (0, 0, cell[0] * into, cell[1] * into, 0),
      (*x.shape[:2], sides[0] * into, sides[1] * into, x.shape[-1]),
    )
    weight = rows[pair[0]][:, None, None] * columns[pair[1]][:, None]
    where = (0, 0, cell[0] * out, cell[1] * out, 0)
    there = jax.lax.dynamic_slice(total, where, (*shape[:2], *weight.shape[:2], shape[-1]))
    return jax.lax.dynamic_update_slice(total, there + weight * call(piece), where), None

  total = jnp.zeros(shape, jnp.float32)
  return jax.lax.scan(body, total, jnp.asarray(pairs.reshape(-1, 2)))[0]


def tile_weights(n: int, tile: int, overlap: int, scale: int = 1):
  """How tiles cover n cells: first cell of each [tiles], weights [tiles, min(tile, n) * scale].

  Weights rise and fall linearly over an overlap, and sum to 1 at each of the n * scale places.
  """
  if n <= tile:
    return np.zeros(1, np.int32), np.ones((1, n * scale))
  count = -(-(n - overlap) // (tile - overlap))
  starts = np.minimum(np.arange(count) * (tile - overlap), n - tile).astype(np.int32)
  place = np.arange(tile * scale)
  ramp = overlap * scale + 1.0
  rise, fall = np.minimum(1.0, (place + 1) / ramp), np.minimum(1.0, (tile * scale - place) / ramp)
  weights = np.stack([
    (rise if i else 1.0) * (fall if i < count - 1 else np.ones_like(fall)) for i in range(count)
  ])
  total = np.zeros(n * scale)
  for start, weight in zip(starts * scale, weights):
    total[start : start + len(weight)] += weight
  return starts, np.stack([
    weight / total[start : start + len(weight)] for start, weight in zip(starts * scale, weights)
  ])


def _splitter(b: int, h: int, w: int) -> Split:
  """Constrains activations whose rows and columns are multiples of h and w (see `WanVAE`)."""
  rows = _divides('patch', h)
  columns = not rows and _divides('patch', w)
  axes = ('batch' if _divides('batch', b) else None, None, *_named(rows, columns), None)
  return lambda x: constrain(x, *axes)


def _named(*split: bool) -> tuple[str | None, ...]:
  return tuple('patch' if here else None for here in split)


def _divides(axis: str, size: int) -> bool:
  """Whether the mesh (if any) splits a dimension of `size` evenly along a logical axis."""
  try:
    constrain(jnp.zeros((size,)), axis)
  except ConfigError:
    return False
  return True
