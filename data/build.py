"""Builds an event store from any reader."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Iterator, Sized

from rich.progress import (
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

from wallwm_jax.data.ledger import Rejected
from wallwm_jax.data.manifest import holds_store
from wallwm_jax.data.schema import EpisodeRecord, Quarantined
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.store_writer import KNOWN, EpisodeStoreWriter, writer_settings
from wallwm_jax.types import ConfigError, DataError

_COLUMNS = (
  *Progress.get_default_columns()[:2],
  MofNCompleteColumn(),
  TimeElapsedColumn(),
  TimeRemainingColumn(),
  TextColumn('{task.fields[bad]} refused'),
)


def build_store(
  episodes: Iterable[EpisodeRecord | Quarantined],
  out: str | os.PathLike,
  *,
  heldout: float | None = None,
  total: int | None = None,
  progress: bool = True,
  **options,
) -> dict:
  """Stores every valid episode; notes the others with the reason why they were quarantined
  (unreadable, against the schema) or rejected (duplicates).

  Args:
    episodes: a reader; what it yields as Quarantined, and records that break the schema, are
      noted, not stored.
    out: new directory of the store; heldout: fraction of episodes of the 'heldout' split (0.1).
    total: how many episodes to expect (for the progress bar; default len(episodes) where it has
      one).
    options: codec, crf, append, resume, shard_bytes of `EpisodeStoreWriter`. A store that is
      finished is not resumed but reported as it is.

  Returns:
    {'store', 'codec', and the manifest's counts ('read', 'episodes', 'events', ...), 'new':
    episodes stored now, 'reasons': {reason: count} of those not stored now}.

  Raises:
    ConfigError: options out of range, or not those of the store that is appended to or resumed.
    DataError: nothing could be stored, or `out` is taken; no store is left behind.
  """
  if options.get('resume') and not options.get('append') and holds_store(out):
    return _finished(out, heldout, options)
  if total is None and isinstance(episodes, Sized):
    total = len(episodes)
  reasons: collections.Counter[str] = collections.Counter()
  writer = EpisodeStoreWriter(out, heldout, reader=type(episodes).__name__, **options)
  with writer, Progress(*_COLUMNS, disable=not progress) as bar:
    before, seen, known = writer.counts(), 0, 0
    task = bar.add_task('episodes', total=total, bad=0, completed=len(writer.settled))
    for item in _unsettled(episodes, writer.settled):
      entry = writer.offer(item)
      seen, known = seen + 1, known + (entry == KNOWN)
      if isinstance(entry, Quarantined | Rejected):
        reasons[entry.reason] += 1
      bar.update(task, advance=1, bad=reasons.total())
    counts = writer.counts()
    if counts['read'] - before['read'] != seen - known:
      raise DataError(
        f'the ledger lost episodes: {seen} read, {known} of them known, but {before} became '
        f'{counts}.'
      )
    if not counts['episodes']:
      raise DataError(f'no valid episode among {counts["read"]} read; reasons: {dict(reasons)}.')
  return {
    'store': str(out),
    'codec': writer.settings['codec'],
    **counts,
    'new': counts['episodes'] - before['episodes'],
    'reasons': dict(reasons),
  }


def _unsettled(
  episodes: Iterable[EpisodeRecord | Quarantined], settled: list[str]
) -> Iterator[EpisodeRecord | Quarantined]:
  """What comes after the episodes that an interrupted write has settled.

  A reader with `starting_at(count)` is asked to begin there; another one is read through.

  Raises:
    DataError: the reader does not give the same episodes as then.
  """
  if settled and hasattr(episodes, 'starting_at'):
    yield from episodes.starting_at(len(settled))
    return
  items = iter(episodes)
  for place, expected in enumerate(settled):
    got = next(items, None)
    if got is None or got.episode_id != expected:
      raise DataError(
        f'resume: episode {place} was {expected!r} when the write was interrupted, now it is '
        f'{got and got.episode_id!r}. Build anew, without resume.'
      )
  yield from items


def _finished(out: str | os.PathLike, heldout: float | None, options: dict) -> dict:
  """The report of a store that needs no resuming."""
  store = EventStore(out)
  asked = writer_settings(None, heldout, options.get('codec'), options.get('crf'))
  stored = store.manifest.get('settings', asked)
  if asked != stored:
    raise ConfigError(f'resume: store {out} was finished with {stored}, asked for {asked}.')
  return {
    'store': str(out), 'codec': store.codec, **store.manifest['counts'], 'new': 0, 'reasons': {}
  }  # fmt: skip
