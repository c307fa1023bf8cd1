"""`wallwm serve`: a policy behind openpi's websocket protocol."""

from __future__ import annotations

import argparse

from wallwm_jax.commands import common


def add_parser(verbs) -> None:
  parser = common.add_verb(
    verbs,
    'serve',
    "serve a policy over openpi's websocket protocol, for robots and simulators",
    'wallwm serve --echo --port 8000',
    run=run,
  )
  parser.add_argument(
    '--echo', action='store_true', required=True, help='no model: every action is the state'
  )
  parser.add_argument('--dim', type=int, default=10, help='--echo: numbers of a state (10)')
  parser.add_argument('--host', default='0.0.0.0', help='address to listen at (all)')
  parser.add_argument('--port', type=int, default=8000, help='port, 0 = any free one (8000)')
  parser.add_argument('--max-batch', type=int, default=8, help='requests answered at once (8)')


def run(args: argparse.Namespace) -> None:
  import asyncio

  from wallwm_jax.inference.serve.echo import EchoPolicy
  from wallwm_jax.inference.serve.server import PolicyServer

  async def forever() -> None:
    policy = EchoPolicy(dim=args.dim)
    async with PolicyServer(policy, args.host, args.port, args.max_batch) as server:
      print(f'serving at ws://{args.host}:{server.port}, stop with Ctrl+C', flush=True)
      await asyncio.Event().wait()

  try:
    asyncio.run(forever())
  except KeyboardInterrupt:
    print('stopped')
