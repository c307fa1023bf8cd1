"""Entry point of attention over a cache: the action tower's and the staircase's."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from wallwm_jax.kernels.cached_attention import pallas_gpu, pallas_tpu, xla
from wallwm_jax.kernels.cached_attention.rows import Rows
from wallwm_jax.types import ConfigError

Implementation = Literal['pallas_tpu', 'pallas_gpu', 'xla']

_BACKENDS = {
  'pallas_tpu': pallas_tpu.cached_attention,
  'pallas_gpu': pallas_gpu.cached_attention,
  'xla': xla.cached_attention,
}


def cached_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  lengths: jax.Array | None = None,
  layer: jax.Array | int | None = None,
  latents: tuple[jax.Array, jax.Array] | None = None,
  scales: tuple[jax.Array, jax.Array] | None = None,
  implementation: Implementation | None = None,
) -> jax.Array:
  """softmax(q k^T / sqrt(D)) v over a cache and over new tokens behind it; softmax in float32.

  Heads are merged in the last axis of keys and values, as projections leave them: on a TPU
  splitting it is a copy of the cache. Query head i reads cached head i // (Hq / Hkv). One cache may
  serve several batch rows (noise draws, rollouts, guidance branches), which lie next to each other:
  row b reads cache b // (B / Bk), and the cache is read once for all of them.

  Args:
    q: [B, S, Hq, D].
    k, v: [Bk, N, Hkv * D], Bk a divisor of B; with `layer`: [L, Bk, N, Hkv * D], of which only that
      layer is read. Dtype of q, or int8 with `scales`.
    lengths: int [Bk], the slots 0..length-1 are seen; what lies behind them may be NaN. None: all.
    layer: index into a stacked cache; may be traced.
    latents: keys and values [B, S, Hkv * D] of the query tokens themselves, dtype of q: token s
      also sees the new tokens 0..s of its own batch row.
    scales: float32 [Bk, Hkv * D] or [L, Bk, Hkv * D], what int8 keys and values are multiplied by.
    implementation: a backend by name. None takes the TPU kernel in programs for a single TPU (or
      inside `shard_map`) if it supports the call, else XLA; the GPU kernel runs by name only.

  Returns:
    [B, S, Hq, D], dtype of q. A query that sees nothing (length 0, no latents) gets 0.

  Raises:
    ConfigError: shapes or dtypes that do not fit together, or an unknown implementation.
    NotImplementedError: the named implementation does not support this call.
  """
  _check(q, k, v, lengths, layer, latents, scales)
  rows = Rows.of(q, k)
  if layer is None:
    k, v = k[None], v[None]
    scales = None if scales is None else tuple(x[None] for x in scales)
  layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
  lengths = None if lengths is None else lengths.astype(jnp.int32)
  shape, q = q.shape, q.reshape(rows.batch, rows.tokens, -1)
  if latents is not None:
    latents = tuple(x.reshape(rows.batch, rows.tokens, -1) for x in latents)
  if scales is not None:
    # Per channel they need not touch the cache: q takes those of k, the result those of v.
    key_scale, value_scale = (
      jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)[:, None] for x in scales
    )
    of_queries = functools.partial(_of_query_heads, rows)
    q = (q * of_queries(key_scale)).astype(q.dtype)
    if latents is not None:
      latents = tuple(
        (x / s).astype(x.dtype) for x, s in zip(latents, (key_scale, value_scale), strict=True)
      )
  out = _run(implementation, rows, q, k, v, lengths, layer, latents)
  if scales is not None:
    out = (out * of_queries(value_scale)).astype(q.dtype)
  return out.reshape(shape)


def quantise(x: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """int8 values and float32 scales per channel, for `cached_attention`: x is about values * scale.

  Args:
    x: keys or values [..., Bk, N, C]; lengths: int [Bk], slots behind them do not count.

  Returns:
    (int8 [..., Bk, N, C], float32 [..., Bk, C]).
  """
  size = jnp.abs(x.astype(jnp.float32))
  if lengths is not None:
    size = jnp.where((jnp.arange(x.shape[-2]) < lengths[:, None])[..., None], size, 0.0)
  peak = size.max(-2)
  scale = jnp.where(peak == 0, 1.0, peak / 127.0)
  values = jnp.round(x.astype(jnp.float32) / scale[..., None, :])
  return jnp.clip(values, -127, 127).astype(jnp.int8), scale


def _run(implementation, rows: Rows, *operands):
  if implementation is not None:
    if implementation not in _BACKENDS:
      raise ConfigError(
        'cached_attention implementation: expected None or one of '
        f'{sorted(_BACKENDS)}, got {implementation!r}.'
      )
  elif _on_one_device() and pallas_tpu.supports(rows, *operands[:2]):
    return _kernel(None, rows, *operands)
  if implementation in (None, 'xla'):
    return xla.cached_attention(rows, *operands)
  return _kernel(implementation, rows, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel(implementation, rows, *operands):
  """A kernel forward; backward the XLA form's, computed again (training the staircase)."""
  if implementation is not None:
    return _BACKENDS[implementation](rows, *operands)
  return jax.lax.platform_dependent(
    *operands,
    tpu=functools.partial(pallas_tpu.cached_attention, rows),
    default=functools.partial(xla.cached_attention, rows),
  )


def _forward(implementation, rows, *operands):
  return _kernel(implementation, rows, *operands), operands


def _backward(implementation, rows, operands, out):
  del implementation
  q, k, v, lengths, layer, latents = operands

  def form(q, k, v, latents):
    return xla.cached_attention(rows, q, k, v, lengths, layer, latents)

  *qkv, new = jax.vjp(form, q, k, v, latents)[1](out)
  return *qkv, None, None, new


_kernel.defvjp(_forward, _backward)


def _of_query_heads(rows: Rows, scale):
  """[Bk, 1, Hkv * D] for the query heads that read each cached head, [Bk, 1, Hq * D]."""
  scale = scale.reshape(rows.batch, 1, rows.heads, 1, rows.dim)
  shape = (rows.batch, 1, rows.heads, rows.group, rows.dim)
  return jnp.broadcast_to(scale, shape).reshape(rows.batch, 1, -1)


def _on_one_device() -> bool:
  """Whether the program traced is for one device, as far as can be known: XLA splits no kernel."""
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    return mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
  return jax.default_backend() != 'tpu' or jax.device_count() == 1


def _check(q, k, v, lengths, layer, latents, scales):
  rank = 3 if layer is None else 4
  fits = q.ndim == 4 and k.ndim == rank and k.shape == v.shape and k.dtype == v.dtype
  if fits:
    (b, _, heads, dim), (caches, _, wide) = q.shape, k.shape[-3:]
    fits = wide % dim == 0 and wide > 0 and heads % (wide // dim) == 0 and b % caches == 0
  if not fits:
    shape = '[Bk, N, Hkv * D]' if layer is None else '[L, Bk, N, Hkv * D] (with a layer)'
    raise ConfigError(
      f'cached_attention: expected q [B, S, Hq, D] and k, v {shape}, Bk a divisor of B and Hkv of '
      f'Hq, got q {q.shape}, k {k.shape} {k.dtype}, v {v.shape} {v.dtype}.'
    )
  if k.dtype != (q.dtype if scales is None else jnp.int8):
    raise ConfigError(
      f'cached_attention: expected k, v of the dtype of q ({q.dtype}), or int8 with scales, got '
      f'{k.dtype} {"without" if scales is None else "with"} scales.'
    )
  if lengths is not None and (
    lengths.shape != (caches,) or not jnp.issubdtype(lengths.dtype, jnp.integer)
  ):
    raise ConfigError(
      f'cached_attention: expected integer lengths [{caches}], got {lengths.dtype} '
      f'{list(lengths.shape)}.'
    )
  _check_pair('latents', latents, (b, q.shape[1], wide), q.dtype)
  _check_pair('scales', scales, (*k.shape[:-2], wide), jnp.float32)


def _check_pair(name, pair, shape, dtype):
  if pair is None:
    return
  for x in pair:
    if x.shape != shape or x.dtype != dtype:
      raise ConfigError(
        f'cached_attention: expected {name} {list(shape)} {jnp.dtype(dtype)}, got '
        f'{list(x.shape)} {x.dtype}.'
      )
