"""The loop as a whole: resume by value after kill -9, frozen towers, starting from another run."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from wallwm_jax.data import stats
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.training import loop
from wallwm_jax.training.checkpoints import Checkpoints, load_inference
from wallwm_jax.training.state import abstract_state, build_optimizer
from wallwm_jax.types import StatsMismatchError

STEPS, SAVED = 20, 10
HERE = pathlib.Path(__file__).parent
WORKER = f"""
import os, sys
sys.path[:0] = [{str(HERE)!r}]
import jax
jax.config.update('jax_compilation_cache_dir', os.environ['CACHE'])
import conftest
from wallwm_jax.training import loop
config = conftest.tiny_config('joint', store=sys.argv[1], train=dict(steps={STEPS},
    checkpoint_every={SAVED}, log_every=1, keep=3))
print('ready', flush=True)
loop.train(config, sys.argv[2], progress=False, on_log=lambda r: print(r['step'], flush=True))
"""


def start(store: str, workdir: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen:
  environ = dict(os.environ, CACHE=str(cache), JAX_PLATFORMS='cpu')
  command = [sys.executable, '-c', WORKER, store, str(workdir)]
  return subprocess.Popen(
    command, env=environ, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1]
  )


def kill_after_checkpoint(process: subprocess.Popen, workdir: pathlib.Path) -> int:
  """SIGKILL once the first checkpoint is complete and a later step has run; the step reached."""
  for line in process.stdout:
    if (
      line.strip().isdigit()
      and int(line) > SAVED
      and (workdir / 'checkpoints' / str(SAVED)).is_dir()
    ):
      process.send_signal(signal.SIGKILL)
      process.wait()
      return int(line)
  raise AssertionError(f'the run ended (exit {process.wait()}) before it could be killed')


def snapshot(tiny, store: str, workdir: pathlib.Path):
  config = tiny.config('joint', store=store, train={'steps': STEPS, 'checkpoint_every': SAVED})
  abstract = abstract_state(config, build_optimizer(config), make_mesh(config.mesh))
  with Checkpoints(workdir, 3) as saved:
    assert saved.latest_step() == STEPS
    return saved.restore(abstract)


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(tiny, store, tmp_path):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  assert start(store, whole, tmp_path / 'cache').communicate()[0].split()[-1] == str(STEPS)
  reached = kill_after_checkpoint(start(store, killed, tmp_path / 'cache'), killed)
  assert SAVED < reached < STEPS
  output = start(store, killed, tmp_path / 'cache').communicate()[0].split()
  assert output[1] == str(SAVED + 1) and output[-1] == str(STEPS)
  expected, got = snapshot(tiny, store, whole), snapshot(tiny, store, killed)
  jax.tree.map(np.testing.assert_array_equal, got.state, expected.state)
  assert got.data == expected.data
  losses = [
    [
      r['loss']
      for r in map(json.loads, (w / 'metrics.jsonl').read_text().splitlines())
      if r['step'] > reached
    ]
    for w in (whole, killed)
  ]
  assert losses[0] == losses[1][-len(losses[0]) :]


@pytest.mark.slow
def test_stage_two_trains_actions_on_the_frozen_video_of_stage_one(tiny, store, tmp_path):
  first, second = tmp_path / 'stage1', tmp_path / 'stage2'
  loop.train(tiny.config('1', store=store), first, progress=False)
  config = tiny.config('2', store=store, train={'init_from': str(first)})
  loop.train(config, second, progress=False)
  _, before = load_inference(first)
  _, after = load_inference(second)
  jax.tree.map(np.testing.assert_array_equal, after.model['video'], before.model['video'])
  np.testing.assert_array_equal(after.norm.latent_scale, before.norm.latent_scale)
  changed = jax.tree.map(
    lambda a, b: bool(np.any(a != b)), after.model['action'], before.model['action']
  )
  assert sum(jax.tree.leaves(changed)) > 20


@pytest.mark.slow
def test_changed_statistics_are_refused_on_resume(tiny, store, tmp_path):
  config = tiny.config('1', store=store)
  loop.train(config, tmp_path, progress=False)
  path = tmp_path / loop.NORM_FILE
  norm = stats.load(path)
  stats.save(dataclasses.replace(norm, latent_mean=norm.latent_mean + 1), path)
  longer = tiny.override(config, train={'steps': 6})
  with pytest.raises(StatsMismatchError, match='latent_mean'):
    loop.train(longer, tmp_path, progress=False)


def test_dry_run_names_every_parameter_and_what_is_frozen(tiny):
  text = loop.dry_run(tiny.config('2'))
  assert 'video/blocks/ffn/up/kernel' in text and 'frozen' in text and 'muon' in text
