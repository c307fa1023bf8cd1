"""Recovery starts around contact poses, and the demonstrations that begin there."""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from wallwm_jax.data.schema import validate
from wallwm_jax.envs.tabletop import EVENT_KINDS, TabletopConfig, collect, mjcf, physics, tasks
from wallwm_jax.envs.tabletop.collect import _Collector
from wallwm_jax.envs.tabletop.recovery import contact_pose, perturb, recovery_task
from wallwm_jax.envs.tabletop.reset import reset
from wallwm_jax.types import ConfigError

CONFIG = TabletopConfig(image_size=(16, 16))
BATCH, COUNT = 14, 210


def _start(key, share):
  keys = jax.random.split(key, 3)
  task = recovery_task(keys[0], share)
  before = reset(keys[1], task, CONFIG)
  return contact_pose(before), perturb(keys[2], before, CONFIG), before


@pytest.fixture(scope='module')
def starts():
  """(contact poses [n, 5], start states, the states they were made from), thirty of every kind."""
  shares = (jnp.arange(COUNT) % len(EVENT_KINDS) + 0.5) / len(EVENT_KINDS)
  keys = jax.random.split(jax.random.key(0), COUNT)
  return jax.device_get(jax.jit(jax.vmap(_start))(keys, shares))


def _pads_in_cubes():
  """The MuJoCo geoms of the pads, and those of the cubes."""
  model = mjcf.load_model()
  pads = np.flatnonzero((model.geom_contype == 1) & (model.geom_conaffinity == 0))
  cubes = np.flatnonzero((model.geom_contype == 2) & (model.geom_conaffinity == 5))
  assert len(pads) == 8 and len(cubes) == mjcf.NUM_CUBES
  return set(pads.tolist()), set(cubes.tolist())


def test_the_hand_starts_in_the_ball_around_the_contact_pose(starts):
  contact, state, _ = starts
  stage = state.physics.qpos[:, : mjcf.NUM_STAGE]
  offset = stage[:, :3] - contact[:, :3]
  lifted = np.linalg.norm(offset, axis=1) > CONFIG.recovery_radius + 1e-6
  assert (np.linalg.norm(offset[:, :2], axis=1) <= CONFIG.recovery_radius + 1e-6).all()
  assert lifted.sum() < 0.1 * COUNT and (stage[lifted, 2] < 0.06).all()  # just above a cube
  assert np.median(np.linalg.norm(offset, axis=1)) > 0.4 * CONFIG.recovery_radius
  assert (np.abs(stage[:, 3] - contact[:, 3]) <= 0.3 + 1e-6).all() and stage[:, 3].std() > 0.1


def test_no_finger_starts_inside_a_cube(starts):
  """MuJoCo's own collision check of every start."""
  _, state, _ = starts
  model, (pads, cubes) = mjcf.load_model(), _pads_in_cubes()
  data = mujoco.MjData(model)
  for qpos in state.physics.qpos:
    data.qpos[:] = qpos
    mujoco.mj_forward(model, data)
    for contact in data.contact[: data.ncon]:
      pair = {int(contact.geom1), int(contact.geom2)}
      assert contact.dist > -1e-3 or not (pair & pads and pair & cubes), (pair, contact.dist)


def test_the_script_leads_back_to_the_event(starts):
  _, state, before = starts
  held = {'lift', 'move', 'place', 'release'}
  for i in range(COUNT):
    task = jax.tree.map(lambda x, i=i: x[i], state.task)
    kind = EVENT_KINDS[int(task.kind)]
    rows = task.script[: int(task.length)]
    names = [EVENT_KINDS[row[0]] for row in rows]
    assert kind == EVENT_KINDS[i % len(EVENT_KINDS)] and names[-1] == kind
    assert (names[0] == 'grasp' and len(names) > 1) if kind in held else names == [kind]
    assert len(set(rows[:, 1].tolist())) == 1 and (task.script[int(task.length) :] == -1).all()
    assert task.instruction == tasks.event_caption(rows[-1])
    assert state.cube_present[i][rows[0, 1]] and bool(task.recovery)
  # Only the hand was moved.
  np.testing.assert_array_equal(
    state.physics.qpos[:, mjcf.NUM_STAGE :], before.physics.qpos[:, mjcf.NUM_STAGE :])
  opening = jax.vmap(physics.gripper_pose)(state.physics)[:, 9]
  push = np.asarray(state.task.kind) == tasks.PUSH
  assert (opening[push] == 0).all() and (opening[~push] >= 0.3 - 1e-6).all()


def test_the_radius_is_a_setting_and_checked():
  with pytest.raises(ConfigError, match='recovery_radius'):
    TabletopConfig(recovery_radius=0.0)
  with pytest.raises(ConfigError, match='recovery_radius'):
    TabletopConfig(recovery_radius=0.1)
  with pytest.raises(ConfigError, match='collect.recovery'):
    next(collect(1, 0, recovery=1.5))


@pytest.mark.slow
def test_the_expert_recovers_from_almost_every_start():
  collector = _Collector(5, BATCH, 'mixed', CONFIG, recovery=1.0)
  ended = {}
  while len(ended) < 56:
    ended.update(dict(collector.advance()))
    collector.refill(56)
  failed = [number for number, record in ended.items() if record is None]
  assert len(failed) <= 4, failed
  records = [record for record in ended.values() if record is not None]
  labels = {record.events[-1].label.split()[0] for record in records}
  assert labels == set(EVENT_KINDS)
  for record in records:
    validate(record)
    first = next(event for event in record.events if 'failed' not in event.flags)
    assert 'recovery' in first.flags
    slipped = record.events[-1].label.split()[0] in ('lift', 'move', 'place', 'release')
    segment = next(c for c in record.captions if c.level == 'L0' and c.start == first.start)
    assert segment.text.startswith('regrasp: ' if slipped else 'recover: ')
    ends = [e for e in record.events if 'failed' not in e.flags]
    assert len(ends) > 1 if slipped else len(ends) == 1


@pytest.mark.slow
def test_a_fraction_recovers_and_the_others_stay_what_they_are(episodes):
  never, half = (_Collector(3, BATCH, 'mixed', CONFIG, recovery=a) for a in (0.0, 0.5))
  recovers = (never.states.physics.qpos != half.states.physics.qpos).any(1)
  assert 3 <= recovers.sum() <= BATCH - 3 and half.states.task.recovery[recovers].all()
  nominal = {record.episode_id: record for record in episodes}
  compared = 0
  for record in collect(6, 3, mix='mixed', recovery=0.5, batch=6, config=CONFIG):
    number = int(record.episode_id.split('-')[1])
    if not recovers[number]:
      np.testing.assert_allclose(record.state, nominal[record.episode_id].state, atol=1e-3)
      assert record.captions == nominal[record.episode_id].captions
      compared += 1
    else:
      assert any(c.text.startswith(('recover: ', 'regrasp: ')) for c in record.captions)
  assert 0 < compared < 6
