"""What every evaluator shares: intervals, the JSON they are written to, and where they were
computed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
from typing import Any

import numpy as np

from wallwm_jax.types import DataError

LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'mujoco', 'numpy')
LIBRARIES += ('metaworld', 'gymnasium')  # named where they are installed


@dataclasses.dataclass(frozen=True)
class Interval:
  """An estimate with its confidence bounds; n: independent units behind it (trials, episodes)."""

  value: float
  low: float
  high: float
  n: int


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
  """Score interval of a success rate.

  Raises:
    DataError: no trials, or more successes than trials.

  Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
  """
  if trials < 1 or not 0 <= successes <= trials:
    raise DataError(
      f'wilson_interval: expected 0 <= successes <= trials >= 1, got {successes} of {trials}.'
    )
  z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
  rate = successes / trials
  centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
  spread = math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
  half = z * spread / (1 + z * z / trials)
  # The score interval contains the rate; rounding must not say otherwise at 0 and 1.
  return Interval(
    rate, max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate)), trials
  )


def bootstrap_interval(
  values, groups=None, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
  """Percentile bootstrap interval of a mean, drawing whole groups with replacement.

  Args:
    values: [n] numbers.
    groups: [n] labels of what was drawn together (episode ids); None = every value by itself.

  Raises:
    DataError: no values, or a different number of groups.
  """
  values = np.asarray(values, np.float64)
  groups = np.arange(len(values)) if groups is None else np.asarray(groups)
  if values.ndim != 1 or not len(values) or len(groups) != len(values):
    raise DataError(
      f'bootstrap_interval: expected values [n] with n >= 1 and one group each, got values '
      f'{values.shape} and groups {groups.shape}.'
    )
  _, index = np.unique(groups, return_inverse=True)
  sums, counts = np.bincount(index, values), np.bincount(index)
  rng = np.random.default_rng(seed)
  drawn = rng.integers(0, len(sums), (resamples, len(sums)))
  means = sums[drawn].sum(1) / counts[drawn].sum(1)
  low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
  return Interval(float(values.mean()), float(low), float(high), len(sums))


def skill(error: float, baseline: float) -> float:
  """1 - error / baseline: 1 is perfect, 0 no better than the baseline; NaN where the baseline is
  exact."""
  return 1 - error / baseline if baseline > 0 else math.nan


def to_plain(value: Any) -> Any:
  """`value` as JSON types: dataclasses become dicts, arrays lists, non-finite numbers None."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, dict):
    return {str(k): to_plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [to_plain(v) for v in value]
  if hasattr(value, 'tolist'):  # NumPy and JAX arrays and scalars
    return to_plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if isinstance(value, pathlib.Path):
    return str(value)
  return value


def write_json(path: str | pathlib.Path, results: Any) -> None:
  """Writes results as JSON, all of it or nothing: a reader never sees half a file."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  partial.write_text(json.dumps(to_plain(results), indent=2, allow_nan=False) + '\n')
  partial.replace(path)


def environment() -> dict[str, str]:
  """Versions and hardware of this process, for every report."""
  import jax

  found = {'python': platform.python_version(), 'platform': platform.platform()}
  for name in LIBRARIES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found | {
    'device': device_name(),
    'devices': str(jax.device_count()),
    'cpus': str(os.cpu_count()),
  }


def device_name() -> str:
  """Kind of the default device; for a CPU the processor's own name where the system tells it."""
  import jax

  kind = jax.devices()[0].device_kind
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if kind.lower() != 'cpu' or not cpuinfo.is_file():
    return kind
  names = [
    line.partition(':')[2].strip()
    for line in cpuinfo.read_text().splitlines()
    if 'model name' in line
  ]
  return names[0] if names else kind
