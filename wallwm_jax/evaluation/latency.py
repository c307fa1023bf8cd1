"""Wall-clock latency of compiled functions, measured after the result has reached host memory."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from wallwm_jax.evaluation.base import device_name


@dataclasses.dataclass(frozen=True)
class Latency:
  """Milliseconds per call over n calls after warm-up; first_ms is the very first call
  (compilation); times_ms: of each of the n calls."""

  p50_ms: float
  p90_ms: float
  p99_ms: float
  max_ms: float
  first_ms: float
  n: int
  times_ms: tuple[float, ...] = ()

  @property
  def hz(self) -> float:
    """Calls per second at the median."""
    return 1e3 / self.p50_ms

  def missed(self, rate: float) -> float:
    """Share of the calls that took longer than a period of `rate` Hz."""
    return float(np.mean(np.asarray(self.times_ms) > 1e3 / rate))


def measure(call: Callable[[], Any], *, calls: int = 200, warmup: int = 3) -> Latency:
  """Times `call()`, which returns arrays: each call ends when its result lies in host memory."""
  return _measure(lambda: _timed(call), calls, warmup)


def measure_copy(call: Callable[[], Any], *, calls: int = 200, warmup: int = 3) -> Latency:
  """Times only the way of what `call()` computes from the device to host memory."""

  def timed() -> float:
    ready = jax.block_until_ready(call())  # anew each time: an array remembers its copy
    return _timed(lambda: ready)

  return _measure(timed, calls, warmup)


def _measure(timed: Callable[[], float], calls: int, warmup: int) -> Latency:
  first = timed()
  for _ in range(warmup):
    timed()
  times = np.array([timed() for _ in range(calls)])
  p50, p90, p99 = np.percentile(times, [50, 90, 99])
  return Latency(float(p50), float(p90), float(p99), float(times.max()), first, calls,
                 tuple(times.tolist()))  # fmt: skip


def _timed(call: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.device_get(jax.block_until_ready(call()))
  return 1e3 * (time.perf_counter() - start)


def peak_memory() -> dict[str, float | str]:
  """peak_memory_mib since the process began, and peak_memory_of: the device where it tells, else
  the resident memory of the process."""
  stats = jax.devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return {'peak_memory_mib': stats['peak_bytes_in_use'] / 2**20, 'peak_memory_of': 'device'}
  scale = 2**20 if sys.platform == 'darwin' else 2**10  # bytes there, KiB elsewhere
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
  return {'peak_memory_mib': peak, 'peak_memory_of': 'process'}


def measure_parts(
  parts: Mapping[str, Callable[[], Any]], *, calls: int = 200, warmup: int = 3
) -> dict[str, Any]:
  """{'device': name, 'parts': {name: Latency}} of each named call."""
  timed = {name: measure(call, calls=calls, warmup=warmup) for name, call in parts.items()}
  return {'device': device_name(), 'parts': timed}
