"""Tables of open-loop action errors for the report page."""

from __future__ import annotations

import math

from wallwm_jax.evaluation import page
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


def action_tables(result: OpenLoopResult) -> list[str]:
  """HTML of the errors beside both baselines, and of the kinds of event where they are known."""
  rows = []
  for key, (label, unit) in ROWS.items():
    values = [UNITS[unit] * scores[key] for scores in (result.policy, result.hold, result.mean)]
    shown = ['–' if math.isnan(v) else f'{v:.3g}' for v in values]
    rows.append((f'{label} [{unit}]' if unit else label, *shown))
  blocks = [
    page.table((f'error over {result.n} events', 'model', 'hold still', 'predict the mean'), rows)
  ]
  if result.by_label:
    rows = [(k, n, f'{m:.3g}', f'{h:.3g}') for k, (m, h, n) in result.by_label.items()]
    blocks.append(
      page.details('By kind of event', page.table(('kind', 'events', 'MAE', 'hold still'), rows))
    )
  return blocks
