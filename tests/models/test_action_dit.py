"""The action tower: noise draws, masks, coupling, and the functional door."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from test_video_dit import TINY, _full_masks, _inputs, _random_params

from wallwm_jax.models import functional as F
from wallwm_jax.models.layers import Attention


def _setup(draws=3, steps=8, seed=0):
  params, rng = _random_params(TINY), np.random.default_rng(seed)
  features = rng.standard_normal((2, 2, 3, 3, TINY.patches, 24)).astype(np.float32)
  a = rng.standard_normal((2, draws, steps, 10)).astype(np.float32)
  t = rng.uniform(size=(2, draws)).astype(np.float32)
  state = rng.standard_normal((2, 10)).astype(np.float32)
  return params['action'], features, a, t, state, np.ones((2, steps), bool)


def _cache(params, features, masks=None, window='event'):
  return F.prefill_actions(
    params, TINY, features, F.window_tau(TINY, window, 3), masks or _full_masks()
  )


def test_draws_share_a_cache_and_do_not_see_each_other():
  params, features, a, t, state, mask = _setup()
  cache = _cache(params, features)
  together = F.action_forward(params, TINY, a, t, state, cache, mask)
  for r in range(3):
    alone = F.action_forward(params, TINY, a[:, r : r + 1], t[:, r : r + 1], state, cache, mask)
    np.testing.assert_allclose(together[:, r : r + 1], alone, atol=2e-5)


def test_masked_steps_views_and_frames_are_not_read():
  params, features, a, t, state, mask = _setup()
  mask[:, 4:] = False
  masks = F.video_masks(jnp.array([[True, False, True]] * 2), jnp.array([[True, True, False]] * 2))

  def objective(a, features):
    out = F.action_forward(params, TINY, a, t, state, _cache(params, features, masks), mask)
    return jnp.sum(jnp.square(out[:, :, :4]))

  da, dh = jax.grad(objective, argnums=(0, 1))(a, features)
  assert not np.any(da[:, :, 4:]) and np.abs(da[:, :, :4]).max() > 0
  # features are [L, B, V, F, P, D]
  assert not np.any(dh[:, :, 1]) and not np.any(dh[:, :, :, 2])
  assert np.abs(dh[:, :, 0, :2]).max() > 0


def test_state_and_every_paired_layer_are_read():
  params, features, a, t, state, mask = _setup()

  def objective(state, features):
    return jnp.sum(
      jnp.square(F.action_forward(params, TINY, a, t, state, _cache(params, features), mask))
    )

  ds, dh = jax.grad(objective, argnums=(0, 1))(state, features)
  assert np.abs(ds).min() > 0
  assert all(np.abs(dh[layer]).max() > 0 for layer in range(2))


def test_attending_to_one_token_equals_the_general_form():
  attention = Attention(16, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x, token = (jax.random.normal(jax.random.key(i), (2, n, 16)) for i, n in ((1, 5), (2, 1)))
  general = attention(x, token, mask=jnp.ones((2, 1, 1, 1), bool))
  np.testing.assert_allclose(attention(x, token), general, atol=1e-6)


def test_depth_map_chooses_the_video_layer():
  params, features, *_ = _setup()
  mapped = dataclasses.replace(TINY, action=dataclasses.replace(TINY.action, depth_map=(1, 1)))
  tau = F.window_tau(TINY, 'event', 3)
  a = F.prefill_actions(params, mapped, features, tau, _full_masks())
  b = F.prefill_actions(params, TINY, features[np.array([1, 1])], tau, _full_masks())
  np.testing.assert_array_equal(a.k, b.k)


def test_windows_number_their_frames_as_specified():
  np.testing.assert_array_equal(F.window_tau(TINY, 'event', 3), [0, 1, 2])
  np.testing.assert_array_equal(F.window_tau(TINY, 'chunk', 4), [-1, 0, 1, 2])
  params, features, *_ = _setup()
  assert (
    np.abs(_cache(params, features).k - _cache(params, features, window='chunk').k).max() > 1e-3
  )


def test_video_does_not_depend_on_the_action_tower():
  params = _random_params(TINY)
  z, t, text = _inputs(TINY)

  def objective(params):
    return jnp.sum(F.video_forward(params['video'], TINY, z, t, text, _full_masks())[0])

  grads = jax.grad(objective)(params)
  assert not any(np.any(g) for g in jax.tree.leaves(grads['action']))


def test_init_is_a_plain_dict_and_traceable():
  live = F.init_params(TINY, jax.random.key(0))
  shapes = jax.eval_shape(lambda key: F.init_params(TINY, key), jax.random.key(0))
  assert jax.tree.structure(live) == jax.tree.structure(shapes)
  assert all(
    type(leaf).__module__.startswith('jax') and leaf.dtype == jnp.float32
    for leaf in jax.tree.leaves(live)
  )
  first, second = live['video']['blocks']['self_attn']['q']['kernel']
  assert np.abs(first - second).max() > 0, 'layers must not share their initialisation'


def test_forward_is_traced_once_for_equal_configs():
  traces = []

  def forward(params, config, z, t, text):
    traces.append(1)
    return F.video_forward(params, config, z, t, text, _full_masks())[0]

  jitted = jax.jit(forward, static_argnums=1)
  params, (z, t, text) = _random_params(TINY)['video'], _inputs(TINY)
  jitted(params, TINY, z, t, text)
  jitted(params, dataclasses.replace(TINY), z, t, text)
  assert len(traces) == 1
