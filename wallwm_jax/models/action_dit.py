"""The action DiT and its one-way layer coupling to the video tower."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wallwm_jax.config import ModelConfig
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
from wallwm_jax.types import pytree_dataclass


@pytree_dataclass
class AnchorCache:
  """Keys and values of every action block against one anchored video forward; constant over
  denoising steps.

  k, v: [L, B, J, heads, hd], J = V * F * P; mask: [B, J], True where the video token exists.
  """

  k: jax.Array
  v: jax.Array
  mask: jax.Array


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

  def __call__(self, x, e9, state, rotation, step_mask, cache: AnchorCache):
    """x [B, R, K, D]: R noise draws share one cache; they are folded into the query rows, K/V is
    never repeated.
    """
    b, r, k, d = x.shape
    m = (self.modulation[...] + e9)[:, :, :, None]  # [B, R, 9, 1, D]
    (shift, scale, gate, shift_v, scale_v, gate_v, shift_ff, scale_ff, gate_ff) = (
      m[:, :, i] for i in range(9)
    )
    h = modulate(x, shift, scale).reshape(b * r, k, d)
    h = self.self_attn(h, mask=step_mask, rotation=rotation)
    x = x + (h.reshape(x.shape) * gate).astype(x.dtype)
    h = self.state_attn(self.norm_state(x).reshape(b, r * k, d), state)
    x = x + h.reshape(x.shape)
    q = self.video_attn.queries(modulate(x, shift_v, scale_v).reshape(b, r * k, d))
    h = self.video_attn.attend(q, cache.k, cache.v, cache.mask[:, None, None, :])
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
    """The cache of `features` [L, B, V, F, P, D] for latent frames at in-window indices tau [F].

    Keys and values of block i come from ViewConcat(h_pi(i)) + E_tau(tau) + E_abs(position in the
    window), plus the patch's own place. Source: WALL-WM (arXiv 2606.01955); the place term
    is this project's.
    """
    _, b, v, f, p, d = features.shape
    if self.config.action.depth_map:
      features = features[np.array(self.config.action.depth_map)]
    when = self.tau_video(tau + self.config.history) + self.abs_video(tau - tau[0])
    where = (
      self.view_video.embedding[...][:v, None] + self.patch_video.embedding[...][:p]
    )  # [V, P, D]
    place = when[None, :, None] + where[:, None]  # [V, F, P, D]
    graph, state = nnx.split(self.blocks)

    def layer(_, inputs):
      block_state, h = inputs
      attention = nnx.merge(graph, block_state).video_attn
      tokens = (layer_norm(h) + place).astype(jnp.dtype(self.config.dtype)).reshape(b, v * f * p, d)
      return None, attention.keys_values(tokens)

    _, (k, value) = jax.lax.scan(layer, None, (state, features))
    mask = jnp.broadcast_to(
      masks.view[:, :, None, None] & masks.frame[:, None, :, None], (b, v, f, p)
    )
    return AnchorCache(k, value, mask.reshape(b, v * f * p))

  def __call__(self, a, t, state, cache: AnchorCache, step_mask):
    """a [B, R, K, A] noised actions at levels t [B, R]; state [B, A]; step_mask [B, K] -> float32
    [B, R, K, A].
    """
    c = self.config.action
    b, r, k, _ = a.shape
    tau = np.arange(k) // self.config.steps_per_latent + 1
    row = self.tau_action(tau + self.config.history) + self.abs_action(
      tau + _history_frames(self.config, cache, k)
    )
    x = constrain(self.action_in(a) + row.astype(a.dtype), 'batch', None, None, None)
    temb = self.time_out(jax.nn.silu(self.time_in(timestep_features(t, c.freq_dim))))
    e9 = self.time_proj(jax.nn.silu(temb)).reshape(b, r, 9, c.width)
    token = self.tau_action(jnp.array([self.config.history]))
    state = (self.state_in(state)[:, None] + token).astype(x.dtype)
    rotation = Rotation.of(
      axis_angles(np.arange(k, dtype=np.float64), c.head_dim // 2, 100.0).astype(np.float32)
    )
    mask = jnp.repeat(step_mask, r, axis=0)[:, None, None, :]
    layer_caches = AnchorCache(
      cache.k, cache.v, jnp.broadcast_to(cache.mask, (cache.k.shape[0], *cache.mask.shape))
    )
    x, _ = scan_blocks(
      self.blocks,
      lambda block, x, kv: block(x, e9, state, rotation, mask, kv),
      x,
      self.config.remat,
      xs=layer_caches,
    )
    shift, scale = (self.head_modulation[...][i] + temb[:, :, None] for i in (0, 1))
    return self.head_out(jax.nn.gelu(self.head_in(modulate(x, shift, scale)), approximate=True))


def _history_frames(config: ModelConfig, cache: AnchorCache, steps: int) -> int:
  """History latent frames of the cached window, read off its size: F - 1 - N."""
  tokens = cache.k.shape[2]
  frames = tokens // (len(config.views) * config.patches)
  return frames - 1 - steps // config.steps_per_latent
