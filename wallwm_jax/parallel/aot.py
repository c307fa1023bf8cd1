"""TPU programs without a TPU: topologies, chips and compiler options.

The TPU compiler (package `libtpu`) runs on any Linux machine; what it compiles for a topology can
be costed (`parallel.hlo`) but not run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from wallwm_jax.config import nearest
from wallwm_jax.parallel.hlo import Chip
from wallwm_jax.types import ConfigError, WallWMError

# libtpu reads these when it is first loaded; on a machine without a TPU they keep it from looking
# for one.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5p-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}

# Peak bf16 FLOP/s, memory and one-way link bandwidth as published.
PEAK_FLOPS = {'v5p': 459e12, 'v6e': 918e12}
_HBM_BYTES_PER_S = {'v5p': 2765e9, 'v6e': 1640e9}
_LINK_BYTES_PER_S = 90e9
_CLOCK_HZ = 1.75e9


def tpu_devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """Devices of one or more slices of a topology such as 'v5p:4x4x4' or 'v6e:4x4', to compile for.

  Raises:
    WallWMError: libtpu is not installed. ConfigError: it knows no such topology.
  """
  from jax.experimental import topologies

  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  if importlib.util.find_spec('libtpu') is None:
    raise WallWMError(
      "compiling for a TPU needs its compiler: pip install 'wallwm-jax[aot]' (libtpu)."
    )
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=topology, num_slices=slices
    ).devices
  except Exception as error:  # libtpu raises bare RuntimeErrors of every kind
    raise ConfigError(
      f'topology {topology!r}: expected one like v5p:4x4x4 or v6e:4x4, but the TPU compiler says: '
      f'{str(error).splitlines()[0]}'
    ) from error


def tracing_for(topology: str) -> contextlib.AbstractContextManager:
  """Where functions are traced for one chip of a topology: kernels ask the mesh in context for the
  kind of chip, and whether there is more than one."""
  mesh = Mesh(np.array(tpu_devices(topology)[:1]), ('one',))
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def compile_for_tpu(lowered: jax.stages.Lowered, **options: bool | float) -> jax.stages.Compiled:
  """Compiles past the persistent cache, which cannot read TPU programs back without a TPU.

  Args:
    options: of the compiler; `exec_time_optimization_effort=-1.0` is several times faster and good
      for structure and bytes, not for estimated cycles.
  """
  cached = jax.config.jax_enable_compilation_cache
  _enable_cache(False)
  try:
    return lowered.compile(compiler_options=options)
  finally:
    _enable_cache(cached)


def _enable_cache(value: bool) -> None:
  jax.config.update('jax_enable_compilation_cache', value)
  compilation_cache.reset_cache()  # JAX looks at the setting once, and would keep to it


def chip(topology: str) -> Chip:
  """Constants of the chips of a topology; bandwidths are those of an ideal torus, not measured.

  Gathers and reductions send to neighbours, both ways along every dimension that the group spans.
  An all-to-all sends across the torus: of each chip's traffic, 8 links / side fit through the cut
  of a dimension.

  Raises:
    ConfigError: a chip without constants.
  """
  generation, _, shape = topology.partition(':')
  if generation not in _HBM_BYTES_PER_S:
    raise ConfigError(
      f'topology {topology!r}: constants are known for {sorted(_HBM_BYTES_PER_S)}.'
      f'{nearest(generation, _HBM_BYTES_PER_S)}'
    )
  sides = sorted((int(side) for side in shape.split('x')), reverse=True)

  def wire_bytes_per_s(kind: str, group: int) -> float:
    if kind == 'collective-permute':
      return _LINK_BYTES_PER_S
    spanned = next((n for n in range(1, len(sides)) if math.prod(sides[:n]) >= group), len(sides))
    neighbours = 2 * spanned * _LINK_BYTES_PER_S
    if kind in ('all-to-all', 'ragged-all-to-all'):
      return min(neighbours, 8 * _LINK_BYTES_PER_S / min(sides[0], group))
    return neighbours

  return Chip(_CLOCK_HZ, _HBM_BYTES_PER_S[generation], wire_bytes_per_s)


def compiler_options(mesh: Mesh) -> dict[str, bool]:
  """Options of every jitted train step on `mesh`: on TPU, exchanges run beside compute."""
  if mesh.devices.flat[0].platform != 'tpu':
    return {}
  return {'xla_tpu_enable_async_all_to_all': True}
