"""Speed of the tabletop over a batch of environments: control steps, whole attempts of the scripted
expert (policy and physics, one jitted call), and camera triples per second.

wallwm bench tabletop -- --envs 64
"""

from __future__ import annotations

import argparse
import statistics
import time

import harness
import jax
import jax.numpy as jnp

from wallwm_jax.envs.tabletop import TabletopConfig, expert, tasks
from wallwm_jax.envs.tabletop.env import env_fns


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--envs', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument('--steps', type=int, default=48, help='control steps of an attempt (48)')
  args = parser.parse_args()
  env = env_fns()
  suite = tasks.task_suite(jax.random.key(0), tasks.SINGLE_KINDS, -(-args.envs // 7))
  suite = jax.tree.map(lambda x: x[: args.envs], suite)
  states = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(1), args.envs), suite)
  observe, step = jax.jit(jax.vmap(env.observe)), jax.jit(jax.vmap(env.step))
  hold = observe(states).state
  keys, world = jax.random.split(jax.random.key(2), args.envs), TabletopConfig()

  @jax.jit
  @jax.vmap
  def attempt(key, state):
    def period(carry, _):
      state, mind, _ = expert.step(*carry, world)
      return (state, mind), None

    start = (state, expert.init(key, jnp.float32(0), jnp.float32(0)))
    (state, _), _ = jax.lax.scan(period, start, length=args.steps)
    return env.success(state)

  calls = {
    'step': lambda: step(states, hold),
    'expert': lambda: attempt(keys, states),
    'observe': lambda: observe(states).frames,
  }
  done = {'step': args.envs, 'expert': args.envs * args.steps, 'observe': args.envs}
  rates, spread = {}, {}
  for name, clock in (('wall', time.perf_counter), ('cpu', time.process_time)):
    times = harness.time_side_by_side(calls, rounds=args.rounds, clock=clock)
    rates[name] = {k: done[k] / statistics.median(t) for k, t in times.items()}
    spread[name] = {k: [done[k] / max(t), done[k] / min(t)] for k, t in times.items()}
  harness.report(
    'tabletop: control steps, steps of scripted attempts and observations (3 views of 48x48) per '
    'second of wall and of processor time',
    '1/s',
    args.rounds,
    envs=args.envs,
    attempt_steps=args.steps,
    expert_success=float(attempt(keys, states).mean()),
    value=rates,
    range=spread,
  )


if __name__ == '__main__':
  main()
