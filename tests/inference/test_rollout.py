"""Closed loop on a point mass: what the policy sees, when it stops, one trace, and vmap."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import point_mass_env
import pytest

from wallwm_jax.inference import sources
from wallwm_jax.inference.rollout import LoopSpec, closed_loop, rollout_chunks, rollout_events
from wallwm_jax.types import ActionChunk

SOURCES = [sources.instruction, sources.atomic]


def expert(captions, bucket):
  """Moves towards x or y, whichever the text names; half the way in a turn."""
  go_right = captions.text.features[point_mass_env.GO_RIGHT]

  def act(obs, text, key, length):
    axis = jnp.where(jnp.all(text.features[0] == go_right), 0, 1)
    ramp = jnp.linspace(0.0, 0.25, 4 * bucket + 1)[1:]
    actions = jnp.zeros((1, 4 * bucket, 10)).at[0, :, axis].set(ramp)
    return ActionChunk(actions, jnp.arange(4 * bucket)[None] < 4 * length[:, None])

  return act


def test_an_expert_succeeds_replans_and_then_rests(env, captions):
  """Each event needs several turns; after success the world stands still."""
  spec = LoopSpec(turns=14, bucket=2, record=True)
  run = jax.jit(functools.partial(closed_loop, expert(captions, 2), sources.atomic, env,
                                  spec=spec))
  out = run(0.6, jax.random.key(0), captions)
  turns = out.turns
  assert bool(out.success) and float(out.progress) == 100.0
  assert int(out.attempted) == int(turns.acted.sum()) < 14
  # "go right" typically lasts one latent, "go up" two: only those steps are executed.
  steps = np.where(turns.caption == 0, 4, 8)
  np.testing.assert_array_equal(turns.actions.mask.sum(1), np.where(turns.acted, steps, 0))
  switch = int(np.flatnonzero(turns.event_done)[0])
  assert switch > 0 and np.all(turns.caption[:switch + 1] == point_mass_env.GO_RIGHT)
  assert np.all(turns.caption[switch + 1:] == point_mass_env.GO_UP)
  assert int(turns.event_done.sum()) == 2 and np.all(np.diff(turns.progress) >= 0)
  assert turns.frames.shape == (14, 2, 8, 16, 16, 3)
  last = int(out.attempted)
  assert np.all(turns.progress[last - 1:] == 100.0) and not np.any(turns.event_done[last:])


def test_late_actions_are_waited_for_in_place(env, captions):
  """Latency shifts what is executed and changes nothing else in a world that stands still."""
  key = jax.random.key(0)
  prompt, late = (
      closed_loop(expert(captions, 2), sources.atomic, env, 0.6, key, captions,
                  spec=LoopSpec(turns=14, bucket=2, record=True, delay=delay)) for delay in (0, 3))
  assert late.turns.poses.shape == (14, 11, 10) and late.turns.frames.shape[:3] == (14, 2, 11)
  np.testing.assert_array_equal(late.turns.poses[:, 3:], prompt.turns.poses)
  np.testing.assert_array_equal(late.turns.poses[1, :3], late.turns.poses[0, None, -1].repeat(3, 0))
  assert int(late.attempted) == int(prompt.attempted)


def test_wrong_text_never_succeeds(env, captions):
  """The same expert, told only the instruction, goes up for ever: text reaches the policy."""
  spec = LoopSpec(turns=14, bucket=2)
  out = closed_loop(expert(captions, 2), sources.instruction, env, 0.6, jax.random.key(0),
                    captions, spec=spec)
  assert not bool(out.success) and float(out.progress) == 0.0 and out.turns.frames is None


def test_history_holds_the_frames_that_were_seen(env, captions):
  """The window of every turn is the tail of (first frame repeated, then everything executed)."""
  spec = LoopSpec(turns=3, bucket=1, history=1, record=True)

  def act(obs, text, key, length):
    # Reports the brightness of the five frames it was shown in channels the point mass ignores.
    seen = obs.frames.astype(jnp.float32).mean((0, 1, 3, 4, 5))
    actions = jnp.zeros((1, 4, 10)).at[0, :, :2].set(0.1).at[0, 0, 3:8].set(seen)
    return ActionChunk(actions, jnp.ones((1, 4), bool))

  out = closed_loop(act, sources.atomic, env, 0.9, jax.random.key(1), captions, spec=spec)
  reported = np.asarray(out.turns.actions.actions[:, 0, 3:8])
  first = env.observe(env.reset(jax.random.split(jax.random.key(1))[0], 0.9)).frames
  executed = np.asarray(out.turns.frames).transpose(0, 2, 1, 3, 4, 5).reshape(-1, 2, 16, 16, 3)
  stream = np.concatenate([np.repeat(np.asarray(first).swapaxes(0, 1), 5, axis=0), executed])
  brightness = stream.astype(np.float32).mean((1, 2, 3, 4))
  expected = [brightness[4 * i:4 * i + 5] for i in range(3)]
  np.testing.assert_allclose(reported, expected, rtol=1e-5)
  assert np.ptp(brightness) > 0.5


def test_sources_switch_in_mid_rollout(env, captions):
  """Turn by turn the policy hears what the schedule says."""
  spec = LoopSpec(turns=4, bucket=1, history=1)

  def act(obs, text, key, length):
    actions = jnp.zeros((1, 4, 10)).at[:, :, 3:].set(text.features[0, 0, :7])
    return ActionChunk(actions, jnp.ones((1, 4), bool))

  source = sources.switched(SOURCES, jnp.array([0, 1, 1, 0]))
  out = closed_loop(act, source, env, 0.9, jax.random.key(0), captions, spec=spec)
  heard = out.turns.actions.actions[:, 0, 3:]
  rows = np.array([point_mass_env.INSTRUCTION, point_mass_env.GO_RIGHT, point_mass_env.GO_RIGHT,
                   point_mass_env.INSTRUCTION])
  np.testing.assert_array_equal(heard, captions.text.features[rows, 0, :7])


@pytest.fixture(scope='module', params=['event', 'chunk'])
def run(request, cfg, env, captions):
  """(f(params, task, key) jitted, the same unjitted, a list that grows with every trace)."""
  if request.param == 'event':
    fixed = functools.partial(rollout_events, cfg=cfg, bucket=2, max_events=3)
  else:
    source = sources.switched(SOURCES, jnp.array([0, 1, 0]))
    fixed = functools.partial(rollout_chunks, cfg=cfg, max_chunks=3, source=source)
  traces = []

  def plain(params, task, key):
    return fixed(params, env, task, key, captions)

  def counted(*args):
    traces.append(1)
    return plain(*args)

  return jax.jit(counted), plain, traces


def test_traces_once(run, params):
  jitted, _, traces = run
  outs = [jitted(params, jnp.float32(0.3 + 0.1 * i), jax.random.key(i)) for i in range(4)]
  assert len(traces) == 1
  actions = np.stack([out.turns.actions.actions for out in outs])
  assert np.all(np.abs(np.diff(actions, axis=0)).max((1, 2, 3)) > 1e-3)


@pytest.mark.slow
def test_vmapped_equals_single(run, params):
  jitted, plain, _ = run
  keys = jax.random.split(jax.random.key(5), 3)
  tasks = jnp.array([0.3, 0.6, 0.9])
  many = jax.jit(jax.vmap(plain, in_axes=(None, 0, 0)))(params, tasks, keys)
  for i in range(3):
    single = jitted(params, tasks[i], keys[i])
    row = jax.tree.map(lambda x, i=i: x[i], many)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), single, row)
