"""The tasks of Meta-World: suites, and which event each branch of an expert's script belongs to."""

from __future__ import annotations

from collections.abc import Sequence

from wallwm_jax.data.phrases import METAWORLD, MetaWorldTask
from wallwm_jax.errors import ConfigError

# By task: the event (index into METAWORLD[task].phases) of each branch of the expert's script, in
# the order in which the branches stand in its source (metaworld 3.1.1).
BRANCH_PHASES = {
  'assembly': '04123',
  'basketball': '0123',
  'bin-picking': '01234',
  'box-close': '0124',
  'button-press': '01',
  'button-press-topdown': '01',
  'button-press-topdown-wall': '01',
  'button-press-wall': '0012',
  'coffee-button': '01',
  'coffee-pull': '012',
  'coffee-push': '012',
  'dial-turn': '001',
  'disassemble': '012',
  'door-close': '0001',
  'door-lock': '0022',
  'door-open': '002',
  'door-unlock': '002',
  'drawer-close': '0001',
  'drawer-open': '002',
  'faucet-close': '001',
  'faucet-open': '001',
  'hammer': '0134',
  'hand-insert': '0122',
  'handle-press': '01',
  'handle-press-side': '01',
  'handle-pull': '001',
  'handle-pull-side': '001',
  'lever-pull': '011',
  'peg-insert-side': '0134',
  'peg-unplug-side': '012',
  'pick-out-of-hole': '0123',
  'pick-place': '0113',
  'pick-place-wall': '012334',
  'plate-slide': '001',
  'plate-slide-back': '00111',
  'plate-slide-back-side': '001',
  'plate-slide-side': '0011',
  'push': '001',
  'push-back': '012',
  'push-wall': '00112',
  'reach': '0',
  'reach-wall': '01',
  'shelf-place': '01224',
  'soccer': '11',
  'stick-pull': '013334',
  'stick-push': '013344',
  'sweep': '012',
  'sweep-into': '012',
  'window-close': '002',
  'window-open': '002',
}
SUITES = {
  'MT10': (
    'reach',
    'push',
    'pick-place',
    'door-open',
    'drawer-open',
    'drawer-close',
    'button-press-topdown',
    'peg-insert-side',
    'window-open',
    'window-close',
  ),
  'MT50': tuple(METAWORLD),
}
# Everything that a policy may be told: instructions, then events. Rows of a caption table.
CAPTIONS = tuple(
  dict.fromkeys(
    [task.instruction for task in METAWORLD.values()]
    + [caption for task in METAWORLD.values() for caption in task.phases]
  )
)


def task_of(name: str) -> MetaWorldTask:
  """Instruction, objects and captions of a task, named without its version suffix.

  Raises:
    ConfigError: an unknown task.
  """
  if name not in METAWORLD:
    raise ConfigError(f'Meta-World task {name!r}: unknown.{_nearest(name)}')
  return METAWORLD[name]


def select_tasks(wanted: str | Sequence[str]) -> tuple[str, ...]:
  """The tasks of a suite ('MT10', 'MT50'), or those named: a sequence or 'reach,push'.

  Raises:
    ConfigError: an unknown or repeated name, or none.
  """
  if isinstance(wanted, str):
    wanted = SUITES.get(wanted) or [name.strip() for name in wanted.split(',')]
  names = tuple(wanted)
  for name in names:
    if name not in METAWORLD:
      raise ConfigError(
        f'tasks: expected a suite or tasks of Meta-World, got {name!r}.{_nearest(name)}'
      )
  if not names or len(set(names)) != len(names):
    raise ConfigError(f'tasks: expected different tasks, at least one, got {list(names)}.')
  return names


def phase_caption(task: str, phase: int) -> str:
  """What the robot does in an event of a task."""
  return METAWORLD[task].phases[phase]


def script_phases(task: str) -> list[int]:
  """The events that the expert of a task goes through, in order, as indices into its phases."""
  return sorted({int(digit) for digit in BRANCH_PHASES[task]})


def script_rows(task: str) -> list[int]:
  """The same as rows of CAPTIONS."""
  return [CAPTIONS.index(phase_caption(task, phase)) for phase in script_phases(task)]


def instruction_row(task: str) -> int:
  """Row of CAPTIONS."""
  return CAPTIONS.index(task_of(task).instruction)


def _nearest(name: str) -> str:
  from wallwm_jax.config import nearest  # brings JAX with it, which recording does without

  return nearest(name, [*SUITES, *METAWORLD])
