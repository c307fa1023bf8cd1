"""What a page shows of closed-loop attempts in any world: rates, motion, delays, films."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wallwm_jax.evaluation import page, plots
from wallwm_jax.evaluation.base import Interval
from wallwm_jax.evaluation.closed_loop import ClosedLoopResult

CLIP_WIDTH = 288  # least pixels of an animated rollout, all views together
ROWS = 400  # attempts listed on a page; the JSON file has all of them
MOTION = {
  'time_to_success': ('time to success [s]', 'successes'),
  'seam_jump': ('seam jump', 'attempts'),
}
WAITS = {'hold': 'robot holds still', 'run': 'robot runs on'}


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutClip:
  """One closed-loop attempt: executed frames [V, T, H, W, 3] uint8, and what the model predicted of
  them, alike (None = not asked)."""

  caption: str
  frames: np.ndarray
  success: bool
  fps: float
  predicted: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Loop:
  """Everything about attempts but their films; a part that is empty is left out.

  results: {policy: scores}, the policy that matters first; motion: {policy: `Attempts.motion`};
  delays: {'hold' | 'run': {control steps: success}}; reached: {kind: (percent [m], share [m])} of
  `closed_loop.progress_reached`; rows: of `Attempts.rows`.
  """

  results: Mapping[str, ClosedLoopResult] = dataclasses.field(default_factory=dict)
  motion: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  delays: Mapping[str, Mapping[int, Interval]] = dataclasses.field(default_factory=dict)
  reached: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
  rows: Sequence[Mapping[str, Any]] = ()


def section(title: str, loop: Loop, clips: Sequence[RolloutClip]) -> str:
  blocks = []
  if loop.results:
    rates = {
      policy: {kind: success for kind, (success, _) in _kinds(result).items()}
      for policy, result in loop.results.items()
    }
    blocks.append(
      page.figure(plots.success_bars(rates), 'Success by kind, with Wilson 95 % intervals.')
    )
    blocks += _tables(loop.results)
  if table := _motion(loop.motion):
    blocks.append(table)
  if any(len(found) > 1 for found in loop.delays.values()):
    shown = {WAITS[name]: found for name, found in loop.delays.items()}
    caption = (
      'Success by the control steps that the policy needs for an answer (Wilson 95 %). A robot '
      'that runs on carries out the chunk before meanwhile and leaves out the steps that have '
      'passed.'
    )
    blocks += [page.figure(plots.delay_curves(shown), caption), _delays(shown)]
  if loop.reached:
    caption = 'Share of attempts that got at least so far through the events of their task.'
    blocks.append(page.figure(plots.progress_steps(loop.reached), caption))
  if clips:
    compared = any(clip.predicted is not None for clip in clips)
    note = 'Above: what the cameras saw. Below: predicted from the start of each turn.'
    blocks += [
      '<h3>Rollouts</h3>',
      f'<p class="soft">{note}</p>' if compared else '',
      '<div class="clips">',
      *map(_clip, clips),
      '</div>',
    ]
  if loop.rows:
    blocks.append(page.details('Every attempt', _attempts(loop.rows)))
  return page.section(
    title,
    'The policy acts in the environment: success of whole attempts, and task progress 0 to 100.',
    *blocks,
  )


def range_of(interval: Interval, scale: float = 1) -> str:
  return f'{scale * interval.low:.0f} – {scale * interval.high:.0f}'


def _tables(results: Mapping[str, ClosedLoopResult]) -> list[str]:
  """Success, then progress: one row per kind and one of all together, one column per policy."""
  successes: dict[str, list] = {}
  progresses: dict[str, list] = {}
  for result in results.values():
    for kind, (success, progress) in _kinds(result).items():
      successes.setdefault(kind, [kind]).append(_rate(success))
      progresses.setdefault(kind, [kind]).append(f'{progress.value:.0f} ({range_of(progress)})')
  return [
    page.table(('success (95 %) of rollouts', *results), successes.values()),
    page.details('Progress', page.table(('progress (95 %)', *results), progresses.values())),
  ]


def _kinds(result: ClosedLoopResult) -> dict[str, tuple[Interval, Interval]]:
  return result.by_kind | {'overall': (result.success, result.progress)}


def _motion(motion: Mapping[str, Mapping[str, Any]]) -> str:
  """Seam jump and time to success, one row per policy and number; '' where nobody has any."""
  rows = [
    (
      label,
      policy,
      f'{found[key]:.3g}',
      f'{found[f"{key}_low"]:.3g} – {found[f"{key}_high"]:.3g}',
      f'{found[f"{key}_n"]} {unit}',
    )
    for key, (label, unit) in MOTION.items()
    for policy, found in motion.items()
    if key in found
  ]
  return page.table(('motion', 'policy', 'mean', '95 %', 'over'), rows) if rows else ''


def _delays(waits: Mapping[str, Mapping[int, Interval]]) -> str:
  steps = sorted({count for found in waits.values() for count in found})
  rows = [(count, *(_rate(found.get(count)) for found in waits.values())) for count in steps]
  return page.table(('control steps of latency', *waits), rows)


def _rate(success: Interval | None) -> str:
  if success is None:
    return '–'
  return f'{100 * success.value:.0f} % ({range_of(success, 100)}) of {success.n}'


def _attempts(rows: Sequence[Mapping[str, Any]]) -> str:
  head = list(rows[0])
  shown = [[_cell(row[name]) for name in head] for row in rows[:ROWS]]
  more = len(rows) - len(shown)
  note = f'<p class="soft">{more} more are in the JSON file.</p>' if more else ''
  return page.table([name.replace('_', ' ') for name in head], shown) + note


def _cell(value: Any) -> str:
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, float):
    return '–' if math.isnan(value) else f'{value:.3g}'
  return '–' if value is None else str(value)


def _clip(clip: RolloutClip) -> str:
  frames = np.concatenate(list(clip.frames), axis=2)  # views side by side
  if clip.predicted is not None:
    gap = np.full((len(frames), 2, *frames.shape[2:]), 255, np.uint8)
    predicted = np.concatenate(list(clip.predicted), axis=2)
    frames = np.concatenate([frames, gap, predicted], axis=1)
  scale = max(1, math.ceil(CLIP_WIDTH / frames.shape[2]))
  frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
  tag = (
    '<span class="tag good">success</span>'
    if clip.success
    else '<span class="tag bad">failed</span>'
  )
  moving = page.image(page.gif(frames, clip.fps), clip.caption, 'gif')
  return f'<figure>{moving}<figcaption>{tag} {page.escape(clip.caption)}</figcaption></figure>'
