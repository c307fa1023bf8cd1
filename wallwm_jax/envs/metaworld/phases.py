"""Which branch of an expert's script runs at each step, and the events that follow from it.

The scripts do not say in which phase they are; the lines that run do. They are watched with
`sys.settrace`, and the branches (the `return`s of `_desired_pos`, or the innermost blocks of the
conditions in `get_action`) are taken from the source.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import warnings

import numpy as np

from wallwm_jax.data.primitives import merge_runs
from wallwm_jax.data.schema import EventSpan
from wallwm_jax.envs.metaworld.tasks import BRANCH_PHASES, phase_caption, script_phases

# Chatter of a script's thresholds is no event: a visit to a phase of fewer steps than SHORTEST, and
# a return to an earlier phase of fewer than RETURN.
SHORTEST, RETURN = 5, 20
RECOVERY = 'recovery'  # flag of an event that goes back to a phase that was over


class Expert:
  """A scripted expert of a task: `act` gives its command and the phase it is in."""

  def __init__(self, task: str, policy):
    self.policy = policy
    self._function, self._branches = branches(type(policy))
    self._phases = [int(digit) for digit in BRANCH_PHASES[task]]

  def act(self, observation: np.ndarray) -> tuple[np.ndarray, int]:
    """Command, float64 [4] in -1..1, and phase (index into METAWORLD[task].phases) at a privileged
    observation [39]."""
    command, lines = _traced(self.policy, observation, self._function)
    taken = [
      k for line in lines for k, (first, last) in enumerate(self._branches) if first <= line <= last
    ]
    phase = self._phases[taken[-1] if taken else 0]
    return np.clip(np.asarray(command, np.float64), -1, 1), phase


class Watch:
  """Where the script of a task stands in an episode that somebody else acts in.

  A phase counts once the script has been in it for SHORTEST steps in a row, as it takes to be an
  event of a demonstration.

  event: the phase (index into METAWORLD[task].phases) that it is in; completed: how many phases of
  its script lie behind the furthest one.
  """

  def __init__(self, task: str, policy):
    self._expert, self._order = Expert(task, policy), script_phases(task)
    self._last, self._run = -1, 0
    self.event, self.completed = -1, 0

  def see(self, observation: np.ndarray) -> None:
    """The next step: a privileged observation [39]."""
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # the experts warn of every command that is clipped
      _, phase = self._expert.act(observation)
    self._run = self._run + 1 if phase == self._last else 1
    self._last = phase
    if self._run >= SHORTEST or self.event < 0:
      self.event = phase
    if self._run >= SHORTEST:
      self.completed = max(self.completed, self._order.index(phase))

  @property
  def progress(self) -> float:
    """0..100, below 100: the share of the script's phases that are completed."""
    return 100 * self.completed / len(self._order)

  @property
  def furthest(self) -> int:
    """The furthest phase that counts; the first one to begin with."""
    return self._order[self.completed]


def branches(policy_class) -> tuple[str, list[tuple[int, int]]]:
  """The function that decides, and (first, last) line of each of its branches in its file."""
  name = '_desired_pos' if '_desired_pos' in vars(policy_class) else 'get_action'
  source, start = inspect.getsourcelines(getattr(policy_class, name))
  tree = ast.parse(textwrap.dedent(''.join(source)))
  if name == '_desired_pos':
    nodes = [(n.lineno, n.end_lineno) for n in ast.walk(tree) if isinstance(n, ast.Return)]
  else:
    nodes = [
      (block[0].lineno, block[-1].end_lineno)
      for node in ast.walk(tree)
      if isinstance(node, ast.If)
      for block in (node.body, node.orelse)
      if block and not isinstance(block[0], ast.If)
    ]
  return name, sorted((first + start - 1, last + start - 1) for first, last in nodes)


def _traced(policy, observation: np.ndarray, function: str) -> tuple[np.ndarray, list[int]]:
  """The command, and the lines of `function` that ran."""
  lines: list[int] = []

  def local(frame, event, _):
    if event == 'line':
      lines.append(frame.f_lineno)
    return local

  def calls(frame, event, _):
    return local if frame.f_code.co_name == function else None

  before = sys.gettrace()
  sys.settrace(calls)
  try:
    command = policy.get_action(observation)
  finally:
    sys.settrace(before)
  return command, lines


def events_of(task: str, phases: np.ndarray) -> tuple[EventSpan, ...]:
  """Events of an episode from the phase at each of its steps [T - 1]; neighbours share a frame."""
  cuts = [0, *merge_runs(phases, SHORTEST).tolist(), len(phases)]
  spans: list[list[int]] = []  # start, end, phase
  for start, end in zip(cuts, cuts[1:]):
    phase = int(np.bincount(phases[start:end]).argmax())
    back = spans and phase < spans[-1][2] and end - start < RETURN
    if spans and (back or phase == spans[-1][2]):
      spans[-1][1] = end
    else:
      spans.append([start, end, phase])
  events, furthest = [], -1
  for start, end, phase in spans:
    text = phase_caption(task, phase)
    flags = (RECOVERY,) if phase < furthest else ()
    events.append(EventSpan(start, end + 1, text, {'L1': text}, flags))
    furthest = max(furthest, phase)
  return tuple(events)
