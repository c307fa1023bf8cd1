"""What a run takes from converted public weights: the codec, the text encoder, the video tower."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wallwm_jax import weights
from wallwm_jax.config import ExperimentConfig, ModelConfig
from wallwm_jax.models import functional
from wallwm_jax.text.factory import TextEncoder
from wallwm_jax.types import (
    CheckpointError,
    ConfigError,
    Frozen,
    InferenceParams,
    NormStats,
    Params,
)

# Fields of the video tower that shapes do not tell, or that are clearer than shapes.
_MUST_AGREE = ('width', 'layers', 'heads', 'ffn', 'patch', 'freq_dim', 'rope_theta', 'eps')


def load_codec(model: ModelConfig, mesh: Mesh | None = None) -> Params:
  """Parameters of the frame codec, {} for one without weights; on every device of `mesh`.

  Raises:
    ConfigError: a codec with weights whose folder the config does not name.
    CheckpointError: no weights of this codec there.
  """
  codec = model.codec
  shapes = jax.eval_shape(functools.partial(functional.init_codec, codec), jax.random.key(0))
  if not shapes:
    return {}
  if not codec.weights:
    raise ConfigError(
        f'config.model.codec.weights: expected the folder of a converted VAE (codec.kind='
        f'{codec.kind!r}), got none. Make one: wallwm convert wan-vae --src DIR --out FOLDER.')
  if mesh is not None:
    here = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)
  return weights.load(codec.weights, 'codec', shapes)


def codec_digest(model: ModelConfig) -> str:
  """Identity of the codec's weights; '' for a codec without, or where they are not at hand."""
  path = model.codec.weights
  return weights.digest(path) if weights.is_weights(path) else ''


def latent_encoder(model: ModelConfig) -> Callable[[np.ndarray], np.ndarray] | None:
  """What `data.stats.compute` measures latents with; None for codecs of known statistics."""
  if model.codec.published_stats() is not None:
    return None
  encode = jax.jit(lambda frames: functional.encode_video(model, frames, {}))
  return lambda frames: np.asarray(encode(frames))


def load_frozen(
    config: ExperimentConfig, norm: NormStats, text: TextEncoder, null_caption: str = '',
    mesh: Mesh | None = None
) -> Frozen:
  """Everything a model reads and never trains. Precomputed latents need no codec."""
  null_text = None if config.model.text.kind == 'hash' else text.encode([null_caption])
  codec = {} if config.data.latents else load_codec(config.model, mesh)
  return Frozen(norm, codec, null_text)


def load_video(path: str, model: ModelConfig, target: Params) -> Params:
  """The public part of a video tower from a weight folder, for `functional.adopt_video`.

  Args:
    target: ShapeDtypeStructs (with shardings) of the model's whole 'video' subtree.

  Raises:
    CheckpointError: weights of another architecture, naming the fields or parameters that differ.
  """
  fields = weights.read_manifest(path, 'video').fields
  theirs, ours = fields['config'], model.video
  expected = {name: getattr(ours, name) for name in _MUST_AGREE}
  expected |= {'channels': model.codec.channels, 'text_width': model.text.width}
  got = {**theirs, 'channels': fields['channels'], 'text_width': fields['text_width']}
  differ = [f'{name}: expected {want}, got {got[name]}' for name, want in expected.items()
            if want != (tuple(got[name]) if isinstance(got[name], list) else got[name])]
  if theirs['conditioning'] == 'channel' != ours.conditioning:
    differ.append(f"conditioning: expected {ours.conditioning!r}, got 'channel'")
  if differ:
    raise CheckpointError(
        f'{path}: the video tower of this config is another one: {"; ".join(differ)}. '
        'Choose the config of these weights, see wallwm_jax.presets.VIDEO_TOWERS.')
  return weights.load(path, 'video', _public(target, model, theirs['conditioning']))


def load_public(config: ExperimentConfig) -> InferenceParams:
  """The public video tower and codec a config starts from, on the default device; no action tower.

  Raises:
    ConfigError: a codec whose latents have the statistics of the data a model was trained on.
    CheckpointError: weights that are not those of the config.
  """
  model, published = config.model, config.model.codec.published_stats()
  if published is None:
    raise ConfigError(
        f'config.model.codec: {model.codec.kind!r} latents have the statistics of the data a model '
        'was trained on. Give the trained run as --workdir.')
  init = functools.partial(functional.init_params, model)
  shapes = jax.eval_shape(init, jax.random.key(0))['video']
  # What the public tower has is never drawn: the compiler sees that nobody reads it.
  adopt = jax.jit(
      lambda public, key: functional.adopt_video(model, init(key)['video'], public),
      donate_argnums=0)
  video = adopt(load_video(config.train.init_from, model, shapes), jax.random.key(0))
  robot = [np.full(model.action_spec.dim, value, np.float32) for value in (0, 1, 0, 1)]
  norm = NormStats(*robot, *(np.float32(values) for values in published))
  return InferenceParams({'video': video}, Frozen(norm, load_codec(model)))


def _public(target: Params, model: ModelConfig, conditioning: str) -> Params:
  """`target` without the grafts, its patch embedding as wide as the stored one."""
  public = functional.without_grafts(target)
  kernel, (_, ph, pw) = public['patch_embed']['kernel'], model.video.patch
  if conditioning != model.video.conditioning:
    rows = ph * pw * model.codec.channels
    kernel = jax.ShapeDtypeStruct((rows, kernel.shape[1]), kernel.dtype, sharding=kernel.sharding)
  return public | {'patch_embed': public['patch_embed'] | {'kernel': kernel}}
