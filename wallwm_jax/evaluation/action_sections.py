"""What a page shows of open-loop action errors: by group, by kind of event, and what they hang
on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wallwm_jax.evaluation import page, plots
from wallwm_jax.evaluation.base import Interval, bootstrap_interval
from wallwm_jax.evaluation.open_loop import OpenLoopResult

UNITS = {'cm': 100, 'deg': 180 / math.pi, '': 1}  # per m, per rad
ROWS = {  # field of ActionErrors: (what the reader is told, unit shown)
  'mae': ('all channels (MAE)', ''),
  'position': ('position, per axis', 'cm'),
  'position_rmse': ('position distance (RMSE)', 'cm'),
  'dtw': ('position along the best alignment (DTW)', 'cm'),
  'endpoint': ('position at the last step', 'cm'),
  'rotation': ('rotation angle', 'deg'),
  'rotation_rmse': ('rotation angle (RMSE)', 'deg'),
  'endpoint_rotation': ('rotation at the last step', 'deg'),
  'gripper': ('gripper', ''),
  'gripper_f1': ('gripper transitions (F1, 1 is best)', ''),
}
BARS = ('position', 'rotation', 'gripper')  # groups drawn by kind of event


@dataclasses.dataclass(frozen=True, eq=False)
class ActionTrace:
  """One event: predicted, true and held-still actions [K, A] physical, mask [K, A]."""

  caption: str
  predicted: np.ndarray
  true: np.ndarray
  hold: np.ndarray
  mask: np.ndarray


def section(
  title: str,
  result: OpenLoopResult | None,
  traces: Sequence[ActionTrace],
  checks: Mapping[str, Any],
) -> str:
  """checks: what `commands.action_checks` found; {} = nothing."""
  blocks = []
  if result:
    blocks += [_table(result), *_bars(result)]
  blocks += _checks(checks)
  for trace in traces:
    drawn = plots.action_traces(trace.predicted, trace.true, trace.mask, trace.hold)
    blocks.append(f'<h3>“{page.escape(trace.caption)}”</h3>{page.figure(drawn, "")}')
  return page.section(
    title,
    'Open loop: predicted against demonstrated end-effector actions of held-out events, relative '
    'to the pose at the start of the event.',
    *blocks,
  )


def _table(result: OpenLoopResult) -> str:
  """The errors beside both baselines."""
  rows = []
  for key, (label, unit) in ROWS.items():
    values = [UNITS[unit] * scores[key] for scores in (result.policy, result.hold, result.mean)]
    shown = ['–' if math.isnan(v) else f'{v:.3g}' for v in values]
    rows.append((f'{label} [{unit}]' if unit else label, *shown))
  head = (f'error over {result.n} events', 'model', 'hold still', 'predict the mean')
  return page.table(head, rows)


def _bars(result: OpenLoopResult) -> list[str]:
  """Errors by kind of event, drawn and listed, where kinds are known."""
  if not result.by_label:
    return []
  panels = {}
  for key in BARS:
    label, unit = ROWS[key]
    found = {kind: _interval(result, kind, key, UNITS[unit]) for kind in result.by_label}
    known = {kind: interval for kind, interval in found.items() if interval is not None}
    if known:
      panels[f'{label} [{unit}]' if unit else label] = known
  blocks = []
  if panels:
    caption = (
      'Mean error by kind of event, with 95 % intervals bootstrapped over episodes (none where all '
      'events of a kind are of one episode).'
    )
    blocks.append(page.figure(plots.error_bars(panels), caption))
  rows = [(k, n, f'{m:.3g}', f'{h:.3g}') for k, (m, h, n) in result.by_label.items()]
  table = page.table(('kind', 'events', 'MAE', 'hold still'), rows)
  return [*blocks, page.details('By kind of event', table)]


def _interval(result: OpenLoopResult, kind: str, key: str, scale: float) -> Interval | None:
  """Mean of one error over the events of a kind; None where none of them has it."""
  rows = [r for r in result.rows if r.get('label') == kind and math.isfinite(r[f'action_{key}'])]
  if not rows:
    return None
  values = [scale * r[f'action_{key}'] for r in rows]
  return bootstrap_interval(values, [r['episode'] for r in rows])


def _checks(checks: Mapping[str, Any]) -> list[str]:
  blocks, rows = [], []
  if 'image_shuffle_increase' in checks:
    rows.append(('MAE added by images of another event', *_bounds(checks, 'image_shuffle_increase'),
                 checks['image_shuffle_n']))  # fmt: skip
  if 'duration_error' in checks:
    rows.append(('told length of an event, relative error', *_bounds(checks, 'duration_error'),
                 checks['duration_n']))  # fmt: skip
  if rows:
    blocks.append(page.table(('check', 'mean', '95 %', 'events'), rows))
  if curve := checks.get('by_action_steps'):
    steps = {int(count): interval for count, interval in curve.items()}
    drawn = plots.interval_curves({'model': steps}, 'denoising steps of the actions', 'action MAE')
    blocks.append(page.figure(drawn, 'Action error by the number of denoising steps, same noise.'))
  return blocks


def _bounds(checks: Mapping[str, Any], key: str) -> tuple[str, str]:
  low, high = checks[f'{key}_low'], checks[f'{key}_high']
  return f'{checks[key]:.3g}', f'{low:.3g} – {high:.3g}'
