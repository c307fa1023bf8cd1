"""The weight-free text encoder: every word a fixed random direction, so that captions condition a
model trained from scratch.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Sequence

import numpy as np

from wallwm_jax.config import TextConfig
from wallwm_jax.types import Text

_WORD = re.compile(r'[a-z0-9]+|[^\sa-z0-9]')


class HashTextEncoder:
  """Word-hash embeddings: one unit-variance Gaussian direction per word plus a sinusoidal position.

  Words past `tokens` are cut. Deterministic over machines and runs: the direction's seed is the
  word's CRC32.
  """

  def __init__(self, config: TextConfig):
    self._config = config
    self._positions = 0.3 * _sinusoids(config.tokens, config.width)

  def encode(self, captions: Sequence[str]) -> Text:
    """Text with features [B, X, E] float32 and mask [B, X] bool for B captions."""
    c = self._config
    features = np.zeros((len(captions), c.tokens, c.width), np.float32)
    mask = np.zeros((len(captions), c.tokens), bool)
    for row, caption in enumerate(captions):
      words = _WORD.findall(caption.lower())[: c.tokens]
      for i, word in enumerate(words):
        features[row, i] = _direction(word, c.width) + self._positions[i]
      mask[row, : len(words)] = True
    return Text(features=features, mask=mask)


@functools.lru_cache(maxsize=65_536)
def _direction(word: str, width: int) -> np.ndarray:
  rng = np.random.Generator(np.random.Philox(key=zlib.crc32(word.encode())))
  return rng.standard_normal(width).astype(np.float32)


def _sinusoids(length: int, width: int) -> np.ndarray:
  angle = np.arange(length)[:, None] / 10_000 ** (np.arange(width // 2)[None] / (width // 2))
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)
