"""What closed-loop attempts of a trained policy share, in whichever world: what it is told by, the
tables that this needs, and the scores.

`tabletop_attempts` and `metaworld_attempts` carry them out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from wallwm_jax.commands.foresight import foresee
from wallwm_jax.config import ExperimentConfig
from wallwm_jax.data import traces
from wallwm_jax.data.schema import LEVELS
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import pick_caption
from wallwm_jax.evaluation.base import bootstrap_interval
from wallwm_jax.evaluation.closed_loop import ClosedLoopResult, evaluate, seam_jump
from wallwm_jax.evaluation.loop_sections import RolloutClip
from wallwm_jax.geometry.poses import relative_pose
from wallwm_jax.inference import language, sources
from wallwm_jax.inference.language import PLANNERS, SPEAKERS, PlanningTable
from wallwm_jax.inference.rollout import Act, Rollout, chunk_policy, event_policy
from wallwm_jax.inference.sources import Ask, CaptionTable, Source
from wallwm_jax.inference.waiting import HOLD
from wallwm_jax.models import functional
from wallwm_jax.text.factory import make_text_encoder
from wallwm_jax.text.planning import PlanningTexts
from wallwm_jax.types import ConfigError, InferenceParams

SCRIPTS = {
  'instruction': sources.instruction,
  'atomic': sources.atomic,
  'timed': sources.timed,
}
HUMAN = 'human'  # a person, asked about one attempt at a time
SOURCES = (*SCRIPTS, *SPEAKERS, HUMAN)


@dataclasses.dataclass(frozen=True, eq=False)
class Attempts:
  """n finished attempts.

  rollouts: NumPy, leading axis n; kinds: of task; instructions; captions: what the rows that turns
  name stand for; times: [n] s to success, NaN without; source of text that they followed; delay:
  control steps waited in every turn, in which the robot did what `waiting` says (LoopSpec); facts:
  more columns of `rows`; suite: what else decides which attempts these are; films: of each attempt
  the executed frames [V, T, H, W, 3] uint8 of every turn at fps Hz, where they were recorded.
  """

  rollouts: Rollout
  kinds: Sequence[str]
  instructions: Sequence[str]
  captions: Sequence[str]
  times: np.ndarray
  fps: float
  source: str
  delay: int = 0
  waiting: str = HOLD
  facts: Mapping[str, Sequence] = dataclasses.field(default_factory=dict)
  suite: Mapping[str, str] = dataclasses.field(default_factory=dict)
  films: Sequence[Sequence[np.ndarray]] = ()

  def score(self) -> ClosedLoopResult:
    done = self.rollouts
    return evaluate(done.success, done.progress, self.kinds, self._planned())

  def rows(self) -> list[dict]:
    """Each attempt: attempt, kind, instruction, success, progress 0..100, turns, time_s to success,
    seam_jump, the world's facts, and planned of a planner; NaN where there is none."""
    done = self.rollouts
    columns = {
      'attempt': range(len(self.kinds)),
      'kind': self.kinds,
      'instruction': self.instructions,
      'success': done.success.tolist(),
      'progress': done.progress.tolist(),
      'turns': done.attempted.tolist(),
      'time_s': self.times.tolist(),
      'seam_jump': self._jumps().tolist(),
    } | self.facts  # fmt: skip
    planned = self._planned()
    columns |= {} if planned is None else {'planned': planned.tolist()}
    return [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]

  def motion(self) -> dict:
    """time_to_success (s, over successes) and seam_jump, each with _low, _high (95 %) and _n; only
    those that some attempt has."""
    flat: dict = {}
    for name, values in (('time_to_success', self.times), ('seam_jump', self._jumps())):
      known = values[np.isfinite(values)]
      if len(known):
        found = bootstrap_interval(known)
        flat |= {name: found.value, f'{name}_low': found.low, f'{name}_high': found.high}
        flat[f'{name}_n'] = found.n
    return flat

  def _jumps(self) -> np.ndarray:
    turns = self.rollouts.turns
    return seam_jump(turns.actions.actions, turns.actions.mask, turns.acted, self._moved())

  def _moved(self) -> np.ndarray | None:
    """[n, T, A]: how far the robot got while the policy computed; None where that took no time, or
    the world does not tell the poses on the way."""
    reached = self.rollouts.turns.poses
    if not self.delay or reached is None:
      return None
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
    return [self.captions[row] if row != sources.NOTHING else '' for row in rows]


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
    turns = filmed.films[i]
    if len(turns):
      asked = filmed.rollouts.turns.asked[i, : len(turns)].tolist()
      first = filmed.rollouts.first[i]
      predicted = foresee(config, params, turns, first, asked, captions, seed)
      success = bool(filmed.rollouts.success[i])
      film = np.concatenate(list(turns), axis=1)
      shown.append(RolloutClip(text, film, success, filmed.fps, predicted))
  return shown


def caption_table(
  config: ExperimentConfig, store: EventStore, captions: Sequence[str]
) -> CaptionTable:
  """Every caption of a world, encoded, with the median length of its events in a store.

  Captions that the store does not have get the median of all events.
  """
  columns = {level: store.column(level) for level in LEVELS}
  rate = config.model.steps_per_latent * config.data.stride
  latents = np.maximum(np.ceil((store.column('length') - 1) / rate), 1)
  named = [
    pick_caption({k: v[i] for k, v in columns.items()}, 'event') for i in range(len(latents))
  ]
  known = {name: latents[[n == name for n in named]] for name in set(named)}
  lengths = [np.median(known.get(caption, latents)) for caption in captions]
  text = make_text_encoder(config.model.text).encode(captions)
  return CaptionTable(text, np.ceil(lengths).astype(np.int32))


def planning_table(
  texts: PlanningTexts, bank: Sequence[str], captions: Sequence[str]
) -> PlanningTable:
  """Every caption of a world as a VLM is asked about it.

  Args:
    bank: what the VLM may plan, in the order of its next-event logits.

  Raises:
    ConfigError: a caption of the bank that the world does not have.
  """
  if unknown := [caption for caption in bank if caption not in captions]:
    raise ConfigError(
      f'captions to plan with: expected captions of this world such as {captions[0]!r}, got '
      f'{len(unknown)} others such as {unknown[0]!r}. Give a store of the same world.'
    )
  asked = [traces.instruct(caption, 'canonical', 0) for caption in captions]
  rows = np.array([captions.index(caption) for caption in bank], np.int32)
  return PlanningTable(texts.prompts(asked), rows)


def untrained(config: ExperimentConfig, params: InferenceParams, seed: int = 0) -> InferenceParams:
  """The same model with the weights its towers started from; statistics and the language side are
  kept."""
  towers = functional.init_params(config.model, jax.random.key(seed))
  return dataclasses.replace(params, model=params.model | towers)


def default_source(config: ExperimentConfig) -> str:
  """What tells a policy in the way it was trained: the staircase's latents where those were its
  text, else 'atomic' for events and 'instruction' for chunks."""
  if config.data.text == 'staircase':
    return 'staircase'
  return 'instruction' if config.data.window == 'chunk' else 'atomic'


def check_source(params: InferenceParams, source: str, ask: Ask | None) -> None:
  """Raises ConfigError unless this model can be told by `source`."""
  if source not in SOURCES:
    raise ConfigError(f'source: expected one of {SOURCES}, got {source!r}.')
  if (source == HUMAN) != (ask is not None):
    raise ConfigError(
      f'source: expected somebody to ask (ask) with {HUMAN!r} only, got {source!r}.'
    )
  if source in SPEAKERS:
    language.require_parts(params, SPEAKERS[source][1], f'source {source!r}')


def make_source(
  name: str,
  params: InferenceParams,
  planning: PlanningTable | None,
  config: ExperimentConfig,
  *,
  control_period: float,
  ask: Ask | None = None,
) -> Source:
  """One of SOURCES. Over chunks a plan is held until it has run out.

  Args:
    planning: for the sources that ask a VLM; control_period: s between two actions of the world;
      ask: who is asked by 'human'.
  """
  if name in SCRIPTS:
    return SCRIPTS[name]
  if name == HUMAN:
    return sources.human(ask)
  source = SPEAKERS[name][0](params, planning, cfg=config, fps=policy_rate(config, control_period))
  hold = name in PLANNERS and config.data.window == 'chunk'
  return sources.held(source) if hold else source


def policy_rate(config: ExperimentConfig, control_period: float) -> float:
  """Hz at which a policy thinks that it acts: windows are cut at every stride-th frame."""
  return 1 / (control_period * config.data.stride)


def make_act(params: InferenceParams, config: ExperimentConfig) -> tuple[Act, int, int]:
  """The policy in the mode that it was trained for, with N, the longest event or the length of a
  chunk, and M, the history that it looks back on, both in latents."""
  if config.data.window == 'chunk':
    return chunk_policy(params, config), config.model.future, config.model.history
  bucket = config.data.buckets[-1]
  return event_policy(params, config, bucket), bucket, 0
