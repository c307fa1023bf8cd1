"""Joins a trained language side, a store and the scores of `evaluation.language`.

`wallwm eval language` and the quickstart call these.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax.config import ExperimentConfig, LanguageConfig
from wallwm_jax.data import moments, pipeline
from wallwm_jax.data.store import EventStore
from wallwm_jax.evaluation.language import PlanScore, TraceScore, score_plans, score_traces
from wallwm_jax.evaluation.report import Reasoning
from wallwm_jax.inference.language import explain
from wallwm_jax.models import language
from wallwm_jax.text.factory import make_text_encoder
from wallwm_jax.text.planning import make_planning_texts
from wallwm_jax.types import InferenceParams, LanguageBatch

Phrasing = Literal['canonical', 'train', 'heldout']


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
  """One moment per event of a split, in one way of putting the instruction.

  where: the first frame of each event or one drawn by its hash; limit: at most so many events.
  """

  config: ExperimentConfig
  params: InferenceParams
  store: EventStore
  where: Literal['start', 'random'] = 'random'
  phrasing: Phrasing = 'train'
  split: str = 'heldout'
  limit: int | None = None

  def batches(self) -> Iterator[LanguageBatch]:
    """Batches of config.data.batch_size, the last one filled up with its last moment."""
    size = min(self.config.data.batch_size, len(self.draws))
    for start in range(0, len(self.draws), size):
      chosen = np.minimum(np.arange(start, start + size), len(self.draws) - 1)
      yield pipeline.stack([self._reader(self.draws[i]) for i in chosen])

  def column(self, name: str) -> np.ndarray:
    """A column of the event index for each moment."""
    return self.store.column(name)[[draw.event for draw in self.draws]]

  @functools.cached_property
  def draws(self) -> list:
    return moments.moment_draws(self._config, self.store, where=self.where, limit=self.limit)

  @functools.cached_property
  def texts(self):
    return make_planning_texts(self.config)

  @functools.cached_property
  def words(self) -> moments.Words:
    return self._reader.words

  @functools.cached_property
  def _config(self) -> ExperimentConfig:
    data = dataclasses.replace(self.config.data, split=self.split, phrasing=self.phrasing)
    return dataclasses.replace(self.config, data=data)

  @functools.cached_property
  def _reader(self) -> moments.MomentReader:
    encode = make_text_encoder(self.config.model.text).encode
    return moments.make_moment_reader(
      self._config, self.store, self.params.norm, encode, self.texts
    )


def evaluate(seen: Moments) -> dict:
  """All scores as JSON: 'plans' at event starts and at moments drawn inside, and, of a model with
  a staircase, 'traces' of instructions as they were trained and in held-out wordings."""
  at = {'start': 'event starts', 'random': 'inside events'}
  plans = {name: dataclasses.replace(seen, where=where) for where, name in at.items()}
  found = {'plans': {name: evaluate_plans(m).to_json() for name, m in plans.items()}}
  if 'staircase' in seen.params.model:
    told = {name: dataclasses.replace(seen, phrasing=name) for name in ('train', 'heldout')}
    found['traces'] = {name: evaluate_traces(m).to_json() for name, m in told.items()}
  return found


def evaluate_plans(seen: Moments) -> PlanScore:
  """Whether the next-event head names the running event, and when the regressor says it ends."""
  c, text = seen.config.language, seen.config.model.text

  @jax.jit
  def plan(params, batch):
    side, heads = params.frozen.language, params.model['heads']
    reading = language.read_prompt(
      side, c, batch.frames, batch.state, batch.view_mask, batch.prompt
    )
    logits, seconds = language.plan(heads, side, c, text, *reading, batch.last)
    return jnp.argmax(logits, -1), seconds

  named, seconds, truth, remaining, duration = _collect(
    seen, lambda batch: (*plan(seen.params, batch), batch.caption, batch.remaining, batch.duration)
  )
  kinds = [label.split(' ')[0] for label in seen.column('label').tolist()]
  return score_plans(
    named, truth, seconds, remaining, duration, kinds, seen.column('episode').tolist()
  )


def evaluate_traces(seen: Moments) -> TraceScore:
  """How much of the reasoning trace the frozen reader reconstructs from the latents."""
  c = seen.config.language

  @jax.jit
  def reconstruct(params, batch):
    side, latents = params.frozen.language, _latents(params, c, batch)
    logits = language.trace_logits(
      params.model['projector'], side.reader, c, latents, batch.trace
    )
    return jnp.argmax(logits, -1)

  predicted, truth, mask = _collect(
    seen, lambda batch: (reconstruct(seen.params, batch), batch.trace.ids, batch.trace.mask)
  )
  return score_traces(predicted, truth, mask)


def reasonings(seen: Moments) -> list[Reasoning]:
  """What the robot sees, is asked and should think at each moment, and what the reader says its
  latents mean, token by token on its own."""
  texts = seen.texts

  @jax.jit
  def say(params, batch):
    latents = _latents(params, seen.config.language, batch)
    return explain(params, latents, cfg=seen.config, end=texts.end)

  said, frames = _collect(seen, lambda batch: (say(seen.params, batch), batch.frames))
  return [
    Reasoning(seen.words.instruction(draw), image, seen.words.trace(draw), texts.text(ids))
    for draw, ids, image in zip(seen.draws, said, frames, strict=True)
  ]


def _latents(params: InferenceParams, c: LanguageConfig, batch: LanguageBatch):
  side = params.frozen.language
  _, _, cache = language.read_prompt(
    side, c, batch.frames, batch.state, batch.view_mask, batch.prompt
  )
  return language.latent_states(params.model['staircase'], side.vlm, c, cache)


def _collect(seen: Moments, compute: Callable[[LanguageBatch], tuple]) -> list[np.ndarray]:
  """What `compute` makes of every batch, one array [n, ...] per entry of its answer."""
  parts = [jax.device_get(compute(batch)) for batch in seen.batches()]
  return [np.concatenate(column)[: len(seen.draws)] for column in zip(*parts, strict=True)]
