"""Scripts, captions and the start states they ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.envs.tabletop import (
  CAPTIONS,
  TASK_KINDS,
  TabletopConfig,
  sample_task,
  task_suite,
  tasks,
)
from wallwm_jax.envs.tabletop.mjcf import CUBE_COLOURS, CUBE_HALF, ZONE_COLOURS
from wallwm_jax.envs.tabletop.reset import reset
from wallwm_jax.types import ConfigError

PER_KIND = 24


@pytest.fixture(scope='module')
def suite():
  return jax.jit(lambda key: task_suite(key, TASK_KINDS, PER_KIND))(jax.random.key(0))


@pytest.fixture(scope='module')
def states(suite):
  config = TabletopConfig()
  keys = jax.random.split(jax.random.key(1), len(suite.kind))
  return jax.device_get(jax.jit(jax.vmap(lambda k, t: reset(k, t, config)))(keys, suite))


def expected_caption(kind, obj, target):
  cube = CUBE_COLOURS[obj]
  zone = ZONE_COLOURS[min(target, 2)]
  return {
    'reach': f'reach the {cube} cube',
    'grasp': f'grasp the {cube} cube',
    'lift': f'lift the {cube} cube',
    'move': f'move the {cube} cube over the {zone} zone',
    'place': f'place the {cube} cube on the {zone} zone',
    'release': f'release the {cube} cube',
    'push': f'push the {cube} cube {tasks.DIRECTIONS[target]}',
  }[tasks.EVENT_KINDS[kind]]


def rows_of(suite, i):
  return np.asarray(suite.script[i])[: int(suite.length[i])]


def test_captions_are_unique_and_short():
  assert len(set(CAPTIONS)) == len(CAPTIONS)
  assert max(len(caption.split()) for caption in CAPTIONS) <= 16


def test_event_captions_name_kind_object_and_target(suite):
  seen = set()
  ids = np.asarray(jax.vmap(jax.vmap(tasks.event_caption))(suite.script))
  for i in range(len(suite.kind)):
    for row, caption in zip(rows_of(suite, i), ids[i]):
      assert CAPTIONS[caption] == expected_caption(*row)
      seen.add(CAPTIONS[caption])
  assert len(seen) == 4 * 4 + 2 * 12 + 16  # every one that exists


def test_instructions_describe_their_script(suite):
  for i in range(len(suite.kind)):
    rows, kind = rows_of(suite, i), TASK_KINDS[int(suite.kind[i])]
    text = CAPTIONS[int(suite.instruction[i])]
    first, last = expected_caption(*rows[0]), expected_caption(*rows[-1])

    def put(row):
      return f'{CUBE_COLOURS[row[1]]} cube on the {ZONE_COLOURS[row[2]]} zone'

    if kind in tasks.SINGLE_KINDS:
      assert text == first
    elif kind == 'pick':
      assert text == first.replace('reach', 'pick up')
    elif kind == 'put':
      assert text == f'put the {put(rows[-1])}'
    elif kind == 'reach_push':
      assert text == last
    elif kind == 'put_push':
      assert text == f'put the {put(rows[5])}, then {last}'
      assert rows[5][1] != rows[-1][1]
    elif kind == 'put_push_reach':
      reached = CUBE_COLOURS[rows[-1][1]]
      pushed = expected_caption(*rows[-2])
      assert text == f'put the {put(rows[5])}, {pushed}, then reach {reached}'
      assert len({rows[5][1], rows[-2][1], rows[-1][1]}) == 3  # three cubes
    else:
      assert text == f'put the {put(rows[5])}, then the {put(rows[-1])}'
      assert rows[5][1] != rows[-1][1] and rows[5][2] != rows[-1][2]


def test_unknown_kinds_are_refused():
  with pytest.raises(ConfigError, match="got 'gr"):
    sample_task(jax.random.key(0), 'grab')
  with pytest.raises(ConfigError, match='expected some of'):
    task_suite(jax.random.key(0), ('grab',))


def test_random_order_is_a_permutation():
  draws = jax.vmap(lambda key: tasks.Draws(key, 9).permutation(9))(
    jax.random.split(jax.random.key(3), 50)
  )
  assert (np.sort(draws, axis=1) == np.arange(9)).all()
  assert len({tuple(row) for row in np.asarray(draws)}) == 50


def test_draws_refuse_to_run_dry():
  with pytest.raises(ValueError, match='5 numbers asked for, 4 drawn'):
    tasks.Draws(jax.random.key(0), 4)(5)


def test_start_states_hold_what_the_script_needs(suite, states):
  cubes = states.physics.qpos[:, 6:].reshape(-1, 4, 7)[..., :3]
  for i in range(len(suite.kind)):
    rows = rows_of(suite, i)
    assert states.cube_present[i, rows[:, 1]].all()
    zones = rows[(rows[:, 0] >= tasks.MOVE) & (rows[:, 0] <= tasks.RELEASE), 2]
    assert states.zone_present[i, zones].all()
    assert 2 <= states.cube_present[i].sum() <= 4 and 2 <= states.zone_present[i].sum() <= 3
    on_table = cubes[i][states.cube_present[i]]
    assert np.abs(on_table[:, :2]).max() < 0.21
    assert (np.abs(cubes[i][~states.cube_present[i]][:, :2]) > 2).all()
    apart = np.linalg.norm(on_table[:, None, :2] - on_table[None, :, :2], axis=-1) + np.eye(
      len(on_table)
    )
    held = rows[0][0] in (tasks.LIFT, tasks.MOVE, tasks.PLACE, tasks.RELEASE)
    if not held:
      assert apart.min() > 0.08
      assert np.allclose(on_table[:, 2], CUBE_HALF)


def test_pushes_have_a_free_lane(suite, states):
  cubes = states.physics.qpos[:, 6:].reshape(-1, 4, 7)[..., :2]
  blocked = total = 0
  for i in np.flatnonzero(
    np.isin(np.asarray(suite.kind), [TASK_KINDS.index('push'), TASK_KINDS.index('reach_push')])
  ):
    _, obj, target = rows_of(suite, i)[-1]
    way = tasks.DIRECTION_VECTORS[target]
    offset = np.delete(cubes[i], obj, 0) - cubes[i, obj]
    along, aside = offset @ way, np.abs(offset @ way[::-1])
    blocked += ((along > -0.1) & (along < 0.1) & (aside < 0.04)).any()
    total += 1
  assert total == 2 * PER_KIND and blocked <= 1


def test_recovery_starts_are_off_the_mark():
  config = TabletopConfig()
  keys = jax.random.split(jax.random.key(4), 64)

  def offset(key, recovery):
    state = reset(key, sample_task(key, 'grasp', recovery), config)
    cube = state.physics.qpos[6:].reshape(4, 7)[state.task.script[0, 1], :2]
    return jnp.linalg.norm(cube - state.physics.qpos[:2])

  near, far = jax.jit(jax.vmap(lambda k: (offset(k, False), offset(k, True))))(keys)
  assert near.max() < 0.02 < far.min() and far.max() < 0.06
