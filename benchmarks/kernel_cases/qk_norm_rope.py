"""Queries and keys of one layer, normed and rotated: 'SxD', tokens by width in heads of 128.

'_backward' is the pass back through both, '_camera' the same with the gradient of the table, which
the cross-view branch learns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kernel_cases import KERNEL, Case
from wallwm_jax.kernels.qk_norm_rope import api

NAMES = ('4096x3072', '4096x3072_backward', '4096x3072_camera')
_HEAD, _EPS = 128, 1e-6


def case(name: str) -> Case:
  """Raises ValueError on a name that is not of the form above."""
  size, _, kind = name.partition('_')
  tokens, width = (int(side) for side in size.split('x'))
  if kind not in ('', 'backward', 'camera'):
    raise ValueError(f'qk_norm_rope case {name!r}: expected SxD, SxD_backward or SxD_camera')
  forms = {
    KERNEL: lambda *args: api.qk_norm_rope(
      *args, heads=width // _HEAD, eps=_EPS, implementation='pallas_tpu'
    ).reshape(args[0].shape),
    'xla, pairs': lambda *args: api.qk_norm_rope(
      *args, heads=width // _HEAD, eps=_EPS, implementation='xla'
    ).reshape(args[0].shape),
    'xla, rolled lanes': _rolled,
    'xla, pairs swapped by a matmul': _by_matmul,
    'xla, heads first': _heads_first,
  }
  x, scale, table = (
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (
      ((tokens, width), jnp.bfloat16), ((width,), jnp.float32), ((tokens, _HEAD // 2), jnp.float32)
    )
  )  # fmt: skip
  array, small = 2 * tokens * width, 4 * tokens * _HEAD
  operands = ((x, x), (scale, scale), table, table)
  if not kind:
    programs = {form: _both(run) for form, run in forms.items()}
    return Case(programs, operands, {'qk_norm_rope': 2 * array + small}, 4 * array + small)
  camera = kind == 'camera'
  programs = {form: _back_through_both(run, camera) for form, run in forms.items()}
  moved = 3 * array + small * (1 + camera)
  return Case(
    programs,
    (*operands, (x, x)),
    {'transpose_jvp_qk_norm_rope_backward': moved},
    6 * array + small * (1 + camera),
  )


def _both(run):
  """Of queries and keys, which share the table."""
  return lambda x, scale, cos, sin: [run(*own, cos, sin) for own in zip(x, scale, strict=True)]


def _back_through_both(run, camera):
  def back(x, scale, cos, sin, g):
    if camera:
      return jax.vjp(_both(run), x, scale, cos, sin)[1](list(g))
    return jax.vjp(lambda x, scale: _both(run)(x, scale, cos, sin), x, scale)[1](list(g))

  return back


def _normed(x, scale):
  y = x.astype(jnp.float32)
  return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + _EPS) * scale


def _of_lanes(cos, sin):
  """[S, 1, 128] twice: of every lane, the sine with the sign it takes."""
  cos, sin = (jnp.repeat(part, 2, -1)[:, None] for part in (cos, sin))
  return cos, jnp.where(np.arange(_HEAD) % 2 == 0, -sin, sin)


def _rolled(x, scale, cos, sin):
  y, (cos, sin) = _normed(x, scale).reshape(len(x), -1, _HEAD), _of_lanes(cos, sin)
  other = jnp.where(np.arange(_HEAD) % 2 == 0, jnp.roll(y, -1, -1), jnp.roll(y, 1, -1))
  return (y * cos + other * sin).astype(x.dtype).reshape(x.shape)


def _by_matmul(x, scale, cos, sin):
  """Pairs of x are swapped, exactly in bfloat16, before they are normed."""
  swap = np.eye(_HEAD)[np.arange(_HEAD) ^ 1]
  y, (cos, sin) = x.reshape(len(x), -1, _HEAD), _of_lanes(cos, sin)
  other = jnp.einsum('shi,ij->shj', y, jnp.asarray(swap, x.dtype))
  r = jax.lax.rsqrt(jnp.square(x.astype(jnp.float32)).mean(-1)[:, None, None] + _EPS)
  scale = scale.reshape(-1, _HEAD)
  turned = y * scale * cos + other.astype(jnp.float32) * (scale @ swap) * sin
  return (r * turned).astype(x.dtype).reshape(x.shape)


def _heads_first(x, scale, cos, sin):
  """[heads, S, 128] throughout, as attention takes them."""
  y, (cos, sin) = x.reshape(len(x), -1, _HEAD).swapaxes(0, 1), _of_lanes(cos, sin)
  y, cos, sin = y.astype(jnp.float32), cos[:, 0], sin[:, 0]
  y *= jax.lax.rsqrt(jnp.square(y).mean((0, 2))[:, None] + _EPS)
  y *= scale.reshape(-1, 1, _HEAD)
  other = jnp.where(np.arange(_HEAD) % 2 == 0, jnp.roll(y, -1, -1), jnp.roll(y, 1, -1))
  return (y * cos + other * sin).astype(x.dtype).swapaxes(0, 1).reshape(x.shape)
