"""Speed of the tabletop: control steps and camera triples per second over a batch of environments.

wallwm bench tabletop -- --envs 64
"""

from __future__ import annotations

import argparse
import statistics

import harness
import jax

from wallwm_jax.envs.tabletop import tasks
from wallwm_jax.envs.tabletop.env import env_fns


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--envs', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=10)
  args = parser.parse_args()
  env = env_fns()
  suite = tasks.task_suite(jax.random.key(0), tasks.SINGLE_KINDS, -(-args.envs // 7))
  suite = jax.tree.map(lambda x: x[: args.envs], suite)
  states = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(1), args.envs), suite)
  observe, step = jax.jit(jax.vmap(env.observe)), jax.jit(jax.vmap(env.step))
  hold = observe(states).state
  times = harness.time_side_by_side(
    {'step': lambda: step(states, hold), 'observe': lambda: observe(states).frames},
    rounds=args.rounds,
  )
  rates = {name: args.envs / statistics.median(t) for name, t in times.items()}
  spread = {name: [args.envs / max(t), args.envs / min(t)] for name, t in times.items()}
  harness.report(
    'tabletop: control steps and observations (3 views of 48x48) per second',
    '1/s',
    args.rounds,
    envs=args.envs,
    value=rates,
    range=spread,
  )


if __name__ == '__main__':
  main()
