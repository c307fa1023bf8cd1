"""What a long write has finished, on disk: a killed one continues, a second one at once is refused.

A journal is a hidden folder beside the result with `journal.jsonl`: a line of settings, then a
line per finished shard, each flushed to disk before the next shard begins.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import shutil

from wallwm_jax.data import manifest
from wallwm_jax.types import CorruptStoreError, DataError

_LOG = 'journal.jsonl'


class Journal:
  """The journal of writing `out`; close it when done.

  entries: what earlier runs had finished, in order; each has the manifest entry of its 'shard'.

  Args:
    settings: JSON, all that decides the bytes of the result; 'onto' is the digest of what is added
      to. resume: continue where a run of the
      same settings stopped (or begin, if there was none); otherwise begin anew.
    shards: where the shards are, relative paths of their entries start there.

  Raises:
    DataError: another process is writing, or a run of other settings would be continued.
  """

  def __init__(self, out: pathlib.Path, settings: dict, resume: bool, shards: pathlib.Path | None):
    self.folder = out.parent / f'.{out.name}.building'
    self.folder.mkdir(parents=True, exist_ok=True)
    self._lock = open(self.folder / 'lock', 'w')
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      self._lock.close()
      raise DataError(f'{out}: another process is writing it ({self.folder} is locked).') from None
    self.store = shards or self.folder / 'store'
    self.entries: list[dict] = []
    try:
      self._open(settings, resume)
    except BaseException:
      self._lock.close()
      raise

  def note(self, entry: dict) -> None:
    """Adds a line and flushes it to disk."""
    self._log.write(json.dumps(entry) + '\n')
    self._log.flush()
    os.fsync(self._log.fileno())

  def close(self, keep: bool) -> None:
    """Ends the write; `keep` leaves the journal for a later run to continue."""
    self._log.close()
    if not keep:
      shutil.rmtree(self.folder)
    self._lock.close()

  def _open(self, settings: dict, resume: bool) -> None:
    path, settings = self.folder / _LOG, json.loads(json.dumps(settings))
    lines = _whole_lines(path) if resume and path.is_file() else []
    if lines and lines[0].get('onto') != settings.get('onto'):
      lines = []  # it was finished, or overtaken: what it was added to has changed since
    if lines and lines[0] != settings:
      changed = [k for k in settings | lines[0] if settings.get(k) != lines[0].get(k)]
      raise DataError(
        f'{self.folder}: an interrupted write with other settings ({", ".join(changed)}) cannot be '
        'continued. Use its settings, or start anew without resume.'
      )
    for entry in lines[1:]:
      try:
        manifest.check_size(self.store, entry['shard'])
        manifest.check_digest(self.store, entry['shard'])
      except CorruptStoreError:
        break  # this shard and those after it are written again
      self.entries.append(entry)
    if not lines:
      shutil.rmtree(self.folder / 'store', ignore_errors=True)
    temporary = path.with_suffix('.tmp')
    with open(temporary, 'w') as f:
      f.writelines(json.dumps(line) + '\n' for line in [settings, *self.entries])
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
    self._log = open(path, 'a')


def _whole_lines(path: pathlib.Path) -> list[dict]:
  """The lines before the one that a crash cut short."""
  found = []
  for line in path.read_text().splitlines():
    try:
      found.append(json.loads(line))
    except ValueError:
      break
  return found
