"""The symmetric-product kernel (`kernels/syrk`) against XLA's matmul on a TPU that is not there:
cycles of the TPU compiler's simulation of its own schedules, a static estimate, not a measurement.

wallwm bench static_cost --topology v5p:2x2x1 --m 3072 --k 3072 --epilogue
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from wallwm_jax.kernels.syrk import pallas_tpu, xla
from wallwm_jax.parallel import aot
from wallwm_jax.types import WallWMError

# Simulation runs at some 40,000 cycles a second.
_TIMEOUT_S = 580
_SIMULATED = re.compile(r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"')
_MODELLED = re.compile(r'"window_config":\{[^}]*?"estimated_cycles":"(\d+)"')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--topology', default='v5p:2x2x1', help='v5p:2x2x1 or v6e:2x2')
  parser.add_argument('--m', type=int, default=3072, help='rows of the factor')
  parser.add_argument('--k', type=int, default=3072, help='its columns, which are summed over')
  parser.add_argument('--epilogue', action='store_true', help='alpha a a^T + beta c')
  parser.add_argument('--json', metavar='OUT', help='also write the JSON line to this file')
  parser.add_argument('--worker', choices=_PROGRAMS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  case = (args.topology, args.m, args.k, args.epilogue)
  if args.worker:
    print(json.dumps(_compile(args.worker, *case)))
    return
  jax.config.update('jax_platforms', 'cpu')  # nothing runs; do not look for a TPU
  report(*case, path=args.json)


def report(topology: str, m: int, k: int, epilogue: bool, path: str | None = None) -> None:
  """Kernel against XLA, one JSON line."""
  chip = aot.chip(topology)
  kernel = kernel_cycles(topology, m, k, epilogue)
  nbytes = kernel_bytes(m, k, epilogue, topology)
  simulated, modelled = xla_cycles(topology, m, k, epilogue)
  full = simulated or modelled
  bytes_s = nbytes / chip.hbm_bytes_per_s
  harness.report(
    f'syrk kernel / XLA matmul, {m} x {k} bfloat16, static cycles of the compiler',
    'ratio',
    1,
    path=path,
    topology=topology,
    epilogue=epilogue,
    ratio=kernel / full,
    ratio_with_bytes=max(kernel, bytes_s * chip.clock_hz) / full,
    kernel_cycles=kernel,
    kernel_us=1e6 * max(kernel / chip.clock_hz, bytes_s),
    kernel_bytes_us=1e6 * bytes_s,
    xla_cycles=simulated,
    xla_window_cycles=modelled,
    xla_us=1e6 * full / chip.clock_hz,
    compared_with='xla_cycles' if simulated else 'xla_window_cycles',
  )


@functools.cache
def kernel_cycles(topology: str, m: int, k: int, epilogue: bool) -> int:
  """Simulated cycles of one [m, k] product by the kernel; takes seconds, in a process of its own.

  Raises:
    WallWMError: the kernel does not take this size, or the compiler did not simulate it.
  """
  with _tracing_for(topology):
    taken = pallas_tpu.supports(jax.ShapeDtypeStruct((m, k), jnp.bfloat16))
  if not taken:
    raise WallWMError(f'static_cost: the syrk kernel does not take {m} x {k} on {topology}.')
  simulated, _ = _measure('kernel', topology, m, k, epilogue)
  if not simulated:
    raise WallWMError(f'static_cost: no simulation of the {m} x {k} kernel on {topology}.')
  return simulated


def kernel_bytes(m: int, k: int, epilogue: bool, topology: str = 'v5p:2x2x1') -> int:
  """Bytes the kernel reads and writes: both factors of every block pair, c, and the result."""
  with _tracing_for(topology):
    side, _ = pallas_tpu._tiles(m, k, epilogue=epilogue)
  pairs = pallas_tpu._pairs(m // side).shape[1]
  return 2 * (pairs * side * (2 * k + side * epilogue) + m * m)


@functools.cache
def xla_cycles(topology: str, m: int, k: int, epilogue: bool) -> tuple[int | None, int]:
  """(simulated, modelled) cycles of the best plain XLA program for the same result.

  The simulation aborts on some fusions; it is None then, and XLA's own cost model is left.
  """
  programs = ('xla_fused', 'xla_two_passes') if epilogue else ('xla_fused',)
  found = [_measure(program, topology, m, k, epilogue) for program in programs]
  return min(found, key=lambda cycles: cycles[0] or cycles[1])


def _measure(program: str, *case) -> tuple[int | None, int | None]:
  """(simulated, modelled) cycles; without the simulation where it does not survive."""
  for simulate in (True, False):
    result, log = _spawn(program, *case, simulate=simulate)
    if result is not None:
      return tuple(result)
  raise WallWMError(f'static_cost: {program} {case} did not compile: {log[-2000:]}')


def _spawn(program: str, topology: str, m: int, k: int, epilogue: bool, *, simulate: bool):
  """([simulated, modelled] or None, log) of a fresh process: libtpu reads its flags only once."""
  command = [sys.executable, __file__, '--worker', program, '--topology', topology]
  command += ['--m', str(m), '--k', str(k), *(['--epilogue'] if epilogue else [])]
  with tempfile.TemporaryDirectory() as folder:
    env = os.environ | {'JAX_PLATFORMS': 'cpu'}
    if simulate:
      env['LIBTPU_INIT_ARGS'] = f'--xla_jf_dump_static_llo_profile_to={folder}'
    try:
      done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
      )
    except subprocess.TimeoutExpired:
      return None, f'longer than {_TIMEOUT_S} s'
  return (json.loads(done.stdout) if done.returncode == 0 else None), done.stderr


def _compile(program: str, topology: str, m: int, k: int, epilogue: bool) -> list[int | None]:
  sharding = SingleDeviceSharding(aot.tpu_devices(topology)[0])
  shapes = [((m, k), jnp.bfloat16), ((m, m), jnp.bfloat16), ((1, 1), jnp.float32)]
  a, c, scale = (jax.ShapeDtypeStruct(s, d, sharding=sharding) for s, d in shapes)
  with _tracing_for(topology):
    lowered = jax.jit(_PROGRAMS[program]).lower(a, c if epilogue else None, scale, scale)
    text = aot.compile_for_tpu(lowered).as_text()
  # the scalars' own little programs are no part of the product
  lines = [x for x in text.splitlines() if f'[{m},{m}]' in x.split(' = ')[-1].split('(')[0]]
  simulated, modelled = (
    [int(x) for x in pattern.findall('\n'.join(lines))] for pattern in (_SIMULATED, _MODELLED)
  )
  complete = simulated and all(simulated) and len(simulated) >= len(modelled)
  return [sum(simulated) if complete else None, sum(modelled) or None]


def _tracing_for(topology: str) -> contextlib.AbstractContextManager:
  """The kernel asks the mesh in context for the kind of chip."""
  mesh = Mesh(np.array(aot.tpu_devices(topology)[:1]), ('one',))
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _kernel(a, c, alpha, beta):
  return pallas_tpu.syrk(a, a, c, alpha, beta)


def _fused(a, c, alpha, beta):
  return xla.syrk(a, a, c, 1.0 if c is None else alpha, beta)


def _two_passes(a, c, alpha, beta):
  product = jax.lax.optimization_barrier(xla.syrk(a, a, None, 1.0, beta))
  return (alpha * product.astype(jnp.float32) + beta * c.astype(jnp.float32)).astype(a.dtype)


_PROGRAMS = {'kernel': _kernel, 'xla_fused': _fused, 'xla_two_passes': _two_passes}


if __name__ == '__main__':
  main()
