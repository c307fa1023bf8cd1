"""The door to the world-action model: pure functions over nested dicts of arrays.

Every function takes the frozen `ModelConfig` as static data. Flax objects never leave this module:
a tower is merged from its (cached) graph definition and the caller's plain dict at trace time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from wallwm_jax.config import CodecConfig, ModelConfig, TextConfig
from wallwm_jax.models import codec as dct
from wallwm_jax.models.action_dit import ActionTower, AnchorCache, CacheDtype, ServingCache
from wallwm_jax.models.binding import bind, fresh
from wallwm_jax.models.umt5 import UMT5Encoder
from wallwm_jax.models.vae import WanVAE
from wallwm_jax.models.video_dit import VideoMasks, VideoTower, graft_views
from wallwm_jax.models.world_action import WorldAction
from wallwm_jax.types import ConfigError, NormStats, Packing, Params, PRNGKey, Text

__all__ = [
  'AnchorCache',
  'ServingCache',
  'VideoMasks',
  'action_forward',
  'adopt_video',
  'condition_video',
  'decode_video',
  'empty_text',
  'denormalise_latents',
  'encode_rows',
  'encode_tokens',
  'encode_video',
  'init_codec',
  'init_params',
  'init_text',
  'normalise_latents',
  'prefill_actions',
  'prefill_serving',
  'video_forward',
  'video_masks',
  'window_tau',
  'without_grafts',
]


def init_params(config: ModelConfig, key: PRNGKey) -> Params:
  """Fresh float32 parameters {'video': ..., 'action': ...}; traceable, so it works under eval_shape
  and jit.
  """
  return fresh(WorldAction(config, rngs=nnx.Rngs(key)))


_GRAFTS = ('view_gate', 'view_embed', 'cross_view')


def without_grafts(video: Params) -> Params:
  """The 'video' subtree without what public video towers do not have: its view branch."""
  return {
    name: without_grafts(leaf) if isinstance(leaf, dict) else leaf
    for name, leaf in video.items()
    if name not in _GRAFTS
  }


def adopt_video(config: ModelConfig, fresh: Params, public: Params) -> Params:
  """A whole 'video' subtree that starts from a public tower and computes the same.

  Args:
    fresh: of `init_params`, for what `public` lacks: the grafts (see `video_dit.graft_views`), and
      the channels of 'channel' conditioning in the patch embedding, which start at zero.
  """
  cells = config.video.patch[1] * config.video.patch[2]
  embed, width = public['patch_embed'], config.video.width
  kernel = embed['kernel'].reshape(cells, -1, width)
  missing = fresh['patch_embed']['kernel'].shape[0] // cells - kernel.shape[1]
  kernel = jnp.pad(kernel, ((0, 0), (0, missing), (0, 0))).reshape(-1, width)
  public = public | {'patch_embed': embed | {'kernel': kernel}}
  whole = not config.video.cross_view or 'cross_view' in public['blocks']
  return public if whole else graft_views(public, fresh)


def init_codec(codec: CodecConfig, key: PRNGKey) -> Params:
  """Random float32 parameters of a frame codec; {} for one without weights."""
  if codec.kind == 'dct':
    return {}
  return fresh(WanVAE(codec, rngs=nnx.Rngs(key)))


def encode_video(
  config: ModelConfig, frames: UInt8[Array, 'B V T H W 3'], codec: Params
) -> Float[Array, 'B V F h w C']:
  """Codec latents (unnormalised float32) of uint8 frames, T = 1 + 4N; a VAE codes one view at a
  time.
  """
  if config.codec.kind == 'dct':
    return dct.encode(config.codec, frames)
  vae = bind(WanVAE, config.codec, codec)
  tile = config.codec.vae.tile
  encode = functools.partial(vae.tiled_encode, tile=tile, overlap=tile // 4) if tile else vae.encode
  pixels = jnp.moveaxis(frames, 1, 0)
  latents = jax.lax.map(lambda x: encode(x.astype(jnp.float32) / 127.5 - 1.0), pixels)
  return jnp.moveaxis(latents, 0, 1)


def encode_rows(
  config: ModelConfig, frames: UInt8[Array, 'B V T H W 3'], packing: Packing
) -> Float[Array, 'B V F h w C']:
  """Unnormalised latents of packed rows of frames, each event coded on its own.

  Raises:
    ConfigError: a codec that would have to run once for every event that a row has room for.
  """
  if config.codec.kind != 'dct':
    raise ConfigError(
      f"data.pack: packed rows of frames need model.codec.kind='dct', got {config.codec.kind!r}. "
      'Precompute latents with `wallwm data encode` and set data.latents.'
    )
  return dct.encode_rows(config.codec, frames, packing)


def decode_video(
  config: ModelConfig, latents: Float[Array, 'B V F h w C'], codec: Params
) -> Float[Array, 'B V T H W 3']:
  """Frames in [0, 1] of unnormalised latents."""
  if config.codec.kind == 'dct':
    return dct.decode(config.codec, latents)
  vae = bind(WanVAE, config.codec, codec)
  tile = config.codec.vae.tile
  decode = functools.partial(vae.tiled_decode, tile=tile, overlap=tile // 4) if tile else vae.decode
  frames = jax.lax.map(decode, jnp.moveaxis(latents, 1, 0))
  return jnp.moveaxis(0.5 * frames + 0.5, 0, 1)


def init_text(text: TextConfig, key: PRNGKey) -> Params:
  """Random float32 parameters of a text encoder; {} for one without weights."""
  if text.kind == 'hash':
    return {}
  return fresh(UMT5Encoder(text, rngs=nnx.Rngs(key)))


def encode_tokens(
  params: Params, text: TextConfig, ids: Int[Array, 'B X'], mask: Bool[Array, 'B X']
) -> Float[Array, 'B X E']:
  """Features of token ids; rows where `mask` is False mean nothing."""
  return bind(UMT5Encoder, text, params)(ids, mask)


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
  view_mask: Bool[Array, 'B V'],
  frame_mask: Bool[Array, 'B F'],
  sight=None,
  packing: Packing | None = None,
) -> VideoMasks:
  """Which video tokens exist; sight [B, V, P, V, P] is the training-only co-visibility mask or
  None. With `packing`, cameras and sight are those of each event: [B, G, V], [B, G, V, P, V, P].
  """
  if packing is not None:
    view_mask, sight = (x if x is None else packing.frames(x) for x in (view_mask, sight))
  return VideoMasks(view=view_mask, frame=frame_mask, sight=sight, packing=packing)


def empty_text(text: Text, null_text: Text | None) -> Text:
  """The empty caption in the shape of `text`: `null_text`, or nothing that is attended to."""
  if null_text is None:
    return Text(text.features, jnp.zeros_like(text.mask))
  return jax.tree.map(lambda empty, x: jnp.broadcast_to(empty, x.shape), null_text, text)


def condition_video(config: ModelConfig, z, t, known, known_mask):
  """Network inputs of a video whose frames `known_mask` are given.

  Args:
    z: [B, V, F, h, w, C] noised latents at level t [B] or [B, F] (normalised); known: latents
      whose known frames are clean.
    known_mask: [F] or [B, F] bool.

  Returns:
    (input [B, V, F, h, w, C'], per-frame levels [B, F]). 'frame': known frames in place at level 0
    (Wan2.2 TI2V). 'channel': one level for all frames and, after the noised latents, a mask channel
    for each raw frame of a latent frame, then the known latents (Wan's inpainting).
  """
  b, _, f = z.shape[:3]
  known_mask = jnp.broadcast_to(jnp.asarray(known_mask), (b, f))
  cells = known_mask[:, None, :, None, None, None]
  levels = jnp.broadcast_to(t.reshape(b, -1), (b, f)).astype(jnp.float32)
  if config.video.conditioning == 'frame':
    return jnp.where(cells, known, z), jnp.where(known_mask, 0.0, levels)
  mask = jnp.broadcast_to(cells, (*z.shape[:-1], config.codec.temporal)).astype(z.dtype)
  return jnp.concatenate([z, mask, jnp.where(cells, known, 0.0)], axis=-1), levels


def video_forward(
  params: Params, config: ModelConfig, z, t: Float[Array, 'B F'], text: Text, masks: VideoMasks
):
  """One pass of the video tower.

  Args:
    params: the 'video' subtree. z, t: as `condition_video` returns them. text: of a
      row [B, X, E], or of each event of packed rows [B, G, X, E].

  Returns:
    (prediction [B, V, F, h, w, C] float32, features after every block [L, B, V, F, P, D] in the
    compute dtype).
  """
  return bind(VideoTower, config, params)(z.astype(jnp.dtype(config.dtype)), t, text, masks)


def prefill_actions(
  params: Params, config: ModelConfig, features, tau: Int[Array, 'F'], masks: VideoMasks
):
  """AnchorCache of the 'action' subtree over anchored video features, for training."""
  return bind(ActionTower, config, params).prefill(features, np.asarray(tau), masks)


def prefill_serving(
  params: Params,
  config: ModelConfig,
  features,
  tau: Int[Array, 'F'],
  masks: VideoMasks,
  dtype: CacheDtype = 'compute',
) -> ServingCache:
  """ServingCache of the 'action' subtree over anchored video features; computed once per
  observation. dtype 'int8': half the bytes to read in every denoising step.
  """
  tower = bind(ActionTower, config, params)
  return tower.prefill_serving(features, np.asarray(tau), masks, dtype)


def action_forward(
  params: Params,
  config: ModelConfig,
  a: Float[Array, 'B R K A'],
  t: Float[Array, 'B R'],
  state: Float[Array, 'B A'],
  cache: AnchorCache | ServingCache,
  step_mask: Bool[Array, 'B K'],
  packing: Packing | None = None,
):
  """Prediction [B, R, K, A] float32 for R noise draws against one cache; a, state normalised, t in
  [0, 1]. Packed rows have levels and a state per event: t [B, G, R], state [B, G, A].
  """
  return bind(ActionTower, config, params)(
    a.astype(jnp.dtype(config.dtype)), t, state, cache, step_mask, packing
  )
