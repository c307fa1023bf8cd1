"""What is in a store, for people."""

from __future__ import annotations

import collections
import re

import numpy as np
from rich.console import Console
from rich.table import Table

from wallwm_jax.data.schema import LEVELS
from wallwm_jax.data.store import EventStore


def summarise(store: EventStore) -> dict:
  """Plain numbers: counts, labels, lengths (frames), views, calibration, fps, captions, quarantine
  reasons."""
  episodes, lengths = store.episodes.to_pylist(), store.column('length')
  views: collections.Counter[str] = collections.Counter()
  calibrated: collections.Counter[str] = collections.Counter()
  sizes = collections.defaultdict(set)
  for episode in episodes:
    views.update(episode['views'])
    calibrated.update(episode['calibrated'])
    for view, *size in zip(episode['views'], episode['heights'], episode['widths']):
      sizes[view].add('{}x{}'.format(*size))
  count = collections.Counter
  return {
    'rejected': 0,  # the first version of the store had no such count
    **store.manifest['counts'],
    'codec': dict(store.codec),
    'rigs': dict(count(e['rig'] for e in episodes if e['rig'])),
    'bytes': sum(shard['bytes'] for shard in store.manifest['shards']),
    'splits': dict(count(e['split'] for e in episodes)),
    'sources': dict(count(e['source'] for e in episodes)),
    'fps': dict(count(e['fps'] for e in episodes)),
    'with_actions': sum(e['has_actions'] for e in episodes),
    'labels': dict(count(store.column('label').tolist()).most_common()),
    'lengths': {f'p{q}': float(np.percentile(lengths, q)) for q in (0, 25, 50, 75, 100)},
    'captions': {level: int((store.column(level) != '').sum()) for level in LEVELS},
    'flags': dict(count(flag for flags in store.events['flags'].to_pylist() for flag in flags)),
    'views': {
      v: {'episodes': n, 'calibrated': calibrated[v], 'sizes': sorted(sizes[v])}
      for v, n in views.items()
    },
    'quarantine': dict(count(_kind(entry.reason) for entry in store.quarantine()).most_common()),
    'rejections': dict(count(_kind(entry.reason) for entry in store.rejected()).most_common()),
  }


def show(store: EventStore, console: Console | None = None) -> None:
  """Prints `summarise` as a table."""
  summary = summarise(store)
  table = Table(title=f'event store {store.path}', show_header=False)
  table.add_column(style='bold')
  table.add_column()
  for name in ('read', 'episodes', 'quarantined', 'rejected', 'events', 'frames', 'with_actions'):
    table.add_row(name, f'{summary[name]:,}')
  table.add_row('size', f'{summary["bytes"] / 1e6:.1f} MB')
  for name in ('splits', 'sources', 'fps', 'labels', 'lengths', 'captions', 'flags'):
    table.add_row(name, '  '.join(f'{k}: {v:g}' for k, v in summary[name].items()) or '-')
  for view, facts in summary['views'].items():
    table.add_row(
      f'view {view}',
      f'{facts["episodes"]} episodes, {facts["calibrated"]} calibrated, {" ".join(facts["sizes"])}',
    )
  table.add_row('codec', ' '.join(str(value) for value in summary['codec'].values()))
  for kind, colour in (('quarantine', 'red'), ('rejections', 'yellow')):
    for reason, number in summary[kind].items():
      table.add_row(f'[{colour}]{kind}', f'{number} x {reason}')
  (console or Console()).print(table)


def _kind(reason: str) -> str:
  """A reason without the episode it happened to, so that equal ones are counted together."""
  return re.sub(r"^episode '.*?'( of '.*?')?: ", '', reason)
