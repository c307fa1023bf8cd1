"""Cleaning: named checks that a recorded episode must pass before it is stored.

Every check works on records that break the schema (that is what they are for) and looks only at
the streams that are there: action-free video is checked as video. A check reports once per stream,
at its worst frame. What cannot be judged (no state, no times, one frame) is not reported; which
checks had something to judge is written into the provenance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from wallwm_jax.data import defects
from wallwm_jax.data.schema import ARM_WIDTH, UNIT_TOLERANCE, EpisodeRecord, Quarantined
from wallwm_jax.types import ConfigError

_SAMPLED = 48  # px along each side that frames are compared at; identity needs no more


@dataclasses.dataclass(frozen=True)
class CleanSettings:
  """Thresholds; an episode is refused where a value is beyond one of them.

  max_length_difference: rows between streams of one episode. min_fps, max_fps: Hz, nominal.
  fps_tolerance: relative error of the median recorded interval. max_gap: longest recorded interval,
  in nominal ones. max_copies: records in a row that repeat the one before them although the robot
  moves at moving_speed (m/s) or more before and after. max_frozen: s that a camera, or the measured
  state, may stand still while the rest of the recording moves; frozen_level: mean difference in
  grey levels up to which two frames count as the same (decoded copies differ a little).
  min_contrast: standard deviation over a frame, in grey levels, below which it is blank.
  rotation_tolerance: how far rot6d may be from two orthonormal columns.
  max_speed: m/s; max_turn: rad/s; jump_ratio: a step longer than jump_floor m (or jump_angle rad)
  may be this many times what the steps around it make likely (`defects.usual_steps`).
  workspace: m, lowest and highest corner of a box about the robot's base, the same for every arm.
  gripper_tolerance: beyond 0..1. A gripper is stuck that moves less than gripper_motion within
  gripper_response s of a command that stays at least gripper_step away from where it was.
  max_toggles: Hz, reversals between open and closed in any second.
  """

  max_length_difference: int = 0
  min_fps: float = 1.0
  max_fps: float = 240.0
  fps_tolerance: float = 0.1
  max_gap: float = 3.0
  max_copies: int = 1
  moving_speed: float = 0.03
  max_frozen: float = 0.5
  frozen_level: float = 0.02
  min_contrast: float = 2.0
  rotation_tolerance: float = 2 * UNIT_TOLERANCE
  max_speed: float = 2.5
  max_turn: float = 10.0
  jump_ratio: float = 4.0
  jump_floor: float = 0.03
  jump_angle: float = 0.2
  workspace: tuple[tuple[float, float, float], tuple[float, float, float]] = (
    (-1.5, -1.5, -0.5),
    (1.5, 1.5, 2.0),
  )
  gripper_tolerance: float = UNIT_TOLERANCE
  gripper_step: float = 0.5
  gripper_motion: float = 0.05
  gripper_response: float = 1.0
  max_toggles: float = 4.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name != 'workspace' and not (np.isfinite(value) and value >= 0):
        raise ConfigError(f'clean.{field.name}: expected a finite number >= 0, got {value}.')
    box = np.asarray(self.workspace, np.float64)
    if box.shape != (2, 3) or not (box[0] < box[1]).all():
      raise ConfigError(f'clean.workspace: expected low < high, 3 m each, got {self.workspace}.')
    if not 0 < self.min_fps < self.max_fps:
      raise ConfigError(f'clean.min_fps, max_fps: expected 0 < {self.min_fps} < {self.max_fps}.')


@dataclasses.dataclass(frozen=True)
class Finding:
  """One defect. check: a name of CHECKS; frame: the worst one, None = the whole episode; value and
  threshold: what was measured and what was allowed, in the unit that message names."""

  check: str
  frame: int | None
  value: float
  threshold: float
  message: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Streams:
  """What of a record can be looked at, and how far it is from its schema.

  frames: views that are uint8 [T, H, W, 3] with pixels; small: float32 [T, h, w, 3], the same at a
  few pixels; robot: 'state' and 'actions' as float64 [T, arms, 10], where they have that shape;
  motion: m that the state moves from each frame to the next [T - 1], the fastest arm, or None.
  """

  record: EpisodeRecord
  frames: dict[str, np.ndarray]
  small: dict[str, np.ndarray]
  robot: dict[str, np.ndarray]
  motion: np.ndarray | None

  @classmethod
  def of(cls, record: EpisodeRecord) -> _Streams:
    frames = {
      view: x
      for view, x in record.frames.items()
      if x.dtype == np.uint8 and x.ndim == 4 and x.shape[-1] == 3 and x.size
    }
    small = {}
    for view, x in frames.items():
      rows, columns = (max(n // _SAMPLED, 1) for n in x.shape[1:3])
      small[view] = x[:, ::rows, ::columns].astype(np.float32)
    robot = {}
    for name in ('state', 'actions'):
      x = getattr(record, name)
      if x is not None and x.ndim == 2 and x.shape[1] and not x.shape[1] % ARM_WIDTH and len(x):
        robot[name] = np.asarray(x, np.float64).reshape(len(x), -1, ARM_WIDTH)
    state = robot.get('state')
    usable = state is not None and len(state) > 1 and np.isfinite(state).all()
    return cls(record, frames, small, robot, defects.steps_of(state).max(1) if usable else None)

  @property
  def fps(self) -> float:
    """Hz; a nonsensical one (a finding of its own) counts as 1."""
    fps = self.record.fps
    return fps if np.isfinite(fps) and fps > 0 else 1.0


def _check_cameras(streams: _Streams, settings: CleanSettings) -> Iterator[Finding]:
  record = streams.record
  for view in record.views:
    if view not in streams.frames:
      x = record.frames.get(view)
      got = 'nothing' if x is None else f'{x.dtype} {list(x.shape)}'
      yield Finding(
        'missing_camera', None, 0, 1, f'camera {view!r}: expected uint8 [T, H, W, 3], got {got}'
      )
  if not record.views:
    yield Finding('missing_camera', None, 0, 1, 'no cameras')


def _check_lengths(streams: _Streams, settings: CleanSettings) -> Iterator[Finding]:
  record = streams.record
  lengths = {f'camera {view!r}': len(x) for view, x in record.frames.items() if x.ndim}
  for name in ('state', 'actions', 'times'):
    x = getattr(record, name)
    if x is not None:
      lengths[name] = len(x)
  for view, camera in record.calibration.items():
    if camera is not None and camera.extrinsics.ndim == 3:
      lengths[f'extrinsics of {view!r}'] = len(camera.extrinsics)
  if not lengths:
    return
  expected = sorted(lengths.values())[len(lengths) // 2]
  for name, length in lengths.items():
    off = abs(length - expected)
    if off > settings.max_length_difference:
      message = f'{name} has {length} rows, most streams have {expected}'
      limit = settings.max_length_difference
      yield Finding('length_mismatch', min(length, expected), off, limit, message)


def _check_times(streams: _Streams, settings: CleanSettings) -> Iterator[Finding]:
  """Recorded times increase."""
  times = streams.record.times
  if times is None or times.ndim != 1 or not len(times):
    return
  bad = np.flatnonzero(~np.isfinite(times))
  if len(bad):
    message = f'{len(bad)} times are NaN or infinite'
    yield Finding('time_order', int(bad[0]), len(bad), 0, message)
    return
  steps = np.diff(times)
  late = np.flatnonzero(steps <= 0)
  if len(late):
    worst = int(late[steps[late].argmin()])
    message = f'{len(late)} recorded times do not increase, worst step {steps[worst]:.4g} s'
    yield Finding('time_order', worst + 1, float(steps[worst]), 0, message)


def _check_fps(streams: _Streams, settings: CleanSettings) -> Iterator[Finding]:
  fps, times = streams.record.fps, streams.record.times
  if not (np.isfinite(fps) and settings.min_fps <= fps <= settings.max_fps):
    low, high = settings.min_fps, settings.max_fps
    limit = high if fps > high else low
    yield Finding('fps', None, float(fps), limit, f'{fps:.4g} Hz is not in {low:g}..{high:g} Hz')
    return
  if times is None or times.ndim != 1 or len(times) < 3 or not np.isfinite(times).all():
    return
  intervals = np.diff(times) * fps
  # The nominal rate may be off by a factor or its inverse: |log| treats them alike.
  middle = float(np.median(intervals))
  off = abs(np.log(middle)) if middle > 0 else np.inf
  if off > np.log1p(settings.fps_tolerance):
    message = (
      f'recorded at {fps / middle:.4g} Hz, said to be {fps:.4g} Hz'
      if middle > 0
      else ('median recorded interval is not positive')
    )
    yield Finding('fps', None, float(np.expm1(off)), settings.fps_tolerance, message)
  worst = int(intervals.argmax())
  if intervals[worst] > settings.max_gap:
    message = f'{intervals[worst]:.3g} nominal intervals without a record'
    yield Finding('fps', worst + 1, float(intervals[worst]), settings.max_gap, message)


def _check_copies(streams: _Streams, settings: CleanSettings) -> Iterator[Finding]:
  motion, limit = streams.motion, settings.max_copies
  if motion is None:
    return
  same_length = [
    x for x in (*streams.small.values(), *streams.robot.values()) if len(x) == len(motion) + 1
  ]
  moving = motion * streams.fps > settings.moving_speed
  found = defects.copied_records(same_length, moving)
  start, length = max(found, key=lambda run: run[1], default=(0, 0))
  if length > limit:
    message = f'{length} records in a row are copies of earlier ones during a motion'
    yield Finding('duplicates', start, length, limit, message)


def _check_frozen(streams: _Streams, settings: CleanSettings) -> Iterator[Finding]:
  """A camera that stands still while the robot (or, without one, another camera) moves; a state
  that does while the robot is commanded to move."""
  changes = {view: defects.changes_of(x) for view, x in streams.small.items() if len(x) > 1}
  moves = {view: defects.is_moving_picture(x) for view, x in changes.items()}
  stills = []
  for view, change in changes.items():
    others = [x for other, x in moves.items() if other != view and len(x) == len(change)]
    if streams.motion is not None and len(streams.motion) == len(change):
      others = [streams.motion * streams.fps > settings.moving_speed]
    # Nothing to compare with: a sensor never gives the same picture twice.
    active = np.any(others, 0) if others else np.ones(len(change), bool)
    stills.append((f'camera {view!r}', change <= settings.frozen_level, active))
  state, actions = streams.robot.get('state'), streams.robot.get('actions')
  if state is not None and actions is not None and len(state) == len(actions) > 1:
    wanted = np.nan_to_num(defects.steps_of(actions)).max(1) * streams.fps
    held = (state[1:] == state[:-1]).all((1, 2))
    stills.append(('state', held, wanted > settings.moving_speed))
  for name, still, active in stills:
    count, start = defects.longest_stillness(still, active)
    seconds = count / streams.fps
    if seconds > settings.max_frozen:
      message = f'{name} stands still for {seconds:.3g} s of motion'
      yield Finding('frozen', start + 1, seconds, settings.max_frozen, message)


def _check_blank(streams: _Streams, settings: CleanSettings) -> Iterator[Finding]:
  for view, x in streams.small.items():
    contrast = x.mean(-1).std((1, 2))
    worst = int(contrast.argmin())
    if contrast[worst] < settings.min_contrast:
      count = int((contrast < settings.min_contrast).sum())
      message = (
        f'camera {view!r}: {count} blank frames, the flattest has a contrast of '
        f'{contrast[worst]:.3g} grey levels'
      )
      yield Finding('blank_camera', worst, float(contrast[worst]), settings.min_contrast, message)


def _check_state(streams: _Streams, settings: CleanSettings) -> Iterator[Finding]:
  """Shape, finite numbers and rotations of the state and the actions."""
  for name in ('state', 'actions'):
    x = getattr(streams.record, name)
    if x is None:
      continue
    if name not in streams.robot:
      message = f'{name}: expected [T, {ARM_WIDTH} per arm], got {list(x.shape)}'
      yield Finding('invalid_state', None, 0, ARM_WIDTH, message)
      continue
    poses = streams.robot[name]
    bad = ~np.isfinite(poses).all((1, 2))
    if bad.any():
      message = f'{name}: NaN or infinite in {bad.sum()} rows'
      yield Finding('invalid_state', int(bad.argmax()), int(bad.sum()), 0, message)
    off = np.where(bad, 0, defects.rotation_error(np.nan_to_num(poses)))
    worst, limit = int(off.argmax()), settings.rotation_tolerance
    if off[worst] > limit:
      message = f'{name}: rot6d is off by {off[worst]:.3g} from the columns of a rotation'
      yield Finding('invalid_state', worst, float(off[worst]), limit, message)


def _check_jumps(streams: _Streams, settings: CleanSettings) -> Iterator[Finding]:
  """Speeds beyond what the arm can do, and single steps beyond what it does around them."""
  state = streams.robot.get('state')
  if state is None or len(state) < 2:
    return
  kinds = (
    ('m', defects.steps_of(state), settings.max_speed, settings.jump_floor),
    ('rad', defects.turns_of(state), settings.max_turn, settings.jump_angle),
  )
  for unit, steps, limit, floor in kinds:
    steps = np.nan_to_num(steps, nan=0.0, posinf=0.0)
    for arm, step in enumerate(steps.T):
      speed = step * streams.fps
      worst = int(speed.argmax())
      if speed[worst] > limit:
        message = f'arm {arm} moves at {speed[worst]:.3g} {unit}/s'
        yield Finding('kinematic_jump', worst + 1, float(speed[worst]), limit, message)
        continue
      allowed = np.maximum(settings.jump_ratio * defects.usual_steps(step), floor)
      worst = int((step / allowed).argmax())
      if len(step) > 3 and step[worst] > allowed[worst]:
        message = f'arm {arm} steps {step[worst]:.3g} {unit} where it moves far less'
        yield Finding(
          'kinematic_jump', worst + 1, float(step[worst]), float(allowed[worst]), message
        )


def _check_workspace(streams: _Streams, settings: CleanSettings) -> Iterator[Finding]:
  low, high = np.asarray(settings.workspace, np.float64)
  for name, poses in streams.robot.items():
    position = np.nan_to_num(poses[..., :3], nan=0.0, posinf=0.0, neginf=0.0)
    outside = np.maximum(low - position, position - high)
    frame, arm, axis = np.unravel_index(outside.argmax(), outside.shape)
    if outside[frame, arm, axis] > 0:
      value = float(position[frame, arm, axis])
      limit = float((low if value < low[axis] else high)[axis])
      message = f'{name}: arm {arm} at {"xyz"[axis]} = {value:.3g} m'
      yield Finding('workspace', int(frame), value, limit, message)


def _check_gripper(streams: _Streams, settings: CleanSettings) -> Iterator[Finding]:
  """Openings out of range, chatter, and a measured gripper that does not follow its commands."""
  slack = settings.gripper_tolerance
  for name, poses in streams.robot.items():
    grip = np.nan_to_num(poses[..., 9], nan=0.5)
    outside = np.maximum(-grip, grip - 1)
    frame, arm = np.unravel_index(outside.argmax(), outside.shape)
    if outside[frame, arm] > slack:
      value = float(outside[frame, arm])
      message = f'{name}: gripper {arm} at {grip[frame, arm]:.4g}, expected 0..1'
      yield Finding('gripper_range', int(frame), value, slack, message)
    for arm in range(grip.shape[1]):
      frame, rate = defects.toggle_rate(grip[:, arm], streams.fps)
      if rate > settings.max_toggles:
        message = f'{name}: gripper {arm} opens or closes {rate} times in a second'
        yield Finding('gripper_chatter', frame, float(rate), settings.max_toggles, message)
  state, actions = streams.robot.get('state'), streams.robot.get('actions')
  if state is None or actions is None or state.shape != actions.shape:
    return
  for arm in range(state.shape[1]):
    wait = max(round(settings.gripper_response * streams.fps), 1)
    grip, command = state[:, arm, 9], actions[:, arm, 9]
    frame, moved = defects.unanswered_command(grip, command, settings.gripper_step, wait)
    if moved < settings.gripper_motion:
      message = f'gripper {arm} moves {moved:.3g} within {wait} frames of a command'
      yield Finding('gripper_stuck', frame, moved, settings.gripper_motion, message)


_Check = Callable[[_Streams, CleanSettings], Iterator[Finding]]
CHECKS: dict[str, tuple[_Check, str]] = {
  # name: (check, the stream it needs)
  'missing_camera': (_check_cameras, ''),
  'length_mismatch': (_check_lengths, ''),
  'time_order': (_check_times, 'times'),
  'fps': (_check_fps, ''),
  'duplicates': (_check_copies, 'state'),
  'frozen': (_check_frozen, ''),
  'blank_camera': (_check_blank, ''),
  'invalid_state': (_check_state, 'state'),
  'kinematic_jump': (_check_jumps, 'state'),
  'workspace': (_check_workspace, 'state'),
  'gripper': (_check_gripper, 'state'),
}


def findings(record: EpisodeRecord, settings: CleanSettings = CleanSettings()) -> list[Finding]:
  """What is wrong with an episode, in the order of the checks; [] = nothing."""
  with np.errstate(all='ignore'):  # not a number, or too large, is what some checks look for
    streams = _Streams.of(record)
    return [found for check, _ in CHECKS.values() for found in check(streams, settings)]


def clean(
  record: EpisodeRecord, settings: CleanSettings = CleanSettings()
) -> EpisodeRecord | Quarantined:
  """The record with provenance['clean'] = {'checks': names of those that had something to judge},
  or why it is refused: every finding with its frame, value and threshold."""
  found = findings(record, settings)
  if found:
    reasons = '; '.join(
      f'{f.check}{"" if f.frame is None else f" at frame {f.frame}"}: {f.message} '
      f'({f.value:.4g}, threshold {f.threshold:.4g})'
      for f in found
    )
    return Quarantined(record.episode_id, record.source, f'cleaning: {reasons}')
  judged = [n for n, (_, need) in CHECKS.items() if not need or getattr(record, need) is not None]
  provenance = {**record.provenance, 'clean': {'checks': judged}}
  return dataclasses.replace(record, provenance=provenance)
