"""Augmentation: idle frames cut when a store is built, pixels jittered when windows are read.

Pruning shortens the stretches of an event in which nothing moves (teleoperators wait; a policy that
learns to wait with them stalls). Jitter is drawn once per window and camera and is the same for all
its frames, so that no motion is made up; a crop moves the camera's intrinsics along.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageFilter

from wallwm_jax.data.images import Box, Size
from wallwm_jax.data.permutation import mix64
from wallwm_jax.data.schema import ARM_WIDTH, EpisodeRecord
from wallwm_jax.geometry.poses import geodesic_angle, rot6d_to_matrix
from wallwm_jax.types import ConfigError

_LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601
_TO_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
# Largest changes at strength 1: of 255 levels, factors, turns of the colour circle, px, levels.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _BLUR, _NOISE = 0.25, 0.4, 0.4, 0.06, 0.8, 6.0
_BLUR_PROB = 0.25
_IMAGE_STEP = 4  # px between those compared to see whether an image changes


@dataclasses.dataclass(frozen=True)
class AugmentSettings:
  """What is pruned and how far pixels are jittered.

  A frame is idle while measured and commanded poses stay below linear_speed m/s, angular_speed
  rad/s and gripper_speed 1/s (of the 0..1 opening) from frame to frame, stay within what these
  speeds cover in `horizon` s, and, if image_change is given, the images differ by no more than so
  many of 255 levels on average. keep: frames that are left of an idle stretch, >= 2.
  photometric: strength 0..1; crop: largest part of each side that is cut away, 0..0.5.
  """

  linear_speed: float = 0.01
  angular_speed: float = 0.05
  gripper_speed: float = 0.1
  horizon: float = 0.5
  image_change: float | None = None
  keep: int = 3
  photometric: float = 0.0
  crop: float = 0.0

  def __post_init__(self):
    for name in ('linear_speed', 'angular_speed', 'gripper_speed', 'horizon'):
      if not getattr(self, name) > 0:
        raise ConfigError(f'augment.{name}: expected > 0, got {getattr(self, name)}.')
    if self.image_change is not None and not self.image_change >= 0:
      raise ConfigError(f'augment.image_change: expected >= 0 or None, got {self.image_change}.')
    if self.keep < 2:
      raise ConfigError(f'augment.keep: expected >= 2 (first and last frame), got {self.keep}.')
    for name, most in (('photometric', 1.0), ('crop', 0.5)):
      if not 0 <= getattr(self, name) <= most:
        raise ConfigError(f'augment.{name}: expected 0..{most}, got {getattr(self, name)}.')


def prune(record: EpisodeRecord, settings: AugmentSettings = AugmentSettings()) -> EpisodeRecord:
  """The episode with the idle stretches of its events shortened.

  First and last frame of every event, the first one of every caption and frames outside events
  stay. Frame k's action is the last command before the next frame that stays, so that it still
  leads there. `times` holds the true times of the frames that stay (they are no longer even);
  provenance['prune'] the numbers of frames before and after and the runs [first, end) cut away.
  """
  kept = kept_frames(record, settings)
  total = record.num_frames
  gone = np.setdiff1d(np.arange(total), kept)
  runs = np.split(gone, np.flatnonzero(np.diff(gone) > 1) + 1) if len(gone) else []
  found = {
    'settings': dataclasses.asdict(settings),
    'frames': [total, len(kept)],
    'cut': [[int(run[0]), int(run[-1]) + 1] for run in runs],
  }
  record = dataclasses.replace(record, provenance={**record.provenance, 'prune': found})
  return record if len(kept) == total else _take(record, kept)


def kept_frames(record: EpisodeRecord, settings: AugmentSettings) -> np.ndarray:
  """Indices int64 [n], ascending, of the frames of an episode that pruning leaves."""
  still = _still_steps(record, settings)
  keep = np.ones(record.num_frames, bool)
  starts = {span.start for span in record.captions}
  for event in record.events:
    inside = still[event.start : event.end - 1]
    keep[event.start : event.end] = False
    keep[event.start + _shorten(record, inside, event.start, settings)] = True
  for event in record.events:  # neighbours may share a frame
    starts |= {event.start, event.end - 1}
  keep[sorted(starts)] = True
  return np.flatnonzero(keep)


@dataclasses.dataclass(frozen=True, eq=False)
class Jitter:
  """What happens to one camera in one window.

  side: part of each image side that a crop leaves; place: (row, column) of the crop, 0..1 of the
  room there is; matrix: float64 [3, 4], levels RGB1 -> RGB; blur: radius of a box px; noise:
  standard deviation, levels; key: seeds the noise.
  """

  side: float
  place: tuple[float, float]
  matrix: np.ndarray
  blur: float
  noise: float
  key: int

  def box(self, size: Size) -> Box | None:
    """The part of an image of (H, W) `size` that is seen, px; None for all of it."""
    if self.side == 1:
      return None
    room = 1 - self.side
    top, left = (room * p * s for p, s in zip(self.place, size))
    bottom, right = top + self.side * size[0], left + self.side * size[1]
    return Box(top, left, min(bottom, size[0]), min(right, size[1]))  # rounding may lead beyond


@functools.lru_cache(maxsize=256)  # asked for by frames, masks and intrinsics alike
def draw(settings: AugmentSettings, seed: int, uid: int, step: int, camera: int) -> Jitter:
  """The jitter of a camera in a window, a function of its arguments alone.

  Args:
    seed: of the run; uid: of the event; step: a number that differs from visit to visit; camera:
      its place among the views.
  """
  key = 0
  for number in (seed, uid, step, camera):
    key = mix64(key ^ (number & 0xFFFFFFFFFFFFFFFF))
  u = np.array([mix64(key + i) / 2**64 for i in range(1, 11)])
  strength, sign = settings.photometric, 2 * u - 1
  return Jitter(
    side=1 - settings.crop * float(u[0]),
    place=(float(u[1]), float(u[2])),
    matrix=_colour_matrix(
      255 * _BRIGHTNESS * strength * sign[3],
      1 + _CONTRAST * strength * sign[4],
      1 + _SATURATION * strength * sign[5],
      2 * np.pi * _HUE * strength * sign[6],
    ),
    blur=_BLUR * strength * float(u[8]) if u[7] < _BLUR_PROB else 0.0,
    noise=_NOISE * strength * float(u[9]),
    key=key,
  )


def recolour(frames: np.ndarray, jitter: Jitter, mask: np.ndarray | None = None) -> np.ndarray:
  """Frames with colours, sharpness and a fixed noise pattern changed alike.

  Args:
    frames: uint8 [T, H, W, 3]. mask: bool [H, W], False on borders, which come out black.
  """
  shape = frames.shape
  if jitter.blur:
    box = ImageFilter.BoxBlur(jitter.blur)
    frames = np.stack([np.asarray(Image.fromarray(frame).filter(box)) for frame in frames])
  tall = Image.fromarray(np.ascontiguousarray(frames).reshape(-1, shape[2], 3))
  matrix = tuple(jitter.matrix.ravel().tolist())
  frames = np.array(tall.convert('RGB', matrix)).reshape(shape)
  if jitter.noise:
    rng = np.random.default_rng(jitter.key)
    pattern = np.rint(jitter.noise * rng.standard_normal(shape[1:], np.float32))
    up, down = np.clip(pattern, 0, 255).astype(np.uint8), np.clip(-pattern, 0, 255).astype(np.uint8)
    np.minimum(frames, 255 - up, out=frames)  # so that what is added next saturates
    frames += up
    np.maximum(frames, down, out=frames)
    frames -= down
  if mask is not None and not mask.all():
    frames[:, ~mask] = 0
  return frames


def _colour_matrix(brightness, contrast, saturation, hue) -> np.ndarray:
  """[3, 4]: chroma turned by `hue` rad and scaled in YIQ, then contrast around mid grey, then
  brightness (levels)."""
  cos, sin = saturation * np.cos(hue), saturation * np.sin(hue)
  turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
  linear = contrast * _FROM_YIQ @ turn @ _TO_YIQ
  return np.concatenate([linear, np.full((3, 1), 127.5 * (1 - contrast) + brightness)], -1)


def _take(record: EpisodeRecord, kept: np.ndarray) -> EpisodeRecord:
  """The frames `kept` of an episode, every index into it translated."""
  times = np.arange(record.num_frames) / record.fps if record.times is None else record.times

  def new(frame: int) -> int:
    return int(np.searchsorted(kept, frame))

  leading = np.append(kept[1:] - 1, kept[-1])
  return dataclasses.replace(
    record,
    frames={view: x[kept] for view, x in record.frames.items()},
    state=None if record.state is None else record.state[kept],
    actions=None if record.actions is None else record.actions[leading],
    times=times[kept],
    calibration={
      view: camera
      if camera is None or camera.extrinsics.ndim == 2
      else dataclasses.replace(camera, extrinsics=camera.extrinsics[kept])
      for view, camera in record.calibration.items()
    },
    events=tuple(
      dataclasses.replace(e, start=new(e.start), end=new(e.end - 1) + 1) for e in record.events
    ),
    captions=tuple(
      dataclasses.replace(c, start=new(c.start), end=new(c.end)) for c in record.captions
    ),
  )


def _still_steps(record: EpisodeRecord, settings: AugmentSettings) -> np.ndarray:
  """bool [T - 1]: nothing moves from frame k to k + 1; all False if nothing is known about it."""
  looked_at = []
  if record.state is not None:
    times = np.arange(record.num_frames) / record.fps if record.times is None else record.times
    limit = _speeds(settings) * np.diff(times)[:, None]
    looked_at.append(_distance(record.state[1:], record.state[:-1]) <= limit)
    if record.actions is not None:  # a command that changes at k shows in the step from k
      x = record.actions[:-1]
      looked_at.append(_distance(x, np.concatenate([x[:1], x[:-1]])) <= limit)
  if settings.image_change is not None:
    looked_at.append(_image_changes(record)[:, None] <= settings.image_change)
  if not looked_at:
    return np.zeros(record.num_frames - 1, bool)
  return np.concatenate(looked_at, -1).all(-1)


def _shorten(
  record: EpisodeRecord, still: np.ndarray, start: int, settings: AugmentSettings
) -> np.ndarray:
  """Frames (from the event's `start`) that are left, given its still steps [L - 1]."""
  keep = np.ones(len(still) + 1, bool)
  edges = np.flatnonzero(np.diff(still.astype(np.int8), prepend=0, append=0))
  for first, last in edges.reshape(-1, 2).tolist():  # frames first..last
    while first < last:
      stop = first + _near(record, start + first, start + last, settings)
      if stop - first >= settings.keep:
        keep[first : stop + 1] = False
        keep[np.linspace(first, stop, settings.keep).round().astype(int)] = True
      first = stop + 1
  return np.flatnonzero(keep)


def _near(record: EpisodeRecord, first: int, last: int, settings: AugmentSettings) -> int:
  """How many frames after `first`, up to `last`, stay within the ball around its poses."""
  beyond = np.zeros(last - first, bool)
  ball = _speeds(settings) * settings.horizon
  for x, ahead in ((record.state, 1), (record.actions, 0)):  # frame k's command acts after it
    if x is not None:
      near = x[first + ahead : last + ahead]
      beyond |= (_distance(near, x[first : first + 1]) > ball).any(-1)
  return int(np.argmax(beyond)) if beyond.any() else last - first


def _speeds(settings: AugmentSettings) -> np.ndarray:
  return np.array([settings.linear_speed, settings.angular_speed, settings.gripper_speed])


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Poses [n, A] and [n or 1, A] -> [n, 3]: m, rad and gripper opening apart, of the worst arm."""
  a, b = (x.astype(np.float64).reshape(len(x), -1, ARM_WIDTH) for x in (a, b))
  position = np.linalg.norm(a[..., :3] - b[..., :3], axis=-1)
  angle = geodesic_angle(*(rot6d_to_matrix(x[..., 3:9]) for x in np.broadcast_arrays(a, b)))
  return np.stack([position, angle, np.abs(a[..., 9] - b[..., 9])], -1).max(1)


def _image_changes(record: EpisodeRecord) -> np.ndarray:
  """[T - 1] mean absolute difference to the frame before, levels, of the camera that sees most."""
  changes = []
  for x in record.frames.values():
    grey = x[:, ::_IMAGE_STEP, ::_IMAGE_STEP].mean(-1, dtype=np.float32)
    changes.append(np.abs(np.diff(grey, axis=0)).mean((1, 2)))
  return np.max(changes, 0)
