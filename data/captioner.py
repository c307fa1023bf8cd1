"""Asking a vision-language model, or a person, what happens in the events of an episode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from wallwm_jax.data.primitives import Primitive
from wallwm_jax.data.schema import EpisodeRecord
from wallwm_jax.data.tracks import NESTED, Piece, Track, parent, within
from wallwm_jax.types import DataError


@dataclasses.dataclass(frozen=True)
class Caption:
  """An answer of a captioner; confidence in 0..1."""

  text: str
  confidence: float


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionRequest:
  """One event, as a captioner sees it.

  frames: {view: uint8 [n, H, W, 3]}, evenly spaced from the first to the last; start, end: frames
  of the episode, end exclusive; fps: Hz. known: what is known of it by level; motion: what the
  robot did, in words; previous: L1 caption of the event before, '' = none. wanted: levels to name.
  """

  frames: Mapping[str, np.ndarray]
  start: int
  end: int
  fps: float
  known: Mapping[str, str]
  motion: str
  previous: str
  wanted: tuple[str, ...]


class Captioner(Protocol):
  """Names events: one answer {level: Caption} per request, in order; a level may be left out."""

  def __call__(self, requests: Sequence[CaptionRequest]) -> Sequence[Mapping[str, Caption]]: ...


def ask(
  record: EpisodeRecord,
  tracks: dict[str, Track],
  motion: Callable[[Piece], Primitive],
  captioner: Captioner,
  *,
  batch: int,
  frames: int,
  min_confidence: float,
) -> dict[str, Track]:
  """The tracks with the captioner's answers where nothing was said; of several answers for one
  piece the surest.

  Args:
    tracks: by level of NESTED, nested. motion: what the robot does in a piece. batch: requests per
      call; frames: pictures per view of a request; min_confidence: answers below are not used.

  Raises:
    DataError: a captioner that does not answer every request.
  """
  requests = [_request(record, tracks, i, motion, frames) for i in range(len(tracks['L1']))]
  requests = [r for r in requests if r.wanted]
  answers: list[Mapping[str, Caption]] = []
  for start in range(0, len(requests), batch):
    asked = requests[start : start + batch]
    got = list(captioner(asked))
    if len(got) != len(asked):
      raise DataError(
        f'episode {record.episode_id!r}: expected one answer of the captioner for each of '
        f'{len(asked)} events, got {len(got)}.'
      )
    answers += got
  tracks = dict(tracks)
  for level in NESTED:
    found = []
    for request, answer in zip(requests, answers):
      if level in request.wanted and level in answer:
        if answer[level].text and answer[level].confidence >= min_confidence:
          found.append((answer[level].confidence, request, answer[level].text))
    for _, request, text in sorted(found, key=lambda x: x[0]):  # the surest has the last word
      tracks[level] = _answered(tracks[level], request, text)
  return tracks


def _request(
  record: EpisodeRecord,
  tracks: dict[str, Track],
  i: int,
  motion: Callable[[Piece], Primitive],
  frames: int,
) -> CaptionRequest:
  piece = tracks['L1'][i]
  above = {level: parent(tracks[level], piece).text for level in ('L3', 'L2', 'L1')}
  wanted = [level for level, text in above.items() if not text]
  if not any(p.text for p in within(tracks['L0'], piece)):
    wanted.append('L0')
  shown = np.linspace(piece.start, piece.stop, frames).round().astype(int)
  return CaptionRequest(
    frames={view: x[np.unique(shown)] for view, x in record.frames.items()},
    start=piece.start,
    end=piece.stop + 1,
    fps=record.fps,
    known={level: text for level, text in above.items() if text},
    motion=motion(piece).text,
    previous=tracks['L1'][i - 1].text if i else '',
    wanted=tuple(wanted),
  )


def _answered(track: Track, request: CaptionRequest, text: str) -> Track:
  """A caption for what a request is about: for the piece it lies in, or all of its parts at
  once."""
  start, stop = request.start, request.end - 1
  inside = [p for p in track if start <= p.start and p.stop <= stop]
  if inside:
    at = track.index(inside[0])
    return [*track[:at], Piece(start, stop, text, 'vlm'), *track[at + len(inside) :]]
  return [
    p._replace(text=text, source='vlm') if p.start <= start and stop <= p.stop else p for p in track
  ]
