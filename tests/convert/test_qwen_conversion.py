"""Qwen3.5 checkpoints: transformers' keys, sizes, refusals, and every byte there and back."""

import dataclasses
import json
import math
import pathlib
import re
import tempfile

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import public_files as public
import pytest
import safetensors
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from wallwm_jax import cli, presets, weights
from wallwm_jax.config import LanguageConfig, MeshConfig, QwenConfig, VisionTowerConfig
from wallwm_jax.convert import qwen
from wallwm_jax.convert.entries import assemble, parameter_shapes
from wallwm_jax.convert.exporter import export_weights
from wallwm_jax.convert.importer import import_weights
from wallwm_jax.convert.plan import FAMILIES, compare, make_plan
from wallwm_jax.convert.source import open_source
from wallwm_jax.convert.torch_config import torch_config
from wallwm_jax.models import language
from wallwm_jax.parallel.mesh import MESH_AXES
from wallwm_jax.parallel.rules import QWEN_LAYERS, QWEN_RULES, check_rules, logical_axes
from wallwm_jax.types import CheckpointError, ConfigError, nest, path_string

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / 'fixtures' / 'data'
FAMILY = FAMILIES['qwen']
BLIND = VisionTowerConfig(layers=0)
TINY = QwenConfig(
  vocab=40,
  width=12,
  ffn=20,
  layer_types=('linear', 'full', 'linear'),
  heads=3,
  kv_heads=1,
  head_dim=8,
  linear_key_heads=2,
  linear_value_heads=4,
  linear_key_dim=3,
  linear_value_dim=5,
  tied=False,
  vision=VisionTowerConfig(
    layers=2, width=16, heads=2, ffn=10, patch=2, temporal=3, merge=3, positions=9
  ),
)


def fields_of(config):
  return {'config': dataclasses.asdict(config)}


def shapes_of(config, naming='diffusers'):
  return {e.key(naming): e.shape for e in qwen.entries(config) if e.key(naming)}


def source_config(config, naming='diffusers'):
  return json.loads(json.dumps(torch_config('vlm', fields_of(config), naming)))


def stored_dtypes(config, naming):
  """Qwen's mix: float32 for A_log and the norm after the recurrence, bfloat16 for all else."""
  exact = re.compile(r'.*\.linear_attn\.(A_log|norm\.weight)')
  return {
    key: np.dtype(np.float32 if exact.fullmatch(key) else ml_dtypes.bfloat16)
    for key in shapes_of(config, naming)
  }


def checkpoint(config, naming='diffusers', seed=0):
  rng = np.random.default_rng(seed)
  dtypes = stored_dtypes(config, naming)
  return {
    key: rng.standard_normal(shape).astype(dtypes[key])
    for key, shape in shapes_of(config, naming).items()
  }


def multi_token_heads(config):
  """The 15 tensors under mtp.* that public checkpoints carry."""
  d = config.width
  one = shapes_of(dataclasses.replace(config, layer_types=('full',)))
  layer = {
    key.replace('model.language_model', 'mtp'): shape
    for key, shape in one.items()
    if '.layers.0.' in key
  }
  norms = ('norm', 'pre_fc_norm_embedding', 'pre_fc_norm_hidden')
  return layer | {f'mtp.{n}.weight': (d,) for n in norms} | {'mtp.fc.weight': (d, 2 * d)}


def convert(folder, out):
  plan = make_plan(FAMILY, open_source(folder))
  import_weights(plan, out, {})
  return plan


def flat(tree):
  return {path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


@st.composite
def configs(draw):
  kv_heads, key_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
  tower = BLIND
  if draw(st.booleans()):
    heads = draw(st.integers(1, 2))
    tower = VisionTowerConfig(
      layers=draw(st.integers(1, 2)),
      width=4 * heads * draw(st.integers(1, 2)),
      heads=heads,
      ffn=draw(st.integers(1, 7)),
      patch=draw(st.integers(1, 3)),
      temporal=draw(st.integers(1, 3)),
      merge=draw(st.integers(1, 3)),
      positions=draw(st.integers(1, 3)) ** 2,
    )
  return QwenConfig(
    vocab=draw(st.integers(1, 30)),
    width=draw(st.integers(1, 12)),
    ffn=draw(st.integers(1, 12)),
    layer_types=tuple(draw(st.lists(st.sampled_from(['linear', 'full']), min_size=1, max_size=5))),
    heads=kv_heads * draw(st.integers(1, 2)),
    kv_heads=kv_heads,
    head_dim=4 * draw(st.integers(1, 3)),
    linear_key_heads=key_heads,
    linear_value_heads=key_heads * draw(st.integers(1, 3)),
    linear_key_dim=draw(st.integers(1, 5)),
    linear_value_dim=draw(st.integers(1, 5)),
    conv=draw(st.integers(2, 5)),
    eps=draw(st.sampled_from([1e-6, 1e-5])),
    rope_theta=draw(st.sampled_from([1e4, 1e7])),
    rotary=draw(st.sampled_from([0.5, 1.0])),
    mrope_section=tuple(draw(st.tuples(*[st.integers(0, 5)] * 3))),
    tied=draw(st.booleans()),
    vision=tower,
    image_token=draw(st.integers(0, 9)),
  )


QUICK = hypothesis.settings(
  max_examples=8,
  deadline=None,
  database=None,
  derandomize=True,
  phases=[hypothesis.Phase.generate],
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)


@hypothesis.given(config=configs(), data=st.data())
@QUICK
def test_any_model_comes_back_bit_for_bit(config, data):
  naming = 'diffusers' if config.vision.layers else data.draw(
    st.sampled_from(['diffusers', 'original'])
  )  # fmt: skip
  tensors = checkpoint(config, naming, seed=data.draw(st.integers(0, 99)))
  stated = source_config(config, naming)
  shards, index = data.draw(st.tuples(st.integers(1, 3), st.booleans()))
  prefix = data.draw(st.sampled_from(['', 'module.', 'model.']))
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    public.write_checkpoint(
      folder / 'src', tensors, shards=shards, index=index, config=stated, prefix=prefix
    )
    plan = convert(folder / 'src', folder / 'out')
    assert (plan.naming, plan.source.prefix) == (naming, prefix)
    assert qwen.make_config(json.loads(json.dumps(plan.fields))['config']) == config

    reader = weights.Reader(folder / 'out')
    for path, x in flat(assemble(qwen.entries(config), tensors, naming)).items():
      assert public.same_bits(reader.row(path, None), x), path
    export_weights(folder / 'out', folder / 'back', shard_bytes=data.draw(st.integers(500, 5000)))
    back = public.read_tensors(folder / 'back')
    assert back.keys() == tensors.keys()
    assert all(public.same_bits(back[key], x) for key, x in tensors.items())
    assert json.loads((folder / 'back' / 'config.json').read_text()) == stated


@hypothesis.given(config=configs())
@hypothesis.settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_sizes_follow_from_shapes_and_config(config):
  for naming in ('diffusers',) if config.vision.layers else ('diffusers', 'original'):
    found = qwen.infer(shapes_of(config, naming), source_config(config, naming))
    assert found == (naming, fields_of(config))


@pytest.mark.parametrize('name', ['text_small', 'text_odd', 'vl_small', 'vl_odd'])
def test_the_state_dict_of_transformers_is_understood(name):
  """Keys and shapes that transformers' own classes wrote, and every value where it belongs."""
  with safetensors.safe_open(FIXTURES / f'qwen_{name}.safetensors', 'np') as file:
    stated = json.loads(file.metadata()['config'])
    tensors = {
      key.removeprefix('weights.'): file.get_tensor(key)
      for key in file.keys()
      if key.startswith('weights.')
    }
  shapes = {key: x.shape for key, x in tensors.items()}
  naming, fields = qwen.infer(shapes, stated)
  assert naming == ('original' if name.startswith('text') else 'diffusers')
  entries = qwen.model(json.loads(json.dumps(fields)))
  assert {e.key(naming): e.shape for e in entries} == shapes
  params = assemble(entries, tensors, naming)
  config = qwen.make_config(fields['config'])
  expected = jax.eval_shape(lambda: language.init_qwen(config, jax.random.key(0)))
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, expected)
  first = config.layer_types.index('linear')
  conv = tensors[f'{"model" if naming == "original" else "model.language_model"}.layers.{first}'
                 '.linear_attn.conv1d.weight']  # fmt: skip
  ours = params['text']['layers']['linear']['conv']['kernel'][0]
  assert np.array_equal(ours[1], conv[:, 0, 1]) and ours.shape == (conv.shape[2], conv.shape[0])
  if naming == 'diffusers':
    patch = tensors['model.visual.patch_embed.proj.weight']
    c, t, row, column = 2, 1, 0, 2
    _, _, frames, rows, columns = patch.shape
    where = ((c * frames + t) * rows + row) * columns + column
    ours = params['vision']['patch_embed']['kernel'][where]
    assert np.array_equal(ours, patch[:, c, t, row, column])


@pytest.mark.parametrize(
  'name, tensors, parameters, size',
  [
    ('qwen3_5_0_8b', 473, 852_985_920, 1_746_882_752),
    ('qwen3_5_9b', 760, 9_409_813_744, 19_306_216_416),
  ],
)
def test_public_sizes(name, tensors, parameters, size):
  config = presets.QWEN[name]
  shapes = shapes_of(config)
  assert (len(shapes), sum(map(math.prod, shapes.values()))) == (tensors, parameters)
  bytes_of = {key: dtype.itemsize for key, dtype in stored_dtypes(config, 'diffusers').items()}
  extra = multi_token_heads(config)
  total = sum(math.prod(shape) * bytes_of[key] for key, shape in shapes.items())
  assert total + 2 * sum(map(math.prod, extra.values())) == size and len(extra) == 15
  # Without config.json, the published values.
  assert qwen.infer(shapes | extra) == ('diffusers', fields_of(config))


def test_fields_are_read_wherever_a_version_of_transformers_put_them():
  nested = source_config(TINY)
  text = nested['text_config']
  rope = text.pop('rope_parameters')
  scaled = {'type': 'mrope', 'rope_type': 'default', 'mrope_section': rope['mrope_section']}
  flat_rope = {'rope_theta': 500, 'partial_rotary_factor': 1.0, 'rope_scaling': scaled}
  want = fields_of(dataclasses.replace(TINY, rope_theta=500.0, rotary=1.0))
  assert qwen.infer(shapes_of(TINY), nested | {'text_config': text | flat_rope})[1] == want
  assert qwen.infer(shapes_of(TINY), nested | flat_rope)[1] == want
  spread = nested | text | {'model_type': 'qwen3_5', 'rope_parameters': rope, 'text_config': None}
  assert qwen.infer(shapes_of(TINY), spread)[1] == fields_of(TINY)
  # Types of layers by their interval; patches by both sides.
  every = dataclasses.replace(TINY, layer_types=('linear', 'full') * 2)
  by_interval = source_config(every)
  del by_interval['text_config']['layer_types']
  by_interval['text_config']['full_attention_interval'] = 2
  by_interval['vision_config'] |= {'patch_size': [2, 2], 'temporal_patch_size': [3]}
  assert qwen.infer(shapes_of(every), by_interval)[1] == fields_of(every)
  assert qwen.infer(shapes_of(TINY), {k: v for k, v in nested.items() if k != 'model_type'})


@pytest.mark.parametrize(
  'section, field, value, words',
  [
    ('text_config', 'vocab_size', 41, 'vocab_size=41, but the tensors say 40'),
    ('text_config', 'hidden_size', 16, 'hidden_size=16, but the tensors say 12'),
    ('text_config', 'intermediate_size', 8, 'intermediate_size=8, but the tensors say 20'),
    ('text_config', 'num_hidden_layers', 4, 'num_hidden_layers=4, but the tensors have 3 layers'),
    ('text_config', 'num_attention_heads', 6, 'num_attention_heads=6, but the tensors say 3'),
    ('text_config', 'num_key_value_heads', 3, 'num_key_value_heads=3, but the tensors say 1'),
    ('text_config', 'head_dim', 4, 'head_dim=4, but the tensors say 8'),
    ('text_config', 'linear_num_value_heads', 2, 'linear_num_value_heads=2, but the tensors say 4'),
    ('text_config', 'linear_value_head_dim', 2, 'linear_value_head_dim=2, but the tensors say 5'),
    ('text_config', 'linear_conv_kernel_dim', 3, 'linear_conv_kernel_dim=3, but the tensors say 4'),
    ('text_config', 'linear_num_key_heads', 1, 'key_heads=1 times linear_key_head_dim=3'),
    ('text_config', 'layer_types', ['linear_attention'] * 3, "layer 1 is 'linear', but the"),
    ('text_config', 'hidden_act', 'gelu', "text_config.hidden_act: expected 'silu', got 'gelu'"),
    ('text_config', 'attn_output_gate', False, 'attn_output_gate: expected True, got False'),
    ('text_config', 'rope_parameters', {'rope_type': 'yarn'}, "'default', got 'yarn'"),
    ('text_config', 'rms_norm_eps', 'x', "rms_norm_eps: expected a number, got 'x'"),
    ('text_config', 'layer_types', ['moe'], 'linear_attention and full_attention, got'),
    ('vision_config', 'depth', 3, 'vision_config.depth=3, but the tensors say 2'),
    ('vision_config', 'hidden_size', 8, 'vision_config.hidden_size=8, but the tensors say 16'),
    ('vision_config', 'out_hidden_size', 8, 'out_hidden_size=8, but the tensors say 12'),
    ('vision_config', 'patch_size', 4, 'vision_config.patch_size=4, but the tensors say 2'),
    ('vision_config', 'spatial_merge_size', 2, 'spatial_merge_size=2, but the tensors say 3'),
    ('vision_config', 'deepstack_visual_indexes', [8], r'deepstack_visual_indexes: expected \[\]'),
  ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(section, field, value, words):
  stated = source_config(TINY)
  stated[section][field] = value
  with pytest.raises(ConfigError, match=words):
    qwen.infer(shapes_of(TINY), stated)


def test_tied_heads_and_towers_that_one_side_lacks():
  stated, shapes = source_config(TINY), shapes_of(TINY)
  tied = dataclasses.replace(TINY, tied=True)
  for config in (tied, TINY):
    unsaid = source_config(config)
    del unsaid['tie_word_embeddings'], unsaid['text_config']['tie_word_embeddings']
    for says in (unsaid, source_config(config)):
      assert qwen.infer(shapes_of(config), says)[1] == fields_of(config)
  with pytest.raises(ConfigError, match='tie_word_embeddings=False, but no tensor lm_head.weight'):
    qwen.infer(shapes_of(tied), stated)
  blind = dataclasses.replace(TINY, vision=BLIND)
  with pytest.raises(ConfigError, match=r'vision_config of depth 2, but no tensor model.visual'):
    qwen.infer(shapes_of(blind), stated)
  with pytest.raises(ConfigError, match=r'no vision_config, but there are tensors model.visual'):
    qwen.infer(shapes, source_config(blind))
  # The whole model's config beside the text-only class says nothing of its tensors.
  assert qwen.infer(shapes_of(blind, 'original'), stated)[1] == fields_of(blind)


def test_a_stored_copy_of_a_tied_head_is_an_alias(tmp_path):
  tied = dataclasses.replace(TINY, tied=True, vision=BLIND)
  for naming, embedding in (
    ('diffusers', 'model.language_model.embed_tokens.weight'),
    ('original', 'model.embed_tokens.weight'),
  ):
    tensors = checkpoint(tied, naming)
    tensors['lm_head.weight'] = tensors[embedding]
    src = tmp_path / naming
    public.write_checkpoint(src, tensors, config=source_config(tied, naming))
    plan = convert(src, tmp_path / f'{naming}_out')
    assert plan.statuses == {'lm_head.weight': 'alias'}
    manifest = weights.read_manifest(tmp_path / f'{naming}_out')
    assert manifest.keys['lm_head.weight']['of'] == embedding
    export_weights(tmp_path / f'{naming}_out', tmp_path / f'{naming}_back')
    back = public.read_tensors(tmp_path / f'{naming}_back')
    assert back.keys() == tensors.keys()
    public.write_checkpoint(src, tensors | {'lm_head.weight': tensors[embedding] * 2})
    with pytest.raises(CheckpointError, match=f'lm_head.weight: expected a copy of {embedding}'):
      make_plan(FAMILY, open_source(src))


@pytest.mark.parametrize(
  'extra, stated, words',
  [
    ({'model.language_model.layers.0.mlp.experts.gate_up_proj': (4, 8, 8)}, {}, 'mixture'),
    ({'model.language_model.layers.0.mlp.gate.weight': (4, 12)}, {}, 'mixture'),
    ({'model.visual.deepstack_merger_list.0.norm.weight': (4,)}, {}, 'Qwen3-VL'),
    ({'model.language_model.layers.0.linear_attn.in_proj_qkvz.weight': (4, 4)}, {}, 'Qwen3-Next'),
    ({'model.language_model.layers.1.self_attn.q_proj.bias': (48,)}, {}, 'Qwen2'),
    ({}, {'model_type': 'qwen3_5_moe'}, "model_type 'qwen3_5_moe' in config.json"),
    ({}, {'model_type': 'qwen3_vl'}, "model_type 'qwen3_vl'"),
  ],
)
def test_siblings_are_refused_by_what_was_found(extra, stated, words):
  with pytest.raises(ConfigError, match=f'dense Qwen3.5 checkpoint, found .*{words}') as caught:
    qwen.infer(shapes_of(TINY) | extra, source_config(TINY) | stated if stated else None)
  assert all(key in str(caught.value) for key in extra)


def test_plain_attention_and_other_models_are_refused():
  shapes = shapes_of(dataclasses.replace(TINY, layer_types=('full',), vision=BLIND), 'original')
  q = 'model.layers.0.self_attn.q_proj.weight'
  with pytest.raises(ConfigError, match='plain attention of Qwen3'):
    qwen.infer(shapes | {q: (24, 12)})
  with pytest.raises(ConfigError, match='not a Qwen3.5 checkpoint'):
    qwen.infer({'blocks.0.attn1.to_q.weight': (4, 4)})
  for unclear in (TINY, dataclasses.replace(TINY, vision=BLIND)):  # heads of the tower, of the keys
    with pytest.raises(ConfigError, match='no config.json beside the checkpoint, put it there'):
      qwen.infer(shapes_of(unclear))


@pytest.mark.parametrize('naming', ['diffusers', 'original'])
def test_wrong_keys_are_named_together(naming, tmp_path):
  config = TINY if naming == 'diffusers' else dataclasses.replace(TINY, vision=BLIND)
  tensors = checkpoint(config, naming)
  prefix = {'diffusers': 'model.language_model.', 'original': 'model.'}[naming]
  shapes = {key: x.shape for key, x in tensors.items()}
  missing = [f'{prefix}layers.2.linear_attn.A_log', f'{prefix}layers.0.mlp.up_proj.weight']
  misshaped = f'{prefix}layers.0.linear_attn.conv1d.weight'
  for key in missing:
    del tensors[key]
  tensors[misshaped] = tensors[misshaped][:, 0]
  tensors[f'{prefix}layers.0.mlp.up_proj.weight_scale_inv'] = np.ones((1, 1), np.float32)
  src = public.write_checkpoint(tmp_path / 'src', tensors, config=source_config(config, naming))
  with pytest.raises(CheckpointError) as caught:
    make_plan(FAMILY, open_source(src))
  lines = [
    *(f'{key}: missing; expected shape {shapes[key]}.' for key in missing),
    f'{misshaped}: expected shape {shapes[misshaped]}, got {shapes[misshaped][::2]}.',
    f'{prefix}layers.0.mlp.up_proj.weight_scale_inv: unexpected, got shape (1, 1)',
    '4 problems',
  ]
  for line in lines:
    assert line in str(caught.value)


def test_a_whole_model_leaves_its_vision_behind_under_the_text_only_names(tmp_path, capsys):
  tensors = checkpoint(TINY)
  extra = {
    key: np.ones(shape, ml_dtypes.bfloat16) for key, shape in multi_token_heads(TINY).items()
  }
  src = public.write_checkpoint(
    tmp_path / 'src', tensors | extra, shards=2, index=True, config=source_config(TINY)
  )
  public.write_tokenizer(src)
  assert cli.main(['convert', 'qwen', '--src', f'{src}', '--out', f'{tmp_path / "out"}']) == 0
  summary = json.loads(capsys.readouterr().out)
  assert (summary['component'], summary['ignored']) == ('vlm', 15)
  argv = ['--src', f'{tmp_path / "out"}', '--out', f'{tmp_path / "text"}', '--to', 'torch']
  assert cli.main(['convert', 'qwen', *argv, '--naming', 'original']) == 0
  visual = [key for key in tensors if key.startswith('model.visual.')]
  assert json.loads(capsys.readouterr().out)['left_out'] == len(visual)
  found = public.read_tensors(tmp_path / 'text')
  assert (tmp_path / 'text' / 'tokenizer.json').is_file()
  assert len(found) == len(tensors) - len(visual)
  for key, x in found.items():
    assert public.same_bits(x, tensors[key.replace('model.', 'model.language_model.')])
  plan = convert(tmp_path / 'text', tmp_path / 'again')
  assert plan.fields == fields_of(dataclasses.replace(TINY, vision=BLIND))


def test_a_reader_loads_the_text_of_a_whole_model(tmp_path):
  tensors = checkpoint(TINY)
  convert(
    public.write_checkpoint(tmp_path / 'src', tensors, config=source_config(TINY)), tmp_path / 'out'
  )
  blind = dataclasses.replace(TINY, vision=BLIND)
  target = jax.eval_shape(lambda: language.init_qwen(blind, jax.random.key(0)))
  params = weights.load(tmp_path / 'out', 'vlm', target, leave=('vision',))
  want = assemble(qwen.entries(blind), tensors)
  assert params.keys() == {'text'}
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)), params, want)
  with pytest.raises(CheckpointError, match='vision/merger/fc1/bias: expected absent'):
    weights.load(tmp_path / 'out', 'vlm', target)


def test_the_experiment_is_compared_with_both_of_its_models(tmp_path):
  blind = dataclasses.replace(TINY, vision=BLIND)
  sides = dict(staircase=dataclasses.replace(LanguageConfig().staircase, relay_depth=1))
  config = LanguageConfig(kind='qwen', vlm=TINY, reader=blind, image_size=(12, 12), **sides)
  tower = dataclasses.replace(TINY.vision, heads=1)
  other = dataclasses.replace(TINY, rope_theta=1e4, vision=tower)
  for fits in (TINY, blind, dataclasses.replace(TINY, dtype='float32', weights='x')):
    assert compare(FAMILY, fields_of(fits), config) == []
  problems = compare(FAMILY, fields_of(other), config)
  assert problems == [
    'language.vlm.rope_theta: expected 10000000.0 (the experiment), got 10000.0 (the checkpoint).',
    'language.vlm.vision.heads: expected 2 (the experiment), got 1 (the checkpoint).',
    'language.reader.rope_theta: expected 10000000.0 (the experiment), got 10000.0 (the '
    'checkpoint).',
  ]
  assert 'language.kind' in compare(FAMILY, fields_of(TINY), LanguageConfig())[0]


def test_a_trained_model_is_saved_loaded_and_exported(tmp_path):
  rng = np.random.default_rng(3)
  shapes = parameter_shapes(qwen.entries(TINY))
  params = nest({p: jnp.asarray(rng.standard_normal(s, np.float32)) for p, s in shapes.items()})
  tokenizer = public.write_tokenizer(tmp_path / 'from')
  out = tmp_path / 'saved'
  weights.save(out, 'vlm', 'qwen', fields_of(TINY), params, {'tokenizer.json': tokenizer})
  target = jax.eval_shape(lambda: params)
  loaded = weights.load(out, 'vlm', target)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert (out / 'tokenizer.json').read_bytes() == tokenizer.read_bytes()
  first = weights.digest(out)
  export_weights(out, tmp_path / 'torch')
  convert(tmp_path / 'torch', tmp_path / 'back')
  again = weights.load(tmp_path / 'back', 'vlm', target)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  with pytest.raises(CheckpointError, match='expected a new folder'):
    weights.save(out, 'vlm', 'qwen', fields_of(TINY), params)

  changed = flat(params)
  changed['text/norm/scale'] = changed['text/norm/scale'].at[0].add(1e-6)
  weights.save(tmp_path / 'b', 'vlm', 'qwen', fields_of(TINY), nest(changed), {
    'tokenizer.json': tokenizer
  })  # fmt: skip
  leaves = [weights.read_manifest(place).leaves for place in (out, tmp_path / 'b')]
  differ = [path for path in leaves[0] if leaves[0][path] != leaves[1][path]]
  assert differ == ['text/norm/scale'] and weights.digest(tmp_path / 'b') != first

  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  del half['vision']['positions']
  weights.save(tmp_path / 'c', 'vlm', 'qwen', fields_of(TINY), half)
  with pytest.raises(CheckpointError, match='these differ: vision/positions/embedding'):
    export_weights(tmp_path / 'c', tmp_path / 'x')
  with pytest.raises(ConfigError, match='no sharding rule'):
    weights.save(tmp_path / 'd', 'vlm', 'qwen', fields_of(TINY), {'stray': half['text']})
  assert not (tmp_path / 'd').exists() and not (tmp_path / 'x').exists()


@pytest.mark.parametrize('name', presets.QWEN)
def test_every_parameter_has_a_rule_and_every_rule_a_parameter(name):
  shapes = parameter_shapes(qwen.entries(dataclasses.replace(presets.QWEN[name], tied=False)))
  tree = nest({p: jax.ShapeDtypeStruct(s, np.float32) for p, s in shapes.items()})
  sizes = {'fsdp': 32, 'tensor': 8}
  mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
  check_rules(tree, mesh, MeshConfig().rules, QWEN_RULES)
  for path, shape in shapes.items():
    axes = logical_axes(f'vlm/{path}', len(shape), QWEN_RULES)
    is_stacked = '/layers/' in path or '/blocks/' in path
    assert (axes[0] == 'layers') == is_stacked
    big = math.prod(shape[is_stacked:]) > 2**17
    assert (len(set(axes) & {'embed', 'heads', 'mlp'}) > 0) == big or '/conv/' in path or (
      path.endswith(('/a/kernel', '/b/kernel'))
    ), path
    if '/layers/' in path:
      branch = 'staircase/' + path.removeprefix('text/')
      assert logical_axes(branch, len(shape), QWEN_LAYERS) == axes


def test_chunks_of_a_folder_follow_the_mesh():
  shapes = parameter_shapes(qwen.entries(presets.QWEN['qwen3_5_9b']))
  stacked = frozenset(p for p in shapes if '/layers/' in p or '/blocks/' in p)
  grids = weights.grids('vlm', shapes, dict.fromkeys(shapes, 2), stacked, {'fsdp': 8, 'tensor': 2})
  q = 'text/layers/full/q/kernel'
  assert shapes[q] == (8, 4096, 8192) and grids[q].chunk == (1, 512, 4096)
  assert grids['text/embed/embedding'].chunk[1] == 512
