"""The way of a data set from recordings to packed batches, on data whose truth is known.

Demonstrations of the tabletop become what a lab would have: a LeRobot data set whose robot stream
is late, in which nothing but the task is said and some episodes are broken. It is then prepared
like any other, and what was found is compared with what was done. A second run gives the same
bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from rich.console import Console

from wallwm_jax import presets
from wallwm_jax.commands.clock import Clock
from wallwm_jax.config import ExperimentConfig
from wallwm_jax.data import pipeline, stats
from wallwm_jax.data.build import build_store
from wallwm_jax.data.cluster import ClusterSettings, Labels, cluster_sizes, cluster_store
from wallwm_jax.data.prepare import Prepared, Rig
from wallwm_jax.data.readers.lerobot import LeRobotReader
from wallwm_jax.data.schema import EpisodeRecord, EventSpan
from wallwm_jax.data.shift import shift
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.sync import RigLag
from wallwm_jax.data.writers.lerobot import write_lerobot
from wallwm_jax.envs.tabletop.collect import collect
from wallwm_jax.envs.tabletop.config import TabletopConfig
from wallwm_jax.evaluation import boundary_page
from wallwm_jax.evaluation.base import to_plain
from wallwm_jax.evaluation.boundaries import boundary_score, chance_score
from wallwm_jax.evaluation.boundary_page import Segmented
from wallwm_jax.evaluation.data_report import write_data_report
from wallwm_jax.text.factory import make_text_encoder
from wallwm_jax.training.pretrained import latent_encoder
from wallwm_jax.types import PackedBatch

EPISODES = {'full': 96, 'ci': 32}
LATE = {'front': 2, 'side': 2, 'wrist': 3}  # frames by which the robot stream lags behind a camera
FROZEN, JUMP, EVERY = 5, 11, 16  # of every 16 episodes these two are broken
TOLERANCES = (1, 3)  # frames, of boundaries
PACK, ROWS, BATCHES = 16, 8, 16  # latent frames of a row, rows of a batch, batches that are read


def run(size: str, out: str | pathlib.Path) -> dict:
  """Collects as many demonstrations as EPISODES says and takes them all the way; see `prepare`."""
  clock = Clock(Console())
  clock.start('collecting demonstrations in the tabletop')
  world = TabletopConfig(image_size=(48, 48))
  return prepare(list(collect(EPISODES[size], 0, mix='multi', config=world)), out, clock)


def prepare(demonstrations: Sequence[EpisodeRecord], out: str | pathlib.Path, clock: Clock) -> dict:
  """From demonstrations to batches; returns what it writes to `out`/summary.json.

  Raises:
    DataError: `out` holds a data set already, or a step refuses everything.
  """
  out = pathlib.Path(out)
  clock.start('a LeRobot data set of them: robot late, events unmarked, some broken')
  write_lerobot([degraded(record, i) for i, record in enumerate(demonstrations)], out / 'lerobot')

  clock.start('synchronise, clean, segment, caption, store')
  episodes = Prepared(LeRobotReader(out / 'lerobot'), progress=True)
  lags = episodes.lags
  build_store(episodes, out / 'store', heldout=0.2)
  store = EventStore(out / 'store')

  clock.start('clustering the events')
  clusters = out / 'clusters'
  labels = cluster_store(store, settings=ClusterSettings(vl=16, act=8), out=clusters)

  clock.start('packed batches')
  batches = packed_batches(store, clusters)

  clock.start('writing the report')
  write_data_report(str(store.path), str(out / 'data.html'), clusters=str(clusters))
  segmented = _segmented(demonstrations, store, lags)
  timeline = boundary_page.render(segmented, 'wallwm boundaries')
  (out / 'boundaries.html').write_text(timeline, encoding='utf-8')
  summary = {
    'episodes': len(demonstrations),
    'ledger': store.manifest['counts'],
    'refused': _refusals(demonstrations, store),
    'lags': _lags(lags),
    'boundaries': _boundaries(segmented),
    'clusters': {side: len(sizes) for side, sizes in cluster_sizes(labels).items()},
    'packing': _fill(batches),
    'digests': _digests(out, store, labels, batches),
    'wall_s': clock.total(),
    'seconds': clock.parts(),
    'device': jax.devices()[0].device_kind,
  }
  (out / 'summary.json').write_text(json.dumps(to_plain(summary), indent=2))
  return summary


def degraded(record: EpisodeRecord, number: int) -> EpisodeRecord:
  """A demonstration as it would be recorded elsewhere."""
  record = late(record)
  frames, state = dict(record.frames), record.state.copy()
  quarter, middle = record.num_frames // 4, record.num_frames // 2
  if number % EVERY == FROZEN:
    frames['side'] = frames['side'].copy()
    frames['side'][quarter : quarter + middle] = frames['side'][quarter]
  if number % EVERY == JUMP:
    state[middle, :3] += 0.2
  return dataclasses.replace(
    record,
    frames=frames,
    state=state,
    events=(EventSpan(0, record.num_frames, 'unlabelled'),),
    captions=tuple(span for span in record.captions if span.level == 'L3'),
  )


def late(record: EpisodeRecord) -> EpisodeRecord:
  """The record with the robot stream late, its events still marked."""
  return shift(record, {view: -LATE[view] for view in record.views})


def packed_batches(store: EventStore, clusters: pathlib.Path) -> list[PackedBatch]:
  """The first batches of rows of whole events, drawn evenly over the clusters."""
  config = packed_config(store, clusters)
  norm = stats.compute(store, config, latent_encoder(config.model))
  encode = make_text_encoder(config.model.text).encode
  stream = pipeline.make_dataset(config, store, norm, encode)
  try:
    return list(itertools.islice(stream, BATCHES))
  finally:
    stream.close()


def packed_config(store: EventStore, clusters: pathlib.Path) -> ExperimentConfig:
  """The tabletop's model on packed rows of a store. So few events do not allow both margins."""
  config = presets.tabletop()
  data = dataclasses.replace(
    config.data,
    store=str(store.path),
    clusters=str(clusters),
    batch_size=ROWS,
    pack=PACK,
    balance_tolerance=1.0,
  )
  return dataclasses.replace(config, data=data)


def _refusals(demonstrations: Sequence[EpisodeRecord], store: EventStore) -> dict:
  """What was refused of the broken and of the sound episodes."""
  broken = {
    record.episode_id
    for i, record in enumerate(demonstrations)
    if i % EVERY in (FROZEN, JUMP)
  }
  reasons = {entry.episode_id: entry.reason for entry in store.quarantine()}
  return {
    'broken': len(broken),
    'broken_refused': len(broken & set(reasons)),
    'sound_refused': len(set(reasons) - broken),
    'reasons': reasons,
  }


def _lags(lags: Mapping[Rig, RigLag]) -> dict:
  """Frames by view, as made and as found."""
  found = {'/'.join(rig): dict(lag.lags) for rig, lag in lags.items()}
  return {'made': LATE, 'found': found}


def _segmented(
  demonstrations: Sequence[EpisodeRecord], store: EventStore, lags: Mapping[Rig, RigLag]
) -> list[Segmented]:
  """Boundaries of stored episodes beside those of the demonstrations."""
  made = {record.episode_id: record for record in demonstrations}
  found = []
  for number in range(len(store.episodes)):
    stored = store.episode(number)
    truth = shift(late(made[stored.episode_id]), lags[stored.source, stored.rig].lags)
    starts = ([event.start for event in record.events[1:]] for record in (stored, truth))
    found.append(Segmented(stored.episode_id, *starts, stored.num_frames, stored.fps))
  return found


def _boundaries(segmented: Sequence[Segmented]) -> dict:
  """F1 of the boundaries, at tolerances in frames, seconds and shares of an episode."""
  pairs = [(e.proposed, e.true) for e in segmented]
  lengths = [(e.num_frames, e.true) for e in segmented]
  in_frames = {
    f'within {frames} frames': {
      'f1': boundary_score(pairs, frames).f1,
      'chance_f1': chance_score(lengths, frames).f1,
    }
    for frames in TOLERANCES
  }
  return in_frames | boundary_page.to_json(boundary_page.boundary_curves(segmented))


def _fill(batches: Iterable[PackedBatch]) -> dict:
  """Part of the latent frames of the rows that events use, and events per row."""
  used = np.mean([(batch.segment > 0).mean() for batch in batches])
  return {'fill': used, 'events_per_row': np.mean([batch.event_mask.sum(1) for batch in batches])}


def _digests(
  out: pathlib.Path, store: EventStore, labels: Labels, batches: Iterable[PackedBatch]
) -> dict[str, str]:
  """What a second run must reproduce, sha256 of every stage."""
  raw, stream = hashlib.sha256(), hashlib.sha256()
  for path in sorted((out / 'lerobot').rglob('*')):
    if path.is_file():
      raw.update(f'{path.relative_to(out)}\0'.encode() + path.read_bytes())
  for leaf in jax.tree.leaves(list(batches)):
    stream.update(np.ascontiguousarray(leaf).tobytes())
  return {
    'lerobot': raw.hexdigest(),
    'store': store.digest,
    'labels': labels.sha256,
    'batches': stream.hexdigest(),
  }
