"""Parser pieces that the verbs share."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any


def add_verb(
  verbs, name: str, summary: str, example: str, **defaults: Any
) -> argparse.ArgumentParser:
  """A subparser whose help ends with an example; `defaults` usually hold run=function."""
  parser = verbs.add_parser(
    name,
    help=summary,
    description=summary,
    epilog=f'example:\n  {example}',
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.set_defaults(**defaults)
  return parser


def progress_on_stderr() -> contextlib.AbstractContextManager:
  """Progress lines inside go to stderr: stdout is left to the result."""
  return contextlib.redirect_stdout(sys.stderr)


def print_json(results: Any) -> None:
  """Results on stdout, one JSON object."""
  import json

  from wallwm_jax.evaluation.base import to_plain

  print(json.dumps(to_plain(results), indent=2))


@contextlib.contextmanager
def progress_bar(what: str):
  """A bar on stderr, as a function of (done, all)."""
  import rich.progress
  from rich.console import Console

  columns = (
    rich.progress.TextColumn('{task.description}'), rich.progress.BarColumn(bar_width=20),
    rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn(),
    rich.progress.TimeRemainingColumn(),
  )  # fmt: skip
  with rich.progress.Progress(*columns, console=Console(stderr=True)) as bar:
    task = bar.add_task(what, total=None)
    yield lambda done, total: bar.update(task, completed=done, total=total)
