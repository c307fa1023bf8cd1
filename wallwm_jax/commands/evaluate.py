"""`wallwm eval openloop|video|closedloop|language`: scores of a trained run, printed and written as
JSON; `wallwm eval compare`: two such files side by side."""

from __future__ import annotations

import argparse

from wallwm_jax.commands import common, worlds

EXAMPLES = 4  # events shown on a page


def add_parser(verbs) -> None:
  group = verbs.add_parser('eval', help='score a trained run', allow_abbrev=False)
  kinds = group.add_subparsers(dest='kind', required=True, metavar='kind')
  for name, run, summary in (
    ('openloop', openloop, 'action error per held-out event beside hold-still and the mean action'),
    ('video', video, 'PSNR and SSIM of predicted video beside copy-last-frame and the codec'),
    ('closedloop', closedloop, 'success and progress of whole attempts in the tabletop'),
    ('language', language, 'next event, remaining time and reconstructed reasoning of a VLM'),
  ):
    example = f'wallwm eval {name} --workdir runs/joint --store runs/store --json {name}.json'
    if name == 'closedloop':
      example += (
        '\n  wallwm eval closedloop --workdir runs/stage4 --store runs/store --tasks multi '
        '--source planner'
        '\n  wallwm eval closedloop --world metaworld --workdir runs/mt10 --store stores/mt10 '
        '--tasks MT10 --episodes 100'
      )
    parser = common.add_verb(kinds, name, summary, example, run=run)
    parser.add_argument('--workdir', required=True, help='trained run')
    parser.add_argument('--json', help='file for the scores (default: print only)')
    parser.add_argument('--seed', type=int, default=0, help='noise, and scenes of closedloop (0)')
    if name != 'language':
      parser.add_argument('--html', help='file for the scores as a page')
    if name == 'closedloop':
      worlds.add_arguments(parser)
      parser.add_argument(
        '--episodes', type=int,
        help='attempts, shared by kinds of task (tabletop 98, metaworld 10 of each task)',
      )  # fmt: skip
      parser.add_argument(
        '--cache', metavar='DIR', help='folder of this user that keeps compiled programs (none)'
      )
      parser.add_argument(
        '--delays', default='0', help='control steps of policy latency; several as 0,2,4 (0)'
      )
      parser.add_argument(
        '--waiting',
        choices=('hold', 'run', 'both'),
        default='hold',
        help='what the robot does meanwhile: hold still, or run on along the chunk before (hold)',
      )
    else:
      parser.add_argument('--store', required=True, help='event store')
      parser.add_argument('--split', default='heldout', help='split of the store (heldout)')
      parser.add_argument('--limit', type=int, help='at most this many events (all)')
    if name == 'openloop':
      parser.add_argument(
        '--action-steps', help='also the action error at these numbers of denoising steps, as 1,2,4'
      )
  parser = common.add_verb(
    kinds,
    'latency',
    'milliseconds of one prediction and of its parts, the first call apart',
    'wallwm eval latency --workdir runs/joint --json latency.json',
    run=latency,
  )
  parser.add_argument('--workdir', required=True, help='trained run')
  parser.add_argument('--calls', type=int, default=200, help='timed calls of each part (200)')
  parser.add_argument(
    '--cold', action='store_true', help='also start fresh processes and time their first chunk'
  )
  parser.add_argument('--json', help='file for the scores (default: print only)')
  parser.add_argument('--html', help='file for the scores as a page')
  parser = common.add_verb(
    kinds,
    'compare',
    'two JSON files of openloop or closedloop, row against row',
    'wallwm eval compare event.json unified.json --html compare.html',
    run=compare,
  )
  parser.add_argument('first', help='JSON file of an evaluation')
  parser.add_argument('second', help='another of the same suite')
  parser.add_argument('--json', help='file for the differences (default: print only)')
  parser.add_argument('--html', help='file for the differences as a page')


def openloop(args: argparse.Namespace) -> None:
  import dataclasses

  from wallwm_jax.commands import action_checks, pages
  from wallwm_jax.commands.evaluators import (
    Windows,
    action_predictor,
    action_traces,
    evaluate_actions,
  )
  from wallwm_jax.evaluation.report import write_report

  counts = _counts(args.action_steps, '--action-steps', 1)

  def evaluator(config, params, store, *, split, limit, seed):
    result = evaluate_actions(config, params, store, split=split, limit=limit, seed=seed)
    windows = Windows(config, store, params.norm, split, limit)
    checks = action_checks.image_sensitivity(windows, action_predictor(config, params, seed))
    checks |= action_checks.duration_error(store, split)
    if counts:
      checks['by_action_steps'] = action_checks.denoising_curve(windows, params, counts, seed)
    # What the errors are of: whole events, cut to the longest bucket, or fixed chunks.
    seen = {'window': config.data.window, 'buckets': list(config.data.buckets)}
    if args.html:
      few = dataclasses.replace(windows, limit=EXAMPLES)
      page = pages.open_loop_page(
        result, checks, action_traces(few, params, seed), config, _asked(args)
      )
      write_report(args.html, page)
    return result.to_json() | checks, result.rows, seen

  scores, rows, seen = _on_store(args, evaluator)
  asked = {'split': args.split, 'limit': args.limit, 'store': args.store} | seen
  _report(args, scores, suite={'kind': 'openloop', 'seed': args.seed} | asked, rows=rows)


def _counts(text: str | None, name: str, least: int) -> list[int]:
  """'1,2,4' as numbers of steps, none below `least`; ConfigError where it is something else."""
  from wallwm_jax.types import ConfigError

  parts = text.split(',') if text else []
  if not all(part.isdecimal() and int(part) >= least for part in parts):
    raise ConfigError(f'{name}: expected numbers >= {least} such as 1,2,4, got {text!r}.')
  return [int(part) for part in parts]


def video(args: argparse.Namespace) -> None:
  import dataclasses

  from wallwm_jax.commands import pages
  from wallwm_jax.commands.evaluators import (
    Windows,
    action_predictor,
    evaluate_video,
    video_predictor,
    video_strips,
  )
  from wallwm_jax.commands.video_checks import Geometry, caption_gap
  from wallwm_jax.evaluation.report import write_report
  from wallwm_jax.evaluation.video import to_json

  def evaluator(config, params, store, *, split, limit, seed):
    windows = Windows(config, store, params.norm, split, limit)
    geometry = Geometry(windows, action_predictor(config, params, seed))
    results = evaluate_video(
      config, params, store, split=split, limit=limit, seed=seed, watch=geometry.watch
    )
    checks = {'gripper_px': geometry.to_json()}
    checks |= caption_gap(windows, video_predictor(config, params, seed=seed))
    if args.html:
      few = dataclasses.replace(windows, limit=EXAMPLES)
      strips = video_strips(few, params, seed=seed)
      write_report(args.html, pages.video_page(results, checks, strips, config, _asked(args)))
    return to_json(results) | checks

  _report(args, _on_store(args, evaluator))


def _asked(args: argparse.Namespace) -> str:
  limit = '' if args.limit is None else f', at most {args.limit} events'
  return f'{args.workdir} on the {args.split} split of {args.store}{limit}, seed {args.seed}.'


def _on_store(args: argparse.Namespace, evaluator):
  from wallwm_jax.data.store import EventStore
  from wallwm_jax.training.checkpoints import load_inference

  store = EventStore(args.store)
  config, params = load_inference(args.workdir)
  return evaluator(config, params, store, split=args.split, limit=args.limit, seed=args.seed)


def language(args: argparse.Namespace) -> None:
  from wallwm_jax.commands import language_scores as scores
  from wallwm_jax.data.moments import caption_bank
  from wallwm_jax.data.store import EventStore
  from wallwm_jax.training.checkpoints import load_inference

  store = EventStore(args.store)
  config, params = load_inference(args.workdir, captions=caption_bank(store))
  seen = scores.Moments(config, params, store, split=args.split, limit=args.limit)
  _report(args, scores.evaluate(seen))


def closedloop(args: argparse.Namespace) -> None:
  from wallwm_jax.evaluation.closed_loop import mcnemar
  from wallwm_jax.evaluation.report import write_report
  from wallwm_jax.inference.programs import Programs

  programs = Programs(args.cache)
  world = worlds.World(args)
  ways = ('hold', 'run') if args.waiting == 'both' else (args.waiting,)
  runs = [
    world.attempt(delay=delay, waiting=way)
    for delay in _counts(args.delays, '--delays', 0)
    for way in (ways if delay else ways[:1])  # without latency there is nothing to wait for
  ]
  programs.seal()
  attempts = runs[0]
  shared = {'tasks': world.tasks, 'max_steps': world.max_steps}
  asked = shared | {'untrained': args.untrained, 'source': attempts.source}
  asked |= {'delay': attempts.delay, 'waiting': attempts.waiting}
  scores = attempts.score().to_json() | attempts.motion() | asked
  if len(runs) > 1:
    scores['by_delay'] = [
      {'delay': run.delay, 'waiting': run.waiting}
      | run.score().to_json()
      | run.motion()
      | {'mcnemar_p': mcnemar(attempts.rollouts.success, run.rollouts.success)}
      for run in runs
    ]
  if args.html:
    write_report(args.html, world.page(runs))
  suite = {'kind': 'closedloop', 'seed': args.seed, 'episodes': len(attempts.kinds)} | shared
  _report(args, scores, suite=suite | attempts.suite, rows=attempts.rows())


def latency(args: argparse.Namespace) -> None:
  from wallwm_jax.commands import cold_start, pages
  from wallwm_jax.commands.evaluators import measure_latency
  from wallwm_jax.evaluation.base import to_plain
  from wallwm_jax.evaluation.report import write_report
  from wallwm_jax.training.checkpoints import load_inference
  from wallwm_jax.types import ConfigError

  if args.calls < 1:
    raise ConfigError(f'--calls: expected at least one, got {args.calls}.')
  config, params = load_inference(args.workdir)
  measured = measure_latency(config, params, calls=args.calls)
  if args.cold:
    measured['cold_start'] = cold_start.measure(args.workdir)
  if args.html:
    subtitle = f'{args.workdir}, one observation at a time.'
    write_report(args.html, pages.latency_page(measured, config, subtitle))
  times = {name: part.times_ms for name, part in measured['parts'].items()}
  rows = [dict(zip(times, row)) for row in zip(*times.values(), strict=True)]
  parts = {
    name: {key: value for key, value in to_plain(part).items() if key != 'times_ms'}
    | {'hz': part.hz}
    for name, part in measured['parts'].items()
  }
  # What this process waited for before its first chunk, the loading of weights not counted.
  first = sum(parts[name]['first_ms'] for name in ('encode the observation', 'whole prediction'))
  scores = measured | {'parts': parts, 'first_chunk_ms': first}
  _report(args, scores, suite={'kind': 'latency', 'calls': args.calls}, rows=rows)


def compare(args: argparse.Namespace) -> None:
  import pathlib

  from wallwm_jax.evaluation import compare as comparison
  from wallwm_jax.evaluation.base import write_json

  first, second = (_read(path) for path in (args.first, args.second))
  differences = comparison.compare(first, second)
  found = {'suite': first['suite'], 'first': args.first, 'second': args.second}
  found['metrics'] = comparison.to_json(differences)
  if args.html:
    out = pathlib.Path(args.html)
    out.parent.mkdir(parents=True, exist_ok=True)
    names = (args.first, args.second)
    out.write_text(comparison.render(differences, names, first['suite']), encoding='utf-8')
  if args.json:
    write_json(args.json, found)
  common.print_json(found)


def _read(path: str) -> dict:
  """An evaluation file; DataError where it is no JSON object."""
  import json
  import pathlib

  from wallwm_jax.types import DataError

  try:
    found = json.loads(pathlib.Path(path).read_text())
  except ValueError as error:
    raise DataError(f'{path}: expected the JSON of an evaluation, got {error}.') from error
  if not isinstance(found, dict):
    raise DataError(f'{path}: expected a JSON object, got {type(found).__name__}.')
  return found


def _report(args: argparse.Namespace, scores: dict, suite: dict | None = None, rows=()) -> None:
  """Prints scores; the file also says what was asked (suite) and has a row per event or attempt."""
  from wallwm_jax.evaluation.base import environment, write_json

  if args.json:
    more = {'suite': suite, 'rows': rows} if suite else {}
    whole = scores | more | {'workdir': args.workdir, 'environment': environment()}
    write_json(args.json, whole)
  common.print_json(scores)
