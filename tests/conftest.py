"""One process setup for the whole suite: eight virtual CPU devices and a persistent compilation
cache.
"""

import gc
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Threads of the CPU client. Each device waits in a thread of its own at a collective; with as many
# threads as devices, one device that reaches two of them at once leaves another without any, and
# all wait until XLA ends the process.
os.environ.setdefault('NPROC', '32')
# Tests compile far more than they compute: without optimisation a tiny model compiles in a sixth of
# the time, and a program that is not cut up for many threads in a tenth less.
os.environ['XLA_FLAGS'] = ' '.join(
  (
    os.environ.get('XLA_FLAGS', ''),
    '--xla_backend_optimization_level=0',
    '--xla_cpu_use_fusion_emitters=false',
    '--xla_cpu_parallel_codegen_split_count=1',
  )
)

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Tracing makes millions of small objects that die by their reference counts. Looking for cycles
# after every 700 of them, as Python does by itself, takes a sixth of the time of the suite.
gc.set_threshold(50_000, 20, 20)

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_compilation_cache_dir', str(ROOT / '.cache' / 'jax'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
jax.config.update('jax_traceback_in_locations_limit', 0)  # nobody reads them in compiled programs


@pytest.fixture(scope='session')
def make_state():
  """`training.state.init_state` op by op: the same numbers, but a program of all random draws of a
  tiny model takes ten seconds to compile.
  """
  from wallwm_jax.training.state import fresh_state

  def make(config, optimizer, abstract, start=None):
    fresh = jax.device_get(fresh_state(config, optimizer, start))
    return jax.device_put(fresh, jax.tree.map(lambda leaf: leaf.sharding, abstract))

  return make


@pytest.fixture(scope='module')
def plain_states(make_state):
  """Runs of this module start from `make_state`."""
  from wallwm_jax.training import loop

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'init_state', make_state)
    yield


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """Real robot data beside the checkout; tests that need it are skipped by name when it is
  absent.
  """
  path = ROOT.parent / 'shared' / 'data'
  if not path.is_dir():
    pytest.skip(f'real robot data not found at {path}')
  return path
