"""Configs of the frozen front ends: the frame codec and the text encoder."""

from __future__ import annotations

import dataclasses
from typing import Literal

from wallwm_jax.config.base import require


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Wan's causal video VAE; the defaults are Wan2.2's.

  base, decoder_base: channels of the first encoder and the last decoder level; dim_mult: their
  multiples per level. temporal_downsample: levels (all but the last) that halve time as well.
  residual: Wan2.2's averaging and duplicating shortcuts around every level. patch: pixels folded
  into channels before the first convolution. latent_mean, latent_std: published normalisation per
  latent channel, () = 0 and 1. chunk: latent frames per step of streaming. tile: side in
  pixels of the square tiles in which larger frames are coded, a quarter of it shared with the next
  tile and blended; 0 = whole frames.
  """

  base: int = 160
  decoder_base: int = 256
  dim_mult: tuple[int, ...] = (1, 2, 4, 4)
  res_blocks: int = 2
  temporal_downsample: tuple[bool, ...] = (False, True, True)
  residual: bool = True
  patch: int = 2
  latent_mean: tuple[float, ...] = ()
  latent_std: tuple[float, ...] = ()
  chunk: int = 1
  tile: int = 0
  dtype: Literal['float32', 'bfloat16'] = 'float32'  # of convolutions; norms and softmax: float32

  def __post_init__(self):
    require(
      len(self.temporal_downsample) == len(self.dim_mult) - 1,
      f'model.codec.vae.temporal_downsample: expected {len(self.dim_mult) - 1} entries, one less '
      f'than dim_mult {self.dim_mult}, got {self.temporal_downsample}.',
    )
    step = 4 * self.spatial
    require(
      self.tile >= 0 and self.tile % step == 0,
      f'model.codec.vae.tile: expected 0 or a multiple of {step} pixels, got {self.tile}.',
    )
    require(self.chunk >= 1, f'model.codec.vae.chunk: expected >= 1, got {self.chunk}.')

  @property
  def spatial(self) -> int:
    """Pixels per latent cell along each side."""
    return self.patch * 2 ** len(self.temporal_downsample)

  @property
  def temporal(self) -> int:
    """Frames per latent frame after the first."""
    return 2 ** sum(self.temporal_downsample)


@dataclasses.dataclass(frozen=True)
class CodecConfig:
  """Frame codec.

  'dct': orthonormal block DCT, `channels` lowest-frequency coefficients kept. 'wan': the causal VAE
  of `vae`, `channels` = its latent channels; `weights`: the folder `wallwm convert wan-vae` wrote.
  """

  kind: Literal['dct', 'wan'] = 'dct'
  spatial: int = 8
  temporal: int = 4
  channels: int = 96
  vae: VAEConfig = VAEConfig()
  weights: str = ''

  def __post_init__(self):
    if self.kind == 'wan':
      self._check_vae()
      return
    full = self.spatial**2 * self.temporal * 3
    require(
      0 < self.channels <= full, f'model.codec.channels: expected 1..{full}, got {self.channels}.'
    )

  def published_stats(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, scale) per latent channel of a public VAE; None where they are the data's own."""
    if self.kind == 'dct':
      return None
    return self.vae.latent_mean or (0.0,) * self.channels, (
      self.vae.latent_std or (1.0,) * self.channels
    )

  def _check_vae(self):
    vae = self.vae
    require(
      (self.spatial, self.temporal) == (vae.spatial, vae.temporal),
      f'model.codec: the VAE codes {vae.temporal} frames x {vae.spatial} pixels, but temporal='
      f'{self.temporal}, spatial={self.spatial}.',
    )
    for name, values in (('latent_mean', vae.latent_mean), ('latent_std', vae.latent_std)):
      require(
        len(values) in (0, self.channels),
        f'model.codec.vae.{name}: expected {self.channels} values (codec.channels) or none, got '
        f'{len(values)}.',
      )


@dataclasses.dataclass(frozen=True)
class UMT5Config:
  """The UMT5 encoder; the defaults are umt5-xxl's. Its width is `TextConfig.width`."""

  vocab: int = 256_384
  layers: int = 24
  heads: int = 64
  head_dim: int = 64
  ffn: int = 10_240
  buckets: int = 32  # of relative distance, both directions together
  max_distance: int = 128
  eps: float = 1e-6
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'  # of matmuls; norms and softmax: float32

  def __post_init__(self):
    require(
      self.buckets >= 4 and self.max_distance > self.buckets // 4,
      'model.text.umt5: expected buckets >= 4 and max_distance > buckets // 4, got buckets='
      f'{self.buckets}, max_distance={self.max_distance}.',
    )


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Frozen text encoder, `tokens` long and `width` wide.

  'hash': weight-free word-hash embeddings. 'umt5': the encoder of `umt5`; `weights` is the folder
  `wallwm convert umt5` wrote (its tokenizer.json included), `cache` a folder in which the features
  of captions are kept ('' = none).
  """

  kind: Literal['hash', 'umt5'] = 'hash'
  tokens: int = 16
  width: int = 64
  umt5: UMT5Config = UMT5Config()
  weights: str = ''
  cache: str = ''
