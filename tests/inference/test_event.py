"""Event mode: randomness, length and view masks, and the cache against a reference without."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.diffusion import schedules
from wallwm_jax.inference import denoiser
from wallwm_jax.inference.denoiser import Noise, Window
from wallwm_jax.inference.event import predict_event, predict_video
from wallwm_jax.models import functional
from wallwm_jax.types import ConfigError, DataError, StatsMismatchError

KEY = jax.random.key(3)


@functools.cache
def jitted(cfg, bucket):
  return jax.jit(functools.partial(predict_event, cfg=cfg, bucket=bucket))


def run(params, obs, text, key=KEY, *, cfg, bucket, length=None, noise=None):
  """One jitted prediction; every optional array is given, so one program serves all tests."""
  if length is None:
    length = jnp.full((2,), bucket)
  if noise is None:
    noise = denoiser.sample_noise(key, cfg, 2, Window.event(cfg, bucket))
  return jitted(cfg, bucket)(params, obs, text, key, length=length, noise=noise)


def replace_inference(cfg, **changes):
  return dataclasses.replace(cfg, inference=dataclasses.replace(cfg.inference, **changes))


def replace_diffusion(cfg, **changes):
  return dataclasses.replace(cfg, diffusion=dataclasses.replace(cfg.diffusion, **changes))


def replace_video(cfg, **changes):
  video = dataclasses.replace(cfg.model.video, **changes)
  return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, video=video))


def test_shapes_and_masks(cfg, params, make_inputs):
  obs, text = make_inputs()
  out = run(params, obs, text, cfg=cfg, bucket=3, length=jnp.array([2, 3]))
  assert out.chunk.actions.shape == (2, 12, 10)
  assert out.latents.shape == (2, 2, 4, 2, 2, 12)
  np.testing.assert_array_equal(out.chunk.mask.sum(1), [8, 12])
  np.testing.assert_array_equal(out.mask, [[1, 1, 1, 0], [1, 1, 1, 1]])
  given = functional.encode_video(cfg.model, obs.frames, {})
  np.testing.assert_allclose(out.latents[:, :, :1], given, atol=1e-4)


def test_key_decides_and_noise_overrides_it(cfg, params, make_inputs):
  obs, text = make_inputs()
  predict = functools.partial(jitted(cfg, 2), params, obs, text)
  a, b, c = predict(KEY), predict(KEY), predict(jax.random.key(4))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert np.abs(a.chunk.actions - c.chunk.actions).max() > 1e-2
  noise = denoiser.sample_noise(KEY, cfg, 2, Window.event(cfg, 2))
  d = run(params, obs, text, jax.random.key(99), cfg=cfg, bucket=2, noise=noise)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), a, d)


def test_padding_never_reaches_valid_actions(cfg, params, make_inputs):
  """The Jacobian of valid outputs by padded noise is exactly zero, by valid noise it is not."""
  obs, text = make_inputs()
  noise = denoiser.sample_noise(KEY, cfg, 2, Window.event(cfg, 3))

  def valid_sum(noise, params, obs, text):
    out = predict_event(params, obs, text, KEY, cfg=cfg, bucket=3, length=jnp.array([2, 2]),
                        noise=noise)
    return jnp.sum(jnp.sin(out.chunk.actions[:, :8])) + jnp.sum(jnp.sin(out.latents[:, :, :3]))

  grad = jax.jit(jax.grad(valid_sum))(noise, params, obs, text)
  assert np.all(grad.video[:, :, 3:] == 0) and np.all(grad.action[:, 8:] == 0)
  assert np.all(np.abs(grad.video[:, :, 1:3]).max((0, 1, 3, 4, 5)) > 1e-6)
  assert np.all(np.abs(grad.action[:, :8]).max((0, 2)) > 1e-6)


@pytest.mark.parametrize('length', [1, 2])
def test_length_in_a_larger_bucket_equals_its_own_bucket(cfg, params, make_inputs, length):
  obs, text = make_inputs()
  noise = denoiser.sample_noise(KEY, cfg, 2, Window.event(cfg, 3))
  short = Noise(noise.video[:, :, :length + 1], noise.action[:, :4 * length])
  padded = run(params, obs, text, cfg=cfg, bucket=3, length=jnp.full((2,), length), noise=noise)
  exact = run(params, obs, text, cfg=cfg, bucket=length, noise=short)
  np.testing.assert_allclose(padded.chunk.actions[:, :4 * length], exact.chunk.actions, atol=2e-5)
  np.testing.assert_allclose(padded.latents[:, :, :length + 1], exact.latents, atol=2e-4)


def uncached_actions(params, cond, z, noise, cfg, window):
  """Reference: a video forward and a prefill at every action step, Euler written out."""
  sigmas = schedules.shifted_sigmas(cfg.inference.action_steps, cfg.diffusion.action_shift)
  actions = noise
  for sigma, following in zip(sigmas[:-1], sigmas[1:]):
    cache, _ = denoiser.anchor_cache(params, cond, z, cfg=cfg, window=window)
    t = jnp.full((noise.shape[0], 1), sigma)
    mask = jnp.repeat(cond.future_mask, cfg.model.steps_per_latent, axis=1)
    velocity = functional.action_forward(params.model['action'], cfg.model, actions[:, None], t,
                                         cond.state, cache, mask)
    actions = actions + (following - sigma) * velocity[:, 0]
  return actions


def test_cached_equals_uncached(cfg, params, make_inputs):
  obs, text = make_inputs()
  window = Window.event(cfg, 2)
  noise = denoiser.sample_noise(KEY, cfg, 2, window)

  @jax.jit
  def both(params, obs, text, noise):
    cond = denoiser.encode_observation(
      params, obs, text, jnp.array([1, 2]), cfg=cfg, window=window)
    z = denoiser.denoise_to_anchor(params, cond, noise.video, cfg=cfg)
    cache, _ = denoiser.anchor_cache(params, cond, z, cfg=cfg, window=window)
    cached = denoiser.denoise_actions(params, cond, cache, noise.action, cfg=cfg)
    return cached, uncached_actions(params, cond, z, noise.action, cfg, window)

  cached, reference = both(params, obs, text, noise)
  np.testing.assert_allclose(cached, reference, atol=1e-5)
  assert np.abs(cached - noise.action).max() > 1e-2


def test_absent_camera_is_not_looked_at(cfg, params, make_inputs):
  obs, text = make_inputs()
  other = dataclasses.replace(obs, frames=obs.frames.at[:, 1].set(255 - obs.frames[:, 1]))
  predict = functools.partial(run, params, text=text, cfg=cfg, bucket=2)
  hide = functools.partial(dataclasses.replace, view_mask=jnp.array([[True, False]] * 2))
  a, b = (predict(hide(x)) for x in (obs, other))
  np.testing.assert_array_equal(a.chunk.actions, b.chunk.actions)
  np.testing.assert_array_equal(a.latents[:, 0], b.latents[:, 0])
  assert np.abs(predict(obs).chunk.actions - predict(other).chunk.actions).max() > 1e-4


def test_guidance_zero_forgets_the_text_on_the_way_to_the_anchor(cfg, params, make_inputs):
  obs, text = make_inputs()
  window = Window.event(cfg, 2)
  noise = denoiser.sample_noise(KEY, cfg, 2, window).video

  @functools.partial(jax.jit, static_argnums=2)
  def at_anchor(params, text, guidance):
    guided = replace_inference(cfg, guidance=guidance)
    cond = denoiser.encode_observation(params, obs, text, cfg=guided, window=window)
    return denoiser.denoise_to_anchor(params, cond, noise, cfg=guided)

  to_anchor = functools.partial(at_anchor, params)
  dropped = dataclasses.replace(text, mask=jnp.zeros_like(text.mask))
  plain, unguided, without = to_anchor(text, 1.0), to_anchor(text, 0.0), to_anchor(dropped, 1.0)
  np.testing.assert_allclose(unguided, without, atol=1e-5)
  assert np.abs(plain - without).max() > 1e-3


@pytest.mark.parametrize('change', [{'video_steps': 0}, {'anchor_step': 0}])
def test_anchor_at_pure_noise_needs_no_video_step(cfg, params, make_inputs, change):
  replace = replace_inference if 'video_steps' in change else replace_diffusion
  cfg = replace(cfg, **change)
  obs, text = make_inputs()
  window = Window.event(cfg, 1)
  cond = denoiser.encode_observation(params, obs, text, cfg=cfg, window=window)
  noise = denoiser.sample_noise(KEY, cfg, 2, window).video
  np.testing.assert_array_equal(denoiser.anchor_sigmas(cfg), [1.0])
  np.testing.assert_array_equal(denoiser.denoise_to_anchor(params, cond, noise, cfg=cfg), noise)


def test_symmetric_map_in_one_step_is_the_anchor_at_pure_noise(cfg, params, make_inputs):
  """With one step both maps read the video at level 1 and jump to 0, so they must agree."""
  obs, text = make_inputs()
  cfg = replace_inference(cfg, action_steps=1)
  symmetric = run(params, obs, text, cfg=replace_diffusion(cfg, mapping='symmetric'), bucket=2)
  anchored = run(params, obs, text, cfg=replace_diffusion(cfg, anchor_step=0), bucket=2)
  np.testing.assert_allclose(symmetric.chunk.actions, anchored.chunk.actions, atol=1e-5)
  np.testing.assert_allclose(symmetric.latents, anchored.latents, atol=1e-4)


def test_video_starts_at_the_observation(cfg, params, make_inputs):
  obs, text = make_inputs()
  predict = jax.jit(functools.partial(predict_video, cfg=cfg, bucket=2, steps=2))
  video = predict(params, obs, text, KEY)
  assert video.shape == (2, 2, 9, 16, 16, 3) and video.min() >= 0 and video.max() <= 1
  shown = functional.decode_video(cfg.model, functional.encode_video(cfg.model, obs.frames, {}), {})
  np.testing.assert_allclose(video[:, :, :1], shown, atol=1e-5)


def test_channel_conditioning(cfg, make_params, make_inputs):
  """The other of Wan's conventions: the known frame is an extra input, still returned as given."""
  cfg = replace_video(cfg, conditioning='channel')
  params = make_params(cfg)
  obs, text = make_inputs()
  a, b = (run(params, x, text, cfg=cfg, bucket=1) for x in (obs, make_inputs(seed=5)[0]))
  given = functional.encode_video(cfg.model, obs.frames, {})
  np.testing.assert_allclose(a.latents[:, :, :1], given, atol=1e-4)
  assert np.abs(a.latents[:, :, 1:] - b.latents[:, :, 1:]).max() > 1e-2


@pytest.mark.parametrize('field, value, message', [
    ('frames', np.zeros((2, 3, 1, 16, 16, 3), np.uint8), 'Observation.frames: expected uint8'),
    ('frames', np.zeros((2, 2, 1, 16, 16, 3), np.float32), 'got float32'),
    ('state', np.zeros((2, 20), np.float32), 'Observation.state'),
])
def test_bad_observation_is_refused(cfg, params, make_inputs, field, value, message):
  obs, text = make_inputs()
  with pytest.raises(DataError, match=message):
    predict_event(params, dataclasses.replace(obs, **{field: value}), text, KEY, cfg=cfg, bucket=1)


@pytest.mark.parametrize('bucket', [0, 5])
def test_bucket_outside_the_tables_is_refused(cfg, params, make_inputs, bucket):
  with pytest.raises(ConfigError, match='expected 1..4'):
    predict_event(params, *make_inputs(), KEY, cfg=cfg, bucket=bucket)


def test_statistics_of_another_robot_are_refused(cfg, params, make_inputs):
  norm = dataclasses.replace(params.norm, action_mean=jnp.zeros((20,)))
  with pytest.raises(StatsMismatchError, match='norm.action_mean: expected shape'):
    other = dataclasses.replace(params, frozen=dataclasses.replace(params.frozen, norm=norm))
    predict_event(other, *make_inputs(), KEY, cfg=cfg, bucket=1)


def test_weights_may_be_stored_in_bfloat16(cfg, params, make_inputs):
  obs, text = make_inputs()
  cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype='bfloat16'))
  stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params.model)
  out = jax.eval_shape(
    functools.partial(predict_event, cfg=cfg, bucket=3),
    dataclasses.replace(params, model=stored), obs, text, KEY,
  )  # fmt: skip
  assert out.chunk.actions.shape == (2, 12, 10)
  assert out.chunk.actions.dtype == jnp.float32
