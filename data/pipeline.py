"""The training stream: a Grain MapDataset over the plan, batched, sharded by host, resumable from
one integer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from wallwm_jax.config import ExperimentConfig, nearest
from wallwm_jax.data.captions import CaptionTable, EncodeText
from wallwm_jax.data.latents import LatentStore
from wallwm_jax.data.packing import PackedPlan
from wallwm_jax.data.permutation import fold, mix64
from wallwm_jax.data.sampler import (
  BatchPlan,
  EventPlan,
  assign_buckets,
  cell_mass,
  count_latents,
  label_weights,
)
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import (
  Draw,
  EncodePrompts,
  Instructions,
  WindowReader,
  caption_rows,
)
from wallwm_jax.types import (
  CheckpointError,
  ConfigError,
  EventBatch,
  LanguageBatch,
  NormStats,
  PackedBatch,
)

Batch = EventBatch | LanguageBatch | PackedBatch

_ENDLESS = 2**60  # elements of the training stream
# Purposes of random numbers, none of the sampler's.
_WINDOWS, _PACKED, _ROWS, _ANCHORS = range(100, 104)


class PlanSource:
  """The plan as a random-access sequence of Draws, for grain.MapDataset.source: one event per row,
  every batch of one length bucket.

  Element i belongs to batch i // batch_size; see `deal` for its slot.

  Args:
    moments: rows of the event index whose single frames are drawn, in bucket 0, in every other
      batch the first ones; None = windows of the events of config.data.split.
  """

  def __init__(
    self,
    store: EventStore,
    config: ExperimentConfig,
    process_count: int,
    moments: np.ndarray | None = None,
  ):
    data = config.data
    self._batch_size, self._process_count = data.batch_size, process_count
    self._start, self._end = store.column('start'), store.column('end')
    self._moments, self._key = moments is not None, fold(data.seed, _WINDOWS)
    # Share of windows anchored anywhere in their event; the others begin with it.
    self._midway = 1.0 if data.window == 'chunk' else data.midway
    if moments is None:
      events, self._futures = split_events(store, config), data.buckets
      buckets = event_buckets(store, config)[events]
    else:
      events, self._futures, buckets = moments, (0,), np.zeros(len(moments), np.int64)
    weights, cells = balance_events(store, config, events)
    self._events = events.astype(np.int32)
    self._plan = BatchPlan(weights, cells, buckets, data.batch_size, data.seed)

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: int) -> Draw:
    step, slot = deal(int(index), self._batch_size, self._process_count)
    event = int(self._events[self._plan.event(step, slot)])
    anchor, key = int(self._start[event]), mix64(self._key ^ (step * self._batch_size + slot))
    if self._moments:
      inside = step % 2 == 0
    else:
      inside = mix64(key ^ _ANCHORS) < self._midway * 2**64
    if inside:
      anchor += mix64(key) % (int(self._end[event]) - anchor - 1)
    return Draw(event, self._futures[self._plan.bucket(step)], anchor, key % 2**32)

  def __repr__(self) -> str:
    return f'PlanSource({len(self._events)} events)'

  def digest(self) -> str:
    """Hex digest of what is drawn and how often."""
    return hashlib.sha256(self._events.tobytes() + self._plan.digest().encode()).hexdigest()[:16]

  def landmark(self, index: int) -> tuple[int, ...]:
    """What `seek` needs to reach the batch of element `index` at once: nothing."""
    return ()

  def seek(self) -> None:
    """Takes what `landmark` gave."""


class PackedSource:
  """The plan as a random-access sequence of rows of whole events, tuples of Draws whose buckets are
  their own future latents; see `PlanSource` and `packing`."""

  def __init__(self, store: EventStore, config: ExperimentConfig, process_count: int):
    data = config.data
    self._batch_size, self._process_count = data.batch_size, process_count
    self._start, self._key = store.column('start'), fold(data.seed, _WINDOWS)
    events = split_events(store, config)
    cells, mass = cell_mass(*balance_events(store, config, events))
    self._events = events.astype(np.int32)
    lengths = store.column('length')[events]
    latents = count_latents(lengths, config.model.steps_per_latent, data.stride)
    self._latents = np.clip(latents, 1, data.buckets[-1]).astype(np.int32)
    plan = EventPlan(cells, mass, fold(data.seed, _PACKED))
    self._rows = PackedPlan(plan, 1 + self._latents, data.pack, fold(data.seed, _ROWS))
    parts = self._events.tobytes(), self._latents.tobytes(), plan.digest().encode()
    self._digest = hashlib.sha256(b''.join(parts)).hexdigest()[:16]

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: int) -> tuple[Draw, ...]:
    step, slot = deal(int(index), self._batch_size, self._process_count)
    return tuple(
      Draw(
        int(self._events[place]),
        int(self._latents[place]),
        int(self._start[self._events[place]]),
        mix64(self._key ^ draw) % 2**32,
      )
      for place, draw in zip(*(x.tolist() for x in self._rows.row(step * self._batch_size + slot)))
    )

  def __repr__(self) -> str:
    return f'PackedSource({len(self._events)} events)'

  def digest(self) -> str:
    """Hex digest of what is drawn, how often, and how long it is."""
    return self._digest

  def landmark(self, index: int) -> tuple[int, ...]:
    """What `seek` needs to reach the batch of element `index` at once."""
    return self._rows.landmark(index - index % self._batch_size)

  def seek(self, *landmark: int) -> None:
    """Takes what `landmark` gave."""
    self._rows.seek(*landmark)


def deal(index: int, batch_size: int, process_count: int) -> tuple[int, int]:
  """(batch, slot in it) of element `index` of a source.

  Hosts take every process_count-th element of a batch; slots are dealt so that host h receives the
  contiguous slots h * batch_size / process_count onwards, as a sharded global array expects.
  """
  step, place = divmod(index, batch_size)
  return step, place % process_count * (batch_size // process_count) + place // process_count


class BatchIterator(Iterator[Batch]):
  """Endless batches (NumPy, this host's part); iterate with next().

  The state is the next batch's place in the plan and a fingerprint of everything the plan depends
  on: it is the same on every host and does not depend on workers, threads or the number of hosts.
  """

  def __init__(
    self,
    batches: grain.experimental.ElasticIterator,
    source: PlanSource | PackedSource,
    plan: dict,
    shared_memory: bool,
  ):
    self._batches, self._source, self._plan = batches, source, plan
    self._shared_memory = shared_memory

  def __next__(self) -> Batch:
    batch = next(self._batches)
    # Worker processes hand over shared memory, which must not outlive the interpreter: keep a copy.
    return jax.tree.map(np.array, batch) if self._shared_memory else batch

  def get_state(self) -> dict:
    """JSON-serialisable; `position` is the next element and how to reach it at once."""
    (element,) = self._batches.get_state().values()
    return {'position': [element, *self._source.landmark(element)], 'plan': self._plan}

  def set_state(self, state: dict) -> None:
    """Continues after the batch that `get_state` had returned last.

    Raises:
      CheckpointError: the state belongs to another store or another data config, naming the
        difference.
    """
    differ = [k for k in self._plan if self._plan[k] != state.get('plan', {}).get(k)]
    if differ:
      changes = ', '.join(
        f'{k}: {state.get("plan", {}).get(k)!r} then, {self._plan[k]!r} now' for k in differ
      )
      raise CheckpointError(
        f'data iterator state belongs to another data stream ({changes}). '
        'Resume with the settings of the first run, or start a new one.'
      )
    element, *landmark = state['position']
    self._source.seek(*landmark)
    self._batches.set_state(dict.fromkeys(self._batches.get_state(), element))

  def close(self) -> None:
    """Stops the worker processes and threads."""
    self._batches.close()


def make_dataset(
  config: ExperimentConfig,
  store: EventStore,
  norm: NormStats,
  encode_text: EncodeText,
  prompts: EncodePrompts | None = None,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> BatchIterator:
  """The training batches of one host.

  Args:
    config: model geometry and the `data` section; store: where the windows are; norm: what they
      are scaled with.
    encode_text: list of captions -> Text features [n, X, E] (NumPy), called once with the distinct
      captions.
    prompts: list of instructions -> Prompt [n, S] (NumPy), for batches with prompts.
    process_index, process_count: this host among all; every global batch is divided evenly.

  Raises:
    ConfigError: the store does not fit the config (cameras, action width, empty split) or the
      batch the hosts.
  """
  make_source = PackedSource if config.data.pack else PlanSource
  source = make_source(store, config, process_count)
  reader = make_reader(
    config, store, norm, encode_text, prompts, jitter=True, planes=config.data.planes
  )
  plan = fingerprint(config, store, source)
  if prompts is not None:
    plan['phrasing'] = config.data.phrasing
  read = reader.packed if config.data.pack else reader
  return open_stream(config, source, read, plan, process_index, process_count)


def open_stream(
  config: ExperimentConfig,
  source: PlanSource | PackedSource,
  read: Callable[[Any], Batch],
  plan: dict,
  process_index: int,
  process_count: int,
) -> BatchIterator:
  """Batches of what `read` makes of the elements of `source`.

  Args:
    plan: what the stream depends on, JSON-serialisable; part of the iterator's state.

  Raises:
    ConfigError: hosts that do not divide the batch.
  """
  data = config.data
  if data.batch_size % process_count:
    raise ConfigError(
      f'data.batch_size={data.batch_size} is not a multiple of {process_count} hosts.'
    )
  if data.workers and not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's workers refuse to start on unparsed absl flags
  windows = grain.MapDataset.source(source).map(read)
  batches = grain.experimental.ElasticIterator(
    windows,
    data.batch_size,
    grain.sharding.ShardOptions(process_index, process_count),
    read_options=grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=2 * data.threads),
    multiprocessing_options=grain.multiprocessing.MultiprocessingOptions(
      data.workers, per_worker_buffer_size=2
    )
    if data.workers
    else None,
  )
  return BatchIterator(batches, source, plan, shared_memory=data.workers > 0)


def make_reader(
  config: ExperimentConfig,
  store: EventStore,
  norm: NormStats,
  encode_text: EncodeText,
  prompts: EncodePrompts | None = None,
  *,
  jitter: bool = False,
  planes: bool = False,
) -> WindowReader:
  """A WindowReader whose captions are encoded once, here, in the calling process.

  Args:
    jitter: as `data.photometric` and `data.crop` say; planes: frames are I420 planes, as training
      with `data.planes` reads them. Others than training have neither.

  Raises:
    ConfigError: the store has no planes of the model's size.
  """
  if planes:
    _check_planes(config, store)
  distinct, row = caption_rows(store, config.data.window)
  table = CaptionTable(encode_text, distinct)
  norm = NormStats(*(np.asarray(value, np.float32) for value in vars(norm).values()))
  latents = LatentStore(config.data.latents) if config.data.latents else None
  ask = prompts and Instructions(store, config.data.phrasing, prompts)
  return WindowReader(store, config, norm, table, row, latents, ask, jitter=jitter, planes=planes)


def _check_planes(config: ExperimentConfig, store: EventStore) -> None:
  if store.codec['name'] != 'h264':
    raise ConfigError(
      f'data.planes: expected a store of h264 clips, {store.path} holds {store.codec["name"]}. '
      'Build it with --codec h264, or set data.planes=False.'
    )
  episodes = store.episodes
  size = config.model.image_size
  columns = (episodes[name].to_pylist() for name in ('episode_id', 'views', 'heights', 'widths'))
  for name, *cameras in zip(*columns, strict=True):
    for view, *stored in zip(*cameras, strict=True):
      if view in config.model.views and tuple(stored) != tuple(size):
        raise ConfigError(
          f'data.planes: planes are not resized, expected model.image_size={size} in the store, '
          f'episode {name!r} has {view!r} of {tuple(stored)}.'
        )


def split_events(store: EventStore, config: ExperimentConfig) -> np.ndarray:
  """Rows of the event index that belong to config.data.split, after checking that they fit the
  config."""
  data, model = config.data, config.model
  known, split = store.codes('split')
  rows = np.flatnonzero((known == data.split)[split])
  if not len(rows):
    known = known.tolist()
    raise ConfigError(
      f'data.split={data.split!r} has no events in {store.path}.{nearest(data.split, known)}'
    )
  if data.window == 'chunk' and data.buckets != (model.future,):
    raise ConfigError(
      f'data.buckets={data.buckets}: chunk windows have one length, expected ({model.future},) '
      '(model.future).'
    )
  episodes = store.episodes.take(np.unique(store.column('episode')[rows]))
  columns = (episodes[name].to_pylist() for name in ('episode_id', 'views', 'state_width'))
  for name, views, width in zip(*columns, strict=True):
    if not set(views) & set(model.views):
      raise ConfigError(
        f'model.views={model.views}: episode {name!r} of {store.path} has none of them, '
        f'only {tuple(views)}.'
      )
    if width not in (0, model.action_spec.dim):
      raise ConfigError(
        f'model.action_spec: expected width {model.action_spec.dim}, episode {name!r} of '
        f'{store.path} has {width}. Set model.action_spec.arms={width // 10}.'
      )
  return rows


def event_buckets(store: EventStore, config: ExperimentConfig) -> np.ndarray:
  """Index into config.data.buckets of every event of the store."""
  data = config.data
  if data.window == 'chunk':
    return np.zeros(len(store.events), np.int64)
  return assign_buckets(
    store.column('length'), data.buckets, config.model.steps_per_latent, data.stride
  )


def balance_events(
  store: EventStore, config: ExperimentConfig, events: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Weight [n] (how often it is drawn, up to a factor) and cell [n] of each of `events` (rows of
  the event index): balanced over clusters where config.data.clusters is set, else over labels."""
  data = config.data
  if not data.clusters:
    return label_weights(store.codes('label')[1][events], data.balance)
  from wallwm_jax.data import balance, cluster  # heavy to import, needed with clusters only

  settings = balance.BalanceSettings(
    tau_vl=1 - data.balance,
    tau_act=1 - data.balance,
    cap=data.balance_cap,
    tolerance=data.balance_tolerance,
    sources=dict(data.sources),
    recovery=data.recovery or None,
  )
  labels = cluster.Labels.load(data.clusters, store)
  balanced = balance.balance_store(store, labels, events, settings)
  return balanced.weights, balanced.cells


def stack(elements: list[Batch]) -> Batch:
  """Elements without a batch axis as one batch."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *elements)


def fingerprint(
  config: ExperimentConfig, store: EventStore, source: PlanSource | PackedSource
) -> dict:
  """Everything that the batches depend on, JSON-serialisable."""
  skipped = (
    'store', 'latents', 'planes', 'clusters', 'workers', 'threads', 'phrasing', 'text',
    'balance_tolerance',
  )  # fmt: skip
  off = ('photometric', 'crop', 'midway')  # where 0: as in runs from before there were these
  data = {
    k: v
    for k, v in dataclasses.asdict(config.data).items()
    if k not in skipped and (v or k not in off)
  }
  shape = [
    config.model.views,
    config.model.image_size,
    config.model.history,
    config.model.steps_per_latent,
  ]
  data['model'] = hashlib.sha256(repr(shape).encode()).hexdigest()[:16]
  return json.loads(json.dumps(data)) | {'store': store.digest[:16], 'draws': source.digest()}
