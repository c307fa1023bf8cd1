"""Distribution matching: a gradient for generated samples, from two denoisers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from wallwm_jax.diffusion import losses

_LEAST = 1e-6  # of the normaliser: a sample that the teacher would not change


def matching_gradient(
  sample: Float[Array, 'B ...'],
  real: Float[Array, 'B ...'],
  fake: Float[Array, 'B ...'],
  mask: Bool[Array, 'B ...'],
) -> Float[Array, 'B ...']:
  """Direction in which each sample is less likely to be the teacher's, 0 outside `mask`.

  (fake - real) / mean |sample - real|, the mean over the True entries of each sample. On the linear
  path the score at level t is ((1 - t) x_0 - z_t) / t^2, so the difference of two scores is that of
  the clean estimates up to a factor of t, which the normaliser takes the place of.

  Args:
    sample: generated clean samples. real, fake: clean estimates that the teacher and the denoiser
      of generated samples make of the same noised sample. mask: broadcastable.

  Source: DMD (arXiv 2311.18828), eqs. 7 and 8.
  """
  mask = jnp.broadcast_to(mask, sample.shape)
  axes = tuple(range(1, sample.ndim))
  distance = jnp.where(mask, jnp.abs(sample - real), 0.0).sum(axes, keepdims=True)
  scale = distance / jnp.maximum(mask.sum(axes, keepdims=True), 1)
  return jnp.where(mask, fake - real, 0.0) / jnp.maximum(scale, _LEAST)


def matching_loss(sample, real, fake, mask) -> Float[Array, '']:
  """A number whose gradient by `sample` is `matching_gradient` / (number of True entries).

  Its value, half the mean square of that gradient, says how far the two denoisers are apart.
  """
  gradient = matching_gradient(sample, real, fake, mask)
  target = jax.lax.stop_gradient(sample - gradient)
  return 0.5 * losses.masked_mse(sample, target, mask)
