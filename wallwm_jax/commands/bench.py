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
    'wallwm bench muon --topology v5p:4x4x4 --json muon.json',
    run=run,
  )
  parser.add_argument('name', help=f'a file in {FOLDER}/, without .py')
  parser.add_argument(
    'arguments', nargs=argparse.REMAINDER, metavar='arguments', help='passed on to the benchmark'
  )


def run(args: argparse.Namespace) -> None:
  from wallwm_jax.config import nearest
  from wallwm_jax.types import ConfigError, WallWMError

  path = FOLDER / f'{args.name}.py'
  if not path.is_file():
    names = sorted(p.stem for p in FOLDER.glob('*.py') if not p.name.startswith('_'))
    hint = nearest(args.name, names) if names else ' Run it from the root of a checkout.'
    raise ConfigError(f'bench {args.name}: expected {path}, found none.{hint}')
  passed = args.arguments[args.arguments[:1] == ['--'] :]
  code = subprocess.run([sys.executable, str(path), *passed], check=False).returncode
  if code:
    raise WallWMError(f'{path} failed with exit code {code}.')
