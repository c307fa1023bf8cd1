"""The statistics doctor: every fault that is planted is named, and sound data pass."""

import dataclasses
import io
import json

import numpy as np
import pytest
from episode_factory import make_episode, make_store
from rich.console import Console

from wallwm_jax.config import ActionSpec, DataConfig, ExperimentConfig, ModelConfig
from wallwm_jax.data import stats
from wallwm_jax.data.build import build_store
from wallwm_jax.data.doctor import DoctorSettings, diagnose, show
from wallwm_jax.data.schema import EventSpan
from wallwm_jax.data.store import EventStore
from wallwm_jax.geometry.poses import euler_to_matrix, matrix_to_rot6d
from wallwm_jax.types import ConfigError, DataError

T = 60


def _config(arms=1, **data):
  return ExperimentConfig(
    model=ModelConfig(image_size=(16, 16), future=4, action_spec=ActionSpec(arms=arms)),
    data=DataConfig(**{'buckets': (4,)} | data),
  )


def _smooth(rng, scale, center):
  """A hand's path [T, 3]: three slow sines per axis around a centre."""
  t = np.linspace(0, 2 * np.pi, T)[:, None, None]
  waves = np.sin(t * rng.uniform(0.5, 2, (3, 3)) + rng.uniform(0, 6, (3, 3)))
  return center + scale * waves.sum(-1) / 3


def _pose(position, rpy, grip):
  rot6d = matrix_to_rot6d(euler_to_matrix(rpy))
  return np.concatenate([position, rot6d, grip[:, None]], 1).astype(np.float32)


def _motion(seed):
  """Position m, roll-pitch-yaw rad and gripper of a hand that grasps in the middle event; the
  command leads by one frame."""
  rng = np.random.default_rng(seed)
  position = _smooth(rng, 0.15, [0.45, 0.0, 0.2])
  rpy = _smooth(rng, 0.4, [3.0, 0.0, 0.1])
  grip = np.where(np.arange(T) < 30, 1.0, 0.0)
  return position, rpy, grip


def _ahead(x):
  return np.concatenate([x[1:], x[-1:]])


EVENTS = (
  EventSpan(0, 21, 'reach', {'L1': 'reach the cup'}),
  EventSpan(20, 41, 'grasp', {'L1': 'grasp the cup'}),
  EventSpan(40, T, 'lift', {'L1': 'lift the cup'}),
)


def _episode(i, state=None, actions=None, **changes):
  """`state` and `actions` turn (position, rpy, grip) into what was recorded instead."""
  parts = _motion(i)
  measured = _pose(*(state(*parts) if state else parts))
  lead = tuple(map(_ahead, parts))
  commanded = _pose(*(actions(*lead) if actions else lead))
  fields = {'views': ('front',), 'size': (8, 8), 'lengths': (T,), 'events': EVENTS}
  return make_episode(i, **fields, state=measured, actions=commanded, **changes)


def _store(path, episodes=8, **changes):
  build_store([_episode(i, **changes) for i in range(episodes)], path, heldout=0, progress=False)
  return EventStore(path)


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
  return _store(tmp_path_factory.mktemp('doctor') / 's')


@pytest.mark.parametrize('kind', ['meanstd', 'quantile'])
@pytest.mark.parametrize('window', ['event', 'chunk'])
def test_sound_data_and_their_own_statistics_pass(sound, kind, window):
  config = _config(normalisation=kind, window=window)
  assert diagnose(sound, config) == []
  norm, summary = stats.compute(sound, config), stats.summarise(sound, config)
  assert diagnose(sound, config, norm, summary) == []
  (origin,) = diagnose(sound, config, norm)
  assert origin.check == 'origin' and origin.severity == 'info'


def _thousand(position, rpy, grip):
  return position * 1000, rpy, grip


def _thousandth(position, rpy, grip):
  return position / 1000, rpy, grip


def _hundred(position, rpy, grip):
  return position * 100, rpy, grip


def _degrees(position, rpy, grip):
  return position, np.rad2deg(rpy), grip


def _inverted(position, rpy, grip):
  return position, rpy, 1 - grip


def _metres(position, rpy, grip):
  return position, rpy, 0.085 * grip


def _changes(position, rpy, grip):
  def change(x):
    return np.diff(x, axis=0, prepend=x[:1])

  return change(position), change(rpy), grip


FAULTS = {
  'state and actions in mm': ({'state': _thousand, 'actions': _thousand}, 'units', 'millimetres'),
  'both in cm': ({'state': _hundred, 'actions': _hundred}, 'units', 'centimetres'),
  'actions in mm': ({'actions': _thousand}, 'units', 'millimetres'),
  'state in cm': ({'state': _hundred}, 'units', 'centimetres'),
  'state in km': ({'state': _thousandth}, 'units', 'different units'),
  'degrees': ({'state': _degrees, 'actions': _degrees}, 'units', 'degrees'),
  'actions in degrees': ({'actions': _degrees}, 'units', 'degrees'),
  'delta actions': ({'actions': _changes}, 'delta_actions', 'changes per step'),
  'delta state': ({'state': _changes}, 'delta_state', 'change per step'),
  'inverted commands': ({'actions': _inverted}, 'gripper_inverted', '1 = closed'),
  'inverted everywhere': (
    {'state': _inverted, 'actions': _inverted}, 'gripper_inverted', '1 = closed'),
  'gripper in m': ({'state': _metres, 'actions': _metres}, 'gripper_range', 'widest opening'),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_wrong_conventions_in_the_data_are_named(tmp_path, fault):
  changes, check, words = FAULTS[fault]
  found = diagnose(_store(tmp_path / 's', **changes), _config())
  hits = [d for d in found if d.check == check]
  assert hits and all(d.severity == 'severe' for d in hits), found
  assert any(words in d.message for d in hits), hits
  assert {d.check for d in found if d.severity == 'severe'} == {check}  # and nothing else is blamed


def _norm(store, config, **changes):
  norm = stats.compute(store, config)
  return dataclasses.replace(
    norm, **{name: change(getattr(norm, name).copy()) for name, change in changes.items()})


def _set(i, value):
  def change(x):
    x[i] = value
    return x

  return change


@pytest.mark.parametrize(
  'changes, check, channel',
  [
    ({'action_scale': _set(2, 1e-4)}, 'tiny_scale', 'action[2] z'),
    ({'action_scale': _set(2, 1e-4)}, 'blow_up', 'action[2] z'),
    ({'state_mean': _set(4, np.nan)}, 'not_finite', 'state[4] rotation 1y'),
    ({'state_scale': _set(0, 0.0)}, 'not_finite', 'state[0] x'),
    ({'latent_scale': _set(7, -1.0)}, 'not_finite', 'latent[7]'),
    ({'state_mean': _set(9, 127.0)}, 'gripper_range', 'state[9] gripper'),
    ({'action_mean': _set(1, 0.4)}, 'mismatch', 'action[1] y'),
    ({'latent_mean': lambda x: x[:5]}, 'shape', 'latent'),
  ],
)
def test_broken_statistics_are_named_by_channel(sound, changes, check, channel):
  config = _config()
  found = diagnose(sound, config, _norm(sound, config, **changes))
  assert (check, channel, 'severe') in {(d.check, d.channel, d.severity) for d in found}, found


def test_statistics_of_another_convention_are_recognised(sound):
  config = _config()
  own = stats.compute(sound, config)
  infos = [sound.info(i) for i in range(len(sound.episodes))]
  absolute = np.concatenate([info.actions for info in infos])
  mean, scale = stats.center_and_scale(absolute, 'meanstd', ActionSpec())
  cases = [
    (dataclasses.replace(own, action_mean=mean, action_scale=scale), 'absolute actions'),
    (stats.compute(sound, _config(normalisation='quantile')), "normalisation='quantile'"),
    (_norm(sound, config, state_mean=_set(9, 1 - own.state_mean[9])), '1 = closed'),
  ]
  steps = []
  for info in infos:
    step = np.diff(info.actions, axis=0)
    step[:, 9] = info.actions[1:, 9]
    steps.append(step)
  mean, scale = stats.center_and_scale(np.concatenate(steps), 'meanstd', ActionSpec())
  cases.append((dataclasses.replace(own, action_mean=mean, action_scale=scale), 'changes per step'))
  position = np.arange(10) < 3
  cases.append((dataclasses.replace(
    own,
    state_mean=np.where(position, 1000, 1) * own.state_mean,
    state_scale=np.where(position, 1000, 1) * own.state_scale), 'millimetres'))
  for norm, words in cases:
    hits = [d for d in diagnose(sound, config, norm) if d.check == 'mismatch']
    assert any(words in d.message for d in hits), (words, hits)


def test_stale_statistics_are_told_from_those_of_this_store(sound, tmp_path):
  config = _config()
  norm, summary = stats.compute(sound, config), stats.summarise(sound, config)
  other = _store(tmp_path / 's', episodes=7)
  found = [d for d in diagnose(other, config, norm, summary) if d.check == 'stale']
  assert [d.value for d in found] == [f'store = {sound.digest[:16]}']
  found = [d for d in diagnose(sound, _config(stride=2), norm, summary) if d.check == 'stale']
  assert [(d.value, d.expected) for d in found] == [('data.stride = 1', '2')]


def test_mixed_stores_are_named(tmp_path):
  two_arms = [np.tile(_episode(5).state, 2), np.tile(_episode(5).actions, 2)]
  items = [_episode(0), _episode(1, fps=20.0), _episode(2, rig='left lab')]
  build_store(items, tmp_path / 'a', heldout=0, progress=False)
  found = {d.check: d for d in diagnose(EventStore(tmp_path / 'a'), _config())}
  assert found['mixed_fps'].severity == 'warning' and '1 x 20.0 Hz' in found['mixed_fps'].value
  assert found['mixed_rigs'].value == '2 x synthetic, 1 x synthetic/left lab'
  wide = dataclasses.replace(_episode(5), state=two_arms[0], actions=two_arms[1])
  build_store([_episode(0), wide], tmp_path / 'b', heldout=0, progress=False)
  (found,) = diagnose(EventStore(tmp_path / 'b'), _config())
  assert found.check == 'mixed_widths' and found.severity == 'severe'
  assert '1 x 20 wide' in found.value


def test_still_channels_and_outliers(tmp_path):
  def flat(position, rpy, grip):
    return position * [1, 1, 0], rpy, np.ones_like(grip)

  store = _store(tmp_path / 'a', state=flat, actions=flat)
  found = [d for d in diagnose(store, _config()) if d.check == 'still']
  assert {d.channel for d in found if d.severity == 'warning'} == {
    'state[9] gripper', 'action[9] gripper', 'state[2] z'}

  def wild(position, rpy, grip):
    position = position * [0.2, 1, 1]
    position[5, 0] += 25
    return position, rpy, grip

  items = [_episode(i, actions=wild if i == 3 else None) for i in range(40)]
  build_store(items, tmp_path / 'b', heldout=0, progress=False)
  found = diagnose(EventStore(tmp_path / 'b'), _config())
  assert any(d.check == 'blow_up' and d.channel.startswith('action') for d in found), found
  assert any(d.check == 'outliers' and d.channel.startswith('action') for d in found), found


def test_a_rare_motion_is_not_divided_by_an_empty_range(tmp_path):
  """The gripper closes in one of 40 episodes, for one frame: its 1..99 % range is empty."""

  def blink(position, rpy, grip):
    return position, rpy, np.where(np.arange(T) == 33, 0.0, 1.0)

  def opened(position, rpy, grip):
    return position, rpy, np.ones_like(grip)

  kinds = [blink] + 39 * [opened]
  items = [_episode(i, state=kind, actions=kind) for i, kind in enumerate(kinds)]
  build_store(items, tmp_path / 's', heldout=0, progress=False)
  found = diagnose(EventStore(tmp_path / 's'), _config(normalisation='quantile'))
  assert 'action[9] gripper' in {d.channel for d in found if d.check == 'tiny_range'}
  found = diagnose(EventStore(tmp_path / 's'), _config())
  assert not [d for d in found if d.check == 'tiny_range']


def test_video_only_stores_have_nothing_to_check(tmp_path):
  store = make_store(tmp_path / 's', episodes=2, state=None, actions=None)
  config = ExperimentConfig(model=ModelConfig(image_size=(16, 16), future=4))
  (found,) = diagnose(store, config)
  assert found.check == 'no_robot' and found.severity == 'info'


def test_findings_come_worst_first_and_are_shown(tmp_path):
  found = diagnose(_store(tmp_path / 's', actions=_changes), _config())
  order = [('severe', 'warning', 'info').index(d.severity) for d in found]
  assert order == sorted(order) and order[0] == 0
  console = Console(file=io.StringIO(), width=160)
  show(found, console)
  text = console.file.getvalue()
  assert 'delta_actions' in text and 'severe' in text
  show([], console)
  assert 'nothing found' in console.file.getvalue()
  with pytest.raises(ConfigError, match='doctor.outliers'):
    DoctorSettings(outliers=0.0)


def test_files_carry_moments_and_old_files_still_load(sound, tmp_path):
  config, path = _config(), tmp_path / 'norm.json'
  norm, summary = stats.compute(sound, config), stats.summarise(sound, config)
  stats.save(norm, path)
  assert stats.load_summary(path) is None  # as files were before
  stats.check_match(norm, stats.load(path))
  stats.save(norm, path, summary)
  stats.check_match(norm, stats.load(path))
  again = stats.load_summary(path)
  assert again.store == sound.digest and again.settings == summary.settings
  sample = stats.robot_sample(sound, config)
  for group, x in sample.items():
    moments = again.moments[group]
    np.testing.assert_allclose(moments.mean, x.astype(float).mean(0), atol=1e-6)
    np.testing.assert_allclose(moments.std, x.astype(float).std(0), atol=1e-6)
    low, high = np.quantile(x, [0.01, 0.99], axis=0)
    np.testing.assert_allclose([moments.q01, moments.q99], [low, high], atol=1e-6)
    np.testing.assert_array_equal(moments.q99, summary.moments[group].q99)
  values = json.loads(path.read_text())
  values['summary']['store'] = 'another'
  path.write_text(json.dumps(values))
  with pytest.raises(DataError, match='changed'):
    stats.load(path)
