"""Joins a trained policy and the tabletop: batches of closed-loop attempts, scored or recorded.

`wallwm eval closedloop`, `wallwm rollout` and the quickstart call these.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from wallwm_jax.commands.foresight import foresee
from wallwm_jax.config import ExperimentConfig
from wallwm_jax.data import traces
from wallwm_jax.data.schema import LEVELS
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import pick_caption
from wallwm_jax.envs.tabletop import VIEWS, TabletopConfig, env_fns, tasks
from wallwm_jax.evaluation.base import bootstrap_interval
from wallwm_jax.evaluation.closed_loop import (
  ClosedLoopResult,
  evaluate,
  seam_jump,
  time_to_success,
)
from wallwm_jax.evaluation.loop_sections import RolloutClip
from wallwm_jax.geometry.poses import relative_pose
from wallwm_jax.inference import language, sources
from wallwm_jax.inference.language import PlanningTable
from wallwm_jax.inference.rollout import (
  LoopSpec,
  Rollout,
  chunk_policy,
  closed_loop,
  event_policy,
)
from wallwm_jax.inference.sources import CaptionTable, Source
from wallwm_jax.inference.waiting import HOLD
from wallwm_jax.models import functional
from wallwm_jax.text.factory import make_text_encoder
from wallwm_jax.text.planning import PlanningTexts
from wallwm_jax.types import ConfigError, InferenceParams

BATCH = 32  # attempts that run side by side
SCRIPTS = {'instruction': sources.instruction, 'atomic': sources.atomic}
# Sources that ask a VLM, and the trained parts of the model that each needs.
SPEAKERS = {
  'planner': (language.planner, ('heads',)),
  'conditioned': (language.conditioned, ('heads',)),
  'staircase': (language.staircase, ('heads', 'staircase')),
}
PLANNERS = ('planner', 'conditioned')  # sources that name the caption they go by
SOURCES = (*SCRIPTS, *SPEAKERS)


@dataclasses.dataclass(frozen=True, eq=False)
class Attempts:
  """n finished attempts: their rollouts (NumPy, leading axis n), task kinds and instructions, and
  the source of text that they followed; delay: control steps waited in every turn, in which the
  robot did what `waiting` says (LoopSpec)."""

  rollouts: Rollout
  kinds: list[str]
  instructions: list[str]
  fps: float
  source: str
  delay: int = 0
  waiting: str = HOLD

  def score(self) -> ClosedLoopResult:
    done = self.rollouts
    return evaluate(done.success, done.progress, self.kinds, self._planned())

  def rows(self) -> list[dict]:
    """Each attempt: attempt, kind, instruction, success, progress 0..100, turns, time_s to success,
    seam_jump, and planned of a planner; NaN where there is none."""
    done = self.rollouts
    columns = {
      'attempt': range(len(self.kinds)),
      'kind': self.kinds,
      'instruction': self.instructions,
      'success': done.success.tolist(),
      'progress': done.progress.tolist(),
      'turns': done.attempted.tolist(),
      'time_s': self._times().tolist(),
      'seam_jump': self._jumps().tolist(),
    }
    planned = self._planned()
    columns |= {} if planned is None else {'planned': planned.tolist()}
    return [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]

  def motion(self) -> dict:
    """time_to_success (s, over successes) and seam_jump, each with _low, _high (95 %) and _n; only
    those that some attempt has."""
    flat: dict = {}
    for name, values in (('time_to_success', self._times()), ('seam_jump', self._jumps())):
      known = values[np.isfinite(values)]
      if len(known):
        found = bootstrap_interval(known)
        flat |= {name: found.value, f'{name}_low': found.low, f'{name}_high': found.high}
        flat[f'{name}_n'] = found.n
    return flat

  def _times(self) -> np.ndarray:
    steps = self.rollouts.turns.poses.shape[2]
    return time_to_success(self.rollouts.success, self.rollouts.attempted, steps / self.fps)

  def _jumps(self) -> np.ndarray:
    turns = self.rollouts.turns
    return seam_jump(turns.actions.actions, turns.actions.mask, turns.acted, self._moved())

  def _moved(self) -> np.ndarray | None:
    """[n, T, A]: how far the robot got while the policy computed; None where that took no time."""
    if not self.delay:
      return None
    reached = self.rollouts.turns.poses
    moved = relative_pose(reached[:, :-1, -1], reached[:, 1:, self.delay - 1])
    return np.pad(moved, [(0, 0), (1, 0), (0, 0)])  # the first turn has no seam

  def _planned(self) -> np.ndarray | None:
    if self.source not in PLANNERS:
      return None
    done = self.rollouts
    right = np.sum(done.turns.acted & (done.turns.asked == done.turns.caption), axis=1)
    return right / np.where(done.attempted, done.attempted, np.nan)

  def asked(self, index: int) -> list[str]:
    """The caption that each turn of one attempt went by; '' where that was no caption."""
    rows = self.rollouts.turns.asked[index, : self.rollouts.attempted[index]].tolist()
    return [tasks.CAPTIONS[row] if row != sources.NOTHING else '' for row in rows]

  def film(self, index: int) -> np.ndarray:
    """Executed frames [V, T, H, W, 3] uint8 of one recorded attempt, up to its last turn."""
    frames = self.rollouts.turns.frames[index, : self.rollouts.attempted[index]]
    return np.concatenate(list(frames), axis=1)


def clips(
  filmed: Attempts,
  config: ExperimentConfig,
  params: InferenceParams,
  captions: CaptionTable,
  seed: int = 0,
) -> list[RolloutClip]:
  """Recorded attempts as films, with what the video model predicted of each where a caption told
  it."""
  shown = []
  for i, text in enumerate(filmed.instructions):
    turns = int(filmed.rollouts.attempted[i])
    if turns:
      film, asked = filmed.film(i), filmed.rollouts.turns.asked[i, :turns].tolist()
      first = filmed.rollouts.first[i]
      predicted = foresee(config, params, film, first, asked, captions, seed)
      success = bool(filmed.rollouts.success[i])
      shown.append(RolloutClip(text, film, success, filmed.fps, predicted))
  return shown


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


def planning_table(texts: PlanningTexts, bank: Sequence[str]) -> PlanningTable:
  """Every caption of the tabletop as a VLM is asked about it.

  Args:
    bank: what the VLM may plan, in the order of its next-event logits.

  Raises:
    ConfigError: a caption of the bank that the tabletop does not have.
  """
  if unknown := [caption for caption in bank if caption not in tasks.CAPTIONS]:
    raise ConfigError(
      f'captions to plan with: expected captions of the tabletop, got {len(unknown)} others such '
      f'as {unknown[0]!r}. Give a store of the tabletop.'
    )
  asked = [traces.instruct(caption, 'canonical', 0) for caption in tasks.CAPTIONS]
  rows = np.array([tasks.CAPTIONS.index(caption) for caption in bank], np.int32)
  return PlanningTable(texts.prompts(asked), rows)


def untrained(config: ExperimentConfig, params: InferenceParams, seed: int = 0) -> InferenceParams:
  """The same model with the weights its towers started from; statistics and the language side are
  kept."""
  towers = functional.init_params(config.model, jax.random.key(seed))
  return dataclasses.replace(params, model=params.model | towers)


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
  record: bool = False,
  delay: int = 0,
  waiting: str = HOLD,
) -> Attempts:
  """Runs every task of a suite once; equal seeds give equal scenes and noise to every policy.

  Args:
    suite: tasks with a leading axis n (tasks.task_suite).
    max_steps: control steps an attempt may take; turns are as many events or chunks as fit.
    source: what the policy is told by, one of SOURCES; '' = `default_source`. Over chunks a plan is
      held until it has run out.
    planning: for the sources that ask a VLM.
    record: keep the executed frames.
    delay: control steps between an observation and the first action answered to it; they count into
      max_steps. waiting: what the robot does in them, 'hold' or 'run' (LoopSpec).

  Raises:
    ConfigError: the model's cameras are not the tabletop's, or the source is unknown or needs a
      language side that the model has not, or a delay that cannot be run through.
  """
  source = source or default_source(config)
  check_source(params, source)
  if config.model.views != VIEWS:
    raise ConfigError(
      f'config.model.views: expected the cameras of the tabletop {VIEWS}, got {config.model.views}.'
    )
  world = TabletopConfig(image_size=config.model.image_size)
  run = _program(config, world, max_steps, source, record, delay, waiting)
  count = len(suite.kind)
  keys = jax.random.split(jax.random.key(seed), count)
  parts = [
    jax.device_get(
      run(params, captions, planning, jax.tree.map(lambda x, i=rows: x[i], suite), keys[rows])
    )
    for rows in _batches(count)
  ]
  rollouts = jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)
  kinds = [tasks.TASK_KINDS[i] for i in np.asarray(suite.kind)]
  instructions = [tasks.CAPTIONS[i] for i in np.asarray(suite.instruction)]
  return Attempts(rollouts, kinds, instructions, 1 / world.control_period, source, delay, waiting)


def default_source(config: ExperimentConfig) -> str:
  """What tells a policy in the way it was trained: the staircase's latents where those were its
  text, else 'atomic' for events and 'instruction' for chunks."""
  if config.data.text == 'staircase':
    return 'staircase'
  return 'instruction' if config.data.window == 'chunk' else 'atomic'


def check_source(params: InferenceParams, source: str) -> None:
  """Raises ConfigError unless this model can be told by `source`."""
  if source not in SOURCES:
    raise ConfigError(f'source: expected one of {SOURCES}, got {source!r}.')
  if source in SPEAKERS:
    language.require_parts(params, SPEAKERS[source][1], f'source {source!r}')


def _batches(count: int) -> list[np.ndarray]:
  """Row indices in parts of one size, so that one program fits all; the last part is filled up."""
  size = min(BATCH, count)
  return [np.minimum(np.arange(i, i + size), count - 1) for i in range(0, count, size)]


@functools.cache
def _program(
  config: ExperimentConfig,
  world: TabletopConfig,
  max_steps: int,
  source: str,
  record: bool,
  delay: int,
  waiting: str,
):
  """(params, captions, planning, tasks [n], keys [n]) -> Rollout [n]; equal arguments share one
  program."""
  chunk = config.data.window == 'chunk'
  bucket = config.model.future if chunk else config.data.buckets[-1]
  rate = config.model.steps_per_latent
  history = config.model.history if chunk else 0
  spec = LoopSpec(1, bucket, history, rate, record, delay, waiting)
  spec = dataclasses.replace(spec, turns=max(1, max_steps // spec.turn_steps))

  @jax.jit
  def run(params, captions, planning, suite, keys):
    act = chunk_policy(params, config) if chunk else event_policy(params, config, bucket)
    told = _source(source, params, planning, config, world)
    one = functools.partial(closed_loop, act, told, env_fns(world), captions=captions, spec=spec)
    return jax.vmap(lambda task, key: one(task=task, key=key))(suite, keys)

  return run


def _source(name: str, params, planning, config: ExperimentConfig, world: TabletopConfig) -> Source:
  if name in SCRIPTS:
    return SCRIPTS[name]
  # Windows are cut at every stride-th frame, so that is how often the policy thinks it acts.
  fps = 1 / (world.control_period * config.data.stride)
  source = SPEAKERS[name][0](params, planning, cfg=config, fps=fps)
  hold = name in PLANNERS and config.data.window == 'chunk'
  return sources.held(source) if hold else source
