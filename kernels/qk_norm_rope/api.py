"""Entry point of QK-norm with rotary embedding."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from wallwm_jax.kernels.qk_norm_rope import pallas_tpu, xla
from wallwm_jax.types import ConfigError

Implementation = Literal['pallas_tpu', 'xla']

_IMPLEMENTATIONS = ('pallas_tpu', 'xla')


def qk_norm_rope(
  x: jax.Array,
  scale: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  *,
  heads: int,
  eps: float,
  implementation: Implementation | None = None,
) -> jax.Array:
  """x / rms(x) * scale over the full width, then every head rotated pair by pair.

  Lanes (2i, 2i + 1) of a head are a pair: (a, b) -> (a cos - b sin, a sin + b cos). Computed in
  float32 and rounded once. Differentiable (reverse mode) in x, scale, cos and sin; the backward
  pass keeps x and nothing else of its size.

  On several devices, call it inside `shard_map` with whole tokens on each: a kernel is one device's
  program, and compiling it for a mesh without one is an error of the compiler.

  Args:
    x: [..., S, D] projected queries or keys, D = heads * hd; bfloat16 or float32.
    scale: [D] float32.
    cos, sin: [S, hd / 2] or [..., S, hd / 2] float32, shared by the heads.
    eps: added to the mean square.
    implementation: a backend by name. None takes the TPU kernels in programs compiled for a TPU
      when they support the shapes, XLA otherwise.

  Returns:
    [..., S, heads, hd], dtype of x.

  Raises:
    ConfigError: shapes or dtypes that do not fit together, or an unknown implementation.
    NotImplementedError: the named implementation does not support this call.

  Source: Wan 2.2 (QK-norm across heads, interleaved 3-D RoPE).
  """
  _check(x, scale, cos, sin, heads)
  taken = pallas_tpu.supports(x, heads)
  if implementation not in (None, *_IMPLEMENTATIONS):
    raise ConfigError(
      f'qk_norm_rope implementation: expected None or one of {list(_IMPLEMENTATIONS)}, '
      f'got {implementation!r}.'
    )
  if implementation == 'pallas_tpu' and not taken:
    raise NotImplementedError(
      f'qk_norm_rope on TPU: expected heads of 128 and 128 or more tokens, got x {x.shape} '
      f'{x.dtype} of {heads} heads.'
    )
  return _op(x, scale, cos, sin, heads, eps, implementation or ('xla' if not taken else None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _op(x, scale, cos, sin, heads, eps, implementation):
  def kernel(x, scale, cos, sin):
    out = pallas_tpu.forward(_flat(x), scale, _table(cos, sin), eps)
    return out.reshape(*x.shape[:-1], heads, -1)

  def left_to_xla(x, scale, cos, sin):
    return xla.forward(x, scale, cos, sin, heads, eps)

  return _dispatch(implementation, kernel, left_to_xla)(x, scale, cos, sin)


def _forward(x, scale, cos, sin, heads, eps, implementation):
  turns = cos.perturbed or sin.perturbed  # a fixed table needs no gradient, which costs bytes
  operands = tuple(primal.value for primal in (x, scale, cos, sin))
  return _op(*operands, heads, eps, implementation), (operands, () if turns else None)


def _backward(heads, eps, implementation, kept, g):
  operands, turns = kept
  if isinstance(g, SymbolicZero):
    return None, None, None, None

  def kernel(x, scale, cos, sin, g):
    flat = _flat(x)
    dx, dscale, dtable = pallas_tpu.backward(
      flat, scale, _table(cos, sin), g.reshape(flat.shape), eps, turns is not None
    )
    if turns is None:
      return dx.reshape(x.shape), dscale
    dcos, dsin = (part.reshape(cos.shape) for part in jnp.split(dtable, 2, -1))
    return dx.reshape(x.shape), dscale, dcos, dsin

  def left_to_xla(*operands_and_g):
    *operands, g = operands_and_g
    _, pullback = jax.vjp(lambda *args: xla.forward(*args, heads, eps), *operands)
    return pullback(g)[: 2 if turns is None else 4]

  found = _dispatch(implementation, kernel, left_to_xla)(*operands, g)
  return (*found, None, None)[:4]


_op.defvjp(_forward, _backward, symbolic_zeros=True)


def _dispatch(implementation, kernel, left_to_xla):
  if implementation is not None:
    return kernel if implementation == 'pallas_tpu' else left_to_xla
  return functools.partial(jax.lax.platform_dependent, tpu=kernel, default=left_to_xla)


def _flat(x):
  """[..., S, D] -> [N, S, D]."""
  return x.reshape(-1, *x.shape[-2:])


def _table(cos, sin):
  """[..., S, hd / 2] twice -> [N or 1, S, hd]."""
  return _flat(jnp.concatenate([cos, sin], -1))


def _check(x, scale, cos, sin, heads):
  if x.ndim < 2 or x.shape[-1] % (2 * heads) or scale.shape != x.shape[-1:]:
    raise ConfigError(
      f'qk_norm_rope: expected x [..., S, D] and scale [D] with D = {heads} heads of even width, '
      f'got {x.shape} and {scale.shape}.'
    )
  pairs = x.shape[-1] // heads // 2
  shared, own = (x.shape[-2], pairs), (*x.shape[:-1], pairs)
  if cos.shape != sin.shape or cos.shape not in (shared, own):
    raise ConfigError(
      f'qk_norm_rope: expected cos and sin {list(shared)} or {list(own)} for x {x.shape}, '
      f'got {cos.shape} and {sin.shape}.'
    )
  wrong = [a.dtype for a in (scale, cos, sin) if a.dtype != jnp.float32]
  if x.dtype not in (jnp.bfloat16, jnp.float32) or wrong:
    raise ConfigError(
      'qk_norm_rope: expected x bfloat16 or float32 and scale, cos, sin float32, '
      f'got {x.dtype}, {scale.dtype}, {cos.dtype}, {sin.dtype}.'
    )
