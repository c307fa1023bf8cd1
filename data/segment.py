"""Cuts episodes into events where the robot's behaviour changes.

Events that somebody or something marked are kept. Else a small learned detector fuses gripper
transitions, valleys of speed, turns, and change points of motion and command into the expected
number of boundaries at every frame, and dynamic programming picks the set of boundaries that is
expected to find the most, of those whose events are neither too short nor too long. Video alone
shows boundaries no better than chance does, so video-only records keep spans of fixed length,
flagged 'fixed_span'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from wallwm_jax.data.boundary_features import arm_features, moves
from wallwm_jax.data.boundary_net import load_members, network_input, probabilities
from wallwm_jax.data.readers.video import fixed_spans
from wallwm_jax.data.schema import ARM_WIDTH, CaptionSpan, EpisodeRecord, EventSpan
from wallwm_jax.types import ConfigError

FIXED = 'fixed_span'
UNLABELLED = 'unlabelled'
_KEPT_LEVELS = ('L3', 'L2', 'human')  # what is said of a fixed span and still true of its parts


@dataclasses.dataclass(frozen=True)
class SegmentSettings:
  """How events are found.

  threshold: a boundary is set where it adds more than this to the expected number of boundaries
    that are within `window` frames of a set one; about half the F1 that is reached maximises F1.
  window: frames on either side within which a boundary counts as found.
  min_frames, max_frames: shortest and longest event; an overlong one is cut at its best frame.
  fixed_frames: length of the spans of video-only episodes that come without events.
  stride: frames per step of the detector, which expects events of some 10..50 steps: 1 for records
    of 10..20 Hz and for simulators, about fps / 15 for faster ones.
  """

  threshold: float = 0.4
  window: int = 3
  min_frames: int = 5
  max_frames: int = 129
  fixed_frames: int = 65
  stride: int = 1

  def __post_init__(self):
    if not 0 < self.threshold < 1:
      raise ConfigError(f'segment.threshold: expected 0..1, got {self.threshold}.')
    if self.window < 0:
      raise ConfigError(f'segment.window: expected >= 0 frames, got {self.window}.')
    if self.stride < 1:
      raise ConfigError(f'segment.stride: expected >= 1 frames, got {self.stride}.')
    if self.min_frames < 2 * self.stride:
      raise ConfigError(
        f'segment.min_frames: expected >= 2 strides = {2 * self.stride} frames, '
        f'got {self.min_frames}.'
      )
    if self.max_frames < 2 * self.min_frames + self.stride:
      raise ConfigError(
        f'segment.max_frames: expected >= 2 * min_frames + stride = '
        f'{2 * self.min_frames + self.stride}, so that an overlong event can be cut, '
        f'got {self.max_frames}.'
      )
    if self.fixed_frames < 2:
      raise ConfigError(f'segment.fixed_frames: expected >= 2, got {self.fixed_frames}.')


def segment(record: EpisodeRecord, settings: SegmentSettings = SegmentSettings()) -> EpisodeRecord:
  """The record with its events filled in; consecutive events share their boundary frame.

  Events are annotations and stay as they are, unless all are flagged 'fixed_span' or the only one
  is the whole episode without a caption of its own (nothing is marked). What was said of replaced
  events becomes caption spans. provenance['segment'] tells the method ('given', 'detector' or
  'fixed'), and of the detector the variant, the boundaries and how sure it is of each (expected
  number of boundaries within the window).
  """
  if _annotated(record):
    return _with(record, record.events, {'method': 'given'})
  if record.state is None:
    events = record.events
    if not any(FIXED in event.flags for event in events):
      events = fixed_spans(record.num_frames, settings.fixed_frames)
    return _with(record, events, {'method': 'fixed'})
  expected = expected_boundaries(record.state, record.actions, settings)
  boundaries = best_boundaries(expected, record.num_frames, settings)
  edges = [0, *boundaries.tolist(), record.num_frames - 1]
  events = tuple(EventSpan(a, b + 1, UNLABELLED) for a, b in zip(edges, edges[1:]))
  sure = windowed(expected, _reach(settings))[boundaries // settings.stride]
  findings = {
    'method': 'detector',
    'variant': _variant(record.actions),
    'boundaries': boundaries.tolist(),
    'expected': [round(float(x), 3) for x in sure],
    'forced': int((sure < settings.threshold).sum()),
  }
  found = _with(record, events, findings)
  return dataclasses.replace(found, captions=(*record.captions, *_kept_captions(record)))


def expected_boundaries(
  state: np.ndarray, actions: np.ndarray | None, settings: SegmentSettings = SegmentSettings()
) -> np.ndarray:
  """Expected number of boundaries at every step of the detector.

  Args:
    state: [T, A]; actions: [T, A] or None.

  Returns:
    float32 [ceil(T / stride)], of two arms the larger one; zeros where nothing moves.
  """
  state = state[:: settings.stride]
  actions = None if actions is None else actions[:: settings.stride]
  members = load_members(_variant(actions))
  expected = np.zeros(len(state), np.float32)
  for first in range(0, state.shape[1], ARM_WIDTH):
    arm = slice(first, first + ARM_WIDTH)
    if len(state) > 1 and moves(state[:, arm]):
      x = network_input(*arm_features(state[:, arm], None if actions is None else actions[:, arm]))
      expected = np.maximum(expected, probabilities(members, x))
  return expected


def windowed(x: np.ndarray, reach: int) -> np.ndarray:
  """Sums [T] of x [T] over the frames at most `reach` away."""
  total = np.cumsum(np.pad(x, (reach + 1, reach)), dtype=np.float64)
  return total[2 * reach + 1 :] - total[: -2 * reach - 1]


def best_boundaries(
  expected: np.ndarray, num_frames: int, settings: SegmentSettings = SegmentSettings()
) -> np.ndarray:
  """The boundaries that maximise (expected boundaries within `window` of any) - threshold * count,
  with events of allowed length.

  Windows of one width that overlap are counted once by taking the overlap of neighbours away, so
  that a boundary's worth depends on the one before it alone and dynamic programming is exact.

  Args:
    expected: [ceil(T / stride)] of `expected_boundaries`; num_frames: T.

  Returns:
    int64 [n] frames, increasing, at least min_frames apart, from the first frame and from the last;
    at most max_frames - 1 apart.
  """
  step, reach = settings.stride, _reach(settings)
  shortest = -(-settings.min_frames // step)
  longest = (settings.max_frames - step) // step  # the last event ends up to step - 1 later
  end = (num_frames - 1) // step
  frames = np.arange(end + 1)
  total = np.concatenate([[0.0], np.cumsum(expected, dtype=np.float64)])
  left = total[np.maximum(frames - reach, 0)]  # expected before the window of a frame
  right = total[np.minimum(frames + reach, end) + 1]  # expected up to the end of its window
  gain = right - left - settings.threshold
  right[0] = 0  # the first frame is an edge without a window
  best, previous = np.full(end + 1, -np.inf), np.zeros(end + 1, np.int64)
  best[0] = 0
  for t in range(min(shortest, end), end + 1):
    low, high = max(t - longest, 0), max(t - shortest, 0) + 1
    value = best[low:high]
    if t < end:
      value = value + gain[t] - np.maximum(right[low:high] - left[t], 0)
    choice = int(np.argmax(value))
    best[t], previous[t] = value[choice], low + choice
  found, t = [], int(previous[end])
  while t > 0:
    found.append(t * step)
    t = int(previous[t])
  return np.array(found[::-1], np.int64)


def _reach(settings: SegmentSettings) -> int:
  return settings.window // settings.stride


def _annotated(record: EpisodeRecord) -> bool:
  if len(record.events) == 1:
    event = record.events[0]
    if event.start == 0 and event.end == record.num_frames and not event.captions:
      return False
  return any(FIXED not in event.flags for event in record.events)


def _variant(actions: np.ndarray | None) -> str:
  return 'proprio' if actions is None else 'actions'


def _kept_captions(record: EpisodeRecord) -> list[CaptionSpan]:
  return [
    CaptionSpan(level, event.start, event.end, text)
    for event in record.events
    for level, text in event.captions.items()
    if level in _KEPT_LEVELS
  ]


def _with(
  record: EpisodeRecord, events: tuple[EventSpan, ...], findings: Mapping[str, Any]
) -> EpisodeRecord:
  provenance = {**record.provenance, 'segment': {'events': len(events), **findings}}
  return dataclasses.replace(record, events=events, provenance=provenance)
