"""A tiny experiment and a tiny event store; everything a training test needs in a second or two."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from wallwm_jax import config as c
from wallwm_jax.data.schema import Calibration, EpisodeRecord, EventSpan
from wallwm_jax.data.store import EpisodeStoreWriter
from wallwm_jax.models import language
from wallwm_jax.types import Frozen, Language, NormStats, Prompt, PromptLayout

VIEWS = ('front', 'side')
SIZE = (16, 32)


def tiny_config(stage: str = '1', window: str = 'event', store: str = '', **sections):
  """Smallest config every stage and every mesh of eight devices accepts; float32 throughout.

  `sections` replace fields of a section: diffusion={'tube_prob': 0.5}, train={'steps': 4}, ...
  """
  base = c.ExperimentConfig(
    name='tiny',
    model=c.ModelConfig(
      video=c.VideoConfig(width=32, layers=2, heads=2, ffn=32, freq_dim=32),
      action=c.ActionConfig(width=32, heads=2, ffn=32, freq_dim=32),
      codec=c.CodecConfig(channels=8),
      text=c.TextConfig(tokens=4, width=8),
      views=VIEWS,
      image_size=SIZE,
      history=1,
      future=2,
      max_future=2,
    ),
    diffusion=c.DiffusionConfig(action_draws=2),
    data=c.DataConfig(store=store, batch_size=8, buckets=(2,), window=window, threads=1),
    optim=c.OptimConfig(warmup_steps=2, ns_dtype='float32'),
    train=c.TrainConfig(stage=stage, steps=4, log_every=2, checkpoint_every=100, ema=0.99),
  )
  return override(base, **sections)


def tiny_language(
  stage: str, window: str = 'event', store: str = '', weights: str = '', **sections
):
  """`tiny_config` with the smallest language side; tokenizers of up to 320 ids fit."""
  reader = c.QwenConfig(
    vocab=320,
    width=32,
    ffn=32,
    layer_types=('linear',),
    heads=2,
    kv_heads=2,
    head_dim=16,
    linear_key_heads=2,
    linear_value_heads=2,
    linear_key_dim=16,
    linear_value_dim=16,
    rotary=0.5,
    mrope_section=(2, 1, 1),
    rope_theta=100.0,
    vision=c.VisionTowerConfig(layers=0),
    image_token=5,
    video_token=6,
    dtype='float32',
    weights=weights and f'{weights}/reader',
  )
  vision = c.VisionTowerConfig(
    layers=1, width=32, heads=2, ffn=32, patch=4, temporal=1, positions=16
  )
  vlm = dataclasses.replace(
    reader,
    layer_types=('linear', 'full'),
    vision=vision,
    weights=weights and f'{weights}/vlm',
  )
  language = c.LanguageConfig(
    kind='qwen',
    vlm=vlm,
    reader=reader,
    staircase=c.StaircaseConfig(latents=3, relay_depth=1),
    heads=c.HeadsConfig(width=32, heads=2),
    prompt_tokens=40,
    answer_tokens=12,
    trace_tokens=20,
  )
  base = dataclasses.replace(tiny_config('1', window, store), language=language)
  sections['train'] = {'stage': stage} | sections.get('train', {})
  return override(base, **sections)


def frozen_language(config) -> Frozen:
  """`frozen` with a random VLM and reader, a layout for the config's fake prompts, a bank of 5."""
  keys, side = jax.random.split(jax.random.key(7), 3), config.language
  size = side.prompt_tokens
  tokens = language.tokens_per_view(side, config.model.image_size)
  images = len(config.model.views) * tokens
  view = np.where(np.arange(size) < images, np.arange(size) // tokens, -1)
  layout = PromptLayout(
    positions=np.broadcast_to(np.arange(size, dtype=np.int32), (3, size)).copy(),
    view=view.astype(np.int32),
    channels=np.array([0, 1], np.int32),
    slots=np.array([[images, images + 1], [images + 2, images + 3]], np.int32),
    digits=np.arange(10, 20, dtype=np.int32),
    opening=np.array([20, 21], np.int32),
  )
  bank = np.asarray(jax.random.normal(keys[2], (5, config.model.text.width)))
  vlm, reader = language.init_qwen(side.vlm, keys[0]), language.init_qwen(side.reader, keys[1])
  answers = np.random.default_rng(0).integers(20, 99, (5, side.answer_tokens), np.int32)
  told = Language(vlm, reader, layout, bank, Prompt(answers, np.ones_like(answers, bool)))
  return Frozen(unit_norm(config), language=told)


def override(config, **sections):
  """`config` with fields of some sections replaced."""
  new = {
    name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()
  }
  return dataclasses.replace(config, **new)


def unit_norm(config) -> NormStats:
  """Statistics that change nothing."""
  a, channels = config.model.action_spec.dim, config.model.codec.channels
  return NormStats(*(np.full(n, value, np.float32) for n in (a, a, channels) for value in (0, 1)))


def frozen(config) -> Frozen:
  """`unit_norm` and a codec without weights."""
  return Frozen(unit_norm(config))


def episode(index: int, frames: int = 24) -> EpisodeRecord:
  """A bright square that moves as the arm does, two events long."""
  rng = np.random.default_rng(index)
  path = np.cumsum(rng.normal(0, 0.02, (frames, 3)), 0).astype(np.float32)
  identity = np.tile(np.float32([1, 0, 0, 0, 1, 0]), (frames, 1))
  grip = np.linspace(0, 1, frames, dtype=np.float32)[:, None]
  state = np.concatenate([path, identity, grip], 1)
  pixels = rng.integers(0, 60, (len(VIEWS), frames, *SIZE, 3), dtype=np.uint8)
  for t in range(frames):
    column = int(np.clip(16 + 100 * path[t, 0], 0, 27))
    pixels[:, t, 4:10, column : column + 4] = 255
  intrinsics = np.float32([[32, 0, 16], [0, 32, 8], [0, 0, 1]])
  cameras = {view: Calibration(intrinsics, np.eye(4, dtype=np.float32)) for view in VIEWS}
  half = frames // 2
  return EpisodeRecord(
    episode_id=f'episode-{index}',
    source='synthetic',
    fps=10.0,
    views=VIEWS,
    frames=dict(zip(VIEWS, pixels, strict=True)),
    state=state,
    actions=np.roll(state, -1, 0),
    events=(
      EventSpan(0, half, 'go', {'L1': 'go there', 'L3': 'wander'}),
      EventSpan(half - 1, frames, 'come', {'L1': 'come back', 'L3': 'wander'}),
    ),
    calibration=cameras,
  )


def write_store(path: pathlib.Path, episodes: int = 6) -> str:
  with EpisodeStoreWriter(path, heldout=0.0) as writer:
    for index in range(episodes):
      writer.add(episode(index))
  return str(path)


@pytest.fixture(scope='session')
def store(tmp_path_factory) -> str:
  """Path of a store of six episodes, twelve events."""
  return write_store(tmp_path_factory.mktemp('store') / 'events')


@pytest.fixture(scope='session')
def tiny():
  """This module's helpers, for tests: tiny.config, tiny.override, tiny.norm, tiny.frozen,
  tiny.write_store.
  """
  class Tiny:
    config = staticmethod(tiny_config)
    language = staticmethod(tiny_language)
    frozen_language = staticmethod(frozen_language)
    override = staticmethod(override)
    norm = staticmethod(unit_norm)
    frozen = staticmethod(frozen)
    write_store = staticmethod(write_store)

  return Tiny
