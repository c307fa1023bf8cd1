"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from wallwm_jax.types import CheckpointError


def check_new(out: str | os.PathLike) -> pathlib.Path:
  """The absolute path of a folder that is still to be written.

  Raises:
    CheckpointError: it exists and is not an empty folder.
  """
  out = pathlib.Path(out).absolute()
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise CheckpointError(f'{out}: expected a new folder, but this exists. Name another one.')
  return out


@contextlib.contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A hidden folder beside `out` that becomes `out` by one rename when the block ends well.

  An error removes it; what a killed run left is removed by the next one.

  Raises:
    CheckpointError: `out` exists, or another run is writing it.
  """
  out = check_new(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  work = out.parent / f'.{out.name}.partial'
  work.mkdir(exist_ok=True)
  lock = os.open(work, os.O_RDONLY)
  try:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise CheckpointError(f'{out}: another run is writing it (in {work}).') from error
    try:
      _empty(work)
      yield work
      if out.exists():
        out.rmdir()
      os.rename(work, out)
    except BaseException:
      shutil.rmtree(work, ignore_errors=True)
      raise
  finally:
    os.close(lock)


def _empty(folder: pathlib.Path) -> None:
  """Removes what is inside; the folder itself is what the lock is on."""
  for path in folder.iterdir():
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink()
