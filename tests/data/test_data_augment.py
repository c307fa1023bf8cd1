"""Pruning of idle frames, and jitter of pixels with the calibration that goes with it."""

import dataclasses
import json

import numpy as np
import pytest
from episode_factory import encode_text, make_episode, make_frames
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.config import DataConfig, ExperimentConfig, ModelConfig
from wallwm_jax.data import augment, images, stats
from wallwm_jax.data.augment import AugmentSettings, kept_frames, prune, recolour
from wallwm_jax.data.build import build_store
from wallwm_jax.data.pipeline import fingerprint, make_dataset, make_reader
from wallwm_jax.data.schema import Calibration, CaptionSpan, EventSpan, validate
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import Draw
from wallwm_jax.geometry.cameras import look_at, project
from wallwm_jax.types import ConfigError

ROT6D = [1, 0, 0, 0, 1, 0]
PRUNE = AugmentSettings(keep=3)


def _poses(x):
  """A hand that moves along x [T] m and is open."""
  x = np.asarray(x, np.float32)
  rest = np.tile(np.float32([0, 0, *ROT6D, 1]), (len(x), 1))
  return np.concatenate([x[:, None], rest], 1)


def _record(x, commands=None, events=None, **changes):
  """10 Hz; the command of a frame is the next pose unless given."""
  state = _poses(x)
  actions = _poses(np.append(x[1:], x[-1]) if commands is None else commands)
  n = len(state)
  fields = {
    'views': ('front',),
    'lengths': (n,),
    'frames': {'front': make_frames(n, 0, (8, 8))},
    'state': state,
    'actions': actions,
    'calibration': {},
    'captions': (CaptionSpan('L3', 0, n, 'task'),),
    'events': events or (EventSpan(0, n, 'move'),),
  }
  return make_episode(**fields | changes)


def _moves(moving):
  """Positions that advance 2 cm in each step of `moving`."""
  return np.concatenate([[0], np.cumsum(np.where(moving, 0.02, 0.0))])


def test_a_pause_is_shortened_and_commands_still_lead_to_the_next_frame():
  # Steps 0..2 move, 3..12 rest, 13..15 move: frames 3..13 are the pause.
  record = _record(_moves([1] * 3 + [0] * 10 + [1] * 3))
  kept = kept_frames(record, PRUNE)
  assert kept.tolist() == [0, 1, 2, 3, 8, 13, 14, 15, 16]
  pruned = prune(record, PRUNE)
  validate(pruned)
  np.testing.assert_array_equal(pruned.actions[:-1], pruned.state[1:])
  np.testing.assert_array_equal(pruned.state, record.state[kept])
  np.testing.assert_array_equal(pruned.frames['front'], record.frames['front'][kept])
  np.testing.assert_allclose(pruned.times, kept / 10)
  assert pruned.events[0].end == len(kept) and pruned.captions[0].end == len(kept)
  assert pruned.provenance['prune']['frames'] == [17, 9]
  assert pruned.provenance['prune']['cut'] == [[4, 8], [9, 13]]
  json.dumps(pruned.provenance)


def test_spans_and_moving_cameras_follow_their_frames():
  x = _moves([1, 0, 0, 0, 0, 0, 0, 1] * 2)
  n = len(x)
  moving = np.tile(np.eye(4, dtype=np.float32), (n, 1, 1))
  moving[:, 0, 3] = np.arange(n)
  spans = (CaptionSpan('L0', 0, 5, 'a'), CaptionSpan('L0', 5, n, 'b'))
  record = _record(
    x,
    events=(EventSpan(0, 9, 'one'), EventSpan(8, n, 'two')),  # they share frame 8
    captions=spans,
    calibration={'front': Calibration(np.float32([[9, 0, 4], [0, 9, 4], [0, 0, 1]]), moving)},
    times=np.arange(n) * 0.1 + 7,
  )
  pruned, kept = prune(record, PRUNE), kept_frames(record, PRUNE)
  validate(pruned)
  assert {0, 5, 8, n - 1} <= set(kept.tolist()) and len(kept) < n
  np.testing.assert_array_equal(pruned.calibration['front'].extrinsics[:, 0, 3], kept)
  np.testing.assert_array_equal(pruned.times, record.times[kept])
  one, two = pruned.events
  assert two.start == one.end - 1 and kept[two.start] == 8 and kept[two.end - 1] == n - 1
  a, b = pruned.captions
  assert a.end == b.start and kept[b.start] == 5 and b.end == len(kept)


def test_frames_between_events_and_moving_ones_stay():
  record = _record(_moves([0] * 20), events=(EventSpan(0, 8, 'a'), EventSpan(15, 21, 'b')))
  kept = kept_frames(record, PRUNE).tolist()
  assert kept == [0, 4, 7, *range(8, 15), 15, 17, 20]
  busy = _record(_moves([1] * 12))
  pruned = prune(busy, PRUNE)
  assert pruned.frames is busy.frames and pruned.provenance['prune']['cut'] == []


def test_slow_drift_is_not_cut_into_jumps():
  """Half the speed limit for 10 s is 5 cm: no frame that goes may be far from one that stays."""
  x = np.arange(100) * 0.0005
  record = _record(x)
  kept = kept_frames(record, PRUNE)
  assert 20 < len(kept) < 60
  assert np.diff(x[kept]).max() <= PRUNE.linear_speed * PRUNE.horizon


def test_a_gripper_that_is_told_to_close_is_not_idle():
  record = _record(_moves([0] * 12))
  record.actions[6:, 9] = 0  # the fingers are blocked: the measured state does not change
  kept = kept_frames(record, PRUNE).tolist()
  assert {6, 7} <= set(kept) and len(kept) < 13
  gripper, closes = prune(record, PRUNE).actions[:, 9], kept.index(6)
  assert (gripper[:closes] == 1).all() and not gripper[closes:].any()


@pytest.mark.parametrize('channels', [slice(3, 9), slice(9, 10)])
def test_turning_and_gripping_are_motion(channels):
  record = _record(_moves([0] * 10))
  if channels.start == 3:
    angle = 0.02 * np.arange(11)
    zero = np.zeros(11)
    turned = np.stack([np.cos(angle), np.sin(angle), zero, -np.sin(angle), np.cos(angle), zero], 1)
    record.state[:, 3:9] = turned
  else:
    record.state[:, 9] = np.linspace(0, 1, 11)
  assert len(kept_frames(record, PRUNE)) == 11


def test_images_decide_where_there_is_no_robot():
  frames = np.full((20, 8, 8, 3), 90, np.uint8)
  frames[10:] = 120
  record = _record(_moves([0] * 19), frames={'front': frames}, state=None, actions=None)
  assert len(kept_frames(record, PRUNE)) == 20  # nothing is known about motion
  looking = dataclasses.replace(PRUNE, image_change=1.0)
  assert kept_frames(record, looking).tolist() == [0, 4, 9, 10, 14, 19]
  validate(prune(record, looking))


@given(st.lists(st.booleans(), min_size=4, max_size=40), st.integers(2, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_pruning_keeps_every_property_of_a_record(moving, keep, data):
  n = len(moving) + 1
  cut = data.draw(st.integers(1, n - 2))
  record = _record(
    _moves(moving),
    events=(EventSpan(0, cut + 1, 'a'), EventSpan(cut, n, 'b')),
    captions=(CaptionSpan('L1', 0, cut, 'a'), CaptionSpan('L1', cut, n, 'b')),
  )
  chosen = AugmentSettings(keep=keep)
  kept, pruned = kept_frames(record, chosen), prune(record, chosen)
  validate(pruned)
  assert {0, cut, n - 1} <= set(kept.tolist()) and (np.diff(kept) > 0).all()
  np.testing.assert_array_equal(pruned.actions[:-1], pruned.state[1:])
  gone = np.setdiff1d(np.arange(n), kept)
  assert not np.array(moving)[gone - 1].any()  # what goes was at rest before and after
  assert not np.array(moving)[gone[gone < n - 1]].any()
  assert [c.end - c.start for c in pruned.captions] == [
    (kept < cut).sum(), (kept >= cut).sum()]


SIZE = (30, 40)
CAMERA = Calibration(
  np.float32([[35, 0.4, 19], [0, 33, 14], [0, 0, 1]]),
  look_at(np.float32([0.5, -0.6, 0.4]), np.float32([0, 0, 0])),
)


@pytest.mark.parametrize('target', [(30, 40), (16, 16), (48, 64), (24, 50)])
@pytest.mark.parametrize('step', range(4))
def test_a_point_projects_to_the_pixel_that_shows_it(target, step):
  """In closed form: a crop and a resize are one affine map of pixel coordinates."""
  rng = np.random.default_rng(step)
  points = rng.uniform(-0.2, 0.2, (20, 3)).astype(np.float32)
  jitter = augment.draw(AugmentSettings(crop=0.4), 0, 17, step, 0)
  box = jitter.box(SIZE)
  assert 0 <= box.top < box.bottom <= 30 and 0 <= box.left < box.right <= 40
  np.testing.assert_allclose((box.right - box.left) / (box.bottom - box.top), 40 / 30)
  before, _ = project(points, CAMERA.intrinsics, CAMERA.extrinsics)
  k = images.letterbox_intrinsics(CAMERA.intrinsics, SIZE, target, box)
  after, _ = project(points, k, CAMERA.extrinsics)
  (h, w), (top, left) = images.fit(SIZE, target)
  scale = np.array([w / (box.right - box.left), h / (box.bottom - box.top)])
  expected = (before - [box.left, box.top]) * scale + [left, top]
  np.testing.assert_allclose(after, expected, atol=1e-3)


def test_pixels_land_where_the_intrinsics_say():
  """The centroid of a bright spot, through the resampling itself."""
  frame = np.zeros((1, 60, 80, 3), np.uint8)
  frame[0, 28:32, 36:40] = 255  # centred on x = 38, y = 30
  spot = np.float32([[1, 0, 38], [0, 1, 30], [0, 0, 1]])
  for step in range(8):
    box = augment.draw(AugmentSettings(crop=0.3), 0, 5, step, 0).box((60, 80))
    out = images.letterbox(frame, (48, 48), box)[0, ..., 0].astype(float)
    rows, columns = np.indices(out.shape) + 0.5
    moved = images.letterbox_intrinsics(spot, (60, 80), (48, 48), box)
    centroid = [(out * columns).sum() / out.sum(), (out * rows).sum() / out.sum()]
    np.testing.assert_allclose(centroid, moved[:2, 2], atol=0.06)


def test_draws_are_functions_of_their_integers():
  def numbers(*key):
    x = augment.draw(AugmentSettings(photometric=1.0, crop=0.5), *key)
    return (x.side, *x.place, *x.matrix.ravel(), x.noise)

  assert numbers(0, 2**64 - 1, 3, 1) == numbers(0, 2**64 - 1, 3, 1)
  keys = [(0, 9, 3, 1), (1, 9, 3, 1), (0, 8, 3, 1), (0, 9, 4, 1), (0, 9, 3, 2)]
  assert len({numbers(*key) for key in keys}) == 5
  sides = np.array([augment.draw(AugmentSettings(crop=0.2), 0, 9, i, 0).side for i in range(2000)])
  assert sides.min() > 0.8 and abs(sides.mean() - 0.9) < 0.005 and abs(
    sides.std() - 0.2 / np.sqrt(12)) < 0.003


def test_strength_zero_changes_nothing():
  jitter = augment.draw(AugmentSettings(), 0, 1, 2, 3)
  assert jitter.box((9, 9)) is None and jitter.blur == jitter.noise == 0
  frames = make_frames(3, 1)
  np.testing.assert_array_equal(recolour(frames, jitter), frames)


def _jitter(step):
  return augment.draw(AugmentSettings(photometric=1.0), 0, 3, step, 0)


def test_colours_change_alike_in_all_frames_and_borders_stay_black():
  still = np.repeat(make_frames(1, 3, (12, 12)), 5, 0)
  mask = np.ones((12, 12), bool)
  mask[:2] = False
  before = still.copy()
  blurred = 0
  for step in range(12):
    out = recolour(still, _jitter(step), mask)
    assert out.dtype == np.uint8 and out.shape == still.shape
    assert (out == out[:1]).all() and not out[:, :2].any() and (out != still)[:, 2:].any()
    blurred += _jitter(step).blur > 0
  assert 0 < blurred < 12
  np.testing.assert_array_equal(still, before)


def test_the_colour_matrix_does_what_it_says():
  """Against colour arithmetic written out: luma, saturation and hue on their own."""
  rgb = np.random.default_rng(0).uniform(60, 190, (50, 3))
  luma = rgb @ [0.299, 0.587, 0.114]

  def apply(*factors):
    m = augment._colour_matrix(*factors)
    return rgb @ m[:, :3].T + m[:, 3]

  np.testing.assert_allclose(apply(0, 1, 1, 0), rgb, atol=1e-9)
  np.testing.assert_allclose(apply(9, 1, 1, 0), rgb + 9, atol=1e-9)
  np.testing.assert_allclose(apply(0, 1.3, 1, 0), 127.5 + 1.3 * (rgb - 127.5), atol=1e-9)
  grey = np.repeat(luma[:, None], 3, 1)
  np.testing.assert_allclose(apply(0, 1, 0.4, 0), grey + 0.4 * (rgb - grey), atol=0.5)
  turned = apply(0, 1, 1, 0.3)
  np.testing.assert_allclose(turned @ [0.299, 0.587, 0.114], luma, atol=1e-6)
  assert np.abs(turned - rgb).max() > 5


def test_bad_settings_are_refused_and_named():
  for bad in ({'keep': 1}, {'linear_speed': 0.0}, {'crop': 0.6}, {'photometric': -0.1},
              {'image_change': -1.0}, {'horizon': float('nan')}):
    with pytest.raises(ConfigError, match=next(iter(bad))):
      AugmentSettings(**bad)
  for bad in ({'crop': 0.7}, {'photometric': 2.0}):
    with pytest.raises(ConfigError, match=f'data.{next(iter(bad))}'):
      DataConfig(**bad)
    with pytest.raises(ConfigError, match=f'data.latents.*data.{next(iter(bad))}'):
      DataConfig(latents='x', **{next(iter(bad)): 0.1})


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  """20 x 32 px images (letterboxed on a square), calibrated front camera."""
  path = tmp_path_factory.mktemp('augment') / 's'
  items = [make_episode(i, lengths=(9, 17), size=(20, 32)) for i in range(4)]
  build_store(items, path, heldout=0.25, progress=False)
  return EventStore(path)


def _config(**data):
  return ExperimentConfig(
    model=ModelConfig(image_size=(16, 16), future=4),
    data=DataConfig(**{'buckets': (4,), 'batch_size': 2} | data),
  )


def _read(store, draw, jitter=True, **data):
  config = _config(**data)
  return make_reader(config, store, stats.identity(config), encode_text, jitter=jitter)(draw)


def test_only_training_windows_are_jittered(store):
  plain, on = Draw(0, 4, 0, 11), {'photometric': 0.8, 'crop': 0.3}
  reference = _read(store, plain)
  for off in ({'jitter': False}, {'split': 'heldout'}):
    other = _read(store, plain, **on, **off)
    np.testing.assert_array_equal(other.frames, reference.frames)
    np.testing.assert_array_equal(other.cameras.intrinsics, reference.cameras.intrinsics)
  changed = _read(store, plain, **on)
  assert (changed.frames != reference.frames).mean() > 0.3
  np.testing.assert_array_equal(changed.pixel_mask, reference.pixel_mask)
  assert not changed.frames[:, :, ~reference.pixel_mask[0]].any()
  for name in ('state', 'actions', 'uid'):
    np.testing.assert_array_equal(getattr(changed, name), getattr(reference, name))
  other = _read(store, plain._replace(choice=12), **on)
  assert (other.frames != changed.frames).any()


def test_a_cropped_window_carries_the_intrinsics_of_its_crop(store):
  cropped = _read(store, Draw(1, 4, 9, 5), crop=0.4)
  uid = int(store.column('uid')[1])
  box = augment.draw(AugmentSettings(crop=0.4), 0, uid, 5, 0).box((20, 32))
  record = store.episode(0)
  np.testing.assert_array_equal(
    cropped.frames[0], images.letterbox(record.frames['front'][9:26], (16, 16), box))
  zoom = 16 / (box.right - box.left)
  expected = [[20 * zoom, 0, (8 - box.left) * zoom], [0, 20 * zoom, (8 - box.top) * zoom + 3]]
  np.testing.assert_allclose(cropped.cameras.intrinsics[0, :2], expected, rtol=1e-5)


def test_the_stream_resumes_with_the_same_pixels(store):
  config = _config(photometric=0.5, crop=0.2)
  norm = stats.identity(config)
  first = make_dataset(config, store, norm, encode_text)
  next(first)
  state = first.get_state()
  again = make_dataset(config, store, norm, encode_text)
  again.set_state(state)
  np.testing.assert_array_equal(next(first).frames, next(again).frames)
  first.close(), again.close()


def test_settings_are_part_of_the_stream_only_when_on(store):
  plain = fingerprint(_config(), store)
  assert 'crop' not in plain and 'photometric' not in plain
  assert fingerprint(_config(crop=0.1), store) == plain | {'crop': 0.1}
