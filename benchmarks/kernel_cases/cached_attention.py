"""Attention over a cache, sizes of the 5B action tower and the 9B language model.

'NxR': R action queries of 24 heads of 128 against N cached video tokens, in a loop over 4 stacked
layers with a residual, per layer; with '_int8' cached keys and values in int8; with '_alone' one
layer without the loop. 'NxK_staircase': K latents of 4 x 4 heads of 256 over a prompt of N tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernel_cases import KERNEL, Case
from wallwm_jax.kernels.cached_attention.api import cached_attention

NAMES = ('4096x64', '4096x64_alone', '4096x64_int8', '4096x128', '4096x16_staircase')
_LAYERS = 4


def case(name: str) -> Case:
  """Raises ValueError on a name of another form."""
  size, _, kind = name.partition('_')
  slots, rows = (int(side) for side in size.split('x'))
  if kind == 'staircase':
    return _staircase(slots, rows)
  if kind not in ('', 'alone', 'int8'):
    raise ValueError(f"cached_attention: expected '', 'alone', 'int8' or 'staircase', got {kind!r}")
  heads, dim, layers = 24, 128, 1 if kind == 'alone' else _LAYERS
  x = _spec(1, rows, heads * dim)
  dtype = jnp.int8 if kind == 'int8' else jnp.bfloat16
  cache = (_spec(layers, 1, slots, heads * dim, dtype=dtype),) * 2
  heads_first = (_spec(layers, heads, slots, dim, dtype=dtype),) * 2
  scales = (_spec(layers, 1, heads * dim, dtype=jnp.float32),) * 2 if kind == 'int8' else None
  programs = {
    KERNEL: functools.partial(_layers, _kernel()),
    'xla': functools.partial(_layers, 'xla'),
    'xla, heads first': _heads_first,
    'xla, heads split': _heads_split,
  }
  streamed = 2 * slots * heads * dim * jnp.dtype(dtype).itemsize
  moved = streamed + 2 * 2 * rows * heads * dim
  operands = (x, cache, heads_first, scales)
  return Case(programs, operands, {'cached_attention': moved}, moved, layers)


def _kernel() -> str:
  return 'pallas_gpu' if jax.default_backend() == 'gpu' else 'pallas_tpu'


def _spec(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def _layers(implementation, x, cache, heads_first, scales):
  del heads_first
  k, v = cache

  def layer(x, i):
    q = x.reshape(*x.shape[:2], 24, -1)
    out = cached_attention(q, k, v, layer=i, scales=scales, implementation=implementation)
    return x + out.reshape(x.shape), None

  if len(k) == 1:
    return layer(x, 0)[0]
  return jax.lax.scan(layer, x, jnp.arange(len(k)))[0]


def _heads_first(x, cache, heads_first, scales):
  """Sliced by the loop, from a cache [L, heads, N, D] as no projection leaves it."""
  del cache

  def layer(x, of_layer):
    (k, v), scales = of_layer
    q = x.reshape(x.shape[1], 24, -1)
    if scales is not None:
      q = (q * scales[0].reshape(1, 24, -1)).astype(x.dtype)
      k, v = k.astype(x.dtype), v.astype(x.dtype)
    scores = jnp.einsum('rhd,hnd->hrn', q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5).astype(x.dtype)
    out = jnp.einsum('hrn,hnd->rhd', weights, v, preferred_element_type=jnp.float32)
    if scales is not None:
      out = out * scales[1].reshape(1, 24, -1)
    return x + out.astype(x.dtype).reshape(x.shape), None

  return jax.lax.scan(layer, x, (heads_first, scales))[0]


def _heads_split(x, cache, heads_first, scales):
  """jax.nn's attention, layers sliced by the loop."""
  del heads_first

  def layer(x, of_layer):
    (k, v), scales = of_layer
    if scales is not None:
      k, v = ((y * s[:, None]).astype(x.dtype) for y, s in zip((k, v), scales, strict=True))
    q, k, v = (y.reshape(*y.shape[:2], 24, -1) for y in (x, k, v))
    return x + jax.nn.dot_product_attention(q, k, v).reshape(x.shape), None

  return jax.lax.scan(layer, x, (cache, scales))[0]


def _staircase(slots: int, latents: int) -> Case:
  heads, group, dim = 4, 4, 256
  q = _spec(1, latents, heads * group * dim)
  cache = (_spec(1, slots, heads * dim),) * 2
  new = (_spec(1, latents, heads * dim),) * 2
  programs = {
    KERNEL: functools.partial(_two_sources, _kernel()),
    'xla': functools.partial(_two_sources, 'xla'),
    'xla, one softmax': _one_softmax,
    'xla, heads repeated': _heads_repeated,
  }
  moved = 2 * heads * dim * (2 * (slots + latents) + 2 * group * latents)
  return Case(programs, (q, cache, new), {'cached_attention': moved}, moved)


def _two_sources(implementation, q, cache, new):
  heads = q.reshape(*q.shape[:2], 16, -1)
  out = cached_attention(heads, *cache, latents=new, implementation=implementation)
  return out.reshape(q.shape)


def _joined(cache, new):
  k, v = (jnp.concatenate(pair, 1) for pair in zip(cache, new, strict=True))
  latents = new[0].shape[1]
  cached = jnp.ones((latents, cache[0].shape[1]), bool)
  mask = jnp.concatenate([cached, jnp.tril(jnp.ones((latents, latents), bool))], 1)
  return *(x.reshape(*x.shape[:2], 4, -1) for x in (k, v)), mask


def _one_softmax(q, cache, new):
  """New tokens are appended to the cache."""
  k, v, mask = _joined(cache, new)
  grouped = q.reshape(*q.shape[:2], 4, 4, -1)
  scores = jnp.einsum('bshgd,bnhd->bhgsn', grouped, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(jnp.where(mask, scores * k.shape[-1] ** -0.5, -jnp.inf))
  out = jnp.einsum(
    'bhgsn,bnhd->bshgd', weights.astype(q.dtype), v, preferred_element_type=jnp.float32
  )
  return out.reshape(q.shape).astype(q.dtype)


def _heads_repeated(q, cache, new):
  k, v, mask = _joined(cache, new)
  k, v = (jnp.repeat(x, 4, 2) for x in (k, v))
  heads = q.reshape(*q.shape[:2], 16, -1)
  return jax.nn.dot_product_attention(heads, k, v, mask=mask[None, None]).reshape(q.shape)
