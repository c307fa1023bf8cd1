"""Text and ids per frame as captions and events."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from wallwm_jax.data.schema import CaptionSpan, EventSpan

UNLABELLED = 'unlabelled'


class Span(NamedTuple):
  """Frames start..end-1 to which a text or an event label belongs."""

  start: int
  end: int
  text: str


def leading_verb(instruction: str) -> str:
  """The balancing label of an imperative instruction: its first word."""
  words = re.findall(r'[a-z]+', instruction.lower())
  return words[0] if words else UNLABELLED


def event_label(text: str) -> str:
  """A name is a label as it is; of a sentence the leading verb is."""
  return leading_verb(text) if ' ' in text.strip() else text.strip() or UNLABELLED


def runs(values: Sequence[Any]) -> list[tuple[int, int, Any]]:
  """(start, end, value) of the stretches of equal values."""
  starts = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
  return [(start, end, values[start]) for start, end in zip(starts, [*starts[1:], len(values)])]


def text_spans(values: Sequence[str]) -> list[Span]:
  """Stretches of equal text; frames without text belong to none."""
  return [Span(start, end, text) for start, end, text in runs(values) if text]


def id_spans(values: Sequence[int], texts: Mapping[str, str], prefix: str = '') -> list[Span]:
  """Stretches of equal ids by their text; an id without one is called by `prefix` and its number,
  without a prefix (and if it is negative, 'none') it belongs to none."""
  spans = []
  for start, end, value in runs(values):
    default = f'{prefix}_{value:g}' if prefix and value >= 0 else ''
    if text := texts.get(f'{value:g}', default):
      spans.append(Span(start, end, text))
  return spans


def caption_spans(level: str, spans: Iterable[Span]) -> tuple[CaptionSpan, ...]:
  return tuple(CaptionSpan(level, *span) for span in spans)


def marked_events(marks: Iterable[Span], length: int) -> tuple[EventSpan, ...]:
  """Events of ordered, disjoint marks, labelled by their text (sentences by their verb).

  The action of a mark's last frame leads to the frame after it, so an event ends with that frame
  (shared with the next event). A mark of only the episode's last frame has no action and no event.
  """
  events = [EventSpan(m.start, min(m.end + 1, length), event_label(m.text)) for m in marks]
  return tuple(event for event in events if event.end - event.start >= 2)


def whole_episode(captions: Sequence[CaptionSpan], length: int) -> tuple[EventSpan, ...]:
  """The one event of an episode in which nothing is marked, labelled by its finest text."""
  texts = {span.level: span.text for span in reversed(captions)}
  text = next((texts[level] for level in ('L0', 'L1', 'L2', 'L3', 'human') if level in texts), '')
  return (EventSpan(0, length, leading_verb(text), {}, () if text else ('no_caption',)),)
