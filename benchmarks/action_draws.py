"""Cost of K = 6 action noise draws over one anchored video forward, as a multiple of one draw
(stage 2, whole step).

wallwm bench action_draws
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

import harness

from wallwm_jax import presets


def make_step(draws: int, batch_size: int):
  """A whole stage-2 optimizer step with `draws` action draws, as a call without arguments."""
  base = presets.stage(presets.tabletop(), '2', steps=1000)
  config = dataclasses.replace(
    base,
    diffusion=dataclasses.replace(base.diffusion, action_draws=draws),
    data=dataclasses.replace(base.data, batch_size=batch_size),
  )
  return harness.train_step(config)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--batch', type=int, default=32)
  args = parser.parse_args()
  times = harness.time_side_by_side(
    {'six': make_step(6, args.batch), 'one': make_step(1, args.batch)}, rounds=args.rounds
  )
  harness.report(
    'stage-2 training step with 6 action draws over one video forward / with 1 draw',
    'ratio',
    args.rounds,
    **harness.ratio(times, 'six', 'one'),
    goal='<= 2',
    median_s={name: statistics.median(t) for name, t in times.items()},
  )


if __name__ == '__main__':
  main()
