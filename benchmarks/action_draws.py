"""Cost of K = 6 action noise draws over one anchored video forward, as a multiple of one draw
(stage 2 step).

wallwm bench action_draws
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

import harness
import jax
import jax.numpy as jnp

from wallwm_jax import presets
from wallwm_jax.models import functional
from wallwm_jax.training.stages import split_trainable, stage_loss
from wallwm_jax.types import NormStats


def make_step(draws: int, batch_size: int):
  """A compiled stage-2 loss and gradient with `draws` action draws, as a call without arguments."""
  base = presets.stage(presets.tabletop(), '2', steps=1)
  config = dataclasses.replace(
    base,
    diffusion=dataclasses.replace(base.diffusion, action_draws=draws),
    data=dataclasses.replace(base.data, batch_size=batch_size),
  )
  a, c = config.model.action_spec.dim, config.model.codec.channels
  norm = NormStats(*(f((n,)) for n in (a, a, c) for f in (jnp.zeros, jnp.ones)))
  params = jax.jit(functional.init_params, static_argnums=0)(config.model, jax.random.key(0))
  trainable, frozen = split_trainable(params, '2')
  batch = jax.device_put(config.fake_batch())
  step = jax.jit(
    jax.value_and_grad(lambda p, key: stage_loss(frozen | p, batch, norm, key, config=config)[0])
  )
  return lambda: step(trainable, jax.random.key(1))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--batch', type=int, default=32)
  args = parser.parse_args()
  times = harness.time_side_by_side(
    {'six': make_step(6, args.batch), 'one': make_step(1, args.batch)}, rounds=args.rounds
  )
  harness.report(
    'stage-2 step with 6 action draws over one video forward / with 1 draw',
    'ratio',
    args.rounds,
    **harness.ratio(times, 'six', 'one'),
    goal='<= 2',
    median_s={name: statistics.median(t) for name, t in times.items()},
  )


if __name__ == '__main__':
  main()
