"""A tiny model whose every weight matters, and inputs for it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import point_mass_env
import pytest
import tiny_language
from jax.experimental.compilation_cache import compilation_cache

from wallwm_jax import config as configs
from wallwm_jax.inference import unified
from wallwm_jax.inference.sources import CaptionTable
from wallwm_jax.models import functional
from wallwm_jax.types import Frozen, InferenceParams, NormStats, Observation, Text

VIEWS, SIZE, BATCH = 2, 16, 2


@pytest.fixture(scope='session')
def cfg() -> configs.ExperimentConfig:
  model = configs.ModelConfig(
      video=configs.VideoConfig(width=16, layers=2, heads=2, ffn=32, patch=(1, 1, 1), freq_dim=16),
      action=configs.ActionConfig(width=16, heads=2, ffn=32, freq_dim=16),
      codec=configs.CodecConfig(channels=12), text=configs.TextConfig(tokens=4, width=8),
      views=('front', 'wrist'), image_size=(SIZE, SIZE), history=1, future=2, max_future=4)
  inference = configs.InferenceConfig(video_steps=2, action_steps=3)
  return configs.ExperimentConfig(model=model, inference=inference)


@pytest.fixture(scope='session')
def make_params():
  """make_params(cfg): random everywhere; fresh weights have zero heads and pass any equality."""

  def make(cfg) -> InferenceParams:
    rng = np.random.default_rng(0)
    fresh = functools.partial(functional.init_params, cfg.model)
    model = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
                         jax.eval_shape(fresh, jax.random.key(0)))
    a, c = cfg.model.action_spec.dim, cfg.model.codec.channels
    norm = NormStats(*(rng.uniform(0.5, 1.5, n).astype(np.float32) for n in (a, a, a, a, c, c)))
    return InferenceParams(model, Frozen(norm))

  return make


@pytest.fixture(scope='session')
def params(cfg, make_params) -> InferenceParams:
  return make_params(cfg)


@pytest.fixture(scope='session')
def predict_chunk(cfg):
  """The jitted unified mode: f(params, obs, text, key)."""
  return jax.jit(functools.partial(unified.predict_chunk, cfg=cfg))


@pytest.fixture(scope='session')
def make_inputs(cfg):
  """make_inputs(frames, seed) -> (Observation, Text) with random contents, B = 2."""

  def make(frames: int = 1, seed: int = 0):
    rng = np.random.default_rng(seed)
    model = cfg.model
    obs = Observation(
        frames=jnp.asarray(rng.integers(0, 256, (BATCH, VIEWS, frames, SIZE, SIZE, 3)), jnp.uint8),
        state=jnp.asarray(rng.standard_normal((BATCH, model.action_spec.dim)), jnp.float32),
        view_mask=jnp.ones((BATCH, VIEWS), bool))
    return obs, make_text(rng, BATCH, model.text)

  return make


def make_text(rng, rows: int, text: configs.TextConfig) -> Text:
  features = rng.standard_normal((rows, text.tokens, text.width))
  mask = np.arange(text.tokens) < rng.integers(1, text.tokens + 1, (rows, 1))
  return Text(features.astype(np.float32), mask)


@pytest.fixture(scope='session')
def env():
  return point_mass_env.make_env(VIEWS, SIZE)


@pytest.fixture(scope='session')
def captions(cfg) -> CaptionTable:
  text = make_text(np.random.default_rng(7), point_mass_env.NUM_CAPTIONS, cfg.model.text)
  return CaptionTable(text, np.array([1, 2, 2], np.int32))


@pytest.fixture(scope='session')
def side_cfg(cfg) -> configs.ExperimentConfig:
  """`cfg` with a language side."""
  return tiny_language.make_config(cfg)


@pytest.fixture(scope='session')
def side_params(side_cfg, params) -> InferenceParams:
  return tiny_language.make_params(side_cfg, params, tiny_language.make_layout())


@pytest.fixture
def own_cache():
  """Puts back what a `Programs` with a folder changes for the whole process."""
  names = ('dir', 'min_compile_time_secs', 'min_entry_size_bytes')
  names = [f'jax_compilation_cache_{n}' if n == 'dir' else f'jax_persistent_cache_{n}'
           for n in names]
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
