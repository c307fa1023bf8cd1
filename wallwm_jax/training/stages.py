"""The training stages as data, and the loss of those that train the towers.

A stage says what trains, which windows it accepts and which losses it sums ('joint' is the small
joint fit, 'vlm' makes a small VLM from scratch). A new stage is a new row; the losses of the
language side are in `training.language`, those of distillation in `training.distill`.

Two protocols couple the towers (arXiv 2606.01955):
  anchor     actions read ONE video forward at the anchor noise level; K independent action noise
             levels share its cache. A video loss, where the stage has one, draws its own timestep
             and runs its own forward.
  symmetric  one forward at t_V serves both losses; actions are denoised at t_A = t_V, one draw.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from wallwm_jax.config import DISTILL_STAGES, LANGUAGE_STAGES, ExperimentConfig
from wallwm_jax.diffusion import flow, losses, schedules
from wallwm_jax.geometry import sight_cone, tube_mask, yuv
from wallwm_jax.models import functional
from wallwm_jax.training import language
from wallwm_jax.types import (
    ConfigError,
    EventBatch,
    Frozen,
    LanguageBatch,
    PackedBatch,
    Packing,
    Params,
    PRNGKey,
    Text,
    pytree_dataclass,
)


@dataclasses.dataclass(frozen=True)
class StageSpec:
  """One column of the stage table.

  trainable: top-level parameter subtrees that receive gradients; every other leaf is frozen.
  windows: what `data.window` may be. losses: which losses are summed.
  caption_drop: whether the video forward loses its caption with rho(raw_length).
  reads_robot: whether what it trains knows state and actions by the statistics of its run.
  """

  trainable: tuple[str, ...]
  windows: tuple[Literal['event', 'chunk'], ...]
  losses: tuple[str, ...]
  caption_drop: bool = False
  reads_robot: bool = True


STAGES: dict[str, StageSpec] = {
    '1': StageSpec(
        ('video',), ('event', 'chunk'), ('video',), caption_drop=True, reads_robot=False),
    '2': StageSpec(('action',), ('event', 'chunk'), ('action',)),
    '3': StageSpec(('heads',), ('event',), ('align', 'next_event', 'remaining')),
    '4': StageSpec(('projector', 'staircase'), ('event',), ('trace', 'latent_align')),
    '5': StageSpec(('action', 'video'), ('chunk',), ('action', 'video')),
    'joint': StageSpec(
        ('action', 'video'), ('event', 'chunk'), ('action', 'video'), caption_drop=True),
    'vlm': StageSpec(('reader', 'vlm'), ('event',), ('vlm', 'reader')),
    'distill': StageSpec(
        ('action', 'critic', 'video'), ('event', 'chunk'), ('matching', 'action', 'critic')),
    'distill_video': StageSpec(
        ('critic', 'video'), ('event', 'chunk'), ('matching', 'critic')),
}
# What a run of distillation has beyond its student: video towers that no rollout needs.
BESIDE_STUDENT = ('critic', 'teacher')
_TOWERS, _LANGUAGE = ('action', 'video'), ('heads', 'projector', 'staircase')


def stage_of(config: ExperimentConfig) -> StageSpec:
  """The row of the stage table a config trains.

  Raises:
    ConfigError: the stage does not accept the config's window, or `train.unfreeze` names a part
      that this run does not have.
  """
  spec = STAGES[config.train.stage]
  if config.data.window not in spec.windows:
    raise ConfigError(f'config.data.window: stage {config.train.stage} expects one of '
                      f'{spec.windows}, got {config.data.window!r}.')
  unknown = set(config.train.unfreeze) - set(parts(config))
  if unknown:
    raise ConfigError(f'config.train.unfreeze: expected some of {parts(config)}, the parts of this '
                      f'run, got {sorted(unknown)}.')
  return spec


def parts(config: ExperimentConfig) -> tuple[str, ...]:
  """Top-level parameter subtrees of a run, trained or not."""
  stage = config.train.stage
  if stage == 'vlm':
    return STAGES['vlm'].trainable
  if stage == '3':
    return (*_TOWERS, 'heads')
  if stage in DISTILL_STAGES:
    return _TOWERS + BESIDE_STUDENT
  reads_latents = config.data.text == 'staircase'
  if config.language.kind != 'none' and (stage in ('4', '5') or reads_latents):
    return _TOWERS + _LANGUAGE
  return _TOWERS


def trained_parts(config: ExperimentConfig) -> tuple[str, ...]:
  """Those of `parts` that receive gradients."""
  return (*STAGES[config.train.stage].trainable, *config.train.unfreeze)


def trainable_mask(params: Params, config: ExperimentConfig) -> Params:
  """Tree of bool like `params`: True on the leaves that the run trains."""
  trainable, frozen = split_trainable(params, config)
  return jax.tree.map(lambda _: True, trainable) | jax.tree.map(lambda _: False, frozen)


def split_trainable(params: Params, config: ExperimentConfig) -> tuple[Params, Params]:
  """(trainable, frozen) top-level subtrees of `params`."""
  chosen = trained_parts(config)
  return ({name: tree for name, tree in params.items() if name in chosen},
          {name: tree for name, tree in params.items() if name not in chosen})


@pytree_dataclass
class Tube:
  """A tube mask: cells [B, V, 1, h, w, 1] are hidden in every frame that is denoised, and
  where hides_known [B, 1, 1, 1, 1, 1] is True in the conditioning frames too."""

  cells: Bool[Array, "B V 1 h w 1"]
  hides_known: Bool[Array, "B 1 1 1 1 1"]


@pytree_dataclass
class Clip:
  """The latent side of a batch.

  latents: z0 [B, V, F, h, w, C] float32, normalised. known: [F], in packed rows [B, F], True on
  conditioning frames. supervised: [B, V, F, h, w, 1], True where the video loss looks.
  view_mask [B, V] or [B, G, V], frame_mask [B, F]: which tokens exist. packing: of packed rows.
  """

  latents: Float[Array, "B V F h w C"]
  known: Bool[Array, "*B F"]
  supervised: Bool[Array, "B V F h w 1"]
  view_mask: Bool[Array, "B V"]
  frame_mask: Bool[Array, "B F"]
  packing: Packing | None = None

  def frames(self, x):
    """What belongs to events, [B, ...] or [B, G, ...], for every frame: [B, 1 or F, ...]."""
    return x[:, None] if self.packing is None else self.packing.frames(x)

  def masks(self, sight=None) -> functional.VideoMasks:
    return functional.video_masks(self.view_mask, self.frame_mask, sight, self.packing)


def packing_of(batch: EventBatch | PackedBatch) -> Packing | None:
  """Which event of a row is where; None where a row is one event."""
  if isinstance(batch, EventBatch):
    return None
  return Packing(batch.segment, batch.position, batch.step_segment, batch.step_position)


def encode_clip(batch: EventBatch | PackedBatch, frozen: Frozen, config: ExperimentConfig) -> Clip:
  """Latents of a batch (its own where it brings them) with everything that must stay out of the
  loss marked.

  Conditioning frames (the first latent frame, or history and anchor of a chunk window), frames
  beyond num_frames, absent views and latent cells touching a border pixel are unsupervised.
  """
  model, packing = config.model, packing_of(batch)
  latents = batch.latents
  if latents is None:
    frames = yuv.rgb_frames(batch.frames)
    latents = (
        functional.encode_video(model, frames, frozen.codec) if packing is None
        else functional.encode_rows(model, frames, packing))
  latents = functional.normalise_latents(latents, frozen.norm)
  if packing is None:
    index = jnp.arange(latents.shape[2])
    known = index <= (model.history if config.data.window == 'chunk' else 0)
    frame_mask = index < 1 + (batch.num_frames[:, None] - 1) // model.codec.temporal
  else:
    known, frame_mask = batch.anchor, batch.segment > 0
  clip = Clip(latents, known, None, batch.view_mask, frame_mask, packing)
  s, (h, w) = model.codec.spatial, model.latent_size
  clean = batch.pixel_mask.reshape(*batch.view_mask.shape, h, s, w, s).all((-3, -1))
  visible = clip.frames(batch.view_mask[..., None, None] & clean).swapaxes(1, 2)
  supervised = (frame_mask & ~known)[:, None, :, None, None] & visible
  return dataclasses.replace(clip, supervised=supervised[..., None])


def noise_clip(
    clip: Clip, eps: Array, sigma: Float[Array, "*B"], config: ExperimentConfig,
    tube: Tube | None = None
) -> tuple[Array, Float[Array, "B F"]]:
  """`functional.condition_video` of a clip at a noise level for each event, its tubes replaced by
  noise.
  """
  sigma = clip.frames(sigma)
  noised, known = flow.add_noise(clip.latents, eps, sigma[:, None]), clip.latents
  if tube is not None:
    noised = jnp.where(tube.cells, eps, noised)
    known = jnp.where(tube.cells & tube.hides_known, eps, known)
  return functional.condition_video(config.model, noised, sigma, known, clip.known)


def stage_loss(
    params: Params, batch: EventBatch | PackedBatch | LanguageBatch, frozen: Frozen, key: PRNGKey,
    *, config: ExperimentConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Loss of one batch under the config's stage, and its parts.

  Args:
    params: the full parameter tree; which leaves are differentiated is the caller's choice.
    batch: one EventBatch, or a PackedBatch, whose events each have noise levels of their own; a
      LanguageBatch in the stages of the language side. frozen: all that the stage reads and does
      not train.
    key: this step's key. Streams are derived from it by name, so no draw depends on another.

  Returns:
    (loss, metrics): 'loss' and the parts that the stage has ('loss_video', 'loss_action',
    'loss_dct', or those of `training.language`); float32 scalars.
  """
  spec = stage_of(config)
  if config.train.stage in LANGUAGE_STAGES:
    return language.stage_loss(params, batch, frozen, config=config)
  if config.data.text == 'staircase':
    batch = dataclasses.replace(batch, text=language.latent_text(params, batch, frozen, config))
  clip = encode_clip(batch, frozen, config)
  text = batch.text  # what the video loss is told; actions always read the full caption
  if spec.caption_drop:
    drop = stream(stream(key, 'video'), 'caption')
    text = drop_captions(
        drop, text, frozen.null_text, batch.raw_length, config.diffusion.caption_drop)
  if config.diffusion.mapping == 'symmetric':
    parts = _symmetric_losses(params, batch, clip, text, key, spec, config)
  else:
    parts = _anchored_losses(params, batch, clip, text, key, spec, config)
  total = sum(parts.values())
  return total, {'loss': total, **parts}


def _anchored_losses(params, batch, clip, text, key, spec, config) -> dict[str, Array]:
  diffusion, samples = config.diffusion, clip.view_mask.shape[:-1]
  parts = {}
  if 'video' in spec.losses:
    sigma = schedules.sample_sigma(stream(key, 'video_sigma'), samples, diffusion.shift)
    parts |= _video_pass(params, batch, clip, text, sigma, stream(key, 'video'), config)[0]
  if 'action' in spec.losses:
    features = _anchor_features(params, batch, clip, stream(key, 'anchor'), config)
    levels = schedules.sample_sigma(
        stream(key, 'action_sigma'), (*samples, diffusion.action_draws), diffusion.action_shift)
    features = _frozen_unless_trained(features, config)
    parts |= action_losses(params, batch, clip, features, levels, stream(key, 'action'), config)
  return parts


def _symmetric_losses(params, batch, clip, text, key, spec, config) -> dict[str, Array]:
  samples = clip.view_mask.shape[:-1]
  sigma = schedules.sample_sigma(stream(key, 'video_sigma'), samples, config.diffusion.shift)
  video, features = _video_pass(
      params, batch, clip, text, sigma, stream(key, 'video'), config)
  parts = video if 'video' in spec.losses else {}
  if 'action' in spec.losses:
    features, levels = _frozen_unless_trained(features, config), sigma[..., None]
    parts |= action_losses(params, batch, clip, features, levels, stream(key, 'action'), config)
  return parts


def _video_pass(params, batch, clip, text: Text, sigma, key, config: ExperimentConfig):
  """One video forward at levels sigma, one for each event, training-only masks on:
  ({'loss_video'}, features).
  """
  diffusion, model = config.diffusion, config.model
  eps = unit_noise(stream(key, 'eps'), clip.latents.shape)
  sight = _sight(batch, config)
  tube = _tube(stream(key, 'tube'), sight, clip, config)
  noised, t = noise_clip(clip, eps, sigma, config, tube)
  sight = sight if diffusion.sight_cone else None
  out, features = functional.video_forward(
      params['video'], model, noised, t, text, clip.masks(sight))
  weight = noise_weight(clip.frames(sigma)[:, None], diffusion.weighting)
  weight = flow.expand(weight, clip.latents)
  if tube is not None:
    weight = weight * jnp.where(tube.cells, diffusion.tube_weight, 1.0)
  target = flow.target(clip.latents, eps, model.video.prediction)
  return {'loss_video': weighted_mse(out, target, clip.supervised, weight)}, features


def _anchor_features(params, batch, clip, key, config: ExperimentConfig):
  """Features of the video forward at the (jittered) anchor level, as a rollout computes them: the
  full caption and no geometric mask."""
  eps = unit_noise(stream(key, 'eps'), clip.latents.shape)
  samples = clip.view_mask.shape[:-1]
  sigma = schedules.sample_anchor_sigma(stream(key, 'sigma'), samples, config.diffusion)
  noised, t = noise_clip(clip, eps, sigma, config)
  return functional.video_forward(
      params['video'], config.model, noised, t, batch.text, clip.masks())[1]


def _frozen_unless_trained(features, config: ExperimentConfig):
  """Features of the video tower, cut off where nothing below them trains."""
  trained = 'video' in trained_parts(config) or config.data.text == 'staircase'
  return features if trained else jax.lax.stop_gradient(features)


def action_losses(
    params: Params, batch: EventBatch | PackedBatch, clip: Clip, features, levels: Array,
    key: PRNGKey, config: ExperimentConfig
) -> dict[str, Array]:
  """L_A = mean_k w(t_k) ||yhat_k - y_k||^2 over levels t [B, R] (packed: [B, G, R]) sharing one
  cache; the DCT loss.
  """
  model, diffusion, action = config.model, config.diffusion, params['action']
  tau = functional.window_tau(model, config.data.window, clip.latents.shape[2])
  cache = functional.prefill_actions(action, model, features, tau, clip.masks())
  mask, draws = batch.action_mask[:, None], levels.shape[-1]
  clean = jnp.where(mask, batch.actions[:, None], 0.0)
  clean = jnp.broadcast_to(clean, (len(clean), draws, *clean.shape[2:]))
  eps = unit_noise(stream(key, 'eps'), clean.shape)
  packing = clip.packing
  t = levels if packing is None else packing.steps(levels).swapaxes(1, 2)  # [B, R] or [B, R, K]
  noised = flow.add_noise(clean, eps, t)
  steps = batch.action_mask.any(-1)
  out = functional.action_forward(
      action, model, noised, levels, batch.state, cache, steps, packing)
  target = flow.target(clean, eps, model.action.prediction)
  weight = flow.expand(noise_weight(t, diffusion.weighting), clean)
  parts = {'loss_action': weighted_mse(out, target, mask, weight)}
  if diffusion.dct_weight > 0:
    estimate = flow.to_x0(out, noised, t, model.action.prediction)
    exists = None
    if packing is not None:
      longest = model.steps_per_latent * config.data.buckets[-1]
      mask = jnp.broadcast_to(mask, clean.shape)
      estimate, clean, mask = (_by_event(x, batch, longest) for x in (estimate, clean, mask))
      levels, exists = (x.reshape(-1, *x.shape[2:]) for x in (levels, batch.event_mask))
    dct = losses.dct_action_loss(estimate, clean, mask, levels, exists)
    parts['loss_dct'] = diffusion.dct_weight * dct
  return parts


def _by_event(x: Array, batch: PackedBatch, longest: int) -> Array:
  """Steps of packed rows [B, R, K, A] event by event, [B * G, R, longest, A], padded with zeros."""
  events = jnp.arange(1, batch.event_mask.shape[1] + 1)
  own = batch.step_segment[:, None] == events[:, None]  # [B, G, K]
  index = jnp.argmax(own, -1)[..., None] + jnp.arange(longest)  # [B, G, longest]
  inside = jnp.arange(longest) < own.sum(-1, keepdims=True)
  index = jnp.minimum(index, x.shape[2] - 1).reshape(len(x), 1, -1, 1)
  x = jnp.take_along_axis(x, index, axis=2).reshape(*x.shape[:2], *inside.shape[1:], -1)
  x = jnp.where(inside[:, None, ..., None], x, 0).swapaxes(1, 2)
  return x.reshape(-1, *x.shape[2:])


def weighted_mse(out, target, mask, weight) -> Float[Array, ""]:
  """Mean over the True entries of `mask` of weight * (out - target)^2, in float32.

  Masked entries have neither value nor gradient, whatever they hold. The mean is over the mask, so
  the weight is not normalised away.
  """
  difference = jnp.where(mask, out.astype(jnp.float32) - target.astype(jnp.float32), 0.0)
  return losses.masked_mean(weight * jnp.square(difference), mask)


def noise_weight(sigma, weighting: Literal['uniform', 'sigma']):
  """Loss weight w(t): 1, or t itself ('sigma': the noisy end, where the scene is decided)."""
  return sigma if weighting == 'sigma' else jnp.ones_like(sigma)


def drop_captions(key: PRNGKey, text: Text, null_text: Text | None, raw_length, ramp) -> Text:
  """`text` with each caption emptied (see `Frozen.null_text`) with probability rho(raw_length)."""
  drop = jax.random.uniform(key, raw_length.shape) < schedules.caption_drop_rate(raw_length, ramp)
  empty = functional.empty_text(text, null_text)
  return Text(
      jnp.where(drop[..., None, None], empty.features, text.features),
      jnp.where(drop[..., None], empty.mask, text.mask))


def stream(key: PRNGKey, name: str) -> PRNGKey:
  """The key of a named random stream."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def unit_noise(key: PRNGKey, shape: tuple[int, ...]) -> Array:
  """Gaussian float32 noise, the bits of `jax.random.normal(key, shape)`.

  Drawn as a matrix: the counters of a six-axis draw take XLA:CPU seconds to compile.
  """
  return jax.random.normal(key, (shape[0], math.prod(shape[1:]))).reshape(shape)


def _patch_grid(config: ExperimentConfig) -> tuple[int, int]:
  (h, w), (_, ph, pw) = config.model.latent_size, config.model.video.patch
  return h // ph, w // pw


def _sight(batch: EventBatch | PackedBatch, config: ExperimentConfig):
  """Co-visibility of the batch's cameras [B, V, P, V, P], packed [B, G, V, P, V, P], or None where
  nothing in the config reads it.
  """
  diffusion = config.diffusion
  if not diffusion.sight_cone and diffusion.tube_prob == 0:
    return None
  events = batch.view_mask.shape[:-1]
  cameras = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(events):]), batch.cameras)
  cones = sight_cone.patch_cones(
      cameras, config.model.image_size, _patch_grid(config), diffusion.cone_slack)
  sight = sight_cone.sight_cone_mask(cones, *diffusion.cone_depth)
  return sight.reshape(*events, *sight.shape[1:])


def _tube(key: PRNGKey, sight, clip: Clip, config: ExperimentConfig) -> Tube | None:
  """This batch's tubes; None where the config has none."""
  diffusion, present = config.diffusion, clip.view_mask
  if diffusion.tube_prob == 0:
    return None
  seen = sight & present[..., :, None, None, None] & present[..., None, None, :, None]
  grid, (_, ph, pw) = _patch_grid(config), config.model.video.patch
  patches = tube_mask.sample_tube(
      stream(key, 'window'), seen.reshape(-1, *seen.shape[-4:]), grid, diffusion.tube_size,
      diffusion.tube_prob)
  cells = patches.reshape(*present.shape, *grid).repeat(ph, axis=-2).repeat(pw, axis=-1)
  cells = clip.frames(cells).swapaxes(1, 2)[..., None]
  nested = jax.random.bernoulli(
      stream(key, 'condition'), diffusion.tube_cond_prob, present.shape[:-1])
  return Tube(cells, flow.expand(clip.frames(nested)[:, None], cells))
