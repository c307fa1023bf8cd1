"""The multi-view video DiT: Wan-style blocks with a zero-initialised cross-view branch."""

from __future__ import annotations

from typing import NamedTuple

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
from wallwm_jax.models.rope import Rotation, camera_angles, camera_pairs, video_angles
from wallwm_jax.models.stack import scan_blocks, stack_blocks
from wallwm_jax.parallel.constraints import constrain
from wallwm_jax.types import Packing, Params, Text, pytree_dataclass


@pytree_dataclass
class VideoMasks:
  """Which tokens exist. view [B, V]; frame [B, F]; sight [B, V, P, V, P] co-visibility or None.

  packing: of packed rows, whose events do not see each other; view is [B, F, V] then, and sight
  [B, F, V, P, V, P].
  """

  view: jax.Array
  frame: jax.Array
  sight: jax.Array | None
  packing: Packing | None = None


class _Attend(NamedTuple):
  """Masks and rotations in the layouts the three attentions of a block need."""

  self_mask: jax.Array | None  # [B*V, 1, 1, F*P]
  self_segments: tuple | None  # twice [B*V, F*P]
  self_rotation: Rotation  # [F*P, pairs] or [B*V, F*P, pairs]
  view_mask: jax.Array | None  # [B*F, 1, 1 or V*P, V*P]
  view_rotation: Rotation | None  # [B*F, V*P, pairs]
  text: jax.Array  # [B, X, D], X = G * X in packed rows
  text_mask: jax.Array | None  # [B, 1, 1, X]
  text_segments: tuple | None  # [B, V*F*P] and [B, X]


class FeedForward(nnx.Module):
  """Linear, tanh-GELU, Linear."""

  def __init__(self, width: int, hidden: int, *, dtype, rngs: nnx.Rngs):
    self.up = Linear(width, hidden, dtype=dtype, rngs=rngs)
    self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    return self.down(jax.nn.gelu(self.up(x), approximate=True))


class VideoBlock(nnx.Module):
  """Self-attention within a view, cross-view attention per frame, text cross-attention, FFN."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    c, dtype = config.video, jnp.dtype(config.dtype)
    # Rows: shift, scale, gate of self-attention, then of the FFN. Gates start open, shifts and
    # scales at rest.
    self.modulation = nnx.Param(jnp.zeros((6, c.width)).at[jnp.array([2, 5])].set(1.0))
    self.eps = c.eps
    self.self_attn = Attention(c.width, c.heads, dtype=dtype, rngs=rngs, eps=c.eps)
    if c.cross_view:
      self.cross_view = Attention(
        c.width, c.heads, dtype=dtype, rngs=rngs, out_scale=0.0, eps=c.eps
      )
      self.view_gate = nnx.Param(jnp.ones((c.width,)))
      # The graft starts as a copy of the block's own self-attention; only its output is zero.
      for name in ('q', 'k', 'v'):
        getattr(self.cross_view, name).kernel[...] = getattr(self.self_attn, name).kernel[...]
    self.norm_cross = AffineLayerNorm(c.width, c.eps)
    self.cross_attn = Attention(c.width, c.heads, dtype=dtype, rngs=rngs, eps=c.eps)
    self.ffn = FeedForward(c.width, c.ffn, dtype=dtype, rngs=rngs)

  def __call__(self, x, e6, view_gate, ctx: _Attend):
    """x [B, V, F, P, D]; e6 [B, F, 6, D] and view_gate [B, F, D] time modulations, float32."""
    b, v, f, p, d = x.shape
    m = (self.modulation[...] + e6)[:, None, :, :, None]  # [B, 1, F, 6, 1, D]
    shift, scale, gate, shift_ff, scale_ff, gate_ff = (m[:, :, :, i] for i in range(6))
    h = modulate(x, shift, scale, self.eps).reshape(b * v, f * p, d)
    h = self.self_attn(
      h, mask=ctx.self_mask, rotation=ctx.self_rotation, segments=ctx.self_segments
    )
    x = x + (h.reshape(x.shape) * gate).astype(x.dtype)
    if hasattr(self, 'cross_view'):
      x = x + self._across_views(x, shift, scale, view_gate, ctx)
    h = self.norm_cross(x).reshape(b, v * f * p, d)
    h = self.cross_attn(h, ctx.text, mask=ctx.text_mask, segments=ctx.text_segments)
    x = x + h.reshape(x.shape).astype(x.dtype)
    h = self.ffn(modulate(x, shift_ff, scale_ff, self.eps))
    x = x + (h * gate_ff).astype(x.dtype)
    return constrain(x, 'batch', None, None, 'patch', None)

  def _across_views(self, x, shift, scale, view_gate, ctx: _Attend):
    """g * W_view CrossViewAttn(h), frame by frame over all views' patches; exactly 0 at
    initialisation.
    """
    b, v, f, p, d = x.shape
    h = modulate(x, shift, scale, self.eps).swapaxes(1, 2).reshape(b * f, v * p, d)
    h = self.cross_view(h, mask=ctx.view_mask, rotation=ctx.view_rotation)
    gate = (self.view_gate[...] + view_gate)[:, None, :, None]
    return (h.reshape(b, f, v, p, d).swapaxes(1, 2) * gate).astype(x.dtype)


class VideoTower(nnx.Module):
  """Noised latents, per-frame noise levels and text -> prediction and the features after every
  block.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    c, dtype = config.video, jnp.dtype(config.dtype)
    self.config = config
    channels = config.codec.channels
    cells = c.patch[1] * c.patch[2]
    self.patch_embed = Linear(cells * config.video_inputs, c.width, dtype=dtype, rngs=rngs)
    self.time_in = Linear(c.freq_dim, c.width, dtype=jnp.float32, rngs=rngs)
    self.time_out = Linear(c.width, c.width, dtype=jnp.float32, rngs=rngs)
    self.time_proj = Linear(c.width, 6 * c.width, dtype=jnp.float32, rngs=rngs, scale=0.0)
    self.text_in = Linear(config.text.width, c.width, dtype=dtype, rngs=rngs)
    self.text_out = Linear(c.width, c.width, dtype=dtype, rngs=rngs)
    if c.cross_view:
      self.view_gate = Linear(c.width, c.width, dtype=jnp.float32, rngs=rngs, scale=0.0)
      self.view_embed = Embedding(
        len(config.views), camera_pairs(c.head_dim)[2], std=1.0, rngs=rngs
      )
    self.blocks = stack_blocks(lambda rngs: VideoBlock(config, rngs=rngs), c.layers, rngs)
    self.head = VideoHead(config, cells * channels, rngs=rngs)

  def __call__(self, z, t, text: Text, masks: VideoMasks):
    """z [B, V, F, h, w, C'], t [B, F] in [0, 1] -> (prediction [B, V, F, h, w, C], features [L, B,
    V, F, P, D]). Packed rows have a text per event, [B, G, X, E].
    """
    c = self.config.video
    b, v, f, h, w, _ = z.shape
    grid = (h // c.patch[1], w // c.patch[2])
    x = constrain(self.patch_embed(_patchify(z, c.patch)), 'batch', None, None, 'patch', None)
    temb, e6 = self.embed_time(t)
    gate = self.view_gate(jax.nn.silu(temb)) if c.cross_view else jnp.zeros_like(temb)
    ctx = self._context(x, grid, text, masks)
    x, features = scan_blocks(
      self.blocks, lambda block, x: block(x, e6, gate, ctx), x, self.config.remat
    )
    out = _unpatchify(self.head(x, temb), grid, c.patch)
    if c.prediction == 'x' and c.conditioning == 'frame':
      # A scene mostly stays as it is: the network regresses what changes since the last given
      # frame.
      out = out + _last_given(z.astype(jnp.float32), t, masks.packing)
    return out, features

  def embed_time(self, t):
    """Levels t [B, F] in [0, 1] -> (embedding [B, F, D], modulations [B, F, 6, D]), float32."""
    c = self.config.video
    temb = self.time_out(jax.nn.silu(self.time_in(timestep_features(t, c.freq_dim))))
    return temb, self.time_proj(jax.nn.silu(temb)).reshape(*t.shape, 6, c.width)

  def _context(self, x, grid, text: Text, masks: VideoMasks) -> _Attend:
    c, packing = self.config.video, masks.packing
    b, v, f, p, _ = x.shape
    frames = np.arange(f)
    view_mask, view_rotation = None, None
    if c.cross_view:
      table = camera_angles(
        frames, grid, self.view_embed.embedding[...][:v], c.head_dim, c.rope_theta
      )
      tiled = jnp.broadcast_to(table, (b, *table.shape)) if packing is None else (
        table[packing.frame_index]
      )
      view_rotation = Rotation.of(tiled.reshape(b * f, v * p, -1))
      views = masks.view.reshape(b, -1, 1, v, 1)  # of the row, or of each frame
      seen = jnp.broadcast_to(views, (*views.shape[:4], p)).reshape(b, -1, 1, v * p)
      if masks.sight is not None:
        seen = seen & masks.sight.reshape(b, -1, v * p, v * p)
      view_mask = jnp.broadcast_to(seen, (b, f, *seen.shape[2:])).reshape(
        b * f, 1, *seen.shape[2:]
      )
    embedded = self.text_out(jax.nn.gelu(self.text_in(text.features), approximate=True))
    angles = video_angles(frames, grid, c.head_dim, c.rope_theta)
    if packing is None:
      own = jnp.broadcast_to(masks.frame[:, None, :, None], (b, v, f, p))
      return _Attend(
        own.reshape(b * v, 1, 1, f * p), None, Rotation.of(angles), view_mask, view_rotation,
        embedded, text.mask[:, None, None, :], None,
      )  # fmt: skip
    event = jnp.broadcast_to(packing.frame_event[:, None, :, None], (b, v, f, p))
    own = event.reshape(b * v, f * p)
    table = Rotation.of(angles.reshape(f, p, -1))
    rotation = Rotation(*(
      jnp.repeat(jnp.asarray(x)[packing.frame_index].reshape(b, f * p, -1), v, axis=0)
      for x in table
    ))  # fmt: skip
    told = jnp.where(text.mask, jnp.arange(1, text.mask.shape[1] + 1)[:, None], 0).reshape(b, -1)
    return _Attend(
      None, (own, own), rotation, view_mask, view_rotation,
      embedded.reshape(b, -1, c.width), None, (event.reshape(b, -1), told),
    )  # fmt: skip


class VideoHead(nnx.Module):
  """Modulated LayerNorm and a zero-initialised linear map to patch values."""

  def __init__(self, config: ModelConfig, d_out: int, *, rngs: nnx.Rngs):
    width = config.video.width
    self.eps = config.video.eps
    self.modulation = nnx.Param(jnp.zeros((2, width)))
    self.kernel = nnx.Param(jnp.zeros((width, d_out)))
    self.bias = nnx.Param(jnp.zeros((d_out,)))

  def __call__(self, x, temb):
    """x [B, V, F, P, D], temb [B, F, D] -> float32 [B, V, F, P, d_out]."""
    shift, scale = (self.modulation[...][i] + temb[:, None, :, None] for i in (0, 1))
    return (layer_norm(x, self.eps) * (1.0 + scale) + shift) @ self.kernel[...] + self.bias[...]


def graft_views(public: Params, fresh: Params) -> Params:
  """Parameters of a multi-view tower grown from a single-view one, such as a public checkpoint.

  Args:
    public: of a tower without cross-view branches. fresh: initialised, of the multi-view tower.

  Returns:
    `fresh` with everything that `public` has taken from there, and with every cross-view branch
    reading as its block's self-attention does (queries, keys, values, their norms). Outputs, gates
    and view embedding stay as in `fresh`, whose branches output exactly 0: the grown tower predicts
    bit by bit what `public` does.
  """
  blocks = fresh['blocks'] | public['blocks']
  own = {name: blocks['self_attn'][name] for name in ('q', 'k', 'v', 'q_norm', 'k_norm')}
  return fresh | public | {'blocks': blocks | {'cross_view': blocks['cross_view'] | own}}


def _last_given(z, t, packing: Packing | None):
  """The last clean frame (level 0) of each sample, [B, V, 1, h, w, C], or of the event of each
  frame, [B, V, F, h, w, C]; zeros where none is clean.
  """
  if packing is not None:
    event, place = packing.frame_event, jnp.arange(t.shape[1])
    given = (t <= 0)[:, None] & (event[:, :, None] == event[:, None])  # [B, F, F]
    last = jnp.max(jnp.where(given, place, -1), -1)[:, None, :, None, None, None]
    frames = jnp.take_along_axis(z, jnp.maximum(last, 0), axis=2)
    return jnp.where(last >= 0, frames, 0.0)
  given = jnp.sum(t <= 0, axis=1)
  index = jnp.maximum(given - 1, 0)[:, None, None, None, None, None]
  frame = jnp.take_along_axis(z, index, axis=2)
  return jnp.where(given[:, None, None, None, None, None] > 0, frame, 0.0)


def _patchify(z, patch):
  b, v, f, h, w, c = z.shape
  z = z.reshape(b, v, f, h // patch[1], patch[1], w // patch[2], patch[2], c)
  return z.transpose(0, 1, 2, 3, 5, 4, 6, 7).reshape(b, v, f, (h // patch[1]) * (w // patch[2]), -1)


def _unpatchify(x, grid, patch):
  b, v, f, _, _ = x.shape
  x = x.reshape(b, v, f, *grid, patch[1], patch[2], -1).transpose(0, 1, 2, 3, 5, 4, 6, 7)
  return x.reshape(b, v, f, grid[0] * patch[1], grid[1] * patch[2], -1)
