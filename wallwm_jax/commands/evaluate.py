"""`wallwm eval openloop|video|closedloop`: scores of a trained run, printed and written as JSON."""

from __future__ import annotations

import argparse

from wallwm_jax.commands import common


def add_parser(verbs) -> None:
  group = verbs.add_parser('eval', help='score a trained run', allow_abbrev=False)
  kinds = group.add_subparsers(dest='kind', required=True, metavar='kind')
  for name, run, summary in (
    ('openloop', openloop, 'action error per held-out event beside hold-still and the mean action'),
    ('video', video, 'PSNR and SSIM of predicted video beside copy-last-frame and the codec'),
    ('closedloop', closedloop, 'success and progress of whole attempts in the tabletop'),
  ):
    example = f'wallwm eval {name} --workdir runs/joint --store runs/store --json {name}.json'
    parser = common.add_verb(kinds, name, summary, example, run=run)
    parser.add_argument('--workdir', required=True, help='trained run')
    parser.add_argument('--json', help='file for the scores (default: print only)')
    parser.add_argument('--seed', type=int, default=0, help='noise, and scenes of closedloop (0)')
    if name == 'closedloop':
      add_world(parser)
      parser.add_argument('--episodes', type=int, default=98, help='attempts, shared by kinds (98)')
    else:
      parser.add_argument('--store', required=True, help='event store')
      parser.add_argument('--split', default='heldout', help='split of the store (heldout)')
      parser.add_argument('--limit', type=int, help='at most this many events (all)')


def add_world(parser: argparse.ArgumentParser, required: bool = True) -> None:
  """Arguments of everything that acts in the tabletop."""
  parser.add_argument('--store', required=required, help='event store; says how long events last')
  parser.add_argument(
    '--tasks', default='single', help='single, multi, or kinds such as reach,push (single)'
  )
  parser.add_argument('--max-steps', type=int, default=64, help='control steps of an attempt (64)')
  parser.add_argument(
    '--source',
    choices=('instruction', 'atomic'),
    default='instruction',
    help='unified mode: text of each chunk (instruction)',
  )
  parser.add_argument('--untrained', action='store_true', help='random weights instead')


def openloop(args: argparse.Namespace) -> None:
  from wallwm_jax.commands.evaluators import evaluate_actions

  _report(args, _on_store(args, evaluate_actions).to_json())


def video(args: argparse.Namespace) -> None:
  from wallwm_jax.commands.evaluators import evaluate_video
  from wallwm_jax.evaluation.video import to_json

  _report(args, to_json(_on_store(args, evaluate_video)))


def _on_store(args: argparse.Namespace, evaluator):
  from wallwm_jax.data.store import EventStore
  from wallwm_jax.training.checkpoints import load_inference

  store = EventStore(args.store)
  config, params = load_inference(args.workdir)
  return evaluator(config, params, store, split=args.split, limit=args.limit, seed=args.seed)


def closedloop(args: argparse.Namespace) -> None:
  per_kind = max(1, args.episodes // len(_task_kinds(args.tasks)))
  result = run_attempts(args, per_kind).score()
  asked = {'tasks': args.tasks, 'max_steps': args.max_steps, 'untrained': args.untrained}
  _report(args, result.to_json() | asked)


def _task_kinds(chosen: str) -> tuple[str, ...]:
  """Kinds named on the command line: 'single', 'multi' or a comma-separated list."""
  from wallwm_jax.envs.tabletop import tasks

  groups = {'single': tasks.SINGLE_KINDS, 'multi': tasks.MULTI_KINDS}
  return groups.get(chosen) or tuple(chosen.split(','))


def run_attempts(args: argparse.Namespace, per_kind: int, record: bool = False):
  """The attempts that the arguments of `add_world` describe."""
  import jax

  from wallwm_jax.commands import attempts
  from wallwm_jax.data.store import EventStore
  from wallwm_jax.envs.tabletop import tasks
  from wallwm_jax.training.checkpoints import load_inference

  suite = tasks.task_suite(jax.random.key(args.seed), _task_kinds(args.tasks), per_kind)
  store = EventStore(args.store)
  config, params = load_inference(args.workdir)
  if args.untrained:
    params = attempts.untrained(config, params, args.seed)
  return attempts.attempt(
    config,
    params,
    suite,
    attempts.caption_table(config, store),
    max_steps=args.max_steps,
    seed=args.seed,
    source=args.source,
    record=record,
  )


def _report(args: argparse.Namespace, scores: dict) -> None:
  from wallwm_jax.evaluation.base import environment, write_json

  if args.json:
    write_json(args.json, scores | {'workdir': args.workdir, 'environment': environment()})
  common.print_json(scores)
