"""Timing shared by the benchmarks: interleaved runs, median and spread, one JSON line."""

from __future__ import annotations

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from wallwm_jax.evaluation.base import environment


def time_side_by_side(
  calls: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
  """Seconds of every call in every round. Calls alternate, so noise of a shared machine meets all
  of them.
  """
  for _ in range(warmup):
    for call in calls.values():
      jax.block_until_ready(call())
  times: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      times[name].append(time.perf_counter() - start)
  return times


def ratio(times: Mapping[str, list[float]], numerator: str, denominator: str) -> dict[str, float]:
  """Median over rounds of the per-round ratio, with its quartiles."""
  ratios = sorted(a / b for a, b in zip(times[numerator], times[denominator], strict=True))
  low, middle, high = statistics.quantiles(ratios, n=4)
  return {'value': middle, 'quartile_low': low, 'quartile_high': high}


def report(what: str, unit: str, n: int, *, path: str | None = None, **figures: Any) -> None:
  """The benchmark's one JSON line, also written to `path` if given."""
  line = json.dumps({'what': what, 'unit': unit, 'n': n, **figures, 'environment': environment()})
  print(line)
  if path:
    pathlib.Path(path).write_text(line + '\n')
