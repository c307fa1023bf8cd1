"""Joins a trained policy and the tabletop: batches of closed-loop attempts, scored or recorded.

`wallwm eval closedloop`, `wallwm rollout` and the quickstart call these.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.data.schema import LEVELS
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import pick_caption
from wallwm_jax.envs.tabletop import VIEWS, TabletopConfig, env_fns, tasks
from wallwm_jax.evaluation.closed_loop import ClosedLoopResult, evaluate
from wallwm_jax.inference import unified
from wallwm_jax.inference.rollout import (
  CaptionTable,
  LoopSpec,
  Rollout,
  chunk_policy,
  closed_loop,
  event_policy,
)
from wallwm_jax.models import functional
from wallwm_jax.text.factory import make_text_encoder
from wallwm_jax.types import ConfigError, InferenceParams

BATCH = 32  # attempts that run side by side
SOURCES = {'instruction': unified.instruction_source, 'atomic': unified.atomic_source}


@dataclasses.dataclass(frozen=True, eq=False)
class Attempts:
  """n finished attempts: their rollouts (NumPy, leading axis n), task kinds and instructions."""

  rollouts: Rollout
  kinds: list[str]
  instructions: list[str]
  fps: float

  def score(self) -> ClosedLoopResult:
    return evaluate(self.rollouts.success, self.rollouts.progress, self.kinds)

  def film(self, index: int) -> np.ndarray:
    """Executed frames [V, T, H, W, 3] uint8 of one recorded attempt, up to its last turn."""
    frames = self.rollouts.turns.frames[index, : self.rollouts.attempted[index]]
    return np.concatenate(list(frames), axis=1)


def caption_table(config: ExperimentConfig, store: EventStore) -> CaptionTable:
  """Every caption of the tabletop, encoded, with the median length of its events in a store.

  Captions that the store does not have get the median of all events.
  """
  columns = {level: store.column(level) for level in LEVELS}
  rate = config.model.steps_per_latent * config.data.stride
  latents = np.maximum(np.ceil((store.column('length') - 1) / rate), 1)
  named = [
    pick_caption({k: v[i] for k, v in columns.items()}, 'event') for i in range(len(latents))
  ]
  known = {name: latents[[n == name for n in named]] for name in set(named)}
  lengths = [np.median(known.get(caption, latents)) for caption in tasks.CAPTIONS]
  text = make_text_encoder(config.model.text).encode(tasks.CAPTIONS)
  return CaptionTable(text, np.ceil(lengths).astype(np.int32))


def untrained(config: ExperimentConfig, params: InferenceParams, seed: int = 0) -> InferenceParams:
  """The same model with the weights it started from; statistics are kept."""
  model = functional.init_params(config.model, jax.random.key(seed))
  return dataclasses.replace(params, model=model)


def attempt(
  config: ExperimentConfig,
  params: InferenceParams,
  suite: tasks.Task,
  captions: CaptionTable,
  *,
  max_steps: int,
  seed: int = 0,
  source: Literal['instruction', 'atomic'] = 'instruction',
  record: bool = False,
) -> Attempts:
  """Runs every task of a suite once; equal seeds give equal scenes and noise to every policy.

  Args:
    suite: tasks with a leading axis n (tasks.task_suite).
    max_steps: control steps an attempt may take; turns are as many events or chunks as fit.
    source: text of chunk windows; event windows always follow the caption of the next event.
    record: keep the executed frames.

  Raises:
    ConfigError: the model's cameras are not the tabletop's.
  """
  if config.model.views != VIEWS:
    raise ConfigError(
      f'config.model.views: expected the cameras of the tabletop {VIEWS}, got {config.model.views}.'
    )
  world = TabletopConfig(image_size=config.model.image_size)
  run = _program(config, world, max_steps, source, record)
  count = len(suite.kind)
  keys = jax.random.split(jax.random.key(seed), count)
  parts = [
    jax.device_get(
      run(params, captions, jax.tree.map(lambda x, rows=rows: x[rows], suite), keys[rows])
    )
    for rows in _batches(count)
  ]
  rollouts = jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)
  kinds = [tasks.TASK_KINDS[i] for i in np.asarray(suite.kind)]
  instructions = [tasks.CAPTIONS[i] for i in np.asarray(suite.instruction)]
  return Attempts(rollouts, kinds, instructions, 1 / world.control_period)


def _batches(count: int) -> list[np.ndarray]:
  """Row indices in parts of one size, so that one program fits all; the last part is filled up."""
  size = min(BATCH, count)
  return [np.minimum(np.arange(i, i + size), count - 1) for i in range(0, count, size)]


@functools.cache
def _program(config: ExperimentConfig, world: TabletopConfig, max_steps: int, source, record: bool):
  """(params, captions, tasks [n], keys [n]) -> Rollout [n]; equal arguments share one program."""
  chunk = config.data.window == 'chunk'
  bucket = config.model.future if chunk else config.data.buckets[-1]
  rate = config.model.steps_per_latent
  history = config.model.history if chunk else 0
  spec = LoopSpec(max(1, max_steps // (rate * bucket)), bucket, history, rate, record)
  text = SOURCES[source] if chunk else unified.atomic_source

  @jax.jit
  def run(params, captions, suite, keys):
    act = chunk_policy(params, config) if chunk else event_policy(params, config, bucket)
    one = functools.partial(closed_loop, act, text, env_fns(world), captions=captions, spec=spec)
    return jax.vmap(lambda task, key: one(task=task, key=key))(suite, keys)

  return run
