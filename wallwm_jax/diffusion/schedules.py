"""Noise levels: Wan's timestep shift, the solver schedule and the anchor level."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wallwm_jax.config import DiffusionConfig
from wallwm_jax.types import PRNGKey


def shift_sigma(sigma, shift: float):
  """Wan's shift s * sigma / (1 + (s - 1) * sigma); maps [0, 1] onto itself."""
  return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def shifted_sigmas(num_steps: int, shift: float) -> np.ndarray:
  """[num_steps + 1] float32 noise levels from 1 down to 0, uniform before the shift."""
  grid = 1.0 - np.arange(num_steps + 1, dtype=np.float64) / num_steps
  return shift_sigma(grid, shift).astype(np.float32)


def anchor_sigma(config: DiffusionConfig) -> float:
  """Noise level of the anchor step s* in the shifted schedule."""
  return float(shifted_sigmas(config.num_steps, config.shift)[config.anchor_step])


def sigmas_to_anchor(config: DiffusionConfig, steps: int) -> np.ndarray:
  """[steps + 1] levels from 1 down to the anchor's, uniform before the shift; [anchor] when steps
  is 0.
  """
  grid = np.linspace(1.0, 1.0 - config.anchor_step / config.num_steps, steps + 1)
  return (
    shift_sigma(grid, config.shift).astype(np.float32)
    if steps
    else np.float32([anchor_sigma(config)])
  )


def sample_sigma(key: PRNGKey, shape: tuple[int, ...], shift: float) -> Float[Array, '...']:
  """Training noise levels: uniform on (0, 1), then shifted."""
  return shift_sigma(jax.random.uniform(key, shape, minval=1e-4, maxval=1.0), shift)


def sample_anchor_sigma(
  key: PRNGKey, shape: tuple[int, ...], config: DiffusionConfig
) -> Float[Array, '...']:
  """Anchor level with its training jitter, kept inside [0, 1]."""
  jitter = jax.random.uniform(key, shape, minval=-config.anchor_jitter, maxval=config.anchor_jitter)
  return jnp.clip(anchor_sigma(config) + jitter, 0.0, 1.0)


def caption_drop_rate(raw_length, ramp: tuple[float, float, int, int]):
  """rho(L): rho_min up to L_min raw frames, cosine ramp to rho_max at L_max, then flat."""
  low, high, start, end = ramp
  phase = jnp.clip((raw_length - start) / (end - start), 0.0, 1.0)
  return low + (high - low) * 0.5 * (1.0 - jnp.cos(jnp.pi * phase))
