"""A tiny store and the experiment file of a tiny model that fits it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.commands import settings
from wallwm_jax.data.schema import EpisodeRecord, EventSpan
from wallwm_jax.data.store import EpisodeStoreWriter, EventStore
from wallwm_jax.inference import language
from wallwm_jax.models import functional
from wallwm_jax.types import Frozen, InferenceParams, Language, NormStats

EXPERIMENT = """
from wallwm_jax import config as c

def get_config():
  return c.ExperimentConfig(
    name='tiny',
    model=c.ModelConfig(
      video=c.VideoConfig(width=32, layers=2, heads=2, ffn=32, freq_dim=32),
      action=c.ActionConfig(width=32, heads=2, ffn=32, freq_dim=32),
      codec=c.CodecConfig(channels=24), text=c.TextConfig(tokens=4, width=8),
      views=('front', 'side'), image_size=(16, 16), history=1, future=2, max_future=4),
    diffusion=c.DiffusionConfig(action_draws=1),
    data=c.DataConfig(batch_size=4, buckets=(2, 4), threads=1),
    train=c.TrainConfig(stage='joint', steps=2, log_every=1, ema=0.5),
    inference=c.InferenceConfig(video_steps=1, action_steps=2))
"""


def episode(index: int) -> EpisodeRecord:
  """Two events: 8 frames that go and 14 frames that come; the second camera is black."""
  rng = np.random.default_rng(index)
  frames = 21
  state = np.zeros((frames, 10), np.float32)
  state[:, :3] = np.cumsum(rng.normal(0, 0.02, (frames, 3)), 0)
  state[:, 3] = state[:, 7] = 1
  state[:, 9] = np.linspace(0, 1, frames)
  pixels = rng.integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)
  return EpisodeRecord(
    episode_id=f'episode-{index}',
    source='synthetic',
    fps=10.0,
    views=('front', 'side'),
    frames={'front': pixels, 'side': np.zeros_like(pixels)},
    state=state,
    actions=np.roll(state, -1, 0),
    events=(
      EventSpan(0, 8, 'go', {'L1': 'go there', 'L3': 'wander'}),
      EventSpan(7, 21, 'come', {'L1': 'come back', 'L3': 'wander'}),
    ),
  )


@pytest.fixture(scope='session')
def make_episode():
  """`episode`, for tests."""
  return episode


@pytest.fixture(scope='session')
def experiment(tmp_path_factory):
  path = tmp_path_factory.mktemp('experiments') / 'tiny.py'
  path.write_text(EXPERIMENT)
  return path


@pytest.fixture(scope='session')
def store(tmp_path_factory) -> EventStore:
  path = tmp_path_factory.mktemp('data') / 'store'
  with EpisodeStoreWriter(path, heldout=0.5) as writer:
    for index in range(8):
      writer.add(episode(index))
  return EventStore(path)


@pytest.fixture(scope='session')
def config(experiment):
  return settings.load_experiment(experiment)


@pytest.fixture(scope='session')
def params(config) -> InferenceParams:
  import jax

  widths = (10, 10, config.model.codec.channels)
  norm = NormStats(*(np.full(n, value, np.float32) for n in widths for value in (0, 2)))
  return InferenceParams(functional.init_params(config.model, jax.random.key(0)), Frozen(norm))


@pytest.fixture
def speaking(config, params):
  """(config, params) of the same policy with a language side that is only made of numbers."""
  side = dataclasses.replace(config.language, kind='qwen')
  model = params.model | {'heads': {}, 'staircase': {}}
  side_of = Language({}, {}, None, np.zeros((2, 8)), None)
  frozen = dataclasses.replace(params.frozen, language=side_of)
  return dataclasses.replace(config, language=side), InferenceParams(model, frozen)


@pytest.fixture
def one_plan(monkeypatch):
  """A VLM that always plans the second caption of the bank, for half a second."""

  def plan_of(params, reading, last, *, cfg):
    return language.Plan(jnp.array([1]), jnp.array([0.5]), jnp.zeros((1, 2)))

  monkeypatch.setattr(language, 'read', lambda *args, **kwargs: None)
  monkeypatch.setattr(language, 'plan_of', plan_of)
