"""Wan DiT checkpoints: sizes of the public models, any config, both namings, refusals."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax import config as cfg
from wallwm_jax import presets
from wallwm_jax.convert import wan_dit
from wallwm_jax.convert.entries import assemble, parameter_shapes
from wallwm_jax.models.video_dit import VideoTower
from wallwm_jax.types import ConfigError, path_string

# Parameters and tensors of the published files.
PUBLISHED = {
  'wan2_1_1_3b': (16, 1_418_996_800, 825),
  'wan2_1_14b': (16, 14_288_491_584, 1095),
  'wan2_2_5b': (48, 4_999_787_712, 825),
}


def tower_shapes(video: cfg.VideoConfig, channels: int, text_width: int) -> dict:
  """{path: shape} of the NNX tower; nothing is allocated."""
  _, ph, pw = video.patch
  config = cfg.ModelConfig(
    video=video,
    codec=cfg.CodecConfig(channels=channels),
    text=cfg.TextConfig(width=text_width),
    image_size=(8 * ph, 8 * pw),
  )
  tower = nnx.eval_shape(lambda: VideoTower(config, rngs=nnx.Rngs(0)))
  params = nnx.to_pure_dict(nnx.state(tower, nnx.Param))
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {path_string(path): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize('name', PUBLISHED)
def test_public_models_have_their_published_size(name):
  channels, parameters, tensors = PUBLISHED[name]
  video = dataclasses.replace(presets.VIDEO_TOWERS[name], cross_view=False)
  entries = wan_dit.entries(video, channels, 4096)
  shapes = parameter_shapes(entries)
  assert len(entries) == tensors
  assert sum(math.prod(shape) for shape in shapes.values()) == parameters
  assert shapes == tower_shapes(video, channels, 4096)


def test_keys_of_both_namings():
  config = cfg.VideoConfig(width=16, layers=1, heads=2, ffn=8, freq_dim=4)
  by_path = {}
  for entry in wan_dit.entries(config, 3, 5):
    by_path.setdefault(entry.path, []).append((entry.diffusers, entry.original, entry.shape))
  expected = {
    'patch_embed/kernel': ('patch_embedding.weight', 'patch_embedding.weight', (16, 3, 1, 2, 2)),
    'time_in/kernel': (
      'condition_embedder.time_embedder.linear_1.weight', 'time_embedding.0.weight', (16, 4),
    ),
    'time_proj/bias': ('condition_embedder.time_proj.bias', 'time_projection.1.bias', (96,)),
    'text_in/kernel': (
      'condition_embedder.text_embedder.linear_1.weight', 'text_embedding.0.weight', (16, 5),
    ),
    'blocks/modulation': ('blocks.0.scale_shift_table', 'blocks.0.modulation', (1, 6, 16)),
    'blocks/norm_cross/scale': ('blocks.0.norm2.weight', 'blocks.0.norm3.weight', (16,)),
    'blocks/self_attn/o/kernel': (
      'blocks.0.attn1.to_out.0.weight', 'blocks.0.self_attn.o.weight', (16, 16),
    ),
    'blocks/cross_attn/k_norm/scale': (
      'blocks.0.attn2.norm_k.weight', 'blocks.0.cross_attn.norm_k.weight', (16,),
    ),
    'blocks/ffn/up/kernel': ('blocks.0.ffn.net.0.proj.weight', 'blocks.0.ffn.0.weight', (8, 16)),
    'blocks/ffn/down/bias': ('blocks.0.ffn.net.2.bias', 'blocks.0.ffn.2.bias', (16,)),
    'head/modulation': ('scale_shift_table', 'head.modulation', (1, 2, 16)),
    'head/kernel': ('proj_out.weight', 'head.head.weight', (12, 16)),
  }  # fmt: skip
  assert {path: by_path[path] for path in expected} == {p: [e] for p, e in expected.items()}


@st.composite
def configs(draw):
  heads, pairs = draw(st.integers(1, 5)), draw(st.integers(4, 12))
  conditioning = draw(st.sampled_from(['frame', 'channel']))
  video = cfg.VideoConfig(
    width=2 * heads * pairs,
    layers=draw(st.integers(1, 4)),
    heads=heads,
    ffn=draw(st.integers(1, 70)),
    patch=(1, draw(st.integers(1, 3)), draw(st.integers(1, 3))),
    freq_dim=draw(st.integers(2, 40)),
    conditioning=conditioning,
    cross_view=False,
    eps=draw(st.sampled_from([1e-6, 1e-3])),
  )
  fields = {'channels': draw(st.integers(1, 9)), 'text_width': draw(st.integers(1, 20))}
  if conditioning == 'channel':
    fields['mask_channels'] = 4
  return video, fields


def source_config(video: cfg.VideoConfig, fields: dict, naming: str) -> dict:
  """What the public config.json says of such a model."""
  d_in = fields['channels']
  if video.conditioning == 'channel':
    d_in = 2 * fields['channels'] + fields['mask_channels']
  common = {'ffn_dim': video.ffn, 'freq_dim': video.freq_dim, 'num_layers': video.layers}
  if naming == 'original':
    own = {'dim': video.width, 'num_heads': video.heads, 'in_dim': d_in, 'model_type': 'ti2v'}
    return common | own | {'out_dim': fields['channels'], 'text_len': 512, 'eps': video.eps}
  return common | {
    'num_attention_heads': video.heads,
    'attention_head_dim': video.head_dim,
    'in_channels': d_in,
    'out_channels': fields['channels'],
    'text_dim': fields['text_width'],
    'patch_size': list(video.patch),
    'cross_attn_norm': True,
    'qk_norm': 'rms_norm_across_heads',
    'eps': video.eps,
    'image_dim': None,
    'added_kv_proj_dim': None,
    'pos_embed_seq_len': None,
    'rope_max_seq_len': 1024,
  }


@settings(deadline=None, max_examples=12)
@given(configs(), st.sampled_from(['diffusers', 'original']), st.integers(0, 99))
def test_any_config_converts_and_converts_back(case, naming, seed):
  video, fields = case
  entries = wan_dit.entries(video, **fields)
  shapes = parameter_shapes(entries)
  assert shapes == tower_shapes(video, fields['channels'], fields['text_width'])
  rng = np.random.default_rng(seed)
  tensors = {e.key(naming): rng.standard_normal(e.shape).astype(np.float32) for e in entries}
  assert len(tensors) == len(entries)
  found, inferred = wan_dit.infer(
    {key: x.shape for key, x in tensors.items()}, source_config(video, fields, naming)
  )
  assert found == naming
  assert inferred == {'config': dataclasses.asdict(video), **fields}
  assert wan_dit.model(json.loads(json.dumps(inferred))) == entries
  params = assemble(entries, tensors, naming)
  leaves = {path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
  assert {path: x.shape for path, x in leaves.items()} == shapes
  for entry in entries:
    ours = leaves[entry.path] if entry.layer is None else leaves[entry.path][entry.layer]
    np.testing.assert_array_equal(entry.to_torch(ours), tensors[entry.key(naming)])


WAN = cfg.VideoConfig(width=256, layers=2, heads=2, ffn=8, freq_dim=4, cross_view=False)


def checkpoint(naming='diffusers', **changes):
  """{key: shape} of a small model with heads of the public width."""
  fields = {'config': WAN, 'channels': 3, 'text_width': 5} | changes
  return {entry.key(naming): entry.shape for entry in wan_dit.entries(**fields)}


@pytest.mark.parametrize('naming', ['diffusers', 'original'])
def test_without_a_config_the_public_defaults_hold(naming):
  found, fields = wan_dit.infer(checkpoint(naming), None)
  assert (found, fields['config']) == (naming, dataclasses.asdict(WAN))
  with pytest.raises(ConfigError, match='width 250.*multiple of 128.*config.json'):
    wan_dit.infer(checkpoint(config=dataclasses.replace(WAN, width=250, heads=5)), None)


@pytest.mark.parametrize(
  'extra, message',
  [
    ('blocks.0.attn2.add_k_proj.weight', 'add_k_proj.*CLIP image branch'),
    ('blocks.1.cross_attn.k_img.weight', 'k_img.*CLIP image branch'),
    ('condition_embedder.image_embedder.pos_embed', 'CLIP image branch'),
    ('img_emb.proj.0.weight', 'CLIP image branch'),
    ('img_emb.emb_pos', 'CLIP image branch'),
    ('vace_blocks.0.proj_out.weight', 'VACE'),
    ('control_adapter.conv.weight', 'camera'),
    ('decoder.conv_in.weight', 'expected a video DiT, got a Wan VAE.*decoder.conv_in.weight'),
    ('shared.weight', 'UMT5'),
  ],
)
def test_other_models_and_variants_are_refused_by_name(extra, message):
  with pytest.raises(ConfigError, match=message):
    wan_dit.infer(checkpoint() | {extra: (1,)}, None)


@pytest.mark.parametrize(
  'source, message',
  [
    ({'image_dim': 1280}, 'image_dim=1280'),
    ({'added_kv_proj_dim': 5120}, 'added_kv_proj_dim=5120'),
    ({'pos_embed_seq_len': 514}, 'pos_embed_seq_len=514'),
    ({'qk_norm': None}, 'qk_norm=None'),
    ({'cross_attn_norm': False}, 'cross_attn_norm=false'),
    ({'num_layers': 3}, 'num_layers=3, the tensors 2'),
    ({'in_channels': 36}, 'in_channels=36, the tensors 3'),
    ({'num_attention_heads': 4, 'attention_head_dim': 128}, 'attention_head_dim=128'),
    ({'num_attention_heads': 3}, 'width 256 is not a multiple of heads 3'),
  ],
)
def test_configs_that_do_not_fit_are_refused_by_name(source, message):
  with pytest.raises(ConfigError, match=message):
    wan_dit.infer(checkpoint(), source)


def test_tensors_that_tell_too_little_are_refused_by_name():
  full = checkpoint()
  for key in ('patch_embedding.weight', 'proj_out.weight', 'blocks.0.ffn.net.0.proj.weight'):
    with pytest.raises(ConfigError, match=key.replace('.', r'\.')):
      wan_dit.infer({k: s for k, s in full.items() if k != key}, None)
  with pytest.raises(ConfigError, match='blocks.0.attn1.to_q.weight'):
    wan_dit.infer({'model.layers.0.weight': (1,)}, None)
  with pytest.raises(ConfigError, match=r'none of \[1\]'):
    wan_dit.infer({k.replace('blocks.1.', 'blocks.2.'): s for k, s in full.items()}, None)
  with pytest.raises(ConfigError, match='2 input channels for 3 output channels'):
    wan_dit.infer(full | {'patch_embedding.weight': (256, 2, 1, 2, 2)}, None)
  with pytest.raises(ConfigError, match='temporal patch must be 1'):
    wan_dit.infer(
      full | {'patch_embedding.weight': (256, 3, 3, 2, 2), 'proj_out.weight': (36, 256)}
    )
  with pytest.raises(ConfigError, match='no multiple of the patch'):
    wan_dit.infer(full | {'proj_out.weight': (13, 256)}, None)
  with pytest.raises(ConfigError, match='5 axes'):
    wan_dit.infer(full | {'patch_embedding.weight': (256, 3)}, None)


def test_tensors_to_ignore():
  key = 'blocks.1.attn2.norm_added_q.weight'
  assert any(re.search(pattern, key) for pattern in wan_dit.IGNORED)
  wan_dit.infer(checkpoint() | {key: (256,)}, None)
  assert not any(re.search(p, k) for p in wan_dit.IGNORED for k in checkpoint())
