"""Muon as an optax transformation: parity with optax, closed forms, states and shardings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from wallwm_jax.config import MeshConfig
from wallwm_jax.optim.muon import MuonState, muon
from wallwm_jax.optim.newton_schulz import NewtonSchulz, coefficients, orthogonalize
from wallwm_jax.parallel import rules
from wallwm_jax.parallel.mesh import make_mesh

BFLOAT16 = NewtonSchulz(coefficients('polar_express', 5))
FLOAT32 = NewtonSchulz(coefficients('polar_express', 5), 'float32')
exact = jax.jit(functools.partial(orthogonalize, how=FLOAT32))


def stacks(seed, wide=(3, 16, 40), square=(3, 24, 24)):
  """A tree of two stacks of matrices at paths of the model."""
  keys = jax.random.split(jax.random.key(seed))
  up, q = jax.random.normal(keys[0], wide), jax.random.normal(keys[1], square)
  return {'video': {'blocks': {'ffn': {'up': {'kernel': up}}, 'self_attn': {'q': {'kernel': q}}}}}


def train(optimizer, state, steps, target_seed=1):
  """Quadratic fit of stacks(0) to another tree; returns the parameters after `steps` updates."""
  target = stacks(target_seed)

  @jax.jit
  def step(params, state):
    grads = jax.tree.map(lambda p, t: p - t, params, target)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = stacks(0)
  state = optimizer.init(params) if state is None else state(optimizer.init(params))
  for _ in range(steps):
    params, state = step(params, state)
  return params


def without_bias_correction(state):
  """optax's Muon state as after very many steps, where its bias correction is 1."""
  inner = dict(state.inner_states)
  first, *rest = inner['muon'].inner_state
  first = first._replace(count=jnp.asarray(100_000, jnp.int32))
  return state._replace(
      inner_states=inner | {'muon': inner['muon']._replace(inner_state=(first, *rest))})


@pytest.mark.parametrize('name,norm,scale,nesterov', [
    ('jordan', 'frobenius', 'rms', True), ('you', 'frobenius', 'jordan', False),
    ('jordan', 'schatten4', 'rms', True)])
def test_agrees_with_optax_over_30_steps(name, norm, scale, nesterov):
  numbers = jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 2), stacks(0))
  theirs = optax.contrib.muon(
      0.02, coefficients('jordan', 1)[0] if name == 'jordan' else coefficients(name, 5),
      weight_decay=0.1, nesterov=nesterov, muon_weight_dimension_numbers=numbers,
      preconditioning={'schatten4': 'schatten'}.get(norm, norm),
      consistent_rms=0.2 if scale == 'rms' else None)
  ours = muon(0.02, NewtonSchulz(coefficients(name, 5), 'float32', norm), nesterov=nesterov,
              update_scale=scale, weight_decay=0.1)
  expected = train(theirs, without_bias_correction, 30)
  got = train(ours, None, 30)
  start = stacks(0)
  for a, b, s in zip(*map(jax.tree.leaves, (got, expected, start)), strict=True):
    assert np.abs(a - s).max() > 0.1  # it went somewhere
    np.testing.assert_allclose(a, b, atol=5e-6)


def test_first_update_in_closed_form():
  params, grads = stacks(0), stacks(1)
  optimizer = muon(0.1, FLOAT32, momentum=0.9, nesterov=True, weight_decay=0.3)
  updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  for p, g, u in zip(*map(jax.tree.leaves, (params, grads, updates)), strict=True):
    scale = 0.2 * np.sqrt(max(g.shape[-2:]))
    np.testing.assert_allclose(u, -0.1 * (scale * exact(g) + 0.3 * p), atol=1e-5)


def test_second_momentum_in_closed_form_with_and_without_nesterov():
  first, second = stacks(1), stacks(2)
  for nesterov in (True, False):
    optimizer = muon(1.0, FLOAT32, momentum=0.8, nesterov=nesterov)
    state = optimizer.init(stacks(0))
    update = jax.jit(optimizer.update)
    _, state = update(first, state, stacks(0))
    updates, _ = update(second, state, stacks(0))
    for g1, g2, u in zip(*map(jax.tree.leaves, (first, second, updates)), strict=True):
      # Heavy-ball momentum: the factor 1 - momentum does not matter to the orthogonal factor.
      heavy_ball = 0.8 * g1 + g2
      direction = g2 + 0.8 * heavy_ball if nesterov else heavy_ball
      scale = 0.2 * np.sqrt(max(g1.shape[-2:]))
      np.testing.assert_allclose(u, -scale * exact(direction), atol=1e-4)


def test_zero_gradient_leaves_only_weight_decay():
  params = stacks(0)
  optimizer = muon(0.1, BFLOAT16, weight_decay=0.2)
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  current = params
  for _ in range(4):
    updates, state = update(jax.tree.map(jnp.zeros_like, params), state, current)
    current = optax.apply_updates(current, updates)
  for a, b in zip(jax.tree.leaves(current), jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(a, (1 - 0.1 * 0.2) ** 4 * b, rtol=1e-5)


@pytest.mark.parametrize('scale,factor', [
    ('rms', lambda m, n: 0.2 * np.sqrt(max(m, n))),
    ('jordan', lambda m, n: np.sqrt(max(1, n / m))),
    ('spectral', lambda m, n: np.sqrt(n / m))])
@pytest.mark.parametrize('shape', [(2, 16, 64), (2, 64, 16)])
def test_update_scale(scale, factor, shape):
  grads = {'kernel': jax.random.normal(jax.random.key(0), shape)}
  optimizer = muon(1.0, FLOAT32, update_scale=scale)
  updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(grads), grads)
  norm = np.linalg.norm(updates['kernel'], ord=2, axis=(1, 2))
  np.testing.assert_allclose(norm, factor(*shape[1:]), rtol=0.15)
  if scale == 'rms':
    rms = np.sqrt(np.mean(np.square(updates['kernel'])))
    assert 0.17 < rms < 0.23


def test_nan_stays_in_its_matrix():
  params, grads = stacks(0), stacks(1)
  grads['video']['blocks']['ffn']['up']['kernel'] = (
      grads['video']['blocks']['ffn']['up']['kernel'].at[1, 0, 0].set(jnp.nan))
  optimizer = muon(0.1, BFLOAT16, weight_decay=0.1)
  updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  blocks = updates['video']['blocks']
  assert np.isfinite(blocks['self_attn']['q']['kernel']).all()
  finite = np.isfinite(blocks['ffn']['up']['kernel']).all((1, 2))
  assert finite.tolist() == [True, False, True]


def test_init_from_shapes_and_state_contents():
  optimizer = muon(0.1, BFLOAT16)
  shapes = jax.eval_shape(lambda: stacks(0))
  state = jax.eval_shape(optimizer.init, shapes)
  assert isinstance(state[0], MuonState) and state[0]._fields == ('mu',)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state[0].mu) == jax.tree.map(
      lambda x: (x.shape, x.dtype), shapes)
  direct = optimizer.init(shapes)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(direct[0].mu))


@pytest.mark.parametrize('config', [MeshConfig(fsdp=8), MeshConfig(replica=2, fsdp=2, tensor=2)])
def test_sharded_equals_unsharded(config):
  mesh = make_mesh(config)
  optimizer = muon(0.02, FLOAT32, weight_decay=0.1)
  expected = train(optimizer, None, 10)
  params, target = stacks(0), stacks(1)
  placed = rules.param_shardings(params, mesh, config.rules)
  state_placed = rules.param_shardings(
      jax.eval_shape(optimizer.init, params), mesh, config.rules)
  params, target = jax.device_put(params, placed), jax.device_put(target, placed)
  state = jax.jit(optimizer.init, out_shardings=state_placed)(params)

  def step(params, state):
    grads = jax.tree.map(lambda p, t: p - t, params, target)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, out_shardings=(placed, state_placed))
  for _ in range(10):
    params, state = step(params, state)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)
  assert jax.tree.map(lambda x: x.sharding, state[0].mu) == placed
  q = params['video']['blocks']['self_attn']['q']['kernel']
  assert q.sharding.shard_shape(q.shape)[1] == 24 // config.fsdp
