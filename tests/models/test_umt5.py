"""The UMT5 encoder against transformers' on random weights, and its conversion."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from wallwm_jax import presets
from wallwm_jax.config import TextConfig, UMT5Config
from wallwm_jax.convert import entries as conversion
from wallwm_jax.convert import umt5 as convert
from wallwm_jax.models.umt5 import UMT5Encoder, relative_buckets
from wallwm_jax.types import ConfigError, path_string

DATA = pathlib.Path(__file__).parents[1] / 'fixtures' / 'data'
CONFIGS = ('small', 'odd')


@dataclasses.dataclass(frozen=True)
class Fixture:
  config: TextConfig
  source: dict  # config.json
  tensors: dict[str, np.ndarray]

  def __getitem__(self, name):
    return self.tensors[name]

  def group(self, prefix):
    return {k.removeprefix(prefix): x for k, x in self.tensors.items() if k.startswith(prefix)}

  def encoder(self, **changes) -> UMT5Encoder:
    config = replace(self.config, **changes)
    params = conversion.assemble(convert.entries(config), self.group('weights.'))
    graph = nnx.split(nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0))))[0]
    return nnx.merge(graph, nnx.State(jax.tree.map(jnp.asarray, params)))


def replace(config: TextConfig, **changes) -> TextConfig:
  return dataclasses.replace(config, umt5=dataclasses.replace(config.umt5, **changes))


@pytest.fixture(scope='module', params=CONFIGS)
def fixture(request) -> Fixture:
  path = DATA / f'umt5_{request.param}.safetensors'
  source = json.loads(safe_open(path, 'np').metadata()['config'])
  tensors = load_file(path)
  shapes = {k.removeprefix('weights.'): x.shape for k, x in tensors.items() if 'weights.' in k}
  naming, fields = convert.infer(shapes, source)
  assert naming == 'diffusers'
  config = TextConfig(**fields['config'] | {'umt5': UMT5Config(**fields['config']['umt5'])})
  return Fixture(replace(config, dtype='float32'), source, tensors)


def assert_close(name, got, want, tol=5e-5, rms_tol=1e-5):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, (name, got.shape, want.shape)
  worst, rms = np.abs(got - want).max(), np.sqrt(np.square(want).mean())
  relative = np.linalg.norm(got - want) / np.linalg.norm(want)
  print(f'{name}: max {worst:.2e}, relative {relative:.2e}, rms {rms:.2f}')
  assert worst <= tol * max(1.0, rms) and relative <= rms_tol, (
    f'{name} is the first that differs: max {worst:.2e} at rms {rms:.2f}, relative {relative:.2e}'
  )


def layers(encoder, ids, mask):
  return jax.jit(encoder.layers)(ids, mask)


def test_every_intermediate_matches_transformers(fixture):
  f, encoder = fixture, fixture.encoder()
  ids, mask = f['inputs.ids'], f['inputs.mask']
  buckets = relative_buckets(f.config.umt5, ids.shape[1])
  np.testing.assert_array_equal(buckets, f['mid.bucket'])
  graph, state = nnx.split(encoder.blocks)
  for n in range(f.config.umt5.layers):
    block = nnx.merge(graph, jax.tree.map(lambda x, n=n: x[n], state))
    row = block.position_bias(buckets)[0, :, 0]
    assert_close(f'position_bias{n}_row0', row, f[f'mid.position_bias{n}_row0'])
  real = mask[..., None]
  block = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
  x = encoder.embed(ids)
  x = x + jax.jit(block.attend)(block.attn_norm(x), buckets, mask)
  assert_close('layer0.after_attn', x * real, f['mid.layer0.after_attn'])
  out, each = layers(encoder, ids, mask)
  for n, x in enumerate(each):
    assert_close(f'layer{n}', x * real, f[f'mid.layer{n}'])
  assert_close('last_hidden_state', out * real, f['outputs.last_hidden_state_masked'])


def test_bfloat16_points_the_same_way(fixture):
  f = fixture
  mask = f['inputs.mask']
  out = layers(f.encoder(dtype='bfloat16'), f['inputs.ids'], mask)[0]
  assert out.dtype == jnp.float32
  got, want = np.asarray(out)[mask], f['outputs.last_hidden_state_masked'][mask]
  assert (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want) > 0.999
  assert np.abs(got - want).max() > 1e-4  # it did round


def test_padding_changes_no_real_row(fixture):
  f, encoder = fixture, fixture.encoder()
  ids, mask = f['inputs.ids'], f['inputs.mask']
  count = int(mask[1].sum())
  alone = layers(encoder, ids[1:2, :count], mask[1:2, :count])[0]
  filler = np.random.default_rng(0).integers(0, f.config.umt5.vocab, (1, 512), np.int32)
  filler[:, :count] = ids[1, :count]
  padded = layers(encoder, filler, np.arange(512)[None] < count)[0]
  np.testing.assert_allclose(
    padded[:, :count], alone, atol=3e-5, rtol=0
  )  # float32 sums in another order
  seen = layers(encoder, filler, np.ones((1, 512), bool))[0]
  assert np.abs(seen[:, :count] - alone).max() > 1e-2


def test_buckets_of_far_distances_are_exact():
  path = DATA / 'umt5_text.safetensors'
  tensors = load_file(path)
  for buckets, distance in json.loads(safe_open(path, 'np').metadata()['config'])['buckets']:
    config = UMT5Config(buckets=buckets, max_distance=distance)
    table = relative_buckets(config, 1201)
    row = np.concatenate([table[-1, :-1], table[0]])  # key - query = -1200 .. 1200
    np.testing.assert_array_equal(row, tensors[f'outputs.bucket_{buckets}_{distance}'])


@pytest.mark.parametrize('sizes', [dict(buckets=3), dict(max_distance=8)])
def test_bias_tables_without_far_buckets_are_refused(sizes):
  with pytest.raises(ConfigError, match='buckets >= 4 and max_distance > buckets'):
    UMT5Config(**sizes)


def model_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
  tree = jax.eval_shape(
    lambda: nnx.to_pure_dict(nnx.state(UMT5Encoder(config, rngs=nnx.Rngs(0)), nnx.Param))
  )
  return {path_string(p): x.shape for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def torch_shapes(config: TextConfig, naming) -> dict[str, tuple[int, ...]]:
  return {entry.key(naming): entry.shape for entry in convert.entries(config)}


def test_xxl_has_the_published_parameters():
  config = presets.UMT5_XXL
  shapes = model_shapes(config)
  assert sum(map(math.prod, shapes.values())) == 5_680_910_336
  assert shapes == conversion.parameter_shapes(convert.entries(config))
  assert len(convert.entries(config)) == 242
  for naming in ('diffusers', 'original'):
    got, fields = convert.infer(torch_shapes(config, naming))
    assert (got, fields) == (naming, {'config': dataclasses.asdict(config)})


configs = st.builds(
  lambda width, tokens, **sizes: TextConfig(
    kind='umt5', width=width, tokens=tokens, umt5=UMT5Config(**sizes)
  ),
  width=st.integers(1, 40),
  tokens=st.just(presets.UMT5_XXL.tokens),
  vocab=st.integers(1, 99),
  layers=st.integers(1, 12),
  heads=st.integers(1, 9),
  head_dim=st.integers(1, 9),
  ffn=st.integers(1, 50),
  buckets=st.integers(4, 40),
  max_distance=st.integers(20, 300),
  eps=st.sampled_from([1e-6, 1e-3]),
)


@given(config=configs, naming=st.sampled_from(['diffusers', 'original']), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_any_encoder_converts_both_ways(config, naming, seed):
  entries = convert.entries(config)
  assert model_shapes(config) == conversion.parameter_shapes(entries)
  source = {
    'layer_norm_epsilon': config.umt5.eps,
    'relative_attention_max_distance': config.umt5.max_distance,
  }
  got, fields = convert.infer(torch_shapes(config, naming), source)
  assert (got, fields) == (naming, {'config': dataclasses.asdict(config)})
  assert convert.model(json.loads(json.dumps(fields))) == entries
  rng = np.random.default_rng(seed)
  tensors = {e.key(naming): rng.standard_normal(e.shape, np.float32) for e in entries}
  tree = conversion.assemble(entries, tensors, naming)
  leaves = {path_string(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
  for e in entries:
    x = leaves[e.path] if e.layer is None else leaves[e.path][e.layer]
    np.testing.assert_array_equal(e.to_torch(x), tensors[e.key(naming)])


TINY = TextConfig(
  kind='umt5', width=6, umt5=UMT5Config(vocab=9, layers=2, heads=3, head_dim=2, ffn=5, buckets=8)
)


def test_either_name_of_the_embedding_will_do():
  shapes = torch_shapes(TINY, 'diffusers')
  alias = 'encoder.embed_tokens.weight'
  both = convert.infer(shapes | {alias: shapes['shared.weight']})
  assert convert.infer({alias: shapes.pop('shared.weight')} | shapes) == both


def _without(shapes, part):
  return {key: shape for key, shape in shapes.items() if part not in key}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda s: _without(s, 'shared'), "expected a key 'shared.weight' or 'token_embedding.weight'"),
    (lambda s: _without(s, '.1.layer.0.SelfAttention.relative'), 'That is T5, not UMT5'),
    (lambda s: _without(s, '0.SelfAttention.q'), 'Is a shard of the checkpoint missing'),
    (lambda s: {k.replace('wi_0', 'wi'): x for k, x in s.items()}, 'expected a gated feed-forward'),
    (lambda s: s | {'encoder.block.0.layer.0.SelfAttention.q.weight': (7, 6)}, 'do not divide'),
  ],
)
def test_other_checkpoints_are_refused(change, message):
  with pytest.raises(ConfigError, match=message):
    convert.infer(change(torch_shapes(TINY, 'diffusers')))


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ({'num_layers': 3}, 'num_layers=3 but the tensors say 2'),
    ({'d_kv': 64, 'd_model': 6}, 'd_kv=64 but the tensors say 2'),
    ({'model_type': 't5'}, "model_type='t5', expected 'umt5'"),
    ({'feed_forward_proj': 'relu'}, "feed_forward_proj='relu', expected 'gated-gelu'"),
  ],
)
def test_a_contradicting_config_is_refused(source, message):
  with pytest.raises(ConfigError, match=message):
    convert.infer(torch_shapes(TINY, 'diffusers'), source)
