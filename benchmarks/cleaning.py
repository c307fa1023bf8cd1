"""Cleaning: recall of faults put into good episodes at 1.2 to 3 times the thresholds, and how many
good episodes are refused.

wallwm bench cleaning -- --episodes 200
Data: episodes of the tabletop's scripted expert (3 views), or any .npz episodes (state [T, 4] = x,
y, z, opening 0..1; uint8 [T, H, W, 3] per camera) named with --npz.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import time

import harness
import numpy as np

from wallwm_jax.data.clean import CleanSettings, findings
from wallwm_jax.data.schema import EpisodeRecord, EventSpan
from wallwm_jax.envs.tabletop.collect import collect

LIMITS = CleanSettings()
RATIOS = (1.2, 1.5, 2.0, 3.0)


def edited(record, field, index, value):
  x = getattr(record, field).copy()
  x[index] = value
  return dataclasses.replace(record, **{field: x})


def with_frames(record, view, frames):
  return dataclasses.replace(record, frames={**record.frames, view: frames})


def reordered(record, order):
  """The records of the episode in another order (repeats allowed), times going on."""
  streams = {name: getattr(record, name)[order] for name in ('state', 'actions')}
  frames = {view: x[order] for view, x in record.frames.items()}
  times = np.arange(len(order)) / record.fps
  return dataclasses.replace(record, frames=frames, times=times, **streams)


def speeds(record):
  return np.linalg.norm(np.diff(record.state[:, :3], axis=0), axis=-1) * record.fps


def stretch(record, length, rng, speed):
  """A random frame that `length` frames of motion at `speed` m/s or more follow, or None."""
  moving = np.convolve(speeds(record) > speed, np.ones(length), 'valid') == length
  starts = np.flatnonzero(moving)
  return int(rng.choice(starts)) if len(starts) else None


def drop_camera(record, ratio, rng):
  lost = rng.choice(record.views)
  frames = {view: x for view, x in record.frames.items() if view != lost}
  return dataclasses.replace(record, frames=frames)


def turn_back_time(record, ratio, rng):
  t = rng.integers(1, record.num_frames)
  return edited(record, 'times', t, record.times[t - 1] - (ratio - 1) / record.fps)


def copy_records(record, ratio, rng):
  count = int(np.ceil(ratio * LIMITS.max_copies))
  t = stretch(record, 3, rng, 1.2 * LIMITS.moving_speed)
  if t is None:
    return None
  order = np.arange(record.num_frames)
  return reordered(record, np.concatenate([order[: t + 2], [t + 1] * count, order[t + 2 :]]))


def freeze_camera(record, ratio, rng):
  count = int(np.floor(ratio * LIMITS.max_frozen * record.fps)) + 1
  t = stretch(record, count, rng, 1.2 * LIMITS.moving_speed)
  if t is None:
    return None
  view = rng.choice(record.views)
  frames = record.frames[view].copy()
  frames[t : t + count + 1] = frames[t]
  return with_frames(record, view, frames)


def change_rate(record, ratio, rng):
  if rng.random() < 0.5:
    return dataclasses.replace(record, times=record.times * (1 + ratio * LIMITS.fps_tolerance))
  t = rng.integers(1, record.num_frames)
  later = np.arange(record.num_frames) >= t
  gap = (ratio * LIMITS.max_gap - 1) / record.fps
  return dataclasses.replace(record, times=record.times + gap * later)


def shorten_stream(record, ratio, rng):
  lost = int(np.ceil(ratio))
  name = rng.choice(['state', 'actions', 'times', *record.views])
  if name in record.views:
    return with_frames(record, name, record.frames[name][:-lost])
  return dataclasses.replace(record, **{name: getattr(record, name)[:-lost]})


def break_state(record, ratio, rng):
  t, field = rng.integers(record.num_frames), rng.choice(['state', 'actions'])
  if rng.random() < 0.5:
    return edited(record, field, (t, rng.integers(10)), rng.choice([np.nan, np.inf]))
  column = getattr(record, field)[t, 3:6]
  return edited(
    record, field, (t, slice(3, 6)), column * np.sqrt(1 + ratio * LIMITS.rotation_tolerance)
  )


def jump(record, ratio, rng):
  """The pose leaps by a multiple of the larger of what is always allowed and the steps around it,
  or beyond the speed limit."""
  t = int(rng.integers(3, record.num_frames - 3))
  step = speeds(record)[t - 3 : t + 2].max() / record.fps
  limit = max(LIMITS.jump_floor, LIMITS.jump_ratio * step)
  size = ratio * min(limit, LIMITS.max_speed / record.fps) + step
  way = rng.normal(size=3)
  poses = record.state[:, :3].copy()
  poses[t:] += (size * way / np.linalg.norm(way)).astype(np.float32)
  return edited(record, 'state', (slice(None), slice(0, 3)), poses)


def leave_workspace(record, ratio, rng):
  side, axis = rng.integers(2), rng.integers(3)
  field, t = rng.choice(['state', 'actions']), rng.integers(record.num_frames)
  return edited(record, field, (t, axis), ratio * LIMITS.workspace[side][axis])


def break_gripper(record, ratio, rng):
  kind, t = rng.integers(3), int(rng.integers(record.num_frames))
  if kind == 0:
    return edited(record, 'state', (t, 9), 1 + ratio * LIMITS.gripper_tolerance)
  if kind == 1:
    count = int(np.ceil(ratio * LIMITS.max_toggles)) + 1
    if record.fps < count or record.num_frames < record.fps + 1:
      return None
    start = int(rng.integers(record.num_frames - int(record.fps)))
    span = np.linspace(start, start + record.fps - 1, count + 1).astype(int)
    grip = record.actions[:, 9].copy()
    for i, (a, b) in enumerate(zip(span, span[1:])):
      grip[a:b] = i % 2
    return edited(record, 'actions', (slice(None), 9), grip)
  told = np.flatnonzero(np.abs(np.diff(record.actions[:, 9])) >= LIMITS.gripper_step)
  wait = LIMITS.gripper_response * record.fps
  if not len(told) or told[0] + wait + 2 >= record.num_frames:
    return None
  grip = record.state[:, 9]
  little = grip[0] + (grip - grip[0]) * LIMITS.gripper_motion / ratio / max(np.ptp(grip), 1e-6)
  return edited(record, 'state', (slice(None), 9), little)


def blank_frame(record, ratio, rng):
  view, t = rng.choice(record.views), rng.integers(record.num_frames)
  frames = record.frames[view].copy()
  flat = frames[t].astype(np.float64)
  spread = flat.mean(-1).std()
  flat = 20 + (flat - flat.mean()) * LIMITS.min_contrast / ratio / max(spread, 1e-6)
  frames[t] = np.clip(np.round(flat), 0, 255)
  return with_frames(record, view, frames)


FAULTS = {  # class of faults: (fault, the checks that may find it)
  'missing camera': (drop_camera, {'missing_camera'}),
  'time order': (turn_back_time, {'time_order'}),
  'copied records': (copy_records, {'duplicates'}),
  'frozen camera': (freeze_camera, {'frozen'}),
  'frame rate': (change_rate, {'fps'}),
  'stream lengths': (shorten_stream, {'length_mismatch'}),
  'invalid state': (break_state, {'invalid_state'}),
  'kinematic jump': (jump, {'kinematic_jump'}),
  'workspace': (leave_workspace, {'workspace'}),
  'gripper': (break_gripper, {'gripper_range', 'gripper_chatter', 'gripper_stuck'}),
  'blank camera': (blank_frame, {'blank_camera'}),
}


def read_npz(path: pathlib.Path, fps: float) -> EpisodeRecord:
  data = np.load(path)
  x = data['state'].astype(np.float32)
  views = tuple(sorted(name for name in data if data[name].ndim == 4))
  poses = np.zeros((len(x), 10), np.float32)
  poses[:, :3], poses[:, [3, 7]], poses[:, 9] = x[:, :3], 1, np.clip(x[:, 3], 0, 1)
  return EpisodeRecord(
    path.stem, path.parent.name, fps, views, {view: data[view] for view in views}, poses,
    np.concatenate([poses[1:], poses[-1:]]), (EventSpan(0, len(x), 'all'),)
  )  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--episodes', type=int, default=200)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--npz', type=pathlib.Path, help='folder of .npz episodes')
  parser.add_argument('--fps', type=float, default=80.0, help='of the .npz episodes')
  args = parser.parse_args()
  if args.npz:
    records = (read_npz(path, args.fps) for path in sorted(args.npz.glob('*.npz'))[: args.episodes])
  else:
    records = collect(args.episodes, args.seed, batch=32)
  rng = np.random.default_rng(args.seed)
  found, put = collections.Counter(), collections.Counter()
  refused, count, seconds, frames = collections.Counter(), 0, 0.0, 0
  for record in records:
    record = dataclasses.replace(record, times=np.arange(record.num_frames) / record.fps)
    start = time.process_time()
    wrong = findings(record)
    seconds += time.process_time() - start
    count, frames = count + 1, frames + record.num_frames * len(record.views)
    refused.update({f.check for f in wrong} | ({'any'} if wrong else set()))
    for name, (fault, checks) in FAULTS.items():
      bad = fault(record, RATIOS[count % len(RATIOS)], rng)
      if bad is not None:
        put[name] += 1
        found[name] += bool({f.check for f in findings(bad)} & checks)
  harness.report(
    f'cleaning: recall of faults at {RATIOS} x threshold, share of good episodes refused, '
    + (f'episodes of {args.npz.name}' if args.npz else 'tabletop expert, 3 views'),
    '1',
    count,
    recall={name: found[name] / put[name] for name in FAULTS if put[name]},
    injected=dict(put),
    false_flags=refused['any'] / count,
    refused=dict(refused),
    ms_per_frame=1e3 * seconds / frames,
  )


if __name__ == '__main__':
  main()
