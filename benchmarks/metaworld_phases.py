"""Scripted Meta-World experts with the phases of their scripts: data for `segmentation.py`.

Needs an environment of its own: pip install metaworld==3.1.1 "gymnasium[mujoco]<1.4" (Python
3.11). Nothing is rendered; only what a robot records is kept: obs[:4] (hand position m, gripper
opening 0..1) and the executed commands in -1..1.

python benchmarks/metaworld_phases.py OUT.npz --seed 0 --episodes n0=10,n02=5,ema=5
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator

import numpy as np

# How an expert's command u becomes what is executed: s <- s + alpha (clip(u) - s), then noise of
# this deviation on all four channels. 'varied' draws both anew for every episode.
SETS = {'n0': (1.0, 0.0), 'n02': (1.0, 0.2), 'ema': (0.3, 0.1), 'varied': (None, None)}
MAX_STEPS = 400
AFTER_SUCCESS = 2  # steps recorded after the first success


def traced(policy, observation: np.ndarray) -> tuple[np.ndarray, int]:
  """The expert's command and the phase it is in: the line of the `return` taken in `_desired_pos`
  (scripts without one: the lines that ran in `get_action`)."""
  returned, branch = 0, 0

  def lines(frame, event, _):
    nonlocal returned, branch
    name = frame.f_code.co_name
    if event == 'line' and name == 'get_action':
      branch = (31 * branch + frame.f_lineno) % 1_000_003  # a hash of the path taken
    if event == 'return' and name == '_desired_pos':
      returned = frame.f_lineno
    return lines

  def calls(frame, event, _):
    return lines if frame.f_code.co_name in ('_desired_pos', 'get_action') else None

  sys.settrace(calls)
  try:
    action = policy.get_action(observation)
  finally:
    sys.settrace(None)
  return np.asarray(action, np.float64), returned or branch


def episode(env, policy, name: str, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
  """One successful episode {obs [T, 4], action [T, 4], phase [T], grip [T]}, None if it failed."""
  alpha, sigma = SETS[name]
  if name == 'varied':
    alpha, sigma = rng.uniform(0.2, 1.0), rng.uniform(0.0, 0.2)
  observation, _ = env.reset()
  smooth, left = None, None
  rows: dict[str, list] = {'obs': [], 'action': [], 'phase': [], 'grip': []}
  for _ in range(MAX_STEPS):
    command, phase = traced(policy, observation)
    wanted = np.clip(command, -1, 1)
    smooth = wanted if smooth is None else smooth + alpha * (wanted - smooth)
    action = np.clip(smooth + sigma * rng.standard_normal(4), -1, 1)
    for key, value in zip(rows, (observation[:4], action, phase, command[3] > 0)):
      rows[key].append(value)
    observation, _, _, _, info = env.step(action)
    if left is None and info['success']:
      left = AFTER_SUCCESS
    if left is not None:
      if left == 0:
        return {key: np.asarray(value) for key, value in rows.items()}
      left -= 1
  return None


def episodes(counts: dict[str, int], seed: int) -> Iterator[dict]:
  """Episodes of all tasks: {task, set, obs, action, phase, grip}."""
  from metaworld.env_dict import ENV_CLS_MAP
  from metaworld.policies import ENV_POLICY_MAP

  for number, (task, make_policy) in enumerate(sorted(ENV_POLICY_MAP.items())):
    env = ENV_CLS_MAP[task]()
    env._partially_observable = False  # the experts need the goal
    env.__dict__.pop('sawyer_observation_space', None)  # was cached without it
    env._freeze_rand_vec = False
    env._set_task_called = True
    env.seed(1000 * seed + number)
    rng = np.random.default_rng((seed, number))
    for name, count in counts.items():
      tries = 0
      while count and tries < 3 * counts[name] + 3:
        tries += 1
        found = episode(env, make_policy(), name, rng)
        if found is not None:
          count -= 1
          yield {'task': task.removesuffix('-v3'), 'set': name, **found}
    env.close()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('out')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--episodes', default='n0=10,n02=5,ema=5', help='successful ones per task')
  args = parser.parse_args()
  counts = {k: int(v) for k, v in (item.split('=') for item in args.episodes.split(','))}
  warnings.simplefilter('ignore')
  found = list(episodes(counts, args.seed))
  columns = {
    'task': np.array([e['task'] for e in found]),
    'set': np.array([e['set'] for e in found]),
    'length': np.array([len(e['phase']) for e in found]),
    'obs': np.concatenate([e['obs'] for e in found]).astype(np.float32),
    'action': np.concatenate([e['action'] for e in found]).astype(np.float32),
    'phase': np.concatenate([e['phase'] for e in found]).astype(np.int32),
    'grip': np.concatenate([e['grip'] for e in found]).astype(bool),
  }
  partial = f'{args.out}.partial.npz'
  np.savez_compressed(partial, **columns)
  os.replace(partial, args.out)
  print(f'{args.out}: {len(found)} episodes, {columns["length"].sum()} frames')


if __name__ == '__main__':
  main()
