"""Muon against tuned AdamW on the project's own training recipes: steps to the same training loss.

wallwm bench optimizers --recipe quickstart2 --store runs/quickstart/store
--init-from runs/quickstart/stage1 --out runs/optimizers --plot docs/images/muon_training.png

Both optimizers get the same schedule shape, warm-up, clipping, weight decay, batches and noise; a
seed sets the initial weights, the noise and the order of the data. Every learning rate of a grid is
run on the first seed with a schedule of --tune-steps; the best one then on every seed, in full and,
for Muon, with the whole schedule shortened (--fractions). Finished runs in OUT are kept, so an
interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable

import harness
import jax
import numpy as np

from wallwm_jax import presets
from wallwm_jax.commands import evaluators
from wallwm_jax.commands.settings import load_experiment
from wallwm_jax.config import ExperimentConfig
from wallwm_jax.data import pipeline
from wallwm_jax.data.store import EventStore
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.text.factory import make_text_encoder
from wallwm_jax.training import loop, metrics
from wallwm_jax.training.checkpoints import Checkpoints, load_inference
from wallwm_jax.training.stages import stage_loss
from wallwm_jax.training.state import abstract_state, build_optimizer
from wallwm_jax.types import Frozen, NormStats

OPTIMIZERS = ('adamw', 'muon')
CACHE = 'jax_cache'  # folder of compiled steps in OUT
LOG_EVERY = 5
MIN_WINDOW = 30  # steps that a smoothed loss averages at least
PROBE_SEED, PROBE_BATCHES = 10_007, 10
MAE_EVENTS = 96


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A training recipe and the learning rates to try; make: the stage-1 run to start from -> config.

  Every AdamW grid brackets the best rate; Muon's begin at the recipe's own.
  """

  title: str
  make: Callable[[str], ExperimentConfig]
  adamw_lrs: tuple[float, ...]
  muon_lrs: tuple[float, ...]


def _quickstart2(init_from: str) -> ExperimentConfig:
  return presets.stage(presets.tabletop(), '2', steps=500, init_from=init_from)


def _bridge(init_from: str) -> ExperimentConfig:
  del init_from
  return load_experiment('experiments/bridge_sample.py')


RECIPES = {
  'quickstart2': Recipe(
    'tabletop, stage 2: action tower',
    _quickstart2,
    (2e-3, 4e-3, 8e-3),
    (4e-3, 8e-3),
  ),
  'bridge': Recipe(
    'BridgeData V2 sample: both towers',
    _bridge,
    (1e-3, 2e-3, 4e-3),
    (5e-4, 1e-3, 2e-3, 4e-3),
  ),
}


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run; its schedule ends at `steps`."""

  optimizer: str
  lr: float
  seed: int
  steps: int

  @property
  def name(self) -> str:
    return f'{self.optimizer}-lr{self.lr:g}-seed{self.seed}-steps{self.steps}'


@dataclasses.dataclass(frozen=True)
class Study:
  """The runs of one recipe in one folder; every result is computed once and kept there."""

  base: ExperimentConfig
  out: pathlib.Path
  window: int  # steps that a smoothed loss averages

  def config(self, run: Run) -> ExperimentConfig:
    """The recipe with the optimizer, rate, seed and length of a run."""
    base = self.base
    train = dataclasses.replace(
      base.train,
      seed=run.seed,
      steps=run.steps,
      log_every=LOG_EVERY,
      checkpoint_every=run.steps,
      compile_cache=str(self.out.absolute() / CACHE),
    )
    return dataclasses.replace(
      base,
      data=dataclasses.replace(base.data, seed=run.seed),
      optim=dataclasses.replace(base.optim, optimizer=run.optimizer, lr=run.lr),
      train=train,
    )

  def curve(self, run: Run) -> np.ndarray:
    """Loss of every interval of LOG_EVERY steps; trains the run unless it is complete."""
    path = self.out / run.name / metrics.FILE
    losses = _read_losses(path)
    if len(losses) < run.steps // LOG_EVERY:
      loop.train(self.config(run), self.out / run.name, progress=False)
      losses = _read_losses(path)
    return np.asarray(losses)

  def smoothed(self, run: Run) -> np.ndarray:
    """Mean of the last `window` steps (fewer at the start), after every interval."""
    return trailing_mean(self.curve(run), self.window // LOG_EVERY)

  def final(self, run: Run) -> float:
    """Mean training loss of the last `window` steps."""
    return float(self.smoothed(run)[-1])

  def probe(self, run: Run) -> dict[str, float]:
    """Losses of the final weights on batches and noise that are the same for every run, and the
    held-out action error of their running average.
    """
    self.curve(run)
    path = self.out / run.name / 'probe.json'
    if not path.exists():
      path.write_text(json.dumps(self._probe(run)))
    return json.loads(path.read_text())

  def _probe(self, run: Run) -> dict[str, float]:
    workdir, config = self.out / run.name, self.config(run)
    mesh = make_mesh(config.mesh)
    abstract = abstract_state(config, build_optimizer(config, mesh), mesh)
    with Checkpoints(workdir, config.train.keep) as saved:
      state, norm = (lambda s: (s.state, s.norm))(saved.restore(abstract))
    result = {}
    for split in ('train', 'heldout'):
      keys = jax.random.split(jax.random.key(PROBE_SEED), PROBE_BATCHES)
      losses = map(
        functools.partial(self._loss, state.params, norm), self._batches(split, norm), keys
      )
      result[split] = float(np.mean(list(losses)))
    store = EventStore(config.data.store)
    scores = evaluators.evaluate_actions(*load_inference(workdir), store, limit=MAE_EVENTS)
    result['heldout_mae'] = scores.policy['mae']
    return result

  def _batches(self, split: str, norm: NormStats):
    data = dataclasses.replace(self.base.data, split=split, seed=PROBE_SEED)
    config = dataclasses.replace(self.base, data=data)
    encode = make_text_encoder(config.model.text).encode
    with contextlib.closing(
      pipeline.make_dataset(config, EventStore(data.store), norm, encode)
    ) as batches:
      yield from itertools.islice(batches, PROBE_BATCHES)

  @functools.cached_property
  def _loss(self):
    """(params, norm, batch, key) -> loss of the recipe's stage."""
    return jax.jit(
      lambda params, norm, batch, key: stage_loss(
        params, batch, Frozen(norm), key, config=self.base
      )[0]
    )


def _read_losses(path: pathlib.Path) -> list[float]:
  return [json.loads(x)['loss'] for x in path.read_text().splitlines()] if path.exists() else []


def trailing_mean(values: np.ndarray, width: int) -> np.ndarray:
  """Mean of the last `width` values at every place, of those there are at the start."""
  sums = np.cumsum(np.concatenate([[0.0], values]))
  ends = np.arange(1, len(values) + 1)
  starts = np.maximum(ends - width, 0)
  return (sums[ends] - sums[starts]) / (ends - starts)


def tune(study: Study, optimizer: str, lrs: list[float], steps: int, seed: int) -> dict:
  """The learning rate with the lowest final loss after `steps`, and every loss it was chosen by."""
  losses = {lr: study.final(Run(optimizer, lr, seed, steps)) for lr in lrs}
  best = min(losses, key=losses.get)
  return {'lr': best, 'at_edge_of_grid': best in (min(lrs), max(lrs)), 'loss_by_lr': losses}


def crossing(smoothed: np.ndarray, target: float) -> int | None:
  """First step whose smoothed loss is at most `target`."""
  below = np.flatnonzero(smoothed <= target)
  return int(below[0] + 1) * LOG_EVERY if len(below) else None


def figures(study: Study, runs: list[Run]) -> dict:
  """Final losses of the seeds of one setting: mean, range and per seed; likewise its probes."""
  probes = [study.probe(run) for run in runs]
  return {
    'steps': runs[0].steps,
    'lr': runs[0].lr,
    'train_loss': _spread([study.final(run) for run in runs]),
    'probe': {name: _spread([p[name] for p in probes]) for name in probes[0]},
  }


def _spread(values: list[float]) -> dict:
  return {
    'mean': statistics.fmean(values),
    'low': min(values),
    'high': max(values),
    'per_seed': values,
  }


def settings(lrs: dict[str, float], steps: int, args: argparse.Namespace) -> dict[str, list[Run]]:
  """The runs to compare by setting: both optimizers in full, Muon with its schedule shortened."""

  def over(seeds: list[int], optimizer: str, length: float) -> list[Run]:
    length = round(length / LOG_EVERY) * LOG_EVERY
    return [Run(optimizer, lrs[optimizer], seed, length) for seed in seeds]

  short = args.short_seeds or args.seeds
  result = {name: over(args.seeds, name, steps) for name in OPTIMIZERS}
  return result | {f'muon x {f:g}': over(short, 'muon', f * steps) for f in args.fractions}


def summarise(study: Study, runs_of: dict[str, list[Run]]) -> dict:
  """Losses by setting, and the steps at which Muon's smoothed loss first passes AdamW's last."""
  target = statistics.fmean(study.final(run) for run in runs_of['adamw'])
  reached = [crossing(study.smoothed(run), target) for run in runs_of['muon']]
  steps = runs_of['adamw'][0].steps
  return {
    'value': None if None in reached else statistics.fmean(reached) / steps,
    'steps': steps,
    'smoothing_steps': study.window,
    'target_loss': target,
    'muon_reaches_target_at': reached,
    'settings': {name: figures(study, runs) for name, runs in runs_of.items()},
  }


def time_steps(study: Study, runs: list[Run], rounds: int) -> dict:
  """Whole optimizer steps of one run of each optimizer side by side, for every bucket.

  value: Muon's step over AdamW's, median over rounds, mean over buckets.
  """
  buckets = {}
  for bucket in study.base.data.buckets:
    configs = {run.optimizer: study.config(run) for run in runs}
    calls = {name: harness.train_step(c, c.fake_batch(bucket)) for name, c in configs.items()}
    times = harness.time_side_by_side(calls, rounds=rounds)
    buckets[bucket] = {
      'muon_over_adamw': harness.ratio(times, 'muon', 'adamw'),
      'median_s': {name: statistics.median(t) for name, t in times.items()},
    }
  return {
    'value': statistics.fmean(b['muon_over_adamw']['value'] for b in buckets.values()),
    'median_s': {
      name: statistics.fmean(b['median_s'][name] for b in buckets.values()) for name in OPTIMIZERS
    },
    'rounds': rounds,
    'buckets': buckets,
  }


def write_curves(study: Study, runs_of, path: pathlib.Path, title: str, timing: dict) -> None:
  """What `plot` needs: smoothed losses by setting and seed, and the relative cost of a step."""
  target = statistics.fmean(study.final(run) for run in runs_of['adamw'])
  curves = {
    name: [study.smoothed(run).round(5).tolist() for run in runs] for name, runs in runs_of.items()
  }
  path.write_text(
    json.dumps(
      {
        'recipe': title,
        'steps': runs_of['adamw'][0].steps,
        'smoothing_steps': study.window,
        'target_loss': target,
        'muon_step_over_adamw': timing['value'],
        'curves': curves,
      }
    )
  )


def plot(out: pathlib.Path, path: str) -> None:
  """Loss against steps and against time, one row per recipe that OUT holds results of."""
  import matplotlib

  matplotlib.use('agg')
  import matplotlib.pyplot as plt

  results = [json.loads(p.read_text()) for p in sorted(out.glob('*/curves.json'))]
  figure, axes = plt.subplots(
    len(results), 2, figsize=(11, 3.9 * len(results)), squeeze=False, layout='constrained'
  )
  for row, result in zip(axes, results, strict=True):
    _plot_row(row, result)
  for axis in axes[:, 0]:
    axis.legend(frameon=False, fontsize='small')
  figure.savefig(path, dpi=110)


def _plot_row(row, result: dict) -> None:
  styles = {
    'adamw': ('AdamW, tuned', 'tab:blue', '-'),
    'muon': ('Muon, tuned', 'tab:red', '-'),
    'muon x 0.75': ('Muon, schedule shortened to 75 %', 'tab:red', '--'),
    'muon x 0.5': ('Muon, schedule shortened to 50 %', 'tab:red', ':'),
  }
  skip = result['smoothing_steps'] // LOG_EVERY - 1  # before it the mean spans fewer steps
  for name, (label, colour, line) in styles.items():
    if name not in result['curves']:
      continue
    seeds = np.asarray(result['curves'][name])[:, skip:]
    steps = LOG_EVERY * (1 + skip + np.arange(seeds.shape[1]))
    cost = 1.0 if name == 'adamw' else result['muon_step_over_adamw']
    for axis, x in zip(row, (steps, steps * cost / result['steps']), strict=True):
      axis.plot(x, seeds.mean(0), line, color=colour, label=label, linewidth=1.6)
      axis.fill_between(x, seeds.min(0), seeds.max(0), color=colour, alpha=0.15, linewidth=0)
  for axis, label in zip(row, ('optimizer steps', 'time of the steps / time of the AdamW run')):
    axis.axhline(result['target_loss'], color='0.4', linewidth=0.8, linestyle=(0, (1, 2)))
    axis.set(yscale='log', xlabel=label, ylabel='training loss', title=result['recipe'])
    axis.grid(which='both', alpha=0.2)


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--recipe', choices=RECIPES, required=True)
  parser.add_argument('--store', required=True)
  parser.add_argument('--init-from', default='', help='stage-1 run that quickstart2 starts from')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/optimizers'))
  parser.add_argument('--steps', type=int, default=0, help="0 = the recipe's own")
  parser.add_argument('--tune-steps', type=int, default=0, help='0 = half of --steps')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--adamw-lrs', type=float, nargs='+', help="default: the recipe's grid")
  parser.add_argument('--muon-lrs', type=float, nargs='+', help="default: the recipe's grid")
  parser.add_argument('--fractions', type=float, nargs='*', default=[0.75, 0.5])
  parser.add_argument('--short-seeds', type=int, nargs='+', help='of shortened runs; default: all')
  parser.add_argument('--rounds', type=int, default=15, help='timed steps of each optimizer')
  parser.add_argument('--plot', help='also draw every recipe of OUT into this PNG')
  return parser.parse_args()


def main() -> None:
  args = parse()
  recipe, out = RECIPES[args.recipe], args.out / args.recipe
  base = recipe.make(args.init_from)
  base = dataclasses.replace(base, data=dataclasses.replace(base.data, store=args.store))
  steps = args.steps or base.train.steps
  jax.config.update('jax_compilation_cache_dir', str(out.absolute() / CACHE))
  study = Study(base, out, window=max(steps // 10, MIN_WINDOW))

  grids = {'adamw': args.adamw_lrs or recipe.adamw_lrs, 'muon': args.muon_lrs or recipe.muon_lrs}
  tuning = {
    name: tune(study, name, grids[name], args.tune_steps or steps // 2, args.seeds[0])
    for name in OPTIMIZERS
  }
  lrs = {name: tuning[name]['lr'] for name in OPTIMIZERS}
  runs_of = settings(lrs, steps, args)
  summary = summarise(study, runs_of)
  timing = time_steps(study, [runs_of[name][0] for name in OPTIMIZERS], args.rounds)
  write_curves(study, runs_of, out / 'curves.json', recipe.title, timing)
  if args.plot:
    plot(args.out, args.plot)
  harness.report(
    'steps until Muon reaches the final training loss of tuned AdamW / steps of AdamW',
    'ratio',
    len(args.seeds),
    goal='<= 0.75',
    recipe=recipe.title,
    seeds=args.seeds,
    tuning=tuning,
    step_time=timing,
    **summary,
  )


if __name__ == '__main__':
  main()
