"""Section of the data report about synchronisation: the lags of every rig, and what is left."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from wallwm_jax.data import sync
from wallwm_jax.data.store import EventStore
from wallwm_jax.evaluation import data_episodes, data_plots, page

MAX_RIGS = 12  # in plots, those with the most episodes
MEASURED_RIGS, MEASURED_EPISODES, MEASURED_FRAMES = 4, 8, 400  # what is left of the lag


class Refused(NamedTuple):
  """An entry of the ledger that is not stored; kind: 'quarantined' or 'rejected'."""

  kind: str
  episode_id: str
  source: str
  reason: str


def tail(text: str, most: int = 40) -> str:
  """The end of a long name, which is what tells names apart."""
  return text if len(text) <= most else f'…{text[1 - most:]}'


def _rig_names(store: EventStore) -> list[str]:
  """Of every episode; the source's name where the recording names no rig."""
  sources, rigs = (store.column(name, 'episodes').tolist() for name in ('source', 'rig'))
  several = len(set(sources)) > 1
  return [
    tail((f'{source}, {rig}' if several else rig) if rig else source)
    for source, rig in zip(sources, rigs)
  ]


def synchronisation(
  title: str, store: EventStore, notes: Mapping[int, Mapping], refused: Sequence[Refused]
) -> str:
  """Lags by rig and camera, how sure they are, and what is left of them."""
  names = _rig_names(store)
  groups: dict[str, list[Mapping]] = collections.defaultdict(list)
  for row, found in notes.items():
    note = found.get('sync')
    if isinstance(note, Mapping) and note.get('lags'):
      groups[names[row]].append(note)
  rigs = dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:MAX_RIGS])
  blocks = []
  if rigs:
    blocks += _applied_lags(rigs)
  else:
    blocks.append(f'<p class="soft">No lag was estimated: {_why_no_lag(store)}</p>')
  if len(groups) > MAX_RIGS:
    blocks.append(f'<p class="soft">{MAX_RIGS} of {len(groups)} rigs, the largest, are shown.</p>')
  lost = [x for x in refused if x.reason.startswith('sync: ')]
  if lost:
    blocks.append(
      f'<p class="soft">Refused because of their synchronisation and in none of these plots: '
      f'{len(lost)} (see the ledger).</p>'
    )
  blocks += _residual(store, names)
  return page.section(
    title,
    'By how many frames the robot stream lags behind each camera. A lag belongs to a rig (its '
    'clocks and cameras) and is shifted away for all of its episodes; no frame is made up.',
    *blocks,
  )


def _why_no_lag(store: EventStore) -> str:
  least = sync.SyncSettings().min_frames
  if not store.column('state_width', 'episodes').any():
    return 'no episode has a robot stream (video only), so there is nothing to compare with.'
  if store.column('frames', 'episodes').max() < least:
    return f'every episode is shorter than the {least} frames that a lag can be told from.'
  return (
    'this store was written without synchronisation. Build it with '
    '<code>wallwm data build --prepare</code>.'
  )


def _applied_lags(rigs: Mapping[str, Sequence[Mapping]]) -> list[str]:
  dots, table, confidence = [], [], {}
  for name, notes in rigs.items():
    judged = [note for note in notes if 'deviation' in note]
    # One lag per camera, unless the store was appended to and the rig had changed.
    lags = list(dict.fromkeys(item for note in notes for item in note['lags'].items()))
    for view, lag in lags:
      own = [lag + int(n['deviation']) for n in judged if n['lags'].get(view) == lag]
      label = f'{name} · {view}' if len(rigs) > 1 else view
      dots.append(data_plots.LagRow(label, lag, np.array(own, int)))
    applied = ', '.join(f'{view} {lag:+d}' if lag else f'{view} 0' for view, lag in lags)
    r, nats = (np.array([n[key] for n in judged], float) for key in ('r', 'evidence'))
    if judged:
      confidence[name] = r, nats
    agree = sum(n['deviation'] == 0 for n in judged)
    table.append(
      (
        name,
        applied,
        len(notes),
        f'{agree} of {len(judged)}',
        f'{np.median(r):.2f}' if judged else '–',
        f'{np.median(nats):.0f}' if judged else '–',
        len(notes) - len(judged),
      )
    )
  head = ('rig', 'lag applied [frames]', 'stored', 'agree exactly', 'median r', 'median nats',
          'too short to judge')  # fmt: skip
  least = sync.SyncSettings()
  blocks = [
    page.table(head, table),
    page.figure(
      data_plots.lag_dots(dots),
      'Each episode judged by itself: the lag, shifted for all of its cameras at once, at which '
      'its own motion explains its pictures best. Circles far from the tick are episodes that '
      'disagree with their rig.',
    ),
  ]
  if confidence:
    thresholds = (least.min_correlation, least.min_evidence)
    blocks.append(
      page.figure(
        data_plots.sync_confidence(confidence, thresholds),
        'Confidence per episode: to the right and up is better. Thresholds are the defaults.',
      )
    )
  return blocks


def _residual(store: EventStore, names: Sequence[str]) -> list[str]:
  """The score against what is left of the lag, measured anew on the streams as they are stored."""
  settings = sync.SyncSettings()
  able = (store.column('state_width', 'episodes') > 0) & (
    store.column('frames', 'episodes') >= settings.min_frames
  )
  rows = collections.defaultdict(list)
  for row in np.flatnonzero(able).tolist():
    rows[names[row]].append(row)
  rigs = sorted(rows, key=lambda name: (-len(rows[name]), name))[:MEASURED_RIGS]
  curves = {name: _curves(store, rows[name], settings) for name in rigs}
  if not curves:
    return []
  tops = {
    name: int(np.argmax(np.mean(list(by_view.values()), 0))) - settings.max_lag
    for name, by_view in curves.items()
  }
  return [
    '<h3>What is left of the lag in the store</h3>',
    page.figure(
      data_plots.residual_curves(curves, tops),
      f'Measured again on the stored streams of up to {MEASURED_EPISODES} episodes per rig. A '
      'curve that is not highest at 0 says that video and robot are still apart (or, without '
      'synchronisation, how far).',
    ),
  ]


def _curves(
  store: EventStore, rows: Sequence[int], settings: sync.SyncSettings
) -> dict[str, np.ndarray]:
  """Score [2 max_lag + 1] by view, mean over the frames of some episodes of a rig."""
  chosen = np.linspace(0, len(rows) - 1, min(len(rows), MEASURED_EPISODES)).round().astype(int)
  total: dict[str, np.ndarray] = {}
  frames: collections.Counter[str] = collections.Counter()
  for row in np.array(rows)[chosen].tolist():
    motion = sync.motion(data_episodes.first_frames(store, row, MEASURED_FRAMES), settings)
    scores = sync.correlation_curves(motion, settings.max_lag).mean((1, 2))
    for view, score in zip(motion.views, scores):
      total[view] = total.get(view, 0) + motion.frames * score
      frames[view] += motion.frames
  return {view: score / frames[view] for view, score in total.items()}
