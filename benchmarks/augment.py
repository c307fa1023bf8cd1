"""CPU-milliseconds per window of the jitter that training applies to images.

wallwm bench augment
"""

from __future__ import annotations

import argparse
import statistics
import time

import harness
import numpy as np

from wallwm_jax.data import augment, images

WINDOWS = {'3x17x48x48': (3, 17, 48, 48), '3x65x192x224': (3, 65, 192, 224)}
CROP = augment.AugmentSettings(crop=0.1)
COLOUR = augment.AugmentSettings(photometric=0.5)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=20)
  args = parser.parse_args()
  figures = {name: _window(shape, args.rounds) for name, shape in WINDOWS.items()}
  harness.report(
    'jitter of one window (views x frames x H x W), mean over draws, a quarter of them blurred',
    'CPU-ms',
    args.rounds,
    **figures,
  )


def _window(shape: tuple[int, ...], rounds: int) -> dict[str, float]:
  """Median over rounds; every round draws anew. `resize` is what a window costs without jitter if
  its images are recorded a quarter larger, `resize_crop` the same with a crop."""
  size = shape[2:]
  frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  larger = tuple(round(1.25 * n) for n in size)
  recorded = np.random.default_rng(1).integers(0, 256, (*shape[:2], *larger, 3), np.uint8)
  step = iter(range(10**9))

  def crop(x):
    k = next(step)
    return [
      images.letterbox(v, size, augment.draw(CROP, 0, 1, k, i).box(v.shape[1:3]))
      for i, v in enumerate(x)
    ]

  def colour(x):
    k = next(step)
    return [augment.recolour(v, augment.draw(COLOUR, 0, 1, k, i)) for i, v in enumerate(x)]

  times = harness.time_side_by_side(
    {
      'resize': lambda: [images.letterbox(v, size) for v in recorded],
      'resize_crop': lambda: crop(recorded),
      'crop': lambda: crop(frames),
      'photometric': lambda: colour(frames),
    },
    rounds=rounds,
    clock=time.process_time,
  )
  return {
    name: round(1e3 * (statistics.mean if name == 'photometric' else statistics.median)(t), 2)
    for name, t in times.items()
  }


if __name__ == '__main__':
  main()
