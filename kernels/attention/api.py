"""Entry point of the attention op."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from wallwm_jax.kernels.attention import splash_tpu, xla
from wallwm_jax.types import ConfigError

Implementation = Literal['splash_tpu', 'xla']

# Best first. A backend raises NotImplementedError for calls or platforms it does not support.
_BACKENDS = {'xla': xla.attention}


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    implementation: Implementation | None = None,
    one_device: bool = False,
) -> jax.Array:
  """softmax(q k^T / sqrt(hd) + bias) v over the keys that `mask` shows; softmax in float32.

  Args:
    q: [B, Sq, heads, hd].
    k, v: [B, Sk, heads, hd], dtype of q.
    mask: bool, broadcastable to [B, heads, Sq, Sk], True = may attend. A query that may attend to
      no key gets the output 0 (and zero gradients), never NaN.
    bias: float, broadcastable like `mask`, added to the logits; -inf hides a key like the mask
    does.
    segments: int [B, Sq] and [B, Sk]; a query sees the keys of its own segment only, and none of
      segment 0 (padding). Costs no [Sq, Sk] mask to be handed over.
    implementation: a backend by name; None picks the best one that supports the call.
    one_device: this is one device's program (no mesh, or inside `shard_map`), so that None may take
      the TPU kernel, which cannot be split over devices, in programs compiled for a TPU.

  Returns:
    [B, Sq, heads, hd], dtype of q.

  Raises:
    ConfigError: shapes or dtypes that do not fit together, or an unknown implementation.
    NotImplementedError: the named implementation does not support this call.
  """
  _check(q, k, v, mask, bias)
  _check_segments(q, k, segments)
  if implementation is not None:
    named = {'splash_tpu': splash_tpu.attention, **_BACKENDS}
    if implementation not in named:
      raise ConfigError(
          f'attention implementation: expected None or one of {sorted(named)}, '
          f'got {implementation!r}.')
    return named[implementation](q, k, v, mask, bias, segments)
  if one_device and splash_tpu.supports(q, k, mask, bias):
    return _by_platform(q, k, v, mask, segments)
  for backend in _BACKENDS.values():
    try:
      return backend(q, k, v, mask, bias, segments)
    except NotImplementedError:
      continue
  raise NotImplementedError(f'no attention backend supports q {q.shape} {q.dtype}, k {k.shape}.')


@jax.custom_vjp
def _by_platform(q, k, v, mask, segments):
  return _choose(lambda backend, *args: backend(*args, None, segments), q, k, v, mask)


def _forward(q, k, v, mask, segments):
  return _by_platform(q, k, v, mask, segments), (q, k, v, mask, segments)


def _backward(kept, g):
  # Each platform's own gradient of its own forward pass: what one keeps, the other need not.
  *operands, mask, segments = kept

  def pull(backend, g, *operands):
    _, pullback = jax.vjp(lambda q, k, v: backend(q, k, v, mask, None, segments), *operands)
    return pullback(g)

  return (*_choose(pull, g, *operands), None, None)


_by_platform.defvjp(_forward, _backward)


def _choose(run, *operands):
  return jax.lax.platform_dependent(
      *operands,
      tpu=functools.partial(run, splash_tpu.attention),
      default=functools.partial(run, xla.attention))


def _check(q, k, v, mask, bias):
  ranks = q.ndim == k.ndim == v.ndim == 4
  if not ranks or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
    raise ConfigError(
        'attention: expected q [B, Sq, heads, hd] and k, v [B, Sk, heads, hd], '
        f'got q {q.shape}, k {k.shape}, v {v.shape}.')
  if not q.dtype == k.dtype == v.dtype:
    raise ConfigError(
        f'attention: expected q, k, v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}.')
  logits = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
  for name, x in (('mask', mask), ('bias', bias)):
    if x is not None and not _broadcasts(x.shape, logits):
      raise ConfigError(
          f'attention: {name} of shape {x.shape} does not broadcast to '
          f'[B, heads, Sq, Sk] = {list(logits)}.')
  if mask is not None and mask.dtype != jnp.bool_:
    raise ConfigError(f'attention: mask must be bool (True = may attend), got {mask.dtype}.')


def _check_segments(q, k, segments):
  if segments is None:
    return
  for name, x, like in zip(('queries', 'keys'), segments, (q, k), strict=True):
    if x.shape != like.shape[:2] or not jnp.issubdtype(x.dtype, jnp.integer):
      raise ConfigError(
          f'attention: expected integer segments of the {name} of shape {list(like.shape[:2])}, '
          f'got {x.dtype} {list(x.shape)}.')


def _broadcasts(shape, target) -> bool:
  """Of sizes that may be symbolic: an exported policy is traced with any number of rows."""
  aligned = zip(reversed(shape), reversed(target))
  return len(shape) <= len(target) and all(n == 1 or n == want for n, want in aligned)
