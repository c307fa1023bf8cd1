"""Every defect of a recording is found at its threshold and not below it; clean episodes pass."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_factory import make_scene

from wallwm_jax.data import defects
from wallwm_jax.data.clean import CHECKS, CleanSettings, Finding, clean, findings
from wallwm_jax.data.schema import Quarantined, validate
from wallwm_jax.types import ConfigError

LIMITS = CleanSettings()
FPS = 10.0


def scene(**changes):
  return make_scene(3, num_frames=60, fps=FPS, **changes)


def edited(record, field, index, value):
  """The record with `field`[index] = value."""
  x = getattr(record, field).copy()
  x[index] = value
  return dataclasses.replace(record, **{field: x})


def shown(record, view, frames):
  return dataclasses.replace(record, frames={**record.frames, view: frames})


def checks_of(record, limits=LIMITS):
  return {found.check for found in findings(record, limits)}


def moving_frame(record, length=4):
  """A frame whose steps are all well above the speed at which copies are judged."""
  steps = np.linalg.norm(np.diff(record.state[:, :3], axis=0), axis=-1)
  slow = [steps[t - 2 : t + length + 2].min() for t in range(2, len(steps) - length - 2)]
  return int(np.argmax(slow)) + 2


def repeat_rows(record, start, count):
  """Frame `start` and its rows again, `count` times; everything after comes later."""
  order = np.concatenate([np.arange(start + 1), np.full(count, start), np.arange(start + 1, 60)])
  rows = {'state': record.state[order], 'actions': record.actions[order]}
  frames = {view: x[order] for view, x in record.frames.items()}
  return dataclasses.replace(record, frames=frames, **rows)


def times(record, step=1 / FPS):
  return np.arange(record.num_frames) * step


def test_clean_episodes_pass_and_say_what_was_checked():
  for seed in range(8):
    record = make_scene(seed, fps=FPS)
    record = dataclasses.replace(record, times=times(record), provenance={'sync': {'lag': 0}})
    assert findings(record) == []
    after = clean(record)
    validate(after)
    assert after.provenance == {'sync': {'lag': 0}, 'clean': {'checks': list(CHECKS)}}
    assert record.provenance == {'sync': {'lag': 0}}


def test_video_without_a_robot_is_checked_as_video():
  record = scene(state=None, actions=None)
  judged = clean(record).provenance['clean']['checks']
  assert {'missing_camera', 'blank_camera', 'frozen'} <= set(judged)
  assert not {'time_order', 'kinematic_jump', 'invalid_state'} & set(judged)
  black = record.frames['side'].copy()
  black[7] = 3
  assert checks_of(shown(record, 'side', black)) == {'blank_camera'}


@pytest.mark.parametrize('value', [None, np.zeros((0, 8, 8, 3), np.uint8), np.zeros((60, 8, 8))])
def test_a_camera_without_pictures_is_missing(value):
  record = scene()
  frames = {'front': record.frames['front'], 'side': record.frames['side']}
  if value is not None:
    frames['wrist'] = value
  found = findings(dataclasses.replace(record, frames=frames))
  assert [f.message.split(':')[0] for f in found if f.check == 'missing_camera'] == [
    "camera 'wrist'"
  ]


@pytest.mark.parametrize('stream', ['front', 'state', 'actions', 'times'])
def test_streams_of_other_lengths(stream):
  record = dataclasses.replace(scene(), times=times(scene()))
  if stream == 'front':
    record = shown(record, 'front', record.frames['front'][:-1])
  else:
    record = dataclasses.replace(record, **{stream: getattr(record, stream)[:-1]})
  found = findings(record)
  assert [f.check for f in found] == ['length_mismatch']
  assert stream in found[0].message and found[0].value == 1
  assert findings(record, CleanSettings(max_length_difference=1)) == []


def test_times_that_do_not_increase():
  record = scene()
  for value in (0.0, 0.1, 3.0, np.nan):
    late = times(record)
    late[11] = late[10] - value
    found = findings(dataclasses.replace(record, times=late))
    assert found[0].check == 'time_order' and found[0].frame == 11


@pytest.mark.parametrize('factor', [1.15, 1 / 1.15, 2.0])
def test_another_frame_rate_than_the_nominal_one(factor):
  record = scene()
  wrong = dataclasses.replace(record, times=times(record, factor / FPS))
  assert checks_of(wrong) == {'fps'}
  nearly = dataclasses.replace(record, times=times(record, factor**0.5 / FPS))
  assert checks_of(nearly) == (set() if factor < 2 else {'fps'})


def test_frames_dropped_in_a_row():
  record = scene()
  for lost, expected in ((1, set()), (3, {'fps'})):
    gap = times(record) + np.where(np.arange(60) >= 20, lost / FPS, 0)
    assert checks_of(dataclasses.replace(record, times=gap)) == expected


@pytest.mark.parametrize('fps', [0.0, -5.0, np.nan, np.inf, 1000.0])
def test_a_frame_rate_that_cannot_be(fps):
  assert 'fps' in checks_of(dataclasses.replace(scene(), fps=fps))


@pytest.mark.parametrize('count', [2, 3])
def test_records_repeated_in_a_motion(count):
  record = scene()
  start = moving_frame(record)
  found = findings(repeat_rows(record, start, count))
  assert (found[0].check, found[0].frame, found[0].value) == ('duplicates', start + 1, count)


def test_a_stretch_recorded_twice():
  record = scene()
  start = moving_frame(record)
  order = np.concatenate([np.arange(start + 4), np.arange(start, 56)])
  twice = dataclasses.replace(
    record,
    frames={view: x[order] for view, x in record.frames.items()},
    state=record.state[order],
    actions=record.actions[order],
  )
  assert ('duplicates', start + 4) in {(f.check, f.frame) for f in findings(twice)}


def test_a_resting_robot_is_no_duplicate():
  record = scene(noise=0.0)
  rest = np.concatenate([record.state[:30], np.repeat(record.state[29:30], 30, 0)])
  frames = {
    view: np.concatenate([x[:30], np.repeat(x[29:30], 30, 0)]) for view, x in record.frames.items()
  }
  assert findings(dataclasses.replace(record, state=rest, actions=rest, frames=frames)) == []


def test_a_frozen_camera_and_a_frozen_state():
  record = scene()
  start = moving_frame(record, 6)
  for frozen, expected in ((5, set()), (6, {'frozen'})):
    frames = record.frames['side'].copy()
    frames[start + 1 : start + 1 + frozen] = frames[start]
    assert checks_of(shown(record, 'side', frames)) == expected
    video = dataclasses.replace(shown(record, 'side', frames), state=None, actions=None)
    assert ('frozen' in checks_of(video)) == bool(expected)
  held = edited(record, 'state', slice(start, start + 8), record.state[start])
  assert 'frozen' in checks_of(held)


@pytest.mark.parametrize('contrast', [0.0, 1.9, 2.1])
def test_blank_frames_by_their_contrast(contrast):
  record = scene()
  frames = record.frames['front'].astype(np.float64)
  flat = frames[5].mean(-1)
  frames[5] = 100 + (flat - flat.mean())[..., None] * contrast / flat.std()
  # Rounding to whole levels adds about 1/12 to the variance.
  levels = np.clip(np.round(frames), 0, 255).astype(np.uint8)
  assert checks_of(shown(record, 'front', levels)) == ({'blank_camera'} if contrast < 2 else set())


@pytest.mark.parametrize('field', ['state', 'actions'])
def test_numbers_and_rotations_that_are_none(field):
  record = scene()
  for index, value in (((9, 1), np.nan), ((9, 8), np.inf), ((9, 3), 2.0), ((9, 9), np.nan)):
    found = [f for f in findings(edited(record, field, index, value)) if f.check == 'invalid_state']
    assert found and found[0].frame == 9 and field in found[0].message
  narrow = dataclasses.replace(record, **{field: getattr(record, field)[:, :7]})
  assert 'invalid_state' in checks_of(narrow)


@pytest.mark.parametrize('severity', [1.2, 3.0])
def test_jumps_beyond_the_speed_limit_and_beyond_the_motion_around_them(severity):
  record = scene()
  after = np.arange(60) >= 30
  far = np.where(after[:, None], [0, 0, severity * LIMITS.max_speed / FPS], 0)
  jump = edited(record, 'state', (slice(None), slice(0, 3)), record.state[:, :3] + far)
  assert checks_of(jump) >= {'kinematic_jump'}
  rest = np.repeat(record.state[:1], 60, 0)
  rest[30:, 2] += severity * LIMITS.jump_floor
  still = dataclasses.replace(record, state=rest, actions=None)
  found = findings(still)
  assert [(f.check, f.frame) for f in found] == [('kinematic_jump', 30)]
  assert found[0].value == pytest.approx(severity * LIMITS.jump_floor, rel=1e-4)
  rest[30:, 2] = rest[0, 2] + LIMITS.jump_floor / severity
  assert findings(dataclasses.replace(still, state=rest)) == []


def test_a_motion_may_be_under_way_at_either_end():
  s = np.arange(11) / 10
  stroke = np.pad(np.diff(s**3 * (10 - 15 * s + 6 * s**2)), (0, 4))  # minimum jerk, then rest
  for start in range(10):
    for steps in (stroke[start:], stroke[start:][::-1]):
      assert (steps <= LIMITS.jump_ratio * defects.usual_steps(steps) + 0.01).all()
  lone = np.array([0.2, 0.002, 0.001, 0.001, 0.2])
  assert (defects.usual_steps(lone)[[0, -1]] < 0.01).all()
  stray = np.array([0.2, 0.2, 0.002, 0.001, 0.2, 0.2])
  assert (defects.usual_steps(stray)[[1, -2]] < 0.01).all()


def test_a_sudden_turn_is_a_jump():
  state = np.repeat(scene().state[:1], 60, 0)
  angle = np.where(np.arange(60) >= 20, 0.4, 0.0)
  state[:, 3:9] = np.stack(
    [np.cos(angle), np.sin(angle), 0 * angle, -np.sin(angle), np.cos(angle), 0 * angle], 1
  )
  found = findings(scene(state=state, actions=None))
  assert [(f.check, f.frame) for f in found] == [('kinematic_jump', 20)]
  assert found[0].value == pytest.approx(0.4, rel=1e-4) and ' rad ' in found[0].message


def test_the_workspace_is_a_box():
  limits = CleanSettings(workspace=((-0.5, -0.5, -0.5), (0.5, 0.5, 0.5)))
  record = scene()
  assert findings(record, limits) == []
  found = findings(edited(record, 'actions', (40, 1), -0.6), limits)
  assert [(f.check, f.frame, f.threshold) for f in found] == [('workspace', 40, -0.5)]
  assert found[0].value == pytest.approx(-0.6)


def test_gripper_out_of_range_stuck_and_chattering():
  record = scene()
  assert checks_of(edited(record, 'state', (8, 9), 1.01)) == {'gripper_range'}
  assert checks_of(edited(record, 'actions', (8, 9), -0.01)) == {'gripper_range'}
  command = (np.arange(60) // 20 % 2).astype(np.float32)
  told = edited(record, 'actions', (slice(None), 9), command)
  follows = edited(told, 'state', (slice(None), 9), np.roll(command, 2))
  stuck = edited(told, 'state', (slice(None), 9), 0.04 * command)
  assert checks_of(follows) == set() and checks_of(stuck) == {'gripper_stuck'}
  force = edited(stuck, 'actions', (slice(None), 9), np.where(command > 0, 0.5, command))
  assert checks_of(force) == set()  # neither open nor close
  fast = (np.arange(60) % 2).astype(np.float32)
  assert checks_of(edited(record, 'state', (slice(None), 9), fast)) >= {'gripper_chatter'}


def test_two_arms_are_each_checked():
  record = scene()
  both = np.concatenate([record.state, record.state], 1)
  assert findings(dataclasses.replace(record, state=both, actions=both)) == []
  bad = both.copy()
  bad[30:, 11] += 1.0
  found = findings(dataclasses.replace(record, state=bad, actions=both))
  assert [f.check for f in found] == ['kinematic_jump'] and 'arm 1' in found[0].message


def test_a_refusal_names_every_check_with_value_and_threshold():
  record = edited(edited(scene(), 'state', (8, 9), 1.5), 'actions', (3, 0), np.nan)
  refused = clean(record)
  assert isinstance(refused, Quarantined) and refused.episode_id == record.episode_id
  found = findings(record)
  assert {f.check for f in found} == {'gripper_range', 'invalid_state'}
  for f in found:
    assert f'{f.check} at frame {f.frame}: {f.message}' in refused.reason
    assert f'{f.value:.4g}, threshold {f.threshold:.4g}' in refused.reason


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_record_is_too_broken_to_be_talked_about(data):
  length = st.integers(0, 5)
  number = st.sampled_from([0.0, 1.0, -2.0, np.nan, np.inf, 1e30])
  view = st.sampled_from(['front', 'side', 'wrist', 'nobody'])
  shape = data.draw(st.sampled_from([(), (3,), (10,), (20,), (2, 10)]))
  rows = np.full((data.draw(length), *shape), data.draw(number), np.float32)
  frames = np.zeros((data.draw(length), *data.draw(st.sampled_from([(8, 8, 3), (0, 8, 3), (8,)]))))
  record = dataclasses.replace(
    scene(),
    frames={data.draw(view): frames.astype(data.draw(st.sampled_from([np.uint8, np.float32])))},
    state=data.draw(st.sampled_from([None, rows])),
    actions=data.draw(st.sampled_from([None, rows])),
    times=data.draw(st.sampled_from([None, rows.reshape(-1).astype(np.float64)])),
    fps=data.draw(number),
  )
  found = findings(record)
  assert 'missing_camera' in {f.check for f in found}
  assert isinstance(clean(record), Quarantined)
  assert all(isinstance(f, Finding) and f.message for f in found)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), max_size=12))
def test_runs_cover_exactly_what_is_true(flags):
  runs = defects.runs_of(np.array(flags, bool))
  covered = np.zeros(len(flags), bool)
  for start, end in runs:
    assert start < end and not covered[start:end].any()
    covered[start:end] = True
  assert covered.tolist() == flags
  assert all(b < c for (_, b), (c, _) in zip(runs, runs[1:]))


def test_toggle_rate_counts_by_hand():
  grip = np.array([0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0.5, 1, 0, 1, 0], float)
  assert defects.toggle_rate(grip, 5.0) == (12, 3)  # changes at 1, 2, 12, 15, 16, 17
  assert defects.toggle_rate(np.full(9, 0.5), 5.0) == (0, 0)


@pytest.mark.parametrize(
  'changes',
  [
    {'max_speed': -1.0},
    {'fps_tolerance': np.nan},
    {'workspace': ((0, 0, 0), (1, 1, 0))},
    {'workspace': ((0, 0), (1, 1))},
    {'min_fps': 300.0},
  ],
)
def test_settings_that_cannot_be(changes):
  with pytest.raises(ConfigError, match=next(iter(changes))):
    CleanSettings(**changes)
