"""Wan's VAEs between both public namings and ours: every key, any config, refusals by name."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from wan_vae_fixtures import NAMES, fixture

from wallwm_jax.config import CodecConfig, VAEConfig
from wallwm_jax.convert import wan_vae
from wallwm_jax.convert.entries import parameter_shapes
from wallwm_jax.models.vae import WanVAE
from wallwm_jax.presets import CODECS
from wallwm_jax.types import ConfigError, path_string


def tree_shapes(config: CodecConfig) -> dict[str, tuple[int, ...]]:
  state = nnx.state(nnx.eval_shape(lambda: WanVAE(config, nnx.Rngs(0))))
  leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))[0]
  return {path_string(path): tuple(leaf.shape) for path, leaf in leaves}


@pytest.mark.parametrize('name, tensors, total', [
  ('wan2_1', 194, 126_892_531), ('wan2_2', 196, 704_688_668),
])
def test_public_sizes(name, tensors, total):
  entries = wan_vae.entries(CODECS[name])
  shapes = parameter_shapes(entries)
  assert len(entries) == tensors
  assert sum(map(math.prod, shapes.values())) == total
  assert tree_shapes(CODECS[name]) == shapes


@st.composite
def codecs(draw) -> CodecConfig:
  levels = draw(st.integers(1, 3))
  residual = draw(st.booleans())
  sizes = st.sampled_from((1, 2, 4) if residual else (1, 2, 3, 5))
  mult = [draw(sizes) for _ in range(levels)]
  if residual:
    mult = sorted(mult)  # averaging shortcuts need widths that divide
    mult[-1] = mult[-2] if levels > 1 else 1
  vae = VAEConfig(
    base=draw(st.integers(1, 7)),
    decoder_base=draw(st.integers(4, 9)),  # Wan2.1's levels halve it
    dim_mult=tuple(mult),
    res_blocks=draw(st.integers(1, 3)),
    temporal_downsample=tuple(draw(st.booleans()) for _ in range(levels - 1)),
    residual=residual,
    patch=draw(st.sampled_from((1, 2, 4))),
  )
  channels = draw(st.integers(1, 9))
  return CodecConfig(
    kind='wan', spatial=vae.spatial, temporal=vae.temporal, channels=channels, vae=vae
  )


@given(codecs(), st.sampled_from(('diffusers', 'original')))
@settings(deadline=None, max_examples=10)
def test_any_config_has_one_entry_per_parameter_and_is_told_from_its_shapes(config, naming):
  entries = wan_vae.entries(config)
  assert parameter_shapes(entries) == tree_shapes(config)
  keys = {entry.key(naming): entry.shape for entry in entries}
  assert len(keys) == len(entries) == len({entry.path for entry in entries})
  found, fields = wan_vae.infer(keys)
  assert found == naming
  assert wan_vae.codec_config(json.loads(json.dumps(fields['config']))) == config
  assert wan_vae.model(fields) == entries
  rng = np.random.default_rng(0)
  for entry in entries:
    x = rng.normal(size=entry.shape).astype(np.float32)
    np.testing.assert_array_equal(entry.to_torch(entry.to_jax(x)), x)


@pytest.mark.parametrize('name', NAMES)
def test_entries_list_exactly_the_keys_of_diffusers(name):
  f = fixture(name)
  want = {key: x.shape for key, x in f.group('weights').items()}
  assert {e.diffusers: e.shape for e in wan_vae.entries(f.config)} == want


@pytest.mark.parametrize('residual, keys', [
  (False, {
    'encoder/down_0/sample/conv': 'encoder.downsamples.2.resample.1',
    'encoder/down_1/res_0/shortcut': 'encoder.downsamples.3.shortcut',
    'encoder/down_2/sample/time_conv': 'encoder.downsamples.8.time_conv',
    'decoder/up_1/res_0/conv1': 'decoder.upsamples.4.residual.2',
    'decoder/up_2/sample/conv': 'decoder.upsamples.11.resample.1',
    'decoder/conv_out': 'decoder.head.2',
  }),
  (True, {
    'encoder/down_2/sample/time_conv': 'encoder.downsamples.2.downsamples.2.time_conv',
    'encoder/down_0/res_1/conv2': 'encoder.downsamples.0.downsamples.1.residual.6',
    'decoder/up_0/sample/time_conv': 'decoder.upsamples.0.upsamples.3.time_conv',
    'decoder/mid/attn/qkv': 'decoder.middle.1.to_qkv',
    'quant_conv': 'conv1',
    'post_quant_conv': 'conv2',
  }),
])  # fmt: skip
def test_the_authors_names(residual, keys):
  """Keys as they stand in the public files, read off their layout, not off the code."""
  config = CODECS['wan2_2' if residual else 'wan2_1']
  original = {e.path: e.original for e in wan_vae.entries(config)}
  for path, key in keys.items():
    assert original[f'{path}/kernel'] == f'{key}.weight'


def test_constants_come_from_the_file_or_the_public_model():
  for name in ('wan2_1', 'wan2_2'):
    keys = {e.original: e.shape for e in wan_vae.entries(CODECS[name])}
    assert wan_vae.infer(keys)[1]['config'] == dataclasses.asdict(CODECS[name])
  f = fixture('2_1_small')
  keys = {k: x.shape for k, x in f.group('weights').items()}
  own = {**f.source, 'latents_mean': [1, 2, 3, 4], 'latents_std': [5, 6, 7, 8]}
  vae = wan_vae.infer(keys, own)[1]['config']['vae']
  assert (vae['latent_mean'], vae['latent_std']) == ((1, 2, 3, 4), (5, 6, 7, 8))
  assert f.config.vae.latent_mean == ()  # the class default of 16 values says nothing of 4 latents


@pytest.mark.parametrize('change, message', [
  ({'z_dim': 5}, 'z_dim: the tensors have 4, the file says 5'),
  ({'attn_scales': [0.5]}, 'attn_scales'),
  ({'is_residual': True}, 'is_residual'),
  ({'latents_mean': [0.0], 'latents_std': [1.0]}, 'expected 4 values each'),
])
def test_a_config_of_another_checkpoint_is_refused(change, message):
  f = fixture('2_1_small')
  keys = {k: x.shape for k, x in f.group('weights').items()}
  with pytest.raises(ConfigError, match=message):
    wan_vae.infer(keys, {**f.source, **change})


def test_checkpoints_of_other_models_are_refused():
  keys = {e.diffusers: e.shape for e in wan_vae.entries(fixture('2_2_odd').config)}
  with pytest.raises(ConfigError, match='expected a Wan VAE'):
    wan_vae.infer({'blocks.0.attn1.to_q.weight': (8, 8)})
  for key in ('post_quant_conv.weight', 'encoder.down_blocks.1.resnets.0.conv2.weight'):
    with pytest.raises(ConfigError, match='missing|equally many'):
      wan_vae.infer({k: s for k, s in keys.items() if k != key})
  with pytest.raises(ConfigError, match='attention'):
    wan_vae.infer({**keys, 'encoder.down_blocks.0.resnets.9.to_qkv.weight': (3, 1, 1, 1)})
  with pytest.raises(ConfigError, match="kind: expected 'wan'"):
    wan_vae.entries(CodecConfig())
