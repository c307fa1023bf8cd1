"""Frechet distance between predicted and true clips on a feature net of this project.

The net is a fixed random one: two space-time convolutions with seeded Gaussian weights, ReLU, and a
mean over space and time. It was trained on nothing. Its scores say whether two sets of clips have
alike colours, edges and small motions; they are no FVD and can be compared only with scores of the
same net (NAME), resolution and number of clips.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wallwm_jax.types import DataError

NAME = 'random-conv3d-v1'  # changes with everything below that changes a feature
SEED = 20_260_101
WIDTH = 16  # channels of both layers, features D of a clip
KERNELS = ((3, 5, 5), (3, 3, 3))  # frames, rows, columns; both with stride (1, 2, 2)


def frechet_distance(first, second) -> float:
  """Squared Frechet distance between Gaussians fitted to two sets of features.

  |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), covariances divided by n - 1.

  Args:
    first: [n, D]; second: [m, D]; n, m >= 2. Few samples bias the distance upwards.

  Raises:
    DataError: fewer than two samples, other widths, or features that are not finite.

  Source: Dowson & Landau (1982), "The Frechet distance between multivariate normal distributions".
  """
  sets = [np.asarray(x, np.float64) for x in (first, second)]
  fits = all(x.ndim == 2 and len(x) >= 2 and np.isfinite(x).all() for x in sets)
  if not fits or sets[0].shape[1] != sets[1].shape[1]:
    raise DataError(
      f'frechet_distance: expected finite features [n, D] and [m, D], n, m >= 2, got '
      f'{sets[0].shape} and {sets[1].shape}.'
    )
  means = [x.mean(0) for x in sets]
  a, b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in sets)
  values, vectors = np.linalg.eigh(a)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  # C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2).
  cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
  distance = np.sum((means[0] - means[1]) ** 2) + np.trace(a) + np.trace(b) - 2 * cross
  return float(max(distance, 0.0))


@jax.jit
def clip_features(clips: Float[Array, 'n T H W 3']) -> Float[Array, 'n D']:
  """Features of clips in 0..1 by the net NAME: D = WIDTH, float32."""
  x = 2 * clips - 1
  for kernel in _kernels():
    x = jax.lax.conv_general_dilated(
      x, kernel, (1, 2, 2), 'SAME', dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC')
    )
    x = jax.nn.relu(x)
  return jnp.mean(x, axis=(1, 2, 3))


@functools.cache
def _kernels() -> tuple[np.ndarray, ...]:
  rng, kernels, channels = np.random.default_rng(SEED), [], 3
  for size in KERNELS:
    scale = np.sqrt(2 / (np.prod(size) * channels))
    weights = rng.normal(0, scale, (*size, channels, WIDTH))
    kernels.append(weights.astype(np.float32))
    channels = WIDTH
  return tuple(kernels)
