"""Distillation of a few-step student of the video tower, with or without the action loss.

Three video towers start from one teacher run: the student ('video'), the teacher, which is frozen,
and the critic (the fake score), which follows what the student generates. A window is generated as
a rollout does it: `inference.video_steps` Euler steps to the anchor level, then the forward that
actions read. Each of these forwards makes a clean estimate, and one drawn per step is the generated
sample; what comes before it is simulated without gradient. Noised to a random level, the sample is
denoised by teacher and critic, and the difference is its gradient (`diffusion.matching`). The
critic learns by flow matching on samples, every step; the student takes a turn every
`distill.critic_updates` steps. The action loss is that of stage 2 over the cache of the student's
own anchored forward on its own way to the anchor, and its gradient reaches both towers.

Sources: DMD (arXiv 2311.18828); DMD2 (arXiv 2405.14867) for two time scales, backward simulation
and a teacher that needs no regression pairs (its GAN loss is left out); WALL-WM (arXiv 2606.01955)
for keeping the action loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.diffusion import flow, matching, schedules
from wallwm_jax.inference import denoiser
from wallwm_jax.inference.denoiser import Conditioning
from wallwm_jax.training.stages import (
  STAGES,
  Clip,
  action_losses,
  encode_clip,
  noise_weight,
  stream,
  unit_noise,
  weighted_mse,
)
from wallwm_jax.types import EventBatch, Frozen, InferenceParams, Params, PRNGKey

# Levels at which the scores are compared: next to clean both are the sample, next to noise nothing.
_LEVELS = (0.02, 0.98)


def stage_loss(
  params: Params,
  batch: EventBatch,
  frozen: Frozen,
  key: PRNGKey,
  step: Int[Array, ''],
  *,
  config: ExperimentConfig,
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """Loss of one batch at update `step` (from 0) of a distillation, and its parts.

  Args:
    params: 'video' (the student), 'action', and 'teacher' and 'critic', each with a 'video' of its
      own. frozen, key: as in `stages.stage_loss`.

  Returns:
    (loss, metrics): 'loss' and 'loss_critic' of every step; of the student's turns
    'loss_matching', and where the stage has it 'loss_action' (and 'loss_dct'), all without their
    weights. A part that has no value outside turns counts `distill.critic_updates` times in one, so
    that the mean over an interval is that over its turns.

  Source: DMD2 (arXiv 2405.14867), section 4; see the module.
  """
  distill, every = config.distill, config.distill.critic_updates
  clip = encode_clip(batch, frozen, config)
  cond = conditioning(batch, clip, config.model.steps_per_latent)
  noise = unit_noise(stream(key, 'noise'), clip.latents.shape)
  path = denoiser.path_to_anchor(
    InferenceParams(jax.lax.stop_gradient(params), frozen), cond, noise, cfg=config)
  sigmas = jnp.asarray(denoiser.anchor_sigmas(config))
  drawn = jax.random.randint(stream(key, 'step'), (), 0, len(sigmas))

  def sample_of(params):
    return _estimate(params, path[drawn], sigmas[drawn], cond, frozen, config)

  def turn(student):
    whole = params | student
    sample = sample_of(whole)
    parts = {'loss_matching': _matching_loss(
      whole, sample, clip, cond, frozen, stream(key, 'matching'), config)}
    if 'action' in STAGES[config.train.stage].losses:
      features = denoiser.run_video(
        InferenceParams(whole, frozen), cond, path[-1], sigmas[-1], config)[1]
      shape = (len(noise), config.diffusion.action_draws)
      levels = schedules.sample_sigma(
        stream(key, 'action_sigma'), shape, config.diffusion.action_shift)
      parts |= action_losses(
        whole, batch, clip, features, levels, stream(key, 'action'), config)
    return jax.lax.stop_gradient(sample), parts

  student = {name: params[name] for name in ('action', 'video')}
  nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(turn, student)[1])

  def rest(student):
    return sample_of(params | jax.lax.stop_gradient(student)), nothing

  sample, parts = jax.lax.cond(step % every == 0, turn, rest, student)
  critic = _critic_loss(
    params['critic'], jax.lax.stop_gradient(sample), clip, cond, frozen, stream(key, 'critic'),
    config)
  weights = {'loss_matching': distill.video_weight}
  total = critic + sum(
    weights.get(name, distill.action_weight) * part for name, part in parts.items())
  parts = {name: every * part for name, part in parts.items()}
  return total, {'loss': total, 'loss_critic': critic, **parts}


def conditioning(batch: EventBatch, clip: Clip, steps_per_latent: int) -> Conditioning:
  """What a rollout from the known frames of a clip would be given."""
  known = clip.latents.shape[2] - batch.actions.shape[1] // steps_per_latent
  return Conditioning(
    known=clip.latents[:, :, :known],
    state=batch.state,
    text=batch.text,
    view_mask=batch.view_mask,
    future_mask=clip.frame_mask[:, known:],
  )


def split_critic(tree: Params) -> tuple[Params, Params]:
  """(critic, student) of top-level subtrees that train."""
  return ({name: x for name, x in tree.items() if name == 'critic'},
          {name: x for name, x in tree.items() if name != 'critic'})


def take_turns(
  critic: optax.GradientTransformation, student: optax.GradientTransformation, every: int
) -> optax.GradientTransformation:
  """Updates the subtree 'critic' at every call and all else at calls 0, `every`, 2 `every`, ...

  Between its turns the student's optimizer does not see a gradient: its momentum, weight decay and
  schedule stand still.
  """
  student = optax.conditionally_mask(student, lambda count: count % every == 0)

  def init(params):
    theirs, own = split_critic(params)
    return {'critic': critic.init(theirs), 'student': student.init(own)}

  def update(grads, state, params):
    sides = (split_critic(grads), split_critic(params))
    (critic_grads, student_grads), (critic_params, student_params) = sides
    theirs, critic_state = critic.update(critic_grads, state['critic'], critic_params)
    own, student_state = student.update(student_grads, state['student'], student_params)
    return theirs | own, {'critic': critic_state, 'student': student_state}

  return optax.GradientTransformation(init, update)


def _estimate(params, z, sigma, cond, frozen, config, guidance=1.0) -> Array:
  """Clean estimate of z at level sigma, a scalar or [B], by the tower params['video']."""
  velocity = denoiser.guided_velocity(
    InferenceParams(params, frozen), cond, z, sigma, cfg=config, guidance=guidance)
  return flow.to_x0(velocity, z, jnp.broadcast_to(sigma, (len(z),)), 'v')


def _matching_loss(params, sample, clip, cond, frozen, key, config) -> Array:
  """`matching.matching_loss` of a sample, seen by the teacher and the critic at random levels."""
  z, t, _ = _noised(jax.lax.stop_gradient(sample), key, config)
  guidance = config.distill.guidance
  real = _estimate(params['teacher'], z, t, cond, frozen, config, guidance)
  fake = _estimate(params['critic'], z, t, cond, frozen, config)
  real, fake = jax.lax.stop_gradient((real, fake))
  return matching.matching_loss(sample, real, fake, clip.supervised)


def _critic_loss(critic, sample, clip, cond, frozen, key, config) -> Array:
  """Flow matching on generated samples, as stage 1 does it on recorded ones."""
  z, t, eps = _noised(sample, key, config)
  prediction = config.model.video.prediction
  out = denoiser.run_video(InferenceParams(critic, frozen), cond, z, t, config)[0]
  if prediction == 'x':
    out = flow.to_x0(out, z, t, 'v')
  target = flow.target(sample, eps, prediction)
  weight = flow.expand(noise_weight(t, config.diffusion.weighting), sample)
  return weighted_mse(out, target, clip.supervised, weight)


def _noised(sample, key, config) -> tuple[Array, Float[Array, 'B'], Array]:
  """A sample at a random level of its own for each window, that level, and the noise."""
  t = schedules.sample_sigma(stream(key, 'sigma'), (len(sample),), config.diffusion.shift)
  t, eps = jnp.clip(t, *_LEVELS), unit_noise(stream(key, 'eps'), sample.shape)
  return flow.add_noise(sample, eps, t), t, eps
