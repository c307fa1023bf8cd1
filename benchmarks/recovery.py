"""Success of the tabletop's scripted expert from perturbed starts, by event and radius of the ball.

wallwm bench recovery -- --episodes 140
"""

from __future__ import annotations

import argparse
import collections

import harness
import jax
import numpy as np

from wallwm_jax.envs.tabletop import EVENT_KINDS, TabletopConfig
from wallwm_jax.envs.tabletop.collect import _Collector


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--episodes', type=int, default=140)
  parser.add_argument('--batch', type=int, default=35)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--radii', type=float, nargs='+', default=[0.03])
  args = parser.parse_args()
  figures = {f'{radius:g} m': _success(args, radius) for radius in args.radii}
  harness.report('expert success from recovery starts', 'fraction', args.episodes, **figures)


def _success(args, radius: float) -> dict[str, float]:
  config = TabletopConfig(image_size=(8, 8), recovery_radius=radius)
  collector = _Collector(args.seed, args.batch, 'mixed', config, recovery=1.0)
  numbers = np.arange(args.episodes, dtype=np.int32)
  kinds = collections.Counter()
  succeeded = collections.Counter()
  ended = {}
  while len(ended) < args.episodes:
    ended.update(dict(collector.advance()))
    collector.refill(args.episodes)
  starts, _ = collector.programs[0](args.seed, numbers, *collector.mixture)
  for number, kind in zip(numbers.tolist(), jax.device_get(starts.task.kind).tolist()):
    kinds[EVENT_KINDS[kind]] += 1
    succeeded[EVENT_KINDS[kind]] += ended[number] is not None
  again = [record for record in ended.values() if record is not None]
  retries = np.mean([any('failed' in e.flags for e in record.events) for record in again])
  return {
    'value': sum(succeeded.values()) / args.episodes,
    'with_a_retry': float(retries),
    **{kind: succeeded[kind] / count for kind, count in sorted(kinds.items())},
  }


if __name__ == '__main__':
  main()
