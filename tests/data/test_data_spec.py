import dataclasses

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation as Turn

from wallwm_jax.data.readers import spec as specs
from wallwm_jax.data.readers.canonical import robot_poses
from wallwm_jax.data.readers.features import Feature, check_spec, example_spec
from wallwm_jax.data.readers.layouts import lerobot_layout, pose_names, rlds_layout
from wallwm_jax.data.readers.spec import (
  Action,
  Arm,
  Camera,
  DatasetSpec,
  Gripper,
  Position,
  Rotation,
  State,
  load_spec,
)
from wallwm_jax.errors import ConfigError, DataError
from wallwm_jax.geometry.poses import rot6d_to_matrix

EXAMPLE = specs.__doc__.split(':\n\n', 1)[1].split('\n\nFeatures of RLDS')[0]
FEATURES = {
  'cam': Feature('camera', 'video', (8, 8, 3)),
  's': Feature('number', 'float32', (20,)),
  'a': Feature('number', 'float32', (20,), tuple(f'c{i}' for i in range(20))),
}


def make_spec(convention='absolute', state=None, action=None, **position):
  """One arm: position 0..2, rotation from 3 on, gripper 19."""

  def pose(name, rotation):
    unit = {'unit': 'm'} | position if name == 'a' else {'unit': 'm'}
    return Position(name, (0, 1, 2), **unit), rotation or Rotation('none'), Gripper(name, 19, 1, 0)

  arm = Arm(State(*pose('s', state)), Action(convention, *pose('a', action)))
  return DatasetSpec((Camera('cam', 'front'),), (arm,))


def rotation(name, form, **fields):
  return Rotation(form, name, tuple(range(3, 3 + specs.CHANNELS[form])), **fields)


def values(turn=None, encode=None, length=5, seed=0):
  """Channels [T, 20] whose rotation channels are encode(turn)."""
  x = np.random.default_rng(seed).uniform(0, 1, (length, 20))
  if turn is not None:
    encoded = encode(turn)
    x[:, 3 : 3 + encoded.shape[-1]] = encoded
  return x


FORMATS = {
  'euler xyz rad': ('euler', {'order': 'xyz', 'unit': 'rad'}, lambda r: r.as_euler('xyz')),
  'euler ZYX deg': ('euler', {'order': 'ZYX', 'unit': 'deg'}, lambda r: r.as_euler('ZYX', True)),
  'axis angle': ('axis_angle', {'unit': 'rad'}, lambda r: r.as_rotvec()),
  'axis angle / 10': ('axis_angle', {'unit': 'rad', 'scale': 10}, lambda r: r.as_rotvec() / 10),
  'quaternion xyzw': ('quaternion_xyzw', {}, lambda r: r.as_quat()),
  'quaternion wxyz': ('quaternion_wxyz', {}, lambda r: r.as_quat()[:, [3, 0, 1, 2]]),
  'matrix': ('matrix', {}, lambda r: r.as_matrix().reshape(-1, 9)),
  'rot6d': ('rot6d', {}, lambda r: r.as_matrix()[:, :, :2].swapaxes(1, 2).reshape(-1, 6)),
}


# ---- what the fields mean ----


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('convention', ['absolute', 'delta_base', 'delta_tool'])
def test_every_format_in_every_convention(name, convention):
  form, fields, encode = FORMATS[name]
  here, turn = Turn.random(5, rng=1), Turn.random(5, rng=2)
  s, a = values(here, encode), values(turn, encode, seed=3)
  spec = make_spec(convention, rotation('s', form, **fields), rotation('a', form, **fields))
  state, actions = robot_poses(spec, FEATURES, {'s': s, 'a': a})
  np.testing.assert_allclose(rot6d_to_matrix(state[:, 3:9]), here.as_matrix(), atol=1e-6)
  target = {'absolute': turn, 'delta_base': turn * here, 'delta_tool': here * turn}[convention]
  np.testing.assert_allclose(rot6d_to_matrix(actions[:, 3:9]), target.as_matrix(), atol=1e-6)
  step = a[:, :3]
  moved = {
    'absolute': step,
    'delta_base': s[:, :3] + step,
    'delta_tool': s[:, :3] + here.apply(step),
  }[convention]
  np.testing.assert_allclose(actions[:, :3], moved, atol=1e-6)
  assert state.dtype == actions.dtype == np.float32


@pytest.mark.parametrize('unit, metres', [('m', 1), ('cm', 1e-2), ('mm', 1e-3)])
def test_units_and_scale(unit, metres):
  x = values()
  spec = make_spec('delta_base', unit=unit, scale=0.5)
  state, actions = robot_poses(spec, FEATURES, {'s': x, 'a': x})
  np.testing.assert_allclose(actions[:, :3], x[:, :3] * (1 + 0.5 * metres), atol=1e-6)
  np.testing.assert_array_equal(state[:, 3:9], np.tile([1, 0, 0, 0, 1, 0], (5, 1)))


def test_an_action_without_rotation_keeps_the_measured_one():
  here = Turn.random(5, rng=1)
  s, a = values(here, lambda r: r.as_quat()), values(seed=1)
  for convention in ('absolute', 'delta_base', 'delta_tool'):
    spec = make_spec(convention, rotation('s', 'quaternion_xyzw'))
    state, actions = robot_poses(spec, FEATURES, {'s': s, 'a': a})
    np.testing.assert_array_equal(actions[:, 3:9], state[:, 3:9])


@pytest.mark.parametrize('open_, closed', [(1, 0), (0, 1), (-1, 1), (80, 0)])
def test_gripper_range_and_sense(open_, closed):
  spec = make_spec()
  grip = Gripper('a', 'c19', open_, closed)
  (arm,) = spec.arms
  action = dataclasses.replace(arm.action, gripper=grip)
  spec = dataclasses.replace(spec, arms=(dataclasses.replace(arm, action=action),))
  share = np.array([0, 0.25, 1, 1.04, -0.04])  # the last two: overshoot of the sensor
  a = values()
  a[:, 19] = closed + share * (open_ - closed)
  _, actions = robot_poses(spec, FEATURES, {'s': values(), 'a': a})
  np.testing.assert_allclose(actions[:, 9], np.clip(share, 0, 1), atol=1e-6)
  a[2, 19] = closed + 1.2 * (open_ - closed)
  with pytest.raises(DataError, match=rf'gripper: expected .* \({open_} = open\)'):
    robot_poses(spec, FEATURES, {'s': values(), 'a': a})


@given(st.integers(0, 4), st.sampled_from(sorted(FORMATS)), st.sampled_from(['nan', 'inf']))
@settings(max_examples=40, deadline=None)
def test_bad_numbers_stay_visible(row, name, bad):
  form, fields, encode = FORMATS[name]
  x = values(Turn.random(5, rng=1), encode)
  x[row, 3] = float(bad)
  spec = make_spec('delta_tool', rotation('s', form, **fields), rotation('a', form, **fields))
  state, actions = robot_poses(spec, FEATURES, {'s': x, 'a': x})
  good = np.arange(5) != row
  assert not np.isfinite(state[row]).all() and not np.isfinite(actions[row]).all()
  assert np.isfinite(state[good]).all() and np.isfinite(actions[good]).all()


def test_a_quaternion_of_length_0_is_refused():
  x = values()
  x[2, 3:7] = 0
  with pytest.raises(DataError, match='quaternion_xyzw'):
    robot_poses(make_spec(state=rotation('s', 'quaternion_xyzw')), FEATURES, {'s': x, 'a': x})


# ---- the file ----


def test_the_documented_example_is_a_spec(tmp_path):
  path = tmp_path / 'spec.yaml'
  path.write_text(EXAMPLE)
  spec = load_spec(path)
  assert [c.view for c in spec.cameras] == ['corner']
  assert spec.arms[0].action.position.scale == 0.01 and spec.events.feature == 'phase'
  path.write_text(specs.dump_spec(spec))
  assert load_spec(path) == spec


@pytest.mark.parametrize('form', sorted(FORMATS))
def test_specs_survive_the_file(tmp_path, form):
  form, fields, _ = FORMATS[form]
  spec = make_spec('delta_tool', rotation('s', form, **fields), rotation('a', form, **fields))
  path = tmp_path / 'spec.yaml'
  path.write_text(specs.dump_spec(spec))
  assert load_spec(path) == spec


@pytest.mark.parametrize(
  'old, new, message',
  [
    (
      'convention: delta_base',
      'convention: velocity',
      "action.convention: expected one of .*'velo",
    ),
    ('convention: delta_base', 'conventions: delta_base', "Did you mean 'convention'"),
    ('      convention: delta_base\n', '', r"arms\[0\].action: expected \['convention'\]"),
    ('[x, y, z], unit: m}', '[x, y, z]}', r"position: expected \['unit'\]"),
    ('[x, y, z], unit: m}', '[x, y], unit: m}', r"channels: expected 3, got \['x', 'y'\]"),
    ('unit: m}', 'unit: inch}', "unit: expected one of .*'inch'"),
    ('open: 1, closed: 0', 'open: 1', r"gripper: expected \['closed'\]"),
    ('open: 1, closed: 0', 'open: 1, closed: 1', 'both 1'),
    ('format: none', 'format: euler', 'euler expects a feature and 3 channels'),
    (
      'rotation: {format: none} ',
      'rotation: {format: euler, feature: s, channels: [3, 4, 5], unit: rad}',
      'order: expected three axes',
    ),
    (
      'rotation: {format: none} ',
      'rotation: {format: axis_angle, feature: s, channels: [3, 4, 5]}',
      'unit: expected rad or deg',
    ),
    ('level: L3', 'level: L7', "expected one of .*'L7'"),
    ('scale: 0.01', 'scale: small', 'scale: expected float'),
    ('view: corner', 'view: ""', 'distinct view names'),
    ('events: {feature: phase}', 'events: phase', 'expected fields of Text'),
    ('cameras:', '- ]', 'expected a YAML file'),
  ],
)
def test_mistakes_are_named(tmp_path, old, new, message):
  assert old in EXAMPLE
  path = tmp_path / 'spec.yaml'
  text = EXAMPLE.replace(old, new, 1)
  path.write_text(text)
  with pytest.raises(ConfigError, match=message) as caught:
    load_spec(path)
  assert str(path) in str(caught.value)


def test_numbers_that_yaml_takes_for_text(tmp_path):
  path = tmp_path / 'spec.yaml'
  path.write_text(EXAMPLE.replace('scale: 0.01', 'scale: 1e-2'))
  assert load_spec(path).arms[0].action.position.scale == 0.01


@given(
  st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
      st.lists(inner, max_size=3)
      | st.dictionaries(st.sampled_from(['cameras', 'arms', 'fps', 'feature', 'view']), inner)
    ),
    max_leaves=8,
  )
)
@settings(max_examples=100, deadline=None)
def test_any_other_content_is_a_config_error(data):
  try:
    spec = specs.from_plain(data)
  except ConfigError:
    return
  assert specs.from_plain(specs.to_plain(spec)) == spec


# ---- against a data set ----


def test_a_spec_is_checked_against_the_features():
  check_spec(make_spec(), FEATURES)
  for change, message in (
    ({'s': Feature('number', 'float32', (19,))}, r's: expected a channel in 0..18, got 19'),
    ({'s': Feature('text', 'string', ())}, "number feature 's', got a text feature"),
    ({'cam': Feature('other', 'video', (8, 8, 1))}, "camera feature 'cam'"),
  ):
    with pytest.raises(DataError, match=message):
      check_spec(make_spec(), FEATURES | change)
  with pytest.raises(DataError, match="channel 'up'"):
    spec = make_spec()
    (arm,) = spec.arms
    state = dataclasses.replace(arm.state, position=Position('a', ('c0', 'c1', 'up'), 'm'))
    check_spec(dataclasses.replace(spec, arms=(Arm(state, arm.action),)), FEATURES)


def lerobot_features(state, action):
  number = {'observation.state': state, 'action': action}
  features = {k: Feature('number', 'float32', (len(n),), tuple(n)) for k, n in number.items()}
  return {'observation.images.top': Feature('camera', 'video', (8, 8, 3))} | features


def test_known_layouts_and_no_others():
  metaworld = lerobot_features(['x', 'y', 'z', 'gripper'], ['dx', 'dy', 'dz', 'grip'])
  (arm,) = lerobot_layout('d', metaworld, 'sawyer').arms
  assert arm.action.convention == 'delta_base' and arm.action.gripper.open == -1
  both = lerobot_layout('d', lerobot_features(pose_names(2), pose_names(2)), None)
  assert [arm.action.convention for arm in both.arms] == ['absolute'] * 2
  for features, robot in (
    (metaworld, 'franka'),
    (lerobot_features(['x', 'y', 'z', 'gripper'], ['x', 'y', 'z', 'grip']), 'sawyer'),
    (lerobot_features([f'joint_{i}' for i in range(7)], [f'joint_{i}' for i in range(7)]), 'so100'),
  ):
    with pytest.raises(DataError, match=r'does not say what state and action mean(.|\n)*--spec'):
      lerobot_layout('d', features, robot)
  with pytest.raises(DataError, match='BridgeData V2'):
    rlds_layout('d', metaworld)


def test_the_offered_example_only_needs_its_blanks_filled_in(tmp_path):
  features = lerobot_features([f'j{i}' for i in range(8)], [f'j{i}' for i in range(7)])
  text = example_spec(features)
  with pytest.raises(ConfigError, match=r'expected one of'):
    specs.from_plain(yaml.safe_load(text))
  state, action = text.split('  action:')
  filled = [
    part.replace('[TODO, TODO, TODO], unit: TODO', '[0, 1, 2], unit: m')
    .replace('format: TODO', 'format: euler')
    .replace('[TODO], unit: TODO', '[3, 4, 5], unit: rad, order: xyz')
    .replace('channel: TODO, open: TODO, closed: TODO', 'channel: 6, open: 1, closed: 0')
    .replace('convention: TODO', 'convention: absolute')
    for part in (state, action)
  ]
  path = tmp_path / 'spec.yaml'
  path.write_text('  action:'.join(filled))
  spec = load_spec(path)
  check_spec(spec, features)
  assert spec.arms[0].action.convention == 'absolute'
