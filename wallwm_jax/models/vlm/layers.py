"""Layers of Qwen3.5: gated delta-rule mixers and gated full attention, each with a SwiGLU network.

Any sequence of the two types runs by one code path over parameters that are stacked by type.
Sources: Qwen3-Next / Qwen3.5 as released; Gated Delta Networks (arXiv 2412.06464); gated attention
(arXiv 2505.06708); SwiGLU (arXiv 2002.05202).
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.config import QwenConfig
from wallwm_jax.kernels.attention.api import dot_product_attention
from wallwm_jax.kernels.cached_attention.api import cached_attention
from wallwm_jax.kernels.gated_delta.api import gated_delta
from wallwm_jax.models.layers import RMSNorm
from wallwm_jax.models.rope import Rotation
from wallwm_jax.models.stack import rematerialise, stack_blocks
from wallwm_jax.models.vlm.cache import PromptCache
from wallwm_jax.models.vlm.rotary import rotate
from wallwm_jax.parallel.constraints import constrain, partitioned
from wallwm_jax.types import ConfigError, Params


class _Tokens(NamedTuple):
  """What all layers know of the tokens they run: rotation, mask [B, n] of the real ones (none
  behind a False), and seen [B], how many cache slots they may attend to; None without a cache."""

  rotation: Rotation
  mask: Bool[Array, 'B n']
  seen: Int[Array, 'B'] | None


class Layers(nnx.Module):
  """A stack of layers of the given types, bottom first: `linear` and `full` hold the parameters of
  each type, stacked; a type that no layer has is absent."""

  def __init__(self, config: QwenConfig, types: tuple[str, ...], *, rngs: nnx.Rngs):
    self.config, self.types = config, types
    if 'linear' in types:
      make = functools.partial(_LinearBlock, config)
      self.linear = stack_blocks(lambda rngs: make(rngs=rngs), types.count('linear'), rngs)
    if 'full' in types:
      make = functools.partial(_FullBlock, config)
      self.full = stack_blocks(lambda rngs: make(rngs=rngs), types.count('full'), rngs)

  def prefill(
    self,
    x: Float[Array, 'B S D'],
    rotation: Rotation,
    mask: Bool[Array, 'B S'],
    size: int,
  ):
    """One pass over tokens of which `mask` tells the real ones, wherever they are: the result is
    that of the real ones alone.

    Returns:
      (x [B, S, D], 0 where `mask` is False; k, v [Lf, B, size, Hkv * hd] of the real tokens, packed
      to the front; conv [Ll, B, K-1, c]; state [Ll, B, Hv, dk, dv]).
    """
    # The real tokens move to the front, so that neither the convolution nor the recurrence nor the
    # cache meets a gap. A permutation and its inverse: gathers in both directions.
    order = jnp.argsort(~mask, axis=1, stable=True)
    packed = _Tokens(Rotation(*(_take(part, order) for part in rotation)), _take(mask, order), None)
    x = _take(jnp.where(mask[..., None], x, 0), order)
    x, (k, v), (conv, state) = self._run(x, packed, None, self.config.remat)
    x = jnp.where(mask[..., None], _take(x, jnp.argsort(order, axis=1)), 0)
    room = ((0, 0), (0, 0), (0, size - k.shape[2]), (0, 0))
    return x, jnp.pad(k, room), jnp.pad(v, room), conv, state

  def extend(
    self,
    x: Float[Array, 'B n D'],
    rotation: Rotation,
    cache: PromptCache,
    start: int = 0,
    stop: int | None = None,
  ):
    """n more tokens, causal among themselves, that read the cache of these layers.

    Args:
      start, stop: run only the layers start..stop-1 of these.

    Returns:
      (x [B, n, D]; k, v [Lf, B, n, Hkv * hd] of these tokens alone; conv and state after them; all
      of the layers that ran).
    """
    tokens = _Tokens(rotation, jnp.ones(x.shape[:2], bool), cache.mask.sum(1))
    past = {'full': (cache.k, cache.v), 'linear': (cache.conv, cache.state)}
    x, (k, v), (conv, state) = self._run(x, tokens, past, 'none', start, stop)
    return x, k, v, conv, state

  def _run(self, x, tokens: _Tokens, past, remat: str, start: int = 0, stop: int | None = None):
    """x through the layers start..stop-1: (x, (k, v) of full ones, (conv, state) of linear ones).

    The loops carry row numbers and every layer takes its own row of the stacked arrays: slices of
    them, by range, by period or by run, would each copy the weights once more.
    """
    types, left = self.types[start:stop], {'full': [], 'linear': []}
    row = {kind: self.types[:start].count(kind) for kind in left}
    bodies = {}
    for kind in sorted(set(types)):
      graph, params = nnx.split(getattr(self, kind))
      bodies[kind] = _body(kind, graph, params, past and past[kind], tokens, remat)
    for pattern, repeats in segments(types):
      period = functools.partial(_period, pattern, bodies, dict(row))
      x, new = jax.lax.scan(period, x, jnp.arange(repeats))
      for kind, arrays in new.items():
        row[kind] += repeats * pattern.count(kind)
        left[kind].append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), arrays))
    full, linear = (
      jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if parts else self._nothing(kind, x)
      for kind, parts in left.items()
    )
    return x, full, linear

  def _nothing(self, kind: str, x):
    """The cache rows of no layer: leading axis 0."""
    c, (b, n) = self.config, x.shape[:2]
    if kind == 'full':
      return (jnp.zeros((0, b, n, c.kv_heads * c.head_dim), x.dtype),) * 2
    state = (c.linear_value_heads, c.linear_key_dim, c.linear_value_dim)
    return (
      jnp.zeros((0, b, c.conv - 1, c.conv_channels), x.dtype),
      jnp.zeros((0, b, *state), jnp.float32),
    )


@functools.lru_cache
def segments(types: tuple[str, ...]) -> tuple[tuple[tuple[str, ...], int], ...]:
  """`types` as patterns that repeat, ((pattern, repeats), ...), with the fewest runs of equal
  layers to compile: 32 layers of period 4 cost two, wherever in the period they begin up to four.
  """
  best: list[tuple[int, tuple]] = [(0, ())]  # per length of a prefix: (cost, its segments)
  for stop in range(1, len(types) + 1):
    options = []
    for start in range(stop):
      part = types[start:stop]
      period = next(p for p in range(1, len(part) + 1) if _repeats(part, p))
      runs = len(list(itertools.groupby(part[:period])))
      cost, before = best[start]
      options.append((cost + runs, len(before), (*before, (part[:period], len(part) // period))))
    cost, _, chosen = min(options, key=lambda option: option[:2])
    best.append((cost, chosen))
  return best[-1][1]


def _repeats(part: tuple[str, ...], period: int) -> bool:
  return part == part[:period] * (len(part) // period)


def _body(kind: str, graph, params, past, tokens: _Tokens, remat: str):
  def layer(x, row):
    def own(stacked):
      pick = functools.partial(jax.lax.dynamic_index_in_dim, index=row, keepdims=False)
      return jax.tree.map(pick, stacked)

    # Keys and values stay stacked: a slice of them would be a copy.
    found = (*past, row) if past and kind == 'full' else own(past)
    return nnx.merge(graph, own(params))(x, found, tokens)

  if remat != 'none':
    return rematerialise(layer, remat)
  # Without it the backward pass would find a copy of every layer's weights beside the stack.
  return jax.checkpoint(layer, policy=_is_computed, prevent_cse=False)


def _is_computed(primitive, *_, **__) -> bool:
  """Whether a result is more than numbers in another place or of another dtype."""
  return primitive.name not in ('dynamic_slice', 'squeeze', 'reshape', 'convert_element_type')


def _period(pattern, bodies, first, x, repeat):
  """One period of layers: a scan per run of equal ones. first: row of each type at repeat 0."""
  done, new = {kind: first[kind] + repeat * pattern.count(kind) for kind in bodies}, {}
  for kind, run in itertools.groupby(pattern):
    count = len(list(run))
    x, arrays = jax.lax.scan(bodies[kind], x, done[kind] + jnp.arange(count))
    done[kind] += count
    new.setdefault(kind, []).append(arrays)
  return x, {kind: jax.tree.map(lambda *a: jnp.concatenate(a), *new[kind]) for kind in new}


class _Block(nnx.Module):
  """x + mixer(norm x), then x + SwiGLU(norm x)."""

  def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
    c, self.config = config, config
    self.input_norm, self.post_norm = (ZeroCentredNorm(c.width, c.eps) for _ in range(2))
    self.gate, self.up = (Projection(c, c.width, c.ffn, rngs=rngs) for _ in range(2))
    self.down = Projection(c, c.ffn, c.width, rngs=rngs)

  def __call__(self, x, past, tokens: _Tokens):
    """(x, what the layer leaves in the cache); past: what it finds there, None for nothing."""
    h, new = self.mix(self.input_norm(x), past, tokens)
    x = constrain(x + h, 'batch', 'text', None)
    h = self.post_norm(x)
    x = x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))
    return constrain(x, 'batch', 'text', None), new


class _FullBlock(_Block):
  """Softmax attention with normalised queries and keys, its output gated by the queries' input."""

  def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    c, wide = config, config.heads * config.head_dim
    self.q = Projection(c, c.width, 2 * wide, rngs=rngs)
    self.k, self.v = (
      Projection(c, c.width, c.kv_heads * c.head_dim, rngs=rngs) for _ in range(2)
    )
    self.q_norm, self.k_norm = (ZeroCentredNorm(c.head_dim, c.eps) for _ in range(2))
    self.o = Projection(c, wide, c.width, rngs=rngs)

  def mix(self, h, past, tokens: _Tokens):
    c, (b, n) = self.config, h.shape[:2]
    q, gate = jnp.split(self.q(h).reshape(b, n, c.heads, 2 * c.head_dim), 2, -1)
    k, v = (f(h).reshape(b, n, c.kv_heads, c.head_dim) for f in (self.k, self.v))
    q, k = rotate(self.q_norm(q), tokens.rotation), rotate(self.k_norm(k), tokens.rotation)
    if past is None:
      visible = tokens.mask[:, None] & np.tri(n, dtype=bool)
      keys, values = (jnp.repeat(x, c.heads // c.kv_heads, 2) for x in (k, v))
      out = dot_product_attention(q, keys, values, mask=visible[:, None])
    k, v = (x.reshape(b, n, -1) for x in (k, v))
    if past is not None:
      keys, values, row = past
      out = cached_attention(
        q, keys, values, lengths=tokens.seen, layer=row, latents=(k, v),
        implementation='xla' if partitioned() else None,
      )  # fmt: skip
    out = out * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(out.dtype)
    return self.o(out.reshape(b, n, -1)), (k, v)


class _LinearBlock(_Block):
  """A short causal convolution, then the gated delta rule, normalised and gated by head."""

  def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    c, heads = config, config.linear_value_heads
    wide = heads * c.linear_value_dim
    self.qkv = Projection(c, c.width, c.conv_channels, rngs=rngs)
    self.z = Projection(c, c.width, wide, rngs=rngs)
    self.b, self.a = (Projection(c, c.width, heads, rngs=rngs) for _ in range(2))
    self.conv = Projection(c, c.conv, c.conv_channels, rngs=rngs)  # depthwise: one tap per row
    # As the authors of the rule begin: decay rates of 1 to 16 per unit of a step of 1e-3 to 0.1.
    self.log_decay = nnx.Param(
      jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=1.0, maxval=16.0))
    )
    low, high = np.log(1e-3), np.log(0.1)
    step = jnp.exp(jax.random.uniform(rngs.params(), (heads,), minval=low, maxval=high))
    self.dt_bias = nnx.Param(jnp.log(jnp.expm1(step)))  # the inverse of softplus
    self.out_norm = RMSNorm(c.linear_value_dim, c.eps)
    self.out = Projection(c, wide, c.width, rngs=rngs)

  def mix(self, h, past, tokens: _Tokens):
    c, (b, n), f32 = self.config, h.shape[:2], jnp.float32
    conv, state = self._start(b, h.dtype) if past is None else past
    inputs = jnp.concatenate([conv, self.qkv(h)], 1)
    conv = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, c.conv - 1))(
      inputs, tokens.mask.sum(1)
    )
    q, k, v = self._convolve(inputs, n)
    real = tokens.mask[..., None]
    beta = jnp.where(real, jax.nn.sigmoid(self.b(h, f32)), 0.0)
    step = jax.nn.softplus(self.a(h, f32) + self.dt_bias[...])
    g = jnp.where(real, -jnp.exp(self.log_decay[...]) * step, 0.0)
    q, k, v = (x.astype(h.dtype) for x in (q, k, v))
    out, state = gated_delta(q, k, v, g, beta, state)
    gate = jax.nn.silu(self.z(h).astype(f32)).reshape(out.shape)
    return self.out((self.out_norm(out.astype(f32)) * gate).reshape(b, n, -1)), (conv, state)

  def _start(self, batch: int, dtype):
    c = self.config
    state = (batch, c.linear_value_heads, c.linear_key_dim, c.linear_value_dim)
    return jnp.zeros((batch, c.conv - 1, c.conv_channels), dtype), jnp.zeros(state)

  def _convolve(self, inputs, n: int):
    """q, k [B, n, Hk, dk] and v [B, n, Hv, dv], float32, of [q | k | v] with the K - 1 inputs
    before them."""
    c, taps = self.config, self.conv.kernel[...]
    mixed = sum(taps[j] * inputs[:, j : j + n].astype(jnp.float32) for j in range(c.conv))
    keys = c.linear_key_heads * c.linear_key_dim
    parts = jnp.split(jax.nn.silu(mixed), (keys, 2 * keys), -1)
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x, heads in zip(
      parts, (c.linear_key_heads, c.linear_key_heads, c.linear_value_heads), strict=True
    ))
    return _unit(q) * c.linear_key_dim**-0.5, _unit(k), v


class Projection(nnx.Module):
  """y = x W with operands in the config's dtype; the result in `out`, by default that dtype."""

  def __init__(self, config: QwenConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
    draw = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, (d_in, d_out))
    self.kernel = nnx.Param(d_in**-0.5 * draw)
    self.dtype = jnp.dtype(config.dtype)

  def __call__(self, x, out=None):
    kernel = self.kernel[...].astype(self.dtype)
    return jnp.matmul(x.astype(self.dtype), kernel, preferred_element_type=out or self.dtype)


class ZeroCentredNorm(nnx.Module):
  """x / rms(x) * (1 + scale) over the last axis in float32; dtype of x out."""

  def __init__(self, width: int, eps: float):
    self.scale = nnx.Param(jnp.zeros((width,)))
    self.eps = eps

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
    return (y * (1.0 + self.scale[...])).astype(x.dtype)


def _unit(x):
  """x / |x| over the last axis, safe at 0."""
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-6)


def _take(x, order):
  """x [B, S, ...] in another order of its tokens; order [B, S] is a permutation per row."""
  return jax.vmap(lambda x, i: x.at[i].get(unique_indices=True, mode='promise_in_bounds'))(x, order)


def _rows(types: tuple[str, ...], start: int, stop: int) -> dict[str, slice]:
  """Which of the stacked layers of each type are the layers start..stop-1."""
  return {
    kind: slice(types[:start].count(kind), types[:stop].count(kind)) for kind in ('linear', 'full')
  }


def slice_layers(params: Params, types: tuple[str, ...], start: int, stop: int) -> Params:
  """Parameters {'linear': ..., 'full': ...} of the layers start..stop-1 of `types`; a type that
  none of them has is absent."""
  rows = _rows(types, start, stop)
  present = [kind for kind in params if rows[kind].start < rows[kind].stop]
  return {kind: jax.tree.map(lambda a, r=rows[kind]: a[r], params[kind]) for kind in present}


def slice_cache(cache: PromptCache, types: tuple[str, ...], start: int, stop: int) -> PromptCache:
  """The cache of the layers start..stop-1 of `types`: same slots, fewer layers."""
  rows = _rows(types, start, stop)
  full, linear = rows['full'], rows['linear']
  return PromptCache(
    cache.k[full], cache.v[full], cache.conv[linear], cache.state[linear],
    cache.mask, cache.length, cache.position,
  )  # fmt: skip


def append(cache: PromptCache, k_new, v_new, conv, state, n: int) -> PromptCache:
  """The cache after n more text tokens: k_new, v_new [Lf, B, n, Hkv * hd] in the next free slots of
  every row, conv and state [Ll, ...] in place of the old ones.

  Raises:
    ConfigError: n tokens do not fit. Inside jit only n itself is known: tokens beyond the last slot
      are then lost to those that come later, so make the cache large enough (`size` of prefill).
  """
  size = cache.mask.shape[1]
  used = 0 if isinstance(cache.length, jax.core.Tracer) else int(np.max(cache.length, initial=0))
  if used + n > size:
    raise ConfigError(
      f'cache: {n} more tokens after {used} do not fit in its {size} slots. Prefill with size >= '
      f'{used + n}.'
    )
  slots = cache.length[:, None] + jnp.arange(n, dtype=cache.length.dtype)
  k, v = (
    jax.vmap(lambda old, new, i: old.at[:, i].set(new, mode='drop'), (1, 1, 0), 1)(*pair, slots)
    for pair in ((cache.k, k_new), (cache.v, v_new))
  )
  mask = cache.mask | (jnp.arange(size) < cache.length[:, None] + n)
  return PromptCache(k, v, conv, state, mask, cache.length + n, cache.position + n)
