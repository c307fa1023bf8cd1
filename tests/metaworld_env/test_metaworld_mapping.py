"""Meta-World without Meta-World: commands, cameras, suites, events, and what a policy may see."""

import sys

import numpy as np
import pytest

from wallwm_jax.data.phrases import METAWORLD
from wallwm_jax.data.schema import ARM_WIDTH
from wallwm_jax.envs.metaworld import (
  SUITES,
  MetaWorldEnv,
  collect,
  command_of,
  library,
  pose_of,
  select_tasks,
  target_of,
)
from wallwm_jax.envs.metaworld.cameras import extrinsics_of, intrinsics_of
from wallwm_jax.envs.metaworld.collect import episode_seed
from wallwm_jax.envs.metaworld.control import METRES
from wallwm_jax.envs.metaworld.phases import RETURN, events_of
from wallwm_jax.envs.metaworld.tasks import BRANCH_PHASES
from wallwm_jax.errors import ConfigError, DataError
from wallwm_jax.geometry.cameras import look_at, project

HAND = np.array([0.1, 0.6, 0.2, 0.7])


def test_a_command_survives_the_way_to_a_target_and_back():
  rng = np.random.default_rng(0)
  pose = pose_of(np.append(HAND, np.zeros(35)))
  for command in rng.uniform(-1, 1, (50, 4)):
    np.testing.assert_allclose(command_of(pose, target_of(pose, command)), command, atol=2e-5)


def test_targets_are_centimetres_away_and_one_is_open():
  pose = pose_of(HAND)
  target = target_of(pose, np.array([1.0, -0.5, 0.0, -1.0]))
  np.testing.assert_allclose(target[:3] - pose[:3], [METRES, -METRES / 2, 0], atol=1e-7)
  assert target[9] == 1 and target_of(pose, np.array([0, 0, 0, 1.0]))[9] == 0
  np.testing.assert_array_equal(target[3:9], pose[3:9])


def test_far_targets_are_clipped_and_bad_ones_hold():
  pose = pose_of(HAND)
  far = pose.copy()
  far[:3] += [1, -1, 0.005]
  np.testing.assert_allclose(command_of(pose, far)[:3], [1, -1, 0.5], atol=1e-5)
  far[4] = np.nan
  np.testing.assert_allclose(command_of(pose, far), [0, 0, 0, 1 - 2 * 0.7], atol=1e-6)
  with pytest.raises(DataError, match='10'):
    command_of(pose, np.zeros(4))


@pytest.mark.parametrize('turned', [False, True])
def test_calibration_follows_the_pinhole_of_mujoco(turned):
  """A camera with MuJoCo's axes sees a point where its own frame says, up and right being up and
  right; turned images have both the other way round."""
  size, fovy = (60, 80), 60.0
  eye = np.array([1.0, -0.5, 1.2])
  opencv = look_at(eye, np.array([0.0, 0.6, 0.1]))
  axes = opencv[:3, :3] * np.array([1, -1, -1])  # x right, y up, z backward
  point = eye + axes @ np.array([0.2, 0.1, -1.0])
  camera = extrinsics_of(eye, axes, turned)
  (pixel,), depth = project(point[None], intrinsics_of(fovy, size), camera)
  focal = 30 / np.tan(np.deg2rad(30))
  sign = -1 if turned else 1
  np.testing.assert_allclose(pixel, [40 + sign * 0.2 * focal, 30 - sign * 0.1 * focal], rtol=1e-4)
  np.testing.assert_allclose(depth, 1, rtol=1e-5)
  assert np.linalg.det(camera[:3, :3]) == pytest.approx(1, abs=1e-5)


def test_suites_and_the_table_of_phases_cover_the_tasks():
  assert len(SUITES['MT10']) == 10 and len(SUITES['MT50']) == 50
  assert set(SUITES['MT10']) <= set(SUITES['MT50']) == set(METAWORLD) == set(BRANCH_PHASES)
  for task, digits in BRANCH_PHASES.items():
    assert max(map(int, digits)) < len(METAWORLD[task].phases), task


def test_tasks_are_chosen_by_suite_or_by_name():
  assert select_tasks('MT10') == SUITES['MT10']
  assert select_tasks('reach, push') == select_tasks(('reach', 'push')) == ('reach', 'push')
  with pytest.raises(ConfigError, match='push-wall'):
    select_tasks('push-wal')
  with pytest.raises(ConfigError, match='different'):
    select_tasks('reach,reach')


def test_events_share_frames_and_chatter_is_no_event():
  phases = np.array([0] * 20 + [1] * 2 + [0] * 10 + [1] * 12 + [3] * 3 + [1] * 6 + [3] * 30)
  events = events_of('pick-place', phases)
  assert [(e.start, e.end, e.label) for e in events] == [
    (0, 33, 'reach the puck'),
    (32, 54, 'grasp the puck'),
    (53, len(phases) + 1, 'move the puck to the goal'),
  ]
  assert all(e.captions == {'L1': e.label} and not e.flags for e in events)


def test_an_event_that_goes_back_is_a_recovery():
  phases = np.repeat([0, 1, 3, 0, 1, 3], RETURN)
  flags = [e.flags for e in events_of('pick-place', phases)]
  assert flags == [(), (), (), ('recovery',), ('recovery',), ()]
  brief = np.repeat([0, 1, 3, 0, 3], [30, 30, 30, RETURN - 1, 30])
  assert [e.label.split()[0] for e in events_of('pick-place', brief)] == ['reach', 'grasp', 'move']


def test_seeds_of_episodes_differ():
  seeds = {episode_seed(s, k, a) for s in range(3) for k in range(20) for a in range(3)}
  assert len(seeds) == 180


def test_bad_requests_are_refused(monkeypatch):
  monkeypatch.setattr(library, 'load', lambda: None)
  for wrong, name in (
    ({'num_episodes': 0}, 'num_episodes'),
    ({'processes': 0}, 'processes'),
    ({'seed': -1}, 'seed'),
    ({'noise': 2.0}, 'noise'),
    ({'size': (4, 96)}, 'size'),
    ({'tasks': 'MT11'}, 'MT11'),
  ):
    with pytest.raises(ConfigError, match=name):
      collect(**({'num_episodes': 1, 'seed': 0} | wrong))


def test_what_is_missing_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'metaworld', None)
  monkeypatch.setitem(sys.modules, 'metaworld.env_dict', None)
  with pytest.raises(ConfigError) as caught:
    collect(1, 0)
  for word in ("pip install -e '.[metaworld]'", 'libosmesa6', 'MUJOCO_GL=osmesa', 'MUJOCO_GL=egl'):
    assert word in str(caught.value)


class _Simulator:
  """Stands in for Meta-World's: each observation is obs[:4] and then whatever `rest` says."""

  dt = 0.0125

  def __init__(self, rest: float):
    self.rest, self.hand = rest, HAND.copy()

  def _observe(self) -> np.ndarray:
    return np.concatenate([self.hand, np.full(35, self.rest)])

  def seed(self, seed: int) -> None:
    self.hand[:3] += np.random.default_rng(seed).uniform(-0.01, 0.01, 3)

  def reset(self):
    return self._observe(), {}

  def step(self, command):
    self.hand[:3] += METRES * command[:3]
    info = {'success': self.rest == 0, 'obj_to_target': self.rest}
    return self._observe(), self.rest, False, False, info

  def close(self) -> None:
    pass


def test_no_privileged_state_reaches_the_policy(monkeypatch):
  """Objects, goals, rewards and success may be anything, NaN too: the input is the same bits."""
  seen, rest = {}, 0.0
  classes = {'reach-v3': lambda: _Simulator(rest)}
  monkeypatch.setattr(library, 'load', lambda: library.Library(classes, {}, None))
  image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
  monkeypatch.setattr(MetaWorldEnv, '_render', lambda self: {'corner': image})
  for rest in (0.0, np.nan, np.inf, 7.0):
    env = MetaWorldEnv('reach', (16, 16))
    env.reset(3)
    inputs = [env.observe()]
    for step in range(5):
      target = env.pose()
      target[:3] += 0.003 * step
      env.step(target)
      inputs.append(env.observe())
    assert {tuple(vars(x)) for x in inputs} == {('frames', 'state')}
    seen[rest] = np.stack([x.state for x in inputs])
    assert np.isfinite(seen[rest]).all() and seen[rest].shape == (6, ARM_WIDTH)
  for states in seen.values():
    np.testing.assert_array_equal(states, seen[0.0])
