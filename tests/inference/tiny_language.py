"""The language side of the tiny model: a VLM, a reader, heads and a staircase, all random."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax import config as configs
from wallwm_jax.models import language as door
from wallwm_jax.types import InferenceParams, Language, Prompt, PromptLayout

VOCAB, IMAGE, END = 64, 60, 62
VIEW_TOKENS, STATE_SLOT, PROMPT, ANSWER, TRACE = 4, 8, 18, 5, 7
PLANS = 2  # captions that it chooses among


def make_config(cfg) -> configs.ExperimentConfig:
  vlm = configs.QwenConfig(
    vocab=VOCAB, width=32, ffn=48, layer_types=('linear', 'full') * 2, heads=2, kv_heads=1,
    head_dim=16, linear_key_heads=1, linear_value_heads=2, linear_key_dim=8, linear_value_dim=8,
    rope_theta=1e3, rotary=0.5, mrope_section=(2, 1, 1), image_token=IMAGE, video_token=61,
    vision=configs.VisionTowerConfig(layers=1, width=16, heads=2, ffn=24, patch=4, positions=16),
    dtype='float32',
  )  # fmt: skip
  reader = dataclasses.replace(
    vlm, layer_types=('linear', 'full'), vision=configs.VisionTowerConfig(layers=0)
  )
  side = configs.LanguageConfig(
    kind='qwen', vlm=vlm, reader=reader, heads=configs.HeadsConfig(width=16, heads=2),
    staircase=configs.StaircaseConfig(latents=3, relay_depth=2), prompt_tokens=PROMPT,
    answer_tokens=ANSWER, trace_tokens=TRACE,
  )  # fmt: skip
  return dataclasses.replace(cfg, language=side)


def make_layout() -> PromptLayout:
  """Two cameras of 2 x 2 tokens, then two channels of the state, then the instruction."""
  text = np.arange(PROMPT) - 2 * (VIEW_TOKENS - 2)
  positions = np.stack([text] * 3)
  for view in range(2):
    own = slice(VIEW_TOKENS * view, VIEW_TOKENS * (view + 1))
    positions[:, own] = 2 * view + np.array([[0] * 4, [0, 0, 1, 1], [0, 1, 0, 1]])
  return PromptLayout(
    positions=positions.astype(np.int32),
    view=np.repeat([0, 1, -1], [VIEW_TOKENS, VIEW_TOKENS, PROMPT - 2 * VIEW_TOKENS]),
    channels=np.array([0, 1]),
    slots=STATE_SLOT + np.arange(4).reshape(2, 2),
    digits=np.arange(10) + 40,
    opening=np.array([1, 2]),
  )


def make_params(side_cfg, params, layout) -> InferenceParams:
  """Random everywhere: fresh heads say that no row of text exists."""
  c, text, rng = side_cfg.language, side_cfg.model.text, np.random.default_rng(0)
  key = jax.random.key(0)

  def random(init, *args):
    shapes = jax.eval_shape(lambda: init(*args, key))
    return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), shapes)

  vlm, reader = random(door.init_qwen, c.vlm), random(door.init_qwen, c.reader)
  model = params.model | {
    'heads': random(door.init_heads, c, text),
    'projector': random(door.init_projector, c),
    'staircase': random(door.init_staircase, c, vlm),
  }
  bank = rng.standard_normal((PLANS, text.width)).astype(np.float32)
  answers = random_tokens(PLANS, np.arange(PLANS) % 3 + 2, c.answer_tokens, 1)
  side = Language(vlm, reader, layout, bank, answers)
  frozen = dataclasses.replace(params.frozen, language=side)
  return jax.tree.map(jnp.asarray, InferenceParams(model, frozen))


def random_tokens(rows: int, lengths, size: int, seed: int) -> Prompt:
  """Rows of ordinary tokens, padded behind."""
  ids = np.random.default_rng(seed).integers(0, 40, (rows, size)).astype(np.int32)
  return Prompt(ids, np.arange(size) < np.asarray(lengths)[:, None])
