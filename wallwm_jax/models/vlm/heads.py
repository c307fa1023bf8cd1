"""Trained readers of the frozen VLM: the project-out, next-event and remaining-time heads, and the
projector of latents into the small language model.

The heads start with attention from learned queries, so each takes any number of states: tokens of
a prompt, tokens of an answer, or latents.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.config import LanguageConfig, TextConfig
from wallwm_jax.models.layers import (
  Attention,
  Embedding,
  Linear,
  RMSNorm,
  layer_norm,
  timestep_features,
)
from wallwm_jax.models.stack import scan_blocks, stack_blocks
from wallwm_jax.models.video_dit import FeedForward

_COSINE_SCALE = 1 / 0.07  # initial inverse temperature of CLIP (arXiv 2103.00020)
_EMBEDDING_RMS = 0.02  # of a language model's token embeddings, what a soft prefix starts at


class Heads(nnx.Module):
  """The heads of stage 3; they share no parameter. Matmuls in `vlm.dtype`, the rest float32."""

  def __init__(self, config: LanguageConfig, text: TextConfig, *, rngs: nnx.Rngs):
    self.project = _ProjectOut(config, text, rngs=rngs)
    self.event = _NextEvent(config, text, rngs=rngs)
    self.time = _RemainingTime(config, rngs=rngs)

  def condition(
    self, hidden: Float[Array, 'B S D'], mask: Bool[Array, 'B S']
  ) -> tuple[Float[Array, 'B X E'], Float[Array, 'B X']]:
    """(features in the shape of the text encoder's, logits of each of their rows being a token)."""
    return self.project(hidden, mask)

  def next_event(
    self,
    hidden: Float[Array, 'B S D'],
    mask: Bool[Array, 'B S'],
    bank: Float[Array, 'I E'],
    last: Int[Array, 'B'],
  ) -> Float[Array, 'B I']:
    """Logits over the captions of any bank: the pooled states' cosine with each, times a scale.

    last: row of the event that was completed before, -1 = none.
    """
    return self.event(hidden, mask, bank, last)

  def remaining(
    self, hidden: Float[Array, 'B S D'], mask: Bool[Array, 'B S']
  ) -> Float[Array, 'B']:
    """Time to the end of the running event, >= 0, in units of `heads.time_unit` seconds."""
    return self.time(hidden, mask)


class PrefixProjector(nnx.Module):
  """Latents of the VLM's width as soft prefix embeddings of the reader, float32."""

  def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
    width, dtype = config.reader.width, jnp.dtype(config.reader.dtype)
    self.norm = RMSNorm(config.vlm.width)
    self.up = Linear(config.vlm.width, width, dtype=dtype, rngs=rngs)
    self.down = Linear(width, width, dtype=dtype, rngs=rngs)
    self.out_norm = RMSNorm(width)
    self.out_norm.scale[...] = jnp.full((width,), _EMBEDDING_RMS, jnp.float32)

  def __call__(self, latents: Float[Array, 'B Z D']) -> Float[Array, 'B Z E']:
    x = self.norm(latents.astype(jnp.float32))
    return self.out_norm(self.down(jax.nn.gelu(self.up(x))).astype(jnp.float32))


class _ProjectOut(nnx.Module):
  """One learned query per row of text features. The second block lets a row look again, once it
  knows where in the sentence it is."""

  def __init__(self, config: LanguageConfig, text: TextConfig, *, rngs: nnx.Rngs):
    width = config.heads.width
    self.reader = _Reader(config, queries=text.tokens, blocks=2, rngs=rngs)
    self.out = Linear(width, text.width, dtype=jnp.dtype(config.vlm.dtype), rngs=rngs)
    self.present = _Dot(width)

  def __call__(self, hidden, mask):
    x = self.reader(hidden, mask)
    return self.out(x).astype(jnp.float32), self.present(x)


class _NextEvent(nnx.Module):
  """What was done last decides how the states are read: where one event ends and the next begins
  the pictures are the same."""

  def __init__(self, config: LanguageConfig, text: TextConfig, *, rngs: nnx.Rngs):
    width, dtype = config.heads.width, jnp.dtype(config.vlm.dtype)
    self.reader = _Reader(config, queries=1, blocks=1, rngs=rngs)
    self.state = Linear(width, width, dtype=dtype, rngs=rngs)
    self.bank, self.memory = (
      Linear(text.width, width, dtype=dtype, rngs=rngs) for _ in range(2)
    )
    self.scale = nnx.Param(jnp.full((), math.log(_COSINE_SCALE), jnp.float32))  # a logarithm

  def __call__(self, hidden, mask, bank, last):
    bank = layer_norm(bank)
    done = jnp.where(last[:, None] < 0, 0.0, self.memory(bank[jnp.maximum(last, 0)]))
    state = _unit(self.state(self.reader(hidden, mask, done[:, None])[:, 0]))
    captions = _unit(self.bank(bank))
    return jnp.exp(self.scale[...]) * jnp.einsum('BD,ID->BI', state, captions)


class _RemainingTime(nnx.Module):
  def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
    self.reader = _Reader(config, queries=1, blocks=1, rngs=rngs)
    self.out = _Dot(config.heads.width)

  def __call__(self, hidden, mask):
    return jax.nn.softplus(self.out(self.reader(hidden, mask)[:, 0]))


class _Reader(nnx.Module):
  """Learned queries that attend to hidden states: [B, S, D] -> [B, queries, heads.width] float32.

  A state's key and value carry its rank among the real ones: rows of text features follow the order
  of the words, and hidden states tell their place only indirectly.
  """

  def __init__(self, config: LanguageConfig, *, queries: int, blocks: int, rngs: nnx.Rngs):
    self.norm = RMSNorm(config.vlm.width)
    self.queries = Embedding(queries, config.heads.width, std=1.0, rngs=rngs)
    self.blocks = stack_blocks(lambda rngs: _Block(config, rngs=rngs), blocks, rngs)
    self.out_norm = RMSNorm(config.heads.width)

  def __call__(self, hidden, mask, given=0.0):
    """given: added to the queries."""
    # Padding may hold anything, NaN too, and attention multiplies what it hides by 0.
    hidden = jnp.where(mask[..., None], hidden, 0).astype(jnp.float32)
    rank = jnp.cumsum(mask, 1) - 1
    context = self.norm(hidden) + timestep_features(rank / 1000, hidden.shape[-1])
    x = self.queries.embedding[...]
    x = jnp.broadcast_to(x, (hidden.shape[0], *x.shape)) + given
    return self.out_norm(scan_blocks(self.blocks, lambda b, x: b(x, context, mask), x, 'none')[0])


class _Block(nnx.Module):
  """x + attention(norm x, context), then x + FFN(norm x)."""

  def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
    width, dtype = config.heads.width, jnp.dtype(config.vlm.dtype)
    self.attn_norm, self.ffn_norm = RMSNorm(width), RMSNorm(width)
    self.attn = Attention(
      width, config.heads.heads, kv_width=config.vlm.width, dtype=dtype, rngs=rngs
    )
    self.ffn = FeedForward(width, 4 * width, dtype=dtype, rngs=rngs)

  def __call__(self, x, context, mask):
    x = x + self.attn(self.attn_norm(x), context, mask=mask[:, None, None])
    return x + self.ffn(self.ffn_norm(x))


class _Dot(nnx.Module):
  """One float32 number per vector, x . scale + bias; starts at 0."""

  def __init__(self, width: int):
    self.scale, self.bias = nnx.Param(jnp.zeros((width,))), nnx.Param(jnp.zeros(()))

  def __call__(self, x):
    return x @ self.scale[...] + self.bias[...]


def _unit(x):
  """x / |x| over the last axis in float32, with a finite gradient at 0."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-6)
