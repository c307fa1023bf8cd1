"""Unified mode: fixed-length chunks with a history window, and the sources of their text.

A text source is a pure function from `TextContext` to `Text`. The denoiser never learns which
source spoke, so a rollout may switch between them at any chunk; a source that answers with
language-model latents implements the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.inference import denoiser
from wallwm_jax.inference.denoiser import EventPrediction, Noise, Window
from wallwm_jax.types import InferenceParams, Observation, PRNGKey, Text, pytree_dataclass


@pytree_dataclass
class TextContext:
  """What a text source may read before chunk number `step`; obs and encoded texts have B = 1."""

  obs: Observation
  instruction: Text
  atomic: Text
  step: Int[Array, ""]


TextSource = Callable[[TextContext], Text]


def instruction_source(context: TextContext) -> Text:
  """Source 1: the global instruction, encoded once per rollout."""
  return context.instruction


def atomic_source(context: TextContext) -> Text:
  """Source 2: the atomic instruction (caption of the next event) of this chunk."""
  return context.atomic


def switched_source(sources: Sequence[TextSource], schedule: Int[Array, "S"]) -> TextSource:
  """The source `schedule` names at each step: indices into `sources`; the last one holds on."""
  schedule = jnp.asarray(schedule, jnp.int32)

  def source(context: TextContext) -> Text:
    index = schedule[jnp.minimum(context.step, schedule.shape[0] - 1)]
    return jax.lax.switch(index, list(sources), context)

  return source


def predict_chunk(params: InferenceParams, obs: Observation, text: Text, key: PRNGKey, *,
                  cfg: ExperimentConfig, noise: Noise | None = None) -> EventPrediction:
  """Predicts the next fixed-length chunk from a history window.

  Args:
    obs: frames [B, V, 1+4M, H, W, 3] uint8, the last one current (encoded together, so history has
      no seam); state [B, A] physical at the last frame; view_mask [B, V].
    text: features from any text source; key: used only where `noise` is None.

  Returns:
    Actions [B, 4N, A] relative to the current pose in physical units, and latents
    [B, V, 1+N, h, w, C] from the anchor on; M = config.model.history, N = config.model.future.

  Raises:
    DataError: inputs of the wrong shape or dtype.
  """
  window = Window.chunk(cfg)
  cond = denoiser.encode_observation(params, obs, text, cfg=cfg, window=window)
  if noise is None:
    noise = denoiser.sample_noise(key, cfg, obs.state.shape[0], window)
  return denoiser.predict(params, cond, noise, cfg=cfg, window=window)
