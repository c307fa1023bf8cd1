"""`wallwm <verb>`: parses, calls one verb, turns expected errors into one clear message and exit
code 1."""

from __future__ import annotations

import argparse
import glob
import logging
import os
import sys

from wallwm_jax.commands import (
  bench,
  convert,
  data,
  evaluate,
  export,
  quantize,
  quickstart,
  rollout,
  serve,
  tiny_vlm,
  train,
)

VERBS = (quickstart, data, convert, tiny_vlm, train, evaluate, rollout, quantize, export, serve)
VERBS += (bench,)
TAKES_OVERRIDES = 'overrides'  # set by verbs that accept --config.section.field=value


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='wallwm',
    description='Train, evaluate and export event-grounded world action models.',
    epilog='Every verb has its own --help with an example.',
    allow_abbrev=False,
  )
  parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='verb')
  for verb in VERBS:
    verb.add_parser(verbs)
  return parser


def main(argv: list[str] | None = None) -> int:
  """Runs one verb; returns the exit code (0 done, 1 refused or failed; argparse exits with 2)."""
  if not glob.glob('/dev/accel*') and not glob.glob('/dev/vfio/*'):
    # Without a TPU, its compiler (installed for compile checks) would ask the cloud and complain.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  parser = make_parser()
  args, rest = parser.parse_known_args(argv)
  if hasattr(args, TAKES_OVERRIDES):
    args.overrides = rest
  elif rest:
    parser.error(f'unknown argument {rest[0]!r} (see wallwm {args.verb} --help)')
  # Orbax tells through absl what it does on the way; what goes wrong it raises.
  logging.getLogger('absl').setLevel(logging.DEBUG if args.debug else logging.ERROR)
  if args.debug:
    args.run(args)
    return 0
  from wallwm_jax.types import WallWMError

  try:
    args.run(args)
  except (WallWMError, OSError) as error:
    print(f'wallwm {args.verb}: {type(error).__name__}: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(f'\nwallwm {args.verb}: stopped; what was saved before is complete.', file=sys.stderr)
    return 130
  return 0


if __name__ == '__main__':
  sys.exit(main())
