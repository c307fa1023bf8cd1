"""Temporal synchronisation: lags put into recorded episodes and found again.

wallwm bench sync -- --episodes 60
Data: long episodes of the tabletop's scripted expert (3 views of 64x64), or any .npz episodes
(state [T, 4] = x, y, z, opening; uint8 [T, H, W, 3] per camera) named with --npz. Sensor noise is
added to every frame; the robot stream is delayed as a logger would, its first row repeated.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import harness
import numpy as np

from wallwm_jax.data import signals
from wallwm_jax.data.sync import Motion, SyncSettings, agreement, estimate
from wallwm_jax.envs.tabletop.collect import collect
from wallwm_jax.envs.tabletop.config import TabletopConfig

LAGS = range(6)
DRIFT = (3, 4, 6, 8)  # frames that the robot clock gains over an episode
SETTINGS = SyncSettings()


def read(args):
  """(name, frames by view, poses [T, 10]) of each episode."""
  if args.npz:
    for path in sorted(args.npz.glob('*.npz')):
      data = np.load(path)
      x = data['state']
      poses = np.zeros((len(x), 10))
      poses[:, :3], poses[:, [3, 7]], poses[:, 9] = x[:, :3], 1, x[:, 3]
      yield path.stem, {view: data[view] for view in sorted(data) if data[view].ndim == 4}, poses
    return
  config = TabletopConfig(image_size=(64, 64))
  for record in collect(args.episodes, args.seed, mix='multi', batch=16, config=config):
    yield record.episode_id, dict(record.frames), record.state.astype(np.float64)


class Episode:
  """The visual motion of an episode (noise added once) and its poses, to be put out of step."""

  def __init__(self, name, frames, poses, noise, rng):
    self.name, self.poses, self.views = name, poses, tuple(frames)
    self.visual = np.stack(
      [
        signals.visual_motion(
          np.clip(np.round(x + noise * rng.standard_normal(x.shape, np.float32)), 0, 255)
        )
        for x in frames.values()
      ]
    )

  def motion(self, lags, poses=None, drift=0.0) -> Motion:
    """lags: frames by camera."""
    poses, most = self.poses if poses is None else poses, max(lags)
    t = np.arange(len(poses))
    at = np.clip(t - most + drift * (t / (len(poses) - 1) - 0.5), 0, len(poses) - 1)
    late = np.stack([np.interp(at, t, x) for x in poses.T], 1)
    robot = signals.robot_motion(late, SETTINGS.turn_arm, SETTINGS.grip_arm)
    n = min(robot.shape[1], self.visual.shape[1])
    seen = [x[np.clip(np.arange(n) - (most - lag), 0, None)] for x, lag in zip(self.visual, lags)]
    return Motion(self.name, ('benchmark', ''), self.views, np.stack(seen), robot[:, :n])


def singles(episodes):
  errors = [
    list(estimate([e.motion([lag] * len(e.views))]).lags.values())[0] - lag
    for e in episodes
    for lag in LAGS
  ]
  errors = np.array(errors)
  return {
    'exact': float(np.mean(errors == 0)),
    'within_1': float(np.mean(np.abs(errors) <= 1)),
    'mean_absolute_error': float(np.abs(errors).mean()),
  }


def pools(episodes, size, rounds, own, rng):
  """Share of rigs of `size` episodes all of whose cameras get the exact lag."""
  right = []
  for _ in range(rounds):
    v = len(episodes[0].views)
    lags = rng.integers(0, len(LAGS), v) if own else np.full(v, rng.integers(0, len(LAGS)))
    picked = rng.choice(len(episodes), size, replace=False)
    found = estimate([episodes[i].motion(lags.tolist()) for i in picked])
    right.append(list(found.lags.values()) == lags.tolist())
  return float(np.mean(right))


def auc(positive, negative) -> float:
  """Share of pairs in which the positive one is larger; ties count half."""
  a, b = np.asarray(positive)[:, None], np.asarray(negative)
  return float((a > b).mean() + (a == b).mean() / 2)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--episodes', type=int, default=60)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--npz', type=pathlib.Path, help='folder of .npz episodes')
  parser.add_argument('--noise', type=float, default=4.0, help='sensor noise in grey levels')
  parser.add_argument('--rounds', type=int, default=50)
  args = parser.parse_args()
  rng = np.random.default_rng(args.seed)
  start = time.process_time()
  episodes = [
    Episode(*episode, args.noise, rng)
    for episode in read(args)
    if len(episode[2]) >= SETTINGS.min_frames
  ]
  seconds = time.process_time() - start
  lags = [2] * len(episodes[0].views)
  rig = estimate([e.motion(lags) for e in episodes])
  good = [agreement(e.motion(lags), rig) for e in episodes]
  wrong = [
    agreement(e.motion(lags, episodes[(i + k) % len(episodes)].poses), rig)
    for i, e in enumerate(episodes)
    for k in (1, 5, 9, 14)
  ]
  refused = [g['drift'] > SETTINGS.drift_evidence for g in good]
  drifting = {}
  for drift in DRIFT:
    alone = [agreement(e.motion(lags, drift=drift), rig)['drift'] for e in episodes]
    rigs = [
      estimate(
        [episodes[i].motion(lags, drift=drift) for i in rng.choice(len(episodes), 8, replace=False)]
      ).drift
      for _ in range(args.rounds)
    ]
    limit = SETTINGS.drift_evidence
    drifting[drift] = {
      'episode': float(np.mean(np.array(alone) > limit)),
      'rig_of_8': float(np.mean(np.array(rigs) > limit)),
    }
  harness.report(
    f'sync: lags 0..5 found again at sensor noise {args.noise:g}, '
    + (f'episodes of {args.npz.name}' if args.npz else 'tabletop expert, 3 views of 64x64'),
    '1',
    len(episodes),
    mean_frames=float(np.mean([len(e.poses) for e in episodes])),
    single=singles(episodes),
    pooled={m: pools(episodes, m, args.rounds, False, rng) for m in (2, 4, 8)},
    pooled_own_lags={m: pools(episodes, m, args.rounds, True, rng) for m in (4, 8, 16)},
    mismatch_auc=auc([g['evidence'] for g in good], [w['evidence'] for w in wrong]),
    mismatch_passed=float(np.mean([w['evidence'] >= SETTINGS.min_evidence for w in wrong])),
    good_passed=float(np.mean([g['evidence'] >= SETTINGS.min_evidence for g in good])),
    drift_flagged=drifting,
    drift_flagged_falsely=float(np.mean(refused)),
    read_and_signals_s=seconds,
  )


if __name__ == '__main__':
  main()
