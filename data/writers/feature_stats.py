"""Statistics of a LeRobot data set: {feature: {min, max, mean, std, count, q01, .., q99}}.

Everything is exact over the values counted: quantiles are of the values themselves (numbers) or of
their 256-bin histogram (pixels), per episode and over the whole data set.
"""

from __future__ import annotations

import numpy as np

QUANTILES = {'q01': 0.01, 'q10': 0.1, 'q50': 0.5, 'q90': 0.9, 'q99': 0.99}
Stats = dict[str, list]


class FeatureStats:
  """Collects the episodes of one data set; keeps its numbers (not its pixels) in memory."""

  def __init__(self):
    self._numbers: dict[str, list[np.ndarray]] = {}
    self._pixels: dict[str, tuple[np.ndarray, int]] = {}

  def add_numbers(self, name: str, values: np.ndarray) -> Stats:
    """Adds [T, C] of an episode; returns the episode's statistics."""
    self._numbers.setdefault(name, []).append(values)
    return _of_numbers(values)

  def add_frames(self, name: str, frames: np.ndarray) -> Stats:
    """Adds uint8 [T, H, W, 3] of an episode, some frames of it; returns its statistics."""
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), max(100, int(len(frames) ** 0.75))))
    chosen = np.round(chosen).astype(int)
    counts = np.stack(
      [np.bincount(frames[chosen, ..., c].ravel(), minlength=256) for c in range(3)]
    )
    total, number = self._pixels.get(name, (0, 0))
    self._pixels[name] = total + counts, number + len(chosen)
    return _of_histogram(counts, len(chosen))

  def total(self) -> dict[str, Stats]:
    """Statistics of the whole data set."""
    numbers = {name: _of_numbers(np.concatenate(x)) for name, x in self._numbers.items()}
    return numbers | {name: _of_histogram(*x) for name, x in self._pixels.items()}


def _of_numbers(x: np.ndarray) -> Stats:
  x = x.reshape(len(x), -1).astype(np.float64)
  quantiles = np.quantile(x, list(QUANTILES.values()), axis=0)
  result = {'min': x.min(0), 'max': x.max(0), 'mean': x.mean(0), 'std': x.std(0)}
  result |= dict(zip(QUANTILES, quantiles))
  return {key: value.tolist() for key, value in result.items()} | {'count': [len(x)]}


def _of_histogram(counts: np.ndarray, number: int) -> Stats:
  """counts: [3, 256] per channel; values of shape [3, 1, 1] in 0..1, count in frames."""
  values = np.arange(256) / 255
  share = counts / counts.sum(-1, keepdims=True)
  mean = share @ values
  below = np.cumsum(share, -1)
  result = {
    'min': values[(counts > 0).argmax(-1)],
    'max': values[255 - (counts[:, ::-1] > 0).argmax(-1)],
    'mean': mean,
    'std': np.sqrt((share * (values - mean[:, None]) ** 2).sum(-1)),
  }
  # Sums of shares stop short of 1 by rounding.
  result |= {q: values[(below >= p - 1e-9).argmax(-1)] for q, p in QUANTILES.items()}
  return {key: x.reshape(3, 1, 1).tolist() for key, x in result.items()} | {'count': [number]}
