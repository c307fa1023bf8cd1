"""Text features of the captions of a store, kept small: long encoders pad mostly with zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from wallwm_jax.types import Text

EncodeText = Callable[[Sequence[str]], Text]

_CHUNK = 64  # captions encoded at once, so that padded features never lie in memory all together


class CaptionTable:
  """`table[i]` is the Text of caption i, features [X, E] and mask [X]; encoded once, here.

  Args:
    encode: captions -> Text [n, X, E]; captions: distinct ones, at least one.
  """

  def __init__(self, encode: EncodeText, captions: Sequence[str]):
    self._rows: list[np.ndarray] = []  # features up to the last row that is not zero
    masks = []
    for start in range(0, len(captions), _CHUNK):
      text = encode(captions[start : start + _CHUNK])
      self._rows += [_without_tail(np.asarray(x)) for x in text.features]
      masks.append(np.asarray(text.mask))
    self._masks = np.concatenate(masks)

  def __getitem__(self, index: int) -> Text:
    rows, mask = self._rows[index], self._masks[index]
    features = np.zeros((len(mask), rows.shape[1]), rows.dtype)
    features[: len(rows)] = rows
    return Text(features, mask)


def _without_tail(x: np.ndarray) -> np.ndarray:
  used = np.flatnonzero(x.any(-1))
  return x[: used[-1] + 1 if len(used) else 0].copy()
