"""Configs of the language side: the VLM, the small language model, the staircase and the heads."""

from __future__ import annotations

import dataclasses
from typing import Literal

from wallwm_jax.config.base import require


@dataclasses.dataclass(frozen=True)
class VisionTowerConfig:
  """Qwen3.5's image encoder; the defaults are the 0.8B model's. 0 layers = a text-only model.

  patch: pixels along a side; temporal: frames of one patch; merge: patches along the side of the
  square that becomes one token; positions: entries of the (square) table of learned positions.
  """

  layers: int = 12
  width: int = 768
  heads: int = 12
  ffn: int = 3072
  patch: int = 16
  temporal: int = 2
  merge: int = 2
  positions: int = 2304
  eps: float = 1e-6

  def __post_init__(self):
    require(
      self.width % (4 * self.heads) == 0,
      f'language.*.vision.width: expected a multiple of 4 * heads = {4 * self.heads} (rotary '
      f'frequencies come in quarters of a head), got {self.width}.',
    )
    side = round(self.positions**0.5)
    require(
      side * side == self.positions,
      f'language.*.vision.positions: expected a square number, got {self.positions}.',
    )

  @property
  def pixels(self) -> int:
    """Values of one patch: 3 colours x temporal x patch x patch."""
    return 3 * self.temporal * self.patch**2

  @property
  def factor(self) -> int:
    """Pixels along the side of one token; image sides are multiples of it."""
    return self.patch * self.merge


@dataclasses.dataclass(frozen=True)
class QwenConfig:
  """Qwen3.5 (dense): gated delta-rule layers and gated full attention; defaults: the 0.8B model.

  layer_types: 'linear' or 'full' per layer, bottom first. rotary: part of a head that rotates;
  mrope_section: how many of its frequencies follow (time, row, column). tied: the embedding is also
  the output head. dtype: of matmuls; norms, softmax, decay and recurrent state are float32.
  weights: folder that `wallwm convert qwen` (or stage 'vlm') wrote, its tokenizer.json included.
  """

  vocab: int = 248_320
  width: int = 1024
  ffn: int = 3584
  layer_types: tuple[str, ...] = ('linear', 'linear', 'linear', 'full') * 6
  heads: int = 8
  kv_heads: int = 2
  head_dim: int = 256
  linear_key_heads: int = 16
  linear_value_heads: int = 16
  linear_key_dim: int = 128
  linear_value_dim: int = 128
  conv: int = 4
  eps: float = 1e-6
  rope_theta: float = 1e7
  rotary: float = 0.25
  mrope_section: tuple[int, int, int] = (11, 11, 10)
  tied: bool = True
  vision: VisionTowerConfig = VisionTowerConfig()
  image_token: int = 248_056
  video_token: int = 248_057
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  remat: Literal['none', 'full', 'dots'] = 'none'
  weights: str = ''

  def __post_init__(self):
    require(
      bool(self.layer_types) and set(self.layer_types) <= {'linear', 'full'},
      "language.*.layer_types: expected at least one of 'linear' and 'full' per layer, got "
      f'{self.layer_types}.',
    )
    require(
      self.heads % self.kv_heads == 0,
      f'language.*.heads: {self.heads} is not a multiple of kv_heads {self.kv_heads}.',
    )
    require(
      self.linear_value_heads % self.linear_key_heads == 0,
      f'language.*.linear_value_heads: {self.linear_value_heads} is not a multiple of '
      f'linear_key_heads {self.linear_key_heads}.',
    )
    require(
      self.rotary_dims % 2 == 0 and 0 < self.rotary_dims <= self.head_dim,
      f'language.*.rotary: expected an even number of rotating dimensions in 2..{self.head_dim}, '
      f'got {self.rotary_dims}.',
    )
    require(self.conv >= 2, f'language.*.conv: expected >= 2 taps, got {self.conv}.')

  @property
  def layers(self) -> int:
    return len(self.layer_types)

  @property
  def rotary_dims(self) -> int:
    """Dimensions of a head that rotate."""
    return int(self.head_dim * self.rotary)

  @property
  def conv_channels(self) -> int:
    """Width of [q | k | v] of a linear-attention layer, what its convolution runs over."""
    keys = self.linear_key_heads * self.linear_key_dim
    return 2 * keys + self.linear_value_heads * self.linear_value_dim


@dataclasses.dataclass(frozen=True)
class StaircaseConfig:
  """Latent reasoning on the VLM's prompt.

  latents: K_c. relay_depth: N_r, layers below it run once, for the first latent. stagger: layers
  between the entries of consecutive latents, 0 = all enter at the relay depth. mode: 'staircase',
  or one of the baselines it is judged against: 'serial' (every latent through all layers, after the
  one before it) and 'parallel' (as the staircase, but no latent sees another).
  """

  latents: int = 16
  relay_depth: int = 8
  stagger: int = 0
  mode: Literal['staircase', 'serial', 'parallel'] = 'staircase'

  def __post_init__(self):
    require(
      self.latents >= 1, f'language.staircase.latents: expected K_c >= 1, got {self.latents}.'
    )
    require(
      self.stagger >= 0, f'language.staircase.stagger: expected >= 0, got {self.stagger}.'
    )
    require(
      not self.stagger or self.mode == 'staircase',
      f"language.staircase.stagger={self.stagger}: only mode 'staircase' has one, got "
      f'{self.mode!r}.',
    )

  def entry(self, latent: int) -> int:
    """Depth at which latent 0..K_c-1 enters."""
    return self.relay_depth + latent * self.stagger


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
  """The trained readers of the frozen VLM: their width, attention heads, and the time (s) that the
  remaining-time regressor counts in."""

  width: int = 512
  heads: int = 8
  time_unit: float = 1.0

  def __post_init__(self):
    require(
      self.width % self.heads == 0,
      f'language.heads.width: {self.width} is not a multiple of heads {self.heads}.',
    )
    require(self.time_unit > 0, f'language.heads.time_unit: expected > 0 s, got {self.time_unit}.')


# The reader shares the VLM's tokenizer and has no use for images.
_NO_VISION = VisionTowerConfig(layers=0)


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
  """The language side; kind 'none' = a model without one.

  vlm: the frozen backbone; reader: the frozen small language model of stage 4. image_size: pixels
  at which the VLM sees each camera, () = model.image_size. prompt_tokens: S, fixed size of a prompt
  (images, state, instruction) and of its cache; answer_tokens: of an event's caption; trace_tokens:
  M, of a reasoning trace. *_weight: of the parts of the stage-3 and stage-4 losses.
  """

  kind: Literal['none', 'qwen'] = 'none'
  vlm: QwenConfig = QwenConfig()
  reader: QwenConfig = QwenConfig(vision=_NO_VISION)
  staircase: StaircaseConfig = StaircaseConfig()
  heads: HeadsConfig = HeadsConfig()
  image_size: tuple[int, ...] = ()
  prompt_tokens: int = 256
  answer_tokens: int = 32
  trace_tokens: int = 128
  align_weight: float = 1.0
  next_weight: float = 1.0
  time_weight: float = 1.0
  latent_align_weight: float = 0.1

  def __post_init__(self):
    if self.kind == 'none':
      return
    stairs, depth = self.staircase, self.vlm.layers
    require(
      0 <= stairs.relay_depth < depth,
      f'language.staircase.relay_depth: expected N_r in 0..{depth - 1} (the VLM has {depth} '
      f'layers), got {stairs.relay_depth}.',
    )
    last = stairs.entry(stairs.latents - 1)
    require(
      last < depth,
      f'language.staircase: with stagger {stairs.stagger} latent {stairs.latents} enters at depth '
      f'{last}, but the VLM has {depth} layers. Lower latents, stagger or relay_depth.',
    )
    require(
      self.vlm.vocab == self.reader.vocab,
      f'language.reader.vocab: expected the tokenizer of the VLM ({self.vlm.vocab} ids), got '
      f'{self.reader.vocab}.',
    )
    require(
      len(self.image_size) in (0, 2)
      and all(side % self.vlm.vision.factor == 0 for side in self.image_size),
      f'language.image_size: expected () or multiples of {self.vlm.vision.factor} pixels, got '
      f'{self.image_size}.',
    )
