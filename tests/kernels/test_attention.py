"""Every attention backend and the reference against a float64 NumPy softmax, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from wallwm_jax.kernels.attention import api, reference, xla
from wallwm_jax.types import ConfigError

IMPLEMENTATIONS = {
    'reference': lambda q, k, v, mask=None, bias=None: reference.attention(q, k, v, mask, bias),
    **{name: lambda q, k, v, mask=None, bias=None, name=name: api.dot_product_attention(
        q, k, v, mask=mask, bias=bias, implementation=name) for name in api._BACKENDS},
}
every_implementation = pytest.mark.parametrize('name', IMPLEMENTATIONS)


def numpy_attention(q, k, v, mask=None, bias=None):
  """float64, one query at a time over its visible keys only."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
  mask = np.broadcast_to(True if mask is None else mask, full)
  bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, np.float64), full)
  out = np.zeros_like(q)
  for b, h, i in np.ndindex(full[:3]):
    keys = np.flatnonzero(mask[b, h, i] & (bias[b, h, i] > -np.inf))
    if len(keys):
      logits = k[b, keys, h] @ q[b, i, h] / np.sqrt(q.shape[-1]) + bias[b, h, i, keys]
      weights = np.exp(logits - logits.max())
      out[b, i, h] = weights @ v[b, keys, h] / weights.sum()
  return out


def inputs(seed, batch=2, queries=5, keys=7, heads=2, width=8, dtype=np.float32):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(batch, queries, heads, width))
  k, v = rng.normal(size=(2, batch, keys, heads, width))
  return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def masked(seed, shape, density=0.6):
  return np.random.default_rng(seed).random(shape) < density


@every_implementation
@pytest.mark.parametrize('mask_shape', [None, (2, 1, 1, 7), (1, 2, 5, 1), (5, 7), (2, 2, 5, 7)])
def test_float32_matches_numpy(name, mask_shape):
  q, k, v = inputs(0)
  mask = None if mask_shape is None else masked(1, mask_shape)
  bias = np.random.default_rng(2).normal(size=(1, 2, 5, 7)).astype(np.float32)
  for b in (None, bias):
    got = IMPLEMENTATIONS[name](q, k, v, mask=mask, bias=b)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, numpy_attention(q, k, v, mask, b), atol=3e-6)


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 13), st.integers(1, 3),
       st.sampled_from([1, 3, 16]), st.integers(0, 1000))
def test_odd_shapes(batch, queries, keys, heads, width, seed):
  q, k, v = inputs(seed, batch, queries, keys, heads, width)
  mask = masked(seed, (batch, 1, queries, keys))
  got = api.dot_product_attention(q, k, v, mask=mask)
  np.testing.assert_allclose(got, numpy_attention(q, k, v, mask), atol=1e-5)


@every_implementation
def test_bfloat16_stays_within_its_rounding(name):
  q, k, v = inputs(3, queries=33, keys=65, width=32, dtype=jnp.bfloat16)
  got = IMPLEMENTATIONS[name](q, k, v, mask=masked(4, (2, 1, 33, 65)))
  assert got.dtype == jnp.bfloat16
  expected = numpy_attention(q, k, v, masked(4, (2, 1, 33, 65)))
  np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=2e-2)


@every_implementation
def test_gradients_match_finite_differences(name):
  q, k, v = inputs(5, batch=1, queries=3, keys=4, width=4)
  mask = masked(6, (1, 2, 3, 4))
  mask[0, 0, 1] = False
  weight = np.random.default_rng(7).normal(size=q.shape)

  def loss(*args):
    return (IMPLEMENTATIONS[name](*args, mask=mask) * weight).sum()

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
  operands = [np.asarray(x, np.float64) for x in (q, k, v)]
  for which, gradient in enumerate(gradients):
    for index in np.ndindex(*gradient.shape):
      ends = []
      for step in (1e-5, -1e-5):
        moved = [x.copy() for x in operands]
        moved[which][index] += step
        ends.append((numpy_attention(*moved, mask) * weight).sum())
      np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / 2e-5, atol=2e-5)


@every_implementation
@pytest.mark.parametrize('hide', ['mask', 'bias'])
def test_fully_masked_rows_are_zero_with_finite_gradients(name, hide):
  q, k, v = inputs(8)
  visible = masked(9, (2, 2, 5, 7))
  visible[1, 0, 2] = False
  visible[0, :, 4] = False
  hidden = {'mask': visible} if hide == 'mask' else {
      'bias': np.where(visible, 0.0, -np.inf).astype(np.float32)}

  def run(q, k, v):
    out = IMPLEMENTATIONS[name](q, k, v, **hidden)
    return (out**2).sum(), out

  gradients, out = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  assert (np.asarray(out)[1, 2, 0] == 0).all() and (np.asarray(out)[0, 4] == 0).all()
  assert all(np.isfinite(g).all() for g in gradients)
  assert (np.asarray(gradients[0])[0, 4] == 0).all()
  np.testing.assert_allclose(out, numpy_attention(q, k, v, visible), atol=3e-6)


@every_implementation
def test_large_logits_do_not_overflow(name):
  q, k, v = inputs(10)
  out = IMPLEMENTATIONS[name](q * 1e4, k, v)
  np.testing.assert_allclose(out, numpy_attention(q * 1e4, k, v), atol=1e-3)


def test_masked_keys_do_not_leak_even_if_huge():
  q, k, v = inputs(11)
  mask = np.ones((2, 1, 1, 7), bool)
  mask[..., 3] = False
  clean = api.dot_product_attention(q, k, v, mask=mask)
  poisoned = api.dot_product_attention(q, k.at[:, 3].set(1e6), v.at[:, 3].set(1e6), mask=mask)
  np.testing.assert_array_equal(clean, poisoned)


def test_backends_that_decline_are_skipped(monkeypatch):
  def declines(*_):
    raise NotImplementedError('only on another platform')

  q, k, v = inputs(12)
  expected = api.dot_product_attention(q, k, v)
  monkeypatch.setattr(api, '_BACKENDS', {'picky': declines, **api._BACKENDS})
  np.testing.assert_array_equal(api.dot_product_attention(q, k, v), expected)
  with pytest.raises(NotImplementedError, match='another platform'):
    api.dot_product_attention(q, k, v, implementation='picky')


def test_calls_that_make_no_sense_are_refused():
  q, k, v = inputs(13)
  with pytest.raises(ConfigError, match='one dtype'):
    api.dot_product_attention(q, k.astype(jnp.bfloat16), v)
  with pytest.raises(ConfigError, match=r'got q \(2, 5, 2, 8\)'):
    api.dot_product_attention(q, k[:, :, :1], v[:, :, :1])
  with pytest.raises(ConfigError, match='mask of shape'):
    api.dot_product_attention(q, k, v, mask=np.ones((3, 1, 1, 7), bool))
  with pytest.raises(ConfigError, match='mask must be bool'):
    api.dot_product_attention(q, k, v, mask=np.ones((2, 1, 1, 7), np.float32))
  with pytest.raises(ConfigError, match="'xla'.*got 'cuda'"):
    api.dot_product_attention(q, k, v, implementation='cuda')


@pytest.mark.parametrize('queries', [24, 23])
@pytest.mark.parametrize('mask_shape', [(2, 1, 1, 7), (1, 2, -1, 7), (-1, 7), (2, 1, -1, 1)])
@pytest.mark.parametrize('bias_queries', [1, -1])
def test_blocks_of_queries_change_nothing(monkeypatch, queries, mask_shape, bias_queries):
  """Long sequences take the same values and gradients block by block, padded blocks included."""
  q, k, v = inputs(14, queries=queries)
  rng = np.random.default_rng(15)
  mask = rng.random([queries if n == -1 else n for n in mask_shape]) < 0.6
  if mask.shape[-2] > 1:
    mask[..., 4, :] = False
  bias = rng.normal(size=(1, 2, queries if bias_queries == -1 else 1, 7)).astype(np.float32)
  weight = rng.normal(size=q.shape)

  def loss(q, k, v, bias):
    out = xla.attention(q, k, v, mask, bias)
    return (out * weight).sum(), out

  plain, whole = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, bias)
  monkeypatch.setattr(xla, '_LONG', 1)
  monkeypatch.setattr(xla, '_BLOCK', 5)
  gradient = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
  assert f'[2,2,{queries},7]' not in str(jax.make_jaxpr(gradient)(q, k, v, bias))
  got, blocks = gradient(q, k, v, bias)
  np.testing.assert_allclose(blocks, whole, atol=2e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, plain)
  if mask.shape[-2] > 1:
    hidden = np.broadcast_to(~mask.any(-1), (2, 2, queries)).swapaxes(1, 2)
    assert hidden.any() and not np.asarray(blocks)[hidden].any()


@pytest.mark.parametrize('axis', ['batch', 'tokens', 'heads'])
def test_blocks_of_queries_stay_split_over_devices(monkeypatch, axis):
  """Eight devices get the values and gradients of one, each for its own queries."""
  monkeypatch.setattr(xla, '_LONG', 1)
  monkeypatch.setattr(xla, '_BLOCK', 8)
  rng = np.random.default_rng(16)
  q, k, v, weight = (rng.normal(size=(8, 64, 8, 4)).astype(np.float32) for _ in range(4))
  mesh = jax.make_mesh((8,), (axis,), axis_types=(AxisType.Auto,))
  split = [axis if name == axis else None for name in ('batch', 'tokens', 'heads')]
  place = NamedSharding(mesh, PartitionSpec(*split))

  def loss(q, k, v):
    out = xla.attention(q, k, v, None, None)
    return (out * weight).sum(), out

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
  sharded = jax.jit(
      jax.grad(loss, argnums=(0, 1, 2), has_aux=True), in_shardings=place, out_shardings=place)
  expected, got = gradient(q, k, v), sharded(*jax.device_put((q, k, v), place))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)
