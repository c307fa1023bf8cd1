"""Layers of Wan's causal video VAE. Every layer maps (x, cache) to (y, cache).

x [B, T, H, W, C] is the next piece of a clip. cache is what the layer keeps of the frames before
it, None at the start of the clip, afterwards of a fixed shape: a clip in one piece and a clip frame
by frame run the same code. A piece has 1 + n frames at the start and n later, n a multiple of what
the layer halves. Convolutions run in `dtype`; norm statistics and softmax in float32.

Sources: Wan2.1's and Wan2.2's public VAEs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wallwm_jax.types import ConfigError

Cache = Any  # a tree of arrays, () for a layer without memory
Stages = list[tuple[str, nnx.Module]]


def run(stages: Stages, x, cache: Cache | None):
  """x through `stages` in order; (y, {name: cache})."""
  after = {}
  for name, stage in stages:
    x, after[name] = stage(x, None if cache is None else cache[name])
  return x, after


class Conv2d(nnx.Module):
  """Frame-wise 3x3 convolution; `padding` as in lax, per side of H and W."""

  def __init__(self, c_in: int, c_out: int, *, stride: int, padding, dtype, rngs: nnx.Rngs):
    self.kernel, self.bias = _conv_params((3, 3, c_in, c_out), rngs)
    self.stride, self.padding, self.dtype = stride, padding, dtype

  def __call__(self, x):
    kernel = self.kernel[...].astype(self.dtype)
    y = _conv2d(x.astype(self.dtype), kernel, self.stride, self.padding)
    return (y + self.bias[...]).astype(self.dtype)


class CausalConv(nnx.Module):
  """Convolution [kt, k, k] that sees kt - 1 earlier frames, zeros before the clip.

  Space is zero-padded by k // 2; `out` is the dtype of the result. Summed over its kt taps, each a
  2-D convolution: on a CPU two to five times as fast as XLA's 3-D convolution.
  """

  def __init__(self, c_in: int, c_out: int, kt: int, k: int, *, dtype, rngs: nnx.Rngs, out=None):
    self.kernel, self.bias = _conv_params((kt, k, k, c_in, c_out), rngs)
    self.dtype, self.out = dtype, dtype if out is None else out

  def __call__(self, x, cache):
    x = x.astype(self.dtype)
    past = self.kernel.shape[0] - 1
    if not past:
      return self.valid(x), ()
    if cache is None:
      cache = jnp.zeros((x.shape[0], past, *x.shape[2:]), self.dtype)
      # Taps that would meet padding alone are left out: an image costs one tap of kt.
      seen = jnp.concatenate([cache, x], 1)
      first = max(0, past - x.shape[1] + 1)
      return self.valid(seen[:, first:], first), seen[:, -past:]
    seen = jnp.concatenate([cache, x], 1)
    return self.valid(seen), seen[:, -past:]

  def valid(self, x, first: int = 0, stride: int = 1):
    """The convolution over frames x without padding in time, by the taps from `first` on."""
    kernel = self.kernel[...].astype(self.dtype)
    taps = range(first, kernel.shape[0])
    frames = (x.shape[1] - len(taps)) // stride + 1
    pad = ((kernel.shape[1] // 2,) * 2,) * 2
    y = self.bias[...].astype(jnp.float32)
    for i, tap in enumerate(taps):
      piece = jax.lax.slice_in_dim(x, i, i + stride * (frames - 1) + 1, stride, axis=1)
      y = y + _conv2d(piece, kernel[tap], 1, pad)
    return y.astype(self.out)


class ChannelNorm(nnx.Module):
  """x / max(||x||, 1e-12) * sqrt(C) * scale over channels."""

  def __init__(self, channels: int):
    self.scale = nnx.Param(jnp.ones((channels,)))

  def __call__(self, x):
    y = x.astype(jnp.float32)
    # max(||x||, e) = sqrt(max(||x||^2, e^2)), whose gradient at x = 0 is finite.
    square = jnp.maximum(jnp.sum(jnp.square(y), -1, keepdims=True), 1e-24)
    return (y * jax.lax.rsqrt(square) * (x.shape[-1] ** 0.5 * self.scale[...])).astype(x.dtype)


class ResBlock(nnx.Module):
  """Two normalised 3x3x3 convolutions on a shortcut."""

  def __init__(self, c_in: int, c_out: int, *, dtype, rngs: nnx.Rngs):
    self.norm1, self.norm2 = ChannelNorm(c_in), ChannelNorm(c_out)
    self.conv1 = CausalConv(c_in, c_out, 3, 3, dtype=dtype, rngs=rngs)
    self.conv2 = CausalConv(c_out, c_out, 3, 3, dtype=dtype, rngs=rngs)
    if c_in != c_out:
      self.shortcut = CausalConv(c_in, c_out, 1, 1, dtype=dtype, rngs=rngs)

  def __call__(self, x, cache):
    past1, past2 = (None, None) if cache is None else cache
    short = self.shortcut(x, None)[0] if hasattr(self, 'shortcut') else x
    y, past1 = self.conv1(jax.nn.silu(self.norm1(x)), past1)
    y, past2 = self.conv2(jax.nn.silu(self.norm2(y)), past2)
    return y + short.astype(y.dtype), (past1, past2)


class FrameAttention(nnx.Module):
  """Single-head attention over the cells of each frame, with residual."""

  def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
    self.norm = ChannelNorm(channels)
    self.qkv = Pointwise(channels, 3 * channels, dtype=dtype, rngs=rngs)
    self.proj = Pointwise(channels, channels, dtype=dtype, rngs=rngs)

  def __call__(self, x, cache):
    b, t, h, w, c = x.shape
    qkv = self.qkv(self.norm(x)).reshape(b, t, h * w, 3 * c)
    q, k, v = jnp.split(qkv, 3, axis=-1)
    logits = jnp.einsum('btqc,btkc->btqk', q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * c**-0.5, -1).astype(v.dtype)
    out = jnp.einsum('btqk,btkc->btqc', weights, v).reshape(x.shape)
    return x + self.proj(out), ()


class Pointwise(nnx.Module):
  """x W + b over channels, in `dtype`."""

  def __init__(self, c_in: int, c_out: int, *, dtype, rngs: nnx.Rngs):
    self.kernel, self.bias = _conv_params((c_in, c_out), rngs)
    self.dtype = dtype

  def __call__(self, x):
    return x.astype(self.dtype) @ self.kernel[...].astype(self.dtype) + self.bias[...].astype(
      self.dtype
    )


class Middle(nnx.Module):
  """Residual block, attention, residual block."""

  def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
    self.res_0 = ResBlock(channels, channels, dtype=dtype, rngs=rngs)
    self.attn = FrameAttention(channels, dtype=dtype, rngs=rngs)
    self.res_1 = ResBlock(channels, channels, dtype=dtype, rngs=rngs)

  def stages(self) -> Stages:
    return [(name, getattr(self, name)) for name in ('res_0', 'attn', 'res_1')]

  def __call__(self, x, cache):
    return run(self.stages(), x, cache)


class Downsample(nnx.Module):
  """Halves space and, if `temporal`, time; the clip's first frame keeps its own latent.

  Space is padded below and to the right only: row i of the output reads rows 2i .. 2i + 2. In time
  y[0] = x[0] untouched and y[j] reads x[2j - 2 .. 2j].
  """

  def __init__(self, channels: int, temporal: bool, *, dtype, rngs: nnx.Rngs):
    below = ((0, 1), (0, 1))
    self.conv = Conv2d(channels, channels, stride=2, padding=below, dtype=dtype, rngs=rngs)
    if temporal:
      self.time_conv = CausalConv(channels, channels, 3, 1, dtype=dtype, rngs=rngs)

  def __call__(self, x, cache):
    x = self.conv(x)
    if not hasattr(self, 'time_conv'):
      return x, ()
    last = x[:, -1:]
    if cache is not None:
      return self.time_conv.valid(jnp.concatenate([cache, x], 1), stride=2), last
    if x.shape[1] == 1:
      return x, last
    return jnp.concatenate([x[:, :1], self.time_conv.valid(x, stride=2)], 1), last


class Upsample(nnx.Module):
  """Doubles space and, if `temporal`, all frames but the clip's first.

  The first frame passes untouched and is not seen by the convolution in time, which starts from
  zeros at the second.
  """

  def __init__(self, c_in: int, c_out: int, temporal: bool, *, dtype, rngs: nnx.Rngs):
    around = ((1, 1), (1, 1))
    self.conv = Conv2d(c_in, c_out, stride=1, padding=around, dtype=dtype, rngs=rngs)
    if temporal:
      self.time_conv = CausalConv(c_in, 2 * c_in, 3, 1, dtype=dtype, rngs=rngs)

  def __call__(self, x, cache):
    after = ()
    if hasattr(self, 'time_conv'):
      x, after = self._double_time(x, cache)
    return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)), after

  def _double_time(self, x, cache):
    first, rest = (x[:, :1], x[:, 1:]) if cache is None else (x[:, :0], x)
    if not rest.shape[1]:
      return first, jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
    pairs, after = self.time_conv(rest, cache)
    b, t, h, w, c = rest.shape
    pairs = jnp.moveaxis(pairs.reshape(b, t, h, w, 2, c), 4, 2).reshape(b, 2 * t, h, w, c)
    return jnp.concatenate([first, pairs], 1), after


class AverageDown(nnx.Module):
  """Parameter-free shortcut: space (and time) to channels, then the mean of consecutive channels.

  Zero frames before the clip complete its first group.
  """

  def __init__(self, c_in: int, c_out: int, ft: int, fs: int):
    if c_in * ft * fs**2 % c_out:
      raise ConfigError(
        f'model.codec.vae: a residual level from {c_in} to {c_out} channels needs {c_in} * '
        f'{ft * fs**2} to be a multiple of {c_out}. Change base or dim_mult.'
      )
    self.c_out, self.ft, self.fs = c_out, ft, fs

  def __call__(self, x, start: bool):
    ft, fs = self.ft, self.fs
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % ft, 0), (0, 0), (0, 0), (0, 0)))
    b, t, h, w, c = x.shape
    x = x.reshape(b, t // ft, ft, h // fs, fs, w // fs, fs, c)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)  # channels ordered (c, time, row, column)
    x = x.reshape(*x.shape[:4], self.c_out, -1)
    return jnp.mean(x.astype(jnp.float32), -1).astype(x.dtype)


class DuplicateUp(nnx.Module):
  """Parameter-free shortcut: channels repeated, then channels to space (and time).

  The frames that the clip's first frame would have before itself are dropped.
  """

  def __init__(self, c_in: int, c_out: int, ft: int, fs: int):
    if c_out * ft * fs**2 % c_in:
      raise ConfigError(
        f'model.codec.vae: a residual level from {c_in} to {c_out} channels needs {c_out} * '
        f'{ft * fs**2} to be a multiple of {c_in}. Change decoder_base or dim_mult.'
      )
    self.c_out, self.ft, self.fs = c_out, ft, fs

  def __call__(self, x, start: bool):
    b, t, h, w, c = x.shape
    ft, fs = self.ft, self.fs
    x = jnp.repeat(x, self.c_out * ft * fs**2 // c, axis=-1)
    x = x.reshape(b, t, h, w, self.c_out, ft, fs, fs).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(b, t * ft, h * fs, w * fs, self.c_out)
    return x[:, ft - 1 :] if start else x


def patchify(x, p: int):
  """[..., H, W, C] -> [..., H/p, W/p, C * p * p], channels ordered (c, column, row)."""
  *lead, h, w, c = x.shape
  x = x.reshape(*lead, h // p, p, w // p, p, c)
  n = len(lead)
  return x.transpose(*range(n), n, n + 2, n + 4, n + 3, n + 1).reshape(
    *lead, h // p, w // p, c * p * p
  )


def unpatchify(x, p: int):
  """Inverse of `patchify`."""
  *lead, h, w, c = x.shape
  x = x.reshape(*lead, h, w, c // p**2, p, p)
  n = len(lead)
  return x.transpose(*range(n), n, n + 4, n + 1, n + 3, n + 2).reshape(
    *lead, h * p, w * p, c // p**2
  )


def _conv_params(shape: tuple[int, ...], rngs: nnx.Rngs) -> tuple[nnx.Param, nnx.Param]:
  """Kernel [..., c_in, c_out] of fan-in scale and zero bias, float32."""
  fan_in = 1
  for side in shape[:-1]:
    fan_in *= side
  kernel = fan_in**-0.5 * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape)
  return nnx.Param(kernel), nnx.Param(jnp.zeros(shape[-1:]))


def _conv2d(x, kernel, stride: int, padding):
  """Frame-wise convolution of x [B, T, H, W, C], float32 sums; a 1x1 kernel is a matmul."""
  if kernel.shape[:2] == (1, 1):
    return jnp.matmul(x, kernel[0, 0], preferred_element_type=jnp.float32)
  y = jax.lax.conv_general_dilated(
    x.reshape(-1, *x.shape[2:]),
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    preferred_element_type=jnp.float32,
  )
  return y.reshape(*x.shape[:2], *y.shape[1:])
