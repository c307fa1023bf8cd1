"""Noise levels: Wan's timestep shift, the solvers' schedules and the anchor level."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wallwm_jax.config import DiffusionConfig
from wallwm_jax.types import ConfigError, PRNGKey

Grid = Literal['uniform', 'wan', 'diffusers_unipc', 'diffusers_euler']
TRAIN_STEPS = 1000  # timesteps of a public checkpoint's training; timestep = 1000 * sigma
UNIT_GAP = 1e-6  # least distance of a level from 1, where the log signal-to-noise ratio ends


class Schedule(NamedTuple):
  """What a solver steps through.

  sigmas: [S + 1] float32 noise levels, descending. levels: [S] float32 levels that the network is
  told at each step; they differ from `sigmas` where timesteps are whole numbers.
  """

  sigmas: np.ndarray
  levels: np.ndarray


def shift_sigma(sigma, shift: float):
  """Wan's shift s * sigma / (1 + (s - 1) * sigma); maps [0, 1] onto itself."""
  return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def shifted_sigmas(num_steps: int, shift: float) -> np.ndarray:
  """[num_steps + 1] float32 noise levels from 1 down to 0, uniform before the shift."""
  grid = 1.0 - np.arange(num_steps + 1, dtype=np.float64) / num_steps
  return shift_sigma(grid, shift).astype(np.float32)


def solver_sigmas(grid: Grid, steps: int, shift: float) -> Schedule:
  """The schedule of `steps` calls of the network from (almost) pure noise down to level 0.

  Grids, all shifted by `shift`:
    uniform: 1 - i / S, this project's own; levels are the sigmas.
    wan: S of the S + 1 points from 0.999 to 0, as Wan's own code has it; whole timesteps.
    diffusers_unipc: S of the S + 1 points from 1 to 0.001, the first lowered by 1e-6 where it is 1,
      as `UniPCMultistepScheduler` has it with flow sigmas; whole timesteps.
    diffusers_euler: S points from 1 to the shifted 0.001, shifted again, then 0, as
      `FlowMatchEulerDiscreteScheduler` has it; levels are the sigmas.

  Raises:
    ConfigError: an unknown grid, less than one step or a shift that is not positive.
  """
  if grid not in get_args(Grid):
    raise ConfigError(f'grid: expected one of {get_args(Grid)}, got {grid!r}.')
  if steps < 1 or shift <= 0:
    raise ConfigError(
      f'solver schedule: expected steps >= 1 and shift > 0, got steps={steps}, shift={shift}.'
    )
  if grid == 'uniform':
    sigmas = shifted_sigmas(steps, shift)
    return Schedule(sigmas, sigmas[:-1])
  lowest = 1 / TRAIN_STEPS
  if grid == 'diffusers_euler':
    last = float(np.float32(shift_sigma(np.float32(lowest), np.float32(shift))))
    sigmas = shift_sigma(np.linspace(1.0, last, steps), shift)
    return Schedule(np.append(sigmas, 0).astype(np.float32), sigmas.astype(np.float32))
  # Wan's code keeps 0.999 in float32, a hair above: truncated timesteps depend on it.
  ends = (float(np.float32(1 - lowest)), 0.0) if grid == 'wan' else (1.0, lowest)
  sigmas = shift_sigma(np.linspace(*ends, steps + 1)[:-1], shift)
  if abs(sigmas[0] - 1) < UNIT_GAP:
    sigmas[0] -= UNIT_GAP
  levels = np.trunc(sigmas * TRAIN_STEPS) / TRAIN_STEPS
  return Schedule(np.append(sigmas, 0).astype(np.float32), levels.astype(np.float32))


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
