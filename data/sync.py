"""Temporal synchronisation: by how many frames the robot stream lags behind each camera.

Cameras and controllers have clocks of their own. What moves in the picture is compared with how
fast the measured end effectors move (commands are not used: they lead what they cause by several
frames), over a window of integer lags. A lag L means that state row t + L was measured when frame t
was taken.

A lag belongs to a rig (clocks and cameras), not to an episode: `motion` reduces each episode to a
few hundred numbers, `estimate` pools those of a rig, and `align` checks that an episode agrees with
its rig before it shifts its streams and trims what has no partner. Nothing is padded.

With r the normalised cross-correlation at a lag, the score of the lag is -1/2 log(1 - r^2) per
frame: the log likelihood ratio of a linear relation between two Gaussian signals. It weighs a
camera by how much it has to say, and adds up over cameras, channels and episodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wallwm_jax.data import signals
from wallwm_jax.data.schema import ARM_WIDTH, EpisodeRecord, Quarantined
from wallwm_jax.types import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class SyncSettings:
  """max_lag: frames searched in either direction. min_frames: of an episode that is judged.
  turn_arm: m of motion that a rotation by 1 rad counts as; grip_arm: m that the whole range of the
  gripper counts as. camera_evidence: score (nats per 100 frames) by which a camera's own lag must
  beat the common one.
  Refused are rigs and episodes with: a mean correlation below min_correlation (weak), a lead of
  less than min_margin over the best lag that is not adjacent (weak), a lag at max_lag (window
  edge); rigs whose cameras are more than max_spread frames apart; episodes more than max_deviation
  frames from their rig (inconsistent), whose halves have lags at least 2 frames apart that explain
  drift_evidence nats per 100 frames more than one lag (drifting), or whose correlation is less than
  min_surprise standard deviations above that of the same signals shifted arbitrarily (mismatched).
  """

  max_lag: int = 8
  min_frames: int = 40
  turn_arm: float = 0.1
  grip_arm: float = 0.1
  camera_evidence: float = 2.0
  min_correlation: float = 0.25
  min_margin: float = 0.03
  max_spread: int = 4
  max_deviation: int = 2
  drift_evidence: float = 2.0
  min_surprise: float = 3.0

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


@dataclasses.dataclass(frozen=True, eq=False)
class RigLag:
  """The lags of a rig.

  episodes: how many were pooled; lags: frames, by view; correlation: by view, at its lag; margin:
  of the mean correlation over cameras, each at its lag, over the best shift that is not adjacent;
  curves: float64 [V, 2 max_lag + 1], pooled correlation at lags -max_lag..max_lag; verdict: why the
  rig cannot be trusted, '' if it can.
  """

  rig: tuple[str, str]
  episodes: int
  lags: Mapping[str, int]
  correlation: Mapping[str, float]
  margin: float
  curves: np.ndarray
  verdict: str

  def to_dict(self) -> dict[str, Any]:
    """JSON-able."""
    return dataclasses.asdict(self) | {'rig': list(self.rig), 'curves': self.curves.tolist()}


def motion(record: EpisodeRecord, settings: SyncSettings = SyncSettings()) -> Motion:
  """Reduces an episode to what moves in it; records may break the schema.

  Raises:
    DataError: streams of different lengths (no lag can be told), fewer than min_frames, no camera,
      or a state that is no [T, 10 per arm].
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
  if record.num_frames < settings.min_frames:
    raise DataError(f'expected at least {settings.min_frames} frames, got {record.num_frames}.')
  visual = np.stack([signals.visual_motion(record.frames[view]) for view in views])
  robot = np.zeros((0, visual.shape[1]), np.float32)
  if record.state is not None:
    robot = signals.robot_motion(record.state, settings.turn_arm, settings.grip_arm)
  return Motion(record.episode_id, (record.source, record.rig), views, visual, robot)


def correlation_curves(m: Motion, max_lag: int, part: slice = slice(None)) -> np.ndarray:
  """Correlation of each camera with each arm (and with their sum, if there are two) in every
  channel: float64 [V, arms, channels, 2 max_lag + 1]; part: of the N entries."""
  robot = m.robot if len(m.robot) == 1 else np.concatenate([m.robot, m.robot.sum(0)[None]])
  visual = signals.channels(m.visual.astype(np.float64))[:, None, :, part]
  return signals.lagged_correlation(
    visual, signals.channels(robot.astype(np.float64))[None, :, :, part], max_lag
  )


def _scores(curves: np.ndarray) -> np.ndarray:
  """Nats per frame of correlations [V, arms, channels, L]: [V, L]."""
  r = np.clip(curves, 0, 0.999)
  return -0.5 * np.log1p(-r * r).mean((1, 2))


def estimate(motions: Sequence[Motion], settings: SyncSettings = SyncSettings()) -> RigLag:
  """The lags of the rig that these episodes share, each camera's own where it has reason for one.

  Raises:
    DataError: episodes of more than one rig, or none with a robot stream.
  """
  moving = [m for m in motions if len(m.robot)]
  rigs = {m.rig for m in motions}
  if len(rigs) != 1 or not moving:
    raise DataError(
      f'sync.estimate: expected episodes of one rig with a robot stream, got {len(moving)} of '
      f'{len(motions)} with one and rigs {sorted(rigs)}.'
    )
  views = tuple(dict.fromkeys(view for m in moving for view in m.views))
  size, w = (len(views), 4 * settings.max_lag + 1), settings.max_lag
  curves, scores, frames = np.zeros(size), np.zeros(size), np.zeros((len(views), 1))
  for m in moving:
    rows, n = [views.index(view) for view in m.views], m.visual.shape[1]
    of_episode = correlation_curves(m, 2 * w)
    curves[rows] += n * of_episode.mean((1, 2))
    scores[rows] += n * _scores(of_episode)
    frames[rows] += n
  curves, scores = curves / frames, 100 * scores / frames.mean()
  window = scores[:, w:-w]
  common, own = int(window.sum(0).argmax()), window.argmax(1)
  gain = window.max(1) - window[:, common]
  lags = np.where(gain > settings.camera_evidence, own, common) - w
  return _judge_rig(
    next(iter(rigs)), len(moving), dict(zip(views, lags.tolist())), curves, settings
  )


def _along(curves: np.ndarray, lags: np.ndarray, reach: int) -> np.ndarray:
  """Mean over cameras of curves [V, L] at shifts -reach..reach from each one's lag."""
  middle = curves.shape[1] // 2
  return np.mean(
    [c[middle + lag - reach : middle + lag + reach + 1] for c, lag in zip(curves, lags)], 0
  )


def _margin(curve: np.ndarray) -> float:
  """By how much the middle of a curve leads over all but its neighbours."""
  middle = len(curve) // 2
  return float(curve[middle] - np.delete(curve, slice(middle - 1, middle + 2)).max())


def _judge_rig(rig, episodes: int, lags: dict[str, int], curves, settings) -> RigLag:
  w, offsets = settings.max_lag, list(lags.values())
  middle = curves.shape[1] // 2
  correlation = {view: float(curves[i, middle + lag]) for i, (view, lag) in enumerate(lags.items())}
  r, margin = np.mean(list(correlation.values())), _margin(_along(curves, offsets, w))
  verdict = ''
  if max(map(abs, offsets)) == w:
    verdict = f'edge: lags {lags} reach the end of the window of {w} frames'
  elif max(offsets) - min(offsets) > settings.max_spread:
    verdict = f'inconsistent: lags {lags} are more than {settings.max_spread} frames apart'
  elif r < settings.min_correlation:
    verdict = f'weak: mean correlation {r:.3f}, threshold {settings.min_correlation:g}'
  elif margin < settings.min_margin:
    verdict = f'weak: margin {margin:.3f} over other lags, threshold {settings.min_margin:g}'
  return RigLag(rig, episodes, lags, correlation, margin, curves[:, w:-w], verdict)


def agreement(m: Motion, rig_lag: RigLag, settings: SyncSettings) -> dict[str, float]:
  """How an episode agrees with the lags of its rig.

  Returns:
    r: mean correlation over cameras at the lags of the rig; margin: its lead over the best shift
    that is not adjacent; deviation: frames to the best shift; drift: nats per 100 frames that a lag
    of its own for each half explains more than one lag; step: frames from the first half's lag to
    the second's; surprise: standard deviations that r is above the correlations of the same signals
    shifted around the episode by more than the window.
  """
  w = settings.max_lag
  lags = [rig_lag.lags[view] for view in m.views]
  curves = correlation_curves(m, 2 * w)
  along = _along(curves.mean((1, 2)), lags, w)
  score = _along(_scores(curves), lags, w)
  half = m.visual.shape[1] // 2
  first, second = (
    _along(_scores(correlation_curves(m, 2 * w, part)), lags, w)
    for part in (slice(half), slice(half, None))
  )
  apart = np.abs(np.subtract.outer(np.arange(2 * w + 1), np.arange(2 * w + 1))) > 1
  pairs = np.where(apart, first[:, None] + second[None], -np.inf)
  a, b = np.unravel_index(pairs.argmax(), pairs.shape)
  drift = 50 * len(lags) * float(pairs[a, b] - (first + second).max())
  return {
    'r': float(along[w]),
    'margin': _margin(along),
    'deviation': int(score.argmax()) - w,
    'drift': drift,
    'step': int(b - a),
    'surprise': _surprise(m, lags, w),
  }


def _surprise(m: Motion, lags: Sequence[int], max_lag: int) -> float:
  robot = m.robot.sum(0)
  visual = np.stack([np.roll(x, lag) for x, lag in zip(m.visual, lags)])
  a, b = (signals.channels(x.astype(np.float64)) for x in (visual, robot))
  a, b = (
    (x - x.mean(-1, keepdims=True)) / np.maximum(x.std(-1, keepdims=True), 1e-9) for x in (a, b)
  )
  spectrum = np.fft.rfft(a).conj() * np.fft.rfft(b)
  r = np.fft.irfft(spectrum, a.shape[-1]).mean((0, 1)) / a.shape[-1]
  far = r[max_lag + 1 : -max_lag]
  return float((r[0] - far.mean()) / max(far.std(), 1e-9))


def align(
  record: EpisodeRecord,
  rig_lag: RigLag | None,
  settings: SyncSettings = SyncSettings(),
  own: Motion | None = None,
) -> EpisodeRecord | Quarantined:
  """Shifts the robot stream of an episode against its frames by the lags of its rig.

  Args:
    rig_lag: of the episode's rig; None only for action-free episodes, which pass through.
    own: `motion(record, settings)`, if it is at hand.

  Returns:
    The record, with the frames that every stream has: extrinsics per frame go with the robot
    (forward kinematics), times, events and captions with the frames of the first view.
    provenance['sync'] = {'lags', 'verdict'} and `agreement`. Or why it is refused.

  Raises:
    DataError: a rig lag of another rig, or none for an episode with a robot stream.
  """
  if record.state is None and record.actions is None:
    return _noted(record, {'verdict': 'no robot stream'})
  if rig_lag is None or rig_lag.rig != (record.source, record.rig):
    got = None if rig_lag is None else rig_lag.rig
    raise DataError(
      f'sync.align: episode {record.episode_id!r} is of rig {(record.source, record.rig)}, '
      f'got the lags of {got}.'
    )
  try:
    own = own or motion(record, settings)
    missing = [view for view in own.views if view not in rig_lag.lags]
    if missing or not len(own.robot):
      raise DataError(f'no lag of cameras {missing}.' if missing else 'actions without state.')
  except DataError as error:
    return Quarantined(record.episode_id, record.source, f'sync: {error}')
  found = agreement(own, rig_lag, settings)
  reason = rig_lag.verdict and f'rig {rig_lag.verdict}' or _objection(found, settings)
  if reason:
    return Quarantined(record.episode_id, record.source, f'sync: {reason}')
  lags = {view: rig_lag.lags[view] for view in own.views}
  note = {'lags': lags, 'episodes': rig_lag.episodes, 'verdict': 'ok', **found}
  return _noted(shift(record, lags), note)


def _noted(record: EpisodeRecord, note: dict[str, Any]) -> EpisodeRecord:
  return dataclasses.replace(record, provenance={**record.provenance, 'sync': note})


def _objection(found: Mapping[str, float], settings: SyncSettings) -> str:
  if found['surprise'] < settings.min_surprise:
    limit = settings.min_surprise
    return f'mismatched: {found["surprise"]:.2f} sigma above chance, threshold {limit:g}'
  if found['r'] < settings.min_correlation:
    return f'weak: correlation {found["r"]:.3f}, threshold {settings.min_correlation:g}'
  if found['drift'] > settings.drift_evidence:
    return (
      f'drifting: {found["step"]} frames between halves, {found["drift"]:.2f} nats per 100 frames, '
      f'threshold {settings.drift_evidence:g}'
    )
  if abs(found['deviation']) > settings.max_deviation:
    return (
      f'inconsistent: {found["deviation"]} frames from the lag of its rig, '
      f'threshold {settings.max_deviation}'
    )
  return ''


def shift(record: EpisodeRecord, lags: Mapping[str, int]) -> EpisodeRecord:
  """The record with state row t + lags[view] at frame t of every view, trimmed to what all have."""
  n, first = record.num_frames, lags[record.views[0]]
  start, stop = max(0, *lags.values()), n + min(0, *lags.values())  # robot rows that are kept
  rows = slice(start, stop)
  kept = slice(start - first, stop - first)  # frames of the first view
  frames = {view: x[start - lags[view] : stop - lags[view]] for view, x in record.frames.items()}
  calibration = {
    view: camera
    if camera is None or camera.extrinsics.ndim == 2
    else dataclasses.replace(camera, extrinsics=camera.extrinsics[rows])
    for view, camera in record.calibration.items()
  }
  return dataclasses.replace(
    record,
    frames=frames,
    state=record.state[rows],
    actions=None if record.actions is None else record.actions[rows],
    times=None if record.times is None else record.times[kept],
    calibration=calibration,
    events=_trimmed(record.events, kept, 2),
    captions=_trimmed(record.captions, kept, 1),
  )


def _trimmed(spans: Sequence[Any], kept: slice, shortest: int) -> tuple[Any, ...]:
  """Spans that have `shortest` frames or more in what is kept, counted from its first frame."""
  out = []
  for span in spans:
    start, end = max(span.start, kept.start), min(span.end, kept.stop)
    if end - start >= shortest:
      out.append(dataclasses.replace(span, start=start - kept.start, end=end - kept.start))
  return tuple(out)
