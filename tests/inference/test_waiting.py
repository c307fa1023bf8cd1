"""A robot that runs on while its policy computes: nothing is done twice, left out or late."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.inference import sources, waiting
from wallwm_jax.inference.rollout import LoopSpec, chunk_policy, closed_loop, event_policy
from wallwm_jax.types import ActionChunk, ConfigError

STEP = 0.01  # m
HERE = jnp.array([0.0, 0, 0, 1, 0, 0, 0, 1, 0, 1])


def line(steps, valid=None):
  """A chunk [K, 10] that goes along x at a constant pace."""
  actions = jnp.tile(HERE, (steps, 1)).at[:, 0].set(STEP * jnp.arange(1, steps + 1))
  return ActionChunk(actions, jnp.arange(steps) < (steps if valid is None else valid))


def walk(obs, text, key, length, committed=None):
  """Goes on along x, whatever it sees; says in the y channel of its first step what it was told."""
  chunk = line(8)
  told = 0.0 if committed is None else jnp.sum(committed.actions[0, :, 0] * committed.mask[0])
  return ActionChunk(chunk.actions.at[0, 1].set(told)[None], chunk.mask[None])


def run(env, captions, act=walk, **options):
  spec = LoopSpec(turns=4, bucket=2, **options)
  return closed_loop(act, sources.atomic, env, 5.0, jax.random.key(0), captions, spec=spec)


def test_a_chunk_follows_on_the_tail_of_the_one_before():
  first = waiting.follow(line(8), waiting.no_tail(2, 10), HERE)
  np.testing.assert_array_equal(first.mask, [False] * 2 + [True] * 4)  # the robot stood for two
  np.testing.assert_allclose(first.actions[2:, 0], STEP * np.arange(1, 5), rtol=1e-6)
  np.testing.assert_allclose(first.tail.targets[:, 0], STEP * np.array([5, 6]), rtol=1e-6)
  reached = HERE.at[0].set(4 * STEP)
  told = waiting.committed(first.tail, reached, 8)
  np.testing.assert_array_equal(told.mask[0], [True] * 2 + [False] * 6)
  np.testing.assert_allclose(told.actions[0, :2, 0], STEP * np.array([1, 2]), rtol=1e-5)
  second = waiting.follow(line(8), first.tail, reached)
  assert second.mask.all() and second.own.tolist() == [False] * 2 + [True] * 6
  np.testing.assert_allclose(second.actions[:, 0], STEP * np.arange(1, 7), rtol=1e-5)
  np.testing.assert_allclose(second.tail.targets[:, 0], STEP * np.array([11, 12]), rtol=1e-5)


def test_an_event_that_had_ended_leaves_nothing_out():
  short = waiting.follow(line(8, valid=4), waiting.no_tail(2, 10), HERE)
  assert not short.tail.mask.any()
  after = waiting.follow(line(8, valid=4), short.tail, HERE)
  np.testing.assert_array_equal(after.mask, [False] * 2 + [True] * 4)
  np.testing.assert_allclose(after.actions[2:, 0], STEP * np.arange(1, 5), rtol=1e-6)


@pytest.mark.parametrize('delay', [1, 2, 4])
def test_running_on_never_stops_and_holding_does(env, captions, delay):
  moving, stopping = (
    run(env, captions, delay=delay, waiting=name).turns.poses[:, :, 0].reshape(-1)
    for name in ('run', 'hold')
  )
  assert moving.shape == (4 * (8 - delay),) and stopping.shape == (4 * (8 + delay),)
  np.testing.assert_allclose(np.diff(moving[delay - 1:]), STEP, rtol=1e-3)
  paces = np.diff(stopping.reshape(4, -1), axis=1)
  np.testing.assert_allclose(paces[:, :delay - 1], 0, atol=1e-6)
  np.testing.assert_allclose(paces[:, delay:], STEP, rtol=1e-3)


def test_the_policy_is_told_what_it_is_committed_to(env, captions):
  turns = run(env, captions, delay=3, waiting='run').turns
  told = np.asarray(turns.actions.actions[:, 0, 1])
  np.testing.assert_allclose(told, [0] + [STEP * (1 + 2 + 3)] * 3, rtol=1e-4)
  np.testing.assert_array_equal(turns.actions.mask.sum(1), [5] * 4)  # 8 - 3 of each chunk


def test_without_latency_both_are_the_same(env, captions):
  outs = [run(env, captions, waiting=name) for name in ('hold', 'run')]
  jax.tree.map(np.testing.assert_array_equal, outs[0].turns.poses, outs[1].turns.poses)
  np.testing.assert_array_equal(*(out.turns.actions.mask for out in outs))


@pytest.mark.parametrize('make', [event_policy, chunk_policy])
def test_trained_policies_keep_to_their_tail(cfg, env, captions, params, make):
  """What is in-painted is what the robot does meanwhile."""
  if make is event_policy:
    act, history = event_policy(params, cfg, bucket=2), 0
  else:
    act, history = chunk_policy(params, cfg), cfg.model.history
  lengths = np.full(3, 2, np.int32)
  table = sources.CaptionTable(captions.text, lengths)
  out = jax.jit(lambda: run(env, table, act, history=history, delay=2, waiting='run'))()
  turns = out.turns
  from wallwm_jax.geometry.poses import apply_relative

  # Each turn's tail is the chunk before, taken from where that one was asked for.
  asked_at = turns.poses[:-1, -1]
  before = apply_relative(np.asarray(asked_at[:-1])[:, None], turns.actions.actions[1:-1])[:, 6:]
  planned = apply_relative(np.asarray(asked_at[1:])[:, None], turns.actions.actions[2:])[:, :2]
  np.testing.assert_allclose(planned[..., :3], before[..., :3], atol=2e-3)


def test_bad_settings_are_refused():
  with pytest.raises(ConfigError, match="expected one of .*'hold', 'run'.*got 'wait'"):
    LoopSpec(turns=1, bucket=2, waiting='wait')
  with pytest.raises(ConfigError, match='at most 4 control steps to run on through.*got 5'):
    LoopSpec(turns=1, bucket=2, delay=5, waiting='run')
