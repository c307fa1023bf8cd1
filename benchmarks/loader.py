"""Training windows per CPU-second that the Grain pipeline delivers from an event store.

wallwm bench loader -- --store runs/quickstart/store
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import harness
import numpy as np

from wallwm_jax import presets
from wallwm_jax.data import pipeline, stats
from wallwm_jax.data.store import EventStore
from wallwm_jax.text.factory import make_text_encoder


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--store', required=True)
  parser.add_argument('--batches', type=int, default=40)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  config = presets.tabletop()
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, threads=0))
  store = EventStore(args.store)
  norm = stats.compute(store, config, max_windows=64)
  encode = make_text_encoder(config.model.text).encode
  batches = pipeline.make_dataset(config, store, norm, encode)
  next(batches)
  cpu, wall = [], []
  for _ in range(args.rounds):
    start = time.process_time(), time.perf_counter()
    for _ in range(args.batches):
      next(batches)
    cpu.append(time.process_time() - start[0])
    wall.append(time.perf_counter() - start[1])
  count = args.batches * config.data.batch_size
  harness.report(
    'Grain pipeline, tabletop event windows (3 views of 48x48, up to 17 frames)',
    'windows/CPU-s',
    args.rounds,
    value=count / statistics.median(cpu),
    range=[count / max(cpu), count / min(cpu)],
    windows_per_wall_s=float(count / np.median(wall)),
  )


if __name__ == '__main__':
  main()
