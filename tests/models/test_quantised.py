"""Matrices in eight bits: bounds of the round trip, products, forms that do not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.models import quantised
from wallwm_jax.models.quantised import LARGEST, Quantised, as_leaves, matmul, pack
from wallwm_jax.types import CheckpointError, ConfigError

DTYPES = sorted(LARGEST)


def half_step(values, scale, dtype):
  """Largest error of a value quantised with `scale`: half a step of the number format there."""
  if dtype == 'int8':
    return scale / 2
  return np.maximum(np.abs(values) / 16, scale * 2.0**-10)  # 3 bits of mantissa; subnormals


def matrix(rng, inputs, out, outliers):
  w = rng.standard_normal((inputs, out)).astype(np.float32)
  for _ in range(outliers):
    w[rng.integers(inputs), rng.integers(out)] *= 1000
  return w


def scales(packed, inputs):
  blocks = packed['scale'].shape[-2]
  return np.repeat(np.asarray(packed['scale']), -(-inputs // blocks), axis=-2)[..., :inputs, :]


@settings(max_examples=40, deadline=None)
@given(
  st.sampled_from(DTYPES), st.integers(1, 70), st.integers(1, 9), st.integers(1, 80),
  st.integers(0, 3), st.integers(0, 2**31),
)  # fmt: skip
def test_round_trip_is_within_half_a_step(dtype, inputs, out, block, outliers, seed):
  w = matrix(np.random.default_rng(seed), inputs, out, outliers)
  packed = pack(w, dtype, block)
  assert packed['scale'].shape == (-(-inputs // block), out)
  back = np.asarray(Quantised(**packed).dequantised())
  bound = half_step(w, scales(packed, inputs), dtype)
  assert (np.abs(back - w) <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize('dtype', DTYPES)
def test_an_outlier_harms_its_own_block_alone(dtype):
  w = matrix(np.random.default_rng(0), 64, 4, 0)
  spoilt = w.copy()
  spoilt[40, 1] = 1e4
  clean, other = (np.asarray(pack(x, dtype, 16)['scale']) for x in (w, spoilt))
  assert np.argwhere(clean != other).tolist() == [[2, 1]]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('block', (None, 3))
def test_zero_blocks_and_zero_inputs_give_exact_zeros(dtype, block):
  w = np.ones((6, 2), np.float32)
  w[:, 0] = 0
  for smooth in (None, np.ones(6, np.float32)):
    packed = Quantised(**pack(w, dtype, block, smooth))
    assert np.asarray(packed.dequantised())[:, 0].tolist() == [0] * 6
    y = packed.matmul(jnp.stack([jnp.zeros(6), jnp.ones(6)]), jnp.float32)
    np.testing.assert_allclose(y, [[0, 0], [0, 6]], rtol=1e-6)


@pytest.mark.parametrize('dtype', DTYPES)
def test_the_largest_numbers_stay_finite(dtype):
  w = np.full((4, 2), np.float32(3e38))
  w[0] = 1e-45  # below what a scale can be
  assert np.isfinite(np.asarray(Quantised(**pack(w, dtype, 1)).dequantised())).all()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('block', (None, 8, 5))  # 5 does not divide the inputs
@pytest.mark.parametrize('inputs_too', (False, True))
def test_products_are_those_of_the_quantised_numbers(dtype, block, inputs_too):
  """Against the same numbers dequantised by hand and multiplied in float64."""
  rng = np.random.default_rng(1)
  w, x = matrix(rng, 16, 5, 1), rng.standard_normal((2, 3, 16)).astype(np.float32)
  smooth = rng.uniform(0.5, 2, 16).astype(np.float32) if inputs_too else None
  packed = pack(w, dtype, block, smooth)
  rows = x
  if inputs_too:  # every token is quantised as a column of a matrix is
    scaled = (x * smooth).reshape(6, 16).T
    tokens = pack(scaled, dtype, block)
    rows = np.asarray(Quantised(**tokens).dequantised()).T.reshape(x.shape)
  whole = np.asarray(Quantised(packed['q'], packed['scale']).dequantised(), np.float64)
  y = jax.jit(functools.partial(matmul, dtype=jnp.float32))(x, Quantised(**packed))
  np.testing.assert_allclose(y, rows.astype(np.float64) @ whole, rtol=1e-4, atol=1e-4)
  exact = x.astype(np.float64) @ w
  relative = np.linalg.norm(y - exact) / np.linalg.norm(exact)
  assert 0 < relative < (0.03 if dtype == 'int8' else 0.06)


def test_smoothing_takes_outlying_channels_of_the_inputs_out():
  rng = np.random.default_rng(2)
  w, x = matrix(rng, 32, 8, 0), rng.standard_normal((20, 32)).astype(np.float32)
  x[:, 3] *= 100
  w[3] /= 100  # as much as the others in the sum
  smooth = np.ones(32, np.float32)
  plain = Quantised(**pack(w, 'int8', None, smooth)).matmul(x, jnp.float32)
  smooth[3] = 0.01
  better = Quantised(**pack(w, 'int8', None, smooth)).matmul(x, jnp.float32)
  errors = [np.linalg.norm(np.asarray(y) - x @ w) for y in (plain, better)]
  assert errors[1] < errors[0] / 5


@pytest.mark.parametrize('dtype', DTYPES)
def test_what_is_not_a_number_stays_that(dtype):
  packed = Quantised(**pack(np.ones((4, 2), np.float32), dtype, None, np.ones(4, np.float32)))
  x = jnp.array([[1, jnp.nan, 1, 1], [1, jnp.inf, 1, 1], [1, 1, 1, 1.0]])
  y = packed.matmul(x, jnp.float32)
  assert np.isnan(np.asarray(y[:2])).all() and np.isfinite(np.asarray(y[2])).all()


def test_stacks_are_packed_layer_by_layer_and_vmap():
  w = np.random.default_rng(3).standard_normal((3, 8, 4)).astype(np.float32)
  packed = pack(w, 'int8', 4)
  one = pack(w[1], 'int8', 4)
  jax.tree.map(lambda stack, x: np.testing.assert_array_equal(stack[1], x), packed, one)
  x = jnp.ones((3, 2, 8))
  y = jax.vmap(lambda x, k: matmul(x, k, jnp.float32))(x, Quantised(**packed))
  np.testing.assert_allclose(y[1], matmul(x[1], Quantised(**one), jnp.float32), rtol=1e-6)


@pytest.mark.parametrize('args', (('int4', None), ('int8', 0)))
def test_unknown_forms_are_refused(args):
  with pytest.raises(ConfigError, match='expected a dtype of'):
    pack(np.ones((2, 2)), *args)


@pytest.mark.parametrize(
  'spoil',
  (
    lambda p: {k: x for k, x in p.items() if k != 'scale'},
    lambda p: p | {'zero': p['scale']},
    lambda p: p | {'scale': p['scale'][..., :-1]},
    lambda p: p | {'scale': p['scale'].astype(jnp.bfloat16)},
    lambda p: p | {'q': p['q'].astype(jnp.int16)},
    lambda p: p | {'smooth': p['smooth'][:, :-1]},
    lambda p: p | {'q': p['q'][0]},
  ),
)
def test_parts_that_do_not_fit_are_refused_by_name(spoil):
  packed = pack(np.ones((2, 8, 4), np.float32), 'int8', 4, np.ones((2, 8), np.float32))
  tree = {'video': {'blocks': {'q': {'kernel': packed}, 'o': {'kernel': packed['q']}}}}
  assert isinstance(as_leaves(tree)['video']['blocks']['q']['kernel'], Quantised)
  tree['video']['blocks']['q']['kernel'] = spoil(packed)
  with pytest.raises(CheckpointError, match='video/blocks/q/kernel'):
    as_leaves(tree)


def test_a_module_named_q_is_no_matrix():
  assert not quantised.is_packed({'q': {'kernel': np.ones((2, 2))}, 'scale': np.ones(2)})
