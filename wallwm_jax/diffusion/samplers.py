"""Deterministic flow solvers as fixed-length scans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax.diffusion.schedules import UNIT_GAP, Schedule
from wallwm_jax.types import ConfigError

Solver = Literal['euler', 'unipc']


def euler(velocity: Callable, x, sigmas):
  """x integrated along dx/dsigma = velocity(x, sigma) through `sigmas` [S + 1] (descending), S
  Euler steps.

  velocity(x, sigma scalar float32) must return an array like x. With S = 0, x comes back unchanged.
  """
  return integrate(lambda x, sigma, _: velocity(x, sigma), x, Schedule(sigmas, sigmas[:-1]))


def integrate(velocity: Callable, x, schedule: Schedule, solver: Solver = 'euler'):
  """x integrated along dx/dsigma = velocity through `schedule`, one call of it per step.

  Args:
    velocity: velocity(x, sigma, level) -> array like x; sigma is the noise level of x, level the
      one to tell the network (scalars, float32).
    x: float32 array at level schedule.sigmas[0].
    solver: 'euler', or 'unipc': UniPC of order 2 (B2(h), data prediction), first order in the first
      and the last step.

  Raises:
    ConfigError: an unknown solver.
  """
  return _scan(velocity, x, schedule, solver, keep=False)[0]


def trajectory(velocity: Callable, x, schedule: Schedule, solver: Solver = 'euler'):
  """[S + 1, *x.shape]: x, then the sample each step of `integrate` hands to the next."""
  return jnp.concatenate([x[None], _scan(velocity, x, schedule, solver, keep=True)[1]])


def _scan(velocity, x, schedule: Schedule, solver: Solver, keep: bool):
  if solver not in get_args(Solver):
    raise ConfigError(f'solver: expected one of {get_args(Solver)}, got {solver!r}.')
  sigmas, levels = (jnp.asarray(s, jnp.float32) for s in schedule)
  rows = jnp.diff(sigmas) if solver == 'euler' else jnp.asarray(unipc_coefficients(schedule.sigmas))
  advance = _euler_step if solver == 'euler' else _unipc_step
  nothing = jnp.zeros_like(x)
  memory = () if solver == 'euler' else (nothing, nothing, nothing)

  def step(carry, inputs):
    (x, memory), (row, sigma, level) = carry, inputs
    x, memory = advance(x, velocity(x, sigma, level), sigma, row, memory)
    return (x, memory), x if keep else None

  (x, _), path = jax.lax.scan(step, (x, memory), (rows, sigmas[:-1], levels))
  return x, path


def _euler_step(x, v, sigma, row, memory):
  return x + row * v, memory


def _unipc_step(x, v, sigma, row, memory):
  """One corrector of x from what came before, then one predictor.

  memory: corrected sample of the step before, data predictions of the last two steps. row: as in
  `unipc_coefficients`.
  """
  last, m1, m2 = memory
  m = x - sigma * v
  x = row[0] * x + row[1] * last + row[2] * m + row[3] * m1 + row[4] * m2
  ahead = row[5] * x + row[6] * m + row[7] * m1
  return ahead, (x, m, m1)


def unipc_coefficients(sigmas) -> np.ndarray:
  """[S, 8] float32 weights of one UniPC step through `sigmas` [S + 1].

  With m_i the data prediction at step i, x_i the predicted and y_i the corrected sample:
    y_i = w0 x_i + w1 y_{i-1} + w2 m_i + w3 m_{i-1} + w4 m_{i-2}
    x_{i+1} = w5 y_i + w6 m_i + w7 m_{i-1}
  Tables are made in float64 from the float32 levels; a level of 1 is taken as 1 - 1e-6.

  Source: UniPC (arXiv 2302.04867), its second B(h) and data prediction, for alpha = 1 - sigma.
  """
  sigmas = np.asarray(sigmas, np.float32).astype(np.float64)
  sigmas = np.minimum(sigmas, 1 - UNIT_GAP)
  with np.errstate(divide='ignore'):
    lambdas = np.log1p(-sigmas) - np.log(sigmas)  # +inf at level 0
  steps = len(sigmas) - 1
  rows = np.zeros((steps, 8))
  for i in range(steps):
    rows[i, 0] = 1.0
    if i > 0:
      rows[i, :5] = 0.0, *_corrector(sigmas, lambdas, i, _order(i - 1, steps))
    rows[i, 5:] = _predictor(sigmas, lambdas, i, _order(i, steps))
  return rows.astype(np.float32)


def _order(i: int, steps: int) -> int:
  return 1 if i in (0, steps - 1) else 2


def _predictor(sigmas, lambdas, i: int, order: int) -> tuple[float, float, float]:
  """Weights of y_i, m_i and m_{i-1} in x_{i+1}."""
  alpha, h = 1 - sigmas[i + 1], lambdas[i + 1] - lambdas[i]
  phi = np.expm1(-h)
  slope = 0.0
  if order == 2:
    slope = alpha * phi * 0.5 * h / (lambdas[i - 1] - lambdas[i])
  return sigmas[i + 1] / sigmas[i], -alpha * phi + slope, -slope


def _corrector(sigmas, lambdas, i: int, order: int) -> tuple[float, float, float, float]:
  """Weights of y_{i-1}, m_i, m_{i-1} and m_{i-2} in y_i."""
  alpha, h = 1 - sigmas[i], lambdas[i] - lambdas[i - 1]
  phi = np.expm1(-h)
  older, newest = 0.0, 0.5
  if order == 2:
    r = (lambdas[i - 2] - lambdas[i - 1]) / h
    second = phi / -h - 1
    third = second / -h - 0.5
    rho, newest = np.linalg.solve([[1, 1], [r, 1]], [second / phi, 2 * third / phi])
    older = rho / r
  scale = alpha * phi
  return sigmas[i] / sigmas[i - 1], -scale * newest, -scale * (1 - older - newest), -scale * older
