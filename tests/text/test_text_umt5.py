"""Captions to features: against diffusers' Wan pipeline, from caches, on a mesh."""

import concurrent.futures
import dataclasses
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from wallwm_jax import presets, weights
from wallwm_jax.config import MeshConfig, TextConfig, UMT5Config
from wallwm_jax.convert.importer import find_tokenizer, import_weights
from wallwm_jax.convert.plan import FAMILIES, make_plan
from wallwm_jax.convert.source import open_source
from wallwm_jax.models import functional
from wallwm_jax.parallel import rules as sharding
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.text import umt5
from wallwm_jax.text.factory import make_text_encoder
from wallwm_jax.types import CheckpointError, path_string

DATA = pathlib.Path(__file__).parents[1] / 'fixtures' / 'data'


@dataclasses.dataclass
class Folder:
  """A converted checkpoint, what the Wan pipeline makes of captions with it, and the targets of
  every read of its weights.
  """

  config: TextConfig
  captions: list[str]
  want: np.ndarray
  loads: list


@pytest.fixture(scope='module', params=['small', 'odd'])
def converted(request, tmp_path_factory):
  """(weight folder, the fixture's metadata, tensors) by the path of `wallwm convert umt5`."""
  fixture = DATA / f'umt5_{request.param}.safetensors'
  meta = json.loads(safe_open(fixture, 'np').metadata()['config'])
  tensors = load_file(fixture)
  root = tmp_path_factory.mktemp(request.param)
  (root / 'text_encoder').mkdir()
  (root / 'tokenizer').mkdir()
  state = {k.removeprefix('weights.'): x for k, x in tensors.items() if 'weights.' in k}
  save_file(state, root / 'text_encoder' / 'model.safetensors')
  (root / 'text_encoder' / 'config.json').write_text(json.dumps(meta))
  shutil.copy(DATA / 'umt5_tokenizer.json', root / 'tokenizer' / 'tokenizer.json')
  source = open_source(root, FAMILIES['umt5'].subfolder)
  plan = make_plan(FAMILIES['umt5'], source)
  import_weights(plan, root / 'weights', {}, find_tokenizer(source, None)[0])
  return root / 'weights', meta, tensors


@pytest.fixture
def folder(converted, tmp_path, monkeypatch) -> Folder:
  place, meta, tensors = converted
  stored = weights.read_manifest(place).fields['config']
  config = TextConfig(**stored | {'umt5': UMT5Config(**stored['umt5'])})
  config = dataclasses.replace(
    config,
    tokens=meta['pipeline_tokens'],
    umt5=dataclasses.replace(config.umt5, dtype='float32'),
    weights=str(place),
    cache=str(tmp_path / 'cache'),
  )
  loads, load = [], weights.load

  def count(path, component, target):
    loads.append(target)
    return load(path, component, target)

  monkeypatch.setattr(weights, 'load', count)
  return Folder(config, meta['captions'], tensors['outputs.prompt_embeds'], loads)


def _encode(config, captions, **kwargs):
  with jax.default_matmul_precision('highest'):
    return make_text_encoder(config, **kwargs).encode(captions)


def test_features_match_the_wan_pipeline(folder):
  text = _encode(folder.config, folder.captions)
  assert text.features.dtype == np.float32
  worst = np.abs(text.features - folder.want).max()
  print(f'max {worst:.2e}')
  assert worst <= 5e-5 * max(1.0, np.sqrt(np.square(folder.want).mean()))
  np.testing.assert_array_equal(text.features == 0, folder.want == 0)
  assert text.mask.all() and text.mask.shape == text.features.shape[:2]
  # The null prompt: </s> alone.
  assert folder.captions[0] == '' and text.features[0, 0].any() and not text.features[0, 1:].any()


def test_no_captions_are_no_rows(folder):
  text = make_text_encoder(folder.config).encode([])
  assert text.features.shape == (0, folder.config.tokens, folder.config.width)
  assert len(folder.loads) == 0


def test_threads_share_one_encoder(folder):
  encoder = make_text_encoder(folder.config)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    texts = list(pool.map(encoder.encode, [folder.captions] * 4))
  for text in texts[1:]:
    np.testing.assert_array_equal(text.features, texts[0].features)
  assert len(folder.loads) == 1


def test_weights_are_read_once_and_only_for_new_captions(folder):
  encoder = make_text_encoder(folder.config)
  assert len(folder.loads) == 0
  first = encoder.encode(folder.captions)
  encoder.encode([*folder.captions, 'another one'])
  assert len(folder.loads) == 1
  again = make_text_encoder(folder.config)
  np.testing.assert_array_equal(again.encode(folder.captions).features, first.features)
  assert len(folder.loads) == 1
  again.encode(['a third'])
  again.release()
  again.encode(['a third', 'a fourth'])
  assert len(folder.loads) == 3


def test_a_filled_cache_needs_no_weights(folder, monkeypatch):
  want = _encode(folder.config, folder.captions)
  alone = dataclasses.replace(folder.config, weights='')
  for name in ('init_text', 'encode_tokens'):
    monkeypatch.setattr(functional, name, lambda *_: pytest.fail('the encoder was touched'))
  for path in pathlib.Path(alone.cache).rglob('*'):
    path.chmod(0o555 if path.is_dir() else 0o444)
  got = _encode(alone, [f'  {caption}\n' for caption in folder.captions])
  np.testing.assert_array_equal(got.features, want.features)
  with pytest.raises(CheckpointError, match="1 of 2 captions, 'unseen' first.*wallwm convert umt5"):
    _encode(alone, [folder.captions[1], 'unseen'])
  moved = dataclasses.replace(alone, weights='/nowhere', umt5=folder.config.umt5)
  np.testing.assert_array_equal(_encode(moved, folder.captions).features, want.features)
  other = dataclasses.replace(alone, umt5=dataclasses.replace(alone.umt5, eps=1e-2))
  with pytest.raises(CheckpointError, match='6 of 6 captions'):
    _encode(other, folder.captions)


def test_without_weights_or_cache_the_error_says_what_to_run():
  config = TextConfig(kind='umt5')
  with pytest.raises(CheckpointError, match='wallwm convert umt5 --src SRC --out DIR'):
    make_text_encoder(config).encode(['a'])


def test_other_weights_and_damaged_entries_are_encoded_again(folder, tmp_path):
  want = _encode(folder.config, folder.captions).features
  for path in pathlib.Path(folder.config.cache).rglob('*.features'):
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
  np.testing.assert_array_equal(_encode(folder.config, folder.captions).features, want)
  assert len(folder.loads) == 2
  other = tmp_path / 'weights'
  shutil.copytree(folder.config.weights, other)
  manifest = weights.read_manifest(other)
  leaves = manifest.leaves | {'norm/scale': manifest.leaves['norm/scale'] | {'sha256': 'tuned'}}
  weights.write_manifest(other, dataclasses.replace(manifest, leaves=leaves))
  _encode(dataclasses.replace(folder.config, weights=str(other)), folder.captions)
  assert len(folder.loads) == 3
  assert len(list(pathlib.Path(folder.config.cache).glob('*/encoder.json'))) == 2


def test_a_caption_does_not_depend_on_its_neighbours_nor_on_the_cache(folder):
  config = dataclasses.replace(
    folder.config,
    tokens=150,
    cache='',
    umt5=dataclasses.replace(folder.config.umt5, dtype='bfloat16'),
  )
  long = ' '.join(folder.captions[3:4] * 3)
  captions = [*folder.captions, long, *(f'push {n}' for n in range(9))]
  together = _encode(config, captions)
  for n in (1, 3, 6, 12):
    np.testing.assert_array_equal(_encode(config, [captions[n]]).features[0], together.features[n])
  # Every value is one that the cache can hold.
  rounded = together.features.astype(ml_dtypes.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(rounded, together.features)
  cached = dataclasses.replace(config, cache=folder.config.cache)
  for _ in range(2):
    np.testing.assert_array_equal(_encode(cached, captions).features, together.features)


def test_one_trace_serves_captions_of_usual_length(folder, monkeypatch):
  traces = []
  encode_tokens = functional.encode_tokens

  def count(params, text, ids, mask):
    traces.append(ids.shape)
    return encode_tokens(params, text, ids, mask)

  monkeypatch.setattr(functional, 'encode_tokens', count)
  encoder = make_text_encoder(dataclasses.replace(folder.config, tokens=512, cache=''))
  for n in (1, 3, 20):
    encoder.encode([f'open drawer {n} {i}' for i in range(n)])
  assert traces == [(8, 64)]
  encoder.encode(['drawer ' * 100, 'a'])
  assert traces == [(8, 64), (8, 128)]


@pytest.mark.parametrize(
  ('count', 'tokens', 'want'),
  [(1, 512, 64), (64, 512, 64), (65, 512, 128), (512, 512, 512), (400, 450, 450), (3, 16, 16)],
)
def test_length_of_a_call(count, tokens, want):
  assert umt5._call_length(count, tokens) == want


def test_weights_are_kept_in_the_dtype_of_the_matmuls(folder):
  config = dataclasses.replace(
    folder.config, umt5=dataclasses.replace(folder.config.umt5, dtype='bfloat16')
  )
  text = _encode(config, folder.captions)
  (target,) = folder.loads
  got = {path_string(p): x.dtype for p, x in jax.tree_util.tree_leaves_with_path(target)}
  small = {'blocks/attn_norm/scale', 'blocks/ffn_norm/scale', 'norm/scale'}
  small |= {'blocks/rel_bias/embedding'}
  assert {path for path, dtype in got.items() if dtype == np.float32} == small
  assert {got[path] for path in got.keys() - small} == {np.dtype(ml_dtypes.bfloat16)}
  flat, want = text.features.ravel(), folder.want.ravel()
  assert flat @ want / np.linalg.norm(flat) / np.linalg.norm(want) > 0.999


def test_weights_of_another_size_are_refused(folder):
  wrong = dataclasses.replace(
    folder.config, umt5=dataclasses.replace(folder.config.umt5, eps=0.5, max_distance=99)
  )
  with pytest.raises(CheckpointError, match='max_distance: expected 99, got .*eps: expected 0.5'):
    _encode(wrong, ['a'])
  assert len(folder.loads) == 0


def test_every_parameter_of_xxl_has_a_rule_and_every_rule_a_parameter():
  shapes = jax.eval_shape(lambda: functional.init_text(presets.UMT5_XXL, jax.random.key(0)))
  mesh, rules = make_mesh(MeshConfig(fsdp=2, tensor=4)), MeshConfig().rules
  sharding.check_rules(shapes, mesh, rules, sharding.UMT5_RULES)


@pytest.mark.parametrize('converted', ['small'], indirect=True)
def test_a_mesh_gives_the_same_features_and_holds_parts(folder):
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
  encoder = make_text_encoder(
    dataclasses.replace(folder.config, cache=''), mesh=mesh, rules=MeshConfig().rules
  )
  with jax.default_matmul_precision('highest'):
    text = encoder.encode(folder.captions)
  np.testing.assert_allclose(text.features, folder.want, atol=5e-5)
  leaves = jax.tree.leaves(encoder._params)
  held = sum(x.addressable_shards[0].data.size for x in leaves)
  assert held < 0.2 * sum(x.size for x in leaves)
