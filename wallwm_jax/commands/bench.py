"""`wallwm bench NAME`: runs benchmarks/NAME.py of the checkout, which prints one JSON line per
claim."""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

from wallwm_jax.commands import common

FOLDER = pathlib.Path('benchmarks')


def add_parser(verbs) -> None:
  parser = common.add_verb(
    verbs,
    'bench',
    'run a benchmark of the checkout',
    'wallwm bench action_draws -- --steps 20',
    run=run,
  )
  parser.add_argument('name', help=f'a file in {FOLDER}/, without .py')
  parser.add_argument(
    'arguments', nargs='*', metavar='-- arguments', help='passed on to the benchmark'
  )


def run(args: argparse.Namespace) -> None:
  from wallwm_jax.config import nearest
  from wallwm_jax.types import ConfigError, WallWMError

  path = FOLDER / f'{args.name}.py'
  if not path.is_file():
    names = sorted(p.stem for p in FOLDER.glob('*.py') if not p.name.startswith('_'))
    hint = nearest(args.name, names) if names else ' Run it from the root of a checkout.'
    raise ConfigError(f'bench {args.name}: expected {path}, found none.{hint}')
  code = subprocess.run([sys.executable, str(path), *args.arguments], check=False).returncode
  if code:
    raise WallWMError(f'{path} failed with exit code {code}.')
