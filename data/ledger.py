"""The ledger: every episode that was read is stored, quarantined or rejected, and nothing else.

  read = stored + quarantined + rejected      and the same for their events
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

from wallwm_jax.data.index import numbered
from wallwm_jax.data.schema import EpisodeRecord, Quarantined
from wallwm_jax.types import CorruptStoreError, DataError

FILES = {'quarantined': 'quarantine.jsonl', 'rejected': 'rejected.jsonl'}


@dataclasses.dataclass(frozen=True)
class Rejected:
  """An episode that is sound but not wanted (a second one of the same id), and why."""

  episode_id: str
  source: str
  reason: str


class DuplicateError(DataError):
  """An episode of an id that the store has already."""


class Ledger:
  """What became of everything read.

  Args:
    counts: those of the store that is added to; entries: its lines by kind.
  """

  def __init__(self, counts: dict | None = None, entries: dict[str, list[dict]] | None = None):
    counts = counts or {}
    self.read = counts.get('read', 0)
    self.events_read = counts.get('events_read', counts.get('events', 0))
    self.entries = {kind: list((entries or {}).get(kind, ())) for kind in FILES}

  def note(self, kind: str, entry: Quarantined | Rejected, events: int) -> dict:
    """The line of an episode of `events` known events that is not stored."""
    line = {**vars(entry), 'events': events}
    self.entries[kind].append(line)
    return line

  def restore(self, journalled: dict) -> None:
    """Adds what a line of a journal (see store_writer.py) says was settled."""
    self.read += len(journalled['episodes'])
    self.events_read += len(journalled['events'])
    for kind in FILES:
      self.read += len(journalled[kind])
      self.events_read += _events(journalled[kind])
      self.entries[kind] += journalled[kind]

  def counts(self, episodes: int, events: int, frames: int) -> dict[str, int]:
    """The manifest's counts, with what the index has."""
    lost = {f'events_{kind}': _events(lines) for kind, lines in self.entries.items()}
    return {
      'read': self.read,
      'episodes': episodes,
      **{kind: len(lines) for kind, lines in self.entries.items()},
      'events_read': self.events_read,
      'events': events,
      **lost,
      'frames': frames,
    }

  def save(self, root: pathlib.Path, write: int) -> dict[str, int]:
    """Writes the file of each kind below `root`; the lines of each file."""
    rows = {}
    for kind, name in FILES.items():
      lines = [json.dumps(line) + '\n' for line in self.entries[kind]]
      (root / numbered(name, write)).write_text(''.join(lines))
      rows[numbered(name, write)] = len(lines)
    return rows


def load(root: pathlib.Path, write: int) -> dict[str, list[dict]]:
  """The lines of each kind; none of a kind that an older version did not know."""
  found = {}
  for kind, name in FILES.items():
    path = root / numbered(name, write)
    lines = path.read_text().splitlines() if path.is_file() else ()
    found[kind] = [json.loads(line) for line in lines]
  return found


def entry(kind: str, line: dict) -> Quarantined | Rejected:
  """The entry that a line was made of."""
  fields = {key: line[key] for key in ('episode_id', 'source', 'reason')}
  return Quarantined(**fields) if kind == 'quarantined' else Rejected(**fields)


def events_of(item) -> int:
  """Events known of something read: those of an episode, none of one that could not be read."""
  return len(item.events) if isinstance(item, EpisodeRecord) else 0


def check(counts: dict[str, int], where) -> None:
  """Raises CorruptStoreError unless the counts of a manifest add up."""
  for read, parts in (
    ('read', ('episodes', 'quarantined', 'rejected')),
    ('events_read', ('events', 'events_quarantined', 'events_rejected')),
  ):
    found = {part: counts.get(part, 0) for part in parts}
    if read in counts and counts[read] != sum(found.values()):
      raise CorruptStoreError(
        f'store {where}: the ledger does not add up: {read} = {counts[read]}, but {found}.'
      )


def _events(lines: list[dict]) -> int:
  return sum(line.get('events', 0) for line in lines)
