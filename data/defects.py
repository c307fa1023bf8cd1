"""What defects of a recording look like in its arrays; `clean` says which are too many.

Poses are float64 [T, arms, 10] of the canonical representation (see schema), steps and turns of
them [T - 1, arms].
"""

from __future__ import annotations

import numpy as np

from wallwm_jax.geometry.poses import geodesic_angle, rot6d_to_matrix


def steps_of(poses: np.ndarray) -> np.ndarray:
  """m that each arm moves between frames: [T, arms, 10] -> [T - 1, arms]."""
  return np.linalg.norm(np.diff(poses[..., :3], axis=0), axis=-1)


def turns_of(poses: np.ndarray) -> np.ndarray:
  """rad that each arm turns between frames: [T, arms, 10] -> [T - 1, arms]."""
  rotation = rot6d_to_matrix(poses[..., 3:9])
  return geodesic_angle(rotation[:-1], rotation[1:])


def rotation_error(poses: np.ndarray) -> np.ndarray:
  """How far rot6d is from two orthonormal columns: [T, arms, 10] -> [T], the worst arm."""
  a, b = poses[..., 3:6], poses[..., 6:9]
  gram = np.stack([(a * a).sum(-1) - 1, (b * b).sum(-1) - 1, (a * b).sum(-1)], -1)
  return np.abs(gram).max((1, 2))


def changes_of(frames: np.ndarray) -> np.ndarray:
  """Mean absolute difference between frames, in grey levels: float32 [T, H, W, 3] -> [T - 1]."""
  return np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))


def is_moving_picture(changes: np.ndarray) -> np.ndarray:
  """Where a camera sees motion and not its own noise only: [T - 1] -> bool [T - 1]."""
  noise = np.quantile(changes, 0.1) if len(changes) else 0.0
  return changes > 1.1 * noise + 0.2


def runs_of(flags: np.ndarray) -> list[tuple[int, int]]:
  """Stretches start..end-1 of True in bool [N]."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
  return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def longest_stillness(still: np.ndarray, active: np.ndarray) -> tuple[int, int]:
  """(active steps, start) of the stretch of `still` with most of them; both bool [N]."""
  counts = [(int(active[start:end].sum()), start) for start, end in runs_of(still)]
  return max(counts, key=lambda found: found[0], default=(0, 0))


def copied_records(streams: list[np.ndarray], moving: np.ndarray) -> list[tuple[int, int]]:
  """Stretches (start, length) of records that are copies in every stream, during a motion.

  A copy repeats either the record before it, while the robot moves right before and after the
  stretch (a robot that rests repeats itself too, but neither stops nor starts within a frame), or
  one further back, which a moving robot never does exactly.

  Args:
    streams: [T, ...] each; moving: bool [T - 1], the robot moves from frame t to t + 1.
  """
  number = np.zeros(len(moving) + 1, np.int64)  # equal numbers = equal records so far
  for x in streams:
    rows = np.ascontiguousarray(x).reshape(len(x), -1)
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]
    number = np.unique(np.stack([number, np.unique(keys, return_inverse=True)[1]], 1), axis=0,
                       return_inverse=True)[1].reshape(-1)  # fmt: skip
  held = number[1:] == number[:-1]
  found = [
    (start + 1, end - start)
    for start, end in runs_of(held)
    if start > 0 and end < len(moving) and moving[start - 1] and moving[end]
  ]
  first = {}
  again = np.zeros(len(number), bool)
  for t, value in enumerate(number.tolist()):
    again[t] = t - first.setdefault(value, t) > 1 and not held[t - 1]
  again[1:] &= moving
  return found + [(start, end - start) for start, end in runs_of(again)]


def usual_steps(steps: np.ndarray) -> np.ndarray:
  """What each step would be in a smooth motion: [N] -> [N].

  The largest of those two before and after it and of the smaller of its neighbours: a motion takes
  more than two frames, whereas a jump takes one step and a stray record two. A recording may begin
  and end in the middle of a motion, of which the first two and the last two steps show less: what
  follows may be the end of a minimum-jerk stroke, whose last step is a seventh of the one before.
  """
  near = np.pad(steps, 1, constant_values=np.inf)
  beside = np.minimum(near[:-2], near[2:])
  beside[:2] *= 2
  beside[-2:] *= 2
  far = np.pad(steps, 2)
  return np.maximum(beside, np.maximum(far[:-4], far[4:]))


def toggle_rate(grip: np.ndarray, fps: float) -> tuple[int, int]:
  """(frame, most changes between open and closed within a second) of an opening [T]; it counts as
  open above 2/3 and as closed below 1/3."""
  decided = np.where(grip > 2 / 3, 1, np.where(grip < 1 / 3, -1, 0))
  known = np.flatnonzero(decided)
  changes = known[1:][np.diff(decided[known]) != 0]
  if not len(changes):
    return 0, 0
  counts = np.searchsorted(changes, changes + max(fps, 1.0)) - np.arange(len(changes))
  return int(changes[counts.argmax()]), int(counts.max())


def unanswered_command(
  grip: np.ndarray, command: np.ndarray, step: float, wait: int
) -> tuple[int, float]:
  """(frame, motion) of the command that the measured gripper answers least; (0, inf) if there is
  none to judge.

  A command counts when it jumps by `step` to at least `step` away from the measured opening, tells
  to open (above 2/3) or to close (below 1/3; in between it may be a force, or its absence) and is
  held for `wait` frames. (An object stops the fingers, but only after they have moved.)
  """
  far = (np.abs(command - grip) >= step) & (np.abs(command - 0.5) > 1 / 6)
  jumped = np.concatenate([[True], np.abs(np.diff(command)) >= step])
  answers = [(0, np.inf)]
  for start in np.flatnonzero(jumped & far).tolist():
    held = command[start : start + wait + 1]
    if len(held) > wait and np.ptp(held) < step:
      answers.append((start, float(np.ptp(grip[start : start + wait + 1]))))
  return min(answers, key=lambda answer: answer[1])
