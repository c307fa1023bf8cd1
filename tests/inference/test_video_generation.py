"""Video sampling: against the denoiser, its guidance, conditioning, levels and refusals."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from wallwm_jax import config as configs
from wallwm_jax.convert import wan_dit
from wallwm_jax.convert.entries import assemble
from wallwm_jax.diffusion import schedules
from wallwm_jax.inference import denoiser, video
from wallwm_jax.inference.denoiser import Window
from wallwm_jax.models import functional
from wallwm_jax.types import ConfigError, DataError, Frozen, InferenceParams, NormStats, Text

PUBLIC = pathlib.Path(__file__).parents[1] / 'fixtures' / 'data' / 'samplers_pipeline.safetensors'
KEY = jax.random.key(3)
FRAMES, STEPS = 3, 3


@pytest.fixture(scope='module')
def inputs(cfg, params, make_inputs):
  """(observation, caption, noise, known latents) of B = 2 videos of two views."""
  obs, text = make_inputs()
  cells = (*cfg.model.latent_size, cfg.model.codec.channels)
  noise = jax.random.normal(KEY, (2, 2, FRAMES, *cells))
  return obs, text, noise, video.known_latents(params, obs.frames, cfg=cfg)


@pytest.fixture(scope='module')
def sample(cfg, params, inputs):
  """sample(**changes) -> latents; every argument of `generate_video` can be changed."""
  _, text, noise, known = inputs

  def run(**changes):
    given = {'text': text, 'null_text': None, 'known': known, 'noise': noise} | changes
    arrays = {k: given.pop(k) for k in ('text', 'null_text', 'known', 'noise')}
    settings = {'cfg': cfg, 'steps': STEPS, 'shift': 3.0, 'guidance': 2.0} | given
    chosen = settings.pop('params', params)
    call = jax.jit(lambda params, arrays: video.generate_video(params, **arrays, **settings))
    return np.asarray(call(chosen, arrays))

  return run


@pytest.fixture(scope='module')
def guided(sample):
  return sample()


def null_text(cfg, rows=1):
  rng = np.random.default_rng(11)
  features = rng.standard_normal((rows, cfg.model.text.tokens, cfg.model.text.width))
  return Text(features.astype(np.float32), np.arange(cfg.model.text.tokens)[None] < [[2]] * rows)


@pytest.mark.parametrize('guidance', [1.0, 3.0])
def test_euler_on_the_training_grid_is_the_denoiser(cfg, params, inputs, sample, guidance):
  obs, text, noise, _ = inputs
  cfg = dataclasses.replace(cfg, inference=dataclasses.replace(cfg.inference, guidance=guidance))
  window = Window.event(cfg, FRAMES - 1)

  @jax.jit
  def expected(params):
    cond = denoiser.encode_observation(params, obs, text, cfg=cfg, window=window)
    z = denoiser.denoise_video(
      params, cond, noise, cfg=cfg, sigmas=schedules.shifted_sigmas(STEPS, 3.0)
    )
    return functional.denormalise_latents(denoiser.known_in_place(cond, z), params.norm)

  got = sample(solver='euler', guidance=guidance)
  np.testing.assert_allclose(got, expected(params), atol=1e-4)


def read_public():
  """(tensors by group, config) of a public tower and what the public pipelines sample from it."""
  groups = {}
  with safe_open(PUBLIC, 'numpy') as file:
    for name in file.keys():  # noqa: SIM118
      group, rest = name.split('.', 1)
      groups.setdefault(group, {})[rest] = file.get_tensor(name)
    return groups, json.loads(file.metadata()['config'])


@pytest.mark.parametrize('together', [True, False])
@pytest.mark.parametrize('kind', ['text', 'frame'])
def test_samples_are_those_of_the_public_pipelines(kind, together):
  groups, config = read_public()
  shapes = {name: x.shape for name, x in groups['weights'].items()}
  naming, fields = wan_dit.infer(shapes, config['transformer'])
  inputs = {name: np.moveaxis(x, 1, -1)[:, None] for name, x in groups['inputs'].items()}
  text, null = (
    Text(x, np.ones(x.shape[:2], bool))
    for x in (groups['inputs']['text'], groups['inputs']['null'])
  )
  channels, (height, width) = fields['channels'], inputs['noise'].shape[3:5]
  cfg = configs.ExperimentConfig(
    model=configs.ModelConfig(
      video=configs.VideoConfig(**fields['config']),
      codec=configs.CodecConfig(channels=channels),
      text=configs.TextConfig(tokens=text.mask.shape[1], width=fields['text_width']),
      views=('front',),
      image_size=(8 * height, 8 * width),
    )
  )
  tower = assemble(wan_dit.model(fields), groups['weights'], naming)
  norm = NormStats(*(np.full(n, x, np.float32) for n in (10, 10, channels) for x in (0, 1)))
  params = InferenceParams({'video': tower}, Frozen(norm))

  @jax.jit
  def sample(params):
    known = inputs['frame'] if kind == 'frame' else None
    return video.generate_video(
      params, text, null, known, inputs['noise'], cfg=cfg, grid='diffusers_unipc',
      together=together, **config['sampling'],
    )  # fmt: skip

  with jax.default_matmul_precision('highest'):
    got = sample(params)
  expected = np.moveaxis(groups['outputs'][kind][-1], 1, -1)[:, None]
  np.testing.assert_allclose(got, expected, atol=1e-4)
  noise = np.moveaxis(groups['outputs'][kind][0], 1, -1)[:, None]
  assert np.abs(expected[:, :, 1:] - noise[:, :, 1:]).mean() > 0.3


def test_one_forward_or_two_are_the_same(sample, guided):
  np.testing.assert_array_equal(sample(together=True), guided)  # a tiny model takes one
  np.testing.assert_allclose(sample(together=False), guided, atol=2e-5)


def test_large_videos_take_two_forwards(cfg):
  shape = (1, 2, 3, 2, 2, 12)
  assert video.fits_together(cfg, shape)
  wide = dataclasses.replace(cfg.model.video, width=3072, heads=24, ffn=14_336)
  large = dataclasses.replace(cfg.model, video=wide, image_size=(704, 1280))
  assert not video.fits_together(dataclasses.replace(cfg, model=large), (1, 1, 31, 88, 160, 48))


def test_guidance_extrapolates_from_the_null_caption(cfg, params, sample, guided):
  empty = null_text(cfg)
  both = Text(*(np.repeat(x, 2, 0) for x in (empty.features, empty.mask)))
  away = sample(null_text=empty)
  np.testing.assert_allclose(
    sample(null_text=empty, guidance=0.0), sample(text=both, guidance=1.0), atol=2e-5
  )
  np.testing.assert_allclose(away, sample(null_text=both), atol=2e-5)
  frozen = dataclasses.replace(params.frozen, null_text=empty)
  kept = sample(params=dataclasses.replace(params, frozen=frozen))
  np.testing.assert_allclose(kept, away, atol=2e-5)
  assert np.abs(guided - away).max() > 1e-2  # without any, no text is attended to
  assert np.abs(sample(guidance=1.0) - away).max() > 1e-2


def test_given_frames_stay_and_condition_the_rest(cfg, params, make_inputs, sample, guided):
  frames = make_inputs()[0].frames
  given = functional.encode_video(cfg.model, frames, {})
  np.testing.assert_allclose(guided[:, :, :1], given, atol=1e-4)
  other = video.known_latents(params, make_inputs(seed=8)[0].frames, cfg=cfg)
  assert np.abs(sample(known=other)[:, :, 1:] - guided[:, :, 1:]).max() > 1e-2


def test_text_to_video_has_no_given_frame(sample, guided):
  free = sample(known=None)
  assert free.shape == guided.shape and np.isfinite(free).all()
  assert np.abs(free[:, :, 0] - guided[:, :, 0]).max() > 1e-2
  assert np.abs(free[:, :, 1:] - guided[:, :, 1:]).max() > 1e-2


@pytest.fixture(scope='module')
def channel_cfg(cfg):
  video_config = dataclasses.replace(cfg.model.video, conditioning='channel')
  return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, video=video_config))


def test_channel_conditioning(channel_cfg, make_params, make_inputs, sample):
  params = make_params(channel_cfg)
  known = [
    video.known_latents(params, make_inputs(seed=seed)[0].frames, cfg=channel_cfg)
    for seed in (0, 8)
  ]
  a, b = (sample(cfg=channel_cfg, params=params, known=given) for given in known)
  given = functional.denormalise_latents(known[0], params.norm)
  np.testing.assert_allclose(a[:, :, :1], given, atol=1e-5)
  assert np.abs(a[:, :, 1:] - b[:, :, 1:]).max() > 1e-2


def test_channels_of_given_frames_are_zero_without_any(channel_cfg, params, inputs, monkeypatch):
  _, text, noise, known = inputs
  channels, seen = channel_cfg.model.codec.channels, []

  def forward(_, config, z, t, text, masks):
    seen.append((z, t))
    return z[..., :channels], None

  monkeypatch.setattr(functional, 'video_forward', forward)
  monkeypatch.setattr(video.samplers, 'integrate', lambda velocity, x, *_: velocity(x, 0.5, 0.5))
  for given in (None, known):
    video.generate_video(params, text, None, given, noise, cfg=channel_cfg, guidance=1.0)
  (free, level), (conditioned, _) = seen
  assert free.shape[-1] > 2 * channels and np.all(level == 0.5)
  np.testing.assert_array_equal(free[..., :channels], noise)
  assert np.all(free[..., channels:] == 0)
  assert np.all(np.any(conditioned[:, :, 0, ..., channels:] != 0, axis=-1))
  assert np.all(conditioned[:, :, 1:, ..., channels:] == 0)


def test_the_network_is_told_whole_timesteps_and_zero_on_given_frames(
  cfg, params, inputs, monkeypatch
):
  """A tower that answers with the level it is told: Euler then adds up levels."""
  _, text, noise, known = inputs

  def forward(_, config, z, t, text, masks):
    return jnp.broadcast_to(t[:, None, :, None, None, None], z.shape), None

  monkeypatch.setattr(functional, 'video_forward', forward)
  sigmas, levels = schedules.solver_sigmas('wan', 4, 5.0)
  assert np.abs(levels - sigmas[:-1]).max() > 1e-4
  for given in (None, known):
    out = video.generate_video(
      params, text, None, given, noise, cfg=cfg, solver='euler', grid='wan', steps=4, guidance=1.0
    )
    z = functional.normalise_latents(out, params.norm)
    moved = float(np.sum(np.diff(sigmas) * levels))
    start = 0 if given is None else 1
    np.testing.assert_allclose(z[:, :, start:], noise[:, :, start:] + moved, atol=1e-4)


@pytest.mark.parametrize('solver', ['euler', 'unipc'])
def test_clean_predictions_are_converted_at_the_level_of_the_sample(
  cfg, params, inputs, monkeypatch, solver
):
  """A tower that always predicts the same clean video is followed there exactly."""
  _, text, noise, _ = inputs
  model = dataclasses.replace(
    cfg.model, video=dataclasses.replace(cfg.model.video, prediction='x')
  )
  monkeypatch.setattr(functional, 'video_forward', lambda p, c, z, t, *_: (0 * z + 0.7, None))
  out = video.generate_video(
    params, text, noise=noise, cfg=dataclasses.replace(cfg, model=model), solver=solver,
    steps=5, guidance=1.0,
  )
  np.testing.assert_allclose(functional.normalise_latents(out, params.norm), 0.7, atol=1e-4)


def test_absent_views_change_nothing(inputs, sample):
  noise, known = inputs[2:]
  mask = np.array([[True, False]] * 2)
  a = sample(view_mask=mask)
  b = sample(view_mask=mask, noise=noise.at[:, 1].add(1.0), known=known.at[:, 1].add(1.0))
  np.testing.assert_allclose(a[:, 0], b[:, 0], atol=2e-5)


def test_noise_comes_from_the_key(sample, guided):
  drawn = sample(noise=None, key=KEY, frames=FRAMES)  # another program: it may round otherwise
  np.testing.assert_allclose(drawn, guided, atol=2e-5)
  with pytest.raises(DataError, match='expected noise, or a key'):
    sample(noise=None)


def test_steps_are_reported(sample):
  seen = []
  sample(on_step=lambda sigma: seen.append(float(sigma)))
  jax.effects_barrier()
  sigmas = schedules.solver_sigmas('wan', STEPS, 3.0).sigmas[:-1]
  np.testing.assert_array_equal(np.sort(np.float32(seen))[::-1], sigmas)


def test_features_of_the_blocks_are_not_kept(cfg, params, inputs):
  """The tower returns every block's features for the action tower; here they must cost nothing."""
  deep = dataclasses.replace(
    cfg.model, video=dataclasses.replace(cfg.model.video, layers=7, width=24)
  )
  cfg = dataclasses.replace(cfg, model=deep)
  fresh = functools.partial(functional.init_params, deep)
  shapes = dataclasses.replace(params, model=jax.eval_shape(fresh, KEY))
  _, text, noise, known = inputs
  program = jax.jit(
    lambda params: video.generate_video(params, text, None, known, noise, cfg=cfg, steps=2)
  )
  sizes = re.findall(r'f32\[7,([0-9,]+)\]', program.lower(shapes).compile().as_text())
  assert sizes  # the stacked weights
  assert max(np.prod([int(n) for n in size.split(',')]) for size in sizes) <= 24 * max(32, 6, 24)


@pytest.mark.parametrize(
  ('changes', 'error', 'message'),
  [
    ({'solver': 'heun', 'grid': 'wan'}, ConfigError, 'solver: expected one of'),
    ({'steps': 0}, ConfigError, 'steps >= 1'),
    ({'grid': 'karras'}, ConfigError, 'grid: expected one of'),
    ({'noise': np.zeros((2, 1, 3, 2, 2, 12))}, DataError, 'noise: expected shape'),
    ({'known': np.zeros((2, 2, 9, 2, 2, 12))}, DataError, 'known: expected at most the 3'),
    ({'known': np.zeros((2, 2, 1, 4, 2, 12))}, DataError, 'known: expected shape'),
    ({'view_mask': np.ones((2, 3), bool)}, DataError, 'view_mask: expected shape'),
  ],
)
def test_what_does_not_fit_is_refused_by_name(sample, changes, error, message):
  with pytest.raises(error, match=message):
    sample(**changes)
