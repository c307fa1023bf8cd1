"""`wallwm train`: one stage of one experiment, resumed where its workdir stopped."""

from __future__ import annotations

import argparse
import os

from wallwm_jax.commands import common, settings


def add_parser(verbs) -> None:
  example = (
    'wallwm train --config experiments/bridge_sample.py --workdir runs/bridge '
    '--config.data.store=runs/bridge/store --config.optim.lr=1e-4'
  )
  parser = common.add_verb(
    verbs, 'train', 'train one stage; run it again to resume', example, run=run, overrides=[]
  )
  parser.add_argument('--config', required=True, help='experiment file that defines get_config()')
  parser.add_argument('--workdir', help='checkpoints, statistics and metrics; created if missing')
  parser.add_argument(
    '--dry-run', action='store_true', help='print parameters, routing and shardings only'
  )
  parser.add_argument('--quiet', action='store_true', help='no progress line')


def run(args: argparse.Namespace) -> None:
  from wallwm_jax.parallel import distributed
  from wallwm_jax.training import loop
  from wallwm_jax.types import ConfigError

  config = settings.load_experiment(args.config, args.overrides)
  distributed.initialize(os.environ)
  if args.dry_run:
    print(loop.dry_run(config))
    return
  if not args.workdir:
    raise ConfigError('--workdir: expected a folder for checkpoints and metrics, got none.')
  if not config.data.store:
    raise ConfigError(
      'config.data.store: expected an event store, got none. Add --config.data.store=DIR.'
    )
  with common.progress_on_stderr():
    result = loop.train(config, args.workdir, progress=not args.quiet)
  last = {k: v for k, v in result.history[-1].items() if k != 'step'} if result.history else {}
  common.print_json(
    {'step': result.step, 'workdir': result.workdir, 'checkpoint': result.checkpoint} | last
  )
