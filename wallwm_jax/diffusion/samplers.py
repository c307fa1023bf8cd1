"""Deterministic flow solvers as fixed-length scans."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def euler(velocity: Callable, x, sigmas):
  """x integrated along dx/dsigma = velocity(x, sigma) through `sigmas` [S + 1] (descending), S
  Euler steps.

  velocity(x, sigma scalar float32) must return an array like x. With S = 0, x comes back unchanged.
  """
  sigmas = jnp.asarray(sigmas, jnp.float32)

  def step(x, pair):
    sigma, sigma_next = pair
    return x + (sigma_next - sigma) * velocity(x, sigma), None

  x, _ = jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))
  return x
