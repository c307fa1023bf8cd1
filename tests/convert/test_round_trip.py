"""Conversion there and back: the values of `assemble`, and every byte of the source again."""

import json
import pathlib
import tempfile

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import public_files as public
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from wallwm_jax import weights
from wallwm_jax.config import MeshConfig
from wallwm_jax.convert.entries import assemble
from wallwm_jax.convert.exporter import export_weights
from wallwm_jax.convert.importer import find_tokenizer, import_weights
from wallwm_jax.convert.plan import FAMILIES, make_plan
from wallwm_jax.convert.source import open_source
from wallwm_jax.convert.torch_config import torch_config
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.types import CheckpointError, nest, path_string


def convert(family, src, out, mesh=None):
  source = open_source(src, FAMILIES[family].subfolder)
  plan = make_plan(FAMILIES[family], source)
  tokenizer = find_tokenizer(source, None)[0] if FAMILIES[family].tokenizer else None
  import_weights(plan, out, mesh or {}, tokenizer)
  return plan


def stored(path):
  """The whole tree as plain Orbax reads it, without this project's reader."""
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.restore(pathlib.Path(path).absolute() / 'params')
  return {path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def expected(plan, tensors, leaves):
  """`assemble` of the source, its rows in the dtype the leaf was stored with."""
  entries = list(plan.used.values())
  casts = {}
  for entry in entries:
    key = entry.key(plan.naming)
    casts[key] = tensors[key].astype(leaves[entry.path].dtype)
  tree = assemble(entries, casts, plan.naming)
  return {path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
@pytest.mark.parametrize('family', public.FIELDS)
@hypothesis.given(data=st.data())
@hypothesis.settings(
  max_examples=6,
  deadline=None,
  database=None,
  derandomize=True,
  phases=[hypothesis.Phase.generate],  # shrinking would convert hundreds of models
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
def test_any_model_comes_back_bit_for_bit(family, data):
  fields = data.draw(public.FIELDS[family]())
  naming = data.draw(st.sampled_from(['diffusers', 'original']))
  component = FAMILIES[family].component
  tensors = public.random_tensors(
    family,
    fields,
    naming,
    seed=data.draw(st.integers(0, 99)),
    dtypes=data.draw(st.sampled_from([('F32',), ('BF16',), ('F32', 'BF16'), tuple(public.DTYPES)])),
  )
  shards, index = data.draw(st.tuples(st.integers(1, 4), st.booleans()))
  prefix = data.draw(st.sampled_from(['', 'model.', 'model.diffusion_model.']))
  config = torch_config(component, fields, naming)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    public.write_checkpoint(
      folder / 'src', tensors, shards=shards, index=index, config=config, prefix=prefix
    )
    public.write_tokenizer(folder / 'src')
    plan = convert(family, folder / 'src', folder / 'out')
    assert plan.naming == naming
    assert json.loads(json.dumps(plan.fields)) == json.loads(json.dumps(fields))

    leaves = stored(folder / 'out')
    for path, x in expected(plan, tensors, leaves).items():
      assert public.same_bits(leaves.pop(path), x), path
    assert not leaves

    limit = data.draw(st.sampled_from([2000, 10**9]))
    export_weights(folder / 'out', folder / 'back', shard_bytes=limit)
    back = public.read_tensors(folder / 'back')
    assert back.keys() == tensors.keys()
    for key, x in tensors.items():
      assert public.same_bits(back[key], x), key
    assert json.loads((folder / 'back' / 'config.json').read_text()) == config


@pytest.mark.parametrize('family', public.SMALL)
@pytest.mark.parametrize('start', ['diffusers', 'original'])
def test_either_naming_gives_the_same_weights_and_the_other_naming(family, start, tmp_path):
  other = {'diffusers': 'original', 'original': 'diffusers'}[start]
  src, tensors = public.small_checkpoint(tmp_path / 'src', family, start)
  convert(family, src, tmp_path / 'a')
  export_weights(tmp_path / 'a', tmp_path / 'renamed', naming=other)
  public.write_tokenizer(tmp_path / 'renamed')
  renamed = public.read_tensors(tmp_path / 'renamed')
  assert renamed.keys() != tensors.keys() and len(renamed) == len(tensors)
  convert(family, tmp_path / 'renamed', tmp_path / 'b')
  assert weights.digest(tmp_path / 'a') == weights.digest(tmp_path / 'b')
  export_weights(tmp_path / 'b', tmp_path / 'again', naming=start)
  again = public.read_tensors(tmp_path / 'again')
  assert again.keys() == tensors.keys()
  assert all(public.same_bits(again[key], x) for key, x in tensors.items())


@pytest.mark.parametrize('axes', [{'fsdp': 4, 'tensor': 2}, {'fsdp': 2, 'context': 4}, {}])
def test_plain_orbax_restores_onto_a_mesh_of_eight(axes, tmp_path, monkeypatch):
  monkeypatch.setattr(weights.chunks, 'SMALL_BYTES', 500)
  mesh = make_mesh(MeshConfig(**(axes or {'fsdp': 8})))
  src, tensors = public.small_checkpoint(tmp_path / 'src', 'wan-dit', shards=3, index=True)
  plan = convert('wan-dit', src, tmp_path / 'out', axes)
  shapes = {path: leaf.shape for path, leaf in plan.leaves({}).items()}
  want = expected(plan, tensors, plan.leaves({}))

  def place(shape):
    """Splits the last two axes wherever they divide."""
    sizes = {'fsdp': axes.get('fsdp', 8), 'tensor': axes.get('tensor', 1)}
    spec = [None] * len(shape)
    for axis, name in zip(range(len(shape) - 1, -1, -1), sizes):
      spec[axis] = name if shape[axis] % sizes[name] == 0 else None
    return NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

  target = {p: jax.ShapeDtypeStruct(s, np.float32, sharding=place(s)) for p, s in shapes.items()}
  tree = nest(target)
  with ocp.StandardCheckpointer() as reader:
    plain = reader.restore(tmp_path / 'out' / 'params', tree)
  ours = weights.load(tmp_path / 'out', 'video', tree)
  for result in (plain, ours):
    leaves = {path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(result)}
    assert leaves.keys() == want.keys()
    for path, x in leaves.items():
      assert x.sharding == target[path].sharding, path
      assert np.array_equal(np.asarray(x), want[path]), path


def test_load_casts_to_the_target_and_needs_no_sharding(tmp_path):
  src, tensors = public.small_checkpoint(tmp_path / 'src', 'umt5')
  plan = convert('umt5', src, tmp_path / 'out')
  target = {
    p: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for p, leaf in plan.leaves({}).items()
  }
  params = weights.load(tmp_path / 'out', 'text', nest(target))
  want = tensors['shared.weight'].astype(jnp.bfloat16)
  assert public.same_bits(np.asarray(params['embed']['embedding']), want)


def test_second_names_come_back_with_their_naming_only(tmp_path):
  src, tensors = public.small_checkpoint(tmp_path / 'one', 'umt5')
  alias = 'encoder.embed_tokens.weight'
  both = tensors | {alias: tensors['shared.weight'], 'decoder.final.weight': np.ones(3)}
  public.write_checkpoint(tmp_path / 'both', both)
  only = {alias if key == 'shared.weight' else key: x for key, x in tensors.items()}
  public.write_checkpoint(tmp_path / 'only', only)
  for name, status in (('both', 'alias'), ('only', 'used')):
    public.write_tokenizer(tmp_path / name)
    convert('umt5', tmp_path / name, tmp_path / f'{name}_out')
    manifest = weights.read_manifest(tmp_path / f'{name}_out')
    assert manifest.keys[alias]['status'] == status
    export_weights(tmp_path / f'{name}_out', tmp_path / f'{name}_back')
    back = public.read_tensors(tmp_path / f'{name}_back')
    source = both if name == 'both' else only
    assert back.keys() == source.keys() - {'decoder.final.weight'}
    assert public.same_bits(back[alias], tensors['shared.weight'])
    export_weights(tmp_path / f'{name}_out', tmp_path / f'{name}_orig', naming='original')
    assert len(public.read_tensors(tmp_path / f'{name}_orig')) == len(tensors)
  ignored = weights.read_manifest(tmp_path / 'both_out').keys['decoder.final.weight']
  assert ignored['status'] == 'ignored' and len(ignored['sha256']) == 64


def test_the_manifest_accounts_for_every_key_and_byte(tmp_path):
  import hashlib

  src, tensors = public.small_checkpoint(tmp_path / 'src', 'wan-dit', shards=2, prefix='model.')
  plan = convert('wan-dit', src, tmp_path / 'out', {'fsdp': 2})
  manifest = weights.read_manifest(tmp_path / 'out')
  assert manifest.keys.keys() == tensors.keys() and manifest.prefix == 'model.'
  for key, x in tensors.items():
    row = manifest.keys[key]
    assert row['sha256'] == hashlib.sha256(x.tobytes()).hexdigest()
    assert (row['dtype'], tuple(row['shape']), row['status']) == ('F32', x.shape, 'used')
    assert ('reshaped' in row) == (x.ndim > 1)
  for file in src.glob('*.safetensors'):
    data = file.read_bytes()
    assert manifest.files[file.name] == {
      'size': len(data),
      'sha256': hashlib.sha256(data).hexdigest(),
    }
  assert {p: tuple(leaf['shape']) for p, leaf in manifest.leaves.items()} == {
    p: leaf.shape for p, leaf in plan.leaves({}).items()
  }
  assert manifest.counts()['used'] == len(tensors) and manifest.mesh == {'fsdp': 2}


def test_a_changed_value_changes_the_digest(tmp_path):
  src, tensors = public.small_checkpoint(tmp_path / 'src', 'wan-vae')
  convert('wan-vae', src, tmp_path / 'a')
  key = next(iter(tensors))
  tensors[key] = np.nextafter(tensors[key], np.float32(9))
  config = json.loads((src / 'config.json').read_text())
  public.write_checkpoint(tmp_path / 'other', tensors, config=config)
  convert('wan-vae', tmp_path / 'other', tmp_path / 'b')
  assert weights.digest(tmp_path / 'a') != weights.digest(tmp_path / 'b')


def test_damaged_values_are_named_and_not_exported(tmp_path):
  src, _ = public.small_checkpoint(tmp_path / 'src', 'wan-dit')
  convert('wan-dit', src, tmp_path / 'out')
  manifest = weights.read_manifest(tmp_path / 'out')
  key = 'blocks.1.ffn.net.2.weight'
  manifest.keys[key]['sha256'] = '0' * 64
  weights.write_manifest(tmp_path / 'out', manifest)
  with pytest.raises(CheckpointError, match=rf'{key}: expected sha256 0000'):
    export_weights(tmp_path / 'out', tmp_path / 'back')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'src']
  chunk = next((tmp_path / 'out' / 'params' / 'head.kernel').rglob('c/*/*'))
  data = bytearray(chunk.read_bytes())
  data[len(data) // 2] ^= 1
  chunk.write_bytes(data)
  with pytest.raises(CheckpointError, match='head/kernel.*cannot be read'):
    export_weights(tmp_path / 'out', tmp_path / 'back')
