"""`wallwm serve`: a policy behind openpi's websocket protocol."""

from __future__ import annotations

import argparse
import time

from wallwm_jax.commands import common

_BEGUN = time.monotonic()  # the command line imports its verbs before anything else


def add_parser(verbs) -> None:
  parser = common.add_verb(
    verbs,
    'serve',
    "serve a policy over openpi's websocket protocol, for robots and simulators",
    'wallwm serve --workdir runs/quickstart/stage2 --view front=observation/image --port 8000',
    run=run,
  )
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument('--workdir', help='trained run')
  which.add_argument('--artifact', help='folder that `wallwm export` wrote')
  which.add_argument('--echo', action='store_true', help='no model: every action is the state')
  parser.add_argument(
    '--modes',
    nargs='+',
    choices=('event', 'chunk'),
    default=('event',),
    help='what sessions may ask for, the first unless they do (event)',
  )
  parser.add_argument(
    '--bucket', type=int, help="event mode: future latents (the run's longest bucket)"
  )
  parser.add_argument(
    '--store', help='events whose captions the VLM of --workdir may plan (no VLM is loaded)'
  )
  parser.add_argument(
    '--view',
    action='append',
    default=[],
    metavar='VIEW=FIELD',
    help="field of requests that holds a camera of the model (observation/VIEW); may be repeated",
  )
  parser.add_argument('--state', default='observation/state', help='field (observation/state)')
  parser.add_argument('--dim', type=int, default=10, help='--echo: numbers of a state (10)')
  parser.add_argument('--seed', type=int, default=0, help='of the noise (0)')
  parser.add_argument('--host', default='0.0.0.0', help='address to listen at (all)')
  parser.add_argument('--port', type=int, default=8000, help='port, 0 = any free one (8000)')
  parser.add_argument('--max-batch', type=int, default=8, help='requests answered at once (8)')
  parser.add_argument(
    '--cache',
    metavar='DIR',
    help='folder of this user that keeps compiled programs, so that the next start need not '
    'compile (default: none)',
  )


def run(args: argparse.Namespace) -> None:
  import asyncio

  from wallwm_jax.inference.serve.server import PolicyServer

  policy = _echo(args) if args.echo else _ready(args)
  policy.metadata |= {'cold_start_s': round(time.monotonic() - _BEGUN, 3)}

  async def forever() -> None:
    async with PolicyServer(policy, args.host, args.port, args.max_batch) as server:
      print(f'serving at ws://{args.host}:{server.port}, stop with Ctrl+C', flush=True)
      await asyncio.Event().wait()

  try:
    asyncio.run(forever())
  except KeyboardInterrupt:
    print('stopped')


def _echo(args: argparse.Namespace):
  from wallwm_jax.inference.serve.echo import EchoPolicy

  return EchoPolicy(dim=args.dim)


def _ready(args: argparse.Namespace):
  """A ModelPolicy compiled, in both dialects, that tells what it runs on."""
  from wallwm_jax.evaluation.base import environment
  from wallwm_jax.inference.programs import Programs
  from wallwm_jax.inference.serve.wallx import WallX

  programs = Programs(args.cache)
  policy = make_policy(args, programs)
  print('compiling ...', flush=True)
  policy.warm_up()
  programs.seal()  # whatever else was compiled on the way: what resizes, a VLM
  policy.metadata |= {'environment': environment()}
  return WallX(policy)


def make_policy(args: argparse.Namespace, programs=None):
  """The ModelPolicy that the arguments describe, not yet compiled; programs: keeps what will be.

  Raises:
    ConfigError: arguments that do not fit the model or each other. CheckpointError: nothing that
      can be read.
  """
  from wallwm_jax.data.images import letterbox
  from wallwm_jax.inference.serve.model import ModelPolicy
  from wallwm_jax.text.factory import make_text_encoder
  from wallwm_jax.types import ConfigError

  if args.artifact and args.store:
    raise ConfigError('--store: an exported policy has no VLM to plan with. Serve --workdir.')
  engine, params, exported = _exported(args) if args.artifact else _trained(args, programs)
  config = engine.config
  encode = make_text_encoder(config.model.text).encode
  if exported is not None:
    encode = _with_captions(exported, encode)
  speakers = _speakers(args.store, config, params, encode) if args.store else None
  return ModelPolicy(
    engine,
    encode,
    letterbox,
    modes=args.modes,
    keys=_keys(args, config),
    speakers=speakers,
    **({'example': exported.captions[0]} if exported and exported.captions else {}),
    # Where its text was latents, no other text was ever seen in training.
    source='staircase' if speakers and config.data.text == 'staircase' else '',
  )


def _trained(args: argparse.Namespace, programs):
  """(engine, params, None) of --workdir."""
  from wallwm_jax.inference.serve.engines import ModelEngine
  from wallwm_jax.training.checkpoints import load_inference

  bank = _store(args.store)[0] if args.store else None
  config, params = load_inference(args.workdir, captions=bank)
  options = {'bucket': args.bucket, 'max_batch': args.max_batch, 'seed': args.seed}
  return ModelEngine(config, params, programs=programs, **options), params, None


def _exported(args: argparse.Namespace):
  """(engine, None, policy) of --artifact."""
  import ml_collections

  from wallwm_jax.config import from_config_dict
  from wallwm_jax.inference.export import load
  from wallwm_jax.inference.serve.engines import ExportedEngine

  policy = load(args.artifact)
  config = from_config_dict(ml_collections.ConfigDict(policy.manifest['config']))
  options = {'bucket': args.bucket, 'max_batch': args.max_batch, 'seed': args.seed}
  return ExportedEngine(policy, config, **options), None, policy


def _with_captions(policy, encode):
  """`encode`, asked only for captions whose features were not exported."""
  from wallwm_jax.types import CheckpointError, DataError, Text

  def features(captions):
    try:
      text = policy.text(captions)
    except DataError as unknown:
      try:
        return encode(captions)
      except CheckpointError as error:
        raise DataError(f'{unknown} It could not be encoded here either: {error}') from error
    return Text(text['text_features'], text['text_mask'])

  return features


def _store(path: str) -> tuple[list[str], float]:
  """(captions to plan, frames per second) of a store."""
  from wallwm_jax.data.moments import caption_bank
  from wallwm_jax.data.store import EventStore

  store = EventStore(path)
  return caption_bank(store), store.info(0).fps


def _speakers(path: str, config, params, encode):
  from wallwm_jax.inference.serve.speakers import Speakers
  from wallwm_jax.text.planning import make_planning_texts

  bank, fps = _store(path)
  texts = make_planning_texts(config)
  # Windows are cut at every stride-th frame, so that is how often the policy thinks it acts.
  fps /= config.data.stride
  return Speakers(config, params, texts.prompts, bank, encode(bank), fps=fps)


def _keys(args: argparse.Namespace, config):
  from wallwm_jax.inference.serve.fields import Keys
  from wallwm_jax.types import ConfigError

  views = dict(Keys.of(config).views)
  for pair in args.view:
    view, equals, field = pair.partition('=')
    if view not in views or not equals or not field:
      raise ConfigError(
        f'--view: expected VIEW=FIELD with a view of {config.model.views}, got {pair!r}.'
      )
    views[view] = field
  return Keys(views, args.state)
