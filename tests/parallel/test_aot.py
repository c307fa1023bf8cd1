"""Compiling for a TPU that is not there."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from wallwm_jax.parallel import aot


@pytest.fixture
def cache(tmp_path):
  """An empty folder in place of this process's cache of compiled programs."""
  settings = {
    'jax_compilation_cache_dir': str(tmp_path),
    'jax_persistent_cache_min_compile_time_secs': 0,
  }
  before = {name: getattr(jax.config, name) for name in settings}

  def apply(values):
    for name, value in values.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()

  apply(settings)
  yield tmp_path
  apply(before)


def test_tpu_programs_stay_out_of_the_cache_and_others_go_in(cache):
  pytest.importorskip('libtpu')
  sharding = SingleDeviceSharding(aot.tpu_devices('v5p:2x2x1')[0])

  def for_tpu(size):
    spec = jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=sharding)
    aot.compile_for_tpu(jax.jit(lambda x: x @ x).lower(spec))

  for_tpu(128)
  assert not list(cache.iterdir())
  jax.jit(lambda x: x * 3 + 1)(jnp.arange(5.0))
  kept = sorted(cache.iterdir())
  assert kept
  for_tpu(256)
  assert sorted(cache.iterdir()) == kept
