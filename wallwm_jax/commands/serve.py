"""`wallwm serve`: a policy behind openpi's websocket protocol."""

from __future__ import annotations

import argparse

from wallwm_jax.commands import common


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


def run(args: argparse.Namespace) -> None:
  import asyncio

  from wallwm_jax.inference.serve.server import PolicyServer

  policy = _echo(args) if args.echo else _model(args)

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


def _model(args: argparse.Namespace):
  from wallwm_jax.data.images import letterbox
  from wallwm_jax.inference.serve.model import Keys, ModelPolicy
  from wallwm_jax.text.factory import make_text_encoder
  from wallwm_jax.training.checkpoints import load_inference
  from wallwm_jax.types import ConfigError

  config, params = load_inference(args.workdir)
  views = dict(Keys.of(config).views)
  for pair in args.view:
    view, equals, field = pair.partition('=')
    if view not in views or not equals or not field:
      raise ConfigError(
        f'--view: expected VIEW=FIELD with a view of {config.model.views}, got {pair!r}.'
      )
    views[view] = field
  policy = ModelPolicy(
    config,
    params,
    make_text_encoder(config.model.text).encode,
    letterbox,
    modes=args.modes,
    bucket=args.bucket,
    keys=Keys(views, args.state),
    max_batch=args.max_batch,
    seed=args.seed,
  )
  print('compiling ...', flush=True)
  policy.warm_up()
  return policy
