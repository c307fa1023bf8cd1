"""Process helpers: in this one process, and in two real ones that talk to each other."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from wallwm_jax.config import ExperimentConfig, MeshConfig
from wallwm_jax.parallel import distributed, rules
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.types import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_lone_process_stays_alone():
  assert not distributed.initialize({})
  assert not distributed.initialize({'TPU_WORKER_HOSTNAMES': 'localhost', 'SLURM_NTASKS': '1'})
  assert distributed.is_main_process()


def test_half_a_configuration_is_refused():
  with pytest.raises(ConfigError, match='Set all three or none'):
    distributed.initialize({'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '2'})


@pytest.mark.parametrize(
    'config', [MeshConfig(), MeshConfig(fsdp=4), MeshConfig(replica=2, tensor=2)])
def test_one_process_loads_and_puts_the_whole_batch(config):
  mesh = make_mesh(config)
  assert distributed.data_shard(mesh, config.rules, 8) == (0, 1)
  batch = ExperimentConfig().fake_batch(batch_size=8)
  placed = distributed.put_batch(batch, rules.batch_shardings(batch, mesh, config.rules))
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  parts = mesh.shape['replica'] * mesh.shape['fsdp']
  assert placed.frames.sharding.shard_shape(placed.frames.shape)[0] == 8 // parts


WORKER = """
import os

import jax, numpy as np
from wallwm_jax.config import MeshConfig
from wallwm_jax.parallel import distributed, rules
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.types import ConfigError
jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
assert distributed.initialize(os.environ)
config = MeshConfig(fsdp=2, tensor=2) if SPLIT else MeshConfig(fsdp=1, tensor=4)
mesh = make_mesh(config)
index, count = distributed.data_shard(mesh, config.rules, 8)
assert (index, count) == ((jax.process_index(), 2) if SPLIT else (0, 1)), (index, count)
rows = np.arange(8.0, dtype=np.float32).reshape(8, 1)[index * 8 // count:(index + 1) * 8 // count]
shardings = rules.batch_shardings({'x': jax.ShapeDtypeStruct((8, 1), 'f4')}, mesh, config.rules)
batch = distributed.put_batch({'x': rows}, shardings)
assert batch['x'].shape == (8, 1)
assert float(jax.jit(lambda x: (x * x).sum())(batch['x'])) == 140.0
try:
  make_mesh(MeshConfig())
except ConfigError as error:
  assert 'several processes' in str(error)
else:
  raise AssertionError('a mesh without devices of process 1 was accepted')
print('\\nrole=' + ('main' if distributed.is_main_process() else 'other'))
"""


@pytest.mark.slow
@pytest.mark.parametrize('split', [True, False])
def test_two_processes_build_one_global_batch(split):
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    address = f'localhost:{probe.getsockname()[1]}'
  environ = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {
      'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'JAX_COORDINATOR_ADDRESS': address,
      'JAX_NUM_PROCESSES': '2'}
  workers = [
      subprocess.Popen(
          [sys.executable, '-c', WORKER.replace('SPLIT', str(split))], text=True,
          env=environ | {'JAX_PROCESS_ID': str(i)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
      for i in range(2)]
  try:
    results = [worker.communicate(timeout=120) for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  for worker, (out, err), role in zip(workers, results, ('main', 'other'), strict=True):
    assert worker.returncode == 0, err[-2000:]
    assert f'role={role}' in out  # the collectives library writes there too
