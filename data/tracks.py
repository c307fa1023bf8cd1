"""Caption levels as tracks: pieces of time that follow each other without gaps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from wallwm_jax.data.schema import CaptionSpan, EpisodeRecord
from wallwm_jax.types import DataError

NESTED = ('L3', 'L2', 'L1', 'L0')  # task, subtask, action, segment


class Piece(NamedTuple):
  """Frames start..stop, both included: the next piece starts at `stop`. text '' = not said yet;
  source: who says it ('given', 'vlm', 'template')."""

  start: int
  stop: int
  text: str = ''
  source: str = ''


Track = list[Piece]


def join_given(spans: Iterable[CaptionSpan], last: int) -> Track:
  """A track over frames 0..last of spans in any order; where two overlap the later one holds, and
  where none is there are pieces without text.

  Spans that follow each other without a shared frame are joined at the first frame of the later.
  """
  ordered = sorted((s for s in spans if s.text), key=lambda s: (s.start, s.end))
  pieces, at = [], 0
  for span, after in itertools.zip_longest(ordered, ordered[1:]):
    stop = min(span.end - 1, last)
    if after is not None and after.start <= span.end:
      stop = after.start
    elif after is None and span.end >= last:
      stop = last
    start = max(span.start, at)
    if stop <= start:
      continue
    if start > at:
      pieces.append(Piece(at, start))
    pieces.append(Piece(start, stop, span.text, 'given'))
    at = stop
  if at < last:
    pieces.append(Piece(at, last))
  return pieces


def fill(track: Track) -> Track:
  """Pieces without text become part of their neighbour, if any has text: the one before."""
  said = [p for p in track if p.text]
  if not said:
    return track
  starts = [track[0].start, *(p.start for p in said[1:])]
  stops = [*starts[1:], track[-1].stop]
  return [p._replace(start=a, stop=b) for p, a, b in zip(said, starts, stops)]


def united(track: Track) -> Track:
  """Neighbours of equal text joined."""
  groups = [list(group) for _, group in itertools.groupby(track, lambda p: (p.text, p.source))]
  return [g[0]._replace(stop=g[-1].stop) for g in groups]


def split(track: Track, cuts: Iterable[int], *, unsaid: bool = False) -> Track:
  """The track with its pieces cut at frames; what is said of a piece is said of its parts.

  unsaid: only pieces without text are cut.
  """
  cuts = sorted(set(cuts))
  pieces = []
  for piece in track:
    inner = [c for c in cuts if piece.start < c < piece.stop and not (unsaid and piece.text)]
    edges = [piece.start, *inner, piece.stop]
    pieces += [piece._replace(start=a, stop=b) for a, b in itertools.pairwise(edges)]
  return pieces


def starts(track: Track) -> list[int]:
  return [piece.start for piece in track]


def within(track: Track, piece: Piece) -> Track:
  """The pieces of a finer track that lie in a piece."""
  return [p for p in track if piece.start <= p.start and p.stop <= piece.stop]


def parent(track: Track, piece: Piece) -> Piece:
  """The piece of a coarser track that a piece lies in."""
  return next(p for p in track if p.start <= piece.start and piece.stop <= p.stop)


def spans_of(level: str, track: Track) -> list[CaptionSpan]:
  return [CaptionSpan(level, p.start, p.stop + 1, p.text) for p in track]


def validate_levels(record: EpisodeRecord) -> None:
  """Checks that L3, L2, L1 and L0 are each without gap and overlap and nested in one another.

  Captions of a level may share their boundary frame, or follow each other.

  Raises:
    DataError: naming episode, level and frames.
  """
  coarser: Sequence[CaptionSpan] = ()
  for level in NESTED:
    spans = sorted((s for s in record.captions if s.level == level), key=lambda s: (s.start, s.end))
    where = f'episode {record.episode_id!r} of {record.source!r}: captions of level {level}'
    _check_cover(spans, record.num_frames, where)
    for span in spans:
      if level != 'L3' and not any(c.start <= span.start and span.end <= c.end for c in coarser):
        above = NESTED[NESTED.index(level) - 1]
        raise DataError(
          f'{where}: frames {span.start}..{span.end - 1} {span.text!r} lie in no caption of level '
          f'{above}; expected the levels to be nested.'
        )
    coarser = spans


def _check_cover(spans: Sequence[CaptionSpan], num_frames: int, where: str) -> None:
  if not spans:
    raise DataError(f'{where}: expected frames 0..{num_frames - 1} to be covered, got no caption.')
  at = 0
  for i, span in enumerate(spans):
    if span.start > at:
      raise DataError(f'{where}: gap at frames {at}..{span.start - 1}.')
    if i and span.start < at - 1:
      raise DataError(f'{where}: frames {span.start}..{at - 1} are captioned twice.')
    if not span.text:
      raise DataError(f'{where}: no text for frames {span.start}..{span.end - 1}.')
    at = span.end
  if at != num_frames:
    raise DataError(
      f'{where}: expected to end with frame {num_frames - 1}, the last ends with frame {at - 1}.'
    )
