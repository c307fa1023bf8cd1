"""NorMuon against the paper's loop in NumPy, and on a mesh."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from wallwm_jax.config import MeshConfig, OptimConfig
from wallwm_jax.optim import make_optimizer, route
from wallwm_jax.optim.matrices import Matrix
from wallwm_jax.optim.muon import muon
from wallwm_jax.optim.newton_schulz import NewtonSchulz, coefficients
from wallwm_jax.optim.normuon import normalize_neurons
from wallwm_jax.parallel import rules
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.types import ConfigError

B2 = 0.9


def paper(updates):
  """The normalised update of every step, float64, for updates [steps, m, n] of one matrix."""
  v, out = np.zeros(updates.shape[-1]), []
  for u in np.float64(updates):
    v = B2 * v + (1 - B2) * np.mean(u**2, axis=0)  # one neuron = one column
    y = u / (np.sqrt(v) + 1e-8)
    out.append(y * np.linalg.norm(u) / np.linalg.norm(y))
  return np.stack(out)


@pytest.mark.parametrize(
  'view,shape',
  [(Matrix(), (2, 6, 10)), (Matrix('l m (p n) -> (p l) m n', (('p', 2),)), (3, 6, 20))],
)
def test_follows_the_paper(view, shape):
  updates = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
  updates[..., 0] *= 100  # one neuron far larger than the others
  transform = normalize_neurons(B2, [view])
  state = transform.init(updates[0])
  got = []
  for u in updates:
    out, state = transform.update(u, state)
    got.append(view.split(out))
  matrices = np.stack([view.split(u) for u in updates])
  expected = np.stack([paper(matrices[:, i]) for i in range(matrices.shape[1])], axis=1)
  np.testing.assert_allclose(np.stack(got), expected, rtol=2e-5)


def test_zero_updates_stay_zero():
  zero = np.zeros((1, 4, 6), np.float32)
  transform = normalize_neurons(B2, [Matrix()])
  out, _ = transform.update(zero, transform.init(zero))
  assert (np.asarray(out) == 0).all()


def test_needs_a_plan():
  how = NewtonSchulz(coefficients('jordan', 5))
  with pytest.raises(ConfigError, match='normuon_b2=0.9: expected a plan, got none'):
    muon(0.1, how, normuon_b2=B2)


def tree():
  keys = jax.random.split(jax.random.key(0))
  kernels = {
    n: {'kernel': jax.random.normal(k, (3, 32, 32))} for n, k in zip('qv', keys, strict=True)
  }
  return {'video': {'blocks': {'self_attn': kernels}}}


CONFIG = OptimConfig(normuon_b2=B2, ns_dtype='float32', warmup_steps=0, lr=0.02)
RULES = ((r'.*/kernel', Matrix()),)


def fit(config, mesh_config=None):
  """Parameters after four updates towards another tree."""
  params, target = tree(), jax.tree.map(lambda x: 1 - x[::-1], tree())
  labels = route(params, rules=RULES)
  if mesh_config is None:
    optimizer = make_optimizer(config, params, labels, 10)
    state = optimizer.init(params)
  else:
    mesh = make_mesh(mesh_config)
    placed = rules.param_shardings(params, mesh, mesh_config.rules)
    optimizer = make_optimizer(config, params, labels, 10, placed)
    shapes = jax.eval_shape(optimizer.init, params)
    state_placed = rules.param_shardings(shapes, mesh, mesh_config.rules)
    params, target = jax.device_put(params, placed), jax.device_put(target, placed)
    state = jax.jit(optimizer.init, out_shardings=state_placed)(params)

  @jax.jit
  def step(params, state):
    grads = jax.tree.map(lambda p, t: p - t, params, target)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(4):
    params, state = step(params, state)
  return params


def test_the_config_switches_it_on():
  on, off = fit(CONFIG), fit(dataclasses.replace(CONFIG, normuon_b2=0.0))
  changes = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (on, off)), strict=True)]
  assert min(changes) > 1e-4


@pytest.mark.parametrize('mesh', [MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=4)])
def test_sharded_equals_unsharded(mesh):
  for a, b in zip(*map(jax.tree.leaves, (fit(CONFIG, mesh), fit(CONFIG))), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6)
