"""What the Grain pipeline delivers from an event store: frames per CPU-second at two sizes, from
RGB or planes, zstd or h264, beside a plain reader of episode mp4s; latents; memory; a large index.

wallwm bench loader -- --video ../shared/data/droid_three_view

A figure is the slope between a short and a long run, so that start-up does not count. The plain
reader does what LeRobot's library does (one mp4 per camera, a key frame every second frame, seek,
rgb24); `lerobot_library.py` measures the library itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import fractions
import pathlib
import tempfile
import time

import av
import harness
import numpy as np
import psutil
import pyarrow as pa

from wallwm_jax import presets
from wallwm_jax.data import index, ledger, manifest, pipeline, records, stats
from wallwm_jax.data.build import build_store
from wallwm_jax.data.clips import make_codec
from wallwm_jax.data.encode import encode_store
from wallwm_jax.data.readers.video import VideoReader
from wallwm_jax.data.schema import EpisodeRecord, EventSpan
from wallwm_jax.data.shards import ShardWriter
from wallwm_jax.data.store import EventStore

SIZES = {'64x64': (64, 64), '192x224': (192, 224)}
EVENT = 129  # frames
SHAPE = {'batch_size': 4, 'threads': 0, 'buckets': (32,), 'balance': 0.0, 'split': 'train'}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--video', required=True, help='folder of synchronised camera videos')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--soak', type=int, default=10_000, help='batches of the memory run')
  parser.add_argument('--events', type=int, default=1_000_000, help='events of the large index')
  parser.add_argument('--out', help='file for the JSON line')
  args = parser.parse_args()
  figures: dict = {}
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    for name, size in SIZES.items():
      figures[name] = frames(root / name, args.video, size, args.rounds)
    small = EventStore(root / '64x64' / 'h264')
    figures['latents'] = latents(root, small, args.rounds)
    figures['memory'] = memory(root, small, args.soak)
    figures['large_index'] = large_index(root / 'large', args.events)
  harness.report(
    'Grain pipeline from an event store, 3 views, events of 129 frames (real video)',
    'frames/CPU-s',
    args.rounds,
    path=args.out,
    value=figures['64x64']['h264 planes'],
    **figures,
  )


def experiment(views, size, **data):
  """An experiment that reads windows of these cameras as they are stored."""
  config = presets.tabletop()
  codec = dataclasses.replace(config.model.codec, spatial=16, channels=48)  # latents as Wan 2.2's
  model = dataclasses.replace(
    config.model, views=tuple(views), image_size=size, max_future=32, codec=codec,
    video=dataclasses.replace(config.model.video, patch=(1, 2, 2)),
  )  # fmt: skip
  data = dataclasses.replace(config.data, **SHAPE | data)
  return dataclasses.replace(config, model=model, data=data)


def stream(store: EventStore, config):
  return pipeline.make_dataset(config, store, stats.identity(config), stats.no_text)


def slope(call, rounds: int, short: int = 2, long: int = 10) -> float:
  """CPU-seconds of one call, best of the rounds: the machine is shared."""

  def repeat(count):
    for _ in range(count):
      call()  # what it returns is dropped at once, as a training step drops its batch

  times = harness.time_side_by_side(
    {str(n): lambda n=n: repeat(n) for n in (short, long)}, rounds=rounds, warmup=1,
    clock=time.process_time,
  )  # fmt: skip
  return (min(times[str(long)]) - min(times[str(short)])) / (long - short)


def frames(root: pathlib.Path, video: str, size, rounds: int) -> dict[str, float]:
  (film,) = VideoReader(video, size, event_frames=EVENT)
  starts = range(7, film.num_frames - EVENT, EVENT - 1)  # off the 16-frame blocks
  spans = tuple(EventSpan(s, s + EVENT, 'unlabelled') for s in starts)
  episodes = [
    dataclasses.replace(
      film, episode_id=f'take-{i}', events=spans, pixel_mask={},
      frames={v: x if i == 0 else x[:, :, ::-1] for v, x in film.frames.items()},
    )
    for i in range(2)
  ]  # fmt: skip
  found: dict = {}
  root.mkdir()
  for codec in ('zstd', 'h264'):
    build_store(episodes, root / codec, codec=codec, heldout=0, progress=False)
    store = EventStore(root / codec)
    count = film.num_frames * len(film.views) * len(episodes)
    size_of = sum(shard['bytes'] for shard in store.manifest['shards'])
    found[f'{codec} bytes/frame'] = round(size_of / count)
    for planes in (False, True)[: 1 + (codec == 'h264')]:
      config = experiment(film.views, size, planes=planes)
      batches = stream(store, config)
      cost = slope(lambda b=batches: next(b), rounds)
      name = f'{codec} {"planes" if planes else "rgb"}'
      found[name] = round(SHAPE['batch_size'] * EVENT * len(film.views) / cost)
      bare = slope(lambda s=store, p=planes: decode(s, spans, p), rounds)
      found[f'{name}, decode only'] = round(len(spans) * EVENT * len(film.views) / bare)
  paths = [write_mp4(root / f'{view}.mp4', x) for view, x in film.frames.items()]
  cost = slope(lambda: [read_mp4(p, spans[0]) for p in paths], rounds, 1, 3)
  found['plain mp4 reader'] = round(EVENT * len(paths) / cost)
  found['h264 planes / plain mp4 reader'] = found['h264 planes'] / found['plain mp4 reader']
  found['h264 rgb / plain mp4 reader'] = found['h264 rgb'] / found['plain mp4 reader']
  return found


def decode(store: EventStore, spans, planes: bool) -> None:
  for span in spans:
    store.frames(0, np.arange(span.start, span.end), store.info(0).views, planes)


def write_mp4(path: pathlib.Path, film: np.ndarray) -> pathlib.Path:
  with av.open(str(path), 'w') as container:
    coder = container.add_stream('libx264', rate=fractions.Fraction(15))
    coder.height, coder.width, coder.pix_fmt = *film.shape[1:3], 'yuv420p'
    coder.options = {'g': '2', 'crf': '20'}
    for image in film:
      container.mux(coder.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image))))
    container.mux(coder.encode(None))
  return path


def read_mp4(path: pathlib.Path, span: EventSpan) -> np.ndarray:
  with av.open(str(path)) as container:
    video = container.streams.video[0]
    video.thread_count = 1
    unit = 1 / (video.average_rate * video.time_base)  # of the container's clock, per frame
    container.seek(int(span.start * unit), stream=video)
    found = []
    for picture in container.decode(video):
      if picture.pts >= span.start * unit:
        found.append(picture.to_ndarray(format='rgb24'))
      if len(found) == span.end - span.start:
        return np.stack(found)
  raise ValueError(f'{path}: ended after {len(found)} frames')


def latents(root: pathlib.Path, store: EventStore, rounds: int) -> dict[str, float]:
  config = experiment(store.info(0).views, SIZES['64x64'])
  h, w = config.model.latent_size
  shape = (len(config.model.views), 33, h, w, config.model.codec.channels)
  encode_store(config, store, lambda x: np.zeros((len(x), *shape), np.float32), root / 'latents')
  data = dataclasses.replace(config.data, latents=str(root / 'latents'))
  batches = stream(store, dataclasses.replace(config, data=data))
  cost = slope(lambda: next(batches), rounds, 10, 60)
  return {'events/CPU-s': round(SHAPE['batch_size'] / cost), 'shape': list(shape)}


def memory(root: pathlib.Path, whole: EventStore, count: int) -> dict[str, float]:
  """Growth of resident memory between a tenth of the batches and all of them."""
  episode = whole.episode(0)
  spans = tuple(EventSpan(s, s + 5, 'unlabelled') for s in range(0, episode.num_frames - 5, 4))
  build_store([dataclasses.replace(episode, events=spans)], root / 'short', codec='h264', heldout=0,
              progress=False)  # fmt: skip
  store = EventStore(root / 'short')
  config = experiment(
    episode.views, SIZES['64x64'], buckets=(1,), planes=True, threads=2, batch_size=1
  )
  batches, process = stream(store, config), psutil.Process()
  for i in range(count):
    if i == count // 10:
      before = process.memory_info().rss
    next(batches)
  batches.close()
  grown = process.memory_info().rss - before
  return {'batches': count, 'grown MB': grown / 1e6}


def large_index(path: pathlib.Path, count: int, per_episode: int = 40) -> dict[str, float]:
  _large_store(path, count // per_episode, per_episode)
  process = psutil.Process()
  pa.default_memory_pool().release_unused()
  before, clocks = process.memory_info().rss, (time.perf_counter(), time.process_time())

  def since(i):
    return round((time.perf_counter, time.process_time)[i]() - clocks[i], 3)

  store = EventStore(path)
  opened = {'open CPU-s': since(1), 'open s': since(0)}
  opened['open grown MB'] = (process.memory_info().rss - before) / 1e6
  batches = stream(store, experiment(('front',), (32, 32), buckets=(1,)))
  next(batches)
  return {
    'events': len(store.events), **opened, 'first batch CPU-s': since(1),
    'first batch s': since(0), 'all grown MB': (process.memory_info().rss - before) / 1e6,
    'index bytes/event': sum(f['bytes'] for f in store.manifest['files']) / count,
  }  # fmt: skip


def _large_store(path: pathlib.Path, episodes: int, per_episode: int) -> None:
  """A store of one small episode many times over, under ever new names."""
  spans = tuple(EventSpan(i, i + 2, 'skill') for i in range(per_episode))
  film = np.zeros((per_episode + 1, 32, 32, 3), np.uint8)
  record = EpisodeRecord('e', 'synthetic', 10.0, ('front',), {'front': film}, None, None, spans)
  (path / 'shards').mkdir(parents=True)
  (path / 'index').mkdir()
  codec, shards = make_codec('zstd'), ShardWriter(path, 'episodes', 2**28)
  raw = [records.encode_header(record, 0)]
  raw += [
    records.encode_block(record, 0, b, codec) for b in range(records.num_blocks(record.num_frames))
  ]
  sums, rows = [records.checksum(x) for x in raw], []
  bodies = [(block, records.unseal(x, 0, block)) for block, x in enumerate(raw, records.HEADER)]
  base = index.episode_row(record, 'synthetic')
  for row in range(episodes):
    places = [shards.append(records.seal(row, block, x)) for block, x in bodies]
    rows.append(base | {'episode_id': f'e{row}', 'content': '', 'checksums': sums, 'split': 'train',
                        'shard': places[0][0], 'record': places[0][1]})  # fmt: skip
    shards.roll()
  shards.close()
  event = pa.Table.from_pylist(
    [index.event_row(record, e) | {'episode': 0, 'split': 'train'} for e in record.events],
    index.EVENT_SCHEMA,
  )
  total = episodes * per_episode
  rng = np.random.default_rng(0)
  table = event.take(np.arange(total) % per_episode)
  for name, values in (
    ('uid', pa.array(rng.permutation(total).astype(np.uint64) * 2**40)),
    ('episode', pa.array(np.repeat(np.arange(episodes, dtype=np.int32), per_episode))),
    ('label', pa.array(np.array([f'skill {i}' for i in range(64)])[rng.integers(64, size=total)])),
    ('L1', pa.array(np.array([f'do {i}' for i in range(2000)])[rng.integers(2000, size=total)])),
  ):
    table = table.set_column(table.column_names.index(name), name, values)
  files = index.save(path, 0, pa.Table.from_pylist(rows, index.EPISODE_SCHEMA), table)
  book = ledger.Ledger({'read': episodes, 'events_read': total})
  files |= book.save(path, 0)
  manifest.write_manifest(path, {
    'block_frames': records.BLOCK_FRAMES, 'write': 0,
    'settings': {'heldout': 0.0, 'codec': codec.settings()},
    'counts': book.counts(episodes, total, episodes * record.num_frames),
    'shards': shards.entries,
    'files': [manifest.describe(path, name, n) for name, n in files.items()],
  })  # fmt: skip


if __name__ == '__main__':
  main()
