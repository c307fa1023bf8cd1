"""Muon as an optax transformation: parity with optax, closed forms, views, composition, states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from wallwm_jax.config import MeshConfig
from wallwm_jax.optim.matrices import Matrix
from wallwm_jax.optim.muon import MuonState, muon, scale_by_muon
from wallwm_jax.optim.newton_schulz import NewtonSchulz, coefficients, orthogonalize
from wallwm_jax.optim.plan import make_plan
from wallwm_jax.parallel import rules
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.types import ConfigError

BFLOAT16 = NewtonSchulz(coefficients('polar_express', 5))
FLOAT32 = NewtonSchulz(coefficients('polar_express', 5), 'float32')
exact = jax.jit(functools.partial(orthogonalize, how=FLOAT32))


def stacks(seed, wide=(3, 16, 40), square=(3, 24, 24)):
  """A tree of two stacks of matrices at paths of the model."""
  keys = jax.random.split(jax.random.key(seed))
  up, q = jax.random.normal(keys[0], wide), jax.random.normal(keys[1], square)
  return {'video': {'blocks': {'ffn': {'up': {'kernel': up}}, 'self_attn': {'q': {'kernel': q}}}}}


def train(optimizer, steps, place=lambda tree: tree):
  """Noisy fit of stacks(0) to another tree; parameters and state after `steps` updates."""
  target = place(stacks(1))

  @jax.jit
  def step(params, state, noise):
    grads = jax.tree.map(lambda p, t, n: p - t + 2 * n, params, target, noise)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = place(stacks(0))
  state = optimizer.init(params)
  for i in range(steps):
    params, state = step(params, state, place(stacks(2 + i)))
  return params, state


def assert_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize(
  'name,norm,scale,nesterov,form',
  [
    ('jordan', 'frobenius', 'rms', True, 'direct'),
    ('you', 'frobenius', 'jordan', False, 'direct'),
    ('jordan', 'schatten4', 'jordan', True, 'direct'),
    ('polar_express', 'schatten4', 'rms', True, 'direct'),
    ('polar_express', 'schatten4', 'rms', True, 'gram'),
  ],
)
def test_agrees_with_optax_over_30_steps(name, norm, scale, nesterov, form):
  """Criterion N1."""
  numbers = jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 2), stacks(0))
  theirs = optax.contrib.muon(
    0.02,
    coefficients('jordan', 1)[0] if name == 'jordan' else coefficients(name, 5),
    weight_decay=0.1,
    nesterov=nesterov,
    muon_weight_dimension_numbers=numbers,
    preconditioning={'schatten4': 'schatten'}.get(norm, norm),
    consistent_rms=0.2 if scale == 'rms' else None,
  )
  ours = muon(
    0.02,
    NewtonSchulz(coefficients(name, 5), 'float32', norm, form),
    nesterov=nesterov,
    bias_correction=True,
    update_scale=scale,
    weight_decay=0.1,
  )
  expected, _ = train(theirs, 30)
  got, _ = train(ours, 30)
  start = stacks(0)
  for a, b, s in zip(*map(jax.tree.leaves, (got, expected, start)), strict=True):
    assert np.abs(a - s).max() > 0.1  # it went somewhere
    np.testing.assert_allclose(a, b, atol=5e-6)


def test_bias_correction_changes_the_first_steps():
  with_it, without = (train(muon(0.02, FLOAT32, bias_correction=on), 5)[0] for on in (True, False))
  for a, b in zip(*map(jax.tree.leaves, (with_it, without)), strict=True):
    assert np.abs(a - b).max() > 1e-3


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


@pytest.mark.parametrize(
  'scale,factor',
  [
    ('rms', lambda m, n: 0.2 * np.sqrt(max(m, n))),
    ('jordan', lambda m, n: np.sqrt(max(1, n / m))),
    ('spectral', lambda m, n: np.sqrt(n / m)),
  ],
)
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
    grads['video']['blocks']['ffn']['up']['kernel'].at[1, 0, 0].set(jnp.nan)
  )
  optimizer = muon(0.1, BFLOAT16, weight_decay=0.1)
  updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  blocks = updates['video']['blocks']
  assert np.isfinite(blocks['self_attn']['q']['kernel']).all()
  finite = np.isfinite(blocks['ffn']['up']['kernel']).all((1, 2))
  assert finite.tolist() == [True, False, True]


def test_state_is_a_count_and_the_momentum():
  optimizer = muon(0.1, BFLOAT16)
  assert MuonState._fields == ('count', 'mu')
  params, state = train(optimizer, 3)
  muon_state, *rest = state
  assert isinstance(muon_state, MuonState) and muon_state.count == 3 and not jax.tree.leaves(rest)
  assert jax.tree.structure(muon_state.mu) == jax.tree.structure(params)
  for mu in jax.tree.leaves(muon_state.mu):
    assert np.abs(mu).max() > 0


def test_init_from_shapes():
  optimizer = muon(0.1, BFLOAT16)
  shapes = jax.eval_shape(lambda: stacks(0))
  for state in (jax.eval_shape(optimizer.init, shapes), optimizer.init(shapes)):
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state[0].mu) == jax.tree.map(
      lambda x: (x.shape, x.dtype), shapes
    )
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(optimizer.init(shapes)[0].mu))


@pytest.mark.parametrize('abstract', [True, False])
def test_momentum_is_born_sharded_like_the_parameters(abstract):
  config = MeshConfig(fsdp=4, tensor=2)
  placed = rules.param_shardings(stacks(0), make_mesh(config), config.rules)
  params = jax.device_put(stacks(0), placed)
  if abstract:
    params = jax.tree.map(
      lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
    )
  plan = make_plan(params, [Matrix()] * 2, BFLOAT16, placed)
  state = muon(0.1, BFLOAT16, plan=plan).init(params)
  assert jax.tree.map(lambda x: x.sharding, state[0].mu) == placed
  for mu in jax.tree.leaves(state[0].mu):
    assert not mu.is_fully_replicated
    assert mu.addressable_shards[0].data.size == mu.size // 8


def test_bfloat16_momentum_stays_so_and_hardly_matters():
  full, _ = train(muon(0.02, FLOAT32), 30)
  half, state = train(muon(0.02, FLOAT32, mu_dtype='bfloat16'), 30)
  assert {mu.dtype for mu in jax.tree.leaves(state[0].mu)} == {jnp.dtype('bfloat16')}
  for a, b, s in zip(*map(jax.tree.leaves, (half, full, stacks(0))), strict=True):
    assert a.dtype == jnp.float32
    assert 0 < np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b - s)


def test_bfloat16_gradients_do_not_narrow_the_momentum():
  """A constant gradient of 1: the average comes within rounding of 1 only if it is kept wide."""
  params = {'w': jnp.zeros((1, 16, 16))}
  grads = {'w': jnp.ones((1, 16, 16), jnp.bfloat16)}
  optimizer = muon(0.1, BFLOAT16, momentum=0.95)
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for _ in range(300):
    _, state = update(grads, state, params)
  assert state[0].mu['w'].dtype == jnp.float32
  np.testing.assert_allclose(state[0].mu['w'], 1.0, atol=1e-5)


@pytest.mark.parametrize('as_function', [True, False])
def test_weight_decay_mask(as_function):
  def decayed(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: 'ffn' in str(path), tree)

  params = stacks(0)
  mask = decayed if as_function else decayed(params)
  optimizer = muon(0.1, FLOAT32, weight_decay=0.2, weight_decay_mask=mask)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  blocks, before = updates['video']['blocks'], params['video']['blocks']
  assert_close(blocks['ffn'], jax.tree.map(lambda p: -0.02 * p, before['ffn']), rtol=1e-6)
  assert (blocks['self_attn']['q']['kernel'] == 0).all()


def test_composes_with_gradient_accumulation():
  """The mean of two gradients, of very different sizes, every second step."""
  params, grads = stacks(0), [stacks(1), jax.tree.map(lambda g: 10 * g, stacks(2))]
  optimizer = muon(0.1, FLOAT32, weight_decay=0.1)
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
  expected, _ = jax.jit(optimizer.update)(mean, optimizer.init(params), params)
  accumulated = optax.MultiSteps(optimizer, 2)
  state = accumulated.init(params)
  for g, last in zip(grads, (False, True), strict=True):
    updates, state = jax.jit(accumulated.update)(g, state, params)
    if not last:
      assert all((u == 0).all() for u in jax.tree.leaves(updates))
  assert_close(updates, expected, atol=1e-5)
  assert state.inner_opt_state[0].count == 1


def test_composes_with_masks_other_optimizers_and_freezing():
  params = stacks(0) | {'bias': jnp.ones(4), 'frozen': jnp.ones((2, 16, 16))}
  grads = stacks(1) | {'bias': jnp.full(4, 0.5), 'frozen': jnp.ones((2, 16, 16))}
  optimizer, adamw = muon(0.1, FLOAT32), optax.adamw(0.01)
  alone, _ = jax.jit(optimizer.update)(
    {'video': grads['video']},
    optimizer.init({'video': params['video']}),
    {'video': params['video']},
  )

  masked = optax.masked(optimizer, {'video': True, 'bias': False, 'frozen': False})
  updates, state = jax.jit(masked.update)(grads, masked.init(params), params)
  assert_close(updates['video'], alone['video'], atol=1e-5)
  np.testing.assert_array_equal(updates['bias'], grads['bias'])
  assert len(jax.tree.leaves(state)) == 3  # a count and the momenta of two matrices

  labels = {'video': 'muon', 'bias': 'adamw', 'frozen': 'frozen'}
  split = optax.partition(
    {'muon': optimizer, 'adamw': adamw, 'frozen': optax.set_to_zero()}, labels
  )
  updates, state = jax.jit(split.update)(grads, split.init(params), params)
  assert_close(updates['video'], alone['video'], atol=1e-5)
  bias, _ = adamw.update(grads['bias'], adamw.init(params['bias']), params['bias'])
  np.testing.assert_allclose(updates['bias'], bias, rtol=1e-6)
  assert (updates['frozen'] == 0).all()
  assert not jax.tree.leaves(state.inner_states['frozen'])


def test_composes_with_clipping_and_averaging():
  grads = [jax.tree.map(lambda g, s=s: s * g, stacks(seed)) for seed, s in ((1, 10.0), (2, 0.001))]
  params = stacks(0)
  plain = muon(0.1, FLOAT32)
  composed = optax.chain(optax.clip_by_global_norm(1.0), plain, optax.ema(0.9, debias=False))
  state, expected_state = composed.init(params), plain.init(params)
  average = jax.tree.map(jnp.zeros_like, params)
  for g in grads:
    updates, state = jax.jit(composed.update)(g, state, params)
    shrink = 1 / max(1.0, float(optax.tree.norm(g)))
    clipped = jax.tree.map(lambda x, s=shrink: s * x, g)
    step, expected_state = jax.jit(plain.update)(clipped, expected_state, params)
    average = jax.tree.map(lambda a, u: 0.9 * a + 0.1 * u, average, step)
    assert_close(updates, average, atol=1e-5)


def fused(parts):
  return jnp.concatenate(parts, axis=-1)


def heads(parts):
  """[L, m, d] of every head as [L, m, heads * d]."""
  return jnp.stack(parts, axis=-2).reshape(*parts[0].shape[:-1], -1)


@pytest.mark.parametrize(
  'view,shape,join',
  [
    (Matrix('l m (p n) -> (p l) m n', (('p', 3),)), (2, 24, 24), fused),
    (Matrix('l m (h d) -> (h l) m d', (('h', 3),)), (2, 24, 16), heads),
    (Matrix('(p l) m n -> (p l) m n', (('p', 3),)), (2, 16, 24), jnp.concatenate),
  ],
)
def test_a_view_equals_separate_parameters(view, shape, join):
  """Fused projections and single heads, over steps: momentum, scale and decay too."""

  def run(views, params, grads):
    optimizer = muon(0.1, FLOAT32, plan=make_plan(params, views, FLOAT32), weight_decay=0.1)
    state = optimizer.init(params)
    for g in grads:
      updates, state = jax.jit(optimizer.update)(g, state, params)
      params = optax.apply_updates(params, updates)
    return params

  parts = [list(jax.random.normal(jax.random.key(seed), (3, *shape))) for seed in range(4)]
  separate = run([Matrix()] * 3, parts[0], parts[1:])
  whole = run([view], join(parts[0]), [join(p) for p in parts[1:]])
  assert np.abs(whole - join(parts[0])).max() > 0.1
  np.testing.assert_allclose(whole, join(separate), atol=1e-5)


def test_a_convolution_is_one_flattened_matrix():
  kernel = {'kernel': jax.random.normal(jax.random.key(0), (3, 3, 4, 32))}
  flat = {'kernel': kernel['kernel'].reshape(1, 36, 32)}
  plan = make_plan(kernel, [Matrix('h w i o -> 1 (h w i) o')], FLOAT32)
  conv, plain = muon(0.1, FLOAT32, plan=plan), muon(0.1, FLOAT32)
  a, _ = conv.update(kernel, conv.init(kernel), kernel)
  b, _ = plain.update(flat, plain.init(flat), flat)
  assert a['kernel'].shape == (3, 3, 4, 32)
  np.testing.assert_allclose(a['kernel'].reshape(1, 36, 32), b['kernel'], atol=1e-6)


def test_other_trees_and_settings_are_refused():
  params = stacks(0)
  planned = muon(0.1, FLOAT32, plan=make_plan(params, [Matrix()] * 2, FLOAT32))
  other = stacks(0, square=(3, 16, 24))
  with pytest.raises(ConfigError, match=r"another tree.*self_attn/q/kernel' \(3, 24, 24\)"):
    planned.init(other)
  with pytest.raises(ConfigError, match='another tree'):
    planned.update(other, muon(0.1, FLOAT32).init(other), other)
  bias = {'bias': jnp.ones((3, 24))}
  unplanned = muon(0.1, FLOAT32)
  with pytest.raises(ConfigError, match=r'shape \(3, 24\): expected 3 axes, got 2'):
    unplanned.update(bias, unplanned.init(bias))
  strange = scale_by_muon(FLOAT32, update_scale='rsm')
  with pytest.raises(ConfigError, match="expected 'rms', 'jordan' or 'spectral', got 'rsm'"):
    strange.update(params, strange.init(params))


@pytest.mark.parametrize('config', [MeshConfig(fsdp=8), MeshConfig(replica=2, fsdp=2, tensor=2)])
def test_without_a_plan_the_partitioner_decides(config):
  """Slow on a large mesh, but the same update."""
  optimizer = muon(0.02, FLOAT32, weight_decay=0.1)
  expected, _ = train(optimizer, 10)
  placed = rules.param_shardings(stacks(0), make_mesh(config), config.rules)
  params, state = train(optimizer, 10, lambda tree: jax.device_put(tree, placed))
  assert_close(params, expected, atol=5e-6)
  for mu in jax.tree.leaves(state[0].mu):
    assert len(mu.devices()) == 8
