"""The training stream: a Grain MapDataset over the plan, batched, sharded by host, resumable from
one integer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np
from absl import flags

from wallwm_jax.config import ExperimentConfig, nearest
from wallwm_jax.data.captions import CaptionTable, EncodeText
from wallwm_jax.data.latents import LatentStore
from wallwm_jax.data.sampler import EventPlan, assign_buckets
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import (
  Draw,
  EncodePrompts,
  Instructions,
  WindowReader,
  caption_rows,
)
from wallwm_jax.types import CheckpointError, ConfigError, EventBatch, LanguageBatch, NormStats

_ENDLESS = 2**60  # elements of the training stream


class PlanSource:
  """The plan as a random-access sequence of Draws, for grain.MapDataset.source.

  Element i belongs to batch i // batch_size. Hosts take every process_count-th element of a batch;
  slots are dealt so that host h receives the contiguous slots h * batch_size / process_count
  onwards, as a sharded global array expects.

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
    self._moments = moments is not None
    self._inside = self._moments or data.window == 'chunk'
    if moments is None:
      self._events, self._futures = split_events(store, config), data.buckets
      buckets = event_buckets(store, config)[self._events]
    else:
      self._events, self._futures, buckets = moments, (0,), np.zeros(len(moments), np.int64)
    labels = store.codes('label')[1][self._events]  # numbers in the order of the names
    self._plan = EventPlan(labels, buckets, data.batch_size, data.balance, data.seed)

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: int) -> Draw:
    batch, hosts = self._batch_size, self._process_count
    step, place = divmod(int(index), batch)
    slot = place % hosts * (batch // hosts) + place // hosts
    event = int(self._events[self._plan.event(step, slot)])
    anchor = int(self._start[event])
    choice = self._plan.uniform(step, slot + batch, 2**32)  # beyond the slots: another stream
    if self._inside and not (self._moments and step % 2):
      anchor += self._plan.uniform(step, slot, int(self._end[event]) - anchor - 1)
    return Draw(event, self._futures[self._plan.bucket(step)], anchor, choice)

  def __repr__(self) -> str:
    return f'PlanSource({len(self._events)} events)'


class BatchIterator(Iterator[EventBatch | LanguageBatch]):
  """Endless batches (NumPy, this host's part); iterate with next().

  The state is the next batch's place in the plan and a fingerprint of everything the plan depends
  on: it is the same on every host and does not depend on workers, threads or the number of hosts.
  """

  def __init__(self, batches: grain.experimental.ElasticIterator, plan: dict, shared_memory: bool):
    self._batches, self._plan, self._shared_memory = batches, plan, shared_memory

  def __next__(self) -> EventBatch | LanguageBatch:
    batch = next(self._batches)
    # Worker processes hand over shared memory, which must not outlive the interpreter: keep a copy.
    return jax.tree.map(np.array, batch) if self._shared_memory else batch

  def get_state(self) -> dict:
    """JSON-serialisable."""
    return {'position': self._batches.get_state(), 'plan': self._plan}

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
    self._batches.set_state(dict(state['position']))

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
  plan = fingerprint(config, store)
  if prompts is not None:
    plan['phrasing'] = config.data.phrasing
  return open_stream(
    config,
    PlanSource(store, config, process_count),
    make_reader(config, store, norm, encode_text, prompts, planes=config.data.planes),
    plan,
    process_index,
    process_count,
  )


def open_stream(
  config: ExperimentConfig,
  source: PlanSource,
  read: Callable[[Draw], EventBatch | LanguageBatch],
  plan: dict,
  process_index: int,
  process_count: int,
) -> BatchIterator:
  """Batches of what `read` makes of the draws of `source`.

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
  return BatchIterator(batches, plan, shared_memory=data.workers > 0)


def make_reader(
  config: ExperimentConfig,
  store: EventStore,
  norm: NormStats,
  encode_text: EncodeText,
  prompts: EncodePrompts | None = None,
  planes: bool = False,
) -> WindowReader:
  """A WindowReader whose captions are encoded once, here, in the calling process.

  Args:
    planes: frames are I420 planes, as training with `data.planes` reads them; others read RGB.

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
  return WindowReader(store, config, norm, table, row, latents, ask, planes)


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


def stack(elements: list[EventBatch] | list[LanguageBatch]) -> EventBatch | LanguageBatch:
  """Elements without a batch axis as one batch."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *elements)


def fingerprint(config: ExperimentConfig, store: EventStore) -> dict:
  data = {
    k: v
    for k, v in dataclasses.asdict(config.data).items()
    if k not in ('store', 'latents', 'planes', 'workers', 'threads', 'phrasing', 'text')
  }
  shape = [
    config.model.views,
    config.model.image_size,
    config.model.history,
    config.model.steps_per_latent,
  ]
  data['model'] = hashlib.sha256(repr(shape).encode()).hexdigest()[:16]
  return json.loads(json.dumps(data)) | {'store': store.digest[:16]}
