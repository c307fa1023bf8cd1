"""Sources of text: what the denoiser is told before every turn of a rollout, and by whom.

A source is asked before each turn and answers with a `Request`: text, for how long it is meant, and
which caption it stands for. The denoiser sees only the text, so a rollout may change its source at
any turn. A script's sources and a person are here, those that ask a VLM in `inference.language`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Int

from wallwm_jax.types import Observation, Text, pytree_dataclass

NOTHING = -1  # caption of a request that stands for no row of the table


@pytree_dataclass
class CaptionTable:
  """Every caption an environment can name, encoded once, and how long its event usually lasts.

  text: features [I, X, E], mask [I, X] for I captions; lengths: [I] int32 future latents.
  """

  text: Text
  lengths: Int[Array, 'I']


@pytree_dataclass
class TextContext:
  """What a source may read before a turn.

  obs: what the policy is about to see, B = 1. captions: the environment's table. instruction: the
  row of it that is the task. script: [S] rows of the events that such a task consists of, in order,
  NOTHING behind the last. event: the row of the next scripted event, known to the environment
  alone: only sources that follow its script may read it. step: number of the turn. clock: future
  latents of all turns before it, the only time that a policy can tell.
  """

  obs: Observation
  captions: CaptionTable
  instruction: Int[Array, '']
  script: Int[Array, 'S']
  event: Int[Array, '']
  step: Int[Array, '']
  clock: Int[Array, '']


@pytree_dataclass
class Request:
  """What a source asks for: text with B = 1, length in future latents, >= 1 and not yet cut to a
  window, and the row of the caption table it stands for (NOTHING = none).
  """

  text: Text
  length: Int[Array, '']
  caption: Int[Array, '']


State = Any  # pytree that a source carries from turn to turn; () where it has no memory


class Source(NamedTuple):
  """start(captions) -> state before the first turn; speak(context, state) -> (request, state).

  Both are pure and keep shapes and dtypes.
  """

  start: Callable[[CaptionTable], State]
  speak: Callable[[TextContext, State], tuple[Request, State]]


@pytree_dataclass
class Held:
  """Memory of a held source: its own, its last request, and the clock at which that has run out."""

  inner: State
  request: Request
  until: Int[Array, '']


def stateless(speak: Callable[[TextContext], Request]) -> Source:
  """A source without memory."""
  return Source(lambda captions: (), lambda context, state: (speak(context), state))


def lookup(captions: CaptionTable, row: Int[Array, '']) -> Request:
  """The request of one row of the table, as long as its event usually lasts."""
  text = jax.tree.map(lambda x: jnp.asarray(x)[row][None], captions.text)
  return request(text, jnp.asarray(captions.lengths)[row], row)


def request(text: Text, length, caption) -> Request:
  """A Request in the dtypes that all sources share, so that they can stand in for each other."""
  text = Text(text.features.astype(jnp.float32), text.mask)
  length, caption = jnp.asarray(length, jnp.int32), jnp.asarray(caption, jnp.int32)
  return Request(text, jnp.maximum(length, 1), caption)


# Source 1: the instruction of the whole task.
instruction = stateless(lambda context: lookup(context.captions, context.instruction))
# Source 2: the atomic instruction, caption of the next event of the environment's script.
atomic = stateless(lambda context: lookup(context.captions, context.event))


@pytree_dataclass
class Place:
  """Memory of `timed`: the place in the script, and the clock at which its event has run out."""

  index: Int[Array, '']
  until: Int[Array, '']


def _timed(context: TextContext, place: Place) -> tuple[Request, Place]:
  over = context.clock >= place.until
  last = jnp.sum(context.script != NOTHING) - 1
  index = jnp.where(over, jnp.minimum(place.index + 1, last), place.index).astype(jnp.int32)
  said = lookup(context.captions, context.script[index])
  until = jnp.where(over, context.clock + said.length, place.until)
  return dataclasses.replace(said, length=until - context.clock), Place(index, until)


# The events of the task in order, each for as long as it usually lasts by the policy's own clock,
# then the last one on and on: open loop, nothing is read off the environment.
timed = Source(lambda captions: Place(jnp.int32(-1), jnp.int32(0)), _timed)

# (instruction, step, clock), int32 [], as in TextContext -> what a person asks for.
Ask = Callable[[np.ndarray, np.ndarray, np.ndarray], Request]


def human(ask: Ask) -> Source:
  """A person is asked before every turn; `ask` answers in NumPy, text with B = 1.

  A call to the host, which waits for it: for attempts that run one at a time.
  """

  def speak(context: TextContext) -> Request:
    shape = jax.eval_shape(lookup, context.captions, context.instruction)
    return io_callback(ask, shape, context.instruction, context.step, context.clock)

  return stateless(speak)


def switched(sources: Sequence[Source], schedule: Int[Array, 'S']) -> Source:
  """The source `schedule` names at each turn: indices into `sources`; the last one holds on.

  Every source keeps its own memory, which rests while another speaks.
  """
  schedule = jnp.asarray(schedule, jnp.int32)

  def branch(i: int):
    def speak(context, states):
      said, state = sources[i].speak(context, states[i])
      return said, (*states[:i], state, *states[i + 1 :])

    return speak

  def speak(context: TextContext, states):
    index = schedule[jnp.minimum(context.step, schedule.shape[0] - 1)]
    return jax.lax.switch(index, [branch(i) for i in range(len(sources))], context, states)

  return Source(lambda captions: tuple(source.start(captions) for source in sources), speak)


def held(source: Source) -> Source:
  """`source`, asked again only when what it asked for has run out by the policy's own clock."""

  def start(captions: CaptionTable) -> Held:
    nothing = lookup(captions, 0)  # only its shapes count: it has run out before the first turn
    return Held(source.start(captions), nothing, jnp.int32(0))

  def ask(context, state: Held):
    said, inner = source.speak(context, state.inner)
    return Held(inner, said, context.clock + said.length)

  def speak(context: TextContext, state: Held):
    running = context.clock < state.until
    state = jax.lax.cond(running, lambda _, state: state, ask, context, state)
    return state.request, state

  return Source(start, speak)
