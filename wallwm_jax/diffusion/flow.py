"""Rectified-flow noising and the conversions between what a network predicts and what a solver
needs.

x_t = (1 - t) x_0 + t eps; velocity v = eps - x_0. A network predicts either v or x_0; both are
trained through the same velocity loss or, for x-prediction, directly on x_0. Source: WALL-WM (arXiv
2606.01955).
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

Prediction = Literal['v', 'x']

# Below this noise level x_t and x_0 agree, and (x_t - x_0) / t would amplify rounding.
MIN_SIGMA = 0.02


def expand(t, like):
  """`t` with trailing singleton axes up to the rank of `like`."""
  return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def add_noise(x0, eps, t):
  """x_t of the linear path; t has the leading axes of x0."""
  t = expand(t, x0)
  return (1.0 - t) * x0 + t * eps


def target(x0, eps, prediction: Prediction):
  """What the network is regressed on: eps - x_0 for 'v', x_0 for 'x'."""
  return eps - x0 if prediction == 'v' else x0


def to_velocity(out, x_t, t, prediction: Prediction):
  """Velocity implied by a network output at noise level t (leading axes of x_t)."""
  if prediction == 'v':
    return out
  return (x_t - out) / jnp.maximum(expand(t, x_t), MIN_SIGMA)


def to_x0(out, x_t, t, prediction: Prediction):
  """Clean-sample estimate implied by a network output at noise level t."""
  return x_t - expand(t, x_t) * out if prediction == 'v' else out
