"""A person at the terminal who says, before every turn of an attempt, what to do next."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import numpy as np

from wallwm_jax.inference.sources import NOTHING, CaptionTable, Request
from wallwm_jax.types import Text

HELP = (
  'Type a number or any text, then perhaps "; seconds". Enter alone: the same again. "?": the list.'
)


def _show(line: str) -> None:
  print(line, file=sys.stderr)


def _ask(prompt: str) -> str:
  """A line from stdin; the prompt goes to stderr: stdout is left to the result."""
  print(prompt, end='', file=sys.stderr, flush=True)
  return input()


class Terminal:
  """Answers in the place of a planner (`sources.human`).

  Args:
    captions: what may be asked for by number; table: the same, encoded.
    encode: texts -> Text features [n, X, E]. latent_time: s of one future latent.
    read: prompt -> a line; EOFError when nobody answers any more: then the last answer stands.
    say: shows a line.
  """

  def __init__(
    self,
    captions: Sequence[str],
    table: CaptionTable,
    encode: Callable[[Sequence[str]], Text],
    latent_time: float,
    read: Callable[[str], str] = _ask,
    say: Callable[[str], None] = _show,
  ):
    self._captions, self._table, self._encode = captions, table, encode
    self._latent_time, self._read, self._say = latent_time, read, say
    self._last: Request | None = None

  def __call__(self, instruction: np.ndarray, step: np.ndarray, clock: np.ndarray) -> Request:
    """What to do in turn `step` of an attempt at the task of row `instruction`."""
    if step == 0:
      self._last = self._known(int(instruction), None)
      self._list()
      self._say(f'The task: {self._captions[int(instruction)]}. {HELP}')
    while True:
      try:
        line = self._read(f'turn {step}, {clock * self._latent_time:.1f} s > ').strip()
      except EOFError:
        return self._last
      if line == '?':
        self._list()
        continue
      try:
        self._last = self._understand(line) if line else self._last
      except ValueError as error:
        self._say(str(error))
        continue
      return self._last

  def _understand(self, line: str) -> Request:
    """ValueError where a line is neither a known number nor a text, or its time is no time."""
    text, _, seconds = (part.strip() for part in line.partition(';'))
    length = None
    if seconds:
      try:
        length = math.ceil(float(seconds) / self._latent_time)
      except (ValueError, OverflowError):
        length = 0
      if length < 1:
        raise ValueError(f'expected seconds > 0 behind ";", got {seconds!r}.')
    if not text:
      raise ValueError('expected a number or a text before ";".')
    if text in self._captions:
      return self._known(self._captions.index(text), length)
    if text.isdecimal():
      row = int(text)
      if row >= len(self._captions):
        raise ValueError(f'expected a number up to {len(self._captions) - 1}, got {text}.')
      return self._known(row, length)
    features = self._encode([text])
    usual = int(np.median(np.asarray(self._table.lengths)))
    return self._request(features, length or usual, NOTHING)

  def _known(self, row: int, length: int | None) -> Request:
    text = self._table.text
    features = Text(np.asarray(text.features)[row][None], np.asarray(text.mask)[row][None])
    return self._request(features, length or int(np.asarray(self._table.lengths)[row]), row)

  def _request(self, text: Text, length: int, row: int) -> Request:
    features = Text(np.asarray(text.features, np.float32), np.asarray(text.mask, bool))
    return Request(features, np.int32(min(length, 2**16)), np.int32(row))

  def _list(self) -> None:
    for row, caption in enumerate(self._captions):
      self._say(f'{row:4d}  {caption}')
