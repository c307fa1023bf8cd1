"""Fills the four caption levels of an episode: Task (L3), Subtask (L2), Action (L1), Segment (L0).

What is given stays. The rest is asked of a captioner (a vision-language model, say) where there is
one, else told from the robot's motion. The result is nested and without gaps: every level covers
the episode, consecutive captions share their boundary frame, and each caption lies within one of
the level above. A given caption that crosses a boundary of the level above holds on both sides.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from typing import Literal

import numpy as np

from wallwm_jax.data.captioner import Caption, Captioner, CaptionRequest, ask
from wallwm_jax.data.primitives import Primitive, Thresholds, describe, motion_cuts, retries
from wallwm_jax.data.schema import ARM_WIDTH, CaptionSpan, EpisodeRecord, EventSpan
from wallwm_jax.data.traces import instruct, objects_of, plain
from wallwm_jax.data.tracks import (
  NESTED,
  Piece,
  Track,
  fill,
  join_given,
  parent,
  spans_of,
  split,
  starts,
  united,
  validate_levels,
  within,
)
from wallwm_jax.types import ConfigError, DataError

__all__ = [
  'Caption',
  'CaptionRequest',
  'CaptionSettings',
  'Captioner',
  'caption',
  'validate_levels',
]

_NAMES = {'task': 'L3', 'subtask': 'L2', 'action': 'L1', 'segment': 'L0'}
_REPHRASED = ('L3', 'L2', 'L1')
_UNNAMED, _NO_CAPTION = 'unlabelled', 'no_caption'
_UNKNOWN = 'unknown action'  # what a video shows that nobody described
_TOLD_PARTS = 3  # a longer sequence is told by its first and last part


@dataclasses.dataclass(frozen=True)
class CaptionSettings:
  """How captions are found.

  limits: what counts as motion in template captions. segment_frames: shortest L0 caption.
  retry_distance: m; a gripper that opens and closes again this near to where it closed before
    tries again ('recovery').
  min_confidence: answers of a captioner below this are not used. batch: events asked at once;
  frames: pictures per view and event it is shown.
  phrasing: 'canonical' leaves the words as they are; 'train' or 'heldout' puts L3, L2 and L1 into
    one of the wordings of `traces.phrasings`, chosen by episode and place.
  """

  limits: Thresholds = Thresholds()
  segment_frames: int = 4
  retry_distance: float = 0.06
  min_confidence: float = 0.5
  batch: int = 8
  frames: int = 8
  phrasing: Literal['canonical', 'train', 'heldout'] = 'canonical'

  def __post_init__(self):
    if not 0 <= self.min_confidence <= 1:
      raise ConfigError(f'caption.min_confidence: expected 0..1, got {self.min_confidence}.')
    for name, least in (('segment_frames', 2), ('batch', 1), ('frames', 1)):
      if getattr(self, name) < least:
        raise ConfigError(f'caption.{name}: expected >= {least}, got {getattr(self, name)}.')
    if self.retry_distance < 0:
      raise ConfigError(f'caption.retry_distance: expected >= 0 m, got {self.retry_distance}.')
    if self.phrasing not in ('canonical', 'train', 'heldout'):
      raise ConfigError(
        f"caption.phrasing: expected 'canonical', 'train' or 'heldout', got {self.phrasing!r}."
      )


def caption(
  record: EpisodeRecord,
  settings: CaptionSettings = CaptionSettings(),
  captioner: Captioner | None = None,
) -> EpisodeRecord:
  """The record with captions of all four levels, events with labels and their L1 captions.

  Levels may also be called task, subtask, action and segment. Captions of people ('human') stay as
  they are. Flags of events: 'template' where the L1 caption is one, 'recovery' where the robot
  grasps anew. provenance['caption'] holds, by level, the source ('given', 'vlm', 'template') of
  every caption in order of time.

  Raises:
    DataError: no events, or a captioner that does not answer every request.
  """
  if not record.events:
    raise DataError(f'episode {record.episode_id!r}: no events to caption; segment it first.')
  record = _flag_retries(_renamed(record), settings)
  motion = _Motion(record, settings)
  tracks = _tracks(record, motion, settings)
  if captioner is not None:
    tracks = ask(
      record,
      tracks,
      motion,
      captioner,
      batch=settings.batch,
      frames=settings.frames,
      min_confidence=settings.min_confidence,
    )
  tracks = _told(record, tracks, motion)
  return _written(record, tracks, motion, settings)


class _Motion:
  """What the robot does between two frames of an episode, in words."""

  def __init__(self, record: EpisodeRecord, settings: CaptionSettings):
    self._record, self._limits = record, settings.limits
    said = {s.level: s.text for s in reversed(record.captions)}
    own = {level: text for e in record.events for level, text in e.captions.items()}
    self._objects = objects_of(said.get('L3') or own.get('L3') or said.get('human', ''))

  def __call__(self, piece: Piece) -> Primitive:
    state = self._record.state
    if state is None:
      return Primitive('', _UNNAMED)
    thing = self._objects[0] if self._objects else ''
    part = state[piece.start : piece.stop + 1]
    held = thing if self._closed(piece.start) else ''
    return describe(part, self._record.source, held, thing, self._limits)

  def releases(self, track: Track) -> list[int]:
    """Where pieces end in which a gripper opens that was closed at their start."""
    if self._record.state is None:
      return []
    return [p.stop for p in track if self._closed(p.start) and not self._closed(p.stop)]

  def _closed(self, frame: int) -> bool:
    """Whether a gripper is in the closed half of what it does in the episode."""
    for arm in _arms(self._record.state):
      grip = arm[:, 9]
      if np.ptp(grip) >= self._limits.grip and 2 * grip[frame] < grip.min() + grip.max():
        return True
    return False


def _renamed(record: EpisodeRecord) -> EpisodeRecord:
  """Level names as in schema.LEVELS."""

  def level(name: str) -> str:
    return _NAMES.get(name.lower(), name)

  captions = tuple(dataclasses.replace(s, level=level(s.level)) for s in record.captions)
  events = tuple(
    dataclasses.replace(e, captions={level(k): text for k, text in e.captions.items()})
    for e in record.events
  )
  return dataclasses.replace(record, captions=captions, events=events)


def _flag_retries(record: EpisodeRecord, settings: CaptionSettings) -> EpisodeRecord:
  """Flags events 'recovery' most of which lies between an opening of a gripper and its next closing
  near to where it closed before; given flags win."""
  if record.state is None or any('recovery' in event.flags for event in record.events):
    return record
  spans = [
    s
    for arm in _arms(record.state)
    for s in retries(arm, settings.limits.grip, settings.retry_distance)
  ]

  def retried(e: EventSpan) -> bool:
    return any(2 * (min(e.end - 1, b) - max(e.start, a)) > e.end - 1 - e.start for a, b in spans)

  events = tuple(
    dataclasses.replace(e, flags=(*e.flags, 'recovery')) if retried(e) else e for e in record.events
  )
  return dataclasses.replace(record, events=events)


def _arms(state: np.ndarray) -> list[np.ndarray]:
  return [state[:, k : k + ARM_WIDTH] for k in range(0, state.shape[1], ARM_WIDTH)]


def _said(record: EpisodeRecord, level: str) -> list[CaptionSpan]:
  """Spans of a level; of a record without any, what its events say."""
  return [s for s in record.captions if s.level == level] or [
    CaptionSpan(level, e.start, e.end, e.captions[level])
    for e in record.events
    if level in e.captions
  ]


def _tracks(record: EpisodeRecord, motion: _Motion, settings: CaptionSettings) -> dict[str, Track]:
  """Which frames get a caption of their own, by level, and what is said of them already."""
  last = record.num_frames - 1
  task = fill(united(join_given(_said(record, 'L3'), last)))
  action = _actions(record, last)
  subtask = split(united(join_given(_said(record, 'L2'), last)), starts(task))
  subtask = split(subtask, motion.releases(action), unsaid=True)
  action = split(action, starts(subtask))
  segment = join_given(_said(record, 'L0'), last)
  if record.state is not None:
    edges = np.array([*starts(action), last])
    cuts = motion_cuts(record.state, settings.segment_frames)
    apart = np.abs(cuts[:, None] - edges).min(1) >= settings.segment_frames
    segment = split(segment, cuts[apart].tolist(), unsaid=True)
  return dict(zip(NESTED, (task, subtask, action, split(segment, starts(action)))))


def _actions(record: EpisodeRecord, last: int) -> Track:
  """L1: one piece per event, with its own text or that of the caption over at least half of it,
  and what is said outside of the events."""
  given = [s for s in record.captions if s.level == 'L1']
  spans = [s for s in given if all(_shared(s, e) <= 0 for e in record.events)]
  for event in record.events:
    best = max(given, key=lambda s: _shared(s, event), default=None)
    said = best is not None and 2 * _shared(best, event) >= event.end - 1 - event.start
    text = event.captions.get('L1') or (best.text if said else '')
    spans.append(CaptionSpan('L1', event.start, event.end, text))
  edges = [frame for e in record.events for frame in (e.start, e.end - 1)]
  return split(join_given(spans, last), edges)


def _told(record: EpisodeRecord, tracks: dict[str, Track], motion: _Motion) -> dict[str, Track]:
  """The tracks with a template where nothing is said."""
  task = tracks['L3']
  human = [s.text for s in record.captions if s.level == 'human']
  if human and not any(p.text for p in task):
    task = [p._replace(text=human[0], source='given') for p in task]

  def tell(track: Track, words) -> Track:
    return [p if p.text else p._replace(text=words(p), source='template') for p in track]

  def action(piece: Piece) -> str:
    return motion(piece).text or parent(task, piece).text or _UNKNOWN

  recoveries = [e for e in record.events if 'recovery' in e.flags]

  def segment(piece: Piece) -> str:
    again = any(e.start <= piece.start and piece.stop < e.end for e in recoveries)
    return ('recover: ' if again else '') + action(piece)

  fine = {'L1': tell(tracks['L1'], action), 'L0': tell(tracks['L0'], segment)}
  subtask = tell(tracks['L2'], lambda p: _sequence(within(fine['L1'], p)))
  task = tell(task, lambda p: _sequence(within(subtask, p)))
  return {'L3': task, 'L2': subtask, **fine}


def _sequence(track: Track) -> str:
  texts = [text for text, _ in itertools.groupby(p.text for p in track)]
  return ', then '.join(texts if len(texts) <= _TOLD_PARTS else (texts[0], texts[-1]))


def _written(
  record: EpisodeRecord, tracks: dict[str, Track], motion: _Motion, settings: CaptionSettings
) -> EpisodeRecord:
  def worded(piece: Piece) -> str:
    if settings.phrasing == 'canonical':
      return piece.text
    # One wording for one text in an episode, whatever the level.
    place = '\0'.join((record.source, record.episode_id, piece.text))
    return instruct(piece.text, settings.phrasing, zlib.crc32(place.encode()))

  shown = {
    level: [p._replace(text=worded(p)) for p in track] if level in _REPHRASED else track
    for level, track in tracks.items()
  }
  events = tuple(_event(e, tracks['L1'], shown['L1'], motion) for e in record.events)
  return dataclasses.replace(
    record,
    events=events,
    captions=(
      *(span for level in NESTED for span in spans_of(level, shown[level])),
      *(s for s in record.captions if s.level not in NESTED),
    ),
    provenance={
      **record.provenance,
      'caption': {level: [p.source for p in track] for level, track in tracks.items()},
    },
  )


def _event(event: EventSpan, track: Track, shown: Track, motion: _Motion) -> EventSpan:
  """An event with its L1 caption, a label, and what is to be known of the caption."""
  spans = spans_of('L1', track)
  k = max(range(len(track)), key=lambda i: _shared(spans[i], event))
  flags = [f for f in event.flags if f not in (_NO_CAPTION, 'template')]
  flags += ['template'] * (track[k].source == 'template')
  flags += [_NO_CAPTION] * (track[k].text == _UNKNOWN)
  label = event.label
  if label == _UNNAMED and track[k].text != _UNKNOWN:
    told = (
      motion(Piece(event.start, event.end - 1)).label if track[k].source == 'template' else _UNNAMED
    )
    label = told if told != _UNNAMED else plain(track[k].text).split(' ')[0]
  captions = {level: text for level, text in event.captions.items() if level == 'human'}
  return dataclasses.replace(
    event, label=label, flags=tuple(flags), captions={**captions, 'L1': shown[k].text}
  )


def _shared(a: CaptionSpan | EventSpan, b: CaptionSpan | EventSpan) -> int:
  """Steps between frames that belong to both: a shared boundary frame alone is none."""
  return min(a.end, b.end) - 1 - max(a.start, b.start)
