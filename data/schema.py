"""The records raw data is turned into: one per episode, with its events, captions and calibration.

A record is plain NumPy and can hold bad data (that is how bad data is talked about); `validate` is
the door: the store refuses every record that does not pass it.

State and actions use the canonical robot representation, absolute in the robot base (world) frame,
per arm (position 3 m, rot6d 6 = first two columns of the rotation matrix, gripper 1 in 0..1 with 1
= open): `state[t]` is the pose measured at frame t, `actions[t]` the target commanded at frame t
(moves t -> t + 1).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from wallwm_jax.errors import DataError

ARM_WIDTH = 10  # position 3 + rot6d 6 + gripper 1
LEVELS = ('L3', 'L2', 'L1', 'L0', 'human')  # task, subtask, action, segment, written by a person
UNIT_TOLERANCE = 1e-3  # of rot6d columns (norm, orthogonality) and of the gripper range


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
  """Pinhole camera: intrinsics [3, 3] px of the stored image; extrinsics camera-to-world m, [4, 4]
  or one per frame [T, 4, 4] (a camera on the hand), OpenCV axes (x right, y down, z forward)."""

  intrinsics: np.ndarray
  extrinsics: np.ndarray

  def at(self, frame: int) -> np.ndarray:
    """Camera-to-world [4, 4] at one frame."""
    return self.extrinsics if self.extrinsics.ndim == 2 else self.extrinsics[frame]


@dataclasses.dataclass(frozen=True)
class CaptionSpan:
  """A caption of one level that holds for frames start..end-1."""

  level: str
  start: int
  end: int
  text: str


@dataclasses.dataclass(frozen=True, eq=False)
class EventSpan:
  """A coherent stretch of behaviour: frames start..end-1, actions start..end-2.

  Consecutive events may share their boundary frame. label: what sampling balances over; captions:
  text by level of LEVELS; flags: e.g. 'recovery', 'fixed_span'.
  """

  start: int
  end: int
  label: str
  captions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Quarantined:
  """An episode that was read but may not be stored, and why."""

  episode_id: str
  source: str
  reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class EpisodeRecord:
  """One recorded episode.

  episode_id: unique within a store; source: data set it comes from; fps: Hz, nominal; rig: what
  shares clocks and cameras (a robot in one session), '' = the whole source.
  views: camera names the episode must have; frames: {view: uint8 [T, H, W, 3]}, one size per view.
  state: float32 [T, A] or None (video only); actions: float32 [T, A] or None (action-free).
  calibration: {view: Calibration | None}; pixel_mask: {view: bool [H, W], False on synthetic
  borders | None}. events: ordered in time; captions: spans of any level (an event's own captions
  win over them). times: float64 [T] s as recorded, or None where frame k is at k / fps.
  provenance: JSON-serialisable, what each step of the preparation found or changed, by its name.
  """

  episode_id: str
  source: str
  fps: float
  views: tuple[str, ...]
  frames: Mapping[str, np.ndarray]
  state: np.ndarray | None
  actions: np.ndarray | None
  events: tuple[EventSpan, ...]
  calibration: Mapping[str, Calibration | None] = dataclasses.field(default_factory=dict)
  pixel_mask: Mapping[str, np.ndarray | None] = dataclasses.field(default_factory=dict)
  captions: tuple[CaptionSpan, ...] = ()
  times: np.ndarray | None = None
  rig: str = ''
  provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def num_frames(self) -> int:
    """T."""
    return len(self.frames[self.views[0]])

  def event_captions(self, event: EventSpan) -> dict[str, str]:
    """Text by level: the event's own, else that of the caption span that covers most of it."""
    best: dict[str, tuple[int, str]] = {}
    for span in self.captions:
      shared = min(span.end, event.end) - max(span.start, event.start)
      if shared > best.get(span.level, (0, ''))[0]:
        best[span.level] = (shared, span.text)
    return {level: text for level, (_, text) in best.items()} | dict(event.captions)

  def event_uid(self, event: EventSpan) -> int:
    """64-bit id of an event: a hash of source, episode and span."""
    key = '\0'.join((self.source, self.episode_id, str(event.start), str(event.end)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), 'little')


def validate(record: EpisodeRecord) -> None:
  """Checks a record against this schema.

  Raises:
    DataError: naming the episode, what was expected and what was found.
  """
  try:
    _check_header(record)
    _check_frames(record)
    _check_times(record)
    _check_robot(record)
    _check_cameras(record)
    _check_spans(record)
  except DataError as error:
    raise DataError(f'episode {record.episode_id!r} of {record.source!r}: {error}') from None


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise DataError(message)


def _check_header(record: EpisodeRecord) -> None:
  _require(bool(record.episode_id), 'episode_id: expected a name, got an empty string.')
  _require(np.isfinite(record.fps) and record.fps > 0, f'fps: expected > 0 Hz, got {record.fps}.')
  _require(len(record.views) > 0, 'views: expected at least one camera, got none.')
  _require(len(set(record.views)) == len(record.views), f'views: duplicate name in {record.views}.')


def _check_frames(record: EpisodeRecord) -> None:
  lengths = {}
  for view in record.views:
    _require(view in record.frames, f'missing camera {view!r}: frames has {sorted(record.frames)}.')
    x = record.frames[view]
    _require(
      x.dtype == np.uint8 and x.ndim == 4 and x.shape[-1] == 3 and x.size > 0,
      f'frames[{view!r}]: expected uint8 [T, H, W, 3], got {x.dtype} {list(x.shape)}.',
    )
    lengths[view] = len(x)
  extra = sorted(set(record.frames) - set(record.views))
  _require(not extra, f'frames: cameras {extra} are not in views {record.views}.')
  _require(len(set(lengths.values())) == 1, f'camera lengths differ: {lengths} frames.')
  _require(record.num_frames >= 2, f'expected at least 2 frames, got {record.num_frames}.')


def _check_times(record: EpisodeRecord) -> None:
  times = record.times
  if times is None:
    return
  _require(
    times.dtype == np.float64 and times.shape == (record.num_frames,),
    f'times: expected float64 [{record.num_frames}], got {times.dtype} {list(times.shape)}.',
  )
  _require(bool(np.isfinite(times).all()), 'times: NaN or infinite values.')
  late = np.flatnonzero(np.diff(times) <= 0)
  _require(
    not len(late),
    f'times: expected to increase, frame {late[0] + 1 if len(late) else 0} is not after the one '
    'before it.',
  )


def _check_robot(record: EpisodeRecord) -> None:
  _require(
    record.actions is None or record.state is not None, 'actions without state have no anchor pose.'
  )
  for name, x in (('state', record.state), ('actions', record.actions)):
    if x is None:
      continue
    _require(
      x.dtype == np.float32 and x.ndim == 2 and x.shape[1] in (ARM_WIDTH, 2 * ARM_WIDTH),
      f'{name}: expected float32 [T, 10 or 20], got {x.dtype} {list(x.shape)}.',
    )
    _require(
      len(x) == record.num_frames,
      f'{name}: expected {record.num_frames} rows (one per frame), got {len(x)}.',
    )
    bad = np.argwhere(~np.isfinite(x))
    _require(
      not len(bad),
      f'{name}: {len(bad)} NaN or infinite values, first at [frame, channel] = '
      f'{bad[0].tolist() if len(bad) else None}.',
    )
    _check_pose(name, x.reshape(len(x), -1, ARM_WIDTH))
  if record.actions is not None:
    _require(
      record.actions.shape == record.state.shape,
      f'actions {list(record.actions.shape)} and state {list(record.state.shape)} differ in shape.',
    )


def _check_pose(name: str, x: np.ndarray) -> None:
  """x: [T, arms, 10]."""
  column0, column1, grip = x[..., 3:6], x[..., 6:9], x[..., 9]
  gram = np.stack(
    [(column0**2).sum(-1) - 1, (column1**2).sum(-1) - 1, (column0 * column1).sum(-1)], -1
  )
  worst = np.abs(gram).max()
  _require(
    worst < 2 * UNIT_TOLERANCE,
    f'{name}: channels 3..8 are not the first two columns of a rotation matrix '
    f'(off by {worst:.3g}).',
  )
  _require(
    grip.min() > -UNIT_TOLERANCE and grip.max() < 1 + UNIT_TOLERANCE,
    f'{name}: gripper expected in 0..1 (1 = open), got {grip.min():.3g}..{grip.max():.3g}.',
  )


def _check_cameras(record: EpisodeRecord) -> None:
  for view, camera in record.calibration.items():
    _require(view in record.views, f'calibration: {view!r} is not in views {record.views}.')
    if camera is None:
      continue
    k, e = camera.intrinsics, camera.extrinsics
    _require(
      k.shape == (3, 3) and np.isfinite(k).all() and k[0, 0] > 0 and k[1, 1] > 0,
      f'calibration[{view!r}].intrinsics: expected a finite [3, 3] with positive focal lengths, '
      f'got {k.tolist()}.',
    )
    _require(
      e.shape in ((4, 4), (record.num_frames, 4, 4)) and bool(np.isfinite(e).all()),
      f'calibration[{view!r}].extrinsics: expected finite [4, 4] or [{record.num_frames}, 4, 4], '
      f'got {list(e.shape)}.',
    )
    r = e[..., :3, :3].astype(np.float64)
    _require(
      bool(np.allclose(r @ np.swapaxes(r, -1, -2), np.eye(3), atol=UNIT_TOLERANCE)),
      f'calibration[{view!r}].extrinsics: the rotation part is not orthonormal.',
    )
  for view, mask in record.pixel_mask.items():
    _require(view in record.views, f'pixel_mask: {view!r} is not in views {record.views}.')
    if mask is not None:
      size = record.frames[view].shape[1:3]
      _require(
        mask.dtype == bool and mask.shape == size,
        f'pixel_mask[{view!r}]: expected bool {list(size)}, got {mask.dtype} {list(mask.shape)}.',
      )


def _check_spans(record: EpisodeRecord) -> None:
  _require(len(record.events) > 0, 'events: expected at least one, got none.')
  previous = 0
  for i, event in enumerate(record.events):
    span = f'events[{i}] = frames {event.start}..{event.end - 1}'
    _require(
      0 <= event.start and event.end <= record.num_frames,
      f'{span}: outside the episode of {record.num_frames} frames.',
    )
    _require(event.end - event.start >= 2, f'{span}: expected at least 2 frames (one action).')
    _require(
      event.start >= previous - 1,
      f'{span}: out of order, the event before it ends at frame {previous - 1}.',
    )
    _require(bool(event.label), f'{span}: empty label.')
    _check_levels(event.captions, span)
    previous = event.end
  for i, span in enumerate(record.captions):
    _require(
      0 <= span.start < span.end <= record.num_frames,
      f'captions[{i}] = frames {span.start}..{span.end - 1}: '
      f'outside the episode of {record.num_frames} frames.',
    )
    _check_levels((span.level,), f'captions[{i}]')


def _check_levels(levels, where: str) -> None:
  unknown = sorted(set(levels) - set(LEVELS))
  _require(not unknown, f'{where}: unknown caption level {unknown}, expected some of {LEVELS}.')
