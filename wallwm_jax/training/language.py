"""Losses of the language side: the heads of the frozen VLM (stage 3), the staircase (stage 4), and
a small VLM made from scratch (stage 'vlm').

Source: WALL-WM (arXiv 2606.01955). Stage 3: l_align ||c_VLM - c_T5||^2 + l_next CE(next event) +
l_time Huber(remaining time). Stage 4: L_CoT = -sum_m log P(r_m | z_1..K_c, r_<m).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.diffusion.losses import masked_mean
from wallwm_jax.geometry import yuv
from wallwm_jax.models import language
from wallwm_jax.types import (
    EventBatch,
    Frozen,
    Language,
    LanguageBatch,
    PackedBatch,
    Params,
    Prompt,
    Text,
)

Parts = dict[str, Float[Array, '']]


def stage_loss(
    params: Params, batch: LanguageBatch, frozen: Frozen, *, config: ExperimentConfig
) -> tuple[Float[Array, ''], Parts]:
  """(loss, metrics) of one batch: 'loss', its weighted parts 'loss_*', and what people read:
  'accuracy_*' (0..1), 'mae_remaining' (s)."""
  compute = {'3': _heads, '4': _staircase, 'vlm': _small_models}[config.train.stage]
  losses, read = compute(params, batch, frozen.language, config)
  total = sum(losses.values())
  return total, {'loss': total, **losses, **read}


def latent_text(
    params: Params, batch: EventBatch | PackedBatch, frozen: Frozen, config: ExperimentConfig
) -> Text:
  """Text of the staircase for a batch of windows, one for each event, differentiable in the branch
  and the head.
  """
  moment = (_anchors(batch, config), batch.state, batch.view_mask, batch.prompt)
  events = batch.raw_length.shape
  moment = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(events):]), moment)
  _, _, cache = language.read_prompt(frozen.language, config.language, *moment)
  text = _condition_latents(params, frozen.language, cache, config)[0]
  return jax.tree.map(lambda x: x.reshape(*events, *x.shape[1:]), text)


def _anchors(batch: EventBatch | PackedBatch, config: ExperimentConfig) -> Array:
  """The frame [B, V, H, W, 3] or [B, G, V, H, W, 3] that every event starts from."""
  if isinstance(batch, EventBatch):
    anchor = config.model.steps_per_latent * config.model.history
    anchor = anchor if config.data.window == 'chunk' else 0
    return yuv.rgb_frames(batch.frames[:, :, anchor : anchor + 1])[:, :, 0]
  events = jnp.arange(1, batch.event_mask.shape[1] + 1)
  first = jnp.argmax(batch.frame_segment[:, None] == events[:, None], -1)  # [B, G]
  index = first.reshape(len(first), 1, -1, *(1,) * (batch.frames.ndim - 3))
  return jnp.moveaxis(yuv.rgb_frames(jnp.take_along_axis(batch.frames, index, axis=2)), 2, 1)


def _condition_latents(params: Params, frozen: Language, cache, config: ExperimentConfig):
  """(Text, logits of its mask, latents) of a cached prompt."""
  latents = language.latent_states(params['staircase'], frozen.vlm, config.language, cache)
  text, present = language.condition(
      params['heads'], config.language, config.model.text, latents)
  return text, present, latents


def _heads(params, batch: LanguageBatch, frozen: Language, config: ExperimentConfig):
  c, text, heads = config.language, config.model.text, params['heads']
  hidden, mask, cache = language.read_prompt(
      frozen, c, batch.frames, batch.state, batch.view_mask, batch.prompt)
  begun = language.read_on(
      frozen, c, hidden, mask, cache, language.opening(frozen, len(mask)))
  told, exists = language.read_on(frozen, c, hidden, mask, cache, batch.answer)
  features, present = language.condition(
      heads, c, text, told[:, mask.shape[1]:], batch.answer.mask)
  logits = language.next_event(heads, c, text, *begun, frozen.bank, batch.last)
  seconds = language.remaining_time(heads, c, text, told, exists)
  error = (seconds - batch.remaining) / c.heads.time_unit
  ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch.caption)
  losses = {
      'loss_align': c.align_weight * _alignment(features, present, batch.text),
      'loss_next_event': c.next_weight * jnp.mean(ce),
      'loss_remaining': c.time_weight * jnp.mean(optax.huber_loss(error)),
  }
  return losses, {
      'accuracy_next_event': jnp.mean(jnp.argmax(logits, -1) == batch.caption),
      'mae_remaining': jnp.mean(jnp.abs(seconds - batch.remaining)),
  }


def _staircase(params, batch: LanguageBatch, frozen: Language, config: ExperimentConfig):
  c = config.language
  _, _, cache = language.read_prompt(
      frozen, c, batch.frames, batch.state, batch.view_mask, batch.prompt)
  text, present, latents = _condition_latents(params, frozen, cache, config)
  logits = language.trace_logits(params['projector'], frozen.reader, c, latents, batch.trace)
  loss, accuracy = _next_token(logits, batch.trace)
  align = c.latent_align_weight * _alignment(text, present, batch.text)
  return {'loss_trace': loss, 'loss_latent_align': align}, {'accuracy_trace': accuracy}


def _small_models(params, batch: LanguageBatch, frozen: Language, config: ExperimentConfig):
  """Language modelling: the VLM answers the prompt, the reader knows only the words before."""
  c, trace = config.language, batch.trace
  learning = dataclasses.replace(frozen, vlm=params['vlm'])
  hidden, mask, cache = language.read_prompt(
      learning, c, batch.frames, batch.state, batch.view_mask, batch.prompt,
      size=c.prompt_tokens + c.trace_tokens)
  last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), 1)
  asked = jnp.take_along_axis(hidden, last[:, None, None], 1)
  answer = language.read_answer(learning, c, Prompt(trace.ids[:, :-1], trace.mask[:, :-1]), cache)
  logits = language.logits(params['vlm'], c.vlm, jnp.concatenate([asked, answer], 1))
  loss, accuracy = _next_token(logits, trace)
  read = _read_alone(params['reader'], trace, config)
  reader_loss, reader_accuracy = _next_token(read, Prompt(trace.ids[:, 1:], trace.mask[:, 1:]))
  return (
      {'loss_vlm': loss, 'loss_reader': reader_loss},
      {'accuracy_vlm': accuracy, 'accuracy_reader': reader_accuracy},
  )


def _read_alone(reader: Params, trace: Prompt, config: ExperimentConfig):
  """Logits [B, M-1, U] of tokens 1.. of a trace from those before."""
  c = config.language.reader
  x = language.embed(reader, c, trace.ids[:, :-1])
  positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), (3, *x.shape[:2]))
  hidden, _ = language.prefill(reader, c, x, positions, trace.mask[:, :-1], size=x.shape[1])
  return language.logits(reader, c, hidden)


def _alignment(ours: Text, present: Float[Array, 'B X'], target: Text):
  """Mean ||c_VLM - c_T5||^2 over the values of rows that exist, and cross-entropy of which do."""
  where = target.mask[..., None]
  error = jnp.where(where, ours.features - target.features, 0.0)
  square = masked_mean(jnp.square(error), jnp.broadcast_to(where, error.shape))
  exists = optax.sigmoid_binary_cross_entropy(present, target.mask.astype(jnp.float32))
  return square + jnp.mean(exists)


def _next_token(logits: Float[Array, 'B M U'], tokens: Prompt):
  """(mean cross-entropy, accuracy) over the real tokens."""
  ce = optax.softmax_cross_entropy_with_integer_labels(logits, tokens.ids)
  hits = (jnp.argmax(logits, -1) == tokens.ids).astype(jnp.float32)
  return masked_mean(ce, tokens.mask), masked_mean(hits, tokens.mask)
