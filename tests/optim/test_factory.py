"""The assembled optimizer: schedules, clipping, frozen leaves, decay, and both kinds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wallwm_jax.config import MeshConfig, OptimConfig
from wallwm_jax.optim import make_muon_plan, make_optimizer, make_schedule, newton_schulz, route
from wallwm_jax.parallel import rules
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.types import ConfigError

CONFIG = OptimConfig(lr=0.01, warmup_steps=0, schedule='constant', weight_decay=0.5, clip_norm=0.0)


def params():
  keys = iter(jax.random.split(jax.random.key(0), 4))
  return {
    tower: {
      'blocks': {'self_attn': {'q': {'kernel': jax.random.normal(next(keys), (2, 16, 24))}}},
      'head': {'kernel': jax.random.normal(next(keys), (16, 8)), 'bias': jnp.ones(8)},
    }
    for tower in ('video', 'action')
  }


def labels(frozen=()):
  trainable = {
    tower: jax.tree.map(lambda _, t=tower: t not in frozen, tree)
    for tower, tree in params().items()
  }
  return route(params(), trainable)


def kernel(tree):
  return tree['video']['blocks']['self_attn']['q']['kernel']


def run(config, frozen=(), steps=3, gradient=None, shardings=None):
  """Parameters and state after `steps` updates with the gradient params (or `gradient`)."""
  optimizer = make_optimizer(config, jax.eval_shape(params), labels(frozen), 10, shardings)
  current = params() if shardings is None else jax.device_put(params(), shardings)
  state = optimizer.init(current)

  @jax.jit
  def step(current, state):
    updates, state = optimizer.update(gradient or current, state, current)
    return optax.apply_updates(current, updates), state

  for _ in range(steps):
    current, state = step(current, state)
  return current, state


@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_frozen_leaves_are_bit_identical_and_carry_no_state(kind):
  config = dataclasses.replace(CONFIG, optimizer=kind, clip_norm=1.0)
  after, state = run(config, frozen=('video',))
  for a, b in zip(*map(jax.tree.leaves, (after['video'], params()['video'])), strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(*map(jax.tree.leaves, (after['action'], params()['action'])), strict=True):
    assert (np.asarray(a) != np.asarray(b)).any()
  paths = [
    jax.tree_util.keystr(p, simple=True, separator='/')
    for p, _ in jax.tree_util.tree_flatten_with_path(state)[0]
  ]
  assert not any('video' in path for path in paths)
  momenta = [path for path in paths if path.endswith('action/blocks/self_attn/q/kernel')]
  assert len(momenta) == (1 if kind == 'muon' else 2)


def test_weight_decay_reaches_the_block_matrices_only():
  zeros = jax.tree.map(jnp.zeros_like, params())
  for kind in ('muon', 'adamw'):
    after, _ = run(dataclasses.replace(CONFIG, optimizer=kind), gradient=zeros)
    before = params()
    decayed = (1 - 0.01 * 0.5) ** 3
    np.testing.assert_allclose(
      after['video']['blocks']['self_attn']['q']['kernel'],
      decayed * before['video']['blocks']['self_attn']['q']['kernel'],
      rtol=1e-5,
    )
    for a, b in zip(
      *map(jax.tree.leaves, (after['video']['head'], before['video']['head'])), strict=True
    ):
      np.testing.assert_array_equal(a, b)


def test_adamw_leaves_match_optax():
  after, _ = run(CONFIG)
  reference = optax.adamw(0.01, 0.9, 0.95, 1e-8, weight_decay=0.0)
  head = params()['video']['head']
  state = reference.init(head)
  for _ in range(3):
    updates, state = reference.update(head, state, head)
    head = optax.apply_updates(head, updates)
  for a, b in zip(*map(jax.tree.leaves, (after['video']['head'], head)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_clipping_ignores_frozen_gradients():
  """A huge frozen gradient must not shrink the trainable ones; eps shows the size of the latter."""
  config = dataclasses.replace(
    CONFIG, optimizer='adamw', clip_norm=1.0, weight_decay=0.0, adam_eps=1.0
  )
  small = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params())
  huge = small | {'video': jax.tree.map(lambda p: jnp.full_like(p, 1e6), small['video'])}
  calm, _ = run(config, frozen=('video',), gradient=small)
  stormy, _ = run(config, frozen=('video',), gradient=huge)
  jax.tree.map(np.testing.assert_array_equal, calm, stormy)
  clipped, _ = run(config, gradient=huge)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), clipped['action'], params()['action'])
  assert max(jax.tree.leaves(moved)) < 1e-6


def test_muon_and_adamw_really_differ_on_matrices():
  muon, _ = run(CONFIG)
  adamw, _ = run(dataclasses.replace(CONFIG, optimizer='adamw'))
  assert np.abs(kernel(muon) - kernel(adamw)).max() > 1e-3
  np.testing.assert_array_equal(muon['video']['head']['bias'], adamw['video']['head']['bias'])


def test_settings_of_muon_reach_it():
  full, state = run(CONFIG, frozen=('action',))
  (mu,) = (m for m in jax.tree.leaves(state) if m.shape == (2, 16, 24))
  assert mu.dtype == np.float32
  half, state = run(dataclasses.replace(CONFIG, mu_dtype='bfloat16'), frozen=('action',))
  (mu,) = (m for m in jax.tree.leaves(state) if m.shape == (2, 16, 24))
  assert mu.dtype == 'bfloat16'
  a, b = (kernel(tree) for tree in (full, half))
  assert 0 < np.abs(a - b).max() < 0.02
  for change in ({'momentum': 0.5}, {'nesterov': False}, {'ns_coefficients': 'you'}):
    other, _ = run(dataclasses.replace(CONFIG, **change), frozen=('action',))
    assert np.abs(kernel(other) - a).max() > 1e-4, change
  how = newton_schulz(dataclasses.replace(CONFIG, ns_coefficients='jordan', ns_steps=3))
  assert (len(how.coefficients), how.dtype, how.form) == (3, 'bfloat16', 'auto')


@pytest.mark.parametrize('sizes', [{'fsdp': 8}, {'replica': 2, 'fsdp': 2, 'tensor': 2}])
def test_a_mesh_changes_nothing_but_who_computes(sizes):
  config = dataclasses.replace(CONFIG, ns_dtype='float32', clip_norm=1.0)
  expected, _ = run(config, frozen=('video',))
  mesh_config = MeshConfig(**sizes)
  placed = rules.param_shardings(params(), make_mesh(mesh_config), mesh_config.rules)
  got, state = run(config, frozen=('video',), shardings=placed)
  for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)
  (mu,) = (m for m in jax.tree.leaves(state) if m.shape == (2, 16, 24))
  assert mu.addressable_shards[0].data.size == mu.size // (mesh_config.fsdp * mesh_config.tensor)


def test_the_plan_covers_the_trainable_matrices():
  placed = rules.param_shardings(params(), make_mesh(MeshConfig(fsdp=8)), MeshConfig().rules)
  plan = make_muon_plan(CONFIG, params(), labels(('video',)), placed)
  assert [leaf.path for leaf in plan.leaves] == ['action/blocks/self_attn/q/kernel']
  assert make_muon_plan(CONFIG, params(), labels()).mesh is None


@pytest.mark.parametrize('on_a_mesh', [False, True])
def test_a_run_without_matrices(on_a_mesh):
  """Only heads are trained; Muon has nothing to do."""
  tree = params()
  trainable = jax.tree_util.tree_map_with_path(lambda path, _: 'head' in str(path), tree)
  placed = rules.param_shardings(tree, make_mesh(MeshConfig(fsdp=8)), MeshConfig().rules)
  optimizer = make_optimizer(
    CONFIG, tree, route(tree, trainable), 10, placed if on_a_mesh else None
  )
  updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
  assert (kernel(updates) == 0).all()
  assert (updates['video']['head']['bias'] != 0).all()


def test_other_parameters_than_planned_are_refused():
  placed = rules.param_shardings(params(), make_mesh(MeshConfig(fsdp=8)), MeshConfig().rules)
  optimizer = make_optimizer(CONFIG, params(), labels(), 10, placed)
  deeper = jax.tree.map(lambda p: jnp.concatenate([p, p]) if p.ndim == 3 else p, params())
  with pytest.raises(ConfigError, match=r"'action/blocks/self_attn/q/kernel' \(4, 16, 24\)"):
    optimizer.init(deeper)
  elsewhere = rules.param_shardings(params(), make_mesh(MeshConfig(fsdp=4)), MeshConfig().rules)
  with pytest.raises(ConfigError, match="'action/blocks/self_attn/q/kernel'.*'fsdp': 4"):
    optimizer.init(jax.device_put(params(), elsewhere))


@pytest.mark.parametrize(
  'kind,expected',
  [
    ('constant', {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 99: 1.0}),
    ('cosine', {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1}),
    ('wsd', {0: 0.1, 9: 1.0, 79: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
  ],
)
def test_schedules(kind, expected):
  config = OptimConfig(lr=1.0, warmup_steps=10, schedule=kind, final_lr_ratio=0.1)
  schedule = make_schedule(config, 100)
  for step, value in expected.items():
    assert schedule(step) == pytest.approx(value, abs=1e-6), step


@pytest.mark.parametrize('kind', ['constant', 'cosine', 'wsd'])
@pytest.mark.parametrize('warmup,steps', [(0, 1), (1, 1), (50, 4), (3, 4)])
def test_short_runs_have_finite_positive_rates(kind, warmup, steps):
  schedule = make_schedule(OptimConfig(lr=1.0, warmup_steps=warmup, schedule=kind), steps)
  rates = np.array([schedule(step) for step in range(steps)])
  assert np.isfinite(rates).all() and (rates > 0).all() and (rates <= 1).all()


def test_illegal_settings_are_refused():
  shapes = jax.eval_shape(params)
  with pytest.raises(ConfigError, match='different trees'):
    make_optimizer(CONFIG, shapes, labels()['video'], 10)
  with pytest.raises(ConfigError, match='defines 5 steps, got 6'):
    make_optimizer(dataclasses.replace(CONFIG, ns_steps=6), shapes, labels(), 10)
  with pytest.raises(ConfigError, match='warmup_steps >= 0'):
    make_schedule(OptimConfig(warmup_steps=-1), 10)
