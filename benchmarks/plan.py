"""The plan of a million events: balance, packing, exactness, cost, memory and time to first batch.

wallwm bench plan
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import tempfile
import time

import harness
import numpy as np
import pyarrow as pa

from wallwm_jax.config import DataConfig, ExperimentConfig, ModelConfig, TextConfig
from wallwm_jax.data import balance, index, manifest, pipeline, sampler, stats
from wallwm_jax.data.build import build_store
from wallwm_jax.data.packing import PackedPlan
from wallwm_jax.data.schema import EpisodeRecord, EventSpan
from wallwm_jax.data.store import EventStore

CONFIG = ExperimentConfig(
  model=ModelConfig(
    views=('front',), image_size=(16, 16), max_future=64, text=TextConfig(tokens=1, width=1)
  ),
  data=DataConfig(batch_size=32, buckets=(4, 16, 64), threads=0),
)
BLOCKS = 4  # 262144 draws


def latent_frames(count: int) -> np.ndarray:
  """Latent frames 1 + n of events of lognormal length, 3..65 with a mean of 27."""
  drawn = np.random.default_rng(0).lognormal(3.1, 0.72, count)
  return np.clip(np.round(drawn), 3, 65).astype(int)


def clusters(count: int) -> tuple[np.ndarray, np.ndarray]:
  """Two dependent Zipf labels of each event: observation 0..511, action 0..63."""
  rng = np.random.default_rng(0)
  share = [1 / np.arange(1, k + 1) for k in (512, 64)]
  vl, act = (rng.choice(len(p), count, p=p / p.sum()) for p in share)
  return vl, np.where(rng.random(count) < 0.5, (7 * vl + act % 8) % 64, act)


def cpu(call) -> tuple[float, object]:
  """CPU-seconds and result of a call."""
  start = time.process_time()
  result = call()
  return time.process_time() - start, result


def rss() -> int:
  """Bytes of memory this process holds now."""
  gc.collect()
  pa.default_memory_pool().release_unused()
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE')


def measure_balance(count: int) -> dict:
  """How far 262144 draws are from their shares, for natural and for two-way balanced clusters."""
  vl, act = clusters(count)
  found = {}
  weighted = {
    'natural': np.ones(count),
    'balanced': balance.two_way(vl, act, 0.4, 16.0),
  }
  for name, weights in weighted.items():
    cells, mass = sampler.cell_mass(weights, balance.cells(vl, act))
    share = mass / mass.sum()
    setup, plan = cpu(lambda c=cells, m=mass: sampler.EventPlan(c, m, 0))
    seconds, blocks = cpu(lambda p=plan: [p.block(i) for i in range(BLOCKS)])
    events = np.concatenate(blocks)
    n = len(events)
    drawn = np.bincount(cells[events], minlength=len(mass))
    fraction = share * n % 1
    margins = {
      side: 0.5
      * np.abs(np.bincount(of[events]) / n - np.bincount(of, weights / weights.sum())).sum()
      for side, of in (('vl', vl), ('act', act))
    }
    random = np.random.default_rng(1).multinomial(n, share)
    found[name] = {
      'cells': len(mass),
      'largest_error_draws': float(np.abs(drawn - share * n).max()),
      'tv_vl': float(margins['vl']),
      'tv_act': float(margins['act']),
      'tv_cells': float(0.5 * np.abs(drawn / n - share).sum()),
      'tv_cells_best_integers': float(0.5 * np.minimum(fraction, 1 - fraction).sum() / n),
      'tv_cells_independent_draws': float(0.5 * np.abs(random / n - share).sum()),
      'setup_cpu_s': setup,
      'us_per_draw': 1e6 * seconds / n,
    }
  return found


def measure_packing(count: int) -> dict:
  """Fill of packed rows and the cost of planning them."""
  costs = latent_frames(count)
  cells, mass = sampler.cell_mass(*sampler.label_weights(balance.cells(*clusters(count)), 0.5))
  found = {}
  for budget in (130, 260):
    runs = []
    for repeat in range(3):
      plan = PackedPlan(sampler.EventPlan(cells, mass, repeat), costs, budget, 0)
      seconds, blocks = cpu(lambda p=plan: [p.block(i) for i in range(BLOCKS)])
      events = np.concatenate([block.events for block in blocks])
      rows = sum(len(block.ends) for block in blocks)
      runs.append((1e6 * seconds / len(events), costs[events].sum() / (rows * budget)))
    found[str(budget)] = {
      'fill': min(fill for _, fill in runs),
      'unpacked_fill': float(costs[events].mean() / 65),
      'us_per_event_with_draw': float(np.median([cost for cost, _ in runs])),
    }
  return found


def make_store(path: pathlib.Path, count: int) -> EventStore:
  """A store of few episodes whose index names `count` events of them."""
  frames, episodes = 300, 16
  rng = np.random.default_rng(0)
  pose = np.tile(np.float32([0, 0, 0, 1, 0, 0, 0, 1, 0, 0]), (frames, 1))
  build_store(
    [
      EpisodeRecord(
        episode_id=str(i),
        source='synthetic',
        fps=10.0,
        views=('front',),
        frames={'front': np.full((frames, 16, 16, 3), i, np.uint8)},
        state=pose,
        actions=pose,
        events=(EventSpan(0, frames, 'all'),),
      )
      for i in range(episodes)
    ],
    path,
    heldout=0,
    progress=False,
  )
  length = 1 + 4 * (latent_frames(count) - 1) - rng.integers(0, 4, count)
  start = rng.integers(0, frames - length + 1)
  vl, _ = clusters(count)
  columns = {
    'uid': np.arange(count, dtype=np.uint64),
    'episode': np.sort(rng.integers(0, episodes, count)),
    'start': start,
    'end': start + length,
    'length': length,
    'label': np.array([f'label {i}' for i in range(512)], object)[vl],
    'L1': np.array([f'pick up the object number {i}' for i in range(512)], object)[vl],
    'split': ['train'] * count,
    'flags': [[]] * count,
  }
  empty = [''] * count
  arrays = [pa.array(columns.get(f.name, empty), f.type) for f in index.EVENT_SCHEMA]
  stored, _ = index.read(path, 0)
  own = pa.array(np.bincount(columns['episode'], minlength=episodes).astype(np.int32))
  stored = stored.set_column(stored.column_names.index('events'), 'events', own)
  index.save(path, 0, stored, pa.Table.from_arrays(arrays, schema=index.EVENT_SCHEMA))
  content = manifest.read_manifest(path)
  content['counts'] |= {'events': count, 'events_read': count}
  for entry in content['files']:
    if entry['path'] in (index.EVENTS, index.EPISODES):
      rows = count if entry['path'] == index.EVENTS else episodes
      entry.update(manifest.describe(path, entry['path'], rows))
  manifest.write_manifest(
    path, {k: v for k, v in content.items() if k not in ('format', 'version', 'digest')}
  )
  return EventStore(path)


def configured(pack: int, **data) -> ExperimentConfig:
  return dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, pack=pack, **data))


def open_plan(config: ExperimentConfig, store: EventStore, host: int = 0, hosts: int = 1):
  """Batches of event numbers [rows, 44], -1 behind the last, in the place of windows."""
  make = pipeline.PackedSource if config.data.pack else pipeline.PlanSource
  source = make(store, config, hosts)

  def read(element):
    events = [draw.event for draw in element] if config.data.pack else [element.event]
    return np.array(events + [-1] * (44 - len(events)))

  plan = pipeline.fingerprint(config, store, source)
  return source, pipeline.open_stream(config, source, read, plan, host, hosts)


def measure_start(path: pathlib.Path, pack: int) -> dict:
  """Of a fresh process: seconds to the first batch of pixels, memory of store and plan."""
  config, base = configured(pack, batch_size=8), rss()
  start, busy = time.perf_counter(), time.process_time()
  store = EventStore(path)
  opened = rss()
  batches = pipeline.make_dataset(config, store, stats.identity(config), stats.no_text)
  next(batches)
  found = {'first_batch_s': time.perf_counter() - start,
           'first_batch_cpu_s': time.process_time() - busy}
  batches.close()
  del batches
  found |= {'store_mb': (opened - base) / 1e6}
  before = rss()
  _, stream = open_plan(config, store)
  next(stream)
  found['plan_mb'] = (rss() - before) / 1e6
  return found


def measure_stream(path: pathlib.Path, pack: int) -> dict:
  """Of a fresh process: what 10000 batches of the plan cost, and what memory they leave behind."""
  config = configured(pack, batch_size=8)
  _, stream = open_plan(config, EventStore(path))
  for _ in range(2500):  # beyond a first block: growth, not the filling of caches
    next(stream)
  before = rss()
  batches = itertools.islice(stream, 10_000)
  seconds, _ = cpu(lambda: collections.deque(batches, maxlen=0))
  return {
    'growth_10k_batches_mb': (rss() - before) / 1e6,
    'us_per_row_through_grain': 1e6 * seconds / (10_000 * config.data.batch_size),
    'state_bytes': len(json.dumps({'position': stream.get_state()['position']})),
  }


def in_fresh_process(function, *args):
  with multiprocessing.get_context('spawn').Pool(1) as pool:
    return pool.apply(function, args)


def write_until_killed(path: pathlib.Path, steps: int, log: pathlib.Path, state: pathlib.Path):
  """Appends every batch to `log`; every 50 steps the state is saved as a checkpoint would be."""
  config = configured(130)
  _, stream = open_plan(config, EventStore(path))
  if state.exists():
    saved = json.loads(state.read_text())
    stream.set_state(saved)
    with open(log, 'r+b') as file:  # what came after the checkpoint is forgotten
      file.truncate(saved['position'][0] // 32 * 32 * 44 * 8)
  with open(log, 'ab', buffering=0) as file:
    for step in range(stream.get_state()['position'][0] // 32, steps):
      if step % 50 == 0:
        state.with_suffix('.new').write_text(json.dumps(stream.get_state()))
        os.replace(state.with_suffix('.new'), state)
      file.write(next(stream).tobytes())


def measure_exactness(path: pathlib.Path, folder: pathlib.Path) -> dict:
  """Over the rows of a million draws: identical streams however many hosts and cuts, and every
  planned draw served once in spite of a killed process."""
  store, config = EventStore(path), configured(130)
  source, stream = open_plan(config, store)
  blocks = 16  # of 65536 draws
  rows = next(r for r in itertools.count(0, 1000) if source.landmark(r)[0] >= blocks)
  steps = -(-source.landmark(rows)[1] // 32)
  want = [hashlib.sha256(next(stream).tobytes()).digest() for _ in range(steps)]
  rng, got, state = np.random.default_rng(0), [], None
  cuts = [0, *np.sort(rng.choice(np.arange(1, steps), 20, replace=False)).tolist(), steps]
  for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
    hosts = (1, 2, 4, 8)[number % 4]
    streams = [open_plan(config, store, host, hosts)[1] for host in range(hosts)]
    for one in streams if state else ():
      one.set_state(state)
    for _ in range(stop - start):
      batch = np.concatenate([next(one) for one in streams])
      got.append(hashlib.sha256(batch.tobytes()).digest())
    state = streams[-1].get_state()
  log, saved, kills = folder / 'log', folder / 'state', 3
  context = multiprocessing.get_context('spawn')
  for kill in range(kills + 1):
    child = context.Process(target=write_until_killed, args=(path, steps, log, saved))
    child.start()
    while kill < kills and child.is_alive():
      written = log.stat().st_size // (32 * 44 * 8) if log.exists() else 0
      if written >= steps * (kill + 1) // (kills + 1):
        os.kill(child.pid, signal.SIGKILL)
      time.sleep(0.02)
    child.join()
  served = np.fromfile(log, np.int64).reshape(-1, 44)
  whole = served[: source.landmark(rows)[1]]
  counts = np.bincount(whole[whole >= 0], minlength=len(store.events))
  planned = np.bincount(
    np.concatenate([source._rows._plan.block(b) for b in range(blocks)]), minlength=len(counts)
  )
  return {
    'draws': int(planned.sum()),
    'steps': steps,
    'cuts': 20,
    'stream_identical': got == want,
    'kills': kills,
    'lost': int(np.maximum(planned - counts, 0).sum()),
    'duplicated': int(np.maximum(counts - planned, 0).sum()),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--events', type=int, default=1_000_000)
  parser.add_argument('--json')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    make_store(folder / 'store', args.events)
    harness.report(
      'Plan: 512 x 64 Zipf clusters, lognormal event lengths',
      'see figures',
      args.events,
      path=args.json,
      balance=measure_balance(args.events),
      packing=measure_packing(args.events),
      **{
        name: in_fresh_process(measure_start, folder / 'store', pack)
        | in_fresh_process(measure_stream, folder / 'store', pack)
        for name, pack in (('unpacked', 0), ('packed', 130))
      },
      exactness=measure_exactness(folder / 'store', folder),
    )


if __name__ == '__main__':
  main()
