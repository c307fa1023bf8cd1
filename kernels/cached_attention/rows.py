"""How queries become rows: all that read the same cached head lie under each other, so that keys
and values are read once and never repeated.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rows:
  """batch: caches Bk. draws: queries [steps] that share one cache. heads: cached heads, each read
  by `group` query heads of width `dim`. Rows are ordered (draw, step, member of the group).
  """

  batch: int
  draws: int
  steps: int
  heads: int
  group: int
  dim: int

  @classmethod
  def of(cls, q, k) -> Rows:
    """Of queries [B, S, Hq, D] and keys [..., Bk, N, Hkv * D]."""
    b, steps, query_heads, dim = q.shape
    heads = k.shape[-1] // dim
    return cls(k.shape[-3], b // k.shape[-3], steps, heads, query_heads // heads, dim)

  @property
  def count(self) -> int:
    """Rows R of one cached head."""
    return self.draws * self.steps * self.group

  def fold(self, q: jax.Array) -> jax.Array:
    """[B, S, Hq, D] as [Bk, R, Hkv * D]."""
    q = q.reshape(self.batch, self.draws * self.steps, self.heads, self.group, self.dim)
    return q.swapaxes(2, 3).reshape(self.batch, self.count, self.heads * self.dim)

  def unfold(self, out: jax.Array) -> jax.Array:
    """The inverse of `fold`."""
    out = out.reshape(self.batch, self.draws * self.steps, self.group, self.heads, self.dim)
    shape = (self.batch * self.draws, self.steps, self.heads * self.group, self.dim)
    return out.swapaxes(2, 3).reshape(shape)

  def visible(self) -> np.ndarray:
    """bool [R, draws * steps]: which new tokens a row sees, those of its draw up to its step."""
    own = np.repeat(np.arange(self.draws * self.steps), self.group)[:, None]
    new = np.arange(self.draws * self.steps)
    return (new // self.steps == own // self.steps) & (new <= own)
