"""Builds an event store from any reader."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Sized

from rich.progress import (
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

from wallwm_jax.data.schema import EpisodeRecord, Quarantined
from wallwm_jax.data.store import EpisodeStoreWriter
from wallwm_jax.types import DataError


def build_store(
  episodes: Iterable[EpisodeRecord | Quarantined],
  out: str | os.PathLike,
  *,
  heldout: float = 0.1,
  total: int | None = None,
  progress: bool = True,
) -> dict:
  """Stores every valid episode, quarantines the others with their reason.

  Args:
    episodes: a reader; what it yields as Quarantined, and records that break the schema, are
      noted, not stored.
    out: new directory of the store; heldout: fraction of episodes of the 'heldout' split.
    total: how many episodes to expect (for the progress bar; default len(episodes) where it has
      one).

  Returns:
    {'store', 'read', 'episodes', 'quarantined', 'events', 'frames', 'reasons': {reason: count}}.

  Raises:
    DataError: nothing could be stored, or `out` is taken; no store is left behind.
  """
  if total is None and isinstance(episodes, Sized):
    total = len(episodes)
  reasons: collections.Counter[str] = collections.Counter()
  columns = (
    *Progress.get_default_columns()[:2],
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    TextColumn('{task.fields[bad]} quarantined'),
  )
  with EpisodeStoreWriter(out, heldout) as writer, Progress(*columns, disable=not progress) as bar:
    task = bar.add_task('episodes', total=total, bad=0)
    for item in episodes:
      entry = _store(writer, item)
      if entry is not None:
        writer.quarantine(entry)
        reasons[entry.reason] += 1
      bar.update(task, advance=1, bad=reasons.total())
    counts = writer.counts()
    if not counts['episodes']:
      raise DataError(f'no valid episode among {counts["read"]} read; reasons: {dict(reasons)}.')
  return {'store': str(out), **counts, 'reasons': dict(reasons)}


def _store(writer: EpisodeStoreWriter, item: EpisodeRecord | Quarantined) -> Quarantined | None:
  if isinstance(item, Quarantined):
    return item
  try:
    writer.add(item)
  except DataError as error:
    return Quarantined(item.episode_id, item.source, str(error))
  return None
