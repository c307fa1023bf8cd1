"""Demonstrations: the scripted expert in many tabletops at once, as EpisodeRecord.

Slots of a batch run in lockstep inside one jitted program; a slot whose episode is over is given
the next episode at once. An episode is a function of (seed, its number) alone, and episodes are
handed out in the order of their numbers, so that neither the batch size nor the running time of
others changes the data beyond rounding. Episodes the expert fails are left out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax.data.schema import Calibration, CaptionSpan, EpisodeRecord, EventSpan
from wallwm_jax.envs.tabletop import expert, mjcf, rubric, tasks
from wallwm_jax.envs.tabletop.config import TabletopConfig
from wallwm_jax.envs.tabletop.recovery import perturb, recovery_task
from wallwm_jax.envs.tabletop.render import VIEWS, calibration, intrinsics_of, render
from wallwm_jax.envs.tabletop.reset import reset
from wallwm_jax.envs.tabletop.tasks import (
  CAPTIONS,
  CUBE_COLOURS,
  DIRECTIONS,
  EVENT_KINDS,
  TASK_KINDS,
  ZONE_COLOURS,
)
from wallwm_jax.types import ConfigError

SOURCE = 'tabletop'
_CHUNK = 8  # control periods per call of the jitted program
# Half the compile time of XLA's defaults for these programs on CPU, and no slower to run (measured
# on 2 cores).
_CPU_OPTIONS = {'xla_cpu_use_fusion_emitters': False, 'xla_backend_optimization_level': 1}
_RECOVERY_PROB = 0.15  # of single reach and grasp tasks: they start badly
_MISS_PROB = 0.05  # of first grasps: they miss on purpose
_CLEAN_PROB = 0.3  # of episodes: no executed noise

# How often each task kind is drawn. 'mixed' covers scripts and single events; 'single' is what is
# evaluated.
MIXES = {
  'mixed': {
    **{kind: 1.0 for kind in tasks.SINGLE_KINDS},
    'reach': 2.0,
    'push': 2.0,
    'pick': 2.0,
    'put': 4.0,
    'reach_push': 4.0,
    'put_push': 4.0,
    'put_put': 3.0,
  },
  'single': {**{kind: 1.0 for kind in tasks.SINGLE_KINDS}, 'reach': 1.5, 'push': 1.5},
  'multi': {'pick': 1.0, 'put': 2.0, 'reach_push': 2.0, 'put_push': 2.0, 'put_put': 1.5},
}


@dataclasses.dataclass
class _Recording:
  """What one running episode has left behind so far; arrays by name, one entry per chunk."""

  number: int
  chunks: list[dict[str, np.ndarray]]


def _start(seed: int, number, weights, recovery, config: TabletopConfig):
  """The environment and expert states of episode `number`."""
  key = jax.random.fold_in(jax.random.key(seed), number)
  keys = jax.random.split(key, 4)
  draws = tasks.Draws(keys[0], 4)
  kind = (draws() > jnp.cumsum(weights)[:-1]).sum()
  bad_start = (kind <= tasks.GRASP) & (draws() < _RECOVERY_PROB)
  noise = jnp.where(draws() < _CLEAN_PROB, 0.0, draws(low=0.3))
  task = tasks.sample_task(keys[1], kind, bad_start)
  # Streams of their own: episodes that do not recover are the same whatever the fraction.
  extra = jax.random.split(jax.random.fold_in(key, 1), 3)
  chance, share = jax.random.uniform(extra[0], (2,))
  recovers = chance < recovery
  task = _where(recovers, recovery_task(extra[1], share), task)
  state = reset(keys[2], task, config)
  state = _where(recovers, perturb(extra[2], state, config), state)
  return state, expert.init(keys[3], noise, jnp.float32(_MISS_PROB))


def _where(condition, a, b):
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


@functools.cache
def _programs(config: TabletopConfig):
  """The jitted (fresh, replace, advance) of a config."""

  def fresh(seed, numbers, weights, recovery):
    return jax.vmap(lambda n: _start(seed, n, weights, recovery, config))(numbers)

  def replace(where, new, old):
    def pick(a, b):
      return jnp.where(where.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)

  def advance(states, experts):
    def one(state, mind):
      def period(carry, _):
        state, mind = carry
        after, mind, record = expert.step(state, mind, config)
        return (after, mind), (record, state.physics)

      (state, mind), (records, worlds) = jax.lax.scan(period, (state, mind), length=_CHUNK)

      def look(world):
        now = dataclasses.replace(state, physics=world)
        return render(now, config.image_size), calibration(now, config.image_size)[1]

      frames, extrinsics = jax.vmap(look)(worlds)
      over = expert.finished(mind)
      return (
        state,
        mind,
        records | {'frames': frames, 'extrinsics': extrinsics},
        over,
        rubric.success(state),
      )

    return jax.vmap(one)(states, experts)

  options = _CPU_OPTIONS if jax.default_backend() == 'cpu' else None
  return tuple(jax.jit(f, compiler_options=options) for f in (fresh, replace, advance))


# What each leg of a plan does, by event kind (Segment captions); legs of expert._plan in order.
_SEGMENTS = {
  'reach': ('raise the gripper', 'move above the {cube} cube'),
  'grasp': (
    'raise the open gripper',
    'align with the {cube} cube',
    'lower the gripper around the {cube} cube',
    'close the gripper on the {cube} cube',
  ),
  'lift': ('raise the {cube} cube',),
  'move': ('carry the {cube} cube to the {zone} zone',),
  'place': ('lower the {cube} cube onto the {zone} zone',),
  'release': ('open the gripper', 'back away from the {cube} cube'),
  'push': (
    'go behind the {cube} cube',
    'lower the gripper behind the {cube} cube',
    'slide the {cube} cube {way}',
  ),
}


def _names(row: np.ndarray) -> dict[str, str]:
  """The words of one event row (kind, object, target)."""
  kind, obj, target = (int(v) for v in row)
  return {
    'kind': EVENT_KINDS[kind],
    'cube': CUBE_COLOURS[obj],
    'zone': ZONE_COLOURS[min(target, mjcf.NUM_ZONES - 1)],
    'way': DIRECTIONS[target],
    'caption': CAPTIONS[int(tasks.event_caption(row))],
  }


def _attempts(data: dict[str, np.ndarray], rows: np.ndarray, steps: int):
  """The attempts at events in time order: (start, end, stage, words, failed, again, leg ends)."""
  starts = np.flatnonzero(data['begins'][:steps])
  ends = np.append(starts[1:], steps)
  stages, attempts = data['stage'][starts], data['attempt'][starts]
  for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist())):
    failed = i + 1 < len(starts) and stages[i + 1] == stages[i]
    yield (
      start,
      end,
      int(stages[i]),
      _names(rows[stages[i]]),
      bool(failed),
      bool(attempts[i] > 0),
      data['ends'][start],
    )


def _segments(
  start: int, end: int, words: dict[str, str], leg_ends: np.ndarray, prefix: str
) -> list[CaptionSpan]:
  """L0 spans of one attempt; the rest at its end belongs to the last leg."""
  texts = [text.format(**words) for text in _SEGMENTS[words['kind']]]
  spans, begin = [], start
  for text, leg_end in zip(texts, leg_ends.tolist()):
    stop = min(start + leg_end, end)
    if stop > begin:
      spans.append(CaptionSpan('L0', begin, stop + 1, prefix + text))
      begin = stop
  if not spans:
    return [CaptionSpan('L0', start, end + 1, prefix + texts[-1])]
  spans[-1] = dataclasses.replace(spans[-1], end=end + 1)
  return spans


def _subtasks(events: list[tuple[EventSpan, dict[str, str]]]) -> list[CaptionSpan]:
  """L2 spans: runs of events with the same cube."""
  spans, i = [], 0
  while i < len(events):
    j = i
    while j < len(events) and events[j][1]['cube'] == events[i][1]['cube']:
      j += 1
    kinds, last = {words['kind'] for _, words in events[i:j]}, events[j - 1][1]
    text = last['caption']
    if {'grasp', 'release'} <= kinds:
      text = 'put the {cube} cube on the {zone} zone'.format(**last)
    elif 'grasp' in kinds and last['kind'] == 'lift':
      text = 'pick up the {cube} cube'.format(**last)
    spans.append(CaptionSpan('L2', events[i][0].start, events[j - 1][0].end, text))
    i = j
  return spans


def _record(
  name: str, task: tasks.Task, data: dict[str, np.ndarray], config: TabletopConfig, intrinsics
) -> EpisodeRecord:
  """The episode of one slot; `data` holds [steps + 1, ...] arrays, the last row is the final
  observation.
  """
  steps = len(data['active']) - 1
  rows, start_badly = np.asarray(task.script), bool(task.recovery)
  slipped = start_badly and rows[0, 0] == tasks.GRASP and int(task.length) > 1
  events, segments = [], []
  for start, end, stage, words, failed, again, leg_ends in _attempts(data, rows, steps):
    recovery = not failed and (again or (start_badly and stage == 0))
    flags = ('failed',) * failed + ('recovery',) * recovery
    caption = f'fail to {words["caption"]}' if failed else words['caption']
    label = 'miss' if failed else f'{words["kind"]} {words["cube"]}'
    events.append((EventSpan(start, end + 1, label, {'L1': caption}, flags), words))
    prefix = 'regrasp: ' if slipped and words['kind'] == 'grasp' else 'recover: '
    segments += _segments(start, end, words, leg_ends, prefix if recovery else '')
  actions = np.concatenate([data['action'][:steps], data['action'][steps - 1 : steps]])
  instruction = CaptionSpan('L3', 0, steps + 1, CAPTIONS[int(task.instruction)])
  actions_l1 = [CaptionSpan('L1', e.start, e.end, e.captions['L1']) for e, _ in events]
  moving = {view: data['extrinsics'][:, i] for i, view in enumerate(VIEWS)}
  return EpisodeRecord(
    episode_id=name,
    source=SOURCE,
    fps=1 / config.control_period,
    views=VIEWS,
    frames={view: np.ascontiguousarray(data['frames'][:, i]) for i, view in enumerate(VIEWS)},
    state=data['state'],
    actions=actions,
    events=tuple(event for event, _ in events),
    calibration={
      view: Calibration(intrinsics[i], moving[view] if view == 'wrist' else moving[view][0])
      for i, view in enumerate(VIEWS)
    },
    captions=(instruction, *_subtasks(events), *actions_l1, *segments),
  )


class _Collector:
  """The host side of `collect`: which slot runs which episode, and the recordings not yet handed
  out.
  """

  def __init__(
    self, seed: int, batch: int, mix: str, config: TabletopConfig, recovery: float = 0.0
  ):
    weights = np.array([MIXES[mix].get(kind, 0.0) for kind in TASK_KINDS], np.float32)
    self.config, self.seed, self.batch = config, seed, batch
    self.mixture = jnp.asarray(weights / weights.sum()), jnp.float32(recovery)
    self.programs = _programs(config)
    self.issued = batch
    self.slots = [_Recording(number, []) for number in range(batch)]
    self.states, self.experts = self.programs[0](
      seed, np.arange(batch, dtype=np.int32), *self.mixture
    )

  def advance(self) -> list[tuple[int, EpisodeRecord | None]]:
    """One chunk of control periods: the episodes that ended in it, None where the expert failed."""
    tasks_now = jax.device_get(self.states.task)
    self.states, self.experts, records, over, success = self.programs[2](self.states, self.experts)
    records, over, success = jax.device_get((records, over, success))
    ended = []
    for slot, recording in enumerate(self.slots):
      if recording is None:
        continue
      keep = int(records['active'][slot].sum()) + int(over[slot])
      recording.chunks.append({name: value[slot, :keep].copy() for name, value in records.items()})
      if over[slot]:
        task = jax.tree.map(lambda x, slot=slot: x[slot], tasks_now)
        ended.append((recording.number, self._finish(recording, task) if success[slot] else None))
        self.slots[slot] = None
    return ended

  def refill(self, limit: int) -> None:
    """Gives free slots the next episodes, up to episode number `limit` - 1."""
    numbers = np.zeros((self.batch,), np.int32)
    replace = np.zeros((self.batch,), bool)
    for slot, recording in enumerate(self.slots):
      if recording is None and self.issued < limit:
        numbers[slot], replace[slot] = self.issued, True
        self.slots[slot] = _Recording(self.issued, [])
        self.issued += 1
    if replace.any():
      new = self.programs[0](self.seed, numbers, *self.mixture)
      self.states, self.experts = self.programs[1](replace, new, (self.states, self.experts))

  def _finish(self, recording: _Recording, task: tasks.Task) -> EpisodeRecord:
    data = {
      name: np.concatenate([chunk[name] for chunk in recording.chunks])
      for name in recording.chunks[0]
    }
    name = f'{self.seed:04d}-{recording.number:06d}'
    return _record(name, task, data, self.config, intrinsics_of(self.config.image_size))


def collect(
  num_episodes: int,
  seed: int,
  *,
  mix: str = 'mixed',
  recovery: float = 0.0,
  batch: int = 64,
  config: TabletopConfig = TabletopConfig(),
  progress: Callable[[int, int], None] | None = None,
) -> Iterator[EpisodeRecord]:
  """Successful demonstrations of the scripted expert.

  Args:
    num_episodes: how many to yield. seed: the data are a function of it (and of mix, recovery and
      config) alone.
    mix: which tasks, a key of MIXES: 'mixed' (scripts and single events), 'single' (single events
      only, the tasks that are evaluated) or 'multi' (scripts only).
    recovery: fraction of episodes that recover an event from near its contact pose (recovery.py)
      in the place of one of the mix; their first event has the flag 'recovery'.
    batch: tabletops stepped at once; changes speed, and the data by rounding only.
    progress: called with (yielded, num_episodes).

  Raises:
    ConfigError: unknown mix, a count below 1 or a fraction outside 0..1.
  """
  if mix not in MIXES:
    raise ConfigError(f'collect.mix: expected one of {sorted(MIXES)}, got {mix!r}.')
  if num_episodes < 1 or batch < 1:
    raise ConfigError(
      f'collect: expected num_episodes >= 1 and batch >= 1, got {num_episodes} and {batch}.'
    )
  if not 0 <= recovery <= 1:
    raise ConfigError(f'collect.recovery: expected a fraction 0..1, got {recovery}.')
  collector = _Collector(seed, min(batch, num_episodes), mix, config, recovery)
  finished: dict[int, EpisodeRecord | None] = {}
  following, yielded, failures = 0, 0, 0
  while yielded < num_episodes:
    for number, record in collector.advance():
      finished[number] = record
      failures += record is None
    while following in finished and yielded < num_episodes:
      record = finished.pop(following)
      following += 1
      if record is not None:
        yielded += 1
        if progress is not None:
          progress(yielded, num_episodes)
        yield record
    collector.refill(num_episodes + failures)
