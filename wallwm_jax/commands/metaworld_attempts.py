"""Joins a trained policy and Meta-World: closed-loop attempts in parallel environment processes,
scored or filmed."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Sequence

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
from wallwm_jax.envs.metaworld import MAX_STEPS, VIEWS, tasks, workers
from wallwm_jax.inference import hosted
from wallwm_jax.inference.language import PlanningTable
from wallwm_jax.inference.rollout import new_mind
from wallwm_jax.inference.sources import NOTHING, Ask, CaptionTable
from wallwm_jax.inference.waiting import HOLD
from wallwm_jax.types import ConfigError, InferenceParams

BATCH = 8  # attempts that share a call of the policy; twice as many environments are held
CONTROL_PERIOD = 0.0125  # s
_MOST_PROCESSES = 8
_PURPOSE = zlib.crc32(b'closed loop')  # keeps these seeds apart from those of demonstrations


def episode_seed(seed: int, task: str, k: int) -> int:
  """Of the simulator, for the k-th attempt at a task: the same in every suite that has it."""
  drawn = [_PURPOSE, seed, tasks.SUITES['MT50'].index(task), k]
  return int(np.random.SeedSequence(drawn).generate_state(1)[0])


def attempt(
  config: ExperimentConfig,
  params: InferenceParams,
  names: Sequence[str],
  captions: CaptionTable,
  *,
  per_task: int,
  max_steps: int = MAX_STEPS,
  seed: int = 0,
  source: str = '',
  planning: PlanningTable | None = None,
  ask: Ask | None = None,
  record: bool = False,
  delay: int = 0,
  waiting: str = HOLD,
  processes: int | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Attempts:
  """Runs `per_task` episodes of every task; equal seeds give equal starts and noise to every
  policy, in whatever suite.

  Args:
    names: tasks of Meta-World.
    captions: of `attempts.caption_table`, rows as in tasks.CAPTIONS.
    max_steps: control steps an attempt may take.
    source: what the policy is told by, one of SOURCES; '' = `default_source`.
    planning: for the sources that ask a VLM; ask: who is asked, for 'human'.
    record: keep a frame of every executed action.
    delay: control steps between an observation and the first action answered to it; they count into
      max_steps. waiting: what the robot does in them; here it can only hold.
    processes: of environments (one per core, at most 8).
    progress: called with (finished, all) attempts.

  Raises:
    ConfigError: the model's cameras are not Meta-World's, the source is unknown or needs a language
      side that the model has not, it was asked to run on while it waits, or Meta-World is missing.
  """
  if waiting != HOLD:
    raise ConfigError(
      f'waiting: expected {HOLD!r} in Meta-World, got {waiting!r}. The tabletop has both.'
    )
  source = source or default_source(config)
  check_source(params, source, ask)
  model = config.model
  if not set(model.views) <= set(VIEWS):
    raise ConfigError(
      f'config.model.views: expected some of the cameras of Meta-World {VIEWS}, got {model.views}.'
    )
  chosen = [(task, k) for task in names for k in range(per_task)]
  starts = [workers.Start(task, episode_seed(seed, task, k)) for task, k in chosen]
  key, length = jax.random.key(seed), max(len(tasks.script_rows(task)) for task in names)
  asked = [
    hosted.Attempt(
      start,
      tasks.instruction_row(start.task),
      np.array((tasks.script_rows(start.task) + [NOTHING] * length)[:length], np.int32),
      jax.random.fold_in(key, start.seed),
    )
    for start in starts
  ]
  decide, mind, history = _policy(config, params, source, captions, planning, ask)
  turns = workers.Turns(
    size=tuple(model.image_size),
    views=tuple(model.views),
    stride=config.data.stride,
    past=history * model.steps_per_latent,
    delay=delay,
    max_steps=max_steps,
    record=record,
  )
  wanted = min(os.cpu_count() or 1, _MOST_PROCESSES) if processes is None else processes
  run = functools.partial(
    hosted.run_attempts, decide, mind, move=workers.Move, batch=BATCH,
    follows_script=source == 'atomic', progress=progress,
  )  # fmt: skip
  # A person thinks about one attempt at a time.
  parts = [[one] for one in asked] if source == HUMAN else [asked]
  lanes = hosted.lanes_of(max(len(part) for part in parts), BATCH)
  with workers.Workers(turns, lanes, wanted) as worlds:
    done = [history for part in parts for history in run(worlds=worlds, attempts=part)]
  return _attempts(done, starts, source, config, turns)


def _attempts(histories, starts, source: str, config, turns: workers.Turns) -> Attempts:
  last = [history.seen[-1] for history in histories]
  steps = np.array([seen.steps for seen in last])
  films = [
    [seen.film for seen in history.seen if seen.film is not None]
    for history in histories if turns.record
  ]  # fmt: skip
  return Attempts(
    hosted.as_rollouts(histories),
    [start.task for start in starts],
    [tasks.task_of(start.task).instruction for start in starts],
    tasks.CAPTIONS,
    np.where([seen.success for seen in last], steps * CONTROL_PERIOD, np.nan),
    1 / (CONTROL_PERIOD * turns.stride),
    source,
    turns.delay,
    facts={
      'seed': [start.seed for start in starts],
      'steps': steps.tolist(),
      'reached': [tasks.CAPTIONS[seen.reached] for seen in last],
    },
    suite={'world': 'metaworld'},
    films=films,
  )


def _policy(config: ExperimentConfig, params, source: str, captions, planning, ask):
  """(decide, mind, history): arguments of `hosted.run_attempts`, and latents looked back on."""
  program = _program(config, source, ask)
  told = _source(config, source, params, planning, ask)
  _, _, history = make_act(params, config)
  decide = functools.partial(program, params, captions, planning)
  return decide, new_mind(told, captions), history


def _source(config: ExperimentConfig, source: str, params, planning, ask):
  return make_source(source, params, planning, config, control_period=CONTROL_PERIOD, ask=ask)


@functools.cache
def _program(config: ExperimentConfig, source: str, ask: Ask | None):
  """(params, captions, planning, sights [b], minds [b], keys [b], fresh [b]) -> what `Decide` says;
  equal arguments share one program."""

  @jax.jit
  def run(params, captions, planning, sight, mind, key, fresh):
    act, bucket, _ = make_act(params, config)
    told = _source(config, source, params, planning, ask)
    rate = config.model.steps_per_latent
    return hosted.batched(act, told, captions, bucket=bucket, rate=rate)(sight, mind, key, fresh)

  return run
