"""Closed loop in environments that are no JAX functions: simulators in other processes.

Attempts are carried out in lanes, a fixed number of which share one call of the policy: a jitted,
vmapped program with B = 1 inside, so that an attempt has noise of its own and nothing in it depends
on its neighbours. While one half of the lanes waits for the policy, the other half's environments
move. Which attempt goes to which lane follows from the attempts alone, never from wall time.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax.inference.rollout import (
  Act,
  Mind,
  Rollout,
  Sight,
  Turn,
  new_mind,
  policy_turn,
)
from wallwm_jax.inference.sources import NOTHING, CaptionTable, Source
from wallwm_jax.types import ActionChunk, Observation, PRNGKey


class Seen(Protocol):
  """What came of a turn, or of a start.

  frames: uint8 [V, T, H, W, 3], may be None once the attempt is over; state: [A]; over: no turn may
  follow; event: row of the caption table of the script's next event; progress: 0..100.
  """

  frames: np.ndarray | None
  state: np.ndarray
  success: bool
  over: bool
  event: int
  progress: float


class Worlds(Protocol):
  """Lanes that environments run in: requests go out without waiting, answers come when asked for
  (only of lanes that were sent something)."""

  def send(self, requests: Mapping[int, Any]) -> None: ...

  def receive(self, lanes: Iterable[int]) -> Mapping[int, Seen]: ...


class Attempt(NamedTuple):
  """One attempt: what a world is sent to start it, the rows of its instruction and of its script
  [S] (NOTHING behind the last), and the key of its noise."""

  start: Any
  instruction: int
  script: np.ndarray
  key: PRNGKey


@dataclasses.dataclass(eq=False)
class History:
  """An attempt as it went: what was seen, to begin with and after each turn; the caption asked for
  and the actions [K, A] with mask [K] of each turn."""

  seen: list[Seen] = dataclasses.field(default_factory=list)
  asked: list[int] = dataclasses.field(default_factory=list)
  actions: list[np.ndarray] = dataclasses.field(default_factory=list)
  masks: list[np.ndarray] = dataclasses.field(default_factory=list)


# (sights [b], minds [b], keys [b], fresh [b]) -> (asked [b], ActionChunk [b, K, A], minds [b])
Decide = Callable[[Sight, Mind, PRNGKey, Any], tuple[Any, ActionChunk, Mind]]


def batched(act: Act, source: Source, captions: CaptionTable, *, bucket: int, rate: int) -> Decide:
  """The policy's side of a turn for a batch of attempts, to be jitted; `fresh` ones begin anew.
  Arguments as in `rollout.policy_turn`."""
  decide = policy_turn(act, source, captions, bucket=bucket, rate=rate)

  def one(sight: Sight, mind: Mind, key: PRNGKey, fresh):
    start = new_mind(source, captions)
    mind = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), start, mind)
    return decide(sight, mind, key)

  return jax.vmap(one)


class Batch:
  """Lanes that share one call of the policy."""

  def __init__(self, lanes: range, minds: Mind):
    self.lanes, self._minds = lanes, minds
    self.attempt: dict[int, int] = {}  # by lane, those that are under way
    self._sights: dict[int, Sight] = {}  # by lane, the last one
    self._keys: dict[int, PRNGKey] = {}
    self._fresh: set[int] = set()

  def begin(self, lane: int, number: int, key: PRNGKey) -> None:
    self.attempt[lane], self._keys[lane] = number, key
    self._fresh.add(lane)

  def decide(self, decide: Decide, sights: Mapping[int, Sight]) -> dict[int, tuple]:
    """{lane: (caption asked for, actions [K, A], mask [K])} for the lanes that see something."""
    self._sights |= sights
    spare = next(iter(sights))  # what empty lanes are filled up with
    rows = [lane if lane in self._sights else spare for lane in self.lanes]
    sight = jax.tree.map(lambda *x: np.stack(x), *(self._sights[row] for row in rows))
    keys = jnp.stack([self._keys[row] for row in rows])
    fresh = np.array([lane in self._fresh for lane in self.lanes])
    asked, chunk, self._minds = decide(sight, self._minds, keys, fresh)
    self._fresh -= set(sights)
    asked, chunk = jax.device_get((asked, chunk))
    return {
      lane: (int(asked[i]), chunk.actions[i], chunk.mask[i])
      for i, lane in enumerate(self.lanes)
      if lane in sights
    }


def run_attempts(
  decide: Decide,
  mind: Mind,
  *,
  worlds: Worlds,
  attempts: Sequence[Attempt],
  move: Callable[[np.ndarray], Any],
  batch: int,
  follows_script: bool,
  progress: Callable[[int, int], None] | None = None,
) -> list[History]:
  """Carries out every attempt once.

  Args:
    decide: of `batched`, jitted; mind: of `new_mind`, unbatched.
    worlds: with at least `lanes_of(len(attempts), batch)` lanes.
    move: the request that carries out actions [n, A], n <= K.
    batch: attempts that share a call, if there are as many.
    follows_script: whether the source of text is told the script's next event.
    progress: called with (finished, all) attempts.
  """
  waiting = collections.deque(range(len(attempts)))
  histories = [History() for _ in attempts]
  size = batch_size(len(attempts), batch)
  minds = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], size, axis=0), mind)
  lanes = range(lanes_of(len(attempts), batch))
  batches = [Batch(lanes[i : i + size], minds) for i in range(0, len(lanes), size)]

  def fill(group: Batch) -> dict[int, Any]:
    free = [lane for lane in group.lanes if lane not in group.attempt]
    started = {}
    for lane, number in zip(free, _take(waiting, len(free))):
      group.begin(lane, number, attempts[number].key)
      started[lane] = attempts[number].start
    return started

  def look(number: int, seen: Seen) -> Sight:
    task = attempts[number]
    views = np.ones(len(seen.frames), bool)
    obs = Observation(seen.frames, seen.state, views)
    event = seen.event if follows_script else NOTHING
    return Sight(obs, np.int32(task.instruction), task.script, np.int32(event))

  def turn(group: Batch) -> None:
    sights = {}
    for lane, seen in worlds.receive(group.lanes).items():
      number = group.attempt[lane]
      histories[number].seen.append(seen)
      if seen.over:
        del group.attempt[lane]
        if progress is not None:
          progress(sum(_over(history) for history in histories), len(attempts))
      else:
        sights[lane] = look(number, seen)
    requests = {}
    for lane, (asked, actions, mask) in (group.decide(decide, sights) if sights else {}).items():
      history = histories[group.attempt[lane]]
      history.asked.append(asked)
      history.actions.append(actions)
      history.masks.append(mask)
      requests[lane] = move(actions[mask])
    worlds.send(requests | fill(group))

  for group in batches:
    worlds.send(fill(group))
  while any(group.attempt for group in batches):
    for group in batches:
      if group.attempt:
        turn(group)
  return histories


def batch_size(attempts: int, batch: int) -> int:
  """Attempts of one call: two batches take turns, so that a few attempts make two small ones."""
  return min(batch, -(-attempts // 2))


def lanes_of(attempts: int, batch: int) -> int:
  """Environments that are held at once."""
  size = batch_size(attempts, batch)
  return min(2, -(-attempts // size)) * size


def as_rollouts(histories: Sequence[History]) -> Rollout:
  """Attempts as `closed_loop` gives them, NumPy with a leading axis n, shorter ones filled up with
  turns that were not acted on; poses and frames but the first stay in the environments."""
  counts = [len(history.asked) for history in histories]
  turns = max(*counts, 1)

  def padded(rows: Iterable[Sequence], like) -> np.ndarray:
    like = np.asarray(like)
    out = np.zeros((len(histories), turns, *like.shape), like.dtype)
    for i, row in enumerate(rows):
      if len(row):
        out[i, : len(row)] = np.stack(row)
    return out

  first = next(history for history in histories if history.asked)

  def after(value: Callable[[Seen, Seen], Any], like) -> np.ndarray:
    """value(before, after) of every turn."""
    return padded(([value(*pair) for pair in zip(h.seen, h.seen[1:])] for h in histories), like)

  return Rollout(
    success=np.array([history.seen[-1].success for history in histories]),
    progress=np.array([history.seen[-1].progress for history in histories], np.float32),
    attempted=np.array(counts, np.int32),
    turns=Turn(
      caption=after(lambda before, _: before.event, np.int32(0)),
      asked=padded((history.asked for history in histories), np.int32(0)),
      acted=np.arange(turns) < np.array(counts)[:, None],
      event_done=after(lambda a, b: b.success or a.event != b.event, np.False_),
      progress=after(lambda _, seen: seen.progress, np.float32(0)),
      actions=ActionChunk(
        padded((history.actions for history in histories), first.actions[0]),
        padded((history.masks for history in histories), first.masks[0]),
      ),
      poses=None,
      frames=None,
    ),
    first=np.stack([history.seen[0].frames[:, -1:] for history in histories]),
  )


def _take(queue: collections.deque, count: int) -> Iterator[int]:
  for _ in range(min(count, len(queue))):
    yield queue.popleft()


def _over(history: History) -> bool:
  return bool(history.seen) and history.seen[-1].over
