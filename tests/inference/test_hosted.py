"""Closed loop in environments that are no JAX functions, in a stand-in that moves a point."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.inference import hosted, sources
from wallwm_jax.inference.rollout import Mind, Sight, new_mind
from wallwm_jax.types import ActionChunk, Observation

GO_RIGHT, GO_UP, INSTRUCTION = range(3)
SCRIPT = np.array([GO_RIGHT, GO_UP, sources.NOTHING], np.int32)
VIEWS, SIZE, RATE, BUCKET = 2, 4, 4, 2


@dataclasses.dataclass
class Seen:
  frames: np.ndarray | None
  state: np.ndarray
  success: bool
  over: bool
  event: int
  progress: float


class Points:
  """Lanes with a point each, which has to go right by 0.3; `limit` turns at most. A lane answers
  only what it was asked, once."""

  def __init__(self, limit: int = 4):
    self.limit, self.points, self.turns = limit, {}, {}
    self.asked: dict[int, object] = {}
    self.most = 0

  def send(self, requests):
    assert not set(requests) & set(self.asked), 'a lane that has not answered yet'
    self.asked |= requests
    self.most = max(self.most, 1 + max(requests, default=0))

  def receive(self, lanes):
    return {lane: self._answer(lane, self.asked.pop(lane)) for lane in lanes if lane in self.asked}

  def _answer(self, lane, request) -> Seen:
    if isinstance(request, float):
      self.points[lane] = np.array([request, *[0.0] * 9], np.float32)
      self.turns[lane] = 0
    else:
      self.points[lane] = self.points[lane] + request[-1]
      self.turns[lane] += 1
    point = self.points[lane]
    success = bool(point[0] > 0.3)
    over = success or self.turns[lane] >= self.limit
    shade = np.full((VIEWS, 1, SIZE, SIZE, 3), int(100 * abs(point[0])) % 256, np.uint8)
    event = GO_UP if point[0] > 0.15 else GO_RIGHT
    return Seen(None if over else shade, point, success, over, event, 100.0 * success)


def wander(obs, text, key, length):
  """Goes where the noise, the state and the text say."""
  step = 0.1 * jax.random.normal(key, (1, RATE * BUCKET, 10))
  drift = 0.02 * jnp.mean(text.features) + 0.05 * jnp.sin(obs.state)[:, None]
  steps = jnp.arange(RATE * BUCKET)[None] < RATE * length[:, None]
  return ActionChunk(step + drift + 0.05, steps)


@pytest.fixture
def run(captions):
  """run(attempts, batch, source=..., limit=...) -> (histories, worlds)"""
  programs: dict = {}

  def make(attempts, batch, source=sources.instruction, limit=4, progress=None):
    if source not in programs:
      decide = hosted.batched(wander, source, captions, bucket=BUCKET, rate=RATE)
      programs[source] = jax.jit(decide)
    worlds = Points(limit)
    histories = hosted.run_attempts(
      programs[source], new_mind(source, captions), worlds=worlds, attempts=attempts,
      move=lambda actions: actions, batch=batch, follows_script=source is sources.atomic,
      progress=progress,
    )  # fmt: skip
    return histories, worlds

  return make


def asked(numbers) -> list[hosted.Attempt]:
  key = jax.random.key(0)
  return [
    hosted.Attempt(0.02 * k, INSTRUCTION, SCRIPT, jax.random.fold_in(key, k)) for k in numbers
  ]


def same(a: hosted.History, b: hosted.History) -> None:
  assert a.asked == b.asked and len(a.seen) == len(b.seen)
  np.testing.assert_array_equal(a.actions, b.actions)
  np.testing.assert_array_equal(a.seen[-1].state, b.seen[-1].state)


def test_an_attempt_does_not_depend_on_who_shares_its_batch(run):
  together, worlds = run(asked(range(7)), batch=2)
  assert worlds.most == 4  # two batches of two, lanes used again
  assert len({len(history.asked) for history in together}) > 1  # some succeed early
  backwards, _ = run(asked(range(6, -1, -1)), batch=2)
  for one, other in zip(together, reversed(backwards)):
    same(one, other)
  for number in (0, 5):  # beside strangers in its own place
    (alone, *_), _ = run(asked([number, 11, 12, 13]), batch=2)
    same(alone, together[number])


def test_noise_and_memory_are_an_attempts_own(run):
  """Equal starts with other keys part; a lane that is used again begins anew."""
  twins = [attempt._replace(start=0.0) for attempt in asked(range(2))]
  histories, _ = run(twins, batch=1)
  assert np.abs(histories[0].actions[0] - histories[1].actions[0]).max() > 0.01
  timed, worlds = run(asked(range(5)), batch=1, source=sources.timed)
  assert worlds.most == 2
  for history in timed:
    assert history.asked[:1] == [GO_RIGHT]
    assert history.asked[1:] == [GO_UP] * (len(history.asked) - 1)


def test_only_sources_that_follow_the_script_are_told_where_it_stands(run, captions):
  told = []

  def listen(context):
    jax.debug.callback(lambda event: told.append(int(event)), context.event)
    return sources.lookup(context.captions, context.instruction)

  run(asked(range(3)), batch=2, source=sources.stateless(listen))
  jax.effects_barrier()
  assert set(told) == {sources.NOTHING}
  histories, _ = run(asked(range(3)), batch=2, source=sources.atomic)
  for history in histories:
    assert history.asked == [seen.event for seen in history.seen[:-1]]


def test_finished_attempts_are_counted(run):
  counted = []
  run(asked(range(5)), batch=2, progress=lambda *count: counted.append(count))
  assert [done for done, _ in counted] == [1, 2, 3, 4, 5] and {n for _, n in counted} == {5}


def test_rollouts_are_filled_up_to_the_longest(run):
  histories, _ = run(asked(range(5)), batch=2, limit=3)
  done = hosted.as_rollouts(histories)
  counts = [len(history.asked) for history in histories]
  assert done.attempted.tolist() == counts and done.turns.acted.sum(1).tolist() == counts
  longest = max(counts)
  assert done.turns.actions.actions.shape == (5, longest, RATE * BUCKET, 10)
  for i, history in enumerate(histories):
    assert done.success[i] == history.seen[-1].success
    for turn in range(counts[i]):
      assert done.turns.caption[i, turn] == history.seen[turn].event
      assert done.turns.progress[i, turn] == history.seen[turn + 1].progress
      np.testing.assert_array_equal(done.turns.actions.actions[i, turn], history.actions[turn])
      assert done.turns.actions.mask[i, turn].sum() == RATE * BUCKET
  assert not done.turns.actions.mask[~done.turns.acted].any()


def test_a_policy_sees_frames_pose_view_mask_rows_and_its_own_clock_only():
  """What the program of a turn takes, by name: a field more would be a way in for what a policy
  must not see."""
  names = {kind: {field.name for field in dataclasses.fields(kind)}
           for kind in (Sight, Observation, Mind)}  # fmt: skip
  assert names[Sight] == {'obs', 'instruction', 'script', 'event'}
  assert names[Observation] == {'frames', 'state', 'view_mask'}
  assert names[Mind] == {'memory', 'step', 'passed'}


@pytest.mark.parametrize('source, reads', [
  (sources.instruction, {'instruction'}),
  (sources.atomic, {'event'}),
  (sources.timed, {'script'}),
])  # fmt: skip
def test_sources_read_their_own_row_only(captions, source, reads):
  """Other rows may be anything: the actions are the same bits."""
  decide = hosted.batched(wander, source, captions, bucket=BUCKET, rate=RATE)
  obs = Observation(
    np.zeros((1, VIEWS, 1, SIZE, SIZE, 3), np.uint8), np.zeros((1, 10), np.float32),
    np.ones((1, VIEWS), bool),
  )  # fmt: skip
  rows = {'instruction': np.int32([INSTRUCTION]), 'script': SCRIPT[None], 'event': np.int32([0])}
  other = {'instruction': np.int32([GO_UP]), 'script': np.int32([[GO_UP, -1, -1]]),
           'event': np.int32([GO_UP])}  # fmt: skip
  minds = jax.tree.map(lambda x: x[None], new_mind(source, captions))
  keys = jax.random.key(0)[None]
  act = functools.partial(jax.jit(decide), mind=minds, key=keys, fresh=np.array([True]))
  plain = np.asarray(act(Sight(obs, **rows))[1].actions)
  changed = {
    name for name in rows
    if not np.array_equal(act(Sight(obs, **rows | {name: other[name]}))[1].actions, plain)
  }  # fmt: skip
  assert changed == reads
