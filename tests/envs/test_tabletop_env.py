"""Stepping, the low-level controller, the rubric, and the expert replayed through the public
interface.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.envs.tabletop import SINGLE_KINDS, TabletopConfig, env_fns, physics, rubric, tasks
from wallwm_jax.envs.tabletop.collect import _Collector
from wallwm_jax.geometry import poses
from wallwm_jax.types import ConfigError

CONFIG = TabletopConfig(image_size=(16, 16))
ENV = env_fns(CONFIG)
PER_KIND = 2


@pytest.fixture(scope='module')
def starts():
  """Two start states of every single-event kind."""
  suite = tasks.task_suite(jax.random.key(0), SINGLE_KINDS, PER_KIND)
  return jax.jit(jax.vmap(ENV.reset))(jax.random.split(jax.random.key(1), len(suite.kind)), suite)


@pytest.fixture(scope='module')
def step_all():
  return jax.jit(jax.vmap(ENV.step))


@pytest.fixture(scope='module')
def step_one():
  return jax.jit(ENV.step)


def pick(tree, i):
  return jax.tree.map(lambda x: x[i], tree)


def commands(states):
  """The poses the robot is told to hold."""
  return jax.vmap(physics.pose_of)(states.physics.ctrl)


def assert_same_world(a, b):
  """Equal poses and bookkeeping; velocities up to the solver's tolerance, its warm start not."""
  np.testing.assert_allclose(a.physics.qpos, b.physics.qpos, atol=2e-4)
  np.testing.assert_allclose(a.physics.ctrl, b.physics.ctrl, atol=1e-5)
  np.testing.assert_allclose(a.physics.qvel, b.physics.qvel, atol=0.02)
  assert (a.stage == b.stage) and (a.dwell == b.dwell)


def test_a_policy_sees_pixels_and_the_measured_pose_only(starts):
  """Script, bookkeeping, commands and velocities may be anything: the observation is the same bits.
  Where the cubes are shows in the pixels alone."""
  observe = jax.jit(ENV.observe)
  state = pick(starts, 0)
  plain = observe(state)
  rng = np.random.default_rng(0)

  def other(x):
    x = np.asarray(x)
    return x + 1 if x.dtype == np.int32 else ~x if x.dtype == bool else x + rng.normal(size=x.shape)

  told = {'task', 'stage', 'dwell', 'event_start'}
  hidden = {name: jax.tree.map(other, getattr(state, name)) for name in told}
  world = state.physics
  unseen = {
    field.name: jax.tree.map(other, getattr(world, field.name))
    for field in dataclasses.fields(world) if field.name != 'qpos'
  }  # fmt: skip
  tampered = dataclasses.replace(state, **hidden, physics=dataclasses.replace(world, **unseen))
  jax.tree.map(np.testing.assert_array_equal, plain, observe(tampered))

  qpos = np.array(world.qpos)
  qpos[len(qpos) // 2 :] += 0.05
  moved = observe(dataclasses.replace(state, physics=dataclasses.replace(world, qpos=qpos)))
  np.testing.assert_array_equal(moved.state, plain.state)
  assert (moved.frames != plain.frames).any()


def test_batched_step_never_factors_two_matrices_side_by_side(starts, step_all):
  # Two batched LAPACK calls at once can wait for each other's threads for ever (see mjcf.py). What
  # is left are the Newton solver's first Hessian and the one in its loop, which come in turn.
  program = step_all.lower(starts, commands(starts)).compile().as_text()
  assert program.count('custom_call_target="lapack_spotrf') <= 2


def test_holding_still_completes_nothing(starts, step_all):
  states, target = starts, commands(starts)
  for _ in range(6):
    states = step_all(states, target)
    assert (states.stage == 0).all()
  assert not jax.vmap(ENV.success)(states).any()
  assert (jax.vmap(ENV.progress)(states) == 0).all()
  (before, turned), (after, turns) = (
    jax.vmap(physics.cube_poses)(x.physics) for x in (starts, states)
  )
  assert jnp.abs(after - before).max() < 0.004  # held cubes stay held, resting cubes stay put
  assert jnp.abs(turns - turned).max() < 0.1  # a cube held off its centre tilts a little


@pytest.mark.slow
def test_one_environment_steps_like_a_batch_of_them(starts, step_all, step_one):
  target = commands(starts).at[:, :3].add(jnp.asarray([0.02, -0.01, 0.01]))
  together = step_all(starts, target)
  for i in (0, 5, 13):
    assert_same_world(step_one(pick(starts, i), target[i]), pick(together, i))


def test_targets_are_tracked_within_the_stage_limits(starts, step_one):
  state = pick(starts, 0)
  goal = physics.pose_of(jnp.asarray([0.1, -0.05, 0.2, 0.4, 0.02, 0.02]))
  for _ in range(10):
    state = step_one(state, goal)
  reached = physics.gripper_pose(state.physics)
  np.testing.assert_allclose(reached, goal, atol=0.004)
  outside = goal.at[:3].set(jnp.asarray([1.0, -1.0, -1.0]))
  for _ in range(14):
    state = step_one(state, outside)
  assert jnp.abs(state.physics.qpos[:2]).max() < 0.22 and state.physics.qpos[2] > 0.01


def test_a_target_that_is_not_finite_means_stay(starts, step_one):
  state = pick(starts, 0)
  assert_same_world(step_one(state, jnp.full((10,), jnp.nan)), step_one(state, commands(starts)[0]))


@pytest.mark.slow
def test_execute_is_repeated_stepping(starts, step_one):
  state = pick(starts, 2 * tasks.LIFT)
  anchor = physics.gripper_pose(state.physics)
  goals = jnp.stack([anchor.at[2].add(0.01 * k).at[9].set(0.0) for k in range(1, 7)])
  mask = jnp.asarray([True, True, False, True, True, False])
  after, frames, measured = jax.jit(ENV.execute)(state, poses.relative_pose(anchor, goals), mask)
  last, expected = None, []
  for goal, valid in zip(goals, mask):
    last = goal if valid else last
    state = step_one(state, last)
    expected.append(physics.gripper_pose(state.physics))
  assert_same_world(after, state)
  np.testing.assert_allclose(measured, jnp.stack(expected), atol=2e-4)
  assert frames.shape == (3, 6, 16, 16, 3) and frames.dtype == jnp.uint8
  # The last frame is the observation of the final state.
  seen = ENV.observe(after).frames[:, 0].astype(int)
  assert jnp.abs(frames[:, -1].astype(int) - seen).mean() < 0.5


@pytest.mark.slow
def test_replayed_demonstrations_succeed_and_progress_never_falls(step_all):
  """The expert's own recorded targets, sent through `step`, complete every script they were
  recorded for.
  """
  batch = PER_KIND * len(SINGLE_KINDS)
  collector = _Collector(3, batch, 'mixed', CONFIG)
  quiet = np.asarray(collector.experts.noise) == 0
  starts, ended = collector.states, {}
  while len(ended) < batch:
    ended.update(dict(collector.advance()))
  usable = [i for i in np.flatnonzero(quiet) if ended[i] is not None and len(ended[i].actions) < 90]
  assert len(usable) >= 2
  states, progress = starts, []
  for t in range(max(len(ended[i].actions) for i in usable)):
    target = np.array(commands(states))
    for i in usable:
      target[i] = ended[i].actions[min(t, len(ended[i].actions) - 1)]
    states = step_all(states, target)
    progress.append(jax.vmap(ENV.progress)(states))
  progress = np.stack(progress)[:, usable]
  assert (np.diff(progress, axis=0) >= 0).all()
  assert (progress[-1] == 100).all()
  assert np.asarray(jax.vmap(ENV.success)(states))[usable].all()


def test_an_event_needs_two_calm_periods(starts):
  """Conditions that hold for one control period, or at speed, do not count."""
  state = pick(starts, 2 * tasks.REACH)
  obj = state.task.script[0, 1]
  cube = physics.cube_poses(state.physics)[0][obj]
  at_goal = state.physics.qpos.at[:3].set(cube.at[2].set(rubric.HOVER_Z))
  arrived = dataclasses.replace(state, physics=dataclasses.replace(state.physics, qpos=at_goal))
  rushing = dataclasses.replace(
    arrived, physics=dataclasses.replace(arrived.physics, qvel=arrived.physics.qvel.at[0].set(0.5))
  )
  advance = jax.jit(rubric.advance)
  assert advance(rushing).dwell == 0
  once = advance(arrived)
  assert once.dwell == 1 and once.stage == 0
  assert advance(advance(rushing)).stage == 0
  twice = advance(once)
  assert twice.stage == 1 and ENV.success(twice) and ENV.progress(twice) == 100
  # Success is judged on the present state: leaving again loses it, progress stays.
  left = dataclasses.replace(twice, physics=state.physics)
  assert not ENV.success(left) and ENV.progress(left) == 100


def test_reaching_the_wrong_cube_does_not_count(starts):
  state = pick(starts, 2 * tasks.REACH)
  obj = int(state.task.script[0, 1])
  other = next(i for i in range(4) if i != obj and bool(state.cube_present[i]))
  cube = physics.cube_poses(state.physics)[0][other]
  moved = state.physics.qpos.at[:3].set(cube.at[2].set(rubric.HOVER_Z))
  state = dataclasses.replace(state, physics=dataclasses.replace(state.physics, qpos=moved))
  right = state.task.script[0]
  assert rubric.condition(state, right.at[1].set(other)) and not rubric.condition(state, right)


def test_captions_follow_the_script(starts):
  ids = jax.vmap(ENV.caption)(starts)
  np.testing.assert_array_equal(
    ids, jax.vmap(ENV.task_caption)(starts)
  )  # one event: its caption is the instruction


def test_equal_configs_share_their_functions():
  assert env_fns(TabletopConfig(image_size=(16, 16))) is ENV


@pytest.mark.parametrize(
  'bad', [{'image_size': (4, 48)}, {'substeps': 0}, {'yaw_range': 2.0}, {'start_spread': -1.0}]
)
def test_bad_settings_are_refused(bad):
  with pytest.raises(ConfigError, match=next(iter(bad))):
    TabletopConfig(**bad)


def test_dropped_frames_are_not_rendered(starts):
  """A caller of `execute` who ignores the frames must not pay for them: the compiled program has no
  pixels in it.
  """
  state, actions, mask = pick(starts, 0), jnp.zeros((2, 10)), jnp.ones((2,), bool)
  jaxpr = jax.make_jaxpr(functools.partial(lambda s, a, m: ENV.execute(s, a, m)[1]))(
    state, actions, mask
  )
  scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan']
  assert scans and all(var.aval.dtype != jnp.uint8 for eqn in scans for var in eqn.outvars)


def test_no_privileged_state_reaches_the_policy(starts):
  """What a policy sees are pixels and its own pose: the script, its bookkeeping and where things
  are change nothing else."""
  state, observe = pick(starts, 0), jax.jit(ENV.observe)
  seen = observe(state)
  assert {field.name for field in dataclasses.fields(seen)} == {'frames', 'state', 'view_mask'}
  other = tasks.sample_task(jax.random.key(9), 'put_put')
  hidden = dataclasses.replace(
    state, task=other, stage=state.stage + 1, dwell=state.dwell + 1,
    event_start=state.event_start + 0.1,
  )  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, observe(hidden), seen)
  nothing = dataclasses.replace(
    state,
    cube_present=~state.cube_present,
    zones=state.zones + 0.03,
    zone_present=~state.zone_present,
  )
  moved = observe(nothing)
  assert (np.asarray(moved.frames) != np.asarray(seen.frames)).any()
  np.testing.assert_array_equal(moved.state, seen.state)
  np.testing.assert_array_equal(moved.view_mask, seen.view_mask)
