"""Vectors of events: what goes in, what they are invariant to, what they may not depend on."""

import numpy as np
import pytest
from episode_factory import make_episode, make_poses, make_store
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from wallwm_jax.data.build import build_store
from wallwm_jax.data.embed import (
  DescriptorEmbedder,
  EmbedSettings,
  embed_events,
  trajectory_features,
)
from wallwm_jax.data.schema import EventSpan
from wallwm_jax.data.store import EventStore
from wallwm_jax.geometry.poses import apply_relative, relative_pose
from wallwm_jax.types import ConfigError, DataError


@pytest.fixture(scope='module')
def embedder():
  return DescriptorEmbedder(image_dim=64, text_dim=64)


class Recorder:
  """An embedder whose image vectors are one-hot in the number painted on a frame, and whose text
  vectors are one-hot in the length of the text."""

  identity, image_dim, text_dim = 'recorder', 64, 64

  def images(self, frames):
    return np.eye(64, dtype=np.float32)[frames[:, 0, 0, 0]]

  def texts(self, texts):
    return np.eye(64, dtype=np.float32)[[len(text) for text in texts]]


def stored(path, *episodes):
  build_store(episodes, path, heldout=0.0, progress=False)
  return EventStore(path)


def scenes(rng, count, size):
  """Blurred noise: random scenes uint8 [count, size, size, 3]."""
  coarse = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
  return coarse.repeat(size // 8, 1).repeat(size // 8, 2)


# --- the descriptor embedder ---------------------------------------------------------------------


def test_vectors_are_of_unit_length_and_the_same_from_every_instance(embedder):
  frames = scenes(np.random.default_rng(0), 5, 64)
  texts = ['pick up the cube', 'open the drawer', '?']
  again = DescriptorEmbedder(image_dim=64, text_dim=64)
  np.testing.assert_array_equal(embedder.images(frames), again.images(frames))
  np.testing.assert_array_equal(embedder.texts(texts), again.texts(texts))
  np.testing.assert_allclose(np.linalg.norm(embedder.images(frames), axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(embedder.texts(texts)[:2], axis=1), 1, atol=1e-5)


def test_identity_names_what_vectors_depend_on():
  makers = ({}, {'image_dim': 32}, {'text_dim': 32}, {'seed': 1})
  assert len({DescriptorEmbedder(**kwargs).identity for kwargs in makers}) == len(makers)


def test_the_same_scene_is_nearer_than_another_one(embedder):
  rng = np.random.default_rng(1)
  frames = scenes(rng, 8, 64)
  noisy = np.clip(frames + rng.normal(0, 4, frames.shape), 0, 255).astype(np.uint8)
  larger = frames.repeat(3, 1).repeat(3, 2)
  for other in (noisy, larger):
    cosine = embedder.images(frames) @ embedder.images(other).T
    assert (cosine.argmax(1) == np.arange(8)).all()
    assert np.diag(cosine).min() > 0.75 > 0.5 > (cosine - 2 * np.eye(8)).max()


def test_a_black_frame_has_a_vector(embedder):
  assert np.isfinite(embedder.images(np.zeros((1, 4, 6, 3), np.uint8))).all()


def test_wordings_order_texts(embedder):
  near, mid, far = embedder.texts(
    ['pick up the red cube', 'pick up the blue cube', 'slide a drawer shut']
  )
  (query,) = embedder.texts(['pick up the red cube slowly'])
  assert query @ near > query @ mid > query @ far + 0.2


# --- trajectories --------------------------------------------------------------------------------


def straight(steps, distance=0.3):
  """state [steps + 1, 10] and actions [steps, 10] of a steady move along x, gripper closing."""
  state = np.zeros((steps + 1, 10))
  state[:, 3] = state[:, 7] = 1
  state[:, 0] = np.linspace(0, distance, steps + 1)
  state[:, 9] = np.linspace(1, 0, steps + 1)
  return state, state[1:]


def test_a_steady_move_is_a_line_whatever_its_duration():
  for steps in (1, 7, 40):
    x = trajectory_features(*straight(steps), fps=10.0, steps=4)
    np.testing.assert_allclose(x['position'][:, 0, 0], [0.075, 0.15, 0.225, 0.3], atol=1e-9)
    np.testing.assert_allclose(x['gripper'][:, 0], [0.75, 0.5, 0.25, 0], atol=1e-9)
    np.testing.assert_allclose(x['rotation'], 0, atol=1e-9)
    np.testing.assert_allclose(x['path'], [[0.3, 0]], atol=1e-9)
    np.testing.assert_allclose(x['duration'], np.log(steps / 10))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(1, 40), st.integers(0, 2**31))
def test_trajectories_match_interpolation_and_do_not_depend_on_where_the_robot_stands(
  length, steps, seed
):
  state, actions = make_poses(length, seed), make_poses(length, seed + 1)[:-1]
  x = trajectory_features(state, actions, 10.0, steps)
  relative = relative_pose(state[:1], actions)
  relative = np.concatenate([relative_pose(state[:1], state[:1]), relative])
  at = np.linspace(0, length - 1, steps + 1)[1:]
  for i in range(3):
    expected = np.interp(at, np.arange(length), relative[:, i])
    np.testing.assert_allclose(x['position'][:, 0, i], expected, atol=1e-5)
  expected = np.interp(at, np.arange(length), relative[:, 4])
  np.testing.assert_allclose(x['rotation'][:, 0, 1], expected, atol=1e-5)
  base = make_poses(2, seed + 2)[1:]
  moved = trajectory_features(
    apply_relative(base, state), apply_relative(base, actions), 10.0, steps
  )
  for name in x:
    np.testing.assert_allclose(moved[name], x[name], atol=1e-4)


# --- embed_events --------------------------------------------------------------------------------


def test_vl_joins_captions_with_the_first_middle_and_last_frame(tmp_path):
  store = stored(tmp_path / 's', make_episode(0, lengths=(9, 17)))
  vl = embed_events(store, Recorder()).vl
  text, pixels = vl[:, :64], vl[:, 64:]
  # event 0 is frames 0..8, event 1 frames 9..25; make_frames paints the frame number
  assert np.flatnonzero(pixels[0]).tolist() == [0, 4, 8]
  assert np.flatnonzero(pixels[1]).tolist() == [9, 17, 25]
  lengths = sorted({len('task 0'), len('grasp it, episode 0')})
  assert np.flatnonzero(text[1]).tolist() == lengths
  np.testing.assert_allclose(np.linalg.norm(text, axis=1), np.sqrt(0.5), atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(vl, axis=1), 1, atol=1e-6)


def test_without_captions_pixels_are_the_whole_vector(tmp_path):
  bare = make_episode(0, captions=(), events=(EventSpan(0, 9, 'a'), EventSpan(9, 32, 'b')))
  store = stored(tmp_path / 's', bare, make_episode(1))
  vl = embed_events(store, Recorder()).vl
  np.testing.assert_array_equal(vl[:2, :64], 0)
  np.testing.assert_allclose(np.linalg.norm(vl[:2, 64:], axis=1), 1, atol=1e-6)
  assert vl[2, :64].any()
  blind = embed_events(store, Recorder(), EmbedSettings(text=False)).vl
  assert blind.shape == (5, 64)
  np.testing.assert_allclose(blind[:2], vl[:2, 64:], atol=1e-6)


def test_segment_captions_stand_in_for_missing_ones(tmp_path):
  events = (EventSpan(0, 9, 'a', {'L0': 'abc'}), EventSpan(9, 32, 'b', {'L0': 'abc', 'L2': 'ab'}))
  store = stored(tmp_path / 's', make_episode(0, captions=(), events=events))
  text = embed_events(store, Recorder()).vl[:, :64]
  assert [np.flatnonzero(row).tolist() for row in text] == [[3], [2]]


def test_action_free_events_are_told_apart(tmp_path, embedder):
  store = stored(tmp_path / 's', make_episode(0), make_episode(1, actions=None), make_episode(2))
  events = embed_events(store, embedder)
  assert events.has_action.tolist() == [True] * 3 + [False] * 3 + [True] * 3
  np.testing.assert_array_equal(events.act[3:6], 0)
  assert events.act[0].any()


def test_a_store_without_actions_has_vectors_all_the_same(tmp_path, embedder):
  store = stored(tmp_path / 's', make_episode(0, actions=None, state=None))
  events = embed_events(store, embedder)
  assert not events.has_action.any() and not events.act.any()
  assert events.vl.any(1).all()


def test_one_and_two_arms_share_a_space(tmp_path, embedder):
  poses = make_poses(32, 5), make_poses(32, 6)
  both = {'state': np.tile(poses[0], 2), 'actions': np.tile(poses[1], 2)}
  store = stored(tmp_path / 's', make_episode(0), make_episode(1, **both))
  act = embed_events(store, embedder).act
  assert np.isfinite(act).all() and len(np.unique(act.round(5), axis=0)) == len(act)


def test_principal_components_keep_the_distances(tmp_path, embedder):
  store = make_store(tmp_path / 's', episodes=4)
  full = embed_events(store, embedder, EmbedSettings(components=64)).act
  few = embed_events(store, embedder, EmbedSettings(components=3)).act
  assert full.shape == (12, 11) and few.shape == (12, 3)
  np.testing.assert_allclose(np.abs(few), np.abs(full[:, :3]), atol=1e-4)
  np.testing.assert_allclose(full.mean(0), 0, atol=1e-4)
  variance = full.var(0)
  assert (np.diff(variance) <= 1e-6).all()


def test_vectors_do_not_depend_on_threads_or_on_where_they_are_kept(tmp_path, embedder):
  store = make_store(tmp_path / 's', episodes=3)
  runs = []
  for threads in (1, 2):
    with threadpool_limits(limits=threads):
      runs.append(embed_events(store, embedder))
  (tmp_path / 'kept').mkdir()
  runs.append(embed_events(store, embedder, folder=tmp_path / 'kept'))
  assert isinstance(runs[2].vl, np.memmap)
  for run in runs[1:]:
    for a, b in zip(runs[0], run):
      np.testing.assert_array_equal(a, b)


def test_a_broken_embedder_is_refused(tmp_path):
  class Narrow(Recorder):
    def images(self, frames):
      return np.zeros((len(frames), 3), np.float32)

  class Loud(Recorder):
    def texts(self, texts):
      return np.full((len(texts), 64), np.nan, np.float32)

  store = make_store(tmp_path / 's', episodes=1)
  with pytest.raises(DataError, match=r'embedder.images: expected finite \[9, 64\]'):
    embed_events(store, Narrow())
  with pytest.raises(DataError, match='embedder.texts'):
    embed_events(store, Loud())


@pytest.mark.parametrize('field', ['steps', 'components', 'sample'])
def test_settings_are_checked(field):
  with pytest.raises(ConfigError, match=f'embed.{field}'):
    EmbedSettings(**{field: 0})
