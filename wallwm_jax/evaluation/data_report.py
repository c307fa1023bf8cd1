"""One self-contained HTML page about an event store: what was read, refused, shifted, cut, captioned,
clustered, and how it will be drawn and packed.

The page is made from the store alone (index, ledger, provenance of the episodes) and, where there
is one, a folder of cluster labels. A section whose data is missing says why and how to get it.
"""

from __future__ import annotations

import collections
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from wallwm_jax.data import sync
from wallwm_jax.data.clean import CHECKS
from wallwm_jax.data.store import EventStore
from wallwm_jax.evaluation import data_clusters, data_episodes, data_plots, page
from wallwm_jax.types import DataError

MAX_HEADERS = 2000  # episodes whose provenance is read; of a larger store evenly spread ones
MAX_RIGS = 12  # in plots, those with the most episodes
MEASURED_RIGS, MEASURED_EPISODES, MEASURED_FRAMES = 4, 8, 400  # what is left of the lag
EXAMPLES = 3  # episodes named for a reason


class Refused(NamedTuple):
  """An entry of the ledger that is not stored; kind: 'quarantined' or 'rejected'."""

  kind: str
  episode_id: str
  source: str
  reason: str


def write_data_report(
  store: str | os.PathLike,
  out: str | os.PathLike,
  clusters: str | os.PathLike | None = None,
  examples: int = 3,
) -> str:
  """Writes the page and returns its path.

  Args:
    store: folder of an event store; out: HTML file; clusters: folder of labels from `cluster_store`
      (default: clusters/default of the store, if it is there); examples: episodes shown.

  Raises:
    DataError: no store, or labels that are not of this store; CorruptStoreError.
  """
  events = EventStore(store)
  path = pathlib.Path(out)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(render(events, clusters, examples), encoding='utf-8')
  return str(path)


def render(
  store: EventStore, clusters: str | os.PathLike | None = None, examples: int = 3
) -> str:
  """The page as HTML; arguments as in `write_data_report`."""
  if examples < 1:
    raise DataError(f'examples: expected at least 1 episode to show, got {examples}.')
  notes = provenance(store)
  refused = refusals(store)
  shown = data_episodes.pick(store, notes, examples)
  labels, why = data_clusters.find_labels(store, clusters)
  sections = {
    'Ledger': _ledger('Ledger', store, refused),
    'Synchronisation': _sync('Synchronisation', store, notes, refused),
    'Cleaning': _cleaning('Cleaning', store, notes, refused),
    'Events': data_episodes.events('Events', store, notes, shown),
    'Captions': data_episodes.captions('Captions', store, notes, shown),
    'Clusters': data_clusters.clusters('Clusters', store, labels, why),
    'Packing': data_clusters.packing('Packing', store, labels),
  }
  footer = 'Written by wallwm. This file is complete in itself and loads nothing from elsewhere.'
  subtitle = f'{store.path}, digest {store.digest[:16]}'
  if len(notes) < len(store.episodes):
    subtitle += f'; what the steps noted is read from {len(notes):,} episodes, evenly spread'
  return page.document('What became of the data', subtitle, _cards(store), sections, footer)


def provenance(store: EventStore) -> dict[int, Mapping]:
  """What the steps noted, by episode (row of the index), of at most MAX_HEADERS of them."""
  count = len(store.episodes)
  rows = np.unique(np.linspace(0, count - 1, min(count, MAX_HEADERS)).round().astype(int))
  return {row: store.info(row).provenance for row in rows.tolist()}


def refusals(store: EventStore) -> list[Refused]:
  return [
    Refused(kind, x.episode_id, x.source, x.reason)
    for kind, entries in (('quarantined', store.quarantine()), ('rejected', store.rejected()))
    for x in entries
  ]


def checks_of(reason: str) -> list[str]:
  """Names of the checks that a reason is about: of cleaning each that failed, of synchronisation
  its verdict; else what was wrong, without the numbers that differ from episode to episode."""
  step, _, rest = reason.partition(': ')
  if step == 'cleaning':
    found = re.findall(r'(?:^|; )(\w+)(?: at frame \d+)?: ', rest)
    return [f'cleaning: {name}' for name in dict.fromkeys(found)] or ['cleaning']
  if step == 'sync':
    verdict = re.match(r'(?:rig )?(?:weak|edge|inconsistent|drifting|mismatched|too short)', rest)
    return [f'sync: {verdict[0] if verdict else "streams cannot be compared"}']
  own = re.sub(r"^episode '.*?'( of '.*?')?: ", '', reason)
  return [re.sub(r'\d+(\.\d+)?', '#', own)[:100]]


def by_check(refused: Iterable[Refused]) -> dict[tuple[str, str], list[Refused]]:
  """Entries by (kind, check), the most frequent first; an entry can be in several."""
  groups = collections.defaultdict(list)
  for entry in refused:
    for check in checks_of(entry.reason):
      groups[entry.kind, check].append(entry)
  return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def _counts(store: EventStore) -> dict[str, int]:
  """The manifest's, with what its first version did not count."""
  counts = {'quarantined': 0, 'rejected': 0, **store.manifest['counts']}
  stored = counts['episodes'] + counts['quarantined'] + counts['rejected']
  return {'read': stored, **counts}


def _cards(store: EventStore) -> list[str]:
  counts = _counts(store)
  frames, fps = store.column('frames', 'episodes'), store.column('fps', 'episodes')
  hours = float((frames / fps).sum() / 3600)
  time = f'{hours:,.1f} h' if hours >= 1 else f'{60 * hours:.1f} min'
  size = sum(shard['bytes'] for shard in store.manifest['shards'])
  lost = counts['read'] - counts['episodes']
  share = 100 * counts['episodes'] / max(counts['read'], 1)
  codec = str(store.codec['name'])
  return [
    page.card('episodes read', f'{counts["read"]:,}', 'from the source'),
    page.card('stored', f'{counts["episodes"]:,}', f'{share:.1f} % of what was read', 'good'),
    page.card('refused', f'{lost:,}', 'each with a reason', 'bad' if lost else ''),
    page.card('events', f'{counts["events"]:,}', f'{counts["events"] / len(frames):.1f} each'),
    page.card('recorded time', time, f'{int(frames.sum()):,} frames per camera'),
    page.card('on disk', f'{size / 1e6:,.1f} MB', f'pixels as {codec}'),
  ]


def _ledger(title: str, store: EventStore, refused: Sequence[Refused]) -> str:
  counts = _counts(store)
  parts = {name: counts[key] for name, key in PARTS.items()}
  names = {'stored': 'good', 'quarantined': 'bad', 'rejected': 'soft'}
  total = max(counts['read'], 1)
  bar = ''.join(
    f'<div class="{names[name]}" style="flex:{count / total:.5f} 0 auto"></div>'
    for name, count in parts.items()
    if count
  )
  key = ' + '.join(
    f'<span class="key {names[name]}"></span>{count:,} {name}' for name, count in parts.items()
  )
  blocks = [
    f'<p class="sum"><b>{counts["read"]:,} read</b> = {key}</p><div class="share">{bar}</div>'
  ]
  if 'events_read' in counts:
    lost = [counts.get(f'events_{kind}', 0) for kind in ('quarantined', 'rejected')]
    blocks.append(
      f'<p class="soft">Their events: {counts["events_read"]:,} read = {counts["events"]:,} stored '
      f'+ {lost[0]:,} quarantined + {lost[1]:,} rejected.</p>'
    )
  blocks += [_by_source(store, refused), *_reasons(refused)]
  return page.section(
    title,
    'Every episode that was read is stored, quarantined (unreadable, or refused by a check) or '
    'rejected (sound but not wanted, such as a duplicate). Nothing is lost in silence.',
    *blocks,
  )


PARTS = {'stored': 'episodes', 'quarantined': 'quarantined', 'rejected': 'rejected'}


def _by_source(store: EventStore, refused: Sequence[Refused]) -> str:
  kept = collections.Counter(store.column('source', 'episodes').tolist())
  lost = collections.Counter((x.source, x.kind) for x in refused)
  sources = sorted(set(kept) | {source for source, _ in lost})
  rows = [
    (
      name,
      kept[name] + lost[name, 'quarantined'] + lost[name, 'rejected'],
      kept[name],
      lost[name, 'quarantined'],
      lost[name, 'rejected'],
    )
    for name in sources
  ]
  return page.table(('source', 'read', 'stored', 'quarantined', 'rejected'), rows)


def _reasons(refused: Sequence[Refused]) -> list[str]:
  groups = by_check(refused)
  if not groups:
    return ['<p class="soft">Nothing was refused.</p>']
  rows = []
  for (kind, check), entries in groups.items():
    names = ', '.join(x.episode_id for x in entries[:EXAMPLES])
    more = f' and {len(entries) - EXAMPLES:,} more' if len(entries) > EXAMPLES else ''
    rows.append((check, kind, f'{len(entries):,}', names + more, _short(entries[0].reason)))
  head = ('reason, by check', 'ledger', 'episodes', 'for example', 'in full, of the first')
  several = sum(len(entries) for entries in groups.values()) - len(refused)
  note = (
    '<p class="soft">An episode that fails several checks is counted at each of them.</p>'
    if several
    else ''
  )
  return ['<h3>Why episodes were refused</h3>', page.table(head, rows, text=True), note]


def _short(text: str, most: int = 220) -> str:
  return text if len(text) <= most else text[: most - 1] + '…'


def _rig_names(store: EventStore) -> list[str]:
  """Of every episode; the source's name where the recording names no rig."""
  sources, rigs = (store.column(name, 'episodes').tolist() for name in ('source', 'rig'))
  several = len(set(sources)) > 1
  return [
    (f'{source}, {rig}' if several else rig) if rig else source
    for source, rig in zip(sources, rigs)
  ]


def _sync(
  title: str, store: EventStore, notes: Mapping[int, Mapping], refused: Sequence[Refused]
) -> str:
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
    blocks.append(
      '<p class="soft">No lag was estimated: this store was written without the step, or its '
      'episodes have no robot stream. Build it with <code>wallwm data build --prepare</code>.</p>'
    )
  if len(groups) > MAX_RIGS:
    blocks.append(f'<p class="soft">{MAX_RIGS} of {len(groups)} rigs, the largest, are shown.</p>')
  lost = [x for x in refused if x.reason.startswith('sync: ')]
  blocks.append(
    f'<p class="soft">Refused because of their synchronisation: {len(lost)} episodes (see the '
    'ledger); they are in none of these plots.</p>'
  )
  blocks += _residual(store, names)
  return page.section(
    title,
    'By how many frames the robot stream lags behind each camera. A lag belongs to a rig (its '
    'clocks and cameras) and is shifted away for all of its episodes; no frame is made up.',
    *blocks,
  )


def _applied_lags(rigs: Mapping[str, Sequence[Mapping]]) -> list[str]:
  dots, table, confidence = [], [], {}
  for name, notes in rigs.items():
    judged = [note for note in notes if 'deviation' in note]
    lags = {view: int(lag) for note in notes for view, lag in note['lags'].items()}
    for view, lag in lags.items():
      own = [int(n['lags'][view] + n['deviation']) for n in judged if view in n['lags']]
      dots.append(data_plots.LagRow(f'{name} · {view}', lag, np.array(own, int)))
    applied = ', '.join(f'{view} {lag:+d}' for view, lag in lags.items())
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
      'Each episode judged by itself: the lag at which its own motion explains its pictures best. '
      'Circles far from the tick are episodes that disagree with their rig.',
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
      f'Measured again on the stored streams of up to {MEASURED_EPISODES} episodes per rig. A curve '
      'that is not highest at 0 says that video and robot are still apart (or, without '
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


def _cleaning(
  title: str, store: EventStore, notes: Mapping[int, Mapping], refused: Sequence[Refused]
) -> str:
  judged: collections.Counter[str] = collections.Counter()
  cleaned = 0
  for found in notes.values():
    note = found.get('clean')
    if note is not None:
      cleaned += 1
      judged.update(note.get('checks', ()) if isinstance(note, Mapping) else ())
  failed: dict[str, int] = collections.Counter(
    check.removeprefix('cleaning: ')
    for x in refused
    if x.reason.startswith('cleaning: ')
    for check in checks_of(x.reason)
  )
  text = (
    'Named checks with thresholds. Every episode in the store passed all checks that had something '
    'to judge; an episode that fails one is quarantined with the frame, the value and the threshold.'
  )
  if not cleaned and not failed:
    return page.section(
      title,
      text,
      '<p class="soft">This store was written without cleaning. Build it with '
      '<code>wallwm data build --prepare</code>.</p>',
    )
  blocks = []
  if failed:
    ranked = dict(sorted(failed.items(), key=lambda item: (-item[1], item[0])))
    blocks.append(
      page.figure(data_plots.count_bars(ranked, 'episodes refused'), 'Findings, by named check.')
    )
  names = [*CHECKS, *sorted(set(failed) | set(judged) - set(CHECKS))]
  rows = [(name, f'{judged[name]:,}', _failures(name, failed)) for name in dict.fromkeys(names)]
  rows = [row for row in rows if row[0] in CHECKS or row[0] in judged]
  blocks.append(page.table(('check', 'stored episodes that passed', 'refused'), rows))
  return page.section(title, text, *blocks)


def _failures(check: str, failed: Mapping[str, int]) -> str:
  """Of a check with several kinds of findings (gripper_range, gripper_stuck, ...) each."""
  kinds = {name: n for name, n in failed.items() if name == check or name.startswith(f'{check}_')}
  if set(kinds) <= {check}:
    return f'{kinds.get(check, 0):,}'
  return ', '.join(f'{n:,} {name.removeprefix(check + "_")}' for name, n in kinds.items())
