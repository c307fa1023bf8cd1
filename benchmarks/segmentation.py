"""F1 of event boundaries on tasks the detector was not fitted to, and the fit of the detector.

Data: `metaworld_phases.py` (an environment of its own), the tabletop's demonstrations and
`scripted_motion.py`. Tasks are held out in turn (of the last two, which have none, episodes are); a
boundary counts when it is within 3 frames, one to one. Beside every score stands what evenly spaced
boundaries reach that are given the true count.

python benchmarks/metaworld_phases.py mw.npz
wallwm bench segmentation mw.npz --tabletop tabletop.npz [--fit]
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scripted_motion
from scipy.spatial.transform import Rotation

from wallwm_jax.data import boundary_net
from wallwm_jax.data.boundary_features import arm_features
from wallwm_jax.data.boundary_net import network_input
from wallwm_jax.data.primitives import merge_runs
from wallwm_jax.data.segment import SegmentSettings, best_boundaries, expected_boundaries
from wallwm_jax.evaluation.boundaries import boundary_score, chance_score

TOLERANCE, SHORTEST = 3, 5  # frames
STEP_M = 0.01  # m that a command of 1 moves the hand of Meta-World in one step
CROP, EDGE, BATCH = 128, 12, 32  # frames, frames, episodes
WIDTH, MEMBERS, FOLDS = 24, 2, 5
STEPS = 800  # longer fits get better on tasks that were seen only
TILTED, DROPPED = 0.5, 0.1  # shares: of crops turned in space, of inputs left out
AVERAGED = 200  # steps over which the weights are averaged
SMOOTHING = (0.1, 0.2, 0.4, 0.2, 0.1)  # of a true boundary over neighbouring frames
VARIANTS = ('actions', 'proprio')
WEIGHTS = pathlib.Path(boundary_net.__file__).with_name('boundaries.npz')


class Episode(NamedTuple):
  """task: what is held out together; set: 'n0', 'n02', 'ema', 'varied', 'tabletop',
  'scripted'; state, actions: [T, 10]; true: [n] frames."""

  task: str
  set: str
  state: np.ndarray
  actions: np.ndarray
  true: np.ndarray


class Example(NamedTuple):
  """What a network is fitted to: x [T, I], target [T], directions: how many of I are of vectors."""

  x: np.ndarray
  target: np.ndarray
  directions: int


def metaworld(path: str) -> list[Episode]:
  """Episodes of `metaworld_phases.py` as robot poses: a command is the pose it asks for."""
  stored = np.load(path)
  ends = np.cumsum(stored['length'])
  obs, action = stored['obs'], stored['action']
  labels = 2 * stored['phase'].astype(np.int64) + stored['grip']
  upright = np.tile(np.eye(3, dtype=np.float32)[:2].ravel(), (len(obs), 1))
  state = np.concatenate([obs[:, :3], upright, np.clip(obs[:, 3:], 0, 1)], 1)
  asked = obs[:, :3] + STEP_M * action[:, :3]
  actions = np.concatenate([asked, upright, np.clip((1 - action[:, 3:]) / 2, 0, 1)], 1)
  return [
    Episode(
      task, name, state[e - n : e], actions[e - n : e], merge_runs(labels[e - n : e], SHORTEST)
    )
    for task, name, n, e in zip(
      stored['task'].tolist(), stored['set'].tolist(), stored['length'], ends
    )
  ]


def tabletop(path: pathlib.Path, count: int) -> list[Episode]:
  """Demonstrations of the tabletop; collected once, then read from `path`."""
  if not path.is_file():
    from wallwm_jax.envs.tabletop.collect import collect
    from wallwm_jax.envs.tabletop.config import TabletopConfig

    found = list(collect(count, seed=11, batch=32, config=TabletopConfig(image_size=(8, 8))))
    np.savez_compressed(
      path,
      length=[r.num_frames for r in found],
      state=np.concatenate([r.state for r in found]),
      actions=np.concatenate([r.actions for r in found]),
      starts=np.concatenate(
        [np.isin(np.arange(r.num_frames), [e.start for e in r.events]) for r in found]
      ),
    )
  stored = np.load(path)
  episodes = []
  for n, e in zip(stored['length'], np.cumsum(stored['length'])):
    part = slice(e - n, e)
    true = np.flatnonzero(stored['starts'][part])
    # Its episodes are of one world: they are held out by number.
    episodes.append(
      Episode(
        f'tabletop-{len(episodes) % 50}',
        'tabletop',
        stored['state'][part],
        stored['actions'][part],
        true[true > 0],
      )
    )
  return episodes


def scripted(count: int) -> list[Episode]:
  """Random scripts, held out by number as the tabletop's episodes are."""
  rng = np.random.default_rng(7)
  found = []
  for number in range(count):
    state, actions, labels = scripted_motion.scripted(rng)
    true = merge_runs(labels, SHORTEST)
    found.append(Episode(f'scripted-{number % 50}', 'scripted', state, actions, true))
  return found


def example(episode: Episode, variant: str) -> Example:
  directions, cues = arm_features(episode.state, episode.actions if variant == 'actions' else None)
  hits = np.zeros(len(cues), np.float32)
  hits[episode.true] = 1
  return Example(
    network_input(directions, cues), np.convolve(hits, SMOOTHING, 'same'), 3 * directions.shape[1]
  )


def batches(examples: list[Example], steps: int, rng: np.random.Generator):
  """(x [B, CROP, I], target [B, CROP], weight [B, CROP], inside [B, CROP, 1]): crops, turned about
  the vertical; frames near a cut have no weight."""
  for _ in range(steps):
    chosen = rng.integers(0, len(examples), BATCH)
    x = np.zeros((BATCH, CROP, examples[0].x.shape[1]), np.float32)
    target, weight = np.zeros((2, BATCH, CROP), np.float32)
    inside = np.zeros((BATCH, CROP, 1), np.float32)
    for row, index in enumerate(chosen):
      one = examples[index]
      begin = int(rng.integers(0, max(len(one.x) - CROP, 0) + 1))
      count = min(len(one.x) - begin, CROP)
      x[row, :count] = _turned(one, slice(begin, begin + count), rng)
      target[row, :count] = one.target[begin : begin + count]
      weight[row, EDGE * (begin > 0) : count - EDGE * (begin + count < len(one.x))] = 1
      inside[row, :count] = 1
    yield x, target, weight, inside


def _turned(one: Example, part: slice, rng: np.random.Generator) -> np.ndarray:
  x = one.x[part].copy()
  if rng.uniform() < TILTED:  # up and down say what a task is, and mislead in another one
    turn = Rotation.random(random_state=rng)
  else:
    turn = Rotation.from_euler('z', rng.uniform(0, 2 * np.pi))
  vectors = x[:, : one.directions].reshape(len(x), -1, 3)
  x[:, : one.directions] = (vectors @ turn.as_matrix().T).reshape(len(x), -1)
  return x


def initial(examples: list[Example], rng: np.random.Generator) -> tuple[dict, dict]:
  """Parameters to fit, and those that are fixed."""
  inputs, layers = examples[0].x.shape[1], len(boundary_net.DILATIONS)
  rows = np.concatenate([e.x for e in examples])
  mean, deviation = rows.mean(0), rows.std(0)
  mean[: examples[0].directions] = 0  # or turning them would not be turning them
  shapes = {
    'in': (inputs, WIDTH),
    'taps': (layers, 3 * WIDTH, WIDTH),
    'mix': (layers, WIDTH, WIDTH),
  }
  params = {
    name: (rng.standard_normal(shape) * np.sqrt(2 / shape[-2])).astype(np.float32)
    for name, shape in shapes.items()
  }
  params['mix'] *= 0.3
  params |= {
    'in_bias': np.zeros(WIDTH, np.float32),
    'taps_bias': np.zeros((layers, WIDTH), np.float32),
    'mix_bias': np.zeros((layers, WIDTH), np.float32),
    'out': np.zeros(WIDTH, np.float32),
    'out_bias': np.float32(-3),
  }
  return params, {'mean': mean, 'scale': 1 / np.maximum(deviation, 0.02)}


def fit(examples: list[Example], steps: int, seed: int) -> dict[str, np.ndarray]:
  """One member: AdamW with a cosine schedule on the cross-entropy of smoothed boundaries; the
  average of its weights over the last steps."""
  rng = np.random.default_rng(seed)
  params, fixed = initial(examples, rng)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.cosine_onecycle_schedule(steps, 4e-3, 0.1), weight_decay=1e-2),
  )

  def loss(params, key, x, target, weight, inside):
    kept = jax.random.bernoulli(key, 1 - DROPPED, (x.shape[0], 1, x.shape[2]))
    z = boundary_net.logits(params | fixed, x * kept / (1 - DROPPED), inside, jnp)
    return (weight * optax.sigmoid_binary_cross_entropy(z, target)).sum() / weight.sum()

  @jax.jit
  def update(params, average, state, step, batch):
    key = jax.random.fold_in(jax.random.key(seed), step)
    change, state = optimizer.update(jax.grad(loss)(params, key, *batch), state, params)
    params = optax.apply_updates(params, change)
    rate = jnp.maximum(1 / AVERAGED, 1 / (step + 1))
    average = jax.tree.map(lambda a, p: a + rate * (p - a), average, params)
    return params, average, state

  average, state = params, optimizer.init(params)
  for step, batch in enumerate(batches(examples, steps, rng)):
    params, average, state = update(params, average, state, step, batch)
  # Scored as stored: boundary_net.pack keeps half precision.
  return {
    name: np.asarray(x, np.float16).astype(np.float32) for name, x in (average | fixed).items()
  }


def held_out(
  episodes: list[Episode], variant: str, steps: int, members: int, folds: int
) -> list[np.ndarray]:
  """Expected boundaries [T] of every episode by networks that saw no episode of its task."""
  tasks = sorted({e.task for e in episodes})
  order = np.random.default_rng(0).permutation(len(tasks))
  fold_of = {tasks[k]: i % FOLDS for i, k in enumerate(order)}
  examples = [example(e, variant) for e in episodes]
  found: list = [None] * len(episodes)
  for fold in range(folds):
    start = time.process_time()
    train = [x for x, e in zip(examples, episodes) if fold_of[e.task] != fold]
    nets = [fit(train, steps, 100 * fold + m) for m in range(members)]
    for k, e in enumerate(episodes):
      if fold_of[e.task] == fold:
        found[k] = boundary_net.probabilities(nets, examples[k].x)
    print(f'{variant}, fold {fold}: {time.process_time() - start:.0f} CPU-s', file=sys.stderr)
  return found


def scores(
  episodes: list[Episode], found: list[np.ndarray | None], settings: SegmentSettings
) -> dict[str, Any]:
  """F1, precision, recall, and F1 of chance, by set."""
  results = {}
  for name in sorted({e.set for e in episodes} - {'varied'}):
    pairs, lengths = [], []
    for e, p in zip(episodes, found):
      if e.set == name and p is not None:
        pairs.append((best_boundaries(p, len(p), settings), e.true))
        lengths.append(len(p))
    score = boundary_score(pairs, TOLERANCE)
    chance = chance_score(zip(lengths, (true for _, true in pairs)), TOLERANCE)
    results[name] = {
      'f1': round(score.f1, 4),
      'precision': round(score.precision, 4),
      'recall': round(score.recall, 4),
      'chance_f1': round(chance.f1, 4),
      'episodes': len(pairs),
      'boundaries': score.true,
    }
  return results


def cost(episodes: list[Episode], variant: str) -> float:
  """Processor time of the shipped detector and the decoding, us per frame; best of three."""
  times = []
  for _ in range(3):
    start = time.process_time()
    for e in episodes:
      actions = e.actions if variant == 'actions' else None
      best_boundaries(expected_boundaries(e.state, actions), len(e.state))
    times.append(time.process_time() - start)
  return round(1e6 * min(times) / sum(len(e.state) for e in episodes), 1)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('data', nargs='+', help='files of metaworld_phases.py')
  parser.add_argument('--tabletop', type=pathlib.Path, help='cache of demonstrations (.npz)')
  parser.add_argument('--episodes', type=int, default=300, help='demonstrations of the tabletop')
  parser.add_argument('--scripts', type=int, default=1000, help='episodes of random scripts')
  parser.add_argument('--steps', type=int, default=STEPS)
  parser.add_argument('--members', type=int, default=MEMBERS)
  parser.add_argument('--folds', type=int, default=FOLDS, help='how many of them to compute')
  parser.add_argument('--variants', nargs='+', default=VARIANTS)
  parser.add_argument('--save', type=pathlib.Path, help='held-out outputs, to look at (.npz)')
  parser.add_argument('--fit', action='store_true', help='fit to all data, into the package')
  args = parser.parse_args()
  episodes = [e for path in args.data for e in metaworld(path)]
  if args.tabletop:
    episodes += tabletop(args.tabletop, args.episodes)
  episodes += scripted(args.scripts)
  if args.fit:
    nets = {}
    for variant in VARIANTS:
      examples = [example(e, variant) for e in episodes]
      nets[variant] = [fit(examples, args.steps, 1000 + m) for m in range(args.members)]
    np.savez_compressed(WEIGHTS, **boundary_net.pack(nets))
    print(f'{WEIGHTS}: {WEIGHTS.stat().st_size} bytes')
    return
  results = {}
  for variant in args.variants:
    found = held_out(episodes, variant, args.steps, args.members, args.folds)
    results[variant] = scores(episodes, found, SegmentSettings())
    results[variant]['cost_us_per_frame'] = cost(episodes[:100], variant)
    if args.save:
      rows = [p if p is not None else np.zeros(len(e.state)) for e, p in zip(episodes, found)]
      np.savez_compressed(f'{args.save}.{variant}.npz', expected=np.concatenate(rows))
  harness.report(
    'event boundaries on held-out tasks',
    f'F1 within {TOLERANCE} frames',
    len(episodes),
    **results,
    goal='ema >= .90 with actions, >= .85 without; n02 >= .93; tabletop >= .95',
  )


if __name__ == '__main__':
  main()
