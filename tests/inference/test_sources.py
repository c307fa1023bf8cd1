"""Sources of text: what a script asks for, switching in mid-rollout, and holding a request."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import point_mass_env
import pytest

from wallwm_jax.inference import sources
from wallwm_jax.inference.rollout import LoopSpec, closed_loop
from wallwm_jax.inference.sources import Source, TextContext
from wallwm_jax.types import ActionChunk

GO_RIGHT, GO_UP, INSTRUCTION = range(point_mass_env.NUM_CAPTIONS)


@pytest.fixture
def context(captions, make_inputs):
  """context(step, clock) before a turn whose scripted event is GO_UP."""
  obs, _ = make_inputs(frames=5)
  rows = [jnp.array(row, jnp.int32) for row in (INSTRUCTION, [GO_RIGHT, GO_UP, -1], GO_UP)]

  def make(step=0, clock=0):
    return TextContext(obs, captions, *rows, jnp.int32(step), jnp.int32(clock))

  return make


def counter(lengths) -> Source:
  """Says how often it has been asked, and every time for how long: `lengths` in turn."""

  def speak(context, count):
    said = sources.lookup(context.captions, count % 2)
    return dataclasses.replace(said, length=jnp.asarray(lengths)[count], caption=count), count + 1

  return Source(lambda captions: jnp.int32(0), speak)


def idle(steps):
  """A policy that does nothing for a whole chunk."""
  return lambda obs, text, key, length: ActionChunk(
    jnp.zeros((1, steps, 10)), jnp.ones((1, steps), bool)
  )


def test_a_script_asks_for_rows_of_the_table(captions, context):
  for source, row in ((sources.instruction, INSTRUCTION), (sources.atomic, GO_UP)):
    asked, state = jax.jit(source.speak)(context(), source.start(captions))
    np.testing.assert_array_equal(asked.text.features[0], captions.text.features[row])
    np.testing.assert_array_equal(asked.text.mask[0], captions.text.mask[row])
    assert (asked.caption, asked.length, state) == (row, captions.lengths[row], ())


def test_timed_goes_through_the_script_by_its_own_clock(captions, context):
  """Lengths 1 (go right) and 2 (go up): the clock says when, the environment never; the last event
  is asked for on and on, an unfinished one for what is left of it."""
  source = sources.timed
  state, said = source.start(captions), []
  for step, clock in enumerate((0, 1, 2, 3, 7, 8)):
    before = dataclasses.replace(context(step, clock), event=jnp.int32(step % 2))
    asked, state = jax.jit(source.speak)(before, state)
    said.append((int(asked.caption), int(asked.length)))
  assert said == [(GO_RIGHT, 1), (GO_UP, 2), (GO_UP, 1), (GO_UP, 2), (GO_UP, 2), (GO_UP, 1)]
  np.testing.assert_array_equal(asked.text.features[0], captions.text.features[GO_UP])


def test_timed_is_a_source_of_whole_rollouts(env, captions):
  loop = jax.jit(lambda: closed_loop(idle(8), sources.timed, env, 0.9, jax.random.key(0), captions,
                                     spec=LoopSpec(turns=3, bucket=2)))
  assert np.asarray(loop().turns.asked).tolist() == [GO_RIGHT, GO_UP, GO_UP]


def test_a_person_is_asked_once_a_turn_until_the_attempt_is_over(env, captions):
  """Told where the policy is, answers decide what is done; nobody is asked after success."""
  said = []

  def ask(instruction, step, clock):
    said.append((int(instruction), int(step), int(clock)))
    row = GO_RIGHT if len(said) <= 4 else GO_UP
    return jax.tree.map(np.asarray, sources.lookup(captions, row))

  def act(obs, text, key, length):
    right = jnp.all(text.features[0] == captions.text.features[GO_RIGHT])
    ramp = jnp.linspace(0.0, 0.25, 5)[1:]
    actions = jnp.zeros((1, 4, 10)).at[0, :, jnp.where(right, 0, 1)].set(ramp)
    return ActionChunk(actions, jnp.ones((1, 4), bool))

  spec = LoopSpec(turns=12, bucket=1)
  loop = jax.jit(lambda: closed_loop(act, sources.human(ask), env, 0.6, jax.random.key(0),
                                     captions, spec=spec))
  out = jax.block_until_ready(loop())
  count = int(out.attempted)
  assert bool(out.success) and 4 < count < 12
  assert said == [(INSTRUCTION, turn, turn) for turn in range(count)]
  assert np.asarray(out.turns.asked)[:count].tolist() == [GO_RIGHT] * 4 + [GO_UP] * (count - 4)


def test_a_schedule_switches_and_its_last_entry_holds_on(captions, context):
  source = sources.switched([sources.instruction, sources.atomic], jnp.array([0, 1, 0, 1]))
  speak = jax.jit(source.speak)
  rows = [speak(context(step), source.start(captions))[0].caption for step in range(6)]
  assert np.array(rows).tolist() == [INSTRUCTION, GO_UP, INSTRUCTION, GO_UP, GO_UP, GO_UP]


def test_memory_rests_while_another_source_speaks(captions, context):
  pair = [counter([1] * 9), counter([1] * 9)]
  source = sources.switched(pair, jnp.array([0, 0, 1, 0, 1]))
  state, said = source.start(captions), []
  for step in range(5):
    asked, state = jax.jit(source.speak)(context(step), state)
    said.append(int(asked.caption))
  assert said == [0, 1, 0, 2, 1] and tuple(map(int, state)) == (3, 2)


def test_a_request_is_held_until_its_own_clock_has_run_out(env, captions):
  """Lengths 3, 1, 4, 1 over chunks of two latents: asked at clock 0, 4, 6 and 10."""
  source = sources.held(counter([3, 1, 4, 1, 1]))
  spec = LoopSpec(turns=7, bucket=2)
  loop = jax.jit(lambda: closed_loop(idle(8), source, env, 0.9, jax.random.key(0), captions,
                                     spec=spec))
  assert np.asarray(loop().turns.asked).tolist() == [0, 0, 1, 2, 2, 3, 4]


def test_the_clock_counts_latents_that_were_acted(env, captions):
  """A policy that stops early ages what is held less than one that uses its whole window."""
  source = sources.held(counter([2, 2, 2, 2]))

  def short(obs, text, key, length):
    return ActionChunk(jnp.zeros((1, 8, 10)), jnp.arange(8)[None] < 4)

  out = closed_loop(short, source, env, 0.9, jax.random.key(0), captions,
                    spec=LoopSpec(turns=5, bucket=2))
  assert np.asarray(out.turns.asked).tolist() == [0, 0, 1, 1, 2]


def test_holding_never_reads_the_status_of_the_event(captions, context):
  """The same request whatever the environment says has begun."""
  source = sources.held(sources.instruction)
  first, state = source.speak(context(clock=0), source.start(captions))
  other = dataclasses.replace(context(1, clock=1), event=jnp.int32(GO_RIGHT))
  second, after = source.speak(other, state)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert int(after.until) == int(captions.lengths[INSTRUCTION])
