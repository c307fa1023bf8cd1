"""Newton-Schulz against the float64 polar factor, over scales, and on bad matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.optim.newton_schulz import NewtonSchulz, coefficients, orthogonalize
from wallwm_jax.types import ConfigError

run = jax.jit(orthogonalize, static_argnums=1)


def spectrum(rng, rows, columns, values):
  """A float32 matrix with the given singular values, and its float64 polar factor."""
  u, _ = np.linalg.qr(rng.normal(size=(rows, len(values))))
  v, _ = np.linalg.qr(rng.normal(size=(columns, len(values))))
  return ((u * values) @ v.T).astype(np.float32), u @ v.T


def settings(name='polar_express', dtype='bfloat16', norm='schatten4'):
  return NewtonSchulz(coefficients(name, 5), dtype, norm)


# Largest singular value and relative polar error that each set may leave on well-spread spectra.
@pytest.mark.parametrize('name,highest,error', [
    ('jordan', 1.21, 0.30), ('you', 1.16, 0.24), ('polar_express', 1.15, 0.14)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', [(64, 64), (48, 160), (160, 48)])
def test_singular_values_are_near_one_and_vectors_are_kept(name, highest, error, dtype, shape):
  rng = np.random.default_rng(0)
  values = 1 / np.arange(1, min(shape) + 1)
  x, polar = spectrum(rng, *shape, values)
  out = np.float64(run(x, settings(name, dtype)))
  singular = np.linalg.svd(out, compute_uv=False)
  assert singular.max() < highest and singular.min() > 0.6
  assert np.linalg.norm(out - polar) / np.sqrt(min(shape)) < error


def test_schatten_norm_lifts_small_singular_values_more_than_frobenius():
  values = np.concatenate([np.full(32, 1.0), np.full(96, 0.002)])  # spikes over a floor
  x, polar = spectrum(np.random.default_rng(1), 128, 128, values)
  errors = {
      norm: np.linalg.norm(run(x, settings(dtype='float32', norm=norm)) - polar) / np.sqrt(128)
      for norm in ('schatten4', 'frobenius')}
  assert errors['schatten4'] < 0.8 * errors['frobenius']


def test_matches_the_polynomial_applied_to_singular_values():
  """float32, Frobenius: every singular value must have gone through the five polynomials."""
  rng = np.random.default_rng(2)
  values = rng.uniform(0.05, 1, 24)
  u, _ = np.linalg.qr(rng.normal(size=(24, 24)))
  v, _ = np.linalg.qr(rng.normal(size=(40, 24)))
  mapped = values / np.linalg.norm(values)
  for a, b, c in coefficients('you', 5):
    mapped = a * mapped + b * mapped**3 + c * mapped**5
  out = run(((u * values) @ v.T).astype(np.float32), settings('you', 'float32', 'frobenius'))
  np.testing.assert_allclose(out, (u * mapped) @ v.T, atol=2e-5)


def test_polar_express_is_evaluated_at_a_safe_distance():
  for (a, b, c), (raw_a, raw_b, raw_c) in zip(
      coefficients('polar_express', 5),
      ((8.287212, -23.595887, 17.300387), (4.107059, -2.947850, 0.544843),
       (3.948691, -2.908902, 0.551819), (3.318420, -2.488488, 0.510049),
       (2.300652, -1.668904, 0.418807)), strict=True):
    s = 0.7
    scaled = s / 1.05
    np.testing.assert_allclose(a * s + b * s**3 + c * s**5,
                               raw_a * scaled + raw_b * scaled**3 + raw_c * scaled**5, rtol=1e-12)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('norm', ['schatten4', 'frobenius'])
def test_independent_of_scale(dtype, norm):
  x = np.random.default_rng(3).normal(size=(24, 32)).astype(np.float32)
  how = settings(dtype=dtype, norm=norm)
  reference = np.asarray(run(x, how))
  for scale in (2.0**-100, 2.0**-40, 2.0**40, 2.0**100):
    np.testing.assert_array_equal(run(x * np.float32(scale), how), reference)
  np.testing.assert_allclose(run(x * 1e-15, how), reference, atol=2e-2)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_zero_stays_zero_and_nan_stays_in_its_matrix(dtype):
  x = np.random.default_rng(4).normal(size=(2, 3, 20, 16)).astype(np.float32)
  clean = np.asarray(run(x, settings(dtype=dtype)))
  x[0, 1] = 0
  x[1, 2, 3, 4] = np.nan
  x[0, 2, 0, 0] = np.inf
  out = np.asarray(run(x, settings(dtype=dtype)))
  assert (out[0, 1] == 0).all()
  assert np.isnan(out[1, 2]).all() and np.isnan(out[0, 2]).any()
  for index in ((0, 0), (1, 0), (1, 1)):
    np.testing.assert_allclose(out[index], clean[index], atol=1e-6)


def test_a_stack_is_its_matrices_one_by_one_and_transposition_commutes():
  x = np.random.default_rng(5).normal(size=(3, 20, 36)).astype(np.float32)
  how = settings(dtype='float32')
  stacked = run(x, how)
  for i in range(3):
    np.testing.assert_allclose(stacked[i], run(x[i], how), atol=1e-5)
  np.testing.assert_allclose(run(x.swapaxes(-1, -2), how).swapaxes(-1, -2), stacked, atol=1e-5)
  assert stacked.dtype == jnp.float32


def test_bad_settings_are_refused():
  assert len(coefficients('jordan', 3)) == 3
  with pytest.raises(ConfigError, match="'polar_expres'. Did you mean 'polar_express'"):
    coefficients('polar_expres', 5)
  with pytest.raises(ConfigError, match="'you' defines 5 steps, got 4"):
    coefficients('you', 4)
  with pytest.raises(ConfigError, match="'jordan' defines 1 or more steps, got 0"):
    coefficients('jordan', 0)
