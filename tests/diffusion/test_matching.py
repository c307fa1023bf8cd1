"""Distribution matching where both scores are known: Gaussians, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax.diffusion import matching


def posterior(z, t, mean, std):
  """E[x_0 | z] for x_0 ~ N(mean, std^2) and z = (1 - t) x_0 + t eps."""
  gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
  return mean + gain * (z - (1 - t) * mean)


def test_gradient_by_a_linear_generator_is_the_closed_form():
  rng = np.random.default_rng(0)
  noise, eps = rng.standard_normal((2, 5, 3, 4))
  weight, t = rng.standard_normal((4, 4)), rng.uniform(0.1, 0.9, (5, 1, 1))
  mask = rng.random((5, 3, 1)) < 0.7
  mask[:, 0] = True

  def loss(weight):
    sample = jnp.asarray(noise, jnp.float32) @ weight
    z = jax.lax.stop_gradient((1 - t) * sample + t * eps)
    real, fake = posterior(z, t, 0.5, 1.2), posterior(z, t, -0.3, 0.4)
    return matching.matching_loss(sample, real, fake, mask)

  got = jax.grad(loss)(jnp.asarray(weight, jnp.float32))
  sample = noise @ weight
  z = (1 - t) * sample + t * eps
  real, fake = posterior(z, t, 0.5, 1.2), posterior(z, t, -0.3, 0.4)
  inside = np.broadcast_to(mask, sample.shape)
  expected = np.zeros((4, 4))
  for b in range(5):
    scale = np.abs(sample - real)[b][inside[b]].mean()
    direction = np.where(inside[b], (fake - real)[b] / scale, 0)
    expected += noise[b].T @ direction / inside.sum()
  np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-6)


def test_an_affine_generator_ends_at_the_distribution_of_the_teacher():
  mean, std = 0.7, 0.5

  def step(carry, key):
    shift, scale = carry
    noise, eps, levels = (jax.random.normal(k, (256, 1)) for k in jax.random.split(key, 3))
    t = 0.02 + 0.96 * jax.scipy.stats.norm.cdf(levels)

    def loss(shift, scale):
      sample = shift + scale * noise
      z, s, d = jax.lax.stop_gradient(((1 - t) * sample + t * eps, shift, scale))
      return matching.matching_loss(
        sample, posterior(z, t, mean, std), posterior(z, t, s, d), jnp.ones((256, 1), bool))

    gradient = jax.grad(loss, (0, 1))(shift, scale)
    return (shift - 0.02 * gradient[0], scale - 0.02 * gradient[1]), None

  start = (jnp.float32(-1.0), jnp.float32(1.5))
  (shift, scale), _ = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 1500))
  np.testing.assert_allclose([shift, scale], [mean, std], atol=0.03)


def test_masked_cells_have_neither_value_nor_gradient():
  sample, real = jnp.ones((2, 3)), jnp.zeros((2, 3))
  fake = jnp.array([[1.0, jnp.nan, 1.0], [1.0, 1.0, jnp.inf]])
  mask = jnp.array([[True, False, True], [True, True, False]])
  loss, gradient = jax.value_and_grad(matching.matching_loss)(sample, real, fake, mask)
  assert loss == 0.5
  np.testing.assert_allclose(gradient, mask / 4.0)
  nowhere = matching.matching_gradient(sample, real, real + 1, jnp.zeros((2, 3), bool))
  assert (nowhere == 0).all()
