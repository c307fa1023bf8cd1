"""Tokens and floating-point operations of one training step, counted analytically.

A multiply-add is two operations. A trained tower costs three forwards (the forward, and backwards
to inputs and to weights), a frozen one a single forward; recomputed work is not model work. Norms,
activations, embedding tables and the optimizer are left out.
"""

from __future__ import annotations

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.training.stages import STAGES


def video_tokens(config: ExperimentConfig, bucket: int) -> int:
  """Video tokens of one global batch of N = bucket, B * V * F * P."""
  views = len(config.model.views)
  return config.data.batch_size * views * _frames(config, bucket) * config.model.patches


def model_flops(config: ExperimentConfig, bucket: int) -> float:
  """Operations one training step of the config's stage needs on a global batch of N = bucket."""
  spec, diffusion = STAGES[config.train.stage], config.diffusion
  anchored = diffusion.mapping == 'anchor'
  forwards = len(spec.losses) if anchored else 1
  video = forwards * video_macs(config, bucket) * (3 if 'video' in spec.trainable else 1)
  action = 0.0
  if 'action' in spec.losses:
    action = 3 * action_macs(config, bucket, diffusion.action_draws if anchored else 1)
  return 2.0 * config.data.batch_size * (video + action)


def video_macs(config: ExperimentConfig, bucket: int) -> float:
  """Multiply-adds of one video forward of one sample."""
  model, c = config.model, config.model.video
  views, frames, patches, d = len(model.views), _frames(config, bucket), model.patches, c.width
  tokens = views * frames * patches
  linear = 4 * d * d + 2 * d * d + 2 * d * c.ffn  # self-attention, q and o of text attention, FFN
  attention = 2 * d * (frames * patches + model.text.tokens)
  if c.cross_view:
    linear += 4 * d * d
    attention += 2 * d * views * patches
  text = 2 * d * d * model.text.tokens
  cells, channels = c.patch[1] * c.patch[2], model.codec.channels
  time = frames * d * (c.freq_dim + (8 if c.cross_view else 7) * d)
  ends = tokens * d * cells * (model.video_inputs + channels)
  return c.layers * (tokens * (linear + attention) + text) + time + ends


def action_macs(config: ExperimentConfig, bucket: int, draws: int) -> float:
  """Multiply-adds of the cache and of one action forward with `draws` noise levels, one sample."""
  model, c = config.model, config.model.action
  d, steps = c.width, bucket * model.steps_per_latent
  keys = len(model.views) * _frames(config, bucket) * model.patches
  linear = 4 * d * d + 2 * d * d + 3 * d * c.ffn  # self-attention, q and o of the coupling, FFN
  attention = 2 * d * (steps + keys)
  # The one state token is attended to with weight 1: its v and o, once for all steps and draws.
  prefill = 2 * keys * model.video.width * d + 2 * d * d
  time = d * (c.freq_dim + 10 * d)
  ends = steps * d * (d + 2 * model.action_spec.dim)
  layers = model.video.layers * (prefill + draws * steps * (linear + attention))
  return layers + draws * (time + ends)


def _frames(config: ExperimentConfig, bucket: int) -> int:
  return bucket + 1 + (config.model.history if config.data.window == 'chunk' else 0)
