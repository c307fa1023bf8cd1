"""The only door to the model: pure functions over nested dicts of arrays.

Every function takes the frozen `ModelConfig` as static data. Flax objects never leave this module:
a tower is merged from its (cached) graph definition and the caller's plain dict at trace time.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.config import ModelConfig
from wallwm_jax.models import codec
from wallwm_jax.models.action_dit import ActionTower, AnchorCache
from wallwm_jax.models.video_dit import VideoMasks, VideoTower
from wallwm_jax.models.world_action import WorldAction
from wallwm_jax.types import NormStats, Params, PRNGKey, Text

__all__ = [
  'AnchorCache',
  'VideoMasks',
  'action_forward',
  'condition_video',
  'decode_video',
  'denormalise_latents',
  'encode_video',
  'init_params',
  'normalise_latents',
  'prefill_actions',
  'video_forward',
  'video_masks',
  'window_tau',
]


@functools.lru_cache
def _graph(tower: type[nnx.Module], config: ModelConfig) -> nnx.GraphDef:
  return nnx.split(nnx.eval_shape(lambda: tower(config, rngs=nnx.Rngs(0))))[0]


def _bind(tower: type[nnx.Module], config: ModelConfig, params: Params) -> nnx.Module:
  return nnx.merge(_graph(tower, config), nnx.State(params))


def init_params(config: ModelConfig, key: PRNGKey) -> Params:
  """Fresh float32 parameters {'video': ..., 'action': ...}; traceable, so it works under eval_shape
  and jit.
  """
  model = WorldAction(config, rngs=nnx.Rngs(key))
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def encode_video(config: ModelConfig, frames) -> Float[Array, 'B V F h w C']:
  """Codec latents (unnormalised float32) of uint8 frames [B, V, T, H, W, 3], T = 1 + 4N."""
  return codec.encode(config.codec, frames)


def decode_video(config: ModelConfig, latents) -> Float[Array, 'B V T H W 3']:
  """Frames in [0, 1] of unnormalised latents [B, V, F, h, w, C]."""
  return codec.decode(config.codec, latents)


def normalise_latents(latents, norm: NormStats):
  """(latents - mean) / scale per channel."""
  return (latents - norm.latent_mean) / norm.latent_scale


def denormalise_latents(latents, norm: NormStats):
  """Inverse of `normalise_latents`."""
  return latents * norm.latent_scale + norm.latent_mean


def window_tau(config: ModelConfig, window: str, frames: int) -> np.ndarray:
  """int32 [F] in-window index of each latent frame: f (event window) or f - M (chunk window)."""
  start = -config.history if window == 'chunk' else 0
  return np.arange(start, start + frames, dtype=np.int32)


def video_masks(
  view_mask: Bool[Array, 'B V'], frame_mask: Bool[Array, 'B F'], sight=None
) -> VideoMasks:
  """Which video tokens exist; sight [B, V, P, V, P] is the training-only co-visibility mask or
  None.
  """
  return VideoMasks(view=view_mask, frame=frame_mask, sight=sight)


def condition_video(config: ModelConfig, z, t, known, known_mask):
  """Network inputs of a video whose frames `known_mask` are given.

  Args:
    z: [B, V, F, h, w, C] noised latents at level t [B] (normalised); known: latents whose known
      frames are clean.
    known_mask: [F] or [B, F] bool.

  Returns:
    (input [B, V, F, h, w, C'], per-frame levels [B, F]). 'frame': known frames in place at level 0
    (Wan TI2V). 'channel': the known latents and their mask as extra channels, one level for all
    frames (Wan inpainting).
  """
  b, _, f = z.shape[:3]
  known_mask = jnp.broadcast_to(jnp.asarray(known_mask), (b, f))
  cells = known_mask[:, None, :, None, None, None]
  levels = jnp.broadcast_to(t[:, None], (b, f)).astype(jnp.float32)
  if config.video.conditioning == 'frame':
    return jnp.where(cells, known, z), jnp.where(known_mask, 0.0, levels)
  mask = jnp.broadcast_to(cells, (*z.shape[:-1], 1)).astype(z.dtype)
  return jnp.concatenate([z, jnp.where(cells, known, 0.0), mask], axis=-1), levels


def video_forward(
  params: Params, config: ModelConfig, z, t: Float[Array, 'B F'], text: Text, masks: VideoMasks
):
  """One pass of the video tower.

  Args:
    params: the 'video' subtree. z, t: as `condition_video` returns them.

  Returns:
    (prediction [B, V, F, h, w, C] float32, features after every block [L, B, V, F, P, D] in the
    compute dtype).
  """
  return _bind(VideoTower, config, params)(z.astype(jnp.dtype(config.dtype)), t, text, masks)


def prefill_actions(
  params: Params, config: ModelConfig, features, tau: Int[Array, 'F'], masks: VideoMasks
):
  """AnchorCache of the 'action' subtree over anchored video features; computed once per
  observation.
  """
  return _bind(ActionTower, config, params).prefill(features, np.asarray(tau), masks)


def action_forward(
  params: Params,
  config: ModelConfig,
  a: Float[Array, 'B R K A'],
  t: Float[Array, 'B R'],
  state: Float[Array, 'B A'],
  cache: AnchorCache,
  step_mask: Bool[Array, 'B K'],
):
  """Prediction [B, R, K, A] float32 for R noise draws against one cache; a, state normalised, t in
  [0, 1].
  """
  return _bind(ActionTower, config, params)(
    a.astype(jnp.dtype(config.dtype)), t, state, cache, step_mask
  )
