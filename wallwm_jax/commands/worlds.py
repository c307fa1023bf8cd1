"""The simulators that `wallwm eval closedloop` and `wallwm rollout` let a policy act in."""

from __future__ import annotations

import argparse

from wallwm_jax.commands import common


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
  """Arguments of everything that acts in a simulator."""
  parser.add_argument(
    '--world', choices=('tabletop', 'metaworld'), default='tabletop',
    help='tabletop, built in, or metaworld, an extra (tabletop)',
  )  # fmt: skip
  parser.add_argument('--store', required=required, help='event store; says how long events last')
  parser.add_argument(
    '--tasks',
    help='tabletop: single, multi, or kinds such as reach,push (single); metaworld: MT10, MT50, or '
    'tasks such as reach,push (MT10)',
  )
  parser.add_argument(
    '--max-steps', type=int, help='control steps of an attempt (tabletop 64, metaworld 500)'
  )
  parser.add_argument(
    '--processes', type=int, help='of metaworld environments (one per core, at most 8)'
  )
  parser.add_argument(
    '--source',
    choices=('instruction', 'atomic', 'planner', 'conditioned', 'staircase'),
    default='',
    help='who tells the policy what to do: the instruction of the task; atomic, the next event of '
    "the script; planner, the VLM's next event in features of the text encoder; conditioned, the "
    "same in the VLM's own; staircase, its latents (default: atomic in event mode, instruction in "
    'unified mode, staircase where that was trained)',
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
    self._load()

  def _load(self) -> None:
    from wallwm_jax.commands import attempts
    from wallwm_jax.data.moments import caption_bank
    from wallwm_jax.data.store import EventStore
    from wallwm_jax.text.planning import make_planning_texts
    from wallwm_jax.training.checkpoints import load_inference, load_source

    args, names = self._args, self._captions()
    store = EventStore(args.store)
    self._source = args.source or attempts.default_source(load_source(args.workdir)[0])
    bank = caption_bank(store) if self._source in attempts.SPEAKERS else None
    self._config, self._params = load_inference(args.workdir, captions=bank)
    self._planning = None
    if bank is not None:
      texts = make_planning_texts(self._config)
      self._planning = attempts.planning_table(texts, bank, names)
    if args.untrained:
      self._params = attempts.untrained(self._config, self._params, args.seed)
    self._table = attempts.caption_table(self._config, store, names)

  def _captions(self) -> tuple[str, ...]:
    if self._args.world == 'metaworld':
      from wallwm_jax.envs.metaworld.tasks import CAPTIONS
    else:
      from wallwm_jax.envs.tabletop.tasks import CAPTIONS
    return CAPTIONS

  def attempt(self, record: bool = False, delay: int = 0):
    """Attempts of every kind of task, once (commands.attempts.Attempts)."""
    args, policy = self._args, (self._config, self._params)
    options = {
      'max_steps': self.max_steps,
      'seed': args.seed,
      'source': self._source,
      'planning': self._planning,
      'record': record,
      'delay': delay,
    }
    if args.world == 'metaworld':
      from wallwm_jax.commands import metaworld_attempts as world

      options |= {'per_task': self._per_kind, 'processes': args.processes}
      with common.progress_bar('attempts') as progress:
        return world.attempt(*policy, self._kinds, self._table, progress=progress, **options)
    import jax

    from wallwm_jax.commands import tabletop_attempts as world
    from wallwm_jax.envs.tabletop import tasks

    suite = tasks.task_suite(jax.random.key(args.seed), self._kinds, self._per_kind)
    return world.attempt(*policy, suite, self._table, **options)


def _tabletop_kinds(chosen: str) -> tuple[str, ...]:
  """Kinds named on the command line: 'single', 'multi' or a comma-separated list."""
  from wallwm_jax.envs.tabletop import tasks

  groups = {'single': tasks.SINGLE_KINDS, 'multi': tasks.MULTI_KINDS}
  return groups.get(chosen) or tuple(chosen.split(','))
