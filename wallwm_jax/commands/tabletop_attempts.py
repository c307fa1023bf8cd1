"""Joins a trained policy and the tabletop: batches of closed-loop attempts, each batch one jitted
call, scored or recorded."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from wallwm_jax.commands.attempts import (
  HUMAN,
  Attempts,
  check_source,
  default_source,
  make_act,
  make_source,
)
from wallwm_jax.config import ExperimentConfig
from wallwm_jax.envs.tabletop import VIEWS, TabletopConfig, env_fns, tasks
from wallwm_jax.evaluation.closed_loop import time_to_success
from wallwm_jax.inference.language import PlanningTable
from wallwm_jax.inference.rollout import LoopSpec, Rollout, closed_loop
from wallwm_jax.inference.sources import Ask, CaptionTable
from wallwm_jax.inference.waiting import HOLD
from wallwm_jax.types import ConfigError, InferenceParams

BATCH = 32  # attempts that run side by side
MAX_STEPS = 64  # control steps of an attempt, unless asked for otherwise


def attempt(
  config: ExperimentConfig,
  params: InferenceParams,
  suite: tasks.Task,
  captions: CaptionTable,
  *,
  max_steps: int,
  seed: int = 0,
  source: str = '',
  planning: PlanningTable | None = None,
  ask: Ask | None = None,
  record: bool = False,
  delay: int = 0,
  waiting: str = HOLD,
) -> Attempts:
  """Runs every task of a suite once; equal seeds give equal scenes and noise to every policy.

  Args:
    suite: tasks with a leading axis n (tasks.task_suite).
    captions: of `attempts.caption_table`, rows as in tasks.CAPTIONS.
    max_steps: control steps an attempt may take; turns are as many events or chunks as fit.
    source: what the policy is told by, one of SOURCES; '' = `default_source`.
    planning: for the sources that ask a VLM; ask: who is asked, for 'human'.
    record: keep the executed frames.
    delay: control steps between an observation and the first action answered to it; they count into
      max_steps. waiting: what the robot does in them, 'hold' or 'run' (LoopSpec).

  Raises:
    ConfigError: the model's cameras are not the tabletop's, the source is unknown or needs a
      language side that the model has not, or a delay that cannot be run through.
  """
  source = source or default_source(config)
  check_source(params, source, ask)
  if config.model.views != VIEWS:
    raise ConfigError(
      f'config.model.views: expected the cameras of the tabletop {VIEWS}, got {config.model.views}.'
    )
  world = TabletopConfig(image_size=config.model.image_size)
  run = _program(config, world, max_steps, source, ask, record, delay, waiting)
  count = len(suite.kind)
  keys = jax.random.split(jax.random.key(seed), count)
  parts = [
    jax.device_get(
      run(params, captions, planning, jax.tree.map(lambda x, i=rows: x[i], suite), keys[rows])
    )
    for rows in _batches(count, 1 if source == HUMAN else BATCH)
  ]
  done: Rollout = jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)
  turn_steps = done.turns.poses.shape[2]
  return Attempts(
    done,
    [tasks.TASK_KINDS[i] for i in np.asarray(suite.kind)],
    [tasks.CAPTIONS[i] for i in np.asarray(suite.instruction)],
    tasks.CAPTIONS,
    time_to_success(done.success, done.attempted, turn_steps * world.control_period),
    1 / world.control_period,
    source,
    delay,
    waiting,
    films=[list(done.turns.frames[i, :n]) for i, n in enumerate(done.attempted)] if record else (),
  )


def _batches(count: int, most: int) -> list[np.ndarray]:
  """Row indices in parts of one size, so that one program fits all; the last part is filled up."""
  size = min(most, count)
  return [np.minimum(np.arange(i, i + size), count - 1) for i in range(0, count, size)]


@functools.cache
def _program(
  config: ExperimentConfig,
  world: TabletopConfig,
  max_steps: int,
  source: str,
  ask: Ask | None,
  record: bool,
  delay: int,
  waiting: str,
):
  """(params, captions, planning, tasks [n], keys [n]) -> Rollout [n]; equal arguments share one
  program."""

  @jax.jit
  def run(params, captions, planning, suite, keys):
    act, bucket, history = make_act(params, config)
    rate = config.model.steps_per_latent
    spec = LoopSpec(1, bucket, history, rate, record, delay, waiting)
    spec = dataclasses.replace(spec, turns=max(1, max_steps // spec.turn_steps))
    period = world.control_period
    told = make_source(source, params, planning, config, control_period=period, ask=ask)
    one = functools.partial(closed_loop, act, told, env_fns(world), captions=captions, spec=spec)
    if source == HUMAN:
      return jax.lax.map(lambda pair: one(task=pair[0], key=pair[1]), (suite, keys))
    return jax.vmap(lambda task, key: one(task=task, key=key))(suite, keys)

  return run
