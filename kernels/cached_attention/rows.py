"""How the queries of a call are laid out for the backends."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rows:
  """batch: caches Bk. draws: batch rows of [steps] queries that share one cache. heads: cached
  heads, each read by `group` query heads of width `dim`. Backends take queries and give results
  [Bk, T, Hq * D], T = draws * steps, heads in the order of the projections.
  """

  batch: int
  draws: int
  steps: int
  heads: int
  group: int
  dim: int

  @classmethod
  def of(cls, q: jax.Array, k: jax.Array) -> Rows:
    """Of queries [B, S, Hq, D] and keys [..., Bk, N, Hkv * D]."""
    b, steps, query_heads, dim = q.shape
    heads = k.shape[-1] // dim
    return cls(k.shape[-3], b // k.shape[-3], steps, heads, query_heads // heads, dim)

  @property
  def tokens(self) -> int:
    """T, queries of one head that share a cache."""
    return self.draws * self.steps

  @property
  def count(self) -> int:
    """Rows that read one cached head."""
    return self.group * self.tokens

  def visible(self) -> np.ndarray:
    """bool [T, T]: which new tokens a token sees, those of its draw up to itself."""
    own, new = np.arange(self.tokens)[:, None], np.arange(self.tokens)
    return (new // self.steps == own // self.steps) & (new <= own)
