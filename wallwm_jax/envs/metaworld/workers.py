"""Meta-World in other processes: several environments in each, moved turn by turn.

What comes back of a turn is what a policy may look at, and facts for scores and for sources of text
that follow the script. Rendering is most of the cost, so only frames that are looked at are drawn.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Iterable, Mapping

import numpy as np

from wallwm_jax.envs.metaworld import library
from wallwm_jax.envs.metaworld.cameras import VIEWS
from wallwm_jax.envs.metaworld.env import MAX_STEPS, MetaWorldEnv
from wallwm_jax.envs.metaworld.phases import Watch
from wallwm_jax.envs.metaworld.tasks import CAPTIONS, phase_caption
from wallwm_jax.errors import ConfigError
from wallwm_jax.geometry.poses import apply_relative


@dataclasses.dataclass(frozen=True)
class Turns:
  """How all turns are carried out.

  size: (H, W) px; views: cameras in the order of the policy's. stride: control steps that an action
  is held; past: frames before the present one that a policy looks back on, stride steps apart.
  delay: control steps between an observation and the first action answered to it, in which the last
  target is held. max_steps: of an attempt. record: keep a frame of every action.
  """

  size: tuple[int, int]
  views: tuple[str, ...] = VIEWS
  stride: int = 1
  past: int = 0
  delay: int = 0
  max_steps: int = MAX_STEPS
  record: bool = False

  def __post_init__(self):
    if not 1 <= self.max_steps <= MAX_STEPS:
      raise ConfigError(f'max_steps: expected 1..{MAX_STEPS}, got {self.max_steps}.')


@dataclasses.dataclass(frozen=True)
class Start:
  """Asks for a new episode: a task and the simulator's seed."""

  task: str
  seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
  """Asks for a turn: actions float32 [n, 10] relative to the pose of the last observation."""

  actions: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
  """What came of a start or a move.

  frames: uint8 [V, past + 1, H, W, 3], None once the episode is over; state: float32 [10], measured
  pose. success: whether the task was solved at any step; over: that, or no step is left; steps:
  control steps so far. event: row of CAPTIONS of the event that the script is in; reached: that of
  the furthest one; progress: 0..100. film: uint8 [V, n, H, W, 3] of the turn, where it is recorded.
  """

  frames: np.ndarray | None
  state: np.ndarray
  success: bool
  over: bool
  steps: int
  event: int
  reached: int
  progress: float
  film: np.ndarray | None = None


class Lane:
  """One environment, turn by turn."""

  def __init__(self, turns: Turns):
    self._turns = turns
    self._env: MetaWorldEnv | None = None

  def start(self, request: Start) -> Seen:
    self.close()
    turns = self._turns
    self._env = MetaWorldEnv(request.task, turns.size, turns.views)
    self._env.reset(request.seed)
    self._watch = Watch(request.task, self._env.expert_policy())
    self._watch.see(self._env.expert_observation)
    self._hold = np.full(10, np.nan, np.float32)  # stays where it is
    self._frames = {0: self._draw()}
    return self._seen(())

  def move(self, request: Move) -> Seen:
    env, turns = self._env, self._turns
    targets = apply_relative(env.pose()[None], request.actions)
    targets = np.repeat(targets, turns.stride, axis=0)
    waiting = np.full((turns.delay, targets.shape[1]), np.nan, np.float32)
    targets = np.concatenate([waiting, targets])
    # Times before the end of a turn at which this policy looks back: if all turns last as long,
    # those of later turns too.
    looks = {turns.stride * k % max(len(targets), 1) for k in range(turns.past + 1)}
    film = []
    for left, target in zip(range(len(targets) - 1, -1, -1), targets):
      if np.isfinite(target).all():
        self._hold = target
      env.step(self._hold)
      self._watch.see(env.expert_observation)
      over = self._over()
      filmed = turns.record and (left % turns.stride == 0 or over)
      if filmed or (left in looks and not over):
        self._frames[env.steps] = self._draw()
      if filmed:
        film.append(self._frames[env.steps])
      if over:
        break
    return self._seen(film)

  def close(self) -> None:
    if self._env is not None:
      self._env.close()

  def _over(self) -> bool:
    return self._env.succeeded or self._env.steps >= self._turns.max_steps

  def _draw(self) -> np.ndarray:
    """[V, H, W, 3]"""
    frames = self._env.observe().frames
    return np.stack([frames[view] for view in self._turns.views])

  def _seen(self, film) -> Seen:
    env, watch, turns = self._env, self._watch, self._turns
    over, frames = self._over(), None
    if not over:
      times = [max(env.steps - turns.stride * k, 0) for k in range(turns.past, -1, -1)]
      frames = np.stack([self._frames[time] for time in times], axis=1)
      self._frames = {time: self._frames[time] for time in self._frames if time >= times[0]}
    return Seen(
      frames=frames,
      state=env.pose(),
      success=env.succeeded,
      over=over,
      steps=env.steps,
      event=CAPTIONS.index(phase_caption(env.task, watch.event)),
      reached=CAPTIONS.index(phase_caption(env.task, watch.furthest)),
      progress=100.0 if env.succeeded else watch.progress,
      film=np.stack(film, axis=1) if film else None,
    )


Request = Start | Move


class Workers:
  """Lanes in processes; requests of different lanes are answered side by side.

  The number of processes changes nothing but the speed. A context manager that ends them.
  """

  def __init__(self, turns: Turns, lanes: int, processes: int):
    """Raises ConfigError if Meta-World is missing or no process is asked for."""
    if processes < 1:
      raise ConfigError(f'processes: expected >= 1, got {processes}.')
    library.load()
    spawn = multiprocessing.get_context('spawn')  # graphics do not survive a fork
    self._pools = [
      concurrent.futures.ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=(turns,))
      for _ in range(min(processes, lanes))
    ]
    self._waiting: dict[int, concurrent.futures.Future] = {}

  def send(self, requests: Mapping[int, Request]) -> None:
    """{lane: what is asked of it}, none of which waits for an answer."""
    for lane, request in requests.items():
      self._waiting[lane] = self._pools[lane % len(self._pools)].submit(_answer, lane, request)

  def receive(self, lanes: Iterable[int]) -> dict[int, Seen]:
    """The answers of those lanes that were asked, when all are there."""
    return {lane: self._waiting.pop(lane).result() for lane in lanes if lane in self._waiting}

  def __enter__(self) -> Workers:
    return self

  def __exit__(self, *_) -> None:
    for pool in self._pools:
      pool.shutdown(wait=True, cancel_futures=True)


# Of a worker process: how turns are carried out, and its lanes.
_turns: Turns | None = None
_lanes: dict[int, Lane] = {}


def _begin(turns: Turns) -> None:
  global _turns
  _turns = turns


def _answer(number: int, request: Request) -> Seen:
  lane = _lanes.setdefault(number, Lane(_turns))
  return lane.start(request) if isinstance(request, Start) else lane.move(request)
