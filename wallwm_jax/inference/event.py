"""Event mode: one caption in, one variable-length segment of video and actions out."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.inference import denoiser
from wallwm_jax.inference.denoiser import EventPrediction, Noise, Window
from wallwm_jax.types import ActionChunk, InferenceParams, Observation, PRNGKey, Text


def predict_event(params: InferenceParams, obs: Observation, text: Text, key: PRNGKey, *,
                  cfg: ExperimentConfig, bucket: int, length: Int[Array, "B"] | None = None,
                  committed: ActionChunk | None = None,
                  noise: Noise | None = None) -> EventPrediction:
  """Predicts the event that `text` names, from what the robot sees now.

  Args:
    obs: frames [B, V, 1, H, W, 3] uint8, state [B, A] physical, view_mask [B, V].
    text: caption features; key: used only where `noise` is None.
    bucket: N, future latents of the window (static).
    length: [B] future latents of each event, 1..N; None = N.
    committed: actions that are being executed already, see `denoiser.encode_observation`.

  Returns:
    Actions [B, 4N, A] relative to the current pose in physical units, and the imagined latents
    [B, V, 1+N, h, w, C].

  Raises:
    ConfigError: bucket outside 1..max_future. DataError: inputs of the wrong shape or dtype.
  """
  window = Window.event(cfg, bucket)
  cond = denoiser.encode_observation(params, obs, text, length, committed, cfg=cfg, window=window)
  if noise is None:
    noise = denoiser.sample_noise(key, cfg, obs.state.shape[0], window)
  return denoiser.predict(params, cond, noise, cfg=cfg, window=window)


def predict_video(params: InferenceParams, obs: Observation, text: Text, key: PRNGKey, *,
                  cfg: ExperimentConfig, bucket: int, length: Int[Array, "B"] | None = None,
                  steps: int = 20) -> Float[Array, "B V T H W 3"]:
  """The event as frames [B, V, 1+4N, H, W, 3] float32 in [0, 1], denoised to level 0.

  `steps` Euler steps; frames after the given length (4 per latent) are padding. Other arguments
  and errors as in `predict_event`.
  """
  window = Window.event(cfg, bucket)
  cond = denoiser.encode_observation(params, obs, text, length, cfg=cfg, window=window)
  noise = denoiser.sample_noise(key, cfg, obs.state.shape[0], window).video
  return denoiser.imagine(params, cond, noise, cfg=cfg, window=window, steps=steps)
