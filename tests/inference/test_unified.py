"""Unified mode: the history window."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from wallwm_jax.inference import denoiser, unified
from wallwm_jax.inference.denoiser import Window
from wallwm_jax.inference.event import predict_event
from wallwm_jax.types import DataError

KEY = jax.random.key(3)


def test_shapes(params, make_inputs, predict_chunk):
  obs, text = make_inputs(frames=5)
  out = predict_chunk(params, obs, text, KEY)
  assert out.chunk.actions.shape == (2, 8, 10) and bool(out.chunk.mask.all())
  assert out.latents.shape == (2, 2, 3, 2, 2, 12) and out.mask.shape == (2, 3)


def test_history_is_read(params, make_inputs, predict_chunk):
  obs, text = make_inputs(frames=5)
  other = dataclasses.replace(obs, frames=obs.frames.at[:, :, :1].set(0))
  a, b = (predict_chunk(params, x, text, KEY).chunk.actions for x in (obs, other))
  assert np.abs(a - b).max() > 1e-4


def test_without_history_a_chunk_is_an_event(cfg, make_params, make_inputs):
  """One denoiser: with M = 0 both modes are the same function."""
  cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, history=0))
  params = make_params(cfg)
  obs, text = make_inputs()
  chunk = jax.jit(functools.partial(unified.predict_chunk, cfg=cfg))(params, obs, text, KEY)
  event = jax.jit(functools.partial(predict_event, cfg=cfg, bucket=2))(params, obs, text, KEY)
  jax.tree.map(np.testing.assert_array_equal, chunk, event)


def test_history_is_encoded_once_with_the_anchor(cfg, params, make_inputs):
  """1 + 4M raw frames give M + 1 clean latents in one codec call."""
  obs, text = make_inputs(frames=5)
  cond = denoiser.encode_observation(params, obs, text, cfg=cfg, window=Window.chunk(cfg))
  assert cond.known.shape == (2, 2, 2, 2, 2, 12)
  with pytest.raises(DataError, match='chunk window'):
    unified.predict_chunk(params, make_inputs(frames=1)[0], text, KEY, cfg=cfg)
