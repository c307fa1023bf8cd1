"""TPU kernel: the rule by chunks of 64 tokens, the states of a group of heads held in VMEM.

The grid runs over (sequence, group of value heads, chunk); the groups go to both cores of a v4 or
v5p. Chunk by chunk, with d the summed log decay inside the chunk, M_ij = k_i k_j exp(d_i - d_j) b_j
for j < i, P_ij = q_i k_j exp(d_i - d_j) b_j for j <= i, b = beta and S the state before the chunk:

  Y = (1 + M)^-1 (v - exp(d) K S);   o = exp(d) Q S + P Y;
  S <- exp(d_last) S + K^T (exp(d_last - d) b Y)

Matrices of 64 x 64 would fill half of the lanes of a register, so two heads lie side by side in
[64, 128], and multiply from the right as the blocks of a diagonal [128, 128]. The inverse starts
from its diagonal blocks of 16, by substitution, four of each of the two heads in the lanes of one
[16, 128]; two products by the corner below merge neighbours. That is as stable as substitution:
equal keys make the powers of M, which shorter ways to the inverse sum up, cancel from 1e18.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from wallwm_jax.kernels.static import is_static

_CHUNK, _BLOCK, _LANES = 64, 16, 128
_MAX_HEADS = 16  # value heads of a group: states, their in- and output and two chunks in 15 MB
_TOGETHER = 8  # pairs of heads whose steps alternate: fewer wait for each other's products


def supports(q, v) -> bool:
  """Whether the kernel takes q [B, S, Hk, dk] and v [B, S, Hv, dv]: whole registers per head and
  more than one chunk."""
  return (
    q.dtype == v.dtype
    and q.dtype in (jnp.bfloat16, jnp.float32)
    and is_static(q, v)
    and q.shape[1] > _CHUNK
    and q.shape[3] % _LANES == 0
    and v.shape[3] % _LANES == 0
    and _group(q.shape[2], v.shape[2]) is not None
  )


def _group(key_heads: int, value_heads: int) -> int | None:
  """Value heads of a grid step: an even number of them, with the key heads they share."""
  shared = value_heads // key_heads
  sizes = [
    n
    for n in range(2, min(_MAX_HEADS, value_heads) + 1, 2)
    if value_heads % n == 0 and n % shared == 0
  ]
  two_cores = [n for n in sizes if value_heads // n % 2 == 0]
  return max(two_cores or sizes, default=None)


def gated_delta(q, k, v, g, beta, state, interpret=False):
  """See `api.gated_delta`.

  Raises:
    NotImplementedError: sizes or dtypes the kernel does not take.
  """
  if not supports(q, v):
    raise NotImplementedError(
      f'gated_delta on TPU: expected q, k, v of bfloat16 or float32 with more than {_CHUNK} '
      f'tokens, heads of a multiple of {_LANES} numbers, and an even number of value heads, got '
      f'q {q.shape} {q.dtype}, v {v.shape} {v.dtype}.'
    )
  batch, tokens, key_heads, dk = q.shape
  heads, dv = v.shape[2:]
  group = _group(key_heads, heads)
  groups, chunks = heads // group, -(-tokens // _CHUNK)
  shared = heads // key_heads
  columns, rows = _decays(g, beta, groups)

  def tokenwise(width):
    return pl.BlockSpec((None, _CHUNK, width), lambda b, h, c: (b, c, h))

  keys, values = tokenwise(group // shared * dk), tokenwise(group * dv)
  states = pl.BlockSpec((None, group, dk, dv), lambda b, h, c: (b, h, 0, 0))
  out, state = pl.pallas_call(
    functools.partial(_kernel, tokens=tokens, shared=shared),
    grid=(batch, groups, chunks),
    in_specs=[
      pl.BlockSpec((None, None, _CHUNK, 2 * group), lambda b, h, c: (b, h, c, 0)),
      pl.BlockSpec((None, None, None, group, _LANES), lambda b, h, c: (b, h, c, 0, 0)),
      keys,
      keys,
      values,
      states,
    ],
    out_specs=[values, states],
    out_shape=[
      jax.ShapeDtypeStruct((batch, tokens, heads * dv), v.dtype),
      jax.ShapeDtypeStruct(state.shape, jnp.float32),
    ],
    scratch_shapes=[pltpu.VMEM((group, dk, dv), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * batch * chunks * heads * _CHUNK * dv * (3 * dk + 4 * _CHUNK),
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, k, v, v, state, state)),
      transcendentals=batch * chunks * heads * _CHUNK * _CHUNK,
    ),
    interpret=interpret,
    name=f'gated_delta_{tokens}x{heads}',
  )(columns, rows, *(x.reshape(batch, tokens, -1) for x in (q, k, v)), state)
  return out.reshape(v.shape), state


def _decays(g, beta, groups: int):
  """The log decays d, summed inside each chunk, and beta, both ways round.

  Returns:
    columns [B, groups, S', (d | beta) of a group's heads]; rows [B, groups, chunks, (d | beta) of
    a group's pairs of heads, 64 tokens of the one and 64 of the other].
  """
  g, beta = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % _CHUNK), (0, 0))) for x in (g, beta))
  split = (g.shape[0], -1, _CHUNK, groups, g.shape[2] // groups)
  g, beta = g.reshape(split), beta.reshape(split)
  both = jnp.concatenate([jnp.cumsum(g, 2), beta], -1)  # [B, chunks, 64, groups, 2 heads]
  both = jnp.moveaxis(both, 3, 1)
  columns = both.reshape(*both.shape[:2], -1, both.shape[4])
  rows = both.swapaxes(-1, -2).reshape(*both.shape[:3], -1, 2 * _CHUNK)
  return columns, rows


def _kernel(columns, rows, q, k, v, before, out, after, states, *, tokens: int, shared: int):
  """One chunk of one group of heads; `states` lives from chunk to chunk."""
  group, dk, dv = states.shape
  chunk, chunks = pl.program_id(2), -(-tokens // _CHUNK)
  lane = jax.lax.broadcasted_iota(jnp.int32, (_CHUNK, _LANES), 1)
  row = jax.lax.broadcasted_iota(jnp.int32, (_CHUNK, _LANES), 0)
  first, column = lane < _CHUNK, lane % _CHUNK
  zeros = jnp.zeros((_CHUNK, dv))

  @pl.when(chunk == 0)
  def _start():
    states[...] = before[...]

  dot = functools.partial(_dot, q.dtype)

  def tokenwise(ref, head, width):
    """Numbers of one head; behind the last token there is anything, NaN included."""
    x = ref[:, head * width : (head + 1) * width]
    if tokens % _CHUNK:
      row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
      x = jnp.where(row < tokens - chunk * _CHUNK, x, jnp.zeros_like(x))
    return x

  decay, beta = columns[:, :group], columns[:, group:]
  survives = jnp.exp(decay)
  writes = jnp.exp(decay[_CHUNK - 1 :] - decay) * beta

  def beside(x, head):
    """Rows of one of the two heads of a pair, zeros in place of the other's."""
    return jnp.concatenate([zeros, x] if head % 2 else [x, zeros], 0)

  def some(pairs):
    """Phase by phase over several pairs of heads, so that no unit waits for one product."""
    heads = [h for p in pairs for h in (2 * p, 2 * p + 1)]
    ks = {h // shared: tokenwise(k, h // shared, dk) for h in heads}
    kqs = {h: jnp.concatenate([x, tokenwise(q, h, dk)], 0) for h, x in ks.items()}
    twice = {h: jnp.concatenate([x, x], 0) for h, x in ks.items()}
    products = {h: dot(kqs[h], twice[h], (1, 1)) for h in ks}
    masked = []
    for p in pairs:
      own = jnp.where(first, decay[:, 2 * p : 2 * p + 1], decay[:, 2 * p + 1 : 2 * p + 2])
      gap = jnp.where(row >= column, own - rows[p : p + 1], -jnp.inf)
      weight = jnp.exp(gap) * rows[group // 2 + p : group // 2 + p + 1]
      a, b = (products[h // shared] for h in (2 * p, 2 * p + 1))
      both = (a[:_CHUNK], a[_CHUNK:])
      if a is not b:
        both = (jnp.where(first, x, y) for x, y in zip(both, (b[:_CHUNK], b[_CHUNK:])))
      masked.append([x * weight for x in both])
    inverses = _inverses([lower for lower, _ in masked], dot)
    left = [survives[:, h : h + 1] for h in heads]
    read = [dot(kqs[h // shared], states[h].astype(q.dtype), (1, 0)) for h in heads]
    error = [
      tokenwise(v, h, dv).astype(jnp.float32) - e * r[:_CHUNK]
      for h, e, r in zip(heads, left, read)
    ]
    ys = [dot(inverses[i // 2], beside(e, i), (1, 0)) for i, e in enumerate(error)]
    os = [dot(masked[i // 2][1], beside(y, i), (1, 0)) for i, y in enumerate(ys)]
    turned = {h: x.T for h, x in twice.items()}
    new = [
      dot(turned[h // shared], beside(writes[:, h : h + 1] * y, 0), (1, 0))
      for h, y in zip(heads, ys)
    ]
    for h, e, r, o, n in zip(heads, left, read, os, new):
      out[:, h * dv : (h + 1) * dv] = (o + e * r[_CHUNK:]).astype(out.dtype)
      states[h] = states[h] * e[_CHUNK - 1 :] + n

  for at in range(0, group // 2, _TOGETHER):
    some(range(at, min(at + _TOGETHER, group // 2)))

  @pl.when(chunk == chunks - 1)
  def _finish():
    after[...] = states[...]


def _dot(dtype, a, b, contracted):
  return jax.lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    (((contracted[0],), (contracted[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


def _diagonal(x):
  """[64, 128], two matrices side by side, as the blocks of a diagonal [128, 128]."""
  first = jnp.where(jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1) < _CHUNK, 1.0, 0.0)
  return jnp.concatenate([x * first, x * (1.0 - first)], 0)


def _inverses(lower, dot):
  """(1 + strict lower part)^-1 of two [64, 64] side by side, for every [64, 128] of a list."""
  lane = jax.lax.broadcasted_iota(jnp.int32, (_BLOCK, _LANES), 1)
  row = jax.lax.broadcasted_iota(jnp.int32, (_BLOCK, _LANES), 0)
  block, column = lane % _CHUNK // _BLOCK, lane % _BLOCK
  count = _CHUNK // _BLOCK
  blocks = []
  for x in lower:
    parts = [x[i * _BLOCK : (i + 1) * _BLOCK] for i in range(count)]
    chosen = parts[0]
    for i in range(1, count):
      chosen = jnp.where(block == i, parts[i], chosen)
    blocks.append(jnp.where(row > column, chosen, 0.0))
  found = [jnp.where(row == column, 1.0, 0.0)] * len(lower)
  for j in range(_BLOCK - 1):
    at = lane - column + j
    found = [
      x - jnp.take_along_axis(b, at, 1, mode='promise_in_bounds') * x[j : j + 1]
      for x, b in zip(found, blocks)
    ]
  found = [
    jnp.concatenate([x * jnp.where(block == i, 1.0, 0.0) for i in range(count)], 0) for x in found
  ]
  lane = jax.lax.broadcasted_iota(jnp.int32, (_CHUNK, _LANES), 1)
  row = jax.lax.broadcasted_iota(jnp.int32, (_CHUNK, _LANES), 0)
  column = lane % _CHUNK
  side = _BLOCK
  while side < _CHUNK:
    below = (row // side % 2 == 1) & (column // side == row // side - 1)
    corners = [jnp.where(below, x, 0.0) for x in lower]
    half = [dot(x, _diagonal(c), (1, 0)) for x, c in zip(found, corners)]
    found = [x - dot(h, _diagonal(x), (1, 0)) for x, h in zip(found, half)]
    side *= 2
  return found
