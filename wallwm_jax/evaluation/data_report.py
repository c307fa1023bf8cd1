"""One self-contained HTML page about an event store: what was read, refused, shifted, cut,
captioned and clustered, and how it will be drawn and packed.

The page is made from the store alone (index, ledger, provenance of the episodes) and, where there
is one, a folder of cluster labels. A section whose data is missing says why and how to get it.
"""

from __future__ import annotations

import collections
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from wallwm_jax.data.clean import CHECKS
from wallwm_jax.data.store import EventStore
from wallwm_jax.evaluation import data_clusters, data_episodes, data_plots, data_sync, page
from wallwm_jax.evaluation.data_sync import Refused
from wallwm_jax.types import DataError

MAX_HEADERS = 2000  # episodes whose provenance is read; of a larger store evenly spread ones
EXAMPLES = 3  # episodes named for a reason
PARTS = {'stored': 'episodes', 'quarantined': 'quarantined', 'rejected': 'rejected'}


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
    'Synchronisation': data_sync.synchronisation('Synchronisation', store, notes, refused),
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
  return [re.sub(r'(?<![\w.])\d+(\.\d+)?', '#', own)[:100]]


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
    page.card('recorded time', time, f'{size / 1e6:,.1f} MB on disk, pixels as {codec}'),
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
    rows.append((check, f'{len(entries):,}', kind, names + more, _short(entries[0].reason)))
  head = ('reason, by check', 'episodes', 'ledger', 'for example', 'in full, of the first')
  several = sum(len(entries) for entries in groups.values()) - len(refused)
  note = (
    '<p class="soft">An episode that fails several checks is counted at each of them.</p>'
    if several
    else ''
  )
  return ['<h3>Why episodes were refused</h3>', page.table(head, rows, text=(0, 3, 4)), note]


def _short(text: str, most: int = 220) -> str:
  return text if len(text) <= most else text[: most - 1] + '…'


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
    'to judge; one that fails a check is quarantined with the frame, the value and the threshold.'
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
  names = [*CHECKS, *sorted(set(judged) - set(CHECKS))]
  rows = [
    (name, f'{judged[name]:,}' if judged[name] else 'nothing to judge', _failures(name, failed))
    for name in names
  ]
  blocks.append(page.table(('check', 'stored episodes that passed', 'refused'), rows))
  return page.section(title, text, *blocks)


def _failures(check: str, failed: Mapping[str, int]) -> str:
  """Of a check with several kinds of findings (gripper_range, gripper_stuck, ...) each."""
  kinds = {name: n for name, n in failed.items() if name == check or name.startswith(f'{check}_')}
  if set(kinds) <= {check}:
    return f'{kinds.get(check, 0):,}'
  return ', '.join(f'{n:,} {name.removeprefix(check + "_")}' for name, n in kinds.items())
