"""The action DiT and its one-way layer coupling to the video tower."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wallwm_jax.config import ModelConfig
from wallwm_jax.kernels.attention.api import dot_product_attention
from wallwm_jax.kernels.cached_attention.api import cached_attention, quantise
from wallwm_jax.models.layers import (
  AffineLayerNorm,
  Attention,
  Embedding,
  Linear,
  layer_norm,
  modulate,
  timestep_features,
)
from wallwm_jax.models.rope import Rotation, axis_angles
from wallwm_jax.models.stack import scan_blocks, stack_blocks
from wallwm_jax.parallel.constraints import constrain
from wallwm_jax.types import ConfigError, Packing, pytree_dataclass


@pytree_dataclass
class AnchorCache:
  """Keys and values of every action block against one anchored video forward, as training reads
  them: differentiable, tokens in place.

  k, v: [L, B, J, heads, hd], J = V * F * P; mask: [B, J], True where the video token exists;
  event: [B, J] int32 of packed rows, the event a token belongs to, 0 where it does not exist.
  """

  k: jax.Array
  v: jax.Array
  mask: jax.Array
  event: jax.Array | None = None


@pytree_dataclass
class ServingCache:
  """The same as inference reads them, over and over in a loop over denoising steps.

  k, v: [L, B, J, heads * hd] in the compute dtype or int8. The tokens that exist come first: a sum
  over keys does not depend on their order. length: [B] int32, how many they are. k_scale, v_scale:
  float32 [L, B, heads * hd] of int8 keys and values, else None.
  """

  k: jax.Array
  v: jax.Array
  length: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None

  def attend(self, layer, q):
    """Queries [B, S, heads, hd] of the block `layer` against its keys, none of them copied."""
    scales = None if self.k_scale is None else (self.k_scale, self.v_scale)
    return cached_attention(
      q, self.k, self.v, lengths=self.length, layer=layer, scales=scales
    )


CacheDtype = Literal['compute', 'int8']


class _Context(NamedTuple):
  """What all action blocks read beside the video."""

  e9: jax.Array  # [B, R, 9, D], [B, G, R, 9, D] in packed rows
  state: jax.Array  # [B, 1, D], [B, G, D]
  rotation: Rotation  # [K, pairs], [B * R, K, pairs]
  step_mask: jax.Array  # [B * R, 1, 1, K]
  packing: Packing | None


class GatedFeedForward(nnx.Module):
  """down(silu(gate x) * up x)."""

  def __init__(self, width: int, hidden: int, *, dtype, rngs: nnx.Rngs):
    self.gate = Linear(width, hidden, dtype=dtype, rngs=rngs)
    self.up = Linear(width, hidden, dtype=dtype, rngs=rngs)
    self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class ActionBlock(nnx.Module):
  """Self-attention, state cross-attention, coupling to the paired video block, gated FFN."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    c, dtype = config.action, jnp.dtype(config.dtype)
    # Rows: shift, scale, gate of self-attention, of the coupling, of the FFN. Gates start open.
    self.modulation = nnx.Param(jnp.zeros((9, c.width)).at[jnp.array([2, 5, 8])].set(1.0))
    self.self_attn = Attention(c.width, c.heads, dtype=dtype, rngs=rngs)
    self.norm_state = AffineLayerNorm(c.width)
    self.state_attn = Attention(c.width, c.heads, dtype=dtype, rngs=rngs)
    self.video_attn = Attention(
      c.width, c.heads, dtype=dtype, rngs=rngs, kv_width=config.video.width
    )
    self.ffn = GatedFeedForward(c.width, c.ffn, dtype=dtype, rngs=rngs)

  def __call__(self, x, ctx: _Context, attend: Callable):
    """x [B, R, K, D]: R noise draws share one cache; they are folded into the query rows, K/V is
    never repeated. attend: queries [B, R * K, heads, hd] to what they read off the video.
    """
    b, r, k, d = x.shape
    m, own, states = self.modulation[...] + ctx.e9, None, None
    if ctx.packing is None:
      m = m[:, :, :, None]  # [B, R, 9, 1, D]
    else:
      m = jnp.moveaxis(ctx.packing.steps(m), 1, 3)  # [B, R, 9, K, D]
      event = jnp.tile(ctx.packing.step_event, (1, r))  # [B, R * K]
      own = (event.reshape(b * r, k),) * 2
      events = jnp.arange(1, ctx.state.shape[1] + 1, dtype=jnp.int32)
      states = (event, jnp.broadcast_to(events, ctx.state.shape[:2]))
    (shift, scale, gate, shift_v, scale_v, gate_v, shift_ff, scale_ff, gate_ff) = (
      m[:, :, i] for i in range(9)
    )
    h = modulate(x, shift, scale).reshape(b * r, k, d)
    h = self.self_attn(h, mask=ctx.step_mask, rotation=ctx.rotation, segments=own)
    x = x + (h.reshape(x.shape) * gate).astype(x.dtype)
    h = self.state_attn(self.norm_state(x).reshape(b, r * k, d), ctx.state, segments=states)
    x = x + h.reshape(x.shape)
    q = self.video_attn.queries(modulate(x, shift_v, scale_v).reshape(b, r * k, d))
    h = self.video_attn.o(attend(q).reshape(b, r * k, d))
    x = x + (h.reshape(x.shape) * gate_v).astype(x.dtype)
    return x + (self.ffn(modulate(x, shift_ff, scale_ff)) * gate_ff).astype(x.dtype)


class ActionTower(nnx.Module):
  """Noised action chunks, noise levels, proprioception and anchored video features ->
  prediction.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    c, dtype = config.action, jnp.dtype(config.dtype)
    self.config = config
    a = config.action_spec.dim
    self.action_in = Linear(a, c.width, dtype=dtype, rngs=rngs)
    self.state_in = Linear(a, c.width, dtype=dtype, rngs=rngs)
    self.time_in = Linear(c.freq_dim, c.width, dtype=jnp.float32, rngs=rngs)
    self.time_out = Linear(c.width, c.width, dtype=jnp.float32, rngs=rngs)
    self.time_proj = Linear(c.width, 9 * c.width, dtype=jnp.float32, rngs=rngs, scale=0.0)
    frames = config.history + 1 + config.max_future
    self.tau_video = Embedding(frames, config.video.width, std=0.2, rngs=rngs)
    self.tau_action = Embedding(frames, c.width, std=0.2, rngs=rngs)
    self.abs_video = Embedding(frames, config.video.width, std=0.02, rngs=rngs)
    self.abs_action = Embedding(frames, c.width, std=0.02, rngs=rngs)
    # Rotary video towers carry no absolute position, but "where" is what an action must read off a
    # patch.
    self.patch_video = Embedding(config.patches, config.video.width, std=0.2, rngs=rngs)
    self.view_video = Embedding(len(config.views), config.video.width, std=0.2, rngs=rngs)
    self.blocks = stack_blocks(
      lambda rngs: ActionBlock(config, rngs=rngs), config.video.layers, rngs
    )
    self.head_modulation = nnx.Param(jnp.zeros((2, c.width)))
    self.head_in = Linear(c.width, c.width, dtype=dtype, rngs=rngs)
    self.head_out = Linear(c.width, a, dtype=jnp.float32, rngs=rngs, scale=0.0)

  def prefill(self, features, tau, masks) -> AnchorCache:
    """The cache of `features` [L, B, V, F, P, D] for latent frames at in-window indices tau [F]."""
    mask = _existing(features, masks)
    k, v = self._read_video(features, tau, masks, lambda attn, tokens: attn.keys_values(tokens))
    if masks.packing is None:
      return AnchorCache(k, v, mask)
    _, b, v_, f, p, _ = features.shape
    event = jnp.broadcast_to(masks.packing.frame_event[:, None, :, None], (b, v_, f, p))
    return AnchorCache(k, v, mask, jnp.where(mask, event.reshape(mask.shape), 0))

  def prefill_serving(self, features, tau, masks, dtype: CacheDtype) -> ServingCache:
    """As `prefill`, for inference; dtype: of the cache.

    Raises:
      ConfigError: a dtype that it cannot have.
    """
    if dtype not in get_args(CacheDtype):
      raise ConfigError(f'cache dtype: expected one of {get_args(CacheDtype)}, got {dtype!r}.')
    mask = _existing(features, masks)
    order = jnp.argsort(~mask, axis=1, stable=True)[..., None]
    length = mask.sum(1, dtype=jnp.int32)

    def layer(attention, tokens):
      tokens = jnp.take_along_axis(tokens, order, axis=1, mode='promise_in_bounds')
      k, v = (x.reshape(*x.shape[:2], -1) for x in attention.keys_values(tokens))
      if dtype == 'compute':
        return k, v, None, None
      (k, k_scale), (v, v_scale) = (quantise(x, length) for x in (k, v))
      return k, v, k_scale, v_scale

    k, v, *scales = self._read_video(features, tau, masks, layer)
    return ServingCache(k, v, length, *scales)

  def _read_video(self, features, tau, masks, layer: Callable):
    """layer(video_attn, tokens [B, J, D]) of every block, stacked.

    Keys and values of block i come from ViewConcat(h_pi(i)) + E_tau(tau) + E_abs(position in the
    window), plus the patch's own place. Source: WALL-WM (arXiv 2606.01955); the place term
    is this project's.
    """
    _, b, v, f, p, d = features.shape
    packing = masks.packing
    tau = tau if packing is None else packing.frame_index
    if self.config.action.depth_map:
      features = features[np.array(self.config.action.depth_map)]
    first = tau[0] if packing is None else 0
    when = self.tau_video(tau + self.config.history) + self.abs_video(tau - first)
    where = (
      self.view_video.embedding[...][:v, None] + self.patch_video.embedding[...][:p]
    )  # [V, P, D]
    place = when[..., None, :, None, :] + where[:, None]  # [V, F, P, D] or [B, V, F, P, D]
    graph, state = nnx.split(self.blocks)

    def body(_, inputs):
      block_state, h = inputs
      attention = nnx.merge(graph, block_state).video_attn
      tokens = (layer_norm(h) + place).astype(jnp.dtype(self.config.dtype)).reshape(b, v * f * p, d)
      return None, layer(attention, tokens)

    return jax.lax.scan(body, None, (state, features))[1]

  def __call__(
    self,
    a,
    t,
    state,
    cache: AnchorCache | ServingCache,
    step_mask,
    packing: Packing | None = None,
  ):
    """a [B, R, K, A] noised actions at levels t [B, R]; state [B, A]; step_mask [B, K] -> float32
    [B, R, K, A]. Packed rows have levels and a state per event, [B, G, R] and [B, G, A].
    """
    c = self.config.action
    b, r, k, _ = a.shape
    step = np.arange(k) if packing is None else packing.step_index
    tau = step // self.config.steps_per_latent + 1
    before = _history_frames(self.config, cache, k) if packing is None else 0
    row = self.tau_action(tau + self.config.history) + self.abs_action(tau + before)
    row = row.astype(a.dtype)[..., None, :, :]
    x = constrain(self.action_in(a) + row, 'batch', None, None, None)
    temb = self.time_out(jax.nn.silu(self.time_in(timestep_features(t, c.freq_dim))))
    e9 = self.time_proj(jax.nn.silu(temb)).reshape(*t.shape, 9, c.width)
    token = self.tau_action(jnp.array([self.config.history]))
    state = self.state_in(state)
    state = ((state[:, None] if packing is None else state) + token).astype(x.dtype)
    angles = axis_angles(np.arange(k, dtype=np.float64), c.head_dim // 2, 100.0)
    rotation = Rotation.of(angles.astype(np.float32))
    if packing is not None:
      rotation = Rotation(*(jnp.repeat(jnp.asarray(x)[step], r, axis=0) for x in rotation))
    mask = jnp.repeat(step_mask, r, axis=0)[:, None, None, :]
    ctx = _Context(e9, state, rotation, mask, packing)
    layers = cache.k.shape[0]
    if isinstance(cache, ServingCache):
      xs, read = jnp.arange(layers), cache.attend
    else:
      shared = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (layers, *x.shape)),
        dataclasses.replace(cache, k=None, v=None),
      )
      xs = dataclasses.replace(shared, k=cache.k, v=cache.v)
      read = functools.partial(_attend_in_place, packing)
    x, _ = scan_blocks(
      self.blocks,
      lambda block, x, at: block(x, ctx, functools.partial(read, at)),
      x,
      self.config.remat,
      xs=xs,
    )
    temb = temb[:, :, None] if packing is None else packing.steps(temb).swapaxes(1, 2)
    shift, scale = (self.head_modulation[...][i] + temb for i in (0, 1))
    return self.head_out(jax.nn.gelu(self.head_in(modulate(x, shift, scale)), approximate=True))


def _existing(features, masks):
  """[B, J], which video tokens exist."""
  _, b, v, f, p, _ = features.shape
  views = masks.view[:, :, None] if masks.packing is None else masks.view.swapaxes(1, 2)
  seen = views & masks.frame[:, None]  # [B, V, F]
  return jnp.broadcast_to(seen[..., None], (b, v, f, p)).reshape(b, v * f * p)


def _attend_in_place(packing: Packing | None, cache: AnchorCache, q):
  """Queries [B, R * K, heads, hd] against one layer of the cache."""
  if packing is None:
    return dot_product_attention(q, cache.k, cache.v, mask=cache.mask[:, None, None, :])
  draws = q.shape[1] // packing.step_event.shape[1]
  event = jnp.tile(packing.step_event, (1, draws))
  return dot_product_attention(q, cache.k, cache.v, segments=(event, cache.event))


def _history_frames(config: ModelConfig, cache: AnchorCache | ServingCache, steps: int) -> int:
  """History latent frames of the cached window, read off its size: F - 1 - N."""
  tokens = cache.k.shape[2]
  frames = tokens // (len(config.views) * config.patches)
  return frames - 1 - steps // config.steps_per_latent
