"""Acting while the next anchor is computed: which anchor, which steps stand, and what when it is
late. Refreshes finish when a test says so; nothing waits on a clock."""

from __future__ import annotations

import concurrent.futures
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.inference import runtime
from wallwm_jax.inference.anchored import AnchoredPolicy, StaleAnchorError
from wallwm_jax.inference.denoiser import Window
from wallwm_jax.inference.runtime import Plan
from wallwm_jax.types import ActionChunk, ConfigError, DataError

STEPS, DIM = 8, 10
STATE = np.zeros((1, DIM), np.float32)


class ByHand(concurrent.futures.Executor):
  """Runs what was submitted when it is told to."""

  def __init__(self):
    self.waiting = []

  def submit(self, function, *args):
    future = concurrent.futures.Future()
    self.waiting.append((future, function, args))
    return future

  def finish(self):
    future, function, args = self.waiting.pop(0)
    try:
      future.set_result(function(*args))
    except Exception as error:
      future.set_exception(error)

  def shutdown(self, wait=True):
    pass


def tell(anchor, now):
  """Targets 100 * anchor + step; committed ones as they were given."""
  own = 100.0 * anchor + np.arange(STEPS, dtype=np.float32)[None, :, None] * np.ones(DIM)
  mask = np.asarray(now.committed.mask)
  targets = np.where(mask[..., None], now.committed.actions, own)
  return Plan(ActionChunk(targets, ~mask), targets)


@pytest.fixture
def hand():
  return ByHand()


@pytest.fixture
def policy(hand):
  return AnchoredPolicy(lambda sight: sight, tell, steps=STEPS, max_age=5, executor=hand)


def told(plan):
  return plan.targets[0, :, 0].tolist()


def test_old_anchor_serves_until_the_next_is_there(policy, hand):
  policy.look(0, 1)
  with pytest.raises(StaleAnchorError, match='no anchor yet'):
    policy.act(0, STATE)
  hand.finish()
  assert told(policy.act(0, STATE)) == [100, 101, 102, 103, 104, 105, 106, 107]
  policy.look(2, 2)
  late = policy.act(3, STATE)  # the refresh of step 2 is still under way
  assert told(late)[:4] == [100, 101, 102, 103]
  np.testing.assert_array_equal(late.chunk.mask[0], [0, 0, 0, 1, 1, 1, 1, 1])
  hand.finish()
  # Steps 2 and 3 were carried out as the old anchor said, and step 4 will be.
  new = policy.act(4, STATE, delay=1)
  assert told(new) == [102, 103, 104, 203, 204, 205, 206, 207]
  np.testing.assert_array_equal(new.chunk.mask[0], [0, 0, 0, 1, 1, 1, 1, 1])
  # What was told last stands.
  assert told(policy.act(6, STATE))[:4] == [102, 103, 104, 203]


def test_of_several_looks_the_newest_is_refreshed(policy, hand):
  for step in range(4):
    policy.look(step, step)
  assert len(hand.waiting) == 1
  hand.finish()
  assert told(policy.act(3, STATE))[3] == 3  # of anchor 0; the look of step 3 was started
  hand.finish()
  assert not hand.waiting
  assert told(policy.act(4, STATE))[1] == 301


def test_a_late_refresh_is_an_error_that_says_so(policy, hand):
  policy.look(0, 1)
  hand.finish()
  policy.act(0, STATE)
  policy.look(1, 2)
  assert told(policy.act(5, STATE))[5] == 105
  for step, delay in ((6, 0), (5, 1)):
    with pytest.raises(StaleAnchorError, match=rf'at most 5 .*newest is {step} old \(seen at st'):
      policy.act(step, STATE, delay=delay)
  hand.finish()
  # The robot went on along its last plan.
  assert told(policy.act(6, STATE))[:6] == [101, 102, 103, 104, 105, 205]


def test_after_the_end_of_a_plan_its_last_target_is_held(policy, hand):
  policy.look(0, 1)
  hand.finish()
  policy.act(0, STATE)
  policy.look(10, 2)
  hand.finish()
  assert told(policy.act(12, STATE)) == [107, 107, 202, 203, 204, 205, 206, 207]


def test_a_failed_refresh_is_named_and_the_old_anchor_stays(hand, caplog):
  def refresh(sight):
    if sight == 2:
      raise DataError('no picture')
    return sight

  policy = AnchoredPolicy(refresh, tell, steps=STEPS, max_age=5, executor=hand)
  policy.look(0, 1)
  hand.finish()
  policy.act(0, STATE)
  policy.look(2, 2)
  hand.finish()
  assert told(policy.act(3, STATE))[3] == 103
  assert "refresh of step 2 failed: DataError('no picture')" in caplog.text
  with pytest.raises(StaleAnchorError) as caught:
    policy.act(9, STATE)
  assert isinstance(caught.value.__cause__, DataError)
  with pytest.raises(DataError, match='no picture'):
    policy.wait()


def test_acting_does_not_wait_for_a_thread_that_refreshes():
  begun, go_on = threading.Event(), threading.Event()

  def refresh(sight):
    if sight == 2:
      begun.set()
      assert go_on.wait(60)
    return sight

  policy = AnchoredPolicy(refresh, tell, steps=STEPS, max_age=5)
  policy.look(0, 1)
  policy.wait()
  policy.look(1, 2)
  assert begun.wait(60)  # the refresh is under way and cannot end before this thread lets it
  assert told(policy.act(2, STATE))[2] == 102
  with pytest.raises(TimeoutError, match='no anchor within 0 s'):
    policy.wait(0)
  go_on.set()
  policy.wait(60)
  # Of the new anchor, seen at step 1; step 1 was carried out by nobody's word, step 2 is open.
  assert told(policy.act(2, STATE))[1:] == [201, 202, 203, 204, 205, 206, 207]
  policy.close()


def test_bad_calls_are_refused(policy, hand):
  with pytest.raises(ConfigError, match=r'max_age: expected 1..7 control steps .* got 8'):
    AnchoredPolicy(lambda x: x, tell, steps=STEPS, max_age=8, executor=hand)
  policy.look(3, 1)
  with pytest.raises(DataError, match='control step after 3, got 3'):
    policy.look(3, 1)
  hand.finish()
  with pytest.raises(DataError, match='control step 3 or later, got 2'):
    policy.act(2, STATE)


def test_a_fresh_anchor_gives_the_one_call_to_the_last_bit(cfg, params, make_inputs):
  window = Window.event(cfg, 2)
  obs, text = make_inputs()
  upright = np.float32([0.1, 0.2, 0.3, 1, 0, 0, 0, 1, 0, 1])
  obs = type(obs)(obs.frames, jnp.tile(upright, (2, 1)), obs.view_mask)
  length, keys = np.array([2, 1], np.int32), jax.random.split(jax.random.key(1), 2)
  jitted = {
    name: jax.jit(functools.partial(getattr(runtime, name), params, cfg=cfg, window=window))
    for name in ('refresh', 'act', 'answer')
  }
  policy = AnchoredPolicy(
    lambda sight: jitted['refresh'](*sight, length, keys), jitted['act'], steps=8, max_age=7
  )
  policy.look(0, (obs, text))
  policy.wait()
  got = policy.act(0, np.asarray(obs.state))
  free = runtime.no_targets(cfg, window, 2)
  want = jitted['answer'](obs, text, length, free, keys)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  policy.close()
