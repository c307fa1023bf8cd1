"""The UMT5 encoder: T5's pre-norm blocks with a table of relative position biases in every layer.

Sources: T5 (arXiv 1910.10683), gated GELU (arXiv 2002.05202), UMT5 (arXiv 2304.09151).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.config import TextConfig, UMT5Config
from wallwm_jax.kernels.attention.api import dot_product_attention
from wallwm_jax.models.layers import Embedding, RMSNorm
from wallwm_jax.models.stack import scan_blocks, stack_blocks
from wallwm_jax.parallel.constraints import constrain


def relative_buckets(config: UMT5Config, length: int) -> np.ndarray:
  """int32 [length, length] bucket of (query, key): one half of the buckets per direction.

  Within a half, the first buckets hold one distance each and the others grow with its logarithm up
  to `max_distance`. NumPy float32, rounded step by step like the public implementation: which side
  of a border a distance falls on is decided by the last bit.
  """
  half = config.buckets // 2
  exact = half // 2
  offset = np.arange(length)[None] - np.arange(length)[:, None]  # key - query
  distance = np.abs(offset)
  f32 = np.float32
  ratio = np.log(np.maximum(distance, 1).astype(f32) / f32(exact))
  ratio = ratio / f32(np.log(config.max_distance / exact)) * f32(half - exact)
  far = np.minimum(exact + ratio.astype(np.int32), half - 1)
  return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)


class UMT5Encoder(nnx.Module):
  """Token ids to features.

  Matmuls in `umt5.dtype` with float32 results; the residual stream, norms, biases and softmax are
  float32.
  """

  def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
    c = config.umt5
    self.config = config
    self.embed = Embedding(c.vocab, config.width, std=1.0, rngs=rngs)
    self.blocks = stack_blocks(lambda rngs: UMT5Block(config, rngs=rngs), c.layers, rngs)
    self.norm = RMSNorm(config.width, c.eps)

  def __call__(self, ids: Int[Array, 'B X'], mask: Bool[Array, 'B X']) -> Float[Array, 'B X E']:
    """float32 [B, X, E]; nothing attends to tokens where `mask` is False, and their own rows mean
    nothing.
    """
    return self.layers(ids, mask)[0]

  def layers(self, ids, mask):
    """(features [B, X, E], the residual stream after every layer [L, B, X, E])."""
    x = constrain(self.embed(ids).astype(jnp.float32), 'batch', 'text', None)
    buckets = relative_buckets(self.config.umt5, ids.shape[1])
    x, each = scan_blocks(self.blocks, lambda block, x: block(x, buckets, mask), x, 'none')
    return self.norm(x), each


class UMT5Block(nnx.Module):
  """x + attention(norm x), then x + gated FFN(norm x); nowhere a bias vector."""

  def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
    c, width = config.umt5, config.width
    inner, dtype = c.heads * c.head_dim, jnp.dtype(c.dtype)
    self.heads = c.heads
    self.attn_norm = RMSNorm(width, c.eps)
    # Logits are not divided by sqrt(head_dim): the queries' initialisation stands in for it.
    self.q = _Linear(width, inner, dtype=dtype, rngs=rngs, scale=c.head_dim**-0.5)
    self.k = _Linear(width, inner, dtype=dtype, rngs=rngs)
    self.v = _Linear(width, inner, dtype=dtype, rngs=rngs)
    self.o = _Linear(inner, width, dtype=dtype, rngs=rngs)
    self.rel_bias = Embedding(c.buckets, c.heads, std=width**-0.5, rngs=rngs)
    self.ffn_norm = RMSNorm(width, c.eps)
    self.gate = _Linear(width, c.ffn, dtype=dtype, rngs=rngs)
    self.up = _Linear(width, c.ffn, dtype=dtype, rngs=rngs)
    self.down = _Linear(c.ffn, width, dtype=dtype, rngs=rngs)

  def __call__(self, x, buckets, mask):
    """x [B, X, E] float32, buckets [X, X], mask [B, X]."""
    x = constrain(x + self.attend(self.attn_norm(x), buckets, mask), 'batch', 'text', None)
    h = self.ffn_norm(x)
    h = jax.nn.gelu(self.gate(h), approximate=True) * self.up(h)
    return constrain(x + self.down(h), 'batch', 'text', None)

  def position_bias(self, buckets):
    """[1, heads, X, X] float32 for the logits of (query, key)."""
    return self.rel_bias.embedding[...].astype(jnp.float32).T[:, buckets][None]

  def attend(self, h, buckets, mask):
    """Self-attention of h [B, X, E] (normalised) with unscaled logits."""
    q, k, v = (f(h).reshape(*h.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
    # The op divides logits by sqrt(hd). Undone here in float32, before q is rounded to the dtype of
    # the matmuls, it costs no bit of q.
    q = q * q.shape[-1] ** 0.5
    q, k, v = (x.astype(self.q.dtype) for x in (q, k, v))
    out = dot_product_attention(
      q, k, v, mask=mask[:, None, None, :], bias=self.position_bias(buckets)
    )
    return self.o(out.reshape(*h.shape[:2], -1))


class _Linear(nnx.Module):
  """y = x W with operands in `dtype`, float32 out."""

  def __init__(self, d_in: int, d_out: int, *, dtype, rngs: nnx.Rngs, scale: float = 1.0):
    std = scale / d_in**0.5
    self.kernel = nnx.Param(
      std * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, (d_in, d_out))
    )
    self.dtype = dtype

  def __call__(self, x):
    kernel = self.kernel[...].astype(self.dtype)
    return jnp.matmul(x.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
