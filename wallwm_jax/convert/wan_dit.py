"""Wan2.1 and Wan2.2 video DiTs: every tensor of a checkpoint and the parameter it becomes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from wallwm_jax.config import VideoConfig
from wallwm_jax.convert.entries import Entry, Naming
from wallwm_jax.types import ConfigError

ALIASES: dict[str, str] = {}
# Of the image branch, but stored in text-to-video files as well; the public loader drops it too.
IGNORED: tuple[str, ...] = (r'^blocks\.\d+\.attn2\.norm_added_q\.weight$',)

Shapes = Mapping[str, tuple[int, ...]]

_HEAD_DIM = 128  # of every public Wan DiT

# (diffusers, original, ours) of the linear maps outside the blocks.
_LINEARS = (
  ('condition_embedder.time_embedder.linear_1', 'time_embedding.0', 'time_in'),
  ('condition_embedder.time_embedder.linear_2', 'time_embedding.2', 'time_out'),
  ('condition_embedder.time_proj', 'time_projection.1', 'time_proj'),
  ('condition_embedder.text_embedder.linear_1', 'text_embedding.0', 'text_in'),
  ('condition_embedder.text_embedder.linear_2', 'text_embedding.2', 'text_out'),
  ('proj_out', 'head.head', 'head'),
)
# Of a block. Feed-forward maps and attention outputs have other names inside.
_ATTENTIONS = (('attn1', 'self_attn'), ('attn2', 'cross_attn'))
_PROJECTIONS = (('to_q', 'q'), ('to_k', 'k'), ('to_v', 'v'), ('to_out.0', 'o'))
_FFN = (('ffn.net.0.proj', 'ffn.0', 'up'), ('ffn.net.2', 'ffn.2', 'down'))

# Branches of other Wan models, by a key that only they have.
_BRANCHES = (
  (
    r'\.(add_k_proj|add_v_proj|norm_added_k|k_img|v_img|norm_k_img)\.|image_embedder|^img_emb\.',
    'the CLIP image branch of Wan2.1 image-to-video',
  ),
  (r'pos_embed|emb_pos', 'the image position embedding of Wan2.1 first-last-frame-to-video'),
  (r'^vace_', 'the VACE branch'),
  (r'face_adapter|motion_encoder|pose_patch_embedding', 'the branch of Wan-Animate'),
  (r'audio|^control_adapter|^ref_conv', 'an audio, camera or reference branch'),
)
_OTHER_FAMILIES = (
  (r'^(encoder|decoder)\.(conv_in|conv1)\.', 'a Wan VAE (convert it as wan-vae)'),
  (
    r'^(shared|token_embedding|encoder\.embed_tokens)\.weight$',
    'a UMT5 text encoder (convert it as umt5)',
  ),
)


def entries(
  config: VideoConfig, channels: int, text_width: int, mask_channels: int = 4
) -> list[Entry]:
  """Every tensor of the public checkpoint of a video tower; the cross-view graft has none.

  Args:
    channels: C, latent channels. text_width: E, of the text encoder.
    mask_channels: input channels of the mask under 'channel' conditioning, frames per latent frame.
  """
  d, (_, ph, pw) = config.width, config.patch
  d_in = channels if config.conditioning == 'frame' else 2 * channels + mask_channels
  inner = {
    'time_in': (d, config.freq_dim),
    'time_out': (d, d),
    'time_proj': (6 * d, d),
    'text_in': (d, text_width),
    'text_out': (d, d),
    'head': (ph * pw * channels, d),
  }
  patch = 'patch_embedding'
  rows = [
    Entry(*(f'{patch}.weight',) * 2, (d, d_in, 1, ph, pw), 'patch_embed/kernel', 'patch'),
    Entry(*(f'{patch}.bias',) * 2, (d,), 'patch_embed/bias'),
    Entry('scale_shift_table', 'head.modulation', (1, 2, d), 'head/modulation', 'squeeze'),
  ]
  for diffusers, original, path in _LINEARS:
    rows += _linear(diffusers, original, inner[path], path)
  for layer in range(config.layers):
    rows += _block(config, layer)
  return rows


def model(fields: Mapping[str, Any]) -> list[Entry]:
  """`entries` of the fields that `infer` returned, possibly after a trip through JSON."""
  config = dict(fields['config'])
  config['patch'] = tuple(config['patch'])
  rest = {name: value for name, value in fields.items() if name != 'config'}
  return entries(VideoConfig(**config), **rest)


def infer(
  shapes: Shapes, source_config: Mapping[str, Any] | None = None
) -> tuple[Naming, dict[str, Any]]:
  """(naming, arguments of `entries`) of a checkpoint.

  Sizes come from the tensors. What no tensor tells comes from `source_config` (a parsed
  config.json, either naming) or, without it, from what all public Wan DiTs share: heads of width
  128 and eps 1e-6.

  Raises:
    ConfigError: another kind of model, a Wan DiT with a branch this project does not have, a
      missing tensor that tells a size, or tensors and config that disagree.
  """
  source = dict(source_config or {})
  _refuse_others(shapes)
  naming = _naming(shapes)
  _refuse_variants(shapes, source)
  find = _Finder(shapes, naming)
  width, d_in, *patch = find('patch_embedding.weight', 'patch_embedding.weight', 5)
  freq_dim = find(_LINEARS[0][0] + '.weight', _LINEARS[0][1] + '.weight', 2)[1]
  text_width = find(_LINEARS[3][0] + '.weight', _LINEARS[3][1] + '.weight', 2)[1]
  ffn = find('blocks.0.ffn.net.0.proj.weight', 'blocks.0.ffn.0.weight', 2)[0]
  outputs = find('proj_out.weight', 'head.head.weight', 2)[0]
  channels, rest = divmod(outputs, patch[0] * patch[1] * patch[2])
  if rest:
    raise ConfigError(f'Wan DiT: {outputs} outputs per token are no multiple of the patch {patch}.')
  conditioning, mask = _conditioning(d_in, channels)
  config = VideoConfig(
    width=width,
    layers=_layers(shapes),
    heads=_heads(width, source),
    ffn=ffn,
    patch=tuple(patch),
    freq_dim=freq_dim,
    conditioning=conditioning,
    cross_view=False,
    eps=float(source.get('eps', 1e-6)),
  )
  _check_source(config, d_in, channels, text_width, source)
  fields = {'config': dataclasses.asdict(config), 'channels': channels, 'text_width': text_width}
  return naming, fields | ({'mask_channels': mask} if mask else {})


def _block(config: VideoConfig, i: int) -> list[Entry]:
  d, block = config.width, f'blocks.{i}'
  rows = [
    Entry(
      f'{block}.scale_shift_table',
      f'{block}.modulation',
      (1, 6, d),
      'blocks/modulation',
      'squeeze',
      i,
    )
  ]
  for name, ours in (('weight', 'scale'), ('bias', 'bias')):
    # The norm before cross-attention: second in diffusers' order of use, third in the authors'.
    rows.append(
      Entry(
        f'{block}.norm2.{name}', f'{block}.norm3.{name}', (d,), f'blocks/norm_cross/{ours}', layer=i
      )
    )
  for diffusers, ours in _ATTENTIONS:
    for torch_name, name in _PROJECTIONS:
      rows += _linear(
        f'{block}.{diffusers}.{torch_name}', f'{block}.{ours}.{name}', (d, d),
        f'blocks/{ours}/{name}', i,
      )  # fmt: skip
    for norm in ('norm_q', 'norm_k'):
      path = f'blocks/{ours}/{norm[-1]}_norm/scale'
      keys = (f'{block}.{diffusers}.{norm}.weight', f'{block}.{ours}.{norm}.weight')
      rows.append(Entry(*keys, (d,), path, layer=i))
  for (diffusers, original, name), shape in zip(_FFN, ((config.ffn, d), (d, config.ffn))):
    rows += _linear(f'{block}.{diffusers}', f'{block}.{original}', shape, f'blocks/ffn/{name}', i)
  return rows


def _linear(diffusers, original, shape, path, layer=None) -> list[Entry]:
  return [
    Entry(f'{diffusers}.weight', f'{original}.weight', shape, f'{path}/kernel', 'linear', layer),
    Entry(f'{diffusers}.bias', f'{original}.bias', shape[:1], f'{path}/bias', 'same', layer),
  ]


class _Finder:
  """Shapes by either name, with the checks that make an index into them safe."""

  def __init__(self, shapes: Shapes, naming: Naming):
    self.shapes, self.naming = shapes, naming

  def __call__(self, diffusers: str, original: str, rank: int) -> tuple[int, ...]:
    key = diffusers if self.naming == 'diffusers' else original
    if key not in self.shapes:
      raise ConfigError(
        f'Wan DiT ({self.naming} names): expected the tensor {key!r}, which tells a size, among '
        f'the {len(self.shapes)} of the checkpoint. Is a file of a sharded checkpoint missing?'
      )
    shape = tuple(self.shapes[key])
    if len(shape) != rank:
      raise ConfigError(f'Wan DiT: expected {key!r} with {rank} axes, got shape {shape}.')
    return shape


def _naming(shapes: Shapes) -> Naming:
  for naming, key in (
    ('diffusers', 'blocks.0.attn1.to_q.weight'),
    ('original', 'blocks.0.self_attn.q.weight'),
  ):
    if key in shapes:
      return naming
  raise ConfigError(
    'Wan DiT: expected blocks.0.attn1.to_q.weight (diffusers names) or blocks.0.self_attn.q.weight '
    f'(original names), got {len(shapes)} tensors such as {sorted(shapes)[:3]}.'
  )


def _refuse_others(shapes: Shapes) -> None:
  for pattern, what in _OTHER_FAMILIES:
    key = next((key for key in shapes if re.search(pattern, key)), None)
    if key:
      raise ConfigError(f'Wan DiT: expected a video DiT, got {what}: it has {key!r}.')


def _refuse_variants(shapes: Shapes, source: Mapping[str, Any]) -> None:
  for pattern, what in _BRANCHES:
    key = next((key for key in shapes if re.search(pattern, key)), None)
    if key:
      raise ConfigError(
        f'Wan DiT: {key!r} belongs to {what}, which this video tower does not have.'
      )
  for name in ('image_dim', 'added_kv_proj_dim', 'pos_embed_seq_len'):
    if source.get(name) is not None:
      raise ConfigError(
        f'Wan DiT: config.json has {name}={source[name]}, an image branch this video tower does '
        'not have; only models with null there can be converted.'
      )
  qk_norm = source.get('qk_norm', 'rms_norm_across_heads')
  if qk_norm not in ('rms_norm_across_heads', True):
    raise ConfigError(
      f"Wan DiT: config.json has qk_norm={qk_norm!r}, expected 'rms_norm_across_heads'."
    )
  if not source.get('cross_attn_norm', True):
    raise ConfigError(
      'Wan DiT: config.json has cross_attn_norm=false; this video tower always has that norm.'
    )


def _layers(shapes: Shapes) -> int:
  layers = {int(m[1]) for m in (re.match(r'blocks\.(\d+)\.', key) for key in shapes) if m}
  missing = sorted(set(range(max(layers) + 1)) - layers)
  if missing:
    raise ConfigError(
      f'Wan DiT: the checkpoint has blocks up to {max(layers)} but none of {missing}. Is a file of '
      'a sharded checkpoint missing?'
    )
  return len(layers)


def _conditioning(d_in: int, channels: int) -> tuple[str, int]:
  """('frame' or 'channel', channels of the mask)."""
  if d_in == channels:
    return 'frame', 0
  if d_in > 2 * channels:
    return 'channel', d_in - 2 * channels
  raise ConfigError(
    f'Wan DiT: {d_in} input channels for {channels} output channels. Expected {channels} (text to '
    f'video) or more than {2 * channels} (known latents and their mask as further channels).'
  )


def _heads(width: int, source: Mapping[str, Any]) -> int:
  heads = source.get('num_attention_heads', source.get('num_heads'))
  if heads is None:
    size = source.get('attention_head_dim', _HEAD_DIM)
    heads = max(1, width // size)
    if heads * size != width:
      raise ConfigError(
        f'Wan DiT: without the number of heads, width {width} was expected to be a multiple of '
        f'{size}. Put the config.json of the checkpoint beside it.'
      )
  return heads


def _check_source(config: VideoConfig, d_in, channels, text_width, source: Mapping[str, Any]):
  """Every size that config.json states must be the one that the tensors have."""
  stated = {
    'dim': config.width,
    'attention_head_dim': config.head_dim,
    'num_layers': config.layers,
    'ffn_dim': config.ffn,
    'freq_dim': config.freq_dim,
    'in_channels': d_in,
    'in_dim': d_in,
    'out_channels': channels,
    'out_dim': channels,
    'text_dim': text_width,
    'patch_size': config.patch,
  }
  for name, size in stated.items():
    said = source.get(name)
    said = tuple(said) if isinstance(said, list) else said
    if said is not None and said != size:
      raise ConfigError(
        f'Wan DiT: config.json says {name}={said}, the tensors {size}. Use the config.json that '
        'belongs to this checkpoint.'
      )
