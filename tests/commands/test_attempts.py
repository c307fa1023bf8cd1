"""Batches of closed-loop attempts, in a stand-in for the tabletop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.commands import attempts
from wallwm_jax.envs.tabletop import tasks
from wallwm_jax.types import ConfigError, EnvFns, Observation

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
    progress=lambda state: jnp.where(success(state), 100.0, 0.0),
    success=success,
  )


@pytest.fixture
def world(monkeypatch):
  monkeypatch.setattr(attempts, 'env_fns', stand_in)
  monkeypatch.setattr(attempts, 'VIEWS', VIEWS)
  attempts._program.cache_clear()
  yield
  attempts._program.cache_clear()


@pytest.fixture(scope='module')
def suite():
  return tasks.task_suite(jax.random.key(0), ('reach', 'push'), 3)


def test_caption_lengths_come_from_the_store(config, store):
  table = attempts.caption_table(config, store)
  assert table.text.features.shape[0] == len(tasks.CAPTIONS) == len(table.lengths)
  median = np.ceil(np.median([np.ceil(7 / 4)] * 8 + [np.ceil(13 / 4)] * 8))
  assert set(table.lengths.tolist()) == {int(median)}  # the store knows none of these captions


@pytest.mark.slow
@pytest.mark.parametrize('window, buckets', [('event', (2,)), ('chunk', (2,))])
def test_attempts_are_scored_by_kind_and_recorded(
  world, config, store, params, suite, monkeypatch, window, buckets
):
  monkeypatch.setattr(attempts, 'BATCH', 4)  # six attempts: the second part is filled up
  chosen = dataclasses.replace(
    config, data=dataclasses.replace(config.data, window=window, buckets=buckets)
  )
  table = dataclasses.replace(
    attempts.caption_table(config, store), lengths=np.full(len(tasks.CAPTIONS), 2)
  )
  done = attempts.attempt(chosen, params, suite, table, max_steps=24, record=True)
  assert done.kinds == ['reach'] * 3 + ['push'] * 3
  assert all(text in tasks.CAPTIONS for text in done.instructions)
  result = done.score()
  assert result.by_kind['reach'][0].value == 1 and result.by_kind['push'][0].value == 0
  assert done.rollouts.attempted.tolist() == [1, 1, 1, 3, 3, 3]
  film = done.film(5)
  assert film.shape == (2, 24, 16, 16, 3)
  np.testing.assert_array_equal(film[0, :, 0, 0, 0], np.arange(1, 25))
  assert done.film(0).shape[1] == 8


@pytest.mark.slow
def test_equal_settings_share_one_program(world, config, store, params, suite):
  table = attempts.caption_table(config, store)
  for weights in (params, attempts.untrained(config, params, seed=1)):
    attempts.attempt(config, weights, suite, table, max_steps=16)
  assert attempts._program.cache_info().hits == 1


def test_other_cameras_are_refused(config, store, params, suite):
  with pytest.raises(ConfigError, match='expected the cameras of the tabletop'):
    attempts.attempt(config, params, suite, attempts.caption_table(config, store), max_steps=8)
