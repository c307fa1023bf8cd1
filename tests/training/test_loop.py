"""Whole runs on a tiny store: what trains, what may not, and that a killed run loses nothing."""

import dataclasses
import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from wallwm_jax.config import MeshConfig, VideoConfig
from wallwm_jax.data import stats
from wallwm_jax.data.store import EventStore
from wallwm_jax.training import loop
from wallwm_jax.training.checkpoints import Checkpoints, load_inference
from wallwm_jax.training.state import (
  abstract_state,
  build_optimizer,
  count,
  init_state,
  param_shapes,
)
from wallwm_jax.types import CheckpointError, ConfigError, StatsMismatchError

STEPS = 20
RUN = {'steps': STEPS, 'checkpoint_every': 10, 'log_every': 1, 'keep': 5}

KILLED = """
import json, os, signal, sys
import jax
import ml_collections
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_compilation_cache_dir', sys.argv[3])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
from wallwm_jax.config import from_config_dict
from wallwm_jax.training.loop import train

def die(record):
  if record['step'] == 13:
    os.kill(os.getpid(), signal.SIGKILL)

config = from_config_dict(ml_collections.ConfigDict(json.loads(sys.argv[1])))
train(config, sys.argv[2], progress=False, on_log=die)
"""


def snapshot(config, workdir, step=None):
  """A checkpoint on the host."""
  mesh = loop.make_mesh(config.mesh)
  abstract = abstract_state(config, build_optimizer(config, mesh), mesh)
  with Checkpoints(workdir, config.train.keep) as saved:
    return saved.restore(abstract, step)


def identical(a, b) -> bool:
  same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
  return jax.tree.all(same)


def train_watching(config, workdir):
  """(result, ids of the batches that went to the device, in order)."""
  seen = []
  put = loop.distributed.put_batch

  def spy(batch, shardings):
    seen.append(np.array(batch.uid))
    return put(batch, shardings)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.distributed, 'put_batch', spy)
    return loop.train(config, workdir, progress=False), seen


@pytest.fixture(scope='module')
def stage1(tiny, store, tmp_path_factory):
  """(config, result, ids of its batches) of an uninterrupted 20-step run of stage 1."""
  config = tiny.config('1', store=store, train=RUN)
  return config, *train_watching(config, tmp_path_factory.mktemp('stage1'))


@pytest.mark.slow
def test_a_run_leaves_everything_behind(stage1):
  config, result, _ = stage1
  assert result.step == STEPS
  assert [record['step'] for record in result.history] == list(range(1, STEPS + 1))
  keys = {
    'step',
    'loss',
    'loss_video',
    'grad_norm',
    'update_norm',
    'lr',
    'step_time_s',
    'tokens_per_s',
  }
  assert all(record.keys() == keys for record in result.history)
  lines = (result.workdir / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == list(result.history)
  assert result.checkpoint == result.workdir / 'checkpoints' / '20' and result.checkpoint.is_dir()
  assert list((result.workdir / 'tensorboard').iterdir())
  norm = stats.load(result.workdir / 'norm_stats.json')
  assert identical(norm, load_inference(result.workdir)[1].norm)


@pytest.mark.slow
def test_stage_one_trains_the_video_tower_and_cannot_touch_the_other(stage1):
  config, result, _ = stage1
  mesh = loop.make_mesh(config.mesh)
  optimizer = build_optimizer(config, mesh)
  abstract = abstract_state(config, optimizer, mesh)
  fresh = init_state(config, optimizer, abstract)
  trained = snapshot(config, result.workdir).state
  assert identical(trained.params['action'], fresh.params['action'])
  changed = jax.tree.map(
    lambda x, y: bool((x != y).any()), trained.params['video'], fresh.params['video']
  )
  assert np.mean(jax.tree.leaves(changed)) > 0.9
  assert trained.ema.keys() == {'video'}
  assert not any(
    'action' in jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(trained.opt_state)
  )


@pytest.mark.slow
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(stage1, tmp_path):
  config, whole, whole_uids = stage1
  arguments = [
    json.dumps(dataclasses.asdict(config)),
    str(tmp_path),
    jax.config.jax_compilation_cache_dir or str(tmp_path / 'cache'),
  ]
  killed = subprocess.run([sys.executable, '-c', KILLED, *arguments], timeout=600)
  assert killed.returncode == -signal.SIGKILL
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['10']

  resumed, uids = train_watching(config, tmp_path)
  a, b = (snapshot(config, workdir) for workdir in (whole.workdir, tmp_path))
  assert identical(a.state, b.state) and a.data == b.data
  np.testing.assert_array_equal(uids[:10], whole_uids[10:20])
  timings = {'step_time_s', 'tokens_per_s'}
  without = [
    [{k: v for k, v in r.items() if k not in timings} for r in run.history]
    for run in (whole, resumed)
  ]
  assert without[0] == without[1]


@pytest.fixture(scope='module')
def stage2(stage1, tiny, tmp_path_factory):
  """(config, result) of three steps of stage 2 on the weights of stage 1."""
  source, result, _ = stage1
  config = tiny.override(
    tiny.config('2', store=source.data.store, train={'steps': 3, 'log_every': 1}),
    train={'init_from': str(result.workdir), 'seed': 5},
  )
  return config, loop.train(config, tmp_path_factory.mktemp('stage2'), progress=False)


@pytest.mark.slow
def test_stage_two_keeps_the_video_tower_of_stage_one(stage1, stage2):
  config, result = stage2
  trained = snapshot(config, result.workdir).state
  _, source = load_inference(stage1[1].workdir)
  assert identical(trained.params['video'], source.model['video'])
  assert not identical(trained.params['action'], source.model['action'])
  assert trained.ema.keys() == {'action'}
  assert {'loss', 'loss_action'} <= result.history[0].keys()
  assert 'loss_video' not in result.history[0]


@pytest.mark.slow
def test_latent_statistics_are_inherited_from_the_source_and_actions_from_an_actor(
  tiny, stage1, stage2, tmp_path
):
  other = tiny.write_store(tmp_path / 'store', episodes=3)
  theirs = [stats.load(run.workdir / 'norm_stats.json') for run in (stage1[1], stage2[1])]
  for source, norm, inherits_actions in zip(
    (stage1[1], stage2[1]), theirs, (False, True), strict=True
  ):
    config = tiny.config('2', store=other, train={'init_from': str(source.workdir)})
    workdir = tmp_path / source.workdir.name
    workdir.mkdir()
    got = loop._norm_stats(config, workdir, EventStore(other), None)
    assert identical(got.latent_mean, norm.latent_mean)
    assert identical(got.latent_scale, norm.latent_scale)
    assert identical(got.action_scale, norm.action_scale) == inherits_actions
    assert identical(got, stats.load(workdir / 'norm_stats.json'))


@pytest.mark.slow
def test_resume_refuses_what_would_not_continue_the_run(tiny, stage1, tmp_path):
  config, result, _ = stage1
  longer = tiny.override(config, train={'steps': STEPS + 1})
  video = VideoConfig(width=32, layers=2, heads=2, ffn=64, freq_dim=32)
  other = dataclasses.replace(longer, model=dataclasses.replace(config.model, video=video))
  with pytest.raises(CheckpointError, match='video/blocks/ffn/up/kernel: expected'):
    loop.train(other, result.workdir, progress=False)
  with pytest.raises(CheckpointError, match='seed: 0 then, 9 now'):
    loop.train(tiny.override(longer, data={'seed': 9}), result.workdir, progress=False)

  path = result.workdir / 'norm_stats.json'
  norm = stats.load(path)
  stats.save(dataclasses.replace(norm, latent_mean=norm.latent_mean + 1), path)
  try:
    with pytest.raises(StatsMismatchError, match='latent_mean: 8 channels differ'):
      loop.train(longer, result.workdir, progress=False)
  finally:
    stats.save(norm, path)
  assert snapshot(config, result.workdir).state.step == STEPS


class Counter:
  """An iterator of 0, 1, 2, ... whose state is the next number."""

  def __init__(self, size):
    self.next, self.size = 0, size

  def __next__(self):
    if self.next == self.size:
      raise StopIteration
    self.next += 1
    return self.next - 1

  def get_state(self):
    return self.next


def test_prefetch_pairs_every_batch_with_its_own_state():
  source = Counter(5)
  feed = loop.prefetch(source, lambda x: 10 * x, size=2)
  assert next(feed) == (0, 1) and source.next == 2  # one ahead, and its state is not leaked
  assert list(feed) == [(10, 2), (20, 3), (30, 4), (40, 5)]


def test_dry_run_tells_routing_shardings_and_counts(tiny):
  text = loop.dry_run(dataclasses.replace(tiny.config('2'), mesh=MeshConfig(fsdp=4, tensor=2)))
  frozen = count(param_shapes(tiny.config('2'))['video'])
  assert f'video: {frozen:,} parameters, frozen' in text
  assert 'muon' in text and 'adamw' in text
  (row,) = (x for x in text.splitlines() if x.split()[:1] == ['video/blocks/ffn/up/kernel'])
  assert '(2, 32, 32)' in row and "'fsdp'" in row and "'tensor'" in row


def test_dry_run_refuses_a_mesh_that_does_not_fit(tiny):
  with pytest.raises(ConfigError, match='does not divide 8 devices'):
    loop.dry_run(dataclasses.replace(tiny.config('2'), mesh=MeshConfig(fsdp=3)))
  small = tiny.config('2', data={'batch_size': 6})
  with pytest.raises(ConfigError, match='batch field.*size 6 is not divisible by 4'):
    loop.dry_run(dataclasses.replace(small, mesh=MeshConfig(fsdp=4)))
