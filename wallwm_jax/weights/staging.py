"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

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
def new_folder(
  out: str | os.PathLike, check: Callable[[pathlib.Path], object] = check_new
) -> Iterator[pathlib.Path]:
  """A hidden folder beside `out` that becomes `out` by one rename when the block ends well.

  An error removes it; what a killed run left is removed by the next one.

  Args:
    check: raises where `out` may not be written. What it lets pass stands aside as .NAME.replaced
      until the new folder is in its place, and is removed then; should a run be killed just there,
      the next one puts it back.

  Raises:
    CheckpointError: `check` says so, or another run is writing `out`.
  """
  out = pathlib.Path(out).absolute()
  if (aside := _aside(out)).exists() and not out.exists():
    os.rename(aside, out)
  check(out)
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
      _take_place(work, out)
    except BaseException:
      shutil.rmtree(work, ignore_errors=True)
      raise
  finally:
    os.close(lock)


def _take_place(work: pathlib.Path, out: pathlib.Path) -> None:
  aside = _aside(out)
  if out.exists():
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(out, aside)
  try:
    os.rename(work, out)
  except OSError:
    if aside.exists():
      os.rename(aside, out)
    raise
  shutil.rmtree(aside, ignore_errors=True)


def _aside(out: pathlib.Path) -> pathlib.Path:
  return out.parent / f'.{out.name}.replaced'


def _empty(folder: pathlib.Path) -> None:
  """Removes what is inside; the folder itself is what the lock is on."""
  for path in folder.iterdir():
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink()
