"""What the video model predicted of a filmed attempt, turn by turn."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax.commands.evaluators import VIDEO_STEPS
from wallwm_jax.config import ExperimentConfig
from wallwm_jax.inference import denoiser, sources
from wallwm_jax.inference.denoiser import Window
from wallwm_jax.inference.sources import CaptionTable
from wallwm_jax.types import InferenceParams, Observation, Text


def foresee(
  config: ExperimentConfig,
  params: InferenceParams,
  film: Sequence[np.ndarray],
  first: np.ndarray,
  asked: Sequence[int],
  captions: CaptionTable,
  seed: int = 0,
) -> np.ndarray | None:
  """Every turn of an attempt as the video tower imagines it from the frames seen when it began.

  The video tower reads frames and caption, not the state of the robot, so the film says all that it
  was given. A turn longer than its event ends with the last imagined frame.

  Args:
    film: executed frames [V, T, H, W, 3] uint8 of each turn; first: [V, 1, H, W, 3], seen before
      the first turn.
    asked: [n] row of `captions` that each turn went by.

  Returns:
    uint8 [V, T, H, W, 3] of all turns; None where a turn went by something that is no caption.
  """
  if not asked or sources.NOTHING in asked:
    return None
  chunk = config.data.window == 'chunk'
  bucket = config.model.future if chunk else config.data.buckets[-1]
  rate, history = config.model.steps_per_latent, config.model.history if chunk else 0
  past = history * rate
  seen = np.concatenate([np.repeat(first, past + 1, axis=1), *film], axis=1)
  imagine = _imagine(config, bucket)
  lengths = np.full_like(captions.lengths, bucket) if chunk else captions.lengths
  parts, begun = [], 0
  for i, (row, turn) in enumerate(zip(asked, film, strict=True)):
    frames = seen[None, :, begun : begun + past + 1]
    begun += turn.shape[1]
    length = np.clip(lengths[row], 1, bucket)
    text = jax.tree.map(lambda x, row=row: np.asarray(x)[row : row + 1], captions.text)
    key = jax.random.fold_in(jax.random.key(seed), i)
    video = np.asarray(imagine(params, frames, text, key, length[None]))[0]
    # Frame 0 is the observation itself.
    shown = np.minimum(np.arange(1, turn.shape[1] + 1), int(length) * rate)
    parts.append(video[:, shown])
  return np.rint(255 * np.concatenate(parts, axis=1).clip(0, 1)).astype(np.uint8)


@functools.cache
def _imagine(config: ExperimentConfig, bucket: int):
  """(params, frames [1, V, T, H, W, 3], text, key, length [1]) -> [1, V, 1 + 4N, H, W, 3] in 0..1;
  equal arguments share one program."""
  chunk = config.data.window == 'chunk'
  window = Window.chunk(config) if chunk else Window.event(config, bucket)

  @jax.jit
  def run(params, frames, text: Text, key, length):
    state = jnp.asarray(params.norm.state_mean, jnp.float32)[None]
    obs = Observation(frames, state, jnp.ones(frames.shape[:2], bool))
    cond = denoiser.encode_observation(params, obs, text, length, cfg=config, window=window)
    noise = denoiser.sample_noise(key, config, 1, window).video
    return denoiser.imagine(params, cond, noise, cfg=config, window=window, steps=VIDEO_STEPS)

  return run
