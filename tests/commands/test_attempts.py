"""Batches of closed-loop attempts, in a stand-in for the tabletop."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.commands import attempts, pages, tabletop_attempts, worlds
from wallwm_jax.envs.tabletop import tasks
from wallwm_jax.evaluation import report
from wallwm_jax.inference import sources
from wallwm_jax.inference.language import PlanningTable
from wallwm_jax.types import (
  ConfigError,
  EnvFns,
  Observation,
  Prompt,
)

VIEWS = ('front', 'side')


def stand_in(config) -> EnvFns:
  """Counts control steps; 'reach' succeeds after 8 of them, everything else never."""

  def observe(state):
    shade = jnp.full((len(VIEWS), 1, *config.image_size, 3), state['steps'], jnp.uint8)
    pose = jnp.array([0, 0, 0, 1, 0, 0, 0, 1, 0, 1.0])
    return Observation(shade, pose, jnp.ones(len(VIEWS), bool))

  def execute(state, actions, mask):
    counted = state['steps'] + jnp.cumsum(mask)
    shades = jnp.broadcast_to(
      counted[None, :, None, None, None], (len(VIEWS), len(mask), *config.image_size, 3)
    )
    return state | {'steps': counted[-1]}, shades.astype(jnp.uint8), actions

  def success(state):
    return (state['task'].kind == tasks.REACH) & (state['steps'] >= 8)

  return EnvFns(
    reset=lambda key, task: {'task': task, 'steps': jnp.int32(0)},
    observe=observe,
    step=None,
    execute=execute,
    caption=lambda state: tasks.event_caption(state['task'].script[0]),
    task_caption=lambda state: state['task'].instruction,
    script=lambda state: jax.vmap(tasks.event_caption)(state['task'].script),
    progress=lambda state: jnp.where(success(state), 100.0, 0.0),
    success=success,
  )


@pytest.fixture
def world(monkeypatch):
  monkeypatch.setattr(tabletop_attempts, 'env_fns', stand_in)
  monkeypatch.setattr(tabletop_attempts, 'VIEWS', VIEWS)
  tabletop_attempts._program.cache_clear()
  yield
  tabletop_attempts._program.cache_clear()


@pytest.fixture(scope='module')
def suite():
  return tasks.task_suite(jax.random.key(0), ('reach', 'push'), 3)


def test_caption_lengths_come_from_the_store(config, store):
  table = attempts.caption_table(config, store, tasks.CAPTIONS)
  assert table.text.features.shape[0] == len(tasks.CAPTIONS) == len(table.lengths)
  median = np.ceil(np.median([np.ceil(7 / 4)] * 8 + [np.ceil(13 / 4)] * 8))
  assert set(table.lengths.tolist()) == {int(median)}  # the store knows none of these captions


@pytest.mark.slow
@pytest.mark.parametrize('window, buckets', [('event', (2,)), ('chunk', (2,))])
def test_attempts_are_scored_by_kind_and_recorded(
  world, config, store, params, suite, monkeypatch, window, buckets
):
  monkeypatch.setattr(tabletop_attempts, 'BATCH', 4)  # six attempts: the second part is filled up
  chosen = dataclasses.replace(
    config, data=dataclasses.replace(config.data, window=window, buckets=buckets)
  )
  table = dataclasses.replace(
    attempts.caption_table(config, store, tasks.CAPTIONS), lengths=np.full(len(tasks.CAPTIONS), 2)
  )
  done = tabletop_attempts.attempt(chosen, params, suite, table, max_steps=24, record=True)
  assert done.kinds == ['reach'] * 3 + ['push'] * 3
  assert all(text in tasks.CAPTIONS for text in done.instructions)
  result = done.score()
  assert result.by_kind['reach'][0].value == 1 and result.by_kind['push'][0].value == 0
  assert done.rollouts.attempted.tolist() == [1, 1, 1, 3, 3, 3]
  rows = done.rows()
  assert [row['turns'] for row in rows] == [1, 1, 1, 3, 3, 3]
  assert rows[0]['time_s'] == pytest.approx(8 / done.fps) and np.isnan(rows[5]['time_s'])
  assert np.isnan(rows[0]['seam_jump']) and rows[5]['seam_jump'] > 0
  motion = done.motion()
  assert motion['time_to_success_n'] == 3 == motion['seam_jump_n']
  assert [turn.shape for turn in done.films[5]] == 3 * [(2, 8, 16, 16, 3)]
  film = np.concatenate(done.films[5], axis=1)
  np.testing.assert_array_equal(film[0, :, 0, 0, 0], np.arange(1, 25))
  assert len(done.films[0]) == 1


@pytest.mark.slow
@pytest.mark.parametrize('window', ['event', 'chunk'])
def test_a_page_shows_predicted_beside_executed_frames_and_delays(
  world, config, store, params, suite, window
):
  data = dataclasses.replace(config.data, window=window, buckets=(2,))
  chosen = dataclasses.replace(config, data=data)
  table = attempts.caption_table(config, store, tasks.CAPTIONS)
  late = [
    tabletop_attempts.attempt(chosen, params, suite, table, max_steps=24, delay=4, waiting=way)
    for way in ('hold', 'run')
  ]
  assert late[1].rollouts.turns.acted.shape[1] == 6  # 24 // (8 - 4)
  filmed = tabletop_attempts.attempt(chosen, params, suite, table, max_steps=24, record=True)
  clips = attempts.clips(filmed, chosen, params, table)
  assert [clip.success for clip in clips] == [True] * 3 + [False] * 3
  for clip in clips:
    assert clip.predicted.shape == clip.frames.shape and clip.predicted.dtype == np.uint8
  told = pages.closed_loop_page([filmed, *late], clips[:1], chosen, 'tiny')
  assert {way: list(found) for way, found in told.closed_loop.delays.items()} == {
    'hold': [0, 4], 'run': [0, 4]
  }  # fmt: skip
  text = report.render(told)
  assert 'robot runs on' in text and 'predicted from the start of each turn' in text


@pytest.mark.slow
def test_latency_counts_into_the_time_of_an_attempt(world, config, store, params, suite):
  table = attempts.caption_table(config, store, tasks.CAPTIONS)
  chosen = dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=(2,)))
  late = tabletop_attempts.attempt(chosen, params, suite, table, max_steps=24, delay=4)
  assert late.rollouts.turns.acted.shape[1] == 2  # 24 // (8 + 4)
  times = [row['time_s'] for row in late.rows() if row['success']]
  turns = [row['turns'] for row in late.rows() if row['success']]
  np.testing.assert_allclose(times, 12 / late.fps * np.array(turns))


def tokens(rows: int) -> Prompt:
  return Prompt(np.zeros((rows, 4), np.int32), np.ones((rows, 4), bool))


@pytest.mark.slow
@pytest.mark.parametrize('window', ['event', 'chunk'])
def test_a_planner_is_scored_by_the_events_it_names(
  world, config, store, speaking, suite, one_plan, window
):
  config, params = speaking
  data = dataclasses.replace(config.data, window=window, buckets=(2,))
  config = dataclasses.replace(config, data=data)
  count = len(tasks.CAPTIONS)
  right = int(tasks.event_caption(suite.script[4, 0]))  # of one of the pushes
  table = PlanningTable(tokens(count), np.array([0, right], np.int32))
  done = tabletop_attempts.attempt(
    config, params, suite, attempts.caption_table(config, store, tasks.CAPTIONS), max_steps=24,
    source='planner', planning=table,
  )  # fmt: skip
  assert done.asked(4) == [tasks.CAPTIONS[right]] * int(done.rollouts.attempted[4])
  named = [int(tasks.event_caption(row[0])) == right for row in np.asarray(suite.script)]
  assert done.score().planned.value == np.mean(named) and any(named)


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('planner', "source 'planner': expected a model with a language side.*Train stage 3 with"),
    ('staircase', 'Train stage 3 and stage 4 with'),
    ('oracle', 'source: expected one of'),
    ('human', 'expected somebody to ask'),
  ],
)
def test_sources_that_cannot_speak_are_refused(
  world, config, store, params, suite, source, message
):
  table = attempts.caption_table(config, store, tasks.CAPTIONS)
  with pytest.raises(ConfigError, match=message):
    tabletop_attempts.attempt(config, params, suite, table, max_steps=8, source=source)


@pytest.mark.slow
def test_a_person_is_asked_about_one_attempt_after_the_other(world, config, store, params):
  suite = tasks.task_suite(jax.random.key(0), ('reach', 'push'), 1)
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=(2,)))
  table = attempts.caption_table(config, store, tasks.CAPTIONS)
  turns = []

  def ask(instruction, step, clock):
    turns.append((tasks.CAPTIONS[int(instruction)].split()[0], int(step)))
    return jax.tree.map(np.asarray, sources.lookup(table, int(instruction)))

  done = tabletop_attempts.attempt(
    config, params, suite, table, max_steps=24, source='human', ask=ask
  )
  assert done.rollouts.attempted.tolist() == [1, 3]
  assert turns == [('reach', 0), ('push', 0), ('push', 1), ('push', 2)]
  assert done.asked(1) == [done.instructions[1]] * 3


def test_policies_are_told_by_what_they_were_trained_with(speaking):
  config, _ = speaking
  for changes, source in (
    ({'window': 'event'}, 'atomic'),
    ({'window': 'chunk'}, 'instruction'),
    ({'window': 'chunk', 'text': 'staircase'}, 'staircase'),
  ):
    data = dataclasses.replace(config.data, **changes)
    assert attempts.default_source(dataclasses.replace(config, data=data)) == source


def test_every_source_can_be_chosen_on_the_command_line():
  parser = argparse.ArgumentParser()
  worlds.add_arguments(parser)
  choices = next(a.choices for a in parser._actions if a.dest == 'source')
  assert set(choices) == set(attempts.SOURCES)


def test_prompts_are_the_captions_of_the_tabletop():
  class Texts:
    def prompts(self, texts):
      return [f'task {text}' for text in texts]

  bank = [tasks.CAPTIONS[5], tasks.CAPTIONS[2]]
  table = attempts.planning_table(Texts(), bank, tasks.CAPTIONS)
  assert len(table.prompts) == len(tasks.CAPTIONS)
  assert table.prompts[7] == f'task {tasks.CAPTIONS[7]}' and table.rows.tolist() == [5, 2]
  with pytest.raises(ConfigError, match="got 1 others such as 'wander'"):
    attempts.planning_table(Texts(), ['wander'], tasks.CAPTIONS)


@pytest.mark.slow
def test_equal_settings_share_one_program(world, config, store, params, suite):
  table = attempts.caption_table(config, store, tasks.CAPTIONS)
  for weights in (params, attempts.untrained(config, params, seed=1)):
    tabletop_attempts.attempt(config, weights, suite, table, max_steps=16)
  assert tabletop_attempts._program.cache_info().hits == 1


def test_other_cameras_are_refused(config, store, params, suite):
  table = attempts.caption_table(config, store, tasks.CAPTIONS)
  with pytest.raises(ConfigError, match='expected the cameras of the tabletop'):
    tabletop_attempts.attempt(config, params, suite, table, max_steps=8)
