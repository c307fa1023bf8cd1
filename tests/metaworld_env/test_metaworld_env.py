"""Meta-World itself: scripts, cameras, seeds, recordings. Needs the extra `metaworld`."""

import dataclasses
import importlib.util
import warnings

import numpy as np
import pytest

from wallwm_jax.data.readers.lerobot import LeRobotReader
from wallwm_jax.data.schema import validate
from wallwm_jax.data.writers.lerobot import write_lerobot
from wallwm_jax.envs.metaworld import SUITES, VIEWS, MetaWorldEnv, collect, library
from wallwm_jax.envs.metaworld.cameras import TURNED
from wallwm_jax.envs.metaworld.phases import Expert, branches
from wallwm_jax.envs.metaworld.tasks import BRANCH_PHASES
from wallwm_jax.errors import ConfigError
from wallwm_jax.geometry.cameras import project

if importlib.util.find_spec('metaworld') is None:
  pytest.skip(f'needs Meta-World: {library.INSTALL}', allow_module_level=True)
library.load()  # installed, but broken: an error that says what is missing
TASKS = ('reach', 'button-press-topdown', 'pick-place')
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore'),  # the experts warn of clipped commands
]


def played(env: MetaWorldEnv, seed: int, steps: int) -> MetaWorldEnv:
  """The environment after some steps of the expert."""
  env.reset(seed)
  expert = Expert(env.task, env.expert_policy())
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    for _ in range(steps):
      env.command(expert.act(env.expert_observation)[0])
  return env


@pytest.fixture(scope='module')
def records():
  return list(collect(4, 5, tasks=TASKS, size=(32, 48), processes=1))


def test_the_suites_are_those_of_the_library():
  from metaworld.env_dict import MT10_V3, MT50_V3

  for name, tasks in (('MT10', MT10_V3), ('MT50', MT50_V3)):
    assert {f'{task}-v3' for task in SUITES[name]} == set(tasks)


def test_the_table_of_phases_has_every_branch_of_every_script():
  for name, policy in library.load().policies.items():
    count = len(branches(policy)[1])
    assert len(BRANCH_PHASES[name.removesuffix('-v3')]) == max(count, 1), name


def test_an_episode_is_a_function_of_task_and_seed():
  env, other = MetaWorldEnv('pick-place', (16, 16)), MetaWorldEnv('pick-place', (16, 16))
  played(env, 1, 30)
  a, b = played(env, 2, 10).observe(), played(other, 2, 10).observe()
  np.testing.assert_array_equal(env.expert_observation, other.expert_observation)
  for view in VIEWS:
    np.testing.assert_array_equal(a.frames[view], b.frames[view])
  goal = env.expert_observation[-3:]
  env.reset(3)
  assert np.abs(env.expert_observation[-3:] - goal).max() > 0.01


def test_the_policy_gets_the_views_and_the_measured_pose_only():
  env = played(MetaWorldEnv('push', (16, 24)), 0, 5)
  before = env.observe()
  env._observation[4:] = np.nan
  after = env.observe()
  np.testing.assert_array_equal(before.state, after.state)
  np.testing.assert_array_equal(before.state[:3], env._env.get_endeff_pos().astype(np.float32))
  assert tuple(after.frames) == VIEWS
  for view in VIEWS:
    assert after.frames[view].shape == (16, 24, 3) and after.frames[view].dtype == np.uint8
    np.testing.assert_array_equal(before.frames[view], after.frames[view])


@pytest.mark.parametrize('steps', [0, 25])
def test_known_points_land_where_they_are_seen(steps):
  """The puck's centre lies in the middle of its pixels; the hand's centre on or between the
  fingers."""
  env = played(MetaWorldEnv('pick-place', (96, 128)), 4, steps)
  env.observe()
  renderer, model, data = env._renderer, env._env.model, env._env.data
  renderer.enable_segmentation_rendering()
  puck = model.geom('objGeom').id
  hand = {model.body(name).id for name in ('hand', 'rightclaw', 'leftclaw', 'rightpad', 'leftpad')}
  checked = 0
  for view, camera in env.calibration().items():
    renderer.update_scene(data, camera=view)
    geoms = renderer.render()[::2, ::2, 0]
    geoms = geoms[::-1, ::-1] if view in TURNED else geoms
    points = np.stack([data.geom_xpos[puck], env.pose()[:3].astype(float)])
    pixels, depth = project(points, camera.intrinsics, camera.extrinsics)
    assert (depth > 0).all()
    owners = np.where(geoms >= 0, model.geom_bodyid[np.maximum(geoms, 0)], -1)
    rows, columns = np.nonzero(geoms == puck)
    if len(rows) >= 8:
      x, y = pixels[0].astype(int)
      assert geoms[y, x] == puck or owners[y, x] in hand, view
      centre = np.array([columns.mean(), rows.mean()]) + 0.5
      assert view not in TURNED or np.linalg.norm(pixels[0] - centre) < 2.0, view
      checked += 1
    rows, columns = np.nonzero(np.isin(owners, list(hand)))
    if view in TURNED:
      assert np.hypot(columns + 0.5 - pixels[1, 0], rows + 0.5 - pixels[1, 1]).min() < 3, view
    else:  # seen from close by, the hand's centre is between the fingers
      assert rows.min() + 8 < pixels[1, 1] < rows.max() - 8, view
  assert checked >= 2


def test_recordings_are_valid_and_say_what_was_done(records):
  for number, record in enumerate(records):
    validate(record)
    task = TASKS[number % len(TASKS)]
    assert record.provenance['metaworld']['task'] == task and record.fps == pytest.approx(80)
    assert record.events[0].start == 0 and record.events[-1].end == record.num_frames
    for before, after in zip(record.events, record.events[1:]):
      assert after.start == before.end - 1 and after.label != before.label
    assert record.captions[0].level == 'L3' and record.captions[0].end == record.num_frames
    assert record.calibration['gripperPOV'].extrinsics.shape == (record.num_frames, 4, 4)
    assert len({record.frames[view].mean() for view in VIEWS}) == 3
  labels = [event.label for event in records[2].events]
  assert labels == ['reach the puck', 'grasp the puck', 'move the puck to the goal']


def test_recorded_actions_solve_the_task_again(records):
  for record in records[:3]:
    drawn = record.provenance['metaworld']
    env = MetaWorldEnv(drawn['task'], (16, 16))
    env.reset(drawn['start'])
    for target in record.actions[:-1]:
      env.step(target)
    assert env.succeeded, drawn
    np.testing.assert_allclose(env.pose(), record.state[-1], atol=2e-3)


def test_processes_change_nothing(records):
  again = collect(4, 5, tasks=TASKS, size=(32, 48), processes=2)
  for a, b in zip(records, again, strict=True):
    assert a.episode_id == b.episode_id and a.captions == b.captions
    assert [dataclasses.astuple(e) for e in a.events] == [dataclasses.astuple(e) for e in b.events]
    np.testing.assert_array_equal(a.state, b.state)
    np.testing.assert_array_equal(a.actions, b.actions)
    for view in VIEWS:
      np.testing.assert_array_equal(a.frames[view], b.frames[view])
  assert {task: tally.solved for task, tally in again.attempts.items()} == {
    'reach': 2,
    'button-press-topdown': 1,
    'pick-place': 1,
  }


def test_recordings_go_through_lerobot(records, tmp_path):
  write_lerobot(records, tmp_path / 'out')
  for a, b in zip(records, LeRobotReader(tmp_path / 'out'), strict=True):
    np.testing.assert_array_equal(a.state, b.state)
    np.testing.assert_array_equal(a.actions, b.actions)
    assert [(e.start, e.end, e.label) for e in a.events] == [
      (e.start, e.end, e.label) for e in b.events
    ]


def test_the_horizon_ends_an_episode():
  env = MetaWorldEnv('reach', (16, 16))
  env.reset(0)
  with pytest.raises(ConfigError, match='500'):
    for _ in range(501):
      env.command(np.zeros(4))
