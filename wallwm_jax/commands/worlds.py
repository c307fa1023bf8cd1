"""The simulators that `wallwm eval closedloop` and `wallwm rollout` let a policy act in."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from wallwm_jax.commands import common

FILMED = 8  # kinds of task of which a page shows an attempt


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
  """Arguments of everything that acts in a simulator."""
  parser.add_argument(
    '--world', choices=('tabletop', 'metaworld'), default='tabletop',
    help='tabletop, built in, or metaworld, an extra (tabletop)',
  )  # fmt: skip
  parser.add_argument('--store', required=required, help='event store; says how long events last')
  parser.add_argument(
    '--tasks',
    help='tabletop: single, multi, long, or kinds such as reach,push (single); metaworld: MT10, '
    'MT50, or tasks such as reach,push (MT10)',
  )
  parser.add_argument(
    '--max-steps', type=int, help='control steps of an attempt (tabletop 64, metaworld 500)'
  )
  parser.add_argument(
    '--processes', type=int, help='of metaworld environments (one per core, at most 8)'
  )
  parser.add_argument(
    '--source',
    choices=('instruction', 'atomic', 'timed', 'planner', 'conditioned', 'staircase', 'human'),
    default='',
    help='who tells the policy what to do: the instruction of the task; atomic, the next event of '
    "the script; timed, the script's events one after the other, each for its usual time; planner, "
    "the VLM's next event in features of the text encoder; conditioned, the same in the VLM's own; "
    'staircase, its latents; human, a person at the terminal, before every turn (default: atomic '
    'in event mode, instruction in unified mode, staircase where that was trained)',
  )
  parser.add_argument('--untrained', action='store_true', help='random weights instead')


class World:
  """The simulator, tasks and policy that the arguments of `add_arguments` describe.

  tasks, max_steps: as asked for, or the world's own.
  """

  def __init__(self, args: argparse.Namespace, per_kind: int | None = None):
    """per_kind: attempts of each kind of task; None = as many as `args.episodes` says."""
    from wallwm_jax.types import ConfigError

    self._args, self._per_kind = args, per_kind
    if args.world == 'metaworld':
      from wallwm_jax.envs import metaworld

      self.tasks, steps = args.tasks or 'MT10', metaworld.MAX_STEPS
      self._kinds = metaworld.select_tasks(self.tasks)
      episodes = 10 * len(self._kinds)
    else:
      from wallwm_jax.commands.tabletop_attempts import MAX_STEPS as steps

      self.tasks, episodes = args.tasks or 'single', 98
      self._kinds = _tabletop_kinds(self.tasks)
      if args.processes is not None:
        raise ConfigError('--processes: the tabletop runs in one. Leave it out.')
    self.max_steps = steps if args.max_steps is None else args.max_steps
    if per_kind is None:
      asked = episodes if args.episodes is None else args.episodes
      self._per_kind = max(1, asked // len(self._kinds))
    self._options = self._load()

  def attempt(self, record: bool = False, delay: int = 0, waiting: str = 'hold'):
    """Attempts of every kind of task (commands.attempts.Attempts)."""
    options = {'record': record, 'delay': delay, 'waiting': waiting}
    return self._attempt(self._kinds, self._per_kind, **options)

  def page(self, runs):
    """The page of runs of `attempt`, with a filmed attempt of the first kinds of task."""
    from wallwm_jax.commands import attempts, pages

    args, options = self._args, self._options
    filmed = self._attempt(self._kinds[:FILMED], 1, record=True)
    config, params = options['config'], options['params']
    clips = attempts.clips(filmed, config, params, options['captions'], args.seed)
    subtitle = f'{args.workdir} in {args.world}, tasks {self.tasks}, told by {filmed.source}.'
    return pages.closed_loop_page(runs, clips, config, subtitle)

  def _attempt(self, kinds: Sequence[str], per_kind: int, **options):
    args, options = self._args, self._options | options
    if args.world == 'metaworld':
      from wallwm_jax.commands import metaworld_attempts as world

      options |= {'per_task': per_kind, 'processes': args.processes}
      if options['ask'] is not None:  # a bar would be in the way of the questions
        return world.attempt(names=kinds, **options)
      with common.progress_bar('attempts') as progress:
        return world.attempt(names=kinds, progress=progress, **options)
    import jax

    from wallwm_jax.commands import tabletop_attempts as world
    from wallwm_jax.envs.tabletop import tasks

    suite = tasks.task_suite(jax.random.key(args.seed), kinds, per_kind)
    return world.attempt(suite=suite, **options)

  def _load(self) -> dict:
    """Arguments of `attempt` that both worlds have."""
    from wallwm_jax.commands import attempts
    from wallwm_jax.data.moments import caption_bank
    from wallwm_jax.data.store import EventStore
    from wallwm_jax.text.planning import make_planning_texts
    from wallwm_jax.training.checkpoints import load_inference, load_source

    args, (names, control_period) = self._args, self._facts()
    store = EventStore(args.store)
    source = args.source or attempts.default_source(load_source(args.workdir)[0])
    bank = caption_bank(store) if source in attempts.SPEAKERS else None
    config, params = load_inference(args.workdir, captions=bank)
    table, planning, ask = attempts.caption_table(config, store, names), None, None
    if bank is not None:
      planning = attempts.planning_table(make_planning_texts(config), bank, names)
    if source == attempts.HUMAN:
      ask = _terminal(config, names, table, control_period)
    if args.untrained:
      params = attempts.untrained(config, params, args.seed)
    return {
      'config': config,
      'params': params,
      'captions': table,
      'max_steps': self.max_steps,
      'seed': args.seed,
      'source': source,
      'planning': planning,
      'ask': ask,
    }

  def _facts(self) -> tuple[tuple[str, ...], float]:
    """(captions, s between two actions) of the world."""
    if self._args.world == 'metaworld':
      from wallwm_jax.commands.metaworld_attempts import CONTROL_PERIOD
      from wallwm_jax.envs.metaworld.tasks import CAPTIONS

      return CAPTIONS, CONTROL_PERIOD
    from wallwm_jax.envs.tabletop import TabletopConfig
    from wallwm_jax.envs.tabletop.tasks import CAPTIONS

    return CAPTIONS, TabletopConfig().control_period


def _terminal(config, names, table, control_period: float):
  from wallwm_jax.commands.attempts import policy_rate
  from wallwm_jax.commands.terminal import Terminal
  from wallwm_jax.text.factory import make_text_encoder

  latent_time = config.model.steps_per_latent / policy_rate(config, control_period)
  return Terminal(names, table, make_text_encoder(config.model.text).encode, latent_time)


def _tabletop_kinds(chosen: str) -> tuple[str, ...]:
  """Kinds named on the command line: 'single', 'multi', 'long' or a comma-separated list."""
  from wallwm_jax.envs.tabletop import tasks

  groups = {'single': tasks.SINGLE_KINDS, 'multi': tasks.MULTI_KINDS, 'long': tasks.LONG_KINDS}
  return groups.get(chosen) or tuple(chosen.split(','))
