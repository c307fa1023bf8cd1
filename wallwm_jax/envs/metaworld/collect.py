"""Demonstrations: the scripted experts of Meta-World, as EpisodeRecord.

Slot k of a collection is an episode of task k modulo the number of tasks. It is tried with fresh
starts until the expert succeeds, and is a function of (seed, k) alone; slots are handed out in
order, so that the number of processes changes nothing but the speed.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from wallwm_jax.data.schema import Calibration, CaptionSpan, EpisodeRecord
from wallwm_jax.envs.metaworld import library
from wallwm_jax.envs.metaworld.cameras import HAND_VIEW, VIEWS
from wallwm_jax.envs.metaworld.control import target_of
from wallwm_jax.envs.metaworld.env import SMALLEST, MetaWorldEnv
from wallwm_jax.envs.metaworld.phases import Expert, events_of
from wallwm_jax.envs.metaworld.tasks import select_tasks
from wallwm_jax.errors import ConfigError

SOURCE = 'metaworld'
AFTER_SUCCESS = 8  # steps recorded after the first success
TRIES = 5  # starts of a slot before it is given up
_MOST_PROCESSES = 8


@dataclasses.dataclass(frozen=True)
class Plan:
  """What decides an episode, apart from its slot. noise: deviation of what is added to the three
  position commands (-1..1) as they are executed; the recorded actions stay the expert's."""

  seed: int
  tasks: tuple[str, ...]
  size: tuple[int, int]
  noise: float

  def __post_init__(self):
    if self.seed < 0:
      raise ConfigError(f'collect.seed: expected >= 0, got {self.seed}.')
    if not 0 <= self.noise <= 1:
      raise ConfigError(f'collect.noise: expected 0..1, got {self.noise}.')
    if len(self.size) != 2 or min(self.size) < SMALLEST:
      raise ConfigError(f'size: expected (H, W) of at least {SMALLEST} px, got {self.size}.')


@dataclasses.dataclass
class Attempts:
  """Episodes that the expert of a task began and solved."""

  tried: int = 0
  solved: int = 0


def episode_seed(seed: int, slot: int, attempt: int) -> int:
  """Of the simulator, for one try of a slot."""
  return int(np.random.SeedSequence([seed, slot, attempt]).generate_state(1)[0])


def record_slot(plan: Plan, slot: int) -> tuple[EpisodeRecord | None, int]:
  """The episode of a slot, None if the expert failed every time, and how often it was tried."""
  env = MetaWorldEnv(plan.tasks[slot % len(plan.tasks)], plan.size)
  try:
    for attempt in range(TRIES):
      seed = episode_seed(plan.seed, slot, attempt)
      rows = _run(env, seed, plan.noise)
      if rows is not None:
        name = f'{plan.seed:04d}-{slot:06d}'
        return _record(env, name, rows, {'start': seed, 'attempt': attempt}), attempt + 1
    return None, TRIES
  finally:
    env.close()


def _run(env: MetaWorldEnv, seed: int, noise: float) -> dict[str, list] | None:
  """What is recorded of one try, by name and frame (actions and phases: by step); None if the
  expert failed."""
  env.reset(seed)
  expert = Expert(env.task, env.expert_policy())
  rng = np.random.default_rng(seed)
  rows: dict[str, list] = {'seen': [], 'cameras': [], 'actions': [], 'phases': []}
  left = AFTER_SUCCESS
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # the experts warn of every command that is clipped
    while left and not env.over:
      rows['seen'].append(env.observe())
      rows['cameras'].append(env.calibration())
      command, phase = expert.act(env.expert_observation)
      rows['actions'].append(target_of(env.pose(), command))
      rows['phases'].append(phase)
      left -= env.command(command + noise * np.append(rng.standard_normal(3), 0))
  if not env.succeeded:
    return None
  rows['seen'].append(env.observe())
  rows['cameras'].append(env.calibration())
  return rows


def _record(env: MetaWorldEnv, name: str, rows: dict[str, list], drawn: dict) -> EpisodeRecord:
  seen, moving = rows['seen'], [frame[HAND_VIEW].extrinsics for frame in rows['cameras']]
  calibration = dict(rows['cameras'][0])
  calibration[HAND_VIEW] = Calibration(calibration[HAND_VIEW].intrinsics, np.stack(moving))
  return EpisodeRecord(
    episode_id=f'{env.task}-{name}',
    source=SOURCE,
    fps=1 / env.control_period,
    views=VIEWS,
    frames={view: np.stack([x.frames[view] for x in seen]) for view in VIEWS},
    state=np.stack([x.state for x in seen]),
    actions=np.stack([*rows['actions'], rows['actions'][-1]]),
    events=events_of(env.task, np.array(rows['phases'])),
    calibration=calibration,
    captions=(CaptionSpan('L3', 0, len(seen), env.instruction),),
    provenance={'metaworld': {'task': env.task, **drawn}},
  )


class Collection(Iterator[EpisodeRecord]):
  """Episodes as they are recorded; `attempts` counts by task what the experts tried and solved."""

  def __init__(self, plan: Plan, count: int, processes: int, progress=None):
    self.plan, self.count, self.processes = plan, count, processes
    self.attempts: dict[str, Attempts] = collections.defaultdict(Attempts)
    self._progress = progress
    self._records = self._collect()

  def __next__(self) -> EpisodeRecord:
    return next(self._records)

  def close(self) -> None:
    """Ends the processes."""
    self._records.close()

  def _collect(self) -> Iterator[EpisodeRecord]:
    done = given_up = 0
    for slot, (record, tries) in enumerate(self._slots()):
      tally = self.attempts[self.plan.tasks[slot % len(self.plan.tasks)]]
      tally.tried, tally.solved = tally.tried + tries, tally.solved + (record is not None)
      given_up = 0 if record is not None else given_up + 1
      if given_up >= len(self.plan.tasks):
        raise ConfigError(
          f'collect: the experts failed {TRIES} times in each of {given_up} episodes in a row; '
          'expected some success. Lower the noise.'
        )
      if record is not None:
        done += 1
        if self._progress is not None:
          self._progress(done, self.count)
        yield record
        if done == self.count:
          return

  def _slots(self) -> Iterator[tuple[EpisodeRecord | None, int]]:
    if self.processes == 1:
      yield from (record_slot(self.plan, slot) for slot in itertools.count())
    spawn = multiprocessing.get_context('spawn')  # graphics do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(self.processes, spawn) as pool:
      ahead = collections.deque()
      try:
        for slot in itertools.count():
          ahead.append(pool.submit(record_slot, self.plan, slot))
          if len(ahead) > self.processes:
            yield ahead.popleft().result()
      finally:
        pool.shutdown(wait=True, cancel_futures=True)


def collect(
  num_episodes: int,
  seed: int,
  *,
  tasks: str | Sequence[str] = 'MT10',
  size: tuple[int, int] = (96, 96),
  noise: float = 0.0,
  processes: int | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Collection:
  """Successful demonstrations of the scripted experts, tasks in turn.

  Args:
    num_episodes: how many to yield. seed: the data are a function of it (and of tasks, size and
      noise) alone.
    tasks: a suite ('MT10', 'MT50') or names of tasks.
    size: (H, W) px of every view.
    noise: deviation of what is added to the position commands (-1..1) as they are executed.
    processes: that record at once (one per core, at most 8); 1 records in this process.
    progress: called with (yielded, num_episodes).

  Raises:
    ConfigError: a bad request, Meta-World is missing, or the experts fail throughout.
  """
  if num_episodes < 1 or (processes is not None and processes < 1):
    raise ConfigError(
      f'collect: expected num_episodes >= 1 and processes >= 1, got {num_episodes} and {processes}.'
    )
  plan = Plan(seed, select_tasks(tasks), tuple(size), noise)
  library.load()
  wanted = processes or min(os.cpu_count() or 1, _MOST_PROCESSES)
  return Collection(plan, num_episodes, min(wanted, num_episodes), progress)
