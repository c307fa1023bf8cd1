"""Configs of the coupled world-action model."""

from __future__ import annotations

import dataclasses
from typing import Literal

from wallwm_jax.config.base import require
from wallwm_jax.config.encoders import CodecConfig, TextConfig


@dataclasses.dataclass(frozen=True)
class ActionSpec:
  """Layout of an action (and state) vector: per arm 3 position (m), 6D rotation, 1 gripper (0..1).

  Source: WALL-WM (arXiv 2606.01955); bimanual A = 20, single arm A = 10.
  """

  arms: int = 1

  def __post_init__(self):
    require(self.arms in (1, 2), f'action.arms: expected 1 or 2, got {self.arms}.')

  @property
  def dim(self) -> int:
    return 10 * self.arms

  def groups(self) -> dict[str, tuple[int, ...]]:
    """Channel indices by group name: position, rotation, gripper."""
    base = [10 * arm for arm in range(self.arms)]
    return {
      'position': tuple(b + i for b in base for i in range(3)),
      'rotation': tuple(b + 3 + i for b in base for i in range(6)),
      'gripper': tuple(b + 9 for b in base),
    }


@dataclasses.dataclass(frozen=True)
class VideoConfig:
  """Multi-view video DiT.

  prediction: what the head regresses, 'v' = eps - z0 or 'x' = z0 (under 'frame' conditioning, its
  change since the last given frame). conditioning: given frames stand in place at noise level 0
  ('frame', Wan2.2 TI2V) or are extra channels ('channel', Wan inpainting and image-to-video).
  """

  width: int = 128
  layers: int = 4
  heads: int = 4
  ffn: int = 512
  patch: tuple[int, int, int] = (1, 2, 2)
  freq_dim: int = 256
  prediction: Literal['v', 'x'] = 'v'
  conditioning: Literal['frame', 'channel'] = 'frame'
  cross_view: bool = True
  rope_theta: float = 10_000.0
  eps: float = 1e-6  # of LayerNorm and QK-RMSNorm

  def __post_init__(self):
    require(
      self.width % self.heads == 0,
      f'model.video: width {self.width} is not a multiple of heads {self.heads}.',
    )
    head_dim = self.width // self.heads
    require(
      head_dim % 2 == 0 and head_dim >= 8,
      f'model.video: head width must be even and >= 8 for 3D RoPE, got {head_dim}.',
    )
    require(self.patch[0] == 1, f'model.video.patch: temporal patch must be 1, got {self.patch}.')

  @property
  def head_dim(self) -> int:
    return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class ActionConfig:
  """Action DiT. Depth equals the video tower's. depth_map: video layer read by each action block;
  () is the identity."""

  width: int = 128
  heads: int = 4
  ffn: int = 256
  freq_dim: int = 256
  prediction: Literal['v', 'x'] = 'v'
  depth_map: tuple[int, ...] = ()

  def __post_init__(self):
    require(
      self.width % self.heads == 0,
      f'model.action: width {self.width} is not a multiple of heads {self.heads}.',
    )

  @property
  def head_dim(self) -> int:
    return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The coupled world-action model and its codecs."""

  video: VideoConfig = VideoConfig()
  action: ActionConfig = ActionConfig()
  codec: CodecConfig = CodecConfig()
  text: TextConfig = TextConfig()
  action_spec: ActionSpec = ActionSpec()
  views: tuple[str, ...] = ('front', 'side', 'wrist')
  image_size: tuple[int, int] = (48, 48)
  steps_per_latent: int = 4  # K_p, action steps per latent frame
  history: int = 1  # M, history latent frames of the chunk window
  future: int = 4  # N, future latent frames of the chunk window (unified mode)
  max_future: int = 16  # longest event in future latent frames (size of the tau tables)
  dtype: Literal['float32', 'bfloat16'] = (
    'float32'  # compute dtype; params, norms, softmax and losses are float32
  )
  remat: Literal['none', 'full', 'dots'] = 'none'

  def __post_init__(self):
    for axis, size, patch in zip('HW', self.image_size, self.video.patch[1:]):
      block = self.codec.spatial * patch
      require(
        size % block == 0,
        f'model.image_size: {axis}={size} is not a multiple of codec.spatial * patch = {block}.',
      )
    require(
      self.codec.temporal == self.steps_per_latent,
      f'model.steps_per_latent={self.steps_per_latent} must equal '
      f'codec.temporal={self.codec.temporal}.',
    )
    require(
      len(set(self.views)) == len(self.views) > 0,
      f'model.views: expected distinct names, got {self.views}.',
    )
    depth = self.action.depth_map
    require(
      not depth
      or (len(depth) == self.video.layers and all(0 <= i < self.video.layers for i in depth)),
      f'model.action.depth_map: expected {self.video.layers} video layer indices, got {depth}.',
    )
    require(
      self.future <= self.max_future,
      f'model.future={self.future} is larger than model.max_future={self.max_future}.',
    )

  @property
  def latent_size(self) -> tuple[int, int]:
    return tuple(s // self.codec.spatial for s in self.image_size)

  @property
  def video_inputs(self) -> int:
    """Channels the video tower reads: noised latents and, under 'channel' conditioning, a mask
    channel for each raw frame of a latent frame and the known latents (Wan's image-to-video).
    """
    channels = self.codec.channels
    if self.video.conditioning == 'frame':
      return channels
    return 2 * channels + self.codec.temporal

  @property
  def patches(self) -> int:
    """P, tokens of one view-frame."""
    (h, w), (_, ph, pw) = self.latent_size, self.video.patch
    return (h // ph) * (w // pw)
