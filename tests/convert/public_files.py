"""Public checkpoints of random small models, as they would lie in a download."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import safetensors.numpy
from hypothesis import strategies as st

from wallwm_jax.config import (
  CodecConfig,
  QwenConfig,
  TextConfig,
  UMT5Config,
  VAEConfig,
  VideoConfig,
  VisionTowerConfig,
)
from wallwm_jax.convert.plan import FAMILIES
from wallwm_jax.convert.torch_config import torch_config

DTYPES = {
  'F32': np.float32,
  'BF16': ml_dtypes.bfloat16,
  'F16': np.float16,
  'F64': np.float64,
}

DIT = {
  'config': dataclasses.asdict(
    VideoConfig(width=24, layers=3, heads=2, ffn=40, freq_dim=16, cross_view=False)
  ),
  'channels': 5,
  'text_width': 12,
}
VAE = {
  'config': dataclasses.asdict(
    CodecConfig(
      kind='wan',
      spatial=8,
      channels=4,
      vae=VAEConfig(base=4, decoder_base=4, dim_mult=(1, 2, 2, 2), residual=False, patch=1),
    )
  )
}
UMT5 = {
  'config': dataclasses.asdict(
    TextConfig(
      kind='umt5',
      tokens=512,
      width=16,
      umt5=UMT5Config(vocab=40, layers=2, heads=3, head_dim=4, ffn=24, buckets=8),
    )
  )
}
# Without vision: both namings hold all of it.
QWEN = {
  'config': dataclasses.asdict(
    QwenConfig(
      vocab=40,
      width=16,
      ffn=24,
      layer_types=('linear', 'full', 'linear'),
      heads=2,
      kv_heads=1,
      head_dim=8,
      linear_key_heads=1,
      linear_value_heads=2,
      linear_key_dim=4,
      linear_value_dim=6,
      vision=VisionTowerConfig(layers=0),
    )
  )
}
SMALL = {'wan-dit': DIT, 'wan-vae': VAE, 'umt5': UMT5, 'qwen': QWEN}


def wan_dit_fields():
  return st.builds(
    lambda heads, head_dim, layers, ffn, patch, freq, frame, channels, text: {
      'config': dataclasses.asdict(
        VideoConfig(
          width=heads * head_dim,
          heads=heads,
          layers=layers,
          ffn=ffn,
          patch=(1, *patch),
          freq_dim=freq,
          conditioning='frame' if frame else 'channel',
          cross_view=False,
        )
      ),
      'channels': channels,
      'text_width': text,
      **({} if frame else {'mask_channels': 4}),
    },
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 10, 14]),
    layers=st.integers(1, 3),
    ffn=st.integers(1, 40),
    patch=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    freq=st.sampled_from([2, 16]),
    frame=st.booleans(),
    channels=st.integers(2, 6),
    text=st.integers(2, 9),
  )


def wan_vae_fields():
  def build(base, decoder_base, mult, blocks, temporal, residual, patch, z):
    vae = VAEConfig(
      base=4 * base,
      decoder_base=4 * decoder_base,
      dim_mult=(1, *mult),
      res_blocks=blocks,
      temporal_downsample=tuple(temporal[: len(mult)]),
      residual=residual,
      patch=patch,
    )
    codec = CodecConfig(kind='wan', spatial=vae.spatial, temporal=vae.temporal, channels=z, vae=vae)
    return {'config': dataclasses.asdict(codec)}

  return st.builds(
    build,
    base=st.integers(1, 3),
    decoder_base=st.integers(1, 3),
    mult=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3),
    blocks=st.integers(1, 2),
    temporal=st.lists(st.booleans(), min_size=3, max_size=3),
    residual=st.booleans(),
    patch=st.integers(1, 2),
    z=st.integers(2, 5),
  )


def umt5_fields():
  return st.builds(
    lambda width, **umt5: {
      'config': dataclasses.asdict(
        TextConfig(kind='umt5', tokens=512, width=width, umt5=UMT5Config(**umt5))
      )
    },
    width=st.integers(2, 20),
    vocab=st.integers(2, 60),
    layers=st.integers(2, 3),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    ffn=st.integers(1, 30),
    buckets=st.sampled_from([4, 8]),
  )


FIELDS = {'wan-dit': wan_dit_fields, 'wan-vae': wan_vae_fields, 'umt5': umt5_fields}


def random_tensors(family, fields, naming, seed, dtypes=('F32',)):
  """State dict of a random model: {key: array}, each of a random one of `dtypes`."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for entry in FAMILIES[family].module.model(fields):
    dtype = DTYPES[dtypes[rng.integers(len(dtypes))]]
    tensors[entry.key(naming)] = rng.standard_normal(entry.shape).astype(dtype)
  return tensors


def write_checkpoint(folder, tensors, *, shards=1, index=False, config=None, prefix='', seed=0):
  """Writes `tensors` as `shards` files in random order, with an index and config.json if asked."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  keys = [*tensors]
  rng.shuffle(keys)
  placed = {}
  for i, part in enumerate(np.array_split(keys, shards)):
    name = f'model-{i + 1:05d}-of-{shards:05d}.safetensors'
    safetensors.numpy.save_file({prefix + str(k): tensors[k] for k in part}, folder / name)
    placed |= {prefix + str(k): name for k in part}
  if index:
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': placed}))
  if config is not None:
    (folder / 'config.json').write_text(json.dumps(config))
  return folder


def write_tokenizer(folder):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'tokenizer.json').write_text('{"version": "1.0", "model": {"type": "Unigram"}}')
  return folder / 'tokenizer.json'


def small_checkpoint(folder, family, naming='diffusers', **options):
  """(folder, tensors) of the small model of a family, config.json and tokenizer included."""
  fields = SMALL[family]
  tensors = random_tensors(family, fields, naming, seed=0)
  component = FAMILIES[family].component
  config = torch_config(component, fields, naming)
  write_checkpoint(folder, tensors, config=config, **options)
  if FAMILIES[family].tokenizer:
    write_tokenizer(folder)
  return folder, tensors


def read_tensors(folder):
  """Every tensor of a folder, by key, with another reader than the one under test."""
  found = {}
  for file in sorted(folder.glob('*.safetensors')):
    found |= safetensors.numpy.load_file(file)
  return found


def same_bits(a, b):
  return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
