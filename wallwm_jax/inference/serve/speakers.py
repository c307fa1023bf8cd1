"""Sources of text that ask a VLM, for sessions: each looks at what its own robot sees, is told the
task by its own client, and remembers what it has planned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.inference import sources
from wallwm_jax.inference.language import PLANNERS, SPEAKERS, PlanningTable
from wallwm_jax.inference.sources import CaptionTable, Held, TextContext
from wallwm_jax.types import InferenceParams, Observation, Prompt, Text


class Said(NamedTuple):
  """What a source says. text: B = 1; length: future latents that it is meant for, from when it was
  said; caption: the planned event, '' where it is none; left: latents until it has run out."""

  text: Text
  length: int
  caption: str
  left: int


class Speakers:
  """The sources of a model with a language side.

  Args:
    config, params: of `checkpoints.load_inference(captions=...)`.
    prompts: instructions -> Prompt [n, S] (`text.planning.PlanningTexts.prompts`).
    captions: what the VLM may plan, the same as those given to `load_inference`. text: features
      [J, X, E] of them.
    fps: actions per second of the policy, what turns planned time into steps.
  """

  def __init__(
    self,
    config: ExperimentConfig,
    params: InferenceParams,
    prompts: Callable[[Sequence[str]], Prompt],
    captions: Sequence[str],
    text: Text,
    *,
    fps: float,
  ):
    self._params, self._prompts, self._captions = params, prompts, tuple(captions)
    # A plan lasts as long as the VLM says, so the lengths of the table are never read.
    self._table = CaptionTable(text, np.ones(len(captions), np.int32))
    self._source = functools.partial(_source, cfg=config, fps=fps)
    self.names = tuple(
      name for name, (_, parts) in SPEAKERS.items() if all(part in params.model for part in parts)
    )
    self._speak = {
      name: jax.jit(functools.partial(_speak, functools.partial(self._source, name)))
      for name in self.names
    }

  def prompt(self, instruction: str) -> Prompt:
    """Tokens [1, S] of an instruction.

    Raises:
      ConfigError, DataError: one that is too long, or spells a token of its own.
    """
    return self._prompts([instruction])

  def start(self, name: str) -> Held:
    """The memory of a source that has not spoken yet."""
    return jax.device_get(self._source(name, self._params, None).start(self._table))

  def speak(
    self,
    name: str,
    obs: Observation,
    prompt: Prompt,
    memory: Held,
    *,
    clock: int,
    hold: bool,
  ) -> tuple[Said, Held]:
    """What a source says now, and what it remembers then.

    Args:
      obs: B = 1, of which the last frame is seen. clock: future latents since the session began.
      hold: a plan that has not run out is kept; else it plans anew.
    """
    obs = dataclasses.replace(obs, frames=obs.frames[:, :, -1:])
    anew = not (hold and name in PLANNERS)
    said, memory = self._speak[name](
      self._params, self._table, prompt, obs, memory, np.int32(clock), anew
    )
    memory = jax.device_get(memory)
    caption = int(memory.request.caption)
    named = self._captions[caption] if caption != sources.NOTHING else ''
    said = jax.device_get(said)
    return Said(said.text, int(said.length), named, int(memory.until) - clock), memory


def _source(name, params, table: PlanningTable | None, *, cfg, fps) -> sources.Source:
  return sources.held(SPEAKERS[name][0](params, table, cfg=cfg, fps=fps))


def _speak(make, params, captions, prompt, obs, memory, clock, anew):
  """(Request, Held); the prompt is the only row of the table, its captions those of the bank."""
  rows = np.arange(len(captions.lengths), dtype=np.int32)
  memory = dataclasses.replace(memory, until=jnp.where(anew, clock, memory.until))
  nothing, script = jnp.int32(0), jnp.full(1, sources.NOTHING)  # the only prompt, and no script
  context = TextContext(obs, captions, nothing, script, nothing, nothing, clock)
  return make(params, PlanningTable(prompt, rows)).speak(context, memory)
