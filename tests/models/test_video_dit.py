"""The video tower: against float64, zero graft at initialisation, and what masks keep out (by
gradients).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from wallwm_jax import config as cfg
from wallwm_jax.models import functional as F
from wallwm_jax.types import Text

TINY = cfg.ModelConfig(
  video=cfg.VideoConfig(width=24, layers=2, heads=2, ffn=32, freq_dim=16),
  action=cfg.ActionConfig(width=16, heads=2, ffn=24, freq_dim=16),
  codec=cfg.CodecConfig(channels=6),
  text=cfg.TextConfig(tokens=5, width=12),
  views=('a', 'b', 'c'),
  image_size=(16, 32),
  future=2,
  max_future=4,
)


def _random_params(config, seed=0, scale=0.3):
  """Every leaf random, so nothing hides behind a zero initialisation."""
  shapes = jax.eval_shape(lambda: F.init_params(config, jax.random.key(0)))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: (scale * rng.standard_normal(s.shape)).astype(np.float32), shapes)


def _inputs(config, b=2, f=3, seed=0):
  rng = np.random.default_rng(seed)
  v, (h, w) = len(config.views), config.latent_size
  z = rng.standard_normal((b, v, f, h, w, config.codec.channels)).astype(np.float32)
  t = rng.uniform(size=(b, f)).astype(np.float32)
  text = Text(rng.standard_normal((b, 5, 12)).astype(np.float32), np.ones((b, 5), bool))
  return z, t, text


def _full_masks(b=2, v=3, f=3, sight=None):
  return F.video_masks(jnp.ones((b, v), bool), jnp.ones((b, f), bool), sight)


@pytest.mark.parametrize('with_sight', [False, True])
def test_forward_matches_float64_reference(with_sight):
  params, (z, t, text) = _random_params(TINY), _inputs(TINY)
  sight = None
  if with_sight:
    rng = np.random.default_rng(3)
    sight = rng.uniform(size=(2, 3, TINY.patches, 3, TINY.patches)) < 0.5
    for v in range(3):
      sight[:, v, :, v] = True
  out, features = F.video_forward(params['video'], TINY, z, t, text, _full_masks(sight=sight))
  assert features.shape == (2, 2, 3, 3, TINY.patches, 24)
  for b in range(2):
    expected = reference.video_tower(
      params['video'],
      TINY,
      z[b].astype(np.float64),
      t[b].astype(np.float64),
      text.features[b].astype(np.float64),
      None if sight is None else sight[b],
    )
    np.testing.assert_allclose(out[b], expected, atol=2e-4 * np.abs(expected).max())


def test_cross_view_branch_is_exactly_zero_at_initialisation():
  alone = dataclasses.replace(TINY, video=dataclasses.replace(TINY.video, cross_view=False))
  params = F.init_params(TINY, jax.random.key(0))['video']
  params['head']['kernel'] = jax.random.normal(jax.random.key(1), params['head']['kernel'].shape)
  without = {k: v for k, v in params.items() if k not in ('view_gate', 'view_embed')}
  without['blocks'] = {
    k: v for k, v in params['blocks'].items() if k not in ('cross_view', 'view_gate')
  }
  z, t, text = _inputs(TINY)
  with_branch, _ = F.video_forward(params, TINY, z, t, text, _full_masks())
  single, _ = F.video_forward(without, alone, z, t, text, _full_masks())
  np.testing.assert_array_equal(with_branch, single)
  assert np.abs(with_branch).max() > 0
  np.testing.assert_array_equal(
    params['blocks']['cross_view']['q']['kernel'], params['blocks']['self_attn']['q']['kernel']
  )


def _sensitivity(read, masks, params=None, text=None, config=TINY):
  """Gradients of sum(read(prediction)^2) with respect to the latents and the text features."""
  params = _random_params(config) if params is None else params
  z, t, default_text = _inputs(config)
  text = default_text if text is None else text

  def objective(z, features):
    out, _ = F.video_forward(params['video'], config, z, t, Text(features, text.mask), masks)
    return jnp.sum(jnp.square(read(out)))

  return jax.grad(objective, argnums=(0, 1))(jnp.asarray(z), jnp.asarray(text.features))


def test_padding_frames_reach_no_valid_frame():
  masks = F.video_masks(jnp.ones((2, 3), bool), jnp.array([[True, True, False]] * 2))
  dz, _ = _sensitivity(lambda out: out[:, :, :2], masks)
  assert not np.any(dz[:, :, 2]) and np.abs(dz[:, :, 1]).max() > 0


def test_absent_view_reaches_no_other_view():
  masks = F.video_masks(jnp.array([[True, True, False]] * 2), jnp.ones((2, 3), bool))
  dz, _ = _sensitivity(lambda out: out[:, :2], masks)
  assert not np.any(dz[:, 2]) and np.abs(dz[:, 0]).max() > 0


def test_sight_mask_cuts_direct_cross_view_reading():
  one_layer = dataclasses.replace(TINY, video=dataclasses.replace(TINY.video, layers=1))
  p = one_layer.patches
  blocked = np.zeros((2, 3, p, 3, p), bool)
  for v in range(3):
    blocked[:, v, :, v] = True
  params = _random_params(one_layer)
  dz, _ = _sensitivity(lambda out: out[:, 0], _full_masks(sight=blocked), params, config=one_layer)
  assert not np.any(dz[:, 1:]) and np.abs(dz[:, 0]).max() > 0
  dz, _ = _sensitivity(lambda out: out[:, 0], _full_masks(), params, config=one_layer)
  assert np.abs(dz[:, 1:]).max() > 0


def test_masked_words_and_dropped_captions_are_not_read():
  _, _, text = _inputs(TINY)
  mask = np.array([[True, True, False, False, False], [False] * 5])
  _, dtext = _sensitivity(lambda out: out, _full_masks(), text=Text(text.features, mask))
  assert np.abs(dtext[0, :2]).max() > 0 and not np.any(dtext[0, 2:]) and not np.any(dtext[1])
  assert np.all(np.isfinite(dtext))


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_changes_nothing(remat):
  params, (z, t, text) = _random_params(TINY), _inputs(TINY)
  config = dataclasses.replace(TINY, remat=remat)

  def loss(p, c):
    return jnp.mean(jnp.square(F.video_forward(p, c, z, t, text, _full_masks())[0]))

  plain, saved = (
    jax.jit(jax.grad(loss), static_argnums=1),
    jax.jit(jax.grad(loss), static_argnums=1),
  )
  for a, b in zip(
    jax.tree.leaves(plain(params['video'], TINY)), jax.tree.leaves(saved(params['video'], config))
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_conditioning_conventions():
  z, _, _ = _inputs(TINY)
  known, t = z + 1, jnp.array([0.3, 0.8])
  frame0 = np.arange(3) == 0
  x, levels = F.condition_video(TINY, z, t, known, frame0)
  np.testing.assert_array_equal(x[:, :, 0], known[:, :, 0])
  np.testing.assert_array_equal(x[:, :, 1:], z[:, :, 1:])
  np.testing.assert_allclose(levels, [[0, 0.3, 0.3], [0, 0.8, 0.8]])
  channel = dataclasses.replace(TINY, video=dataclasses.replace(TINY.video, conditioning='channel'))
  x, levels = F.condition_video(channel, z, t, known, frame0)
  # Noised latents, a mask channel per raw frame of a latent frame, known latents.
  assert x.shape[-1] == 6 + TINY.codec.temporal + 6
  np.testing.assert_array_equal(x[..., :6], z)
  np.testing.assert_array_equal(x[:, :, 0, ..., 10:], known[:, :, 0])
  assert not np.any(x[:, :, 1:, ..., 6:]) and np.all(x[:, :, 0, ..., 6:10] == 1)
  np.testing.assert_allclose(levels, [[0.3] * 3, [0.8] * 3])
  out, _ = F.video_forward(
    _random_params(channel)['video'], channel, x, levels, _inputs(channel)[2], _full_masks()
  )
  assert out.shape == z.shape


def test_untrained_x_prediction_repeats_the_last_given_frame():
  config = dataclasses.replace(TINY, video=dataclasses.replace(TINY.video, prediction='x'))
  z, _, text = _inputs(config)
  params = F.init_params(config, jax.random.key(0))['video']
  for given in (1, 2):
    x, levels = F.condition_video(config, z, jnp.array([0.3, 0.8]), z + 1, np.arange(3) < given)
    out, _ = F.video_forward(params, config, x, levels, text, _full_masks())
    expected = np.broadcast_to((z + 1)[:, :, given - 1 : given], z.shape)
    np.testing.assert_allclose(out, expected, atol=1e-6)
  nothing_given = jnp.full((2, 3), 0.5)
  out, _ = F.video_forward(params, config, z, nothing_given, text, _full_masks())
  np.testing.assert_array_equal(out, 0)
