"""Masked regression losses and the Type-II DCT action loss."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import scipy.fft


def masked_mean(values, weight):
  """sum(values * weight) / sum(weight) over all axes, 0 where nothing is weighted; weight
  broadcasts.
  """
  weight = jnp.broadcast_to(weight, values.shape).astype(jnp.float32)
  # `where` rather than a product: a masked NaN or inf must not reach the sum or its gradient.
  total = jnp.sum(jnp.where(weight > 0, values.astype(jnp.float32), 0.0) * weight)
  return total / jnp.maximum(jnp.sum(weight), 1e-6)


def masked_mse(prediction, target, weight):
  """Weighted mean squared error in float32."""
  safe = jnp.where(weight > 0, prediction.astype(jnp.float32) - target.astype(jnp.float32), 0.0)
  return masked_mean(jnp.square(safe), weight)


def dct_matrix(size: int) -> np.ndarray:
  """[size, size] float32 orthonormal Type-II DCT; row j is frequency j."""
  return scipy.fft.dct(np.eye(size), axis=0, norm='ortho').astype(np.float32)


def dct_action_loss(prediction, target, mask, t, exists=None):
  """(1 - t)^2 * sum_j exp(-j / (K/4)) ||DCT(prediction)_j - DCT(target)_j||^2, mean over draws and
  channels.

  Args:
    prediction, target: x_0 estimate and truth, [B, R, K, A] and broadcastable.
    mask: [B, R, K, A] or broadcastable; masked steps contribute no difference.
    t: [B, R] noise level in [0, 1]. exists: [B], samples that the mean is over; None = all.

  Source: WALL-WM (arXiv 2606.01955), Type-II DCT loss.
  """
  difference = jnp.where(mask, prediction - target, 0.0).astype(jnp.float32)
  steps = difference.shape[-2]
  spectrum = jnp.einsum('jk,brka->brja', dct_matrix(steps), difference)
  decay = jnp.exp(-jnp.arange(steps) / (steps / 4.0))
  per_draw = jnp.einsum('j,brja->br', decay, jnp.square(spectrum)) / difference.shape[-1]
  loss = jnp.square(1.0 - t) * per_draw
  return jnp.mean(loss) if exists is None else masked_mean(loss, exists[:, None])
