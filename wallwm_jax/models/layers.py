"""Building blocks shared by both towers. Parameters are float32; matmuls run in `dtype`; norms in
float32.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wallwm_jax.kernels.attention.api import dot_product_attention
from wallwm_jax.kernels.qk_norm_rope.api import qk_norm_rope
from wallwm_jax.models.quantised import matmul
from wallwm_jax.models.rope import Rotation
from wallwm_jax.parallel.constraints import map_batch, splits_only_batch

_EPS = 1e-6


class Linear(nnx.Module):
  """y = x W + b in `dtype`, W float or in eight bits (`quantised`). `scale` multiplies the fan-in
  initialisation; 0 starts at exactly zero.
  """

  def __init__(self, d_in: int, d_out: int, *, dtype, rngs: nnx.Rngs, scale: float = 1.0):
    std = scale / d_in**0.5
    kernel = std * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, (d_in, d_out))
    self.kernel, self.bias = nnx.Param(kernel), nnx.Param(jnp.zeros((d_out,)))
    self.dtype = dtype

  def __call__(self, x):
    # Not `kernel[...]`: the matrix may be in eight bits, several arrays at once.
    product = matmul(x, self.kernel.get_value(), self.dtype)
    return product + self.bias[...].astype(self.dtype)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last axis, statistics in float32."""

  def __init__(self, width: int, eps: float = _EPS):
    self.scale = nnx.Param(jnp.ones((width,)))
    self.eps = eps

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
    return (y * self.scale[...]).astype(x.dtype)


class AffineLayerNorm(nnx.Module):
  """LayerNorm with learned scale and bias."""

  def __init__(self, width: int, eps: float = _EPS):
    self.scale, self.bias = nnx.Param(jnp.ones((width,))), nnx.Param(jnp.zeros((width,)))
    self.eps = eps

  def __call__(self, x):
    return (layer_norm(x, self.eps) * self.scale[...] + self.bias[...]).astype(x.dtype)


class Embedding(nnx.Module):
  """A learned table [size, width]."""

  def __init__(self, size: int, width: int, *, std: float, rngs: nnx.Rngs):
    self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (size, width)))

  def __call__(self, index):
    return self.embedding[...][index]


def layer_norm(x, eps: float = _EPS):
  """Parameter-free LayerNorm over the last axis, float32 out."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, -1, keepdims=True)
  return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)


def modulate(x, shift, scale, eps: float = _EPS):
  """AdaLN: LN(x) * (1 + scale) + shift in float32, back in the dtype of x."""
  return (layer_norm(x, eps) * (1.0 + scale) + shift).astype(x.dtype)


def timestep_features(sigma, width: int):
  """[..., width] float32 sinusoids of 1000 * sigma, cosines first (Wan's convention); a last odd
  feature is 0.
  """
  half = width // 2
  # On the host and in float32, step by step as the public code: angles reach 1000, where the last
  # bit of a frequency shows in the prediction.
  frequency = np.exp(np.float32(-math.log(10_000.0)) * np.arange(half, dtype=np.float32) / half)
  angle = 1000.0 * sigma[..., None].astype(jnp.float32) * frequency
  features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
  return jnp.pad(features, [(0, 0)] * sigma.ndim + [(0, width % 2)])


def _attend_on_one_device(q, k, v, mask, segments):
  return dot_product_attention(q, k, v, mask=mask, segments=segments, one_device=True)


class Attention(nnx.Module):
  """Multi-head attention with QK-RMSNorm over the full width (before the head split).

  `kv_width` differs from `width` in the coupling layer; `out_scale` 0 makes a residual branch start
  at exactly zero.
  """

  def __init__(
    self,
    width: int,
    heads: int,
    *,
    dtype,
    rngs: nnx.Rngs,
    kv_width: int | None = None,
    out_scale: float = 1.0,
    eps: float = _EPS,
  ):
    kv_width = width if kv_width is None else kv_width
    self.heads = heads
    self.q = Linear(width, width, dtype=dtype, rngs=rngs)
    self.k = Linear(kv_width, width, dtype=dtype, rngs=rngs)
    self.v = Linear(kv_width, width, dtype=dtype, rngs=rngs)
    self.o = Linear(width, width, dtype=dtype, rngs=rngs, scale=out_scale)
    self.q_norm, self.k_norm = RMSNorm(width, eps), RMSNorm(width, eps)

  def queries(self, x, rotation: Rotation | None = None):
    """[..., S, heads, hd] normalised (and rotated) queries of x [..., S, D]."""
    return self._normed(self.q(x), self.q_norm, rotation)

  def keys_values(self, x, rotation: Rotation | None = None):
    """Keys (normalised, rotated) and values of x, each [..., S, heads, hd]."""
    return self._normed(self.k(x), self.k_norm, rotation), self._split(self.v(x))

  def attend(self, q, k, v, mask=None, segments=None):
    """Output projection of attention; mask broadcasts to [B, heads, Sq, Sk], True = attend;
    segments: [B, Sq] and [B, Sk] of packed rows.
    """
    if not splits_only_batch(q.shape[0]):
      out = dot_product_attention(q, k, v, mask=mask, segments=segments)
    else:
      batched = jax.tree.map(lambda x: x.shape[0] == q.shape[0], (q, k, v, mask, segments))
      out = map_batch(_attend_on_one_device, batched, q, k, v, mask, segments)
    return self.o(out.reshape(*out.shape[:-2], -1))

  def __call__(
    self, x, context=None, *, mask=None, rotation: Rotation | None = None, segments=None
  ):
    k, v = self.keys_values(x if context is None else context, rotation)
    if k.shape[-3] == 1 and mask is None and segments is None:
      # One token to attend to has weight 1 whatever the query: nothing depends on x but its shape.
      alone = self.o(v.reshape(*v.shape[:-2], -1))
      return jnp.broadcast_to(alone, (*x.shape[:-1], alone.shape[-1]))
    return self.attend(self.queries(x, rotation), k, v, mask, segments)

  def _normed(self, x, norm: RMSNorm, rotation: Rotation | None):
    """x [..., S, D] normalised over the full width, split into heads and rotated, if at all."""
    if rotation is None:
      return self._split(norm(x))
    turn = functools.partial(qk_norm_rope, heads=self.heads, eps=norm.eps)
    operands = (x, norm.scale[...].astype(jnp.float32), *map(jnp.asarray, rotation))
    if not splits_only_batch(x.shape[0] if x.ndim > 2 else 1):
      # A norm over heads on several devices, or tokens in strides: the compiler's to arrange.
      return turn(*operands, implementation='xla')
    own = operands[2].ndim > 2
    return map_batch(turn, (True, False, own, own), *operands)

  def _split(self, x):
    return x.reshape(*x.shape[:-1], self.heads, -1)
