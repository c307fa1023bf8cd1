"""Weight folders: chunks that follow a mesh, streaming, and what is refused on load."""

import json
import math

import jax
import numpy as np
import pytest

from wallwm_jax import weights
from wallwm_jax.config import MeshConfig
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.parallel.rules import param_shardings
from wallwm_jax.types import CheckpointError, ConfigError, nest
from wallwm_jax.weights import chunks

SHAPES = {
  'blocks/self_attn/q/kernel': (3, 16, 32),
  'blocks/ffn/down/kernel': (3, 64, 16),
  'blocks/modulation': (3, 6, 16),
  'head/kernel': (16, 12),
  'time_in/bias': (16,),
}
STACKED = frozenset(path for path in SHAPES if path.startswith('blocks/'))


def make_folder(path, mesh=None, component='video', order=1):
  """A weight folder of SHAPES and its values."""
  rng = np.random.default_rng(0)
  values = {p: rng.standard_normal(s).astype(np.float32) for p, s in SHAPES.items()}
  grids = weights.grids(component, SHAPES, dict.fromkeys(SHAPES, 4), STACKED, mesh or {})
  leaves = {p: weights.Leaf(p, x.shape, x.dtype, grids[p]) for p, x in values.items()}

  def parts():
    for p, x in values.items():
      if p in STACKED:
        for layer in range(len(x))[::order]:
          yield from weights.parts_of(leaves[p], x[layer], layer)
      else:
        yield from weights.parts_of(leaves[p], x, None)

  path.mkdir()
  weights.write(path / weights.PARAMS, leaves.values(), parts())
  table = {p: {'shape': list(s), 'dtype': 'float32', 'sha256': p} for p, s in SHAPES.items()}
  manifest = weights.Manifest(component, 'wan-dit', 'diffusers', {}, table, {}, {})
  weights.write_manifest(path, manifest)
  return values


def target(**changes):
  shapes = {p: s for p, s in (SHAPES | changes).items() if s is not None}
  return nest({p: jax.ShapeDtypeStruct(s, np.float32) for p, s in shapes.items()})


@pytest.mark.parametrize('small', [0, 10**6])
@pytest.mark.parametrize('axes', [{'fsdp': 8}, {'fsdp': 2, 'tensor': 4}, {'tensor': 8}])
def test_chunks_divide_the_shards_of_the_mesh(axes, small, monkeypatch):
  monkeypatch.setattr(chunks, 'SMALL_BYTES', small)
  monkeypatch.setattr(chunks, 'BLOCK_BYTES', 1024)
  grids = weights.grids('video', SHAPES, dict.fromkeys(SHAPES, 4), STACKED, axes)
  mesh = make_mesh(MeshConfig(**axes))
  tree = {'video': target()}
  leaves = jax.tree.leaves(param_shardings(tree, mesh, MeshConfig().rules))
  paths = sorted(SHAPES, key=lambda p: p.split('/'))
  for path, sharding in zip(paths, leaves, strict=True):
    shard = sharding.shard_shape(SHAPES[path])
    grid = grids[path]
    assert all(s % c == 0 for s, c in zip(shard, grid.chunk)), (path, shard, grid)
    assert all(b % c == 0 for b, c in zip(grid.block, grid.chunk)), (path, grid)
    assert math.prod(grid.block) * 4 <= 1024
    if small == 0 and path in STACKED:
      assert grid.block[0] == 1


def test_blocks_tile_an_array_exactly_once():
  seen = np.zeros((5, 7, 3), int)
  for box in chunks.boxes(seen.shape, (2, 3, 3)):
    seen[box] += 1
  assert (seen == 1).all()


def test_a_mesh_is_read_from_words():
  assert weights.parse_mesh('fsdp=8,tensor=2') == {'fsdp': 8, 'tensor': 2}
  assert weights.parse_mesh('') == {}
  for bad in ('fdsp=8', 'fsdp', 'fsdp=0', 'fsdp=-1', 'fsdp=2,fsdp=4', 'fsdp=x'):
    with pytest.raises(ConfigError, match='fsdp=8,tensor=2'):
      weights.parse_mesh(bad)


@pytest.mark.parametrize('order', [1, -1])
def test_streams_in_any_order_of_layers_store_the_same_values(order, tmp_path, monkeypatch):
  monkeypatch.setattr(chunks, 'BLOCK_BYTES', 512)
  monkeypatch.setattr(chunks, 'SMALL_BYTES', 1200)
  values = make_folder(tmp_path / 'w', {'fsdp': 4}, order=order)
  reader = weights.Reader(tmp_path / 'w')
  for path, x in values.items():
    if path in STACKED:
      assert np.array_equal(reader.row(path, 1), x[1])
    assert np.array_equal(reader.row(path, None), x)


def test_a_stream_that_does_not_cover_a_leaf_is_refused(tmp_path):
  leaf = weights.Leaf('a', (4, 2), np.dtype(np.float32), weights.Grid((2, 2), (2, 2)))
  part = ('a', (slice(0, 2), slice(0, 2)), np.zeros((2, 2), np.float32))
  with pytest.raises(CheckpointError, match='a: expected 8 values, got 4'):
    weights.write(tmp_path / 'params', [leaf], [part])


def test_a_missing_layer_is_an_error_and_never_zeros(tmp_path, monkeypatch):
  monkeypatch.setattr(chunks, 'SMALL_BYTES', 0)
  make_folder(tmp_path / 'w')
  folder = tmp_path / 'w' / 'params' / 'blocks.self_attn.q.kernel'
  lost = folder / 'c' / '1' / '0' / '0'
  lost.unlink()
  with pytest.raises(CheckpointError, match=r'self_attn/q/kernel.*cannot be read'):
    weights.Reader(tmp_path / 'w').row('blocks/self_attn/q/kernel', 1)


@pytest.mark.parametrize('damage', ['flip', 'cut', 'lose'])
def test_damaged_bytes_are_refused_on_load(damage, tmp_path):
  leaf = weights.Leaf('a', (64,), np.dtype(np.float32), weights.Grid((64,), (64,)))
  x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
  weights.write(tmp_path / 'params', [leaf], [('a', (slice(0, 64),), x)])
  table = {'a': {'shape': [64], 'dtype': 'float32', 'sha256': ''}}
  manifest = weights.Manifest('video', 'wan-dit', 'original', {}, table, {}, {})
  weights.write_manifest(tmp_path, manifest)
  want = {'a': jax.ShapeDtypeStruct((64,), np.float32)}
  assert np.array_equal(weights.load(tmp_path, 'video', want)['a'], x)
  chunk = next((tmp_path / 'params' / 'a' / 'c').iterdir())
  data = bytearray(chunk.read_bytes())
  data[100] ^= 1
  if damage == 'lose':
    chunk.unlink()
  else:
    chunk.write_bytes(data if damage == 'flip' else data[:-5])
  with pytest.raises(CheckpointError, match='cannot be read'):
    weights.load(tmp_path, 'video', want)


def test_load_names_every_parameter_that_differs(tmp_path):
  make_folder(tmp_path / 'w')
  changed = {
    'head/kernel': (16, 13),
    'time_in/bias': None,
    'time_out/bias': (16,),
    'blocks/modulation': (4, 6, 16),
  }
  with pytest.raises(CheckpointError) as caught:
    weights.load(tmp_path / 'w', 'video', target(**changed))
  for line in (
    '4 parameters differ',
    'blocks/modulation: expected (4, 6, 16), got (3, 6, 16)',
    'head/kernel: expected (16, 13), got (16, 12)',
    'time_in/bias: expected absent, got (16,)',
    'time_out/bias: expected (16,), got absent',
  ):
    assert line in str(caught.value)
  with pytest.raises(CheckpointError, match='expected weights of the text component, got video'):
    weights.load(tmp_path / 'w', 'text', target())


def test_folders_that_are_none_and_manifests_that_are_damaged(tmp_path, monkeypatch):
  assert not weights.is_weights(tmp_path)
  with pytest.raises(CheckpointError, match='wallwm convert'):
    weights.read_manifest(tmp_path)
  file = tmp_path / 'manifest.json'
  for text, word in (('{', 'damaged'), ('{"format": 1}', 'damaged'), ('{"format": 7}', 'got 7')):
    file.write_text(text)
    assert weights.is_weights(tmp_path)
    with pytest.raises(CheckpointError, match=word):
      weights.read_manifest(tmp_path)
  monkeypatch.chdir(tmp_path)
  assert not weights.is_weights('')  # an empty setting, wherever the run is started


def test_the_digest_knows_values_and_tokenizer_but_not_the_mesh(tmp_path):
  make_folder(tmp_path / 'w')
  first = weights.digest(tmp_path / 'w')
  file = tmp_path / 'w' / 'manifest.json'
  values = json.loads(file.read_text())
  file.write_text(json.dumps(values | {'mesh': {'fsdp': 8}, 'naming': 'original'}))
  assert weights.digest(tmp_path / 'w') == first
  file.write_text(json.dumps(values | {'files': {'tokenizer.json': {'size': 1, 'sha256': 'x'}}}))
  assert weights.digest(tmp_path / 'w') != first
  values['leaves']['head/kernel']['sha256'] = 'other'
  file.write_text(json.dumps(values))
  assert weights.digest(tmp_path / 'w') != first
