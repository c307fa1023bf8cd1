"""Tokens and floating-point operations of one training step, counted analytically.

A multiply-add is two operations. A trained tower costs three forwards (the forward, and backwards
to inputs and to weights), a frozen one a single forward; recomputed work is not model work. Norms,
activations, embedding tables and the optimizer are left out.
"""

from __future__ import annotations

import dataclasses

from wallwm_jax.config import DISTILL_STAGES, LANGUAGE_STAGES, ExperimentConfig, QwenConfig
from wallwm_jax.training.stages import STAGES


def batch_tokens(config: ExperimentConfig, bucket: int) -> int:
  """Video tokens of one global batch of N = bucket, B * V * F * P; text and image tokens that the
  VLM reads in the stages of the language side.
  """
  if config.train.stage in LANGUAGE_STAGES:
    return config.data.batch_size * _vlm_tokens(config)
  views = len(config.model.views)
  return config.data.batch_size * views * _frames(config, bucket) * config.model.patches


def model_flops(config: ExperimentConfig, bucket: int) -> float:
  """Operations one training step of the config's stage needs on a global batch of N = bucket."""
  if config.train.stage in LANGUAGE_STAGES:
    return 2.0 * config.data.batch_size * language_macs(config)
  spec, diffusion = STAGES[config.train.stage], config.diffusion
  if config.train.stage in DISTILL_STAGES:
    # The way to the anchor, a sample and the critic's three forwards every step. A turn adds the
    # sample's backward, teacher and critic; with actions, their tower and an anchored forward.
    action = 'action' in spec.losses
    turn = 2 + (2 if config.distill.guidance != 1 else 1) + 1 + 3 * action
    video = config.inference.video_steps + 1 + 3 + turn / config.distill.critic_updates
    macs = video * video_macs(config, bucket)
    if action:
      cost = action_macs(config, bucket, diffusion.action_draws)
      macs += 3 * cost / config.distill.critic_updates
    return 2.0 * config.data.batch_size * macs
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


def language_macs(config: ExperimentConfig) -> float:
  """Multiply-adds of one sample of a stage of the language side; the heads are left out."""
  c, stage = config.language, config.train.stage
  vlm = qwen_macs(c.vlm, _vlm_tokens(config))
  images = len(config.model.views) * vision_macs(c.vlm, c.image_size or config.model.image_size)
  if stage == '3':
    return vlm + images
  read = c.trace_tokens * c.reader.width * c.reader.vocab
  if stage == 'vlm':
    told = c.trace_tokens * c.vlm.width * c.vlm.vocab
    return 3 * (vlm + told + images + qwen_macs(c.reader, c.trace_tokens) + read)
  latents = c.staircase.latents
  upper = dataclasses.replace(c.vlm, layer_types=c.vlm.layer_types[c.staircase.relay_depth :])
  branch = qwen_macs(upper, latents, c.prompt_tokens)
  return vlm + images + 3 * branch + 2 * (qwen_macs(c.reader, latents + c.trace_tokens) + read)


def qwen_macs(c: QwenConfig, tokens: int, before: int = 0) -> float:
  """Multiply-adds of one forward over `tokens`, each of which also attends to `before` others;
  the embedding and the output head are left out.
  """
  d, linear = c.width, c.layer_types.count('linear')
  values = c.linear_value_heads * c.linear_value_dim
  mixer = d * (c.conv_channels + 2 * values) + c.conv * c.conv_channels
  mixer += 3 * c.linear_value_heads * c.linear_key_dim * c.linear_value_dim  # decay, update, read
  full = d * c.head_dim * (3 * c.heads + 2 * c.kv_heads)
  full += 2 * c.heads * c.head_dim * (tokens / 2 + before)
  layers = linear * mixer + (c.layers - linear) * full + c.layers * 3 * d * c.ffn
  return tokens * layers


def vision_macs(c: QwenConfig, image_size: tuple[int, int]) -> float:
  """Multiply-adds of the vision tower for one image."""
  v = c.vision
  patches = image_size[0] * image_size[1] // v.patch**2
  block = 4 * v.width**2 + 2 * v.width * v.ffn + 2 * v.width * patches
  wide = v.merge**2 * v.width
  merger = wide * (wide + c.width) / v.merge**2
  return patches * (v.pixels * v.width + v.layers * block + merger)


def _vlm_tokens(config: ExperimentConfig) -> int:
  """Tokens of a prompt and of the answer that is read after it."""
  c = config.language
  answers = {'3': c.answer_tokens, '4': 0, 'vlm': c.trace_tokens}
  return c.prompt_tokens + answers[config.train.stage]


def _frames(config: ExperimentConfig, bucket: int) -> int:
  return bucket + 1 + (config.model.history if config.data.window == 'chunk' else 0)
