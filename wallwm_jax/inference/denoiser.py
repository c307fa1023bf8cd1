"""The denoiser of both inference modes, as a chain of small pure functions.

  observation -> known latents -> video at the anchor level -> cached action keys/values -> actions

The window is a parameter: an event window has no history, a chunk window has M clean history
latents before the anchor. Everything else, including every network call, is shared.
Source: WALL-WM (arXiv 2606.01955).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.diffusion import flow, samplers, schedules
from wallwm_jax.models import functional
from wallwm_jax.types import (
  ActionChunk,
  ConfigError,
  DataError,
  InferenceParams,
  NormStats,
  Observation,
  PRNGKey,
  StatsMismatchError,
  Text,
  pytree_dataclass,
)

Latents = Float[Array, "B V F h w C"]


@dataclasses.dataclass(frozen=True)
class Window:
  """Static shape of a prediction: `history` clean latents M, then the anchor, then `future` N."""

  kind: Literal['event', 'chunk']
  history: int
  future: int

  @classmethod
  def event(cls, cfg: ExperimentConfig, bucket: int) -> Window:
    """An event window of N = bucket future latents."""
    if not 1 <= bucket <= cfg.model.max_future:
      raise ConfigError(f'event bucket: expected 1..{cfg.model.max_future} '
                        f'(config.model.max_future), got {bucket}. Choose one of '
                        f'config.data.buckets, {cfg.data.buckets}.')
    return cls('event', 0, bucket)

  @classmethod
  def chunk(cls, cfg: ExperimentConfig) -> Window:
    """The observation-centred window of unified mode: M history + anchor + N future latents."""
    return cls('chunk', cfg.model.history, cfg.model.future)

  @property
  def known(self) -> int:
    """Clean latent frames: history and anchor."""
    return self.history + 1


@pytree_dataclass
class Noise:
  """The randomness of one prediction, unit Gaussian float32.

  video: [B, V, F, h, w, C] (its known frames are read only under 'channel' conditioning);
  action: [B, K, A].
  """

  video: Latents
  action: Float[Array, "B K A"]


@pytree_dataclass
class Conditioning:
  """What every network call of one prediction reads and none changes.

  known: [B, V, 1+M, h, w, C] normalised clean latents; state: [B, A] normalised; text: caption
  features; view_mask: [B, V]; future_mask: [B, N], True on latents inside the predicted length.
  committed: normalised actions [B, K, A] and which of them [B, K] will be executed whatever is
  predicted, or None.
  """

  known: Latents
  state: Float[Array, "B A"]
  text: Text
  view_mask: Bool[Array, "B V"]
  future_mask: Bool[Array, "B N"]
  committed: ActionChunk | None = None


@pytree_dataclass
class EventPrediction:
  """One imagined and realisable segment.

  chunk: actions [B, K, A] in physical units relative to the anchor pose, with step mask [B, K].
  latents: [B, V, 1+N, h, w, C] anchor frame and the clean-video estimate made at the anchor noise
    level, in codec units (ready for `functional.decode_video`).
  mask: [B, 1+N], True on latent frames inside the predicted length.
  """

  chunk: ActionChunk
  latents: Latents
  mask: Bool[Array, "B F"]


def sample_noise(key: PRNGKey, cfg: ExperimentConfig, batch: int, window: Window) -> Noise:
  """Noise for `batch` predictions in `window`."""
  model = cfg.model
  video_key, action_key = jax.random.split(key)
  frames, steps = window.known + window.future, window.future * model.steps_per_latent
  video = (batch, len(model.views), frames, *model.latent_size, model.codec.channels)
  action = (batch, steps, model.action_spec.dim)
  return Noise(jax.random.normal(video_key, video), jax.random.normal(action_key, action))


def encode_observation(params: InferenceParams, obs: Observation, text: Text,
                       length: Int[Array, "B"] | None = None,
                       committed: ActionChunk | None = None, *, cfg: ExperimentConfig,
                       window: Window) -> Conditioning:
  """Conditioning of a prediction: frames through the codec once, state and latents normalised.

  Args:
    obs: frames [B, V, 1 + 4M, H, W, 3] uint8, state [B, A] physical, view_mask [B, V].
    text: features [B, X, E] and mask [B, X] of the caption or instruction.
    length: [B] valid future latents, 1..N; None means all N.
    committed: physical actions [B, K, A] relative to the current pose, and which of them [B, K] are
      being executed already: the others are predicted to follow on them.

  Raises:
    DataError: an observation or text whose shape or dtype is not the config's.
    StatsMismatchError: statistics of another action layout or codec.
  """
  norm = params.norm
  check_inputs(cfg, window, obs, text)
  check_stats(cfg, norm)
  latents = functional.encode_video(cfg.model, obs.frames, params.frozen.codec)
  count = jnp.full((obs.state.shape[0],), window.future) if length is None else jnp.asarray(length)
  if committed is not None:
    actions = (committed.actions - norm.action_mean) / norm.action_scale
    committed = ActionChunk(actions, committed.mask)
  return Conditioning(
      known=functional.normalise_latents(latents, norm),
      state=(obs.state - norm.state_mean) / norm.state_scale,
      text=text,
      view_mask=obs.view_mask,
      future_mask=jnp.arange(window.future) < count[:, None],
      committed=committed,
  )


def anchor_sigmas(cfg: ExperimentConfig) -> np.ndarray:
  """Noise levels from pure noise to the anchor; [1] when the tower is read at pure noise itself."""
  steps = cfg.inference.video_steps
  if steps == 0 or schedules.anchor_sigma(cfg.diffusion) == 1.0:
    return np.ones((1,), np.float32)
  return schedules.sigmas_to_anchor(cfg.diffusion, steps)


def denoise_video(params: InferenceParams, cond: Conditioning, noise: Latents, *,
                  cfg: ExperimentConfig, sigmas: np.ndarray) -> Latents:
  """Latents integrated from `noise` at sigmas[0] to sigmas[-1] by Euler steps of `guided_velocity`,
  guided as `config.inference.guidance` says.

  Known frames of the result mean nothing: `known_in_place` puts the given ones there.
  """
  return samplers.euler(_velocity(params, cond, cfg), noise, sigmas)


def path_to_anchor(params: InferenceParams, cond: Conditioning, noise: Latents, *,
                   cfg: ExperimentConfig) -> Float[Array, "S B V F h w C"]:
  """All that `denoise_to_anchor` passes through: latents at each of `anchor_sigmas`, first `noise`
  and last its result."""
  sigmas, velocity = anchor_sigmas(cfg), _velocity(params, cond, cfg)
  return samplers.trajectory(
      lambda z, sigma, _: velocity(z, sigma), noise, schedules.Schedule(sigmas, sigmas[:-1]))


def guided_velocity(params: InferenceParams, cond: Conditioning, z: Latents, sigma, *,
                    cfg: ExperimentConfig, guidance: float) -> Latents:
  """Velocity of z at noise level `sigma`, a scalar or [B].

  `guidance` other than 1 adds classifier-free guidance (a second, text-free forward).
  """
  v = run_video(params, cond, z, sigma, cfg)[0]
  if guidance == 1.0:
    return v
  empty = functional.empty_text(cond.text, params.frozen.null_text)
  dropped = run_video(params, dataclasses.replace(cond, text=empty), z, sigma, cfg)[0]
  return dropped + guidance * (v - dropped)


def run_video(params: InferenceParams, cond: Conditioning, z: Latents, sigma,
              cfg: ExperimentConfig):
  """The video tower on z at noise level `sigma` (a scalar or [B]), known frames given clean:
  (velocity of z, features of every layer, masks).
  """
  batch, known = cond.known.shape[0], cond.known.shape[2]
  frame_mask = jnp.pad(cond.future_mask, ((0, 0), (known, 0)), constant_values=True)
  masks = functional.video_masks(cond.view_mask, frame_mask)
  level = jnp.broadcast_to(sigma, (batch,))
  inputs, t = functional.condition_video(cfg.model, z, level, known_in_place(cond, z),
                                         np.arange(z.shape[2]) < known)
  out, features = functional.video_forward(params.model['video'], cfg.model, inputs, t, cond.text,
                                           masks)
  return flow.to_velocity(out, z, level, cfg.model.video.prediction), features, masks


def denoise_to_anchor(params: InferenceParams, cond: Conditioning, noise: Latents, *,
                      cfg: ExperimentConfig) -> Latents:
  """Latents at the anchor level, `config.inference.video_steps` Euler steps from pure noise."""
  return denoise_video(params, cond, noise, cfg=cfg, sigmas=anchor_sigmas(cfg))


def anchor_cache(params: InferenceParams, cond: Conditioning, z: Latents, *,
                 cfg: ExperimentConfig, window: Window) -> tuple[functional.ServingCache, Latents]:
  """The one anchored video forward: per-layer action keys/values, and the clean estimate of z."""
  sigma = anchor_sigmas(cfg)[-1]
  velocity, features, masks = run_video(params, cond, z, sigma, cfg)
  return _prefill(params, features, masks, cfg, window), z - sigma * velocity


def denoise_actions(params: InferenceParams, cond: Conditioning, cache: functional.ServingCache,
                    noise: Float[Array, "B K A"], *,
                    cfg: ExperimentConfig) -> Float[Array, "B K A"]:
  """Normalised actions by `config.inference.action_steps` Euler steps against one fixed cache."""
  sigmas = schedules.shifted_sigmas(cfg.inference.action_steps, cfg.diffusion.action_shift)

  def velocity(a, sigma):
    return _onto_committed(cond, noise, _action_velocity(params, cond, cache, a, sigma, cfg))

  return samplers.euler(velocity, noise, sigmas)


def denoise_jointly(params: InferenceParams, cond: Conditioning, noise: Noise, *,
                    cfg: ExperimentConfig, window: Window) -> tuple[Latents, Array]:
  """Clean latents and normalised actions by the symmetric 1-to-1 map: one noise level for both.

  `config.inference.action_steps` Euler steps, one video forward each.
  """
  sigmas = schedules.shifted_sigmas(cfg.inference.action_steps, cfg.diffusion.shift)

  def step(carry, pair):
    (z, a), (sigma, sigma_next) = carry, pair
    velocity, features, masks = run_video(params, cond, z, sigma, cfg)
    cache = _prefill(params, features, masks, cfg, window)
    towards = _onto_committed(
        cond, noise.action, _action_velocity(params, cond, cache, a, sigma, cfg))
    return (z + (sigma_next - sigma) * velocity, a + (sigma_next - sigma) * towards), None

  return jax.lax.scan(step, (noise.video, noise.action), (sigmas[:-1], sigmas[1:]))[0]


def action_mask(cfg: ExperimentConfig, future_mask: Bool[Array, "B N"]) -> Bool[Array, "B K"]:
  """Step mask of the action tokens: K_p steps per valid future latent."""
  return jnp.repeat(future_mask, cfg.model.steps_per_latent, axis=1)


def known_in_place(cond: Conditioning, z: Latents) -> Latents:
  """`z` with its known frames replaced by the given clean ones."""
  return jnp.concatenate([cond.known, z[:, :, cond.known.shape[2]:]], axis=2)


def predict(params: InferenceParams, cond: Conditioning, noise: Noise, *,
            cfg: ExperimentConfig, window: Window) -> EventPrediction:
  """The whole chain after encoding; deterministic given `noise`."""
  if cfg.diffusion.mapping == 'symmetric':
    clean, actions = denoise_jointly(params, cond, noise, cfg=cfg, window=window)
  else:
    z = denoise_to_anchor(params, cond, noise.video, cfg=cfg)
    cache, clean = anchor_cache(params, cond, z, cfg=cfg, window=window)
    actions = denoise_actions(params, cond, cache, noise.action, cfg=cfg)
  norm = params.norm
  actions = actions * norm.action_scale + norm.action_mean
  from_anchor = known_in_place(cond, clean)[:, :, window.history:]
  return EventPrediction(
      chunk=ActionChunk(actions, action_mask(cfg, cond.future_mask)),
      latents=functional.denormalise_latents(from_anchor, norm),
      mask=jnp.pad(cond.future_mask, ((0, 0), (1, 0)), constant_values=True),
  )


def imagine(params: InferenceParams, cond: Conditioning, noise: Latents, *, cfg: ExperimentConfig,
            window: Window, steps: int) -> Float[Array, "B V T H W 3"]:
  """Frames in [0, 1] from the anchor on, T = 1 + 4N, denoised to level 0 by `steps` Euler steps."""
  sigmas = schedules.shifted_sigmas(steps, cfg.diffusion.shift)
  z = denoise_video(params, cond, noise, cfg=cfg, sigmas=sigmas)
  latents = functional.denormalise_latents(known_in_place(cond, z), params.norm)
  # The codec is causal: the window is decoded whole, history included, and cut afterwards.
  anchor = window.history * cfg.model.steps_per_latent
  return functional.decode_video(cfg.model, latents, params.frozen.codec)[:, :, anchor:]


def input_specs(cfg: ExperimentConfig, window: Window, batch: int) -> tuple[Observation, Text]:
  """ShapeDtypeStructs of the observation and text that a prediction in `window` takes."""
  model, s = cfg.model, jax.ShapeDtypeStruct
  views, frames = len(model.views), 1 + model.steps_per_latent * window.history
  obs = Observation(
      frames=s((batch, views, frames, *model.image_size, 3), np.dtype('uint8')),
      state=s((batch, model.action_spec.dim), np.dtype('float32')),
      view_mask=s((batch, views), np.dtype(bool)),
  )
  text = Text(
      features=s((batch, model.text.tokens, model.text.width), np.dtype('float32')),
      mask=s((batch, model.text.tokens), np.dtype(bool)),
  )
  return obs, text


def check_inputs(cfg: ExperimentConfig, window: Window, obs: Observation, text: Text) -> None:
  """Raises DataError unless shapes and dtypes are the config's. Static, so free under jit."""
  batch = obs.state.shape[0] if obs.state.ndim else 0
  for got, spec in zip((obs, text), input_specs(cfg, window, batch)):
    for field in dataclasses.fields(spec):
      have, want = getattr(got, field.name), getattr(spec, field.name)
      if have.shape != want.shape or have.dtype != want.dtype:
        raise DataError(
            f'{type(spec).__name__}.{field.name}: expected {want.dtype} {want.shape} for the '
            f'{window.kind} window, got {have.dtype} {tuple(have.shape)}. The config has views '
            f'{cfg.model.views}, image_size {cfg.model.image_size} and history {window.history}.')


def check_stats(cfg: ExperimentConfig, norm: NormStats) -> None:
  """Raises StatsMismatchError unless `norm` has the channel counts of the config."""
  for field in dataclasses.fields(norm):
    have = jnp.shape(getattr(norm, field.name))
    latent = field.name.startswith('latent')
    want = (cfg.model.codec.channels if latent else cfg.model.action_spec.dim,)
    if have != want:
      raise StatsMismatchError(
          f'norm.{field.name}: expected shape {want} (config.model.'
          f'{"codec.channels" if latent else "action_spec"}), got {have}. Load the statistics that '
          'were saved with this model.')


def _velocity(params: InferenceParams, cond: Conditioning, cfg: ExperimentConfig):
  return functools.partial(
      guided_velocity, params, cond, cfg=cfg, guidance=cfg.inference.guidance)


def _prefill(params: InferenceParams, features, masks, cfg: ExperimentConfig, window: Window):
  tau = functional.window_tau(cfg.model, window.kind, window.known + window.future)
  return functional.prefill_serving(params.model['action'], cfg.model, features, tau, masks,
                                    cfg.inference.cache_dtype)


def _action_velocity(params: InferenceParams, cond: Conditioning, cache, a, sigma,
                     cfg: ExperimentConfig):
  """Velocity [B, K, A] of actions `a` at noise level `sigma`."""
  t = jnp.full((a.shape[0], 1), sigma)
  draws = a[:, None]
  out = functional.action_forward(params.model['action'], cfg.model, draws, t, cond.state, cache,
                                  action_mask(cfg, cond.future_mask))
  return flow.to_velocity(out, draws, t, cfg.model.action.prediction)[:, 0]


def _onto_committed(cond: Conditioning, noise, velocity):
  """The velocity [B, K, A], on committed steps that of the straight line from `noise` to them.

  They are at every level what the forward process makes of them, and end exact: in-painting by
  replacement, as real-time chunking needs (arXiv 2506.07339, without its gradient guidance).
  """
  if cond.committed is None:
    return velocity
  held = cond.committed
  return jnp.where(held.mask[..., None], noise - held.actions, velocity)
