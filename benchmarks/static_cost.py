"""Kernels against the best that XLA makes of the same work, on a TPU that is not there: the TPU
compiler simulates its own schedules. A static estimate, not a measurement; one JSON line per case.

wallwm bench static_cost syrk --topology v5p:2x2x1
wallwm bench static_cost syrk --topology v6e:2x2 --case 3072x3072_c

Every instruction takes the longer of its simulated cycles and its bytes over the bandwidth of the
memory; asynchronous copies take nothing, but a program no less than all its bytes do. Loops count
as often as they run. Where the simulation gives up on one of XLA's instructions, its bytes alone
count, so XLA is never made slower than it is. A kernel without a simulation is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping

import harness
import jax
import kernel_cases
from jax.sharding import SingleDeviceSharding

from wallwm_jax.parallel import aot, hlo
from wallwm_jax.types import ConfigError, WallWMError

# The simulation runs at some 40,000 cycles a second, in seconds for most cases.
_TIMEOUT_S = 580
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Of one unit of a program.

  us: microseconds. cycles: simulated ones. modelled_us: by XLA's own cost model, where it has one
  for everything (it has none for Pallas kernels). mixed_us: us, with XLA's own model where the
  simulation gave up. bytes: that cross the memory. given_up:
  instructions that the simulation gave up on. vmem: most bytes that one kernel takes of the core's
  own memory.
  """

  us: float
  cycles: float
  modelled_us: float | None
  mixed_us: float
  bytes: float
  given_up: int
  vmem: int


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('op', choices=kernel_cases.ops(), help='a kernel with cases')
  parser.add_argument('--topology', default='v5p:2x2x1', help='v5p:2x2x1 or v6e:2x2')
  parser.add_argument('--case', action='append', help='only this one; may be given several times')
  parser.add_argument('--worker', metavar='PROGRAM', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    print(json.dumps(_compile(args.op, args.case[0], args.worker, args.topology)))
    return
  jax.config.update('jax_platforms', 'cpu')  # nothing runs; do not look for a TPU
  for name in args.case or kernel_cases.load(args.op).NAMES:
    report(args.op, name, args.topology)


def report(op: str, name: str, topology: str) -> None:
  """One case: the kernel, every other formulation, and the ratio to the best of those."""
  chip = aot.chip(topology)
  with aot.tracing_for(topology):
    case = kernel_cases.load(op).case(name)
  found = {program: estimate(op, name, program, topology) for program in case.programs}
  kernel = found.pop(kernel_cases.KERNEL)
  best = min(found, key=lambda program: found[program].us)
  harness.report(
    f'{op} {name}: kernel / best of XLA, static estimate of the TPU compiler',
    'ratio',
    1,
    topology=topology,
    value=kernel.us / found[best].us,
    best=best,
    ideal_us=1e6 * case.ideal_bytes / chip.hbm_bytes_per_s,
    kernel=dataclasses.asdict(kernel),
    xla={program: dataclasses.asdict(found[program]) for program in found},
  )


@functools.cache
def estimate(op: str, case: str, program: str, topology: str) -> Estimate:
  """Of one program, in a process of its own: libtpu reads its flags only once.

  Raises:
    WallWMError: it does not compile, or the compiler did not simulate a kernel of it.
  """
  command = [__file__, op, '--case', case, '--topology', topology, '--worker', program]
  return Estimate(**in_a_process(command))


def in_a_process(command: list[str], patience_s: float = _TIMEOUT_S) -> dict:
  """The JSON that a Python script prints last, with programs compiled under simulation; without it
  where the simulation aborts the process, as on some instructions, or takes longer than
  `patience_s`.

  Raises:
    WallWMError: the script failed both times.
  """
  for simulate in (True, False):
    with tempfile.TemporaryDirectory() as folder:
      env = os.environ | {'JAX_PLATFORMS': 'cpu'}
      if simulate:
        env['LIBTPU_INIT_ARGS'] = f'--xla_jf_dump_static_llo_profile_to={folder}'
      try:
        done = subprocess.run(
          [sys.executable, *command],
          env=env, capture_output=True, text=True, check=False,
          timeout=patience_s if simulate else _TIMEOUT_S,
        )  # fmt: skip
      except subprocess.TimeoutExpired:
        log = 'no answer in time'
        continue
    if done.returncode == 0:
      return json.loads(done.stdout.splitlines()[-1])
    log = done.stderr
  raise WallWMError(f'static_cost: {" ".join(command)} failed: {log[-2000:]}')


def _compile(op: str, name: str, program: str, topology: str) -> dict:
  with aot.tracing_for(topology):
    case = kernel_cases.load(op).case(name)
    sharding = SingleDeviceSharding(aot.tpu_devices(topology)[0])
    place = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    operands = jax.tree.map(lambda spec: place(spec.shape, spec.dtype), case.operands)
    lowered = jax.jit(case.programs[program]).lower(*operands)
    text = aot.compile_for_tpu(lowered).as_text()
  total = Total(text, aot.chip(topology), case.kernel_bytes)
  if program == kernel_cases.KERNEL and not total.kernels:
    raise ConfigError(f'{op} {name}: expected a Pallas kernel in the program, found none.')
  if total.kernels_given_up:
    raise WallWMError(f'{op} {name}: the compiler did not simulate {total.kernels_given_up}.')
  return dataclasses.asdict(total.estimate(case.units))


class Total:
  """The instructions of a compiled program, end to end on one core complex.

  kernel_bytes: as of `Case`. kernels_given_up: names of kernels without a simulation.
  """

  def __init__(self, text: str, chip: hlo.Chip, kernel_bytes: Mapping[str, float]):
    self.computations, entry = hlo.parse(text)
    self.traffic = hlo.Traffic(self.computations)
    self.chip, self.kernel_bytes = chip, kernel_bytes
    self.seconds = self.modelled = self.mixed = self.cycles = self.bytes = 0.0
    self.given_up = self.kernels = self.vmem = 0
    self.kernels_given_up: list[str] = []
    self._run(entry, 1)

  def estimate(self, units: int) -> Estimate:
    least = self.bytes / self.chip.hbm_bytes_per_s
    us, modelled, mixed = (
      1e6 * max(x, least) / units for x in (self.seconds, self.modelled, self.mixed)
    )
    return Estimate(
      us, self.cycles / units, None if self.kernels else modelled, mixed, self.bytes / units,
      self.given_up, self.vmem,
    )  # fmt: skip

  def _run(self, name: str, times: int) -> None:
    computation = self.computations[name]
    made = {op.name: op for op in computation}
    for op in computation:
      if op.opcode == 'while':
        body, trips = hlo.loop(self.computations, op)
        self._run(body, times * trips)
      elif op.opcode in ('call', 'conditional'):
        for called in op.called:
          self._run(called, times)
      else:
        self._add(op, made, times)

  def _add(self, op: hlo.Instruction, made: dict[str, hlo.Instruction], times: int) -> None:
    kernel = op.opcode == 'custom-call' and 'tpu_custom_call' in op.text
    if kernel:
      self.kernels += 1
      moved = self._bytes_of_kernel(op)
      vmem = _VMEM.search(op.text)
      self.vmem = max(self.vmem, int(vmem.group(1)) if vmem else 0)
      if not op.simulated:
        self.kernels_given_up.append(op.name)
    else:
      moved = self.traffic.of(op, made)
    beside = op.opcode in ('copy-start', 'slice-start')
    by_bytes = 0.0 if beside else moved / self.chip.hbm_bytes_per_s
    modelled = (op.cycles or 0) / self.chip.clock_hz
    self.given_up += bool(op.cycles) and not op.simulated
    self.seconds += times * max((op.simulated or 0) / self.chip.clock_hz, by_bytes)
    self.modelled += times * max(modelled, by_bytes)
    simulated = modelled if op.simulated is None else op.simulated / self.chip.clock_hz
    self.mixed += times * max(simulated, by_bytes)
    self.cycles += times * (op.simulated or 0)
    self.bytes += times * moved

  def _bytes_of_kernel(self, op: hlo.Instruction) -> float:
    for prefix, moved in self.kernel_bytes.items():
      if op.name.startswith(prefix):
        return moved
    raise WallWMError(
      f'{op.name}: expected kernels named {sorted(self.kernel_bytes)} (Case.kernel_bytes).'
    )


if __name__ == '__main__':
  main()
