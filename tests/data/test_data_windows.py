import dataclasses

import numpy as np
import pytest
from episode_factory import encode_text, make_episode, make_frames, make_poses, make_store

from wallwm_jax.config import DataConfig, ExperimentConfig, ModelConfig
from wallwm_jax.data import images
from wallwm_jax.data.build import build_store
from wallwm_jax.data.pipeline import make_reader
from wallwm_jax.data.schema import Calibration, EventSpan
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import Draw, cut_window, pick_caption
from wallwm_jax.geometry.poses import apply_relative
from wallwm_jax.types import NormStats

IDENTITY = NormStats(*(np.full(n, v, np.float32) for n in (10, 10, 96) for v in (0, 1)))


def _config(window='event', buckets=(4,), stride=1, **model):
  model = {'image_size': (16, 16), 'future': 4, 'history': 1} | model
  return ExperimentConfig(
    model=ModelConfig(**model), data=DataConfig(window=window, buckets=buckets, stride=stride)
  )


def _cut(first, anchor, last, history=0, future=2, stride=1):
  w = cut_window(first, anchor, last, history=history, future=future, rate=4, stride=stride)
  return w.frames.tolist(), w.targets.tolist(), w.num_frames, w.num_steps


def test_event_of_exactly_the_window():
  assert _cut(10, 10, 18) == ([*range(10, 19)], [*range(10, 18)], 9, 8)


def test_longer_event_is_cut():
  assert _cut(10, 10, 30) == ([*range(10, 19)], [*range(10, 18)], 9, 8)


def test_shorter_event_holds_its_end_then_pads():
  # 4 frames, 3 actions: one latent; the 4th step holds the last target, frames after index 3
  # repeat.
  frames, targets, num_frames, num_steps = _cut(10, 10, 13)
  assert frames == [10, 11, 12, 13, 13, 13, 13, 13, 13] and (num_frames, num_steps) == (5, 4)
  assert targets == [10, 11, 12, 12, 12, 12, 12, 12]


def test_event_of_two_frames():
  assert _cut(5, 5, 6)[2:] == (5, 4)


def test_stride_two_takes_the_last_command_of_each_step():
  # raw 0..5 -> model frames 0 2 4 5: three steps, targets the commands 1, 3 and (end) 4.
  frames, targets, num_frames, num_steps = _cut(0, 0, 5, future=1, stride=2)
  assert (frames, targets, num_frames, num_steps) == ([0, 2, 4, 5, 5], [1, 3, 4, 4], 5, 4)


def test_chunk_window_repeats_the_first_frame_before_the_episode():
  frames, targets, num_frames, num_steps = _cut(0, 2, 30, history=1, future=2)
  assert frames == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
  assert (targets, num_frames, num_steps) == ([*range(2, 10)], 13, 8)


def test_chunk_window_at_the_end_of_the_episode():
  frames, targets, num_frames, num_steps = _cut(0, 29, 30, history=1, future=2)
  assert frames == [25, 26, 27, 28, 29] + [30] * 8
  assert (targets, num_frames, num_steps) == ([29] * 8, 9, 4)


def test_pick_caption():
  captions = {'L3': 'task', 'L2': 'sub', 'L1': 'act', 'L0': 'seg', 'human': 'hey'}
  assert pick_caption(captions, 'event') == 'act' and pick_caption(captions, 'chunk') == 'task'
  assert pick_caption(captions | {'L1': ''}, 'event') == 'seg'
  assert pick_caption({'L2': 'sub', 'L3': 'task'}, 'event') == 'sub'
  assert pick_caption({'L1': 'act'}, 'chunk') == '' and pick_caption({}, 'event') == ''


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return make_store(
    tmp_path_factory.mktemp('windows') / 's', episodes=2
  )  # events 0..8, 9..25, 26..31


def test_event_window_by_hand(store):
  config = _config(buckets=(2, 4))
  element = make_reader(config, store, IDENTITY, encode_text)(
    Draw(5, 2, 26)
  )  # 'lift' of episode 1: 6 frames
  episode = make_episode(1)
  rows = [26, 27, 28, 29, 30, 31, 31, 31, 31]
  for v, view in enumerate(config.model.views):
    np.testing.assert_array_equal(element.frames[v], episode.frames[view][rows])
  assert (element.num_frames, element.raw_length) == (9, 6)
  np.testing.assert_array_equal(element.state, episode.state[26])
  targets = [26, 27, 28, 29, 30, 30, 30, 30]
  np.testing.assert_allclose(
    apply_relative(episode.state[26:27], element.actions), episode.actions[targets], atol=1e-5
  )
  assert element.action_mask.all() and element.view_mask.all() and element.pixel_mask.all()
  np.testing.assert_array_equal(
    element.text.features, encode_text(['lift it, episode 1']).features[0]
  )
  uid = episode.event_uid(episode.events[2])
  assert element.uid.tolist() == [uid & 0xFFFFFFFF, uid >> 32]
  assert element.cameras.valid.tolist() == [True, False, False]


def test_padding_is_not_supervised_and_zero(store):
  element = make_reader(_config(), store, IDENTITY, encode_text)(Draw(5, 4, 26))
  assert element.num_frames == 9 and element.actions.shape == (16, 10)
  assert (
    element.action_mask[:8].all()
    and not element.action_mask[8:].any()
    and not element.actions[8:].any()
  )


def test_chunk_window_by_hand(store):
  config = _config('chunk')
  reader = make_reader(config, store, IDENTITY, encode_text)
  element = reader(Draw(4, 4, 12))  # inside 'grasp' of episode 1, runs past its end at 25
  episode = make_episode(1)
  np.testing.assert_array_equal(element.frames[0], episode.frames['front'][8:29])
  np.testing.assert_array_equal(element.state, episode.state[12])
  np.testing.assert_allclose(
    apply_relative(episode.state[12:13], element.actions), episode.actions[12:28], atol=1e-5
  )
  assert (element.num_frames, element.raw_length) == (21, 17)
  np.testing.assert_array_equal(element.text.features, encode_text(['task 1']).features[0])
  assert reader(Draw(4, 4, 13)).uid.tolist() != element.uid.tolist()


def test_normalisation(store):
  norm = NormStats(*(np.full(n, v, np.float32) for n in (10, 10, 96) for v in (0.5, 2.0)))
  plain = make_reader(_config(), store, IDENTITY, encode_text)(Draw(5, 4, 26))
  scaled = make_reader(_config(), store, norm, encode_text)(Draw(5, 4, 26))
  np.testing.assert_allclose(scaled.state, (plain.state - 0.5) / 2)
  np.testing.assert_allclose(scaled.actions[:8], (plain.actions[:8] - 0.5) / 2)
  assert not scaled.actions[8:].any()


def test_elements_match_the_config_specification(store):
  for window in ('event', 'chunk'):
    config = _config(window, text=dataclasses.replace(ModelConfig().text, tokens=1, width=1))
    element = make_reader(config, store, IDENTITY, encode_text)(Draw(1, 4, 9))
    spec = config.inputs_spec(4, 1)
    for name in (
      'frames',
      'num_frames',
      'raw_length',
      'state',
      'actions',
      'action_mask',
      'view_mask',
      'pixel_mask',
      'uid',
    ):
      got, want = getattr(element, name), getattr(spec, name)
      assert (got.shape, got.dtype) == (want.shape[1:], want.dtype), name


def test_absent_view_is_masked_and_views_follow_the_config(tmp_path):
  store = make_store(tmp_path / 's', episodes=1, views=('wrist', 'front'))
  element = make_reader(_config(), store, IDENTITY, encode_text)(Draw(0, 2, 0))
  assert element.view_mask.tolist() == [True, False, True]
  episode = make_episode(0, views=('wrist', 'front'))
  np.testing.assert_array_equal(element.frames[0], episode.frames['front'][:9])
  np.testing.assert_array_equal(element.frames[2], episode.frames['wrist'][:9])
  assert not element.frames[1].any() and not element.pixel_mask[1].any()
  assert element.cameras.valid.tolist() == [False, False, True]


def test_action_free_episode_has_nothing_to_supervise(tmp_path):
  store = make_store(tmp_path / 's', episodes=1, actions=None, state=None)
  norm = NormStats(*(np.full(n, v, np.float32) for n in (10, 10, 96) for v in (0.5, 2.0)))
  element = make_reader(_config(), store, norm, encode_text)(Draw(0, 2, 0))
  assert not element.action_mask.any() and not element.actions.any() and not element.state.any()


def test_resize_letterboxes_image_mask_and_intrinsics(tmp_path):
  """A 12 x 24 image on a 16 x 16 grid: scaled by 2/3 to 8 x 16, four black rows above and below."""
  stored = np.ones((12, 24), bool)
  stored[:3] = False  # a border the recording already had: two of the eight rows
  pose = make_poses(9, 0)
  frames = np.full((9, 12, 24, 3), 200, np.uint8)
  camera = Calibration(
    np.array([[30, 0, 12], [0, 30, 6], [0, 0, 1]], np.float32),
    np.tile(np.eye(4, dtype=np.float32), (9, 1, 1)),
  )
  camera.extrinsics[:, 0, 3] = np.arange(9)  # a camera that moves along x
  record = make_episode(
    views=('front',),
    lengths=(9,),
    frames={'front': frames},
    state=pose,
    actions=pose,
    events=(EventSpan(2, 9, 'x'),),
    pixel_mask={'front': stored},
    calibration={'front': camera},
  )
  build_store([record], tmp_path / 's', heldout=0, progress=False)
  element = make_reader(_config(), EventStore(tmp_path / 's'), IDENTITY, encode_text)(Draw(0, 2, 2))
  assert (element.frames[0, :, 4:12] == 200).all()
  assert not element.frames[0, :, :4].any() and not element.frames[0, :, 12:].any()
  assert element.pixel_mask[0].any(1).nonzero()[0].tolist() == [6, 7, 8, 9, 10, 11]
  np.testing.assert_allclose(
    element.cameras.intrinsics[0], [[20, 0, 8], [0, 20, 8], [0, 0, 1]], rtol=1e-6
  )
  assert element.cameras.extrinsics[0, 0, 3] == 2  # at the anchor frame


def test_letterbox_keeps_a_point_where_the_intrinsics_say():
  frame = np.zeros((1, 40, 60, 3), np.uint8)
  frame[0, 10:14, 30:34] = 255  # centred on x = 32, y = 12
  k = np.array([[1, 0, 32], [0, 1, 12], [0, 0, 1]], np.float32)
  out = images.letterbox(frame, (48, 48))[0, :, :, 0].astype(float)
  rows, columns = np.indices(out.shape) + 0.5
  moved = images.letterbox_intrinsics(k, (40, 60), (48, 48))
  np.testing.assert_allclose(
    [(out * columns).sum() / out.sum(), (out * rows).sum() / out.sum()], moved[:2, 2], atol=0.05
  )


def test_same_size_is_left_alone():
  frames = make_frames(3, 0)
  assert images.letterbox(frames, (16, 16)) is frames
  assert images.letterbox_mask((16, 16), (16, 16)).all()
