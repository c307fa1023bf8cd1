"""What a page shows of predicted video: scores, curves, geometry, films."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wallwm_jax.evaluation import frechet, page, plots
from wallwm_jax.evaluation.video import VideoResult, unit_range

MAX_COLUMNS = 9  # frames of a video strip
GEOMETRY = {  # check of `commands.video_checks.Geometry`: what the reader is told
  'epipolar': 'between views [px]',
  'path': 'from the true path [px]',
  'action_video': 'from where the predicted actions lead [px]',
}


@dataclasses.dataclass(frozen=True, eq=False)
class VideoStrip:
  """One event: predicted and true frames [V, T, H, W, 3] (uint8, or float in 0..1), valid frames
  only."""

  caption: str
  views: tuple[str, ...]
  predicted: np.ndarray
  true: np.ndarray
  fps: float


def section(
  title: str,
  results: Mapping[str, VideoResult],
  strips: Sequence[VideoStrip],
  checks: Mapping[str, Any],
) -> str:
  """checks: what `wallwm eval video` found beside the scores; {} = nothing."""
  blocks = _scores(results) if results else []
  if checks:
    blocks += _geometry(checks) + _captions(checks)
  blocks += [_strip(strip) for strip in strips]
  return page.section(
    title,
    'What the model imagines from one keyframe per camera and a caption, beside what happened. '
    'Copying the last observed frame is the floor to beat; the codec alone is the ceiling.',
    *blocks,
  )


def _scores(results: Mapping[str, VideoResult]) -> list[str]:
  rows = [
    (
      name.replace('_', ' '),
      r.n,
      f'{r.psnr:.2f}',
      f'{r.psnr_end:.2f}',
      f'{r.ssim:.3f}',
      f'{r.ssim_end:.3f}',
      '–' if math.isnan(r.frechet) else f'{r.frechet:.3g}',
    )
    for name, r in results.items()
  ]
  head = ('predictor', 'events', 'PSNR [dB]', 'at the end', 'SSIM', 'at the end', 'Frechet')
  curves = {
    'PSNR [dB]': {name.replace('_', ' '): r.psnr_curve for name, r in results.items()},
    'SSIM': {name.replace('_', ' '): r.ssim_curve for name, r in results.items()},
  }
  return [
    page.table(head, rows),
    page.figure(
      plots.horizon_curves(curves),
      'Mean score by frame of the window. Frechet: squared distance to the true clips on '
      f'features of a fixed random net ({frechet.NAME}, trained on nothing; no FVD).',
    ),
  ]


def _geometry(checks: Mapping[str, Any]) -> list[str]:
  """Where the gripper is found, against calibration, pose and actions: one row per video."""
  found = {key: checks.get('gripper_px', {}).get(key, {}) for key in GEOMETRY}
  names = list(dict.fromkeys(name for values in found.values() for name in values))
  if not names:
    return []
  rows = [
    [name.replace('_', ' '), *(_pixels(found[key].get(name)) for key in GEOMETRY)]
    for name in names
  ]
  note = (
    'The gripper is found by matching a patch of the observed frame. Between views: distance from '
    'the line on which another view says it must lie. From the true path: distance from the '
    'projected recorded position. Last: distance at the end of the event from where the actions '
    "lead. The true frames show the finder's own error (floor), other events the ceiling; a still "
    'image is consistent between views too.'
  )
  head = ('gripper of', *GEOMETRY.values())
  return ['<h3>Geometry</h3>', f'<p class="soft">{note}</p>', page.table(head, rows)]


def _pixels(found: Mapping[str, Any] | None) -> str:
  if not found:
    return '–'
  return f'{found["value"]:.2f} ({found["low"]:.2f} – {found["high"]:.2f})'


def _captions(checks: Mapping[str, Any]) -> list[str]:
  gap = checks.get('caption_gap')
  if not gap:
    return []
  rows = [
    ('PSNR, own caption', f'{gap["psnr_own"]:.2f} dB'),
    ('PSNR, caption of another event', f'{gap["psnr_other"]:.2f} dB'),
    ('lost by the other caption', f'{gap["gap"]:.3f} dB'),
    ('95 %', f'{gap["gap_low"]:.3f} – {gap["gap_high"]:.3f} dB'),
    ('events', gap['n']),
  ]
  note = 'What the caption decides: the same first frame and noise under another caption.'
  return [
    '<h3>Caption</h3>',
    f'<p class="soft">{note}</p>',
    page.table(('prediction error', ''), rows),
  ]


def _strip(strip: VideoStrip) -> str:
  """Rows: each view, predicted under true; columns: time."""
  frames = strip.true.shape[1]
  chosen = np.unique(np.linspace(0, frames - 1, min(MAX_COLUMNS, frames)).round().astype(int))
  times = ''.join(f'<span>{i / strip.fps:.1f} s</span>' for i in chosen)
  rows = [f'<div></div><div class="times">{times}</div>']
  for v, view in enumerate(strip.views):
    for kind, video, last in (('true', strip.true, ''), ('predicted', strip.predicted, ' last')):
      pixels = (255 * unit_range(video[v, chosen])).round().astype(np.uint8)
      label = f'<b>{page.escape(view)}</b><br>{kind}' if kind == 'true' else kind
      film = page.image(page.film_row(pixels), f'{view}, {kind}')
      rows.append(f'<div class="row{last}">{label}</div><div class="{last.strip()}">{film}</div>')
  return f'<h3>“{page.escape(strip.caption)}”</h3><div class="strip">{"".join(rows)}</div>'
