"""Timing shared by the benchmarks: interleaved runs, median and spread, one JSON line."""

from __future__ import annotations

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.evaluation.base import environment
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.training.state import abstract_state, build_optimizer, init_state
from wallwm_jax.training.step import make_train_step
from wallwm_jax.types import Frozen, NormStats


def time_side_by_side(
  calls: Mapping[str, Callable[[], Any]],
  *,
  rounds: int,
  warmup: int = 2,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
  """Seconds of every call in every round. Calls alternate, so noise of a shared machine meets all
  of them.

  Args:
    clock: `time.process_time` counts the processor time of all threads instead, which other jobs
      of a busy machine disturb less.
  """
  for _ in range(warmup):
    for call in calls.values():
      jax.block_until_ready(call())
  times: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      start = clock()
      jax.block_until_ready(call())
      times[name].append(clock() - start)
  return times


def ratio(times: Mapping[str, list[float]], numerator: str, denominator: str) -> dict[str, float]:
  """Median over rounds of the per-round ratio, with its quartiles."""
  ratios = sorted(a / b for a, b in zip(times[numerator], times[denominator], strict=True))
  low, middle, high = statistics.quantiles(ratios, n=4)
  return {'value': middle, 'quartile_low': low, 'quartile_high': high}


def train_step(config: ExperimentConfig, batch: Any = None) -> Callable[[], Any]:
  """A whole optimizer step on a fixed batch (random where none is given), as a call without
  arguments.
  """
  mesh = make_mesh(config.mesh)
  optimizer = build_optimizer(config, mesh)
  abstract = abstract_state(config, optimizer, mesh)
  step = make_train_step(config, mesh, optimizer, abstract)
  a, c = config.model.action_spec.dim, config.model.codec.channels
  frozen = Frozen(NormStats(*(f((n,)) for n in (a, a, c) for f in (jnp.zeros, jnp.ones))))
  batch = jax.device_put(config.fake_batch() if batch is None else batch)
  state = init_state(config, optimizer, abstract)

  def call():
    nonlocal state
    state, metrics = step(state, batch, frozen)
    return metrics

  return call


def report(what: str, unit: str, n: int, *, path: str | None = None, **figures: Any) -> None:
  """The benchmark's one JSON line, also written to `path` if given."""
  line = json.dumps({'what': what, 'unit': unit, 'n': n, **figures, 'environment': environment()})
  print(line)
  if path:
    pathlib.Path(path).write_text(line + '\n')
