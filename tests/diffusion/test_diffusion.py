"""Schedules, flow conversions, losses and the Euler solver against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.config import DiffusionConfig
from wallwm_jax.diffusion import flow, losses, samplers, schedules


def test_shifted_schedule_matches_the_formula():
  sigmas = schedules.shifted_sigmas(50, 5.0)
  u = 1 - np.arange(51) / 50
  np.testing.assert_allclose(sigmas, 5 * u / (1 + 4 * u), rtol=1e-6)
  assert sigmas[0] == 1 and sigmas[-1] == 0 and np.all(np.diff(sigmas) < 0)


def test_anchor_level_of_the_defaults():
  # Step 45 of 50: u = 0.1, so sigma = 0.5 / 1.4.
  assert schedules.anchor_sigma(DiffusionConfig()) == pytest.approx(0.5 / 1.4, rel=1e-6)


@given(steps=st.integers(1, 12), anchor=st.integers(0, 49))
@settings(max_examples=30, deadline=None)
def test_solver_grid_ends_at_the_anchor(steps, anchor):
  config = DiffusionConfig(anchor_step=anchor)
  grid = schedules.sigmas_to_anchor(config, steps)
  assert grid.shape == (steps + 1,) and grid[0] == 1
  assert grid[-1] == pytest.approx(schedules.anchor_sigma(config), abs=1e-6)


def test_solver_grid_without_steps_is_the_anchor_alone():
  config = DiffusionConfig(anchor_step=10)
  np.testing.assert_allclose(
    schedules.sigmas_to_anchor(config, 0), [schedules.anchor_sigma(config)]
  )


def test_training_levels_stay_in_range_and_follow_the_shift():
  sigma = schedules.sample_sigma(jax.random.key(0), (20_000,), 5.0)
  assert 0 < sigma.min() and sigma.max() <= 1
  # The median of the shifted uniform is shift(1/2) = 2.5 / 3.
  assert np.median(sigma) == pytest.approx(2.5 / 3, abs=0.01)


def test_caption_drop_ramp():
  rate = schedules.caption_drop_rate(
    jnp.array([1, 129, 150, 175, 200, 220, 999]), (0.1, 0.9, 129, 220)
  )
  np.testing.assert_allclose(rate, [0.1, 0.1, 0.20, 0.51, 0.81, 0.9, 0.9], atol=0.006)


@pytest.mark.parametrize('prediction', ['v', 'x'])
def test_conversions_recover_truth(prediction):
  key_x, key_e = jax.random.split(jax.random.key(1))
  x0, eps = jax.random.normal(key_x, (4, 3, 2)), jax.random.normal(key_e, (4, 3, 2))
  t = jnp.array([0.1, 0.4, 0.7, 1.0])
  x_t = flow.add_noise(x0, eps, t)
  out = flow.target(x0, eps, prediction)
  np.testing.assert_allclose(flow.to_x0(out, x_t, t, prediction), x0, atol=1e-5)
  np.testing.assert_allclose(flow.to_velocity(out, x_t, t, prediction), eps - x0, atol=1e-5)


def test_dct_matrix_is_scipys():
  x = np.random.default_rng(0).standard_normal((16, 3))
  np.testing.assert_allclose(
    losses.dct_matrix(16) @ x, scipy.fft.dct(x, axis=0, norm='ortho'), atol=1e-5
  )


def test_dct_loss_closed_form():
  rng = np.random.default_rng(1)
  pred, true = rng.standard_normal((2, 3, 8, 4)), rng.standard_normal((2, 1, 8, 4))
  t = rng.uniform(size=(2, 3))
  spectrum = scipy.fft.dct(pred - true, axis=2, norm='ortho')
  weight = np.exp(-np.arange(8) / 2.0)[None, None, :, None]
  expected = np.mean((1 - t) ** 2 * (weight * spectrum**2).sum((2, 3)) / 4)
  got = losses.dct_action_loss(jnp.float32(pred), jnp.float32(true), True, jnp.float32(t))
  assert float(got) == pytest.approx(expected, rel=1e-5)


def test_masked_values_reach_neither_loss_nor_gradient():
  x = jnp.array([1.0, jnp.nan, 3.0])
  weight = jnp.array([1.0, 0.0, 2.0])
  value, grad = jax.value_and_grad(lambda x: losses.masked_mse(x, jnp.zeros(3), weight))(x)
  assert float(value) == pytest.approx((1 + 18) / 3)
  np.testing.assert_allclose(grad, [2 / 3, 0, 4.0], rtol=1e-6)


def test_nothing_weighted_is_zero_not_nan():
  assert float(losses.masked_mse(jnp.ones(3), jnp.zeros(3), jnp.zeros(3))) == 0


def test_euler_is_exact_on_a_straight_path():
  x0, eps = jnp.float32([1.0, -2.0]), jnp.float32([0.5, 3.0])
  out = samplers.euler(lambda x, s: eps - x0, eps, schedules.shifted_sigmas(7, 3.0))
  np.testing.assert_allclose(out, x0, atol=1e-6)
