"""Kernels against XLA on the accelerator at hand: every case of `kernel_cases`, timed side by side;
one JSON line per case.

wallwm bench kernels
wallwm bench kernels cached_attention --rounds 50 > kernels.jsonl

Without an accelerator `wallwm bench static_cost` estimates the same cases for TPUs. A case whose
kernel the device does not take is reported as such, with the reason, and XLA's times beside it.
"""

from __future__ import annotations

import argparse
import statistics

import harness
import jax
import kernel_cases

from wallwm_jax.types import ConfigError


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('ops', nargs='*', metavar='op', help=f'of {kernel_cases.ops()}; default: all')
  parser.add_argument('--rounds', type=int, default=30, help='timed calls of every program')
  args = parser.parse_args()
  device = jax.devices()[0]
  if device.platform == 'cpu':
    raise ConfigError(
      'bench kernels: expected a GPU or a TPU, got a CPU, on which there are no kernels. '
      'For estimates without one: wallwm bench static_cost OP.'
    )
  for op in args.ops or kernel_cases.ops():
    for name in kernel_cases.load(op).NAMES:
      measure(op, name, args.rounds)


def measure(op: str, name: str, rounds: int) -> None:
  """Times every program of a case on the default device; a program that it does not take is left
  out with its reason.
  """
  case = kernel_cases.load(op).case(name)
  operands = jax.device_put(case.arrays())
  calls, refused = {}, {}
  for program, function in case.programs.items():
    try:
      compiled = jax.jit(function).lower(*operands).compile()
    except (NotImplementedError, ValueError) as error:  # Pallas says ValueError for a platform
      refused[program] = str(error).splitlines()[0]
      continue
    calls[program] = lambda compiled=compiled: compiled(*operands)
  times = harness.time_side_by_side(calls, rounds=rounds)
  us = {program: 1e6 * statistics.median(t) / case.units for program, t in times.items()}
  ours, best = kernel_cases.KERNEL, min(set(us) - {kernel_cases.KERNEL}, key=us.get)
  harness.report(
    f'{op} {name}: kernel / best of XLA, measured',
    'ratio',
    rounds,
    device=jax.devices()[0].device_kind,
    **(harness.ratio(times, ours, best) if ours in us else {'value': None}),
    best=best,
    us=us,
    spread_us={
      program: [1e6 * x / case.units for x in statistics.quantiles(t, n=4)[::2]]
      for program, t in times.items()
    },
    gb_per_s={program: case.ideal_bytes / t / 1e3 for program, t in us.items()},
    refused=refused,
  )


if __name__ == '__main__':
  main()
