"""An exported policy served: the answers of the run that it came from, and what it cannot do."""

import json

import jax
import ml_collections
import numpy as np
import pytest
from clients import encode, request, resize

from wallwm_jax.config import from_config_dict
from wallwm_jax.inference.export import export_policy
from wallwm_jax.inference.exported import load_exported, stats_hash
from wallwm_jax.inference.programs import Programs
from wallwm_jax.inference.serve.engines import ExportedEngine, ModelEngine
from wallwm_jax.inference.serve.model import ModelPolicy
from wallwm_jax.types import ConfigError, DataError

MODES = ['event', 'chunk']


@pytest.fixture(scope='module')
def folder(cfg, params, tmp_path_factory):
  path = tmp_path_factory.mktemp('policy')
  export_policy(cfg, params, path, batch_size=1, bucket=2)
  return path


@pytest.fixture(scope='module')
def exported(folder):
  policy = load_exported(folder)
  config = from_config_dict(ml_collections.ConfigDict(policy.signature['config']))
  return ModelPolicy(ExportedEngine(policy, config, seed=3), encode, resize, modes=MODES)


def ask(policy, memory, **changes):
  return policy.infer([policy.check(request(1, **changes), memory)])[0]


def test_an_artifact_answers_as_its_run(exported, cfg, params):
  engine = ModelEngine(cfg, params, bucket=2, max_batch=1, seed=3)
  live = ModelPolicy(engine, encode, resize, modes=MODES)
  here, there = live.start(), exported.start()
  for changes in ({'mode': 'event'}, {'event': 'push it'}, {'mode': 'chunk'}, {'executed': 3}):
    want, got = ask(live, here, **changes), ask(exported, there, **changes)
    np.testing.assert_allclose(got.pop('actions'), want.pop('actions'), rtol=2e-4, atol=2e-4)
    np.testing.assert_array_equal(got.pop('state'), want.pop('state'))
    assert got == want
  promised = live.metadata | {'real_time_chunking': False}
  assert exported.metadata == promised and promised['norm_hash'] == stats_hash(params.norm)


def test_several_requests_are_answered_in_order(exported):
  works = [
    exported.check(request(seed, mode=mode), exported.start())
    for seed, mode in ((1, 'event'), (2, 'chunk'), (3, 'event'))
  ]
  together = exported.infer(works)
  for work, reply in zip(works, together):
    np.testing.assert_allclose(exported.infer([work])[0]['actions'], reply['actions'], atol=1e-6)


def test_what_an_artifact_cannot_do_is_refused(exported, folder):
  memory = exported.start()
  ask(exported, memory)
  with pytest.raises(DataError, match='delay: expected 0, got 2: an exported policy cannot'):
    ask(exported, memory, executed=1, delay=2)
  for changes, message in (
    ({'source': 'planner'}, r"source: expected one of \['atomic', 'instruction'\], got 'planner'"),
    ({'bucket': 4}, 'bucket: not a field of this policy'),
  ):
    with pytest.raises(DataError, match=message):
      ask(exported, exported.start(), **changes)
  policy = load_exported(folder)
  config = from_config_dict(ml_collections.ConfigDict(policy.signature['config']))
  with pytest.raises(ConfigError, match=r'bucket: expected 2, fixed .* got 4'):
    ExportedEngine(policy, config, bucket=4)
  wide = load_exported(folder)
  wide.signature = json.loads(json.dumps(policy.signature)) | {'batch_size': 4}
  with pytest.raises(ConfigError, match='expected 1, got 4.*--batch 1'):
    ExportedEngine(wide, config)


def test_a_restarted_server_neither_traces_nor_compiles(cfg, params, tmp_path, own_cache):
  """And answers as the one before, to the last bit; so does one that keeps nothing."""

  def serve(programs):
    jax.clear_caches()
    engine = ModelEngine(cfg, params, bucket=2, max_batch=2, seed=3, programs=programs)
    policy = ModelPolicy(engine, encode, resize, modes=['event'])
    policy.warm_up()
    loaded = engine.programs
    return ask(policy, policy.start())['actions'], loaded

  plain, _ = serve(None)
  first, built = serve(Programs(tmp_path / 'p'))
  second, read = serve(Programs(tmp_path / 'p'))
  assert [(p.traced, p.compiled) for p in built] == [(True, True)] * 2
  assert [(p.traced, p.compiled) for p in read] == [(False, False)] * 2  # batches of 1 and 2
  np.testing.assert_array_equal(first, plain)
  np.testing.assert_array_equal(second, first)
