"""What a language model is asked and shown to answer, from ground truth: instructions in other
words, plans, and reasoning traces. No model, no randomness.

A trace can be told from what the model is given: the task is the instruction in its canonical
words, what was done shows in the pictures, the next event follows from both, and the goal's place
is told coarsely. Its style follows from the way the instruction was put.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import NamedTuple

import numpy as np

from wallwm_jax.data.phrases import (
  ANY_REASON,
  FAMILIES,
  FRAMES,
  HELDOUT_FRAMES,
  HELDOUT_JOINS,
  HELDOUT_STYLES,
  JOINS,
  METAWORLD,
  PAST,
  REASONS,
  STYLES,
  WHERE_TO,
)
from wallwm_jax.data.schema import ARM_WIDTH

__all__ = [
  'METAWORLD',
  'Facts',
  'Phrasings',
  'axis_words',
  'goal_words',
  'instruct',
  'objects_of',
  'phrasings',
  'plain',
  'style_of',
  'timed_plan',
  'trace',
]

CLOSE, NEAR = 0.015, 0.13  # m to the goal up to which it is 'close' and 'near'
_MAX_TENTHS = 99
_CACHED = 65_536

# Words for -x, +x, -y, +y, -z, +z of the robot's base frame: x ahead and y left (ROS), and the
# simulated tables that are seen from the front, x right and y ahead.
_ROS = ('back', 'forward', 'right', 'left', 'down', 'up')
_TABLE = ('left', 'right', 'back', 'forward', 'down', 'up')
_AXES = {'tabletop': _TABLE, 'metaworld': _TABLE}


class Phrasings(NamedTuple):
  """One instruction in different words, no wording twice: train[0] is the canonical one; heldout is
  never trained on."""

  train: tuple[str, ...]
  heldout: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a trace is about.

  task: the instruction, canonical. done: caption of the event that was completed last, '' = none.
  next: caption of the running event. where: of `goal_words`, '' = unknown.
  """

  task: str
  done: str
  next: str
  where: str


def plain(text: str) -> str:
  """The canonical form of an instruction or caption: single blanks, no full stop, no capital at the
  beginning (unless of an abbreviation)."""
  text = ' '.join(text.split()).rstrip('. ')
  return text if text[1:2].isupper() else text[:1].lower() + text[1:]


@functools.lru_cache(_CACHED)
def phrasings(text: str) -> Phrasings:
  """Other wordings of an instruction, at least 6 for training and 3 held out.

  Every training frame (way to ask) and every training core (way to say it) occurs in training, not
  every pair of them. Held-out wordings put cores, some of them new, into new frames.
  """
  cores, unseen = _cores(plain(text))
  asked = [(frame, k % len(cores)) for k, frame in enumerate(FRAMES) if k]
  if len(cores) == 1:
    asked = [(frame, 0) for frame in FRAMES[1:]]
  train = [*cores, *(frame.format(cores[core]) for frame, core in asked)]
  pool = [*unseen, *cores]
  heldout = [frame.format(pool[k % len(pool)]) for k, frame in enumerate(HELDOUT_FRAMES)]
  return Phrasings(tuple(dict.fromkeys(train)), tuple(dict.fromkeys(heldout)))


def _cores(text: str) -> tuple[list[str], list[str]]:
  """Wordings without a frame: for training, `text` first, and held out."""
  first, joined, second = text.partition(', then ')
  if joined:
    return _joined(text, first, second)
  for family in FAMILIES:
    if match := re.fullmatch(family.pattern, text):
      words = match.groupdict()
      return (
        [text, *(template.format(**words) for template in family.train)],
        [template.format(**words) for template in family.heldout],
      )
  return [text], []


def _joined(text: str, first: str, second: str) -> tuple[list[str], list[str]]:
  """As `_cores`, of two instructions in one; the second may lack the verb of the first."""
  verb = first.split(' ')[0]
  a, _ = _cores(first)
  b, _ = _cores(second if second.split(' ')[0] in PAST else f'{verb} {second}')
  pairs = [(a[k % len(a)], b[k % len(b)]) for k in range(len(JOINS))]
  train = [join.format(a=x, b=y) for join, (x, y) in zip(JOINS, pairs)]
  unseen = [join.format(a=a[-1], b=b[k % len(b)]) for k, join in enumerate(HELDOUT_JOINS)]
  return list(dict.fromkeys([text, *train])), unseen


def instruct(text: str, phrasing: str, choice: int) -> str:
  """A wording of an instruction: phrasing 'canonical', or the one that the integer `choice` picks
  of those of 'train' or 'heldout'."""
  if phrasing == 'canonical':
    return plain(text)
  wordings = getattr(phrasings(text), phrasing)
  return wordings[choice % len(wordings)]


@functools.lru_cache(_CACHED)
def style_of(wording: str) -> int:
  """Index into STYLES + HELDOUT_STYLES of the traces that answer a wording: a function of its
  frame. Held-out frames have held-out styles."""
  frames = FRAMES + HELDOUT_FRAMES

  def fits(frame: str) -> bool:
    before, after = frame.split('{}')
    return wording.startswith(before) and wording.endswith(after)

  index = max((k for k, frame in enumerate(frames) if fits(frame)), key=lambda k: len(frames[k]))
  if index >= len(FRAMES):
    return len(STYLES) + (index - len(FRAMES)) % len(HELDOUT_STYLES)
  return 1 + (index - 1) % (len(STYLES) - 1) if index else 0


@functools.lru_cache(_CACHED)
def trace(facts: Facts, style: int) -> str:
  """The reasoning that leads from a task to its next event: task, progress, next event, why.

  Args:
    style: of `style_of`.
  """
  following = plain(facts.next)
  return (STYLES + HELDOUT_STYLES)[style].format(
    task=plain(facts.task),
    done=_past(plain(facts.done)),
    next=following,
    why=REASONS.get(following.split(' ')[0], ANY_REASON),
    where=facts.where or 'unknown',
  )


def _past(caption: str) -> str:
  if not caption:
    return 'nothing'
  verb, _, rest = re.sub(WHERE_TO, '', caption).partition(' ')
  return f'{PAST[verb]} {rest}'.rstrip() if verb in PAST else caption


def timed_plan(caption: str, remaining: float) -> str:
  """The plan 'plan: {caption}; {NN} tenths': remaining seconds in tenths, at most 99."""
  tenths = min(round(10 * remaining), _MAX_TENTHS)
  return f'plan: {plain(caption)}; {tenths:02d} tenths'


@functools.lru_cache(_CACHED)
def objects_of(text: str) -> tuple[str, ...]:
  """What an instruction is about: the thing that is handled, then what it is brought to; () where
  its wording is unknown. Of two instructions in one the first counts."""
  whole = plain(text)
  first = re.split(r', then |,? (?:and |then )+(?=\w+ (?:it|them)\b)', whole)[0]
  for task in METAWORLD.values():
    if task.instruction in (whole, first):
      return task.objects
  for family in FAMILIES:
    if match := re.fullmatch(family.pattern, first):
      words = match.groupdict()
      return tuple(words[name] for name in ('o', 't') if words.get(name))
  return ()


def axis_words(source: str) -> tuple[str, ...]:
  """Words for -x, +x, -y, +y, -z, +z of the base frame of a data set's robot."""
  return _AXES.get(source, _ROS)


def goal_words(state: np.ndarray, goal: np.ndarray, source: str) -> str:
  """Where a pose lies, seen from another: 'close', or 'near' or 'far' and the direction of the
  largest part of the way, such as 'far left'.

  Args:
    state, goal: [A] physical units (m, robot base frame); of two arms the one that has further to
      go counts. source: data set of the episode, which says how its base frame is oriented.
  """
  ways = (goal - state).reshape(-1, ARM_WIDTH)[:, :3]
  distances = np.sqrt((ways * ways).sum(-1))
  arm = int(distances.argmax())
  if distances[arm] < CLOSE:
    return 'close'
  axis = int(np.abs(ways[arm]).argmax())
  words = axis_words(source)
  return ('near ' if distances[arm] < NEAR else 'far ') + words[2 * axis + (ways[arm, axis] > 0)]
