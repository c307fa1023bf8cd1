"""The stage table and its losses: what trains, what is supervised, what shares a forward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.diffusion import schedules
from wallwm_jax.models import functional
from wallwm_jax.training import stages
from wallwm_jax.training.state import param_shapes
from wallwm_jax.types import ConfigError, Text


def test_table_is_that_of_the_specification():
  trained = {name: set(spec.trainable) for name, spec in stages.STAGES.items()}
  assert trained == {
    '1': {'video'},
    '2': {'action'},
    '5': {'video', 'action'},
    'joint': {'video', 'action'},
    '3': {'heads'},
    '4': {'staircase', 'projector'},
    'vlm': {'vlm', 'reader'},
    'distill': {'video', 'action', 'critic'},
    'distill_video': {'video', 'critic'},
  }
  losses = {name: set(spec.losses) for name, spec in stages.STAGES.items()}
  for name in ('1', '2', '5', 'joint'):  # stage 2 has its video loss off, stage 5 has both
    assert losses[name] == trained[name]
  assert stages.STAGES['5'].windows == ('chunk',)


def test_trainable_mask_and_split_agree(tiny):
  params, config = {'video': {'a': 1, 'b': {'c': 2}}, 'action': {'d': 3}}, tiny.config('2')
  mask = stages.trainable_mask(params, config)
  assert mask == {'video': {'a': False, 'b': {'c': False}}, 'action': {'d': True}}
  trainable, frozen = stages.split_trainable(params, config)
  assert trainable == {'action': {'d': 3}} and frozen | trainable == params


def test_stage_refuses_a_window_it_cannot_train(tiny):
  config = tiny.config('5', 'chunk')
  object.__setattr__(config.data, 'window', 'event')  # past the config's own check
  with pytest.raises(ConfigError, match=r"data.window.*stage 5.*'chunk'.*got 'event'"):
    stages.stage_of(config)


def partial_batch(config):
  """Sample 0 whole; 1 one latent short; 2 without its second camera; 3 with a black left border."""
  batch = config.fake_batch()
  num_frames, view_mask, pixel_mask = (
    np.array(x) for x in (batch.num_frames, batch.view_mask, batch.pixel_mask)
  )
  num_frames[1] -= 4
  view_mask[2, 1] = False
  pixel_mask[3, :, :, :3] = False
  return dataclasses.replace(
    batch, num_frames=num_frames, view_mask=view_mask, pixel_mask=pixel_mask
  )


@pytest.mark.parametrize('window, known', [('event', 1), ('chunk', 2)])
def test_only_real_future_cells_are_supervised(tiny, window, known):
  config = tiny.config('1', window)
  clip = stages.encode_clip(partial_batch(config), tiny.frozen(config), config)
  supervised = np.asarray(clip.supervised)[..., 0]
  assert clip.known.tolist() == [True] * known + [False] * 2
  assert not supervised[:, :, :known].any()
  assert supervised[0, :, known:].all()
  assert supervised[1, :, known:-1].all() and not supervised[1, :, -1].any()
  assert supervised[2, 0, known:].all() and not supervised[2, 1].any()
  # Three border pixels spoil the whole first column of 8 x 8 cells and nothing else.
  assert not supervised[3, ..., 0].any() and supervised[3, :, known:, :, 1:].all()


def video_gradient(config, frozen, batch, head_scale, monkeypatch):
  """Gradient of the video loss by every latent the codec returned, [B, V, F, h, w, C]."""
  latents = functional.encode_video(config.model, batch.frames, {})
  params = functional.init_params(config.model, jax.random.key(0))
  key = jax.random.key(1)

  def loss(latents, head_scale):
    monkeypatch.setattr(functional, 'encode_video', lambda *_: latents)
    head = params['video']['head']
    kernel = head_scale * jax.random.normal(key, head['kernel'].shape)
    video = params['video'] | {'head': head | {'kernel': kernel}}
    return stages.stage_loss({'video': video}, batch, frozen, key, config=config)[0]

  gradient = jax.jit(jax.grad(loss))
  return [np.asarray(gradient(latents, scale)) for scale in head_scale]


@pytest.mark.slow
def test_gradients_never_reach_padding_absent_views_or_borders(tiny, monkeypatch):
  config = tiny.config('1')
  batch = partial_batch(config)
  clip = stages.encode_clip(batch, tiny.frozen(config), config)
  supervised = np.broadcast_to(clip.supervised, clip.latents.shape)
  # With the head at its zero init a latent acts as a target only, else as an input too.
  target, both = video_gradient(config, tiny.frozen(config), batch, (0.0, 1.0), monkeypatch)
  assert (target[~supervised] == 0).all() and (target[supervised] != 0).any()
  assert (both[1, :, -1] == 0).all(), 'a frame beyond num_frames was attended to'
  assert (both[2, 1] == 0).all(), 'an absent camera was attended to'
  assert (both[:, 0, 0] != 0).any(), 'the keyframe must condition the prediction'


def test_masked_entries_have_no_value_and_no_gradient():
  out = jnp.array([1.0, jnp.nan, jnp.inf, 3.0])
  mask = jnp.array([True, False, False, True])
  loss, gradient = jax.value_and_grad(stages.weighted_mse)(out, jnp.zeros(4), mask, 2.0)
  assert loss == 2.0 * (1 + 9) / 2
  assert gradient.tolist() == [2.0, 0.0, 0.0, 6.0]


def trace(tiny, config, monkeypatch):
  """Traces one loss; returns the calls of each model function with their arguments."""
  calls = {'video_forward': [], 'action_forward': [], 'prefill_actions': []}
  for name in calls:
    real = getattr(functional, name)

    def spy(*args, real=real, log=calls[name]):
      log.append(args)
      return real(*args)

    monkeypatch.setattr(functional, name, spy)
  params = param_shapes(config)
  loss = functools.partial(stages.stage_loss, config=config)
  jax.eval_shape(loss, params, config.inputs_spec(), tiny.frozen(config), jax.random.key(0))
  return calls


@pytest.mark.parametrize('draws', [1, 6])
def test_all_action_draws_share_one_video_forward(tiny, monkeypatch, draws):
  calls = trace(tiny, tiny.config('2', diffusion={'action_draws': draws}), monkeypatch)
  assert [len(c) for c in calls.values()] == [1, 1, 1]
  noised, levels = calls['action_forward'][0][2:4]
  assert noised.shape == (8, draws, 8, 10) and levels.shape == (8, draws)


@pytest.mark.parametrize('mapping, forwards', [('anchor', 2), ('symmetric', 1)])
def test_joint_stage_runs_one_forward_per_noise_level(tiny, monkeypatch, mapping, forwards):
  calls = trace(tiny, tiny.config('joint', diffusion={'mapping': mapping}), monkeypatch)
  assert len(calls['video_forward']) == forwards and len(calls['prefill_actions']) == 1
  draws = 1 if mapping == 'symmetric' else 2
  assert calls['action_forward'][0][3].shape == (8, draws)


def test_geometric_masks_stay_out_of_what_a_rollout_computes(tiny, monkeypatch):
  calls = trace(tiny, tiny.config('joint'), monkeypatch)
  video_loss, anchored = (args[5] for args in calls['video_forward'])
  assert video_loss.sight is not None and anchored.sight is None


def test_captions_are_dropped_at_the_rate_of_the_ramp():
  ramp = (0.1, 0.9, 129, 220)
  lengths = jnp.repeat(jnp.array([20, 129, 174, 220, 400]), 4000)
  text = Text(jnp.ones((len(lengths), 2, 3)), jnp.ones((len(lengths), 2), bool))
  dropped = ~stages.drop_captions(jax.random.key(0), text, None, lengths, ramp).mask.any(-1)
  rate = dropped.reshape(5, -1).mean(-1)
  middle = float(schedules.caption_drop_rate(174, ramp))
  np.testing.assert_allclose(rate, [0.1, 0.1, middle, 0.9, 0.9], atol=0.025)
  assert 0.4 < middle < 0.6


def test_tube_cells_are_noise_in_every_frame_it_hides(tiny):
  config = tiny.config('1')
  batch = config.fake_batch()
  clip = stages.encode_clip(batch, tiny.frozen(config), config)
  eps = jax.random.normal(jax.random.key(0), clip.latents.shape)
  cells = np.zeros((8, 2, 1, 2, 4, 1), bool)
  cells[:, 0, :, :, :2] = True
  nested = np.arange(8).reshape(8, 1, 1, 1, 1, 1) % 2 == 0
  noised, levels = stages.noise_clip(
    clip, eps, jnp.full((8,), 0.5), config, stages.Tube(cells, nested)
  )
  where = np.broadcast_to(cells, noised.shape)
  future = np.arange(3).reshape(3, 1, 1, 1) > 0
  np.testing.assert_array_equal(noised[where & future], np.asarray(eps)[where & future])
  np.testing.assert_array_equal(noised[1:2, :, 0], clip.latents[1:2, :, 0])  # keyframe kept
  first = where[0, :, 0]
  np.testing.assert_array_equal(noised[0, :, 0][first], np.asarray(eps)[0, :, 0][first])
  assert levels.tolist() == [[0.0, 0.5, 0.5]] * 8


def test_drawn_tubes_hide_only_what_another_camera_sees(tiny):
  config = tiny.config('1', diffusion={'tube_prob': 1.0, 'tube_size': (1, 1)})
  batch = config.fake_batch()
  view_mask = np.array(batch.view_mask)
  view_mask[0, 1] = False
  batch = dataclasses.replace(batch, view_mask=view_mask)
  clip = stages.encode_clip(batch, tiny.frozen(config), config)
  sight = jnp.ones((8, 2, 2, 2, 2), bool)
  tube = stages._tube(jax.random.key(0), sight, clip, config)
  per_sample = np.asarray(tube.cells).sum((1, 2, 3, 4, 5))
  assert per_sample.tolist() == [0] + [4] * 7  # one 2 x 2-cell patch; nothing sees sample 0's


def test_streams_are_independent_of_each_other():
  key = jax.random.key(0)
  draws = [jax.random.bits(stages.stream(key, name)).item() for name in ('a', 'b', 'a')]
  assert draws[0] == draws[2] != draws[1]
  shape = (4, 3, 5)
  np.testing.assert_array_equal(stages.unit_noise(key, shape), jax.random.normal(key, shape))
