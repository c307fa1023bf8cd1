"""Events per second of the training step: packed rows against one padded event per row, and against
rows padded to the nearest of a few lengths.

wallwm bench packed_step --budget 34
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import harness
import numpy as np

from wallwm_jax import presets
from wallwm_jax.config import ExperimentConfig, packed
from wallwm_jax.data.packing import pack
from wallwm_jax.data.sampler import assign_buckets


def lengths(count: int, longest: int) -> np.ndarray:
  """Future latents of events: lognormal with two fifths of the longest as its mean, as in robot
  data, cut at both ends."""
  drawn = np.random.default_rng(0).lognormal(np.log(0.33 * longest), 0.6, count)
  return np.clip(np.round(drawn), 1, longest).astype(int)


def make_config(stage: str, longest: int, rows: int, pack_to: int = 0) -> ExperimentConfig:
  base = presets.stage(presets.tabletop(), stage, steps=1000)
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, max_future=longest),
    data=dataclasses.replace(
      base.data, window='event', buckets=(longest,), batch_size=rows, pack=pack_to
    ),
  )


def packed_batch(config: ExperimentConfig, events: np.ndarray):
  """A random batch whose rows hold these events, best-fit decreasing."""
  rate, budget = config.model.steps_per_latent, config.data.pack
  row_of = pack(1 + events, budget)[0]
  rows = [events[row_of == row].tolist() for row in range(config.data.batch_size)]
  batch = config.fake_batch()
  fields = [packed.layout(row, budget, rate) for row in rows]
  fields = {name: np.stack([row[name] for row in fields]) for name in fields[0]}
  most = batch.event_mask.shape[1]
  counts = np.array([len(row) for row in rows])[:, None]
  latents = np.stack([np.pad(row, (0, most - len(row))) for row in rows]).astype(np.int32)
  real = fields['step_segment'] > 0
  return dataclasses.replace(
    batch,
    **fields,
    event_mask=np.arange(most) < counts,
    num_latents=latents,
    action_mask=np.broadcast_to(real[..., None], batch.action_mask.shape),
  )


def padded_batch(config: ExperimentConfig, events: np.ndarray):
  """A random batch of one event per row, its tail padded."""
  rate, batch = config.model.steps_per_latent, config.fake_batch()
  frames = (1 + rate * events).astype(np.int32)
  steps = np.arange(batch.actions.shape[1]) < rate * events[:, None]
  mask = np.broadcast_to(steps[..., None], batch.action_mask.shape)
  return dataclasses.replace(batch, num_frames=frames, raw_length=frames, action_mask=mask)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--stage', default='1', help='training stage (1)')
  parser.add_argument('--longest', type=int, default=16, help='future latents of the longest event')
  parser.add_argument('--budget', type=int, default=34, help='latent frames of a packed row')
  parser.add_argument('--events', type=int, default=24, help='events of a step')
  parser.add_argument('--rounds', type=int, default=7)
  args = parser.parse_args()
  events = lengths(args.events, args.longest)
  rows = pack(1 + events, args.budget)[1]
  dense = make_config(args.stage, args.longest, rows, args.budget)
  wide = make_config(args.stage, args.longest, len(events))
  calls = {
    'packed': harness.train_step(dense, packed_batch(dense, events)),
    'padded': harness.train_step(wide, padded_batch(wide, events)),
  }
  # Buckets of 1/4, 1/2 and the whole: each is a step of its own, so their times add up.
  rate, edges = wide.model.steps_per_latent, (args.longest // 4, args.longest // 2, args.longest)
  bucket = assign_buckets(1 + rate * events, edges, rate, 1)
  for i, edge in enumerate(edges):
    inside = events[bucket == i]
    if len(inside):
      config = make_config(args.stage, edge, len(inside))
      calls[f'bucket_{edge}'] = harness.train_step(config, padded_batch(config, inside))
  times = harness.time_side_by_side(calls, rounds=args.rounds, clock=time.process_time)
  named = [name for name in times if name.startswith('bucket')]
  times['bucketed'] = [sum(parts) for parts in zip(*(times[name] for name in named))]
  harness.report(
    f'stage-{args.stage} training step: events per CPU-second packed / one padded event per row',
    'ratio',
    args.rounds,
    **harness.ratio(times, 'padded', 'packed'),
    goal='>= 1.5',
    over_buckets=harness.ratio(times, 'bucketed', 'packed'),
    median_cpu_s={name: statistics.median(t) for name, t in times.items()},
    events=len(events),
    rows=rows,
    fill={
      'packed': float((1 + events).sum() / (rows * args.budget)),
      'padded': float((1 + events).sum() / (len(events) * (1 + args.longest))),
    },
  )


if __name__ == '__main__':
  main()
