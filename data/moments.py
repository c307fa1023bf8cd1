"""Moments inside events, for the stages of the language side: what is seen, what is asked, what
would be right to answer.

A moment is a frame start <= t < end - 1 of an event that did not fail (a failed attempt is never a
plan) and has a caption. Training draws events as the other stages do (balanced by label) and frames
of an event uniformly; every other batch is of first frames, as that is when a planner is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.data import pipeline, traces
from wallwm_jax.data.captions import CaptionTable, EncodeText
from wallwm_jax.data.permutation import mix64
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import Draw, WindowReader, event_captions
from wallwm_jax.types import ConfigError, LanguageBatch, NormStats, Prompt

FAILED = 'failed'  # flag of an event that did not reach its end


class Texts(Protocol):
  """What turns texts into token ids (`text.planning.PlanningTexts`); all NumPy, padded behind."""

  def prompts(self, instructions: Sequence[str]) -> Prompt:
    """[n, S]"""

  def answers(self, captions: Sequence[str]) -> Prompt:
    """[n, Y]"""

  def traces(self, texts: Sequence[str]) -> Prompt:
    """[n, M]"""


def make_moments(
  config: ExperimentConfig,
  store: EventStore,
  norm: NormStats,
  encode_text: EncodeText,
  texts: Texts,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> pipeline.BatchIterator:
  """The LanguageBatches of one host, endless; arguments as those of `pipeline.make_dataset`.

  In stage 'vlm' the field `trace` holds reasoning traces and plans with times, half of each.

  Raises:
    ConfigError: the store does not fit the config, has no event to plan in its split, or texts are
      longer than the config allows.
  """
  source = pipeline.PlanSource(store, config, process_count, moments=plan_events(store, config))
  reader = make_moment_reader(config, store, norm, encode_text, texts, jitter=True)
  depends = {'moments': config.train.stage == 'vlm', 'phrasing': config.data.phrasing}
  plan = pipeline.fingerprint(config, store, source) | depends
  return pipeline.open_stream(config, source, reader, plan, process_index, process_count)


def make_moment_reader(
  config: ExperimentConfig,
  store: EventStore,
  norm: NormStats,
  encode_text: EncodeText,
  texts: Texts,
  *,
  jitter: bool = False,
) -> MomentReader:
  """A MomentReader whose captions are encoded once, here, in the calling process."""
  bank = caption_bank(store)
  table = CaptionTable(encode_text, bank)
  rows = {caption: row for row, caption in enumerate(bank)}
  row_of = np.array([rows.get(text, -1) for text in event_captions(store, 'event')])
  norm = NormStats(*(np.asarray(value, np.float32) for value in vars(norm).values()))
  frames = WindowReader(store, _of_events(config), norm, table, row_of, jitter=jitter)
  return MomentReader(store, config, norm, frames, table, row_of, texts)


def moment_batches(
  config: ExperimentConfig,
  store: EventStore,
  norm: NormStats,
  encode_text: EncodeText,
  texts: Texts,
  *,
  where: Literal['start', 'random'],
  limit: int | None = None,
) -> Iterator[LanguageBatch]:
  """One moment of every event to plan of config.data.split, in the order of the index; batches of
  config.data.batch_size, the last one may be smaller. For evaluation.

  Args:
    where: the event's first frame, or one that a hash of the event picks. limit: at most so many
      events, spread evenly over the split.
  """
  draws = moment_draws(config, store, where=where, limit=limit)
  reader = make_moment_reader(config, store, norm, encode_text, texts)
  size = config.data.batch_size
  for i in range(0, len(draws), size):
    yield pipeline.stack([reader(draw) for draw in draws[i : i + size]])


def moment_draws(
  config: ExperimentConfig,
  store: EventStore,
  *,
  where: Literal['start', 'random'],
  limit: int | None = None,
) -> list[Draw]:
  """The draws of `moment_batches`."""
  events = plan_events(store, config)
  if limit is not None and limit < len(events):
    events = events[np.linspace(0, len(events) - 1, limit).round().astype(int)]
  start, end, uid = store.column('start'), store.column('end'), store.column('uid')
  draws = []
  for event in events.tolist():
    number = mix64(int(uid[event]))
    offset = 0 if where == 'start' else number % int(end[event] - start[event] - 1)
    draws.append(Draw(event, 0, int(start[event]) + offset, mix64(number) % 2**32))
  return draws


class Words:
  """What is asked and what would be right to answer at the moments (draws) of a store, as text."""

  def __init__(self, store: EventStore, config: ExperimentConfig):
    self._store, self._phrasing = store, config.data.phrasing
    self._timed = config.train.stage == 'vlm'
    self._captions, self._tasks = (event_captions(store, k) for k in ('event', 'instruction'))
    self._episode, self._start, self._end = map(store.column, ('episode', 'start', 'end'))
    self._fps = store.column('fps', 'episodes')
    self._before = _completed_before(self._episode, _plannable(store))

  def instruction(self, draw: Draw) -> str:
    return traces.instruct(self._tasks[draw.event], self._phrasing, draw.choice)

  def caption(self, draw: Draw) -> str:
    return self._captions[draw.event]

  def trace(self, draw: Draw) -> str:
    """Reasoning or, in stage 'vlm', every other time the plan with the time that it takes."""
    if self._timed and mix64(draw.choice) % 2:
      return traces.timed_plan(self.caption(draw), self.seconds(draw.event, draw.anchor))
    return traces.trace(self.facts(draw), traces.style_of(self.instruction(draw)))

  def facts(self, draw: Draw) -> traces.Facts:
    info = self._store.info(int(self._episode[draw.event]))
    before, where = self.before(draw.event), ''
    if info.state is not None:
      goal = info.state[int(self._end[draw.event]) - 1]
      where = traces.goal_words(info.state[draw.anchor], goal, info.source)
    return traces.Facts(
      task=self._tasks[draw.event],
      done=self._captions[before] if before >= 0 else '',
      next=self.caption(draw),
      where=where,
    )

  def before(self, event: int) -> int:
    """The event of the same episode that was completed last before this one; -1 = none."""
    return int(self._before[event])

  def seconds(self, event: int, frame: int) -> float:
    """s from a frame to the last one of an event."""
    return float(self._end[event] - 1 - frame) / float(self._fps[self._episode[event]])

  def duration(self, event: int) -> float:
    """s of a whole event."""
    return self.seconds(event, int(self._start[event]))


class MomentReader:
  """Reads the moment of a Draw (event, -, frame, choice) out of a store; picklable, stateless.

  Args:
    window: reads pixels and states. captions: features of the caption bank; row_of: int [events],
      row of each event in it.
  """

  def __init__(
    self,
    store: EventStore,
    config: ExperimentConfig,
    norm: NormStats,
    window: WindowReader,
    captions: CaptionTable,
    row_of: np.ndarray,
    texts: Texts,
  ):
    self._store, self._norm, self._window, self._texts = store, norm, window, texts
    self._views, self._captions, self._row_of = config.model.views, captions, row_of
    self._episode = store.column('episode')
    self.words = Words(store, config)

  def __call__(self, draw: Draw) -> LanguageBatch:
    """One LanguageBatch element (no batch axis)."""
    words, texts, norm = self.words, self._texts, self._norm
    info = self._store.info(int(self._episode[draw.event]))
    row, before = int(self._row_of[draw.event]), words.before(draw.event)
    state = (self._window.state(draw) - norm.state_mean) / norm.state_scale
    return LanguageBatch(
      frames=self._window.frames(draw)[:, 0],
      state=state.astype(np.float32),
      view_mask=np.array([name in info.views for name in self._views]),
      prompt=_only(texts.prompts([words.instruction(draw)])),
      answer=_only(texts.answers([words.caption(draw)])),
      trace=_only(texts.traces([words.trace(draw)])),
      text=self._captions[row],
      caption=np.int32(row),
      last=np.int32(-1 if before < 0 else self._row_of[before]),
      remaining=np.float32(words.seconds(draw.event, draw.anchor)),
      duration=np.float32(words.duration(draw.event)),
      uid=self._window.uid(draw),
    )


def caption_bank(store: EventStore) -> list[str]:
  """The distinct captions of the events that did not fail, of all splits, sorted."""
  captions = np.array(event_captions(store, 'event'), dtype=object)
  return sorted(set(captions[_plannable(store)].tolist()))


def plan_events(store: EventStore, config: ExperimentConfig) -> np.ndarray:
  """Rows of the event index of config.data.split whose moments are drawn.

  Raises:
    ConfigError: there are none, or the store does not fit the config.
  """
  rows = pipeline.split_events(store, _of_events(config))
  chosen = rows[_plannable(store)[rows]]
  if not len(chosen):
    raise ConfigError(
      f'data.split={config.data.split!r}: none of its {len(rows)} events in {store.path} has a '
      'caption and did not fail, so there is nothing to plan. Caption its events.'
    )
  return chosen


def tokenizer_texts(store: EventStore, config: ExperimentConfig) -> list[str]:
  """What a small tokenizer is trained on: for two moments of every event of config.data.split the
  instruction in a training wording, the plan with its time, and the trace."""
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, phrasing='train', batch_size=1)
  )
  words, texts = Words(store, config), []
  for where in ('start', 'random'):
    for draw in moment_draws(config, store, where=where):
      wording, plan = words.instruction(draw), words.caption(draw)
      texts += [
        wording,
        traces.timed_plan(plan, words.seconds(draw.event, draw.anchor)),
        traces.trace(words.facts(draw), traces.style_of(wording)),
      ]
  return texts


def _of_events(config: ExperimentConfig) -> ExperimentConfig:
  """The config with one frame per window: moments read neither history, future nor latents."""
  data = dataclasses.replace(config.data, window='event', latents='')
  return dataclasses.replace(config, data=data)


def _plannable(store: EventStore) -> np.ndarray:
  """bool [events]: has a caption and did not fail."""
  failed = [FAILED in flags for flags in store.events['flags'].to_pylist()]
  named = [bool(caption) for caption in event_captions(store, 'event')]
  return np.array(named, bool) & ~np.array(failed, bool)


def _completed_before(episode: np.ndarray, completed: np.ndarray) -> np.ndarray:
  """int [events]: the last event of the same episode that was completed before each event, -1 where
  there is none. Events of an episode lie together, in order of time."""
  result = np.full(len(episode), -1)
  for event in range(1, len(episode)):
    if episode[event - 1] == episode[event]:
      result[event] = event - 1 if completed[event - 1] else result[event - 1]
  return result


def _only(prompt: Prompt) -> Prompt:
  """The only row of a batch of one."""
  return Prompt(prompt.ids[0], prompt.mask[0])
