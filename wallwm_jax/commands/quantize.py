"""`wallwm quantize`: a trained run with the weights of its blocks in eight bits."""

from __future__ import annotations

import argparse

from wallwm_jax.commands import common


def add_parser(verbs) -> None:
  parser = common.add_verb(
    verbs,
    'quantize',
    'write a run in int8 or FP8 that eval, rollout, serve and export take, and what it loses',
    'wallwm quantize --workdir runs/stage2 --store runs/store --out runs/stage2-int8 '
    '--recipe int8 --report int8.json int8.html',
    run=run,
  )
  parser.add_argument('--workdir', required=True, help='trained run')
  parser.add_argument('--store', required=True, help='event store to calibrate and report on')
  parser.add_argument('--out', help='new folder of the quantised run (default: only report)')
  parser.add_argument(
    '--recipe', default='int8', choices=('int8', 'fp8', 'int8-weights', 'fp8-weights'),
    help='weights and inputs, or weights alone (int8)',
  )  # fmt: skip
  parser.add_argument(
    '--block', type=int,
    help='input channels that share a scale; fewer are more accurate and slower (all of a matrix)',
  )  # fmt: skip
  parser.add_argument(
    '--tolerance', type=float, help='largest relative error of a matrix that is quantised (0.1)'
  )
  parser.add_argument(
    '--keep', action='append', metavar='REGEX',
    help='parameters that stay as they are, such as video/blocks/ffn; may be repeated',
  )  # fmt: skip
  parser.add_argument(
    '--calibrate', type=int, default=64, help='events of the training split to calibrate on (64)'
  )
  parser.add_argument('--limit', type=int, help='held-out events of the report (all)')
  parser.add_argument('--seed', type=int, default=0, help='noise of calibration and report (0)')
  parser.add_argument(
    '--report', nargs='+', default=[], metavar='FILE', help='.json and .html files of the report'
  )


def run(args: argparse.Namespace) -> None:
  import functools
  import pathlib

  from wallwm_jax.commands import accuracy
  from wallwm_jax.commands.evaluators import Windows, action_predictor
  from wallwm_jax.data.store import EventStore
  from wallwm_jax.evaluation.base import environment, write_json
  from wallwm_jax.inference.calibrate import calibrate
  from wallwm_jax.inference.quantize import quantize
  from wallwm_jax.training import checkpoints
  from wallwm_jax.types import ConfigError
  from wallwm_jax.weights import check_new

  reports = [pathlib.Path(path) for path in args.report]
  if wrong := [str(path) for path in reports if path.suffix not in ('.json', '.html')]:
    raise ConfigError(f'--report: expected files ending in .json or .html, got {wrong}.')
  if not args.out and not reports:
    raise ConfigError('wallwm quantize: expected --out, --report or both, got neither.')
  if args.calibrate < 1:
    raise ConfigError(f'--calibrate: expected at least one event, got {args.calibrate}.')
  recipe = _recipe(args)
  if args.out:
    check_new(args.out)
  store = EventStore(args.store)
  step = checkpoints.latest_step(args.workdir)
  config, reference = checkpoints.load_inference(args.workdir, step)
  seen = Windows(config, store, reference.norm, 'train', args.calibrate)
  predict = functools.partial(action_predictor, config, seed=args.seed)
  model, chosen = quantize(reference, recipe, calibrate(reference, predict, seen.batches()))
  if args.out:
    checkpoints.save_quantised(args.out, config, model, chosen, step)
  summary = {'out': args.out, 'recipe': args.recipe, 'step': step}
  summary |= {'kept': [path for path, choice in chosen.choices.items() if choice.kept]}
  if reports:
    windows = Windows(config, store, reference.norm, 'heldout', args.limit)
    found = accuracy.accuracy_report(
      config, reference, model, chosen, windows, seed=args.seed
    )
    suite = {'kind': 'quantize', 'store': args.store, 'calibrate': args.calibrate,
             'limit': args.limit, 'seed': args.seed}  # fmt: skip
    whole = {'recipe': chosen.to_json()['recipe'], 'suite': suite, 'workdir': args.workdir}
    for path in reports:
      if path.suffix == '.json':
        write_json(path, found | whole | {'environment': environment()})
      else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(accuracy.render(found, f'{args.workdir} as {args.recipe}.'), 'utf-8')
    summary |= {name: found[name] for name in ('n', 'actions', 'blocks', 'bytes')}
  common.print_json(summary)


def _recipe(args: argparse.Namespace):
  """The recipe of --recipe with what the other options change."""
  import dataclasses

  from wallwm_jax.inference.quantize import RECIPES

  changed = {}
  if args.block is not None:
    changed['block'] = args.block
  if args.tolerance is not None:
    changed['tolerance'] = args.tolerance
  if args.keep:
    changed['keep'] = tuple(args.keep)
  return dataclasses.replace(RECIPES[args.recipe], **changed)
