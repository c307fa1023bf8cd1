"""config.json of a public checkpoint, from the sizes of the model it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wallwm_jax.convert.entries import Naming

_TEXT_TOKENS = 512  # the text length all Wan models are run with


def torch_config(component: str, fields: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
  """What the public classes read to build the model of `fields` (as a family's `infer` returns).

  The names are those of diffusers and transformers, or of the authors' config.json. The authors
  keep the sizes of their VAE and text encoder in code: there the public classes' names are used.
  """
  config = fields['config']
  if component == 'codec':
    return _vae(config)
  if component == 'text':
    return _umt5(config)
  if component == 'vlm':
    return _qwen(config) if naming == 'diffusers' else _qwen_text(config, 'Qwen3_5ForCausalLM')
  return _dit_diffusers(fields) if naming == 'diffusers' else _dit_original(fields)


def _inputs(fields: Mapping[str, Any]) -> int:
  """Input channels: the noised latents, and under 'channel' conditioning mask and known latents."""
  channels = fields['channels']
  if fields['config']['conditioning'] == 'frame':
    return channels
  return 2 * channels + fields.get('mask_channels', 4)


def _dit_diffusers(fields: Mapping[str, Any]) -> dict[str, Any]:
  c = fields['config']
  return {
    '_class_name': 'WanTransformer3DModel',
    'patch_size': list(c['patch']),
    'num_attention_heads': c['heads'],
    'attention_head_dim': c['width'] // c['heads'],
    'in_channels': _inputs(fields),
    'out_channels': fields['channels'],
    'text_dim': fields['text_width'],
    'freq_dim': c['freq_dim'],
    'ffn_dim': c['ffn'],
    'num_layers': c['layers'],
    'cross_attn_norm': True,
    'qk_norm': 'rms_norm_across_heads',
    'eps': c['eps'],
    'image_dim': None,
    'added_kv_proj_dim': None,
    'rope_max_seq_len': 1024,
    'pos_embed_seq_len': None,
  }


def _dit_original(fields: Mapping[str, Any]) -> dict[str, Any]:
  c = fields['config']
  kind = 't2v' if c['conditioning'] == 'frame' else 'i2v'
  return {
    '_class_name': 'WanModel',
    'model_type': 'ti2v' if kind == 't2v' and fields['channels'] == 48 else kind,
    'dim': c['width'],
    'ffn_dim': c['ffn'],
    'freq_dim': c['freq_dim'],
    'in_dim': _inputs(fields),
    'out_dim': fields['channels'],
    'num_heads': c['heads'],
    'num_layers': c['layers'],
    'text_len': _TEXT_TOKENS,
    'eps': c['eps'],
  }


def _vae(codec: Mapping[str, Any]) -> dict[str, Any]:
  c = codec['vae']
  pixels = 3 * c['patch'] ** 2
  config = {
    '_class_name': 'AutoencoderKLWan',
    'base_dim': c['base'],
    'decoder_base_dim': c['decoder_base'],
    'z_dim': codec['channels'],
    'dim_mult': list(c['dim_mult']),
    'num_res_blocks': c['res_blocks'],
    'attn_scales': [],
    'temperal_downsample': list(c['temporal_downsample']),
    'is_residual': c['residual'],
    'in_channels': pixels,
    'out_channels': pixels,
    'patch_size': None if c['patch'] == 1 else c['patch'],
    'scale_factor_temporal': codec['temporal'],
    'scale_factor_spatial': codec['spatial'],
  }
  if c['latent_mean']:
    config |= {'latents_mean': list(c['latent_mean']), 'latents_std': list(c['latent_std'])}
  return config


def _umt5(text: Mapping[str, Any]) -> dict[str, Any]:
  c = text['umt5']
  return {
    'architectures': ['UMT5EncoderModel'],
    'model_type': 'umt5',
    'vocab_size': c['vocab'],
    'd_model': text['width'],
    'd_kv': c['head_dim'],
    'd_ff': c['ffn'],
    'num_layers': c['layers'],
    'num_heads': c['heads'],
    'relative_attention_num_buckets': c['buckets'],
    'relative_attention_max_distance': c['max_distance'],
    'layer_norm_epsilon': c['eps'],
    'feed_forward_proj': 'gated-gelu',
    'is_encoder_decoder': False,
    'pad_token_id': 0,
    'eos_token_id': 1,
  }


def _qwen(c: Mapping[str, Any]) -> dict[str, Any]:
  config = {
    'architectures': ['Qwen3_5ForConditionalGeneration'],
    'model_type': 'qwen3_5',
    'image_token_id': c['image_token'],
    'video_token_id': c['video_token'],
    'tie_word_embeddings': c['tied'],
    'text_config': _qwen_text(c),
  }
  if (v := c['vision'])['layers']:
    config['vision_config'] = {
      'model_type': 'qwen3_5_vision',
      'depth': v['layers'],
      'hidden_size': v['width'],
      'intermediate_size': v['ffn'],
      'num_heads': v['heads'],
      'patch_size': v['patch'],
      'temporal_patch_size': v['temporal'],
      'spatial_merge_size': v['merge'],
      'num_position_embeddings': v['positions'],
      'out_hidden_size': c['width'],
      'in_channels': 3,
      'hidden_act': 'gelu_pytorch_tanh',
    }
  return config


def _qwen_text(c: Mapping[str, Any], architecture: str = '') -> dict[str, Any]:
  """As a section of the whole model's config, or alone with its own class and token ids."""
  alone = {
    'architectures': [architecture],
    'image_token_id': c['image_token'],
    'video_token_id': c['video_token'],
  }
  return (alone if architecture else {}) | {
    'model_type': 'qwen3_5_text',
    'vocab_size': c['vocab'],
    'hidden_size': c['width'],
    'intermediate_size': c['ffn'],
    'num_hidden_layers': len(c['layer_types']),
    'layer_types': [f'{kind}_attention' for kind in c['layer_types']],
    'num_attention_heads': c['heads'],
    'num_key_value_heads': c['kv_heads'],
    'head_dim': c['head_dim'],
    'linear_num_key_heads': c['linear_key_heads'],
    'linear_num_value_heads': c['linear_value_heads'],
    'linear_key_head_dim': c['linear_key_dim'],
    'linear_value_head_dim': c['linear_value_dim'],
    'linear_conv_kernel_dim': c['conv'],
    'rms_norm_eps': c['eps'],
    'rope_parameters': {
      'rope_type': 'default',
      'rope_theta': c['rope_theta'],
      'partial_rotary_factor': c['rotary'],
      'mrope_section': list(c['mrope_section']),
      'mrope_interleaved': True,
    },
    'tie_word_embeddings': c['tied'],
    'attention_bias': False,
    'hidden_act': 'silu',
  }
