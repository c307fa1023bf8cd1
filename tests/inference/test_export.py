"""Exported policies: same numbers, no model code, and refusals."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.data import stats as data_stats
from wallwm_jax.inference.event import predict_event
from wallwm_jax.inference.export import export_policy, flatten
from wallwm_jax.inference.exported import load_exported, stats_hash
from wallwm_jax.types import (
  CheckpointError,
  DataError,
  InferenceParams,
  Language,
  StatsMismatchError,
  nest,
)

KEY = jax.random.key(11)


@pytest.fixture(scope='module')
def exported(cfg, params, tmp_path_factory):
  """A policy exported from a run that also has a language side."""
  path = tmp_path_factory.mktemp('policy')
  nothing = np.zeros(1)
  frozen = dataclasses.replace(params.frozen, language=Language({}, {}, nothing, nothing, nothing))
  whole = InferenceParams(params.model | {'heads': {'kernel': nothing}}, frozen)
  export_policy(cfg, whole, path, batch_size=2, bucket=2)
  return path


@pytest.fixture
def copy(exported, tmp_path):
  return shutil.copytree(exported, tmp_path / 'copy')


def boundary(obs, text, **extra):
  inputs = {'frames': obs.frames, 'state': obs.state, 'view_mask': obs.view_mask,
            'text_features': text.features, 'text_mask': text.mask,
            'key': jax.random.key_data(KEY), **extra}
  return {name: np.asarray(value) for name, value in inputs.items()}


def assert_same(outputs, prediction):
  np.testing.assert_allclose(outputs['actions'], prediction.chunk.actions, atol=1e-5)
  np.testing.assert_allclose(outputs['latents'], prediction.latents, atol=1e-4)
  np.testing.assert_array_equal(outputs['action_mask'], prediction.chunk.mask)
  np.testing.assert_array_equal(outputs['latent_mask'], prediction.mask)


@pytest.mark.slow
def test_exported_equals_live(cfg, params, exported, make_inputs, predict_chunk):
  policy = load_exported(exported, params.norm)
  length = jnp.array([1, 2], jnp.int32)
  obs, text = make_inputs()
  predict = jax.jit(functools.partial(predict_event, cfg=cfg, bucket=2))
  live = predict(params, obs, text, KEY, length=length)
  assert_same(policy.event(boundary(obs, text, length=length)), live)
  obs, text = make_inputs(frames=5)
  assert_same(policy.unified(boundary(obs, text)), predict_chunk(params, obs, text, KEY))


def test_what_makes_text_stays_out(params, exported):
  with np.load(exported / 'weights.npz') as stored:
    parts = {tuple(name.split('/')[:2]) for name in stored.files}
  norm = {('norm', field.name) for field in dataclasses.fields(params.norm)}
  assert parts == {('model', 'video'), ('model', 'action')} | norm


def test_signature_describes_the_boundary(exported):
  signature = json.loads((exported / 'signature.json').read_text())
  event = signature['functions']['event']
  frames = event['inputs']['frames']
  assert (frames['shape'], frames['dtype']) == ([2, 2, 1, 16, 16, 3], 'uint8')
  assert event['outputs']['actions']['shape'] == [2, 8, 10]
  assert signature['action_groups']['gripper'] == [9]
  assert signature['config']['model']['views'] == ['front', 'wrist']


_LOADER = """
import sys
import numpy as np
from wallwm_jax.inference.exported import load_exported
policy = load_exported(sys.argv[1])
specs = policy.signature['functions']['event']['inputs']
inputs = {name: np.zeros(s['shape'], s['dtype']) for name, s in specs.items()}
actions = np.asarray(policy.event(inputs)['actions'])
assert actions.shape == (2, 8, 10) and np.isfinite(actions).all()
heavy = [m for m in sys.modules if m.split('.')[0] in ('flax', 'optax', 'ml_collections')
         or m.startswith(('wallwm_jax.models', 'wallwm_jax.diffusion', 'wallwm_jax.config'))]
assert not heavy, heavy
print('loaded without model code')
"""


@pytest.mark.slow
def test_loads_without_model_code(exported):
  result = subprocess.run([sys.executable, '-c', _LOADER, str(exported)], capture_output=True,
                          text=True, timeout=300)
  assert result.returncode == 0 and 'loaded without model code' in result.stdout, result.stderr


def test_other_statistics_are_refused(exported, params):
  other = dataclasses.replace(params.norm, action_mean=params.norm.action_mean + 0.01)
  with pytest.raises(StatsMismatchError, match='from the caller'):
    load_exported(exported, other)


def test_weights_of_another_run_are_refused(copy):
  """Consistent files, but the statistics inside are not the ones the signature promises."""
  weights = dict(np.load(copy / 'weights.npz'))
  weights['norm/state_scale'] = 2 * weights['norm/state_scale']
  np.savez(copy / 'weights.npz', **weights)
  signature = json.loads((copy / 'signature.json').read_text())
  signature['weights']['sha256'] = hashlib.sha256((copy / 'weights.npz').read_bytes()).hexdigest()
  (copy / 'signature.json').write_text(json.dumps(signature))
  with pytest.raises(StatsMismatchError, match='from weights.npz'):
    load_exported(copy)


@pytest.mark.parametrize('name', ['event.jaxexport', 'weights.npz'])
def test_a_flipped_bit_is_noticed(copy, name):
  data = bytearray((copy / name).read_bytes())
  data[len(data) // 2] ^= 1
  (copy / name).write_bytes(data)
  with pytest.raises(CheckpointError, match=f'{name}: expected sha256'):
    load_exported(copy)


@pytest.mark.parametrize('name', ['signature.json', 'unified.jaxexport'])
def test_a_missing_file_is_named(copy, name):
  (copy / name).unlink()
  with pytest.raises(CheckpointError, match=name):
    load_exported(copy)


def test_other_formats_are_refused(copy):
  (copy / 'signature.json').write_text('{"format": "wallwm-policy-0"}')
  with pytest.raises(CheckpointError, match="expected format 'wallwm-policy-1'"):
    load_exported(copy)


def test_bad_inputs_are_refused(exported, make_inputs):
  policy = load_exported(exported)
  inputs = boundary(*make_inputs(), length=np.ones((2,), np.int32))
  with pytest.raises(DataError, match='event.state: expected float32'):
    policy.event({**inputs, 'state': inputs['state'].astype(np.float64)})
  with pytest.raises(DataError, match='unified: expected inputs'):
    policy.unified(inputs)


def test_a_failed_write_leaves_the_old_policy(cfg, params, copy, monkeypatch):
  """A disk that fills up on the way must not cost the policy that is there."""
  write = pathlib.Path.write_bytes

  def full(path, data):
    if 'signature' in path.name:
      raise OSError(28, 'No space left on device')
    return write(path, data)

  monkeypatch.setattr(pathlib.Path, 'write_bytes', full)
  with pytest.raises(OSError, match='No space left'):
    export_policy(cfg, params, copy, batch_size=2, bucket=2)
  assert not list(copy.glob('*.partial'))
  load_exported(copy, params.norm)


def test_statistics_hash_is_the_one_of_the_data_package(params):
  """Two packages that may not import each other must name the same statistics alike."""
  assert stats_hash(params.norm) == data_stats.stats_hash(params.norm)


def test_flatten_round_trip():
  tree = {'a': {'b': {'c': 1}, 'd': 2}, 'e': 3}
  assert flatten(tree) == {'a/b/c': 1, 'a/d': 2, 'e': 3} and nest(flatten(tree)) == tree
