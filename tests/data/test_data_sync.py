"""Lags that were put into scenes are found, agreed on or refused; streams are shifted exactly."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_factory import VIEWS, make_motion, make_scene, render

from wallwm_jax.data import signals, sync
from wallwm_jax.data.schema import Calibration, CaptionSpan, EventSpan, Quarantined, validate
from wallwm_jax.data.shift import shift
from wallwm_jax.data.sync import RigLag, SyncSettings, align, estimate, motion
from wallwm_jax.types import ConfigError, DataError

RIG = ('scenes', 'table')


def rig(lags=0, **changes):
  """A trusted rig lag without any estimation."""
  lags = dict.fromkeys(VIEWS, lags) if isinstance(lags, int) else lags
  fields = dict(rig=RIG, episodes=8, lags=lags, correlation=dict.fromkeys(lags, 0.8), margin=0.4,
                drift=-9.0, curves=np.zeros((len(lags), 17)), verdict='')  # fmt: skip
  return RigLag(**fields | changes)


@pytest.fixture(scope='module')
def late():
  """Eight episodes of a rig whose cameras have lags of their own."""
  lags = {'front': 3, 'side': 1, 'wrist': -1}
  return lags, [make_scene(seed, lags=lags) for seed in range(8)]


# Signals


def test_correlation_at_a_lag_is_that_of_the_shared_frames():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 30))
  curve = signals.lagged_correlation(a, b, 4)
  for lag in range(-4, 5):
    x, y = (a[: 30 - lag], b[lag:]) if lag >= 0 else (a[-lag:], b[:lag])
    assert curve[lag + 4] == pytest.approx(np.corrcoef(x, y)[0, 1])


@settings(max_examples=30, deadline=None)
@given(st.integers(-6, 6), st.integers(0, 1000))
def test_a_shifted_copy_correlates_perfectly_at_its_shift(lag, seed):
  x = np.random.default_rng(seed).normal(size=60)
  curve = signals.lagged_correlation(x[10:50], x[10 - lag : 50 - lag], 8)
  assert curve.argmax() - 8 == lag and curve.max() == pytest.approx(1)
  assert np.abs(curve).max() < 1 + 1e-12


def test_constant_signals_correlate_with_nothing():
  assert (signals.lagged_correlation(np.ones(20), np.arange(20.0), 3) == 0).all()


def test_robot_motion_in_metres():
  poses = np.zeros((5, 20))
  poses[:, [3, 7, 13, 17]] = 1
  poses[:, 0] = [0, 0.1, 0.2, 0.3, 0.4]  # the first arm moves, the second one turns a right angle
  poses[2:, 13:19] = [0, 1, 0, -1, 0, 0]
  arms = signals.robot_motion(poses, turn_arm=0.1, grip_arm=0.0)
  np.testing.assert_allclose(arms[0], 0.2, rtol=1e-6)
  np.testing.assert_allclose(arms[1], [0.05 * np.pi, 0.05 * np.pi, 0], atol=1e-6)
  poses[4, 9] = 1
  gripped = signals.robot_motion(poses, turn_arm=0.1, grip_arm=0.3)
  np.testing.assert_allclose(gripped[0], [0.2, 0.2, np.hypot(0.2, 0.3)], rtol=1e-5)


def test_visual_motion_is_free_of_noise_and_of_alternating_frame_types():
  rng = np.random.default_rng(0)
  still = 120 + rng.normal(0, 4, (60, 32, 32, 3))
  # Two pixels, each the mean of three channels, differ by 4 sqrt(2 / 3) sqrt(2 / pi) = 2.6.
  assert signals.visual_motion(still.round().astype(np.uint8)).max() < 1.3
  poses = make_motion(60, 1)
  frames = render(poses, 'front', 1, noise=0.0).astype(np.int16)
  alternating = frames + 6 * (np.arange(60) % 2)[:, None, None, None]  # e.g. decoded with GOP 2
  plain, coded = (
    signals.visual_motion(x.clip(0, 255).astype(np.uint8)) for x in (frames, alternating)
  )
  assert np.corrcoef(plain, coded)[0, 1] > 0.999


def test_motion_of_large_frames_is_that_of_their_block_means():
  frames = render(make_motion(20, 2), 'side', 2, size=64)
  large = frames.repeat(3, 1).repeat(3, 2)
  np.testing.assert_allclose(signals.visual_motion(large), signals.visual_motion(frames), rtol=1e-4)


# Lags


@pytest.mark.parametrize('lag', [0, 1, 2, 3, 4, 5, -3])
def test_single_episodes_give_the_exact_lag(lag):
  found = estimate([motion(make_scene(20 + lag, lags=lag))])
  assert set(found.lags.values()) == {lag} and not found.verdict
  assert found.episodes == 1 and found.rig == RIG


def test_every_camera_of_a_rig_gets_its_own_lag(late):
  lags, records = late
  found = estimate([motion(record) for record in records])
  assert found.lags == lags and not found.verdict and found.episodes == 8
  assert {view: int(c.argmax()) - 8 for view, c in zip(lags, found.curves)} == lags
  plain = json.loads(json.dumps(found.to_dict()))
  assert plain['lags'] == lags and 'curves' not in plain


def test_two_arms_are_compared_together_and_each_alone():
  """A camera that sees only the second arm finds its lag although the first one moves as well."""
  records = [make_scene(seed, lags=2) for seed in range(4)]
  both = [
    dataclasses.replace(
      r, state=np.concatenate([make_scene(50 + i).state, r.state], 1), actions=None
    )
    for i, r in enumerate(records)
  ]
  assert set(estimate([motion(r) for r in both]).lags.values()) == {2}


def test_an_episode_that_lacks_a_camera_still_counts(late):
  lags, records = late
  less = dataclasses.replace(
    records[0], views=VIEWS[:2], frames={view: records[0].frames[view] for view in VIEWS[:2]}
  )
  found = estimate([motion(less), *map(motion, records[1:])])
  assert found.lags == lags


# Refusals


def test_what_does_not_belong_together_is_refused():
  right = estimate([motion(make_scene(seed)) for seed in range(6)])
  refused = 0
  for seed in range(6):
    record, other = make_scene(seed), make_scene(seed + 30)
    mixed = dataclasses.replace(record, state=other.state, actions=other.actions)
    answer = align(mixed, right)
    refused += isinstance(answer, Quarantined)
    assert align(record, right).provenance['sync']['verdict'] == 'ok'
    evidence = [sync.agreement(motion(r), right)['evidence'] for r in (mixed, record)]
    assert evidence[0] < evidence[1] / 2
  assert refused >= 5


def test_drifting_clocks_are_refused():
  records, drifting = [], []
  for seed in range(6):
    record = make_scene(seed)
    drawn = np.arange(90) + np.linspace(0, 6, 90)  # the robot clock runs 6 frames off
    slow = np.stack([np.interp(drawn, np.arange(90), x) for x in record.state.T], 1)
    records.append(record)
    drifting.append(dataclasses.replace(record, state=slow.astype(np.float32), actions=None))
  assert 'drifting' in estimate([motion(r) for r in drifting]).verdict
  good = estimate([motion(r) for r in records])
  assert not good.verdict and good.drift < 0
  answers = [align(r, good) for r in drifting]
  assert all(isinstance(answer, Quarantined) for answer in answers)
  assert any('sync: drifting: ' in answer.reason for answer in answers)


def test_lags_at_the_edge_of_the_window_and_far_from_the_rig():
  settings = SyncSettings(max_lag=4)
  records = [make_scene(seed, lags=4) for seed in range(3)]
  found = estimate([motion(r, settings) for r in records], settings)
  assert set(found.lags.values()) == {4} and found.verdict.startswith('edge')
  assert 'rig edge' in align(records[0], found, settings).reason
  answer = align(make_scene(3, lags=5), rig(0), SyncSettings())
  assert 'inconsistent: 5 frames' in answer.reason


def test_cameras_too_far_apart_and_noise():
  far = {'front': 6, 'side': 0, 'wrist': 0}
  found = estimate([motion(make_scene(seed, lags=far)) for seed in range(6)])
  assert found.lags == far and found.verdict.startswith('inconsistent')
  noise = np.random.default_rng(0).integers(0, 256, (90, 24, 24, 3), np.uint8)
  nothing = make_scene(0, frames=dict.fromkeys(VIEWS, noise))
  assert estimate([motion(nothing)]).verdict


@pytest.mark.parametrize(
  'change, words',
  [
    ({'state': np.zeros((80, 10), np.float32)}, 'one length'),
    ({'state': np.zeros((90, 7), np.float32)}, 'per arm'),
    ({'frames': {}}, 'one length'),
    ({'frames': dict.fromkeys(VIEWS, np.zeros((90, 8, 8), np.uint8))}, 'T, H, W, 3'),
    ({'state': None}, 'actions without state'),
  ],
)
def test_records_that_cannot_be_judged_say_why(change, words):
  answer = align(make_scene(0, **change), rig())
  assert isinstance(answer, Quarantined) and answer.episode_id == 'scene-0'
  assert words in answer.reason


def test_short_episodes_follow_their_rig_and_unknown_cameras_are_refused():
  after = align(make_scene(0, num_frames=30, lags=2), rig(2))
  assert after.provenance['sync']['verdict'] == 'not judged: 30 frames' and after.num_frames == 28
  assert 'too short: 1 frames' in align(make_scene(0, num_frames=6), rig(5)).reason
  assert 'at least 4 frames' in align(make_scene(0, num_frames=3), rig()).reason
  with pytest.raises(DataError, match='40 frames, got 0'):
    estimate([motion(make_scene(0, num_frames=30))])
  assert "cameras ['wrist']" in align(make_scene(0), rig({'front': 0, 'side': 0})).reason


def test_one_rig_at_a_time():
  a, b = motion(make_scene(0)), motion(make_scene(1, rig='another'))
  with pytest.raises(DataError, match='one rig'):
    estimate([a, b])
  with pytest.raises(DataError, match='robot stream'):
    estimate([motion(make_scene(0, state=None, actions=None))])
  with pytest.raises(DataError, match='another'):
    align(make_scene(1, rig='another'), rig())


def test_video_without_a_robot_passes_through():
  record = make_scene(0, num_frames=20, state=None, actions=None)
  after = align(record, None)
  assert after.provenance == {'sync': {'verdict': 'no robot stream'}}
  assert after.frames is record.frames


# Shifting


def test_alignment_brings_each_frame_to_the_row_it_was_measured_at(late):
  lags, records = late
  found = estimate([motion(record) for record in records])
  after = align(records[2], found)
  validate(after)
  assert after.num_frames == 90 - 4 == len(after.state) == len(after.actions)
  poses = make_motion(90 + 6, 2)[3 : 3 + 90][3:-1]  # make_scene's rows, less what has no partner
  np.testing.assert_array_equal(after.state, poses.astype(np.float32))
  for view, x in after.frames.items():
    clean = render(poses, view, 2, noise=0.0).astype(np.float64)
    assert np.abs(x - clean).mean() < 4  # E|noise| = 4 sqrt(2 / pi) = 3.2; a frame off is more
  note = after.provenance['sync']
  assert note['lags'] == lags and note['verdict'] == 'ok' and note['r'] > 0.5
  json.dumps(note)
  again = estimate([motion(after)])
  assert set(again.lags.values()) == {0}


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(-5, 5)] * 2), st.integers(14, 30))
def test_shift_keeps_all_that_has_a_partner_and_nothing_else(lags, n):
  lags = dict(zip(('a', 'b'), lags))
  count = np.arange(n)
  pixels = {
    view: np.tile(count[:, None, None, None], (1, 2, 2, 3)).astype(np.uint8) for view in lags
  }
  state = np.tile(count[:, None], (1, 10)).astype(np.float32)
  moving = Calibration(np.eye(3), np.tile(count[:, None, None], (1, 4, 4)))
  record = dataclasses.replace(
    make_scene(0, num_frames=2),
    views=('a', 'b'),
    frames=pixels,
    state=state,
    actions=state,
    times=count / 10,
    calibration={'a': moving, 'b': None},
    events=(EventSpan(0, 9, 'one'), EventSpan(8, n, 'two')),
    captions=(CaptionSpan('L3', 0, n, 'all'),),
  )
  after = shift(record, lags)
  rows = [s for s in range(n) if all(0 <= s - lag < n for lag in lags.values())]
  np.testing.assert_array_equal(after.state[:, 0], rows)
  np.testing.assert_array_equal(after.calibration['a'].extrinsics[:, 0, 0], rows)
  for view, lag in lags.items():
    np.testing.assert_array_equal(after.frames[view][:, 0, 0, 0], np.array(rows) - lag)
  first = np.array(rows) - lags['a']  # frames of the first view
  np.testing.assert_allclose(after.times, first / 10)
  assert after.captions[0].start == 0 and after.captions[0].end == len(rows)
  inside = [[i for i, f in enumerate(first) if e.start <= f < e.end] for e in record.events]
  expected = [(left[0], left[-1] + 1) for left in inside if len(left) >= 2]
  assert [(span.start, span.end) for span in after.events] == expected


@pytest.mark.parametrize(
  'changes', [{'max_lag': 1}, {'min_frames': 31}, {'min_evidence': -1.0}, {'turn_arm': np.nan}]
)
def test_settings_that_cannot_be(changes):
  with pytest.raises(ConfigError, match=next(iter(changes))):
    SyncSettings(**changes)
