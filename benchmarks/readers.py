"""What the raw-data readers cost: CPU-seconds of an import, frames per CPU-second.

wallwm bench readers -- --source ../shared/data
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import subprocess
import sys
import time

import harness

from wallwm_jax.data.readers.lerobot import LeRobotReader
from wallwm_jax.data.readers.rlds import RldsReader

MODULES = ('lerobot', 'rlds', 'video', 'probe')
SAMPLES = {
  'lerobot_v30_metaworld': LeRobotReader,
  'lerobot_v21_metaworld': LeRobotReader,
  'bridge_rlds': RldsReader,
}


def import_seconds(module: str) -> float:
  """CPU-seconds of one import in a fresh process."""
  code = (
    'import time; start = time.process_time(); '
    f'import wallwm_jax.data.readers.{module}; print(time.process_time() - start)'
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  return float(run.stdout)


def frames_per_second(reader) -> float:
  """Frames of all cameras per CPU-second, decoding to RGB included."""
  start = time.process_time()
  frames = sum(record.num_frames * len(record.views) for record in reader)
  return frames / (time.process_time() - start)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', type=pathlib.Path, required=True, help='folder of the samples')
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  imports = {m: [] for m in MODULES}
  speeds = {name: [] for name in SAMPLES}
  for _ in range(args.rounds):
    for module, seconds in imports.items():
      seconds.append(import_seconds(module))
    for name, rates in speeds.items():
      rates.append(frames_per_second(SAMPLES[name](args.source / name)))
  medians = {module: statistics.median(seconds) for module, seconds in imports.items()}
  harness.report(
    'import of the slowest raw-data reader, fresh process',
    'CPU-s',
    args.rounds,
    value=max(medians.values()),
    imports=medians,
    frames_per_cpu_s={name: statistics.median(rates) for name, rates in speeds.items()},
  )


if __name__ == '__main__':
  main()
