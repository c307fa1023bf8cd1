"""`wallwm quickstart`: collect, train, act and report, from nothing."""

from __future__ import annotations

import argparse

from wallwm_jax.commands import common


def add_parser(verbs) -> None:
  parser = common.add_verb(
    verbs,
    'quickstart',
    'collect demonstrations, train a small model, evaluate it and write a report',
    'wallwm quickstart --out runs/quickstart',
    run=run,
  )
  parser.add_argument(
    '--size', choices=('full', 'ci'), default='full', help='ci: a few minutes, weak model'
  )
  parser.add_argument('--out', default='runs/quickstart', help='output folder (runs/quickstart)')


def run(args: argparse.Namespace) -> None:
  from wallwm_jax.commands import tour

  tour.run(args.size, args.out)
