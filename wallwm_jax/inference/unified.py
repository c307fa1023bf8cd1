"""Unified mode: fixed-length chunks with a history window, told by any source of text."""

from __future__ import annotations

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.inference import denoiser
from wallwm_jax.inference.denoiser import EventPrediction, Noise, Window
from wallwm_jax.types import ActionChunk, InferenceParams, Observation, PRNGKey, Text


def predict_chunk(params: InferenceParams, obs: Observation, text: Text, key: PRNGKey, *,
                  cfg: ExperimentConfig, committed: ActionChunk | None = None,
                  noise: Noise | None = None) -> EventPrediction:
  """Predicts the next fixed-length chunk from a history window.

  Args:
    obs: frames [B, V, 1+4M, H, W, 3] uint8, the last one current (encoded together, so history has
      no seam); state [B, A] physical at the last frame; view_mask [B, V].
    text: features from any text source; key: used only where `noise` is None.
    committed: actions that are being executed already, see `denoiser.encode_observation`.

  Returns:
    Actions [B, 4N, A] relative to the current pose in physical units, and latents
    [B, V, 1+N, h, w, C] from the anchor on; M = config.model.history, N = config.model.future.

  Raises:
    DataError: inputs of the wrong shape or dtype.
  """
  window = Window.chunk(cfg)
  cond = denoiser.encode_observation(
      params, obs, text, committed=committed, cfg=cfg, window=window)
  if noise is None:
    noise = denoiser.sample_noise(key, cfg, obs.state.shape[0], window)
  return denoiser.predict(params, cond, noise, cfg=cfg, window=window)
