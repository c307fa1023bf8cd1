"""What a run takes from converted public weights: the codec, the text encoder, the video tower, the
VLM and the small language model."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wallwm_jax import weights
from wallwm_jax.config import ExperimentConfig, MeshConfig, ModelConfig, QwenConfig
from wallwm_jax.models import functional, language
from wallwm_jax.parallel import rules
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.text.factory import TextEncoder
from wallwm_jax.text.planning import PlanningTexts
from wallwm_jax.types import (
    CheckpointError,
    ConfigError,
    Frozen,
    InferenceParams,
    Language,
    NormStats,
    Params,
    Text,
    path_string,
)

_ANY_QWEN = ('weights', 'dtype', 'remat')  # fields in which a config may differ from its weights
_ENCODED = 64  # captions encoded at once
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


def load_language(
    config: ExperimentConfig, captions: Sequence[str], text: TextEncoder, texts: PlanningTexts,
    mesh: Mesh | None = None, *, reader: bool = False
) -> Language:
  """The frozen language side, each part spread over `mesh` by its rules.

  Args:
    captions: what the next-event head may choose, in the order of its logits.
    reader: whether the small language model is wanted too. Stage 'vlm' trains both and loads none.

  Raises:
    ConfigError: a part whose folder the config does not name.
    CheckpointError: no weights of this model there.
  """
  c, trains = config.language, config.train.stage == 'vlm'
  features = [text.encode(captions[i:i + _ENCODED]) for i in range(0, len(captions), _ENCODED)]
  bank = [mean_features(rows) for rows in features]
  empty = np.zeros((0, config.model.text.width), np.float32)
  side = Language(
      vlm={} if trains else load_qwen('language.vlm', c.vlm, mesh),
      reader=load_qwen('language.reader', c.reader, mesh) if reader and not trains else {},
      layout=texts.layout(), bank=np.concatenate([empty, *bank]), answers=texts.answers(captions))
  if mesh is None:
    return side
  here = NamedSharding(mesh, PartitionSpec())
  small = jax.device_put((side.layout, side.bank, side.answers), here)
  return Language(side.vlm, side.reader, *small)


def mean_features(text: Text) -> np.ndarray:
  """[B, E] float32: mean over the rows that exist."""
  mask = np.asarray(text.mask)[..., None]
  total = np.where(mask, np.asarray(text.features), 0).sum(1)
  return (total / np.maximum(mask.sum(1), 1)).astype(np.float32)


def load_qwen(where: str, qwen: QwenConfig, mesh: Mesh | None = None) -> Params:
  """Parameters of a VLM or language model: matrices in the dtype of the matmuls.

  Raises:
    ConfigError: no folder named in the config field `where`.
    CheckpointError: no weights of this model there.
  """
  if not qwen.weights:
    raise ConfigError(
        f'config.{where}.weights: expected the folder of a converted Qwen3.5, got none. Make one: '
        'wallwm convert qwen --src DIR --out FOLDER.')
  _check_qwen(where, qwen)
  shapes = jax.eval_shape(functools.partial(language.init_qwen, qwen), jax.random.key(0))
  mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
  placement = rules.param_shardings(shapes, mesh, MeshConfig().rules, rules.QWEN_RULES)

  def target(key_path, leaf, place):
    matrix = path_string(key_path).endswith(('kernel', 'embedding'))
    dtype = jnp.dtype(qwen.dtype) if matrix else jnp.float32
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place)

  targets = jax.tree_util.tree_map_with_path(target, shapes, placement)
  leave = () if qwen.vision.layers else ('vision',)  # a text-only reader may be half of a VLM
  return weights.load(qwen.weights, 'vlm', targets, leave=leave)


def _check_qwen(where: str, qwen: QwenConfig) -> None:
  """What the shapes of the parameters do not show.

  Raises:
    CheckpointError: the weights are of another model, naming the fields that differ.
  """
  fields = weights.read_manifest(qwen.weights, 'vlm').fields['config']
  unread = _ANY_QWEN if qwen.vision.layers else (*_ANY_QWEN, 'vision')
  differ = [
      f'{name}: expected {value!r}, got {fields.get(name)!r}'
      for name, value in json.loads(json.dumps(dataclasses.asdict(qwen))).items()
      if name not in unread and fields.get(name) != value]
  if differ:
    raise CheckpointError(
        f'{qwen.weights}: config.{where} is another model: {"; ".join(differ)}. Choose the config '
        'of these weights, see wallwm_jax.presets.QWEN.')


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
