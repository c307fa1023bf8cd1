import dataclasses
import io
import json

import numpy as np
import pytest
from episode_factory import encode_text, make_episode, make_poses, make_store
from rich.console import Console

from wallwm_jax.config import DataConfig, ExperimentConfig, ModelConfig
from wallwm_jax.data import inspect, stats
from wallwm_jax.data.build import build_store
from wallwm_jax.data.pipeline import make_reader
from wallwm_jax.data.schema import Quarantined
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import Draw
from wallwm_jax.geometry.poses import relative_pose
from wallwm_jax.types import DataError, StatsMismatchError


def _config(**data):
  return ExperimentConfig(
    model=ModelConfig(image_size=(16, 16), future=4), data=DataConfig(**{'buckets': (2, 4)} | data)
  )


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return make_store(tmp_path_factory.mktemp('stats') / 's', episodes=5)


def _windows():
  """The supervised actions and anchor states of every event of make_episode, by hand, in
  float64."""
  actions, states = [], []
  for i in range(5):
    state, action = (
      x.astype(np.float64) for x in (make_poses(32, 2 * i), make_poses(32, 2 * i + 1))
    )
    for start, targets in [
      (0, range(0, 8)),
      (9, range(9, 25)),
      (26, [26, 27, 28, 29, 30, 30, 30, 30]),
    ]:
      actions.append(relative_pose(state[start][None], action[list(targets)]))
      states.append(state[start])
  return np.concatenate(actions), np.stack(states)


def test_mean_and_standard_deviation(store):
  norm = stats.compute(store, _config())
  actions, states = _windows()
  np.testing.assert_allclose(norm.action_mean, actions.mean(0), atol=1e-6)
  np.testing.assert_allclose(norm.state_mean, states.mean(0), atol=1e-6)
  np.testing.assert_allclose(norm.action_scale, actions.std(0), rtol=1e-5)
  assert not norm.latent_mean.any() and (norm.latent_scale == 1).all()


def test_quantiles(store):
  norm = stats.compute(store, _config(normalisation='quantile'))
  low, high = np.quantile(_windows()[0], [0.01, 0.99], axis=0)
  np.testing.assert_allclose(norm.action_mean, (low + high) / 2, atol=1e-6)
  np.testing.assert_allclose(norm.action_scale, (high - low) / 2, rtol=1e-5)


def test_training_batches_come_out_standardised(store):
  config = _config()
  reader = make_reader(config, store, stats.compute(store, config), encode_text)
  bucket = {9: 2, 17: 4, 6: 2}  # frames of an event -> latents of its bucket
  starts, lengths = store.column('start').tolist(), store.column('length').tolist()
  draws = [Draw(i, bucket[length], starts[i]) for i, length in enumerate(lengths)]
  x = np.concatenate([w.actions[w.action_mask].reshape(-1, 10) for w in map(reader, draws)])
  np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(x.std(0), 1, atol=1e-5)


def test_still_channels_keep_a_sane_scale(tmp_path):
  still = np.tile(make_poses(1, 0), (32, 1))
  store = make_store(tmp_path / 's', episodes=1, state=still, actions=still)
  for kind in ('meanstd', 'quantile'):
    norm = stats.compute(store, _config(normalisation=kind))
    np.testing.assert_array_equal(norm.action_scale, np.float32([0.01] * 3 + [0.1] * 7))


def test_latents_skip_padding_and_absent_cameras(tmp_path):
  store = make_store(tmp_path / 's', episodes=2, views=('front', 'side'), lengths=(6,))

  def encode(frames):
    # [1, V, 17, H, W, 3] -> [1, V, 5, 1, 1, 2]: a latent's last raw frame's top-left value, and 7
    top = frames[:, :, ::4, 0, 0, 0].astype(np.float32)
    return np.stack([top, np.full_like(top, 7)], -1)[:, :, :, None, None]

  norm = stats.compute(store, _config(buckets=(4,)), encode)
  # 6 frames: n = 2 latents, latent frames at raw frames 0, 4, 5 (the end is held); 0 in the absent
  # camera and padding.
  np.testing.assert_allclose(norm.latent_mean, [3, 7], rtol=1e-6)
  np.testing.assert_allclose(
    norm.latent_scale, [np.std([0, 4, 5]), 0.1 * np.std([0, 4, 5])], rtol=1e-6
  )


def test_action_free_store_has_identity_action_statistics(tmp_path):
  store = make_store(tmp_path / 's', episodes=1, actions=None, state=None)
  norm = stats.compute(store, _config())
  assert (
    not norm.action_mean.any() and (norm.action_scale == 1).all() and (norm.state_scale == 1).all()
  )


def test_chunk_statistics_use_every_anchor(store):
  norm = stats.compute(store, _config(window='chunk', buckets=(4,)))
  states = np.concatenate(
    [make_poses(32, 2 * i)[[t for t in range(31) if t not in (8, 25)]] for i in range(5)]
  )
  np.testing.assert_allclose(norm.state_mean, states.astype(np.float64).mean(0), atol=1e-6)


def test_save_and_load_are_bit_exact(store, tmp_path):
  norm = stats.compute(store, _config())
  stats.save(norm, tmp_path / 'norm.json')
  again = stats.load(tmp_path / 'norm.json')
  for name, value in vars(norm).items():
    assert getattr(again, name).dtype == np.float32
    assert getattr(again, name).tobytes() == value.tobytes()
  assert stats.stats_hash(again) == stats.stats_hash(norm)
  stats.check_match(norm, again)


def test_changed_or_broken_files_are_refused(store, tmp_path):
  path = tmp_path / 'norm.json'
  stats.save(stats.compute(store, _config()), path)
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | {'state_mean': [0.0] * 10}))
  with pytest.raises(DataError, match='changed'):
    stats.load(path)
  path.write_text(path.read_text()[:50])
  with pytest.raises(DataError, match='cannot be read'):
    stats.load(path)


def test_mismatch_names_group_and_channel(store):
  norm = stats.compute(store, _config())
  scale = norm.action_scale.copy()
  scale[4] *= 2
  with pytest.raises(StatsMismatchError, match='action_scale: 1 channels differ, first channel 4'):
    stats.check_match(norm, dataclasses.replace(norm, action_scale=scale))
  with pytest.raises(StatsMismatchError, match=r'latent_mean: expected 96 channels, got 3'):
    stats.check_match(norm, dataclasses.replace(norm, latent_mean=norm.latent_mean[:3]))
  assert stats.stats_hash(norm) != stats.stats_hash(dataclasses.replace(norm, action_scale=scale))


def test_inspect_shows_what_a_person_asks_for(tmp_path):
  items = [
    make_episode(0),
    make_episode(1, views=('front',)),
    Quarantined('x', 'y', 'missing camera: rear'),
  ]
  items.append(dataclasses.replace(make_episode(2), fps=-1.0))
  build_store(items, tmp_path / 's', heldout=0.5, progress=False)
  store = EventStore(tmp_path / 's')
  summary = inspect.summarise(store)
  assert summary['labels'] == {'reach': 2, 'grasp': 2, 'lift': 2}
  assert summary['views']['front'] == {'episodes': 2, 'calibrated': 2, 'sizes': ['16x16']}
  assert summary['views']['side']['calibrated'] == 0
  assert summary['quarantine'] == {'missing camera: rear': 1, 'fps: expected > 0 Hz, got -1.0.': 1}
  assert summary['splits'] == {'heldout': 1, 'train': 1} and summary['lengths']['p50'] == 9
  console = Console(file=io.StringIO(), width=120)
  inspect.show(store, console)
  text = console.file.getvalue()
  for expected in ('reach: 2', 'view side', '1 x missing camera: rear', 'heldout: 1'):
    assert expected in text
