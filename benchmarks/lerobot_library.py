"""Events through the Grain pipeline beside the same events through the LeRobot library, frames per
CPU-second, in one run.

The library lives in an environment of its own (it needs torch), whose Python is named:
wallwm bench lerobot_library -- --video ../shared/data/droid_three_view --python lr/bin/python

Both read windows of 129 frames of three cameras, decoded to RGB on one thread: the library from its
v3.0 files with delta_timestamps and the pyav backend, the pipeline from an event store of h264
clips of the same film.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile

import harness
import numpy as np
from loader import EVENT, SHAPE, SIZES, experiment, slope, stream

from wallwm_jax.data.build import build_store
from wallwm_jax.data.readers.video import VideoReader
from wallwm_jax.data.schema import EpisodeRecord, EventSpan
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.writers.lerobot import write_lerobot

PEER = """
import json, os, sys, time
os.environ['HF_HUB_OFFLINE'] = '1'
import torch
torch.set_num_threads(1)
import importlib.metadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
root, fps, count, rounds, starts = json.loads(sys.argv[1])
views = [f for f in json.load(open(root + '/meta/info.json'))['features'] if 'images' in f]
data = LeRobotDataset('local/film', root=root, video_backend='pyav', tolerance_s=1e-3,
  delta_timestamps={view: [i / fps for i in range(count)] for view in views})
def run(n):
  begun = time.process_time()
  for i in range(n):
    item = data[starts[i % len(starts)]]
    assert item[views[0]].shape[0] == count, item[views[0]].shape
  return time.process_time() - begun
run(1)
best = lambda n: min(run(n) for _ in range(rounds))
cost = (best(3) - best(1)) / 2
print(json.dumps({'cost': cost, 'version': importlib.metadata.version('lerobot')}))
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--video', required=True, help='folder of synchronised camera videos')
  parser.add_argument('--python', required=True, help='command of a Python that has lerobot')
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  figures: dict = {}
  with tempfile.TemporaryDirectory() as folder:
    for name, size in SIZES.items():
      (film,) = VideoReader(args.video, size, event_frames=EVENT)
      root = pathlib.Path(folder) / name
      figures[name] = compare(_with_robot(film), root, shlex.split(args.python), args.rounds)
  harness.report(
    'Grain pipeline beside the LeRobot library, 3 views, events of 129 frames (real video)',
    'frames/CPU-s',
    args.rounds,
    value=figures['64x64']['pipeline / library'],
    **figures,
    goal='4 times the library',
  )


def compare(film: EpisodeRecord, root: pathlib.Path, python: list[str], rounds: int) -> dict:
  starts = list(range(7, film.num_frames - EVENT, EVENT - 1))
  spans = tuple(EventSpan(s, s + EVENT, 'unlabelled') for s in starts)
  film = dataclasses.replace(film, events=spans, pixel_mask={})
  write_lerobot([film], root / 'lerobot')
  build_store([film], root / 'store', codec='h264', heldout=0, progress=False)
  size = film.frames[film.views[0]].shape[1:3]
  batches = stream(EventStore(root / 'store'), experiment(film.views, size))
  ours = slope(lambda: next(batches), rounds) / SHAPE['batch_size']
  batches.close()
  question = json.dumps([str(root / 'lerobot'), film.fps, EVENT, rounds, starts])
  done = subprocess.run([*python, '-c', PEER, question], capture_output=True, text=True)
  if done.returncode:
    sys.exit(f'{shlex.join(python)}: {done.stderr}')
  theirs = json.loads(done.stdout.splitlines()[-1])
  frames = EVENT * len(film.views)
  return {
    'pipeline': round(frames / ours),
    'library': round(frames / theirs['cost']),
    'pipeline / library': theirs['cost'] / ours,
    'lerobot': theirs['version'],
  }


def _with_robot(film: EpisodeRecord) -> EpisodeRecord:
  """LeRobot's data sets have a state and actions: a robot that rests."""
  rest = np.tile(np.float32([0, 0, 0, 1, 0, 0, 0, 1, 0, 1]), (film.num_frames, 1))
  return dataclasses.replace(film, state=rest, actions=rest)


if __name__ == '__main__':
  main()
