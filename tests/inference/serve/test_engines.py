"""An exported policy served: the answers of the run that it came from, batches, buckets."""

import jax
import ml_collections
import numpy as np
import pytest
from clients import encode, request, resize

from wallwm_jax.config import from_config_dict
from wallwm_jax.inference.export import Choice, export_policy, load
from wallwm_jax.inference.exported import stats_hash
from wallwm_jax.inference.programs import Programs
from wallwm_jax.inference.serve.engines import ExportedEngine, ModelEngine
from wallwm_jax.inference.serve.model import ModelPolicy
from wallwm_jax.types import ConfigError, DataError

MODES = ['event', 'chunk']


@pytest.fixture(scope='module')
def artifact(cfg, params, tmp_path_factory):
  """An exported policy with two buckets, and any number of rows."""
  path = tmp_path_factory.mktemp('policy')
  export_policy(cfg, params, path, Choice(('cpu',), (2, 4)))
  return load(path)


@pytest.fixture(scope='module')
def config(artifact):
  return from_config_dict(ml_collections.ConfigDict(artifact.manifest['config']))


@pytest.fixture(scope='module')
def exported(artifact, config):
  engine = ExportedEngine(artifact, config, bucket=2, seed=3)
  return ModelPolicy(engine, encode, resize, modes=MODES)


def ask(policy, memory, **changes):
  return policy.infer([policy.check(request(1, **changes), memory)])[0]


def assert_equal_replies(got, want):
  got, want = dict(got), dict(want)
  np.testing.assert_allclose(got.pop('actions'), want.pop('actions'), rtol=2e-4, atol=2e-4)
  np.testing.assert_array_equal(got.pop('state'), want.pop('state'))
  assert got == want


def test_an_artifact_answers_as_its_run(exported, cfg, params):
  engine = ModelEngine(cfg, params, bucket=2, max_batch=1, seed=3)
  live = ModelPolicy(engine, encode, resize, modes=MODES)
  here, there = live.start(), exported.start()
  for changes in (
    {'mode': 'event'}, {'event': 'push it'}, {'length': 3}, {'executed': 1, 'delay': 2},
    {'mode': 'chunk'}, {'executed': 3, 'delay': 3},
  ):  # fmt: skip
    assert_equal_replies(ask(exported, there, **changes), ask(live, here, **changes))
  assert exported.metadata == live.metadata
  assert exported.metadata['norm_hash'] == stats_hash(params.norm)


def test_requests_are_computed_together(exported, artifact, monkeypatch):
  """One call of a program for those of one mode and bucket, and the answers of each alone."""
  calls = []
  event = artifact.event

  def counted(inputs):
    calls.append(len(inputs['state']))
    return event(inputs)

  monkeypatch.setattr(artifact, 'event', counted)
  asked = [{}, {}, {'length': 4}, {'mode': 'chunk'}, {'event': 'push it'}]
  works = [
    exported.check(request(seed, **changes), exported.start())
    for seed, changes in enumerate(asked)
  ]
  together = exported.infer(works)
  assert calls == [4]  # four events, a power of two
  for work, reply in zip(works, together):
    assert_equal_replies(exported.infer([work])[0], reply)


def test_the_smallest_bucket_answers_each_event(artifact, config, monkeypatch):
  policy = ModelPolicy(ExportedEngine(artifact, config, bucket=3), encode, resize)
  assert policy.metadata['steps'] == {'event': 12}
  used, call = [], artifact._call

  def noted(mode, inputs):
    outputs = call(mode, inputs)
    used.append((len(inputs['state']), outputs['actions'].shape[1]))
    return outputs

  monkeypatch.setattr(artifact, '_call', noted)
  works = [
    policy.check(request(seed, **changes), policy.start())
    for seed, changes in enumerate([{'length': 5}, {}, {'length': 9}])
  ]
  replies = policy.infer(works)
  assert sorted(used) == [(1, 8), (2, 16)]
  assert [reply['chunk_len'] for reply in replies] == [8, 12, 12]
  assert all(reply['actions'].shape == (12, 10) for reply in replies)
  still = replies[0]['actions'][8:] - replies[0]['actions'][7]
  np.testing.assert_array_equal(still, 0)  # behind the event its last pose is held


def test_a_fixed_number_of_rows_is_filled_up(artifact, config, cfg, params, tmp_path):
  export_policy(cfg, params, tmp_path / 'two', Choice(('cpu',), (2,), batch=2))
  two = ModelPolicy(ExportedEngine(load(tmp_path / 'two'), config), encode, resize)
  free = ModelPolicy(ExportedEngine(artifact, config, bucket=2), encode, resize)
  replies = [
    policy.infer([policy.check(request(seed), policy.start()) for seed in range(3)])
    for policy in (two, free)
  ]
  for got, want in zip(*replies, strict=True):
    assert_equal_replies(got, want)


def test_what_an_artifact_cannot_do_is_refused(exported, artifact, config):
  for changes, message in (
    ({'source': 'planner'}, r"source: expected one of \['atomic', 'instruction'\], got 'planner'"),
    ({'bucket': 4}, 'bucket: not a field of this policy'),
    ({'length': 9}, 'length: expected 1 to 8 steps, got 9'),
    ({'length': 0}, 'length: expected 1 to 8 steps, got 0'),
    ({'length': 4, 'mode': 'chunk'}, "length: expected none in mode 'chunk'"),
  ):
    with pytest.raises(DataError, match=message):
      ask(exported, exported.start(), **changes)
  with pytest.raises(ConfigError, match=r'bucket: expected 1 to 4, .*\[2, 4\], got 5'):
    ExportedEngine(artifact, config, bucket=5)


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
