"""Observation to action in one call: its halves, its memory, its batch."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.geometry.poses import apply_relative, relative_pose
from wallwm_jax.inference import denoiser, runtime
from wallwm_jax.inference.denoiser import Window
from wallwm_jax.inference.event import predict_event
from wallwm_jax.inference.runtime import Now, Turn
from wallwm_jax.types import ActionChunk, ConfigError, DataError

KEYS = jax.random.split(jax.random.key(5), 2)
LENGTH = np.array([2, 1], np.int32)
UPRIGHT = np.float32([0.1, 0.2, 0.3, 1, 0, 0, 0, 1, 0, 1])


@pytest.fixture(scope='module', params=['event', 'chunk'])
def window(cfg, request):
  return Window.event(cfg, 2) if request.param == 'event' else Window.chunk(cfg)


@pytest.fixture(scope='module')
def call(cfg, params):
  """call(name, window, *args): a jitted function of the runtime."""

  @functools.cache
  def jitted(name, window):
    donated = (1,) if name == 'replan' else ()
    function = functools.partial(getattr(runtime, name), cfg=cfg, window=window)
    return jax.jit(function, donate_argnums=donated, keep_unused=bool(donated))

  return lambda name, window, *args: jitted(name, window)(params, *args)


@pytest.fixture(scope='module')
def inputs(make_inputs):
  def make(window, seed=0):
    obs, text = make_inputs(1 + 4 * window.history, seed)
    state = np.tile(UPRIGHT, (2, 1)) + np.float32([[0.0], [0.05]])
    return dataclasses.replace(obs, state=jnp.asarray(state)), text

  return make


def nothing(cfg, window):
  return runtime.no_targets(cfg, window, 2)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_halves_are_the_one_call_to_the_last_bit(cfg, window, call, inputs):
  obs, text = inputs(window)
  anchor = call('refresh', window, obs, text, LENGTH, KEYS)
  apart = call('act', window, anchor, Now(obs.state, nothing(cfg, window)))
  whole = call('answer', window, obs, text, LENGTH, nothing(cfg, window), KEYS)
  equal(apart, whole)
  np.testing.assert_array_equal(whole.chunk.mask.sum(1), 4 * LENGTH)


def test_a_robot_is_answered_as_if_alone(cfg, params, call, inputs):
  """Its row of a batch is the event mode's prediction with its noise, and nobody else's."""
  window = Window.event(cfg, 2)
  obs, text = inputs(window)
  blind = jnp.array([[True, True], [True, False]])
  obs = dataclasses.replace(obs, view_mask=blind)
  together = call('answer', window, obs, text, LENGTH, nothing(cfg, window), KEYS)
  alone = jax.jit(functools.partial(predict_event, cfg=cfg, bucket=2))
  for i in range(2):
    one = jax.tree.map(lambda x, i=i: x[i : i + 1], (obs, text))
    noise = denoiser.sample_noise(KEYS[i], cfg, 1, window)
    want = alone(params, *one, KEYS[i], length=LENGTH[i : i + 1], noise=noise).chunk
    np.testing.assert_allclose(together.chunk.actions[i], want.actions[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(together.chunk.mask[i], want.mask[0])
  others = jax.tree.map(lambda x: x.at[1].set(x[0]) if x.ndim else x, jax.tree.map(
    jnp.asarray, (obs, text)))
  changed = call('answer', window, *others, LENGTH, nothing(cfg, window), KEYS)
  np.testing.assert_array_equal(changed.chunk.actions[0], together.chunk.actions[0])
  assert np.abs(changed.chunk.actions[1] - together.chunk.actions[1]).max() > 1e-3


def test_actions_are_told_from_where_the_robot_is(cfg, window, call, inputs):
  """The same targets in the world, whatever the newest state."""
  obs, text = inputs(window)
  anchor = call('refresh', window, obs, text, LENGTH, KEYS)
  there = call('act', window, anchor, Now(obs.state, nothing(cfg, window)))
  turned = UPRIGHT.copy()
  turned[:9] = [0.3, -0.1, 0.4, 0, 1, 0, -1, 0, 0]  # a quarter turn about z
  state = jnp.tile(turned, (2, 1))
  here = call('act', window, anchor, Now(state, nothing(cfg, window)))
  np.testing.assert_array_equal(here.targets, there.targets)
  got = apply_relative(state[:, None], here.chunk.actions)
  np.testing.assert_allclose(got, there.targets, atol=1e-4)
  assert np.abs(here.chunk.actions - there.chunk.actions).max() > 0.1


def test_what_was_carried_out_stays_and_the_rest_follows(cfg, window, call, inputs):
  obs, text = inputs(window)
  steps = 4 * window.future
  anchor = call('refresh', window, obs, text, LENGTH, KEYS)
  free = call('act', window, anchor, Now(obs.state, nothing(cfg, window)))
  poses = jnp.tile(UPRIGHT + np.float32([0.5] + [0] * 9), (2, steps, 1))
  mask = jnp.arange(steps) < jnp.array([[3], [0]])
  held = call('act', window, anchor, Now(obs.state, ActionChunk(poses, mask)))
  np.testing.assert_allclose(held.targets[0, :3], poses[0, :3], atol=1e-4)
  assert np.abs(held.targets[0, 3:] - free.targets[0, 3:]).max() > 1e-4
  np.testing.assert_array_equal(held.targets[1], free.targets[1])
  np.testing.assert_array_equal(held.chunk.mask, free.chunk.mask & ~mask)
  # Poses that are not committed are not read, not even where they are nonsense.
  noise = jnp.where(mask[..., None], poses, 1e6)
  equal(call('act', window, anchor, Now(obs.state, ActionChunk(noise, mask))), held)


def test_memory_is_donated_and_continued(cfg, params, window, call, inputs):
  obs, text = inputs(window)
  memory = runtime.new_memory(params, KEYS, cfg=cfg, window=window)
  kept = jax.tree.leaves(memory)
  zero = jnp.zeros(2, jnp.int32)
  plan, after = call('replan', window, memory, obs, text, Turn(LENGTH, zero, zero))
  assert all(x.is_deleted() for x in kept)
  keys = jax.vmap(jax.random.split)(KEYS)
  first = call('answer', window, obs, text, LENGTH, nothing(cfg, window), keys[:, 0])
  equal(plan, first)
  assert jax.tree.structure(after) == jax.tree.structure(memory)
  np.testing.assert_array_equal(after.last.actions, plan.targets)

  # Two steps later the robot moves on, three more steps are on their way.
  poses = np.array(plan.targets)
  later = dataclasses.replace(obs, state=jnp.asarray(poses[:, 1]))
  turn = Turn(LENGTH, jnp.array([2, 2]), jnp.array([3, 3]))
  second, _ = call('replan', window, after, later, text, turn)
  # Of the second robot's event (4 steps) only two are left to be carried out.
  assert np.allclose(second.targets[0, :3], poses[0, 2:5], atol=1e-4)
  assert np.allclose(second.targets[1, :2], poses[1, 2:4], atol=1e-4)
  np.testing.assert_array_equal(~second.chunk.mask[:, :4], [[1, 1, 1, 0], [1, 1, 0, 0]])


def test_begun_steps_end_with_the_window():
  poses = np.arange(8.0).reshape(1, 8, 1)
  last = ActionChunk(jnp.asarray(poses), jnp.arange(8)[None] < 7)
  turn = Turn(*(jnp.array([n]) for n in (2, 5, 4)))
  chunk = runtime.begun(last, turn)
  np.testing.assert_array_equal(chunk.mask[0], [1, 1, 0, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(chunk.actions[0, :2, 0], [5, 6])


def test_what_cannot_be_anchored_is_refused(cfg, params, inputs):
  window = Window.event(cfg, 2)
  obs, text = inputs(window)
  symmetric = dataclasses.replace(
    cfg, diffusion=dataclasses.replace(cfg.diffusion, mapping='symmetric')
  )
  with pytest.raises(ConfigError, match="expected config.diffusion.mapping 'anchor', got 'symm"):
    runtime.refresh(params, obs, text, LENGTH, KEYS, cfg=symmetric, window=window)
  whole = runtime.answer(
    params, obs, text, LENGTH, nothing(cfg, window), KEYS, cfg=symmetric, window=window
  )
  assert np.isfinite(whole.targets).all()
  np.testing.assert_allclose(
    relative_pose(obs.state[:, None], whole.targets)[..., :3], whole.chunk.actions[..., :3],
    atol=1e-4,
  )
  with pytest.raises(DataError, match=r'Observation.frames: expected uint8 \(2, 2, 5'):
    runtime.refresh(params, obs, text, LENGTH, KEYS, cfg=cfg, window=Window.chunk(cfg))
