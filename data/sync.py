"""Temporal synchronisation: by how many frames the robot stream lags behind each camera.

Cameras and controllers have clocks of their own. What moves in the picture is compared with how
fast the measured end effectors move (commands are not used: they lead what they cause by several
frames), over a window of integer lags. A lag L means that state row t + L was measured when frame t
was taken.

A lag belongs to a rig (clocks and cameras), not to an episode: `motion` reduces each episode to a
few hundred numbers, `estimate` pools those of a rig, and `align` checks that an episode agrees with
its rig before it shifts its streams and trims what has no partner. Nothing is padded.

With r the normalised cross-correlation at a lag, the evidence for the lag is -1/2 log(1 - r^2)
nats per frame: the log likelihood ratio of a linear relation between two Gaussian signals. It
weighs a camera by how much it has to say, and adds up over cameras, channels and episodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wallwm_jax.data import signals
from wallwm_jax.data.schema import ARM_WIDTH, EpisodeRecord, Quarantined
from wallwm_jax.data.shift import shift
from wallwm_jax.types import ConfigError, DataError

_FEWEST = signals.STRIDE + 2  # frames that have a motion and a change of it


@dataclasses.dataclass(frozen=True)
class SyncSettings:
  """max_lag: frames searched in either direction. min_frames: of an episode that is
  pooled and judged.
  turn_arm: m of motion that a rotation by 1 rad counts as; grip_arm: m that the whole range of the
  gripper counts as (0: what a gripper shows of itself is little next to an arm).
  camera_evidence: nats by which lags of each camera's own must beat a common one.

  Refused are rigs and episodes whose mean correlation is below min_correlation (weak), or whose
  halves have lags 2 or more frames apart that explain drift_evidence nats more than one lag
  (drifting); rigs that lead over the lags that are not adjacent by less than min_margin (weak),
  have a lag at max_lag (edge) or cameras more than max_spread frames apart (inconsistent); episodes
  of which the robot explains less than min_evidence nats (mismatched), or that are more than
  max_deviation frames from their rig (inconsistent).
  """

  max_lag: int = 8
  min_frames: int = 40
  turn_arm: float = 0.1
  grip_arm: float = 0.0
  camera_evidence: float = 16.0
  min_correlation: float = 0.25
  min_margin: float = 0.02
  max_spread: int = 5
  max_deviation: int = 2
  drift_evidence: float = 15.0
  min_evidence: float = 8.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not (np.isfinite(value) and value >= 0):
        raise ConfigError(f'sync.{field.name}: expected a finite number >= 0, got {value}.')
    if self.max_lag < 2 or self.min_frames < 4 * self.max_lag:
      raise ConfigError(
        'sync: expected max_lag >= 2 and min_frames >= 4 * max_lag, '
        f'got {self.max_lag} and {self.min_frames}.'
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Motion:
  """What an episode contributes. visual: float32 [V, N], one row per view; robot: float32 [arms, N]
  m, no rows without a measured state; see `signals`. rig: (source, rig) of the record."""

  episode_id: str
  rig: tuple[str, str]
  views: tuple[str, ...]
  visual: np.ndarray
  robot: np.ndarray

  @property
  def frames(self) -> int:
    """T of the episode."""
    return self.visual.shape[1] + signals.STRIDE


@dataclasses.dataclass(frozen=True, eq=False)
class RigLag:
  """The lags of a rig.

  episodes: how many were pooled; lags: frames, by view; correlation: by view, at its lag; margin:
  of the mean correlation over cameras, each at its lag, over the best shift that is not adjacent;
  drift: nats that a lag for each half of the episodes explains more than one lag;
  curves: float64 [V, 2 max_lag + 1], pooled correlation at lags -max_lag..max_lag; verdict: why the
  rig cannot be trusted, '' if it can.
  """

  rig: tuple[str, str]
  episodes: int
  lags: Mapping[str, int]
  correlation: Mapping[str, float]
  margin: float
  drift: float
  curves: np.ndarray
  verdict: str

  def to_dict(self) -> dict[str, Any]:
    """For people, JSON-able: all but the curves."""
    found = dataclasses.asdict(self) | {'rig': list(self.rig)}
    del found['curves']
    return found


def motion(record: EpisodeRecord, settings: SyncSettings = SyncSettings()) -> Motion:
  """Reduces an episode to what moves in it; records may break the schema.

  Raises:
    DataError: streams of different lengths (no lag can be told), fewer than 4 frames, no camera, or
      a state that is no [T, 10 per arm].
  """
  views = tuple(view for view in record.views if view in record.frames)
  lengths = {view: len(record.frames[view]) for view in views}
  if record.state is not None:
    lengths['state'] = len(record.state)
    if record.state.ndim != 2 or not record.state.shape[1] or record.state.shape[1] % ARM_WIDTH:
      raise DataError(f'state: expected [T, {ARM_WIDTH} per arm], got {list(record.state.shape)}.')
  if not views or len(set(lengths.values())) > 1:
    raise DataError(f'expected cameras and state of one length, got {lengths}.')
  for view in views:
    x = record.frames[view]
    if x.ndim != 4 or x.shape[-1] != 3 or not x.size:
      raise DataError(f'frames[{view!r}]: expected [T, H, W, 3], got {list(x.shape)}.')
  if record.num_frames < _FEWEST:
    raise DataError(f'expected at least {_FEWEST} frames, got {record.num_frames}.')
  visual = np.stack([signals.visual_motion(record.frames[view]) for view in views])
  robot = np.zeros((0, visual.shape[1]), np.float32)
  if record.state is not None:
    robot = signals.robot_motion(record.state, settings.turn_arm, settings.grip_arm)
  return Motion(record.episode_id, (record.source, record.rig), views, visual, robot)


def correlation_curves(m: Motion, max_lag: int, part: slice = slice(None)) -> np.ndarray:
  """Correlation of each camera with each arm (and with their sum, if there are two) in every
  channel: float64 [V, arms, channels, 2 max_lag + 1]; part: of the N entries."""
  robot = m.robot if len(m.robot) == 1 else np.concatenate([m.robot, m.robot.sum(0)[None]])
  return signals.lagged_correlation(
    signals.channels(m.visual)[:, None, :, part], signals.channels(robot)[None, :, :, part], max_lag
  )


def evidence(curves: np.ndarray) -> np.ndarray:
  """Nats per frame of correlations [..., channels, L], mean over channels: [..., L]."""
  r = np.clip(curves, 0, 0.999)
  return -0.5 * np.log1p(-r * r).mean(-2)


@dataclasses.dataclass(eq=False)
class _Pool:
  """Sums over the episodes of a rig, over lags -2 max_lag..2 max_lag (L of them).

  curves: correlation x frames [V, L]; robot: nats between cameras and robot [V, L], halves: the
  same of either half of the episodes [2, V, L]; cameras: nats between cameras [V, V, L], entry
  [a, b, l] for frame t of a and t + l of b; frames: [V].
  """

  views: tuple[str, ...]
  curves: np.ndarray
  robot: np.ndarray
  halves: np.ndarray
  cameras: np.ndarray
  frames: np.ndarray

  @classmethod
  def of(cls, motions: Sequence[Motion], max_lag: int) -> _Pool:
    views = tuple(dict.fromkeys(view for m in motions for view in m.views))
    v, size = len(views), 4 * max_lag + 1
    shapes = ((v, size), (v, size), (2, v, size), (v, v, size), (v,))
    pool = cls(views, *(np.zeros(shape) for shape in shapes))
    for m in motions:
      rows, n = [views.index(view) for view in m.views], m.visual.shape[1]
      curves = correlation_curves(m, 2 * max_lag)
      visual = signals.channels(m.visual)
      between = signals.lagged_correlation(visual[:, None], visual[None], 2 * max_lag)
      pool.curves[rows] += n * curves.mean((1, 2))
      pool.robot[rows] += n * evidence(curves).mean(1)
      pool.cameras[np.ix_(rows, rows)] += n * evidence(between)
      for half, part in enumerate(_halves(n)):
        of_half = correlation_curves(m, 2 * max_lag, part)
        pool.halves[half, rows] += n / 2 * evidence(of_half).mean(1)
      pool.frames[rows] += n
    return pool


def _halves(n: int) -> tuple[slice, slice]:
  return slice(n // 2), slice(n // 2, None)


def estimate(motions: Sequence[Motion], settings: SyncSettings = SyncSettings()) -> RigLag:
  """The lags of the rig that these episodes share, each camera's own where there is reason for it.

  Raises:
    DataError: episodes of more than one rig, or none with a robot stream and min_frames.
  """
  moving = [m for m in motions if len(m.robot) and m.frames >= settings.min_frames]
  rigs = {m.rig for m in motions}
  if len(rigs) != 1 or not moving:
    raise DataError(
      f'sync.estimate: expected episodes of one rig with a robot stream and {settings.min_frames} '
      f'frames, got {len(moving)} such ones of {len(motions)} and rigs {sorted(rigs)}.'
    )
  pool = _Pool.of(moving, settings.max_lag)
  return _judge_rig(next(iter(rigs)), len(moving), pool, _lags(pool, settings), settings)


def _lags(pool: _Pool, settings: SyncSettings) -> np.ndarray:
  """int [V]: the lags that explain most, cameras against the robot and (as they see the same
  motion) against each other; one lag for all unless lags of their own explain much more.

  Each camera climbs in turn from every common lag. Evidence between cameras counts 1 / V: every
  camera is in V pairs of signals that are far from independent.
  """
  v, w = len(pool.views), settings.max_lag
  window = pool.robot[:, w:-w]
  every = np.arange(-w, w + 1)

  def total(lags: np.ndarray) -> float:
    pairs = sum(pool.cameras[a, b, 2 * w + lags[a] - lags[b]] for a in range(v) for b in range(a))
    return float(window[np.arange(v), lags + w].sum() + pairs / v)

  def climb(lags: np.ndarray) -> np.ndarray:
    while True:
      before = lags.copy()
      for a in range(v):
        others = sum(pool.cameras[a, b, 2 * w + every - lags[b]] for b in range(v) if b != a)
        gain = window[a] + others / v
        if gain.max() > gain[lags[a] + w] + 1e-9:  # strictly upwards, so that it ends
          lags[a] = every[gain.argmax()]
      if (lags == before).all():
        return lags

  common = np.full(v, every[window.sum(0).argmax()])
  own = max((climb(np.full(v, lag)) for lag in every), key=total)
  return own if total(own) - total(common) > settings.camera_evidence else common


def _along(curves: np.ndarray, lags: np.ndarray, reach: int) -> np.ndarray:
  """Curves [V, L] around each camera's own lag: [V, 2 reach + 1], the lag in the middle."""
  middle = curves.shape[1] // 2 + np.asarray(lags)
  return np.take_along_axis(curves, middle[:, None] + np.arange(-reach, reach + 1), 1)


def _margin(curve: np.ndarray) -> float:
  """By how much the middle of a curve leads over all but its neighbours."""
  middle = len(curve) // 2
  return float(curve[middle] - np.delete(curve, slice(middle - 1, middle + 2)).max())


def _drift(halves: np.ndarray) -> tuple[float, int]:
  """(nats that a lag for each half explains more than one for both, frames between the two) of
  nats by half and shift [2, L]."""
  shifts = np.arange(halves.shape[1])
  pairs = halves[0][:, None] + halves[1]
  apart = np.abs(shifts[:, None] - shifts) >= 2
  first, second = np.unravel_index(np.where(apart, pairs, -np.inf).argmax(), pairs.shape)
  return float(pairs[first, second] - np.diagonal(pairs).max()), int(second - first)


def _judge_rig(rig, episodes: int, pool: _Pool, lags: np.ndarray, settings) -> RigLag:
  w = settings.max_lag
  curves = pool.curves / pool.frames[:, None]
  along = _along(curves, lags, w)
  by_view = dict(zip(pool.views, lags.tolist()))
  nats, step = _drift(np.stack([_along(half, lags, w).sum(0) for half in pool.halves]))
  r, margin = float(along[:, w].mean()), _margin(along.mean(0))
  verdict = ''
  if np.abs(lags).max() == w:
    verdict = f'edge: lags {by_view} reach the end of the window of {w} frames'
  elif np.ptp(lags) > settings.max_spread:
    verdict = f'inconsistent: lags {by_view} are more than {settings.max_spread} frames apart'
  elif r < settings.min_correlation:
    verdict = f'weak: mean correlation {r:.3f}, threshold {settings.min_correlation:g}'
  elif margin < settings.min_margin:
    verdict = f'weak: margin {margin:.3f} over other lags, threshold {settings.min_margin:g}'
  elif nats > settings.drift_evidence:
    verdict = f'drifting: {step} frames between halves, {nats:.1f} nats, threshold '
    verdict += f'{settings.drift_evidence:g}'
  correlation = dict(zip(pool.views, along[:, w].tolist()))
  return RigLag(rig, episodes, by_view, correlation, margin, nats, curves[:, w:-w], verdict)


def agreement(
  m: Motion, rig_lag: RigLag, settings: SyncSettings = SyncSettings()
) -> dict[str, float]:
  """How an episode agrees with the lags of its rig.

  Returns:
    r: mean correlation at the lags of the rig, over cameras and channels; margin: its lead over the
    best shift that is not adjacent; spread: frames between the cameras' own best shifts;
    evidence: nats (per camera) that the robot explains at those lags; best: the most it explains at
    any shift; deviation: frames to that shift; drift: nats that a lag of its own for each half
    explains more than one lag; step: frames from the first half's lag to the second's.
  """
  w, n = settings.max_lag, m.visual.shape[1]
  lags = np.array([rig_lag.lags[view] for view in m.views])
  curves = correlation_curves(m, 2 * w)
  along = _along(curves.mean((1, 2)), lags, w)
  nats = n * _along(evidence(curves).mean(1), lags, w)
  halves = [
    n / 2 * _along(evidence(correlation_curves(m, 2 * w, part)).mean(1), lags, w).sum(0)
    for part in _halves(n)
  ]
  drift, step = _drift(np.stack(halves))
  return {
    'r': float(along[:, w].mean()),
    'margin': _margin(along.mean(0)),
    'spread': int(np.ptp(nats.argmax(1))),
    'evidence': float(nats[:, w].mean()),
    'best': float(nats.mean(0).max()),
    'deviation': int(nats.mean(0).argmax()) - w,
    'drift': drift,
    'step': step,
  }


def align(
  record: EpisodeRecord,
  rig_lag: RigLag | None,
  settings: SyncSettings = SyncSettings(),
) -> EpisodeRecord | Quarantined:
  """Shifts the robot stream of an episode against its frames by the lags of its rig.

  Args:
    rig_lag: of the episode's rig; None where nothing tells it: for action-free episodes and for
      those shorter than min_frames, which pass through as they are.

  Returns:
    The record, with the frames that every stream has: extrinsics per frame go with the robot
    (forward kinematics), times, events and captions with the frames of the first view.
    provenance['sync'] = {'lags', 'episodes', 'verdict'} and `agreement`; episodes shorter than
    min_frames are shifted like their rig without being judged. Or why it is refused.

  Raises:
    DataError: a rig lag of another rig, or none for a longer episode with a robot stream.
  """
  if record.state is None and record.actions is None:
    return _noted(record, {'verdict': 'no robot stream'})
  robot = record.actions if record.state is None else record.state
  if rig_lag is None and len(robot) < settings.min_frames:
    verdict = f'not judged: no episode of its rig has {settings.min_frames} frames'
    return _noted(record, {'verdict': verdict})
  if rig_lag is None or rig_lag.rig != (record.source, record.rig):
    got = None if rig_lag is None else rig_lag.rig
    raise DataError(
      f'sync.align: episode {record.episode_id!r} is of rig {(record.source, record.rig)}, '
      f'got the lags of {got}.'
    )
  try:
    own = motion(record, settings)
    missing = [view for view in own.views if view not in rig_lag.lags]
    if missing or not len(own.robot):
      raise DataError(f'no lag of cameras {missing}.' if missing else 'actions without state.')
  except DataError as error:
    return Quarantined(record.episode_id, record.source, f'sync: {error}')
  lags = {view: rig_lag.lags[view] for view in own.views}
  note = {'lags': lags, 'episodes': rig_lag.episodes}
  reason = rig_lag.verdict and f'rig {rig_lag.verdict}'
  if own.frames >= settings.min_frames:
    found = agreement(own, rig_lag, settings)
    note |= {'verdict': 'ok', **found}
    reason = reason or _objection(found, settings)
  else:
    note |= {'verdict': f'not judged: {own.frames} frames'}
    kept = own.frames - max(0, *lags.values()) + min(0, *lags.values())
    reason = reason or (kept < 2 and f'too short: {kept} frames left of {own.frames}')
  if reason:
    return Quarantined(record.episode_id, record.source, f'sync: {reason}')
  return _noted(shift(record, lags), note)


def _noted(record: EpisodeRecord, note: dict[str, Any]) -> EpisodeRecord:
  return dataclasses.replace(record, provenance={**record.provenance, 'sync': note})


def _objection(found: Mapping[str, float], settings: SyncSettings) -> str:
  if found['best'] >= settings.min_evidence and abs(found['deviation']) > settings.max_deviation:
    return (
      f'inconsistent: {found["deviation"]} frames from the lag of its rig, '
      f'threshold {settings.max_deviation}'
    )
  if found['evidence'] < settings.min_evidence:
    nats, limit = found['evidence'], settings.min_evidence
    return f'mismatched: the robot explains {nats:.2f} nats of the motion, threshold {limit:g}'
  if found['r'] < settings.min_correlation:
    return f'weak: correlation {found["r"]:.3f}, threshold {settings.min_correlation:g}'
  if found['drift'] > settings.drift_evidence:
    return (
      f'drifting: {found["step"]} frames between halves, {found["drift"]:.2f} nats, '
      f'threshold {settings.drift_evidence:g}'
    )
  return ''
