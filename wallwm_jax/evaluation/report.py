"""One self-contained HTML page about a run: numbers, curves, predicted video beside the true one,
actions."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wallwm_jax.evaluation import base, frechet, page, plots
from wallwm_jax.evaluation.action_tables import action_tables
from wallwm_jax.evaluation.closed_loop import ClosedLoopResult
from wallwm_jax.evaluation.language import PlanScore, TraceScore
from wallwm_jax.evaluation.open_loop import OpenLoopResult
from wallwm_jax.evaluation.video import VideoResult, unit_range
from wallwm_jax.types import DataError

MAX_COLUMNS = 9  # frames of a video strip
CLIP_WIDTH = 288  # least pixels of an animated rollout, all views together


@dataclasses.dataclass(frozen=True)
class Card:
  """A headline number; tone 'good' or 'bad' colours it."""

  label: str
  value: str
  note: str = ''
  tone: str = ''


@dataclasses.dataclass(frozen=True, eq=False)
class VideoStrip:
  """One event: predicted and true frames [V, T, H, W, 3] (uint8, or float in 0..1), valid frames
  only."""

  caption: str
  views: tuple[str, ...]
  predicted: np.ndarray
  true: np.ndarray
  fps: float


@dataclasses.dataclass(frozen=True, eq=False)
class ActionTrace:
  """One event: predicted, true and held-still actions [K, A] physical, mask [K, A]."""

  caption: str
  predicted: np.ndarray
  true: np.ndarray
  hold: np.ndarray
  mask: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutClip:
  """One closed-loop attempt: executed frames [V, T, H, W, 3] uint8."""

  caption: str
  frames: np.ndarray
  success: bool
  fps: float


@dataclasses.dataclass(frozen=True, eq=False)
class Reasoning:
  """One moment: frames [V, H, W, 3] uint8, the instruction, the reasoning trace it was trained to
  hold, and what the reader says the latents mean."""

  instruction: str
  frames: np.ndarray
  trace: str
  said: str


@dataclasses.dataclass(frozen=True)
class Report:
  """What the page shows; a part that is empty is left out.

  losses: {stage: {metric: (steps, values)}}, see `read_curves`; closed_loop: {policy: result}, the
  policy that matters first; video: {predictor: result}; latency: what `latency.measure_parts`
  answers; plans: {where: score} and traces: {wording: score} of the language side; config: any
  nested dict; environment: of `base.environment`.
  """

  title: str
  subtitle: str = ''
  cards: tuple[Card, ...] = ()
  losses: Mapping[str, Mapping[str, plots.Curve]] = dataclasses.field(default_factory=dict)
  closed_loop: Mapping[str, ClosedLoopResult] = dataclasses.field(default_factory=dict)
  clips: Sequence[RolloutClip] = ()
  video: Mapping[str, VideoResult] = dataclasses.field(default_factory=dict)
  strips: Sequence[VideoStrip] = ()
  open_loop: OpenLoopResult | None = None
  actions: Sequence[ActionTrace] = ()
  latency: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  plans: Mapping[str, PlanScore] = dataclasses.field(default_factory=dict)
  traces: Mapping[str, TraceScore] = dataclasses.field(default_factory=dict)
  reasonings: Sequence[Reasoning] = ()
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_report(path: str | pathlib.Path, report: Report) -> pathlib.Path:
  """Writes the page and returns its path."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(render(report), encoding='utf-8')
  return path


def render(report: Report) -> str:
  """The page as HTML."""
  builders = {
    'Closed loop': (report.closed_loop or report.clips, _closed_loop),
    'Predicted video': (report.video or report.strips, _video),
    'Actions': (report.open_loop or report.actions, _actions),
    'Language': (report.plans or report.traces or report.reasonings, _language),
    'Training': (report.losses, _training),
    'Latency': (report.latency, _latency),
    'Setup': (report.config or report.environment, _setup),
  }
  sections = {name: build(name, report) for name, (shown, build) in builders.items() if shown}
  cards = [page.card(c.label, c.value, c.note, c.tone) for c in report.cards]
  footer = 'Written by wallwm. This file is complete in itself and loads nothing from elsewhere.'
  return page.document(report.title, report.subtitle, cards, sections, footer)


def read_curves(
  path: str | pathlib.Path, names: Sequence[str] | None = None
) -> dict[str, plots.Curve]:
  """{metric: (steps, values)} of a metrics.jsonl file; names None = every metric called loss or
  *_loss.

  A last line cut short by a crash is ignored.

  Raises:
    DataError: no such file, or a broken line before the last.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise DataError(f'{path}: expected the metrics.jsonl of a training run, found no file.')
  lines = path.read_text().splitlines()
  curves: dict[str, list[tuple[float, float]]] = {}
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      if number == len(lines):
        break
      raise DataError(
        f'{path}:{number}: expected one JSON object per line, got {line[:60]!r}.'
      ) from error
    for name, value in record.items():
      wanted = 'loss' in name if names is None else name in names
      if wanted and isinstance(value, (int, float)):
        curves.setdefault(name, []).append((record['step'], value))
  return {name: tuple(np.array(points, np.float64).T) for name, points in curves.items()}


def _closed_loop(title: str, report: Report) -> str:
  blocks = []
  if report.closed_loop:
    rates = {
      policy: {kind: success for kind, (success, _) in _kinds(result).items()}
      for policy, result in report.closed_loop.items()
    }
    blocks.append(
      page.figure(plots.success_bars(rates), 'Success by kind, with Wilson 95 % intervals.')
    )
    blocks += _closed_loop_tables(report.closed_loop)
  if report.clips:
    blocks += ['<h3>Rollouts</h3><div class="clips">', *map(_clip, report.clips), '</div>']
  return page.section(
    title,
    'The policy acts in the environment: success of whole attempts, and task progress 0 to 100.',
    *blocks,
  )


def _closed_loop_tables(results: Mapping[str, ClosedLoopResult]) -> list[str]:
  """Success, then progress: one row per kind and one of all together, one column per policy."""
  successes: dict[str, list] = {}
  progresses: dict[str, list] = {}
  for result in results.values():
    for kind, (success, progress) in _kinds(result).items():
      successes.setdefault(kind, [kind]).append(
        f'{100 * success.value:.0f} % ({_range(success, 100)}) of {success.n}'
      )
      progresses.setdefault(kind, [kind]).append(f'{progress.value:.0f} ({_range(progress)})')
  return [
    page.table(('success (95 %) of rollouts', *results), successes.values()),
    page.details('Progress', page.table(('progress (95 %)', *results), progresses.values())),
  ]


def _kinds(result: ClosedLoopResult) -> dict[str, tuple[base.Interval, base.Interval]]:
  return result.by_kind | {'overall': (result.success, result.progress)}


def _range(interval: base.Interval, scale: float = 1) -> str:
  return f'{scale * interval.low:.0f} – {scale * interval.high:.0f}'


def _clip(clip: RolloutClip) -> str:
  frames = np.concatenate(list(clip.frames), axis=2)  # views side by side
  scale = max(1, math.ceil(CLIP_WIDTH / frames.shape[2]))
  frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
  tag = (
    '<span class="tag good">success</span>'
    if clip.success
    else '<span class="tag bad">failed</span>'
  )
  moving = page.image(page.gif(frames, clip.fps), clip.caption, 'gif')
  return f'<figure>{moving}<figcaption>{tag} {page.escape(clip.caption)}</figcaption></figure>'


def _video(title: str, report: Report) -> str:
  blocks = []
  if report.video:
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
      for name, r in report.video.items()
    ]
    head = ('predictor', 'events', 'PSNR [dB]', 'at the end', 'SSIM', 'at the end', 'Frechet')
    curves = {
      'PSNR [dB]': {name.replace('_', ' '): r.psnr_curve for name, r in report.video.items()},
      'SSIM': {name.replace('_', ' '): r.ssim_curve for name, r in report.video.items()},
    }
    blocks = [
      page.table(head, rows),
      page.figure(
        plots.horizon_curves(curves),
        'Mean score by frame of the window. Frechet: squared distance to the true clips on '
        f'features of a fixed random net ({frechet.NAME}, trained on nothing; no FVD).',
      ),
    ]
  blocks += [_strip(strip) for strip in report.strips]
  return page.section(
    title,
    'What the model imagines from one keyframe per camera and a caption, beside what happened. '
    'Copying the last observed frame is the floor to beat; the codec alone is the ceiling.',
    *blocks,
  )


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


def _actions(title: str, report: Report) -> str:
  blocks = []
  if report.open_loop:
    blocks += action_tables(report.open_loop)
  for trace in report.actions:
    drawn = plots.action_traces(trace.predicted, trace.true, trace.mask, trace.hold)
    blocks.append(f'<h3>“{page.escape(trace.caption)}”</h3>{page.figure(drawn, "")}')
  return page.section(
    title,
    'Open loop: predicted against demonstrated end-effector actions of held-out events, relative '
    'to the pose at the start of the event.',
    *blocks,
  )


def _language(title: str, report: Report) -> str:
  blocks = []
  if report.plans:
    head = ('moments', 'plans', 'next event', '95 %', 'time error', 'of the event', 'mean answer')
    rows = [
      (
        where,
        p.n,
        f'{100 * p.top1.value:.1f} %',
        _range(p.top1, 100),
        f'{p.time_mae.value:.2f} s',
        f'{100 * p.relative.value:.1f} %',
        f'{100 * p.relative_mean:.1f} %',
      )
      for where, p in report.plans.items()
    ]
    blocks.append(page.table(head, rows))
  if report.traces:
    head = ('instructions', 'traces', 'tokens', '95 %', 'whole traces')
    rows = [
      (
        wording,
        t.n,
        f'{100 * t.tokens.value:.1f} %',
        _range(t.tokens, 100),
        f'{100 * t.exact.value:.0f} %',
      )
      for wording, t in report.traces.items()
    ]
    blocks.append(page.table(head, rows))
  for thought in report.reasonings:
    views = page.image(page.film_row(thought.frames), thought.instruction)
    rows = (('true', thought.trace), ('read from the latents', thought.said))
    table = page.table(('reasoning', ''), rows, text=True)
    blocks.append(f'<h3>“{page.escape(thought.instruction)}”</h3>{views}{table}')
  return page.section(
    title,
    'What the VLM plans on held-out events, and how much of the reasoning its latents hold: the '
    'accuracy of each token of the trace given those before it, read by a small language model.',
    *blocks,
  )


def _training(title: str, report: Report) -> str:
  last = [
    (stage, name, f'{int(steps[-1])}', f'{values[0]:.4g}', f'{plots.smooth(values)[-1]:.4g}')
    for stage, curves in report.losses.items()
    for name, (steps, values) in curves.items()
  ]
  return page.section(
    title,
    'Loss of each stage over its optimizer steps: faint as logged, bold smoothed.',
    page.figure(plots.loss_curves(report.losses), ''),
    page.table(('stage', 'curve', 'steps', 'first', 'last (smoothed)'), last),
  )


def _latency(title: str, report: Report) -> str:
  rows = [
    (name, f'{t.p50_ms:.1f}', f'{t.p90_ms:.1f}', f'{t.p99_ms:.1f}', f'{t.first_ms / 1000:.1f}', t.n)
    for name, t in report.latency['parts'].items()
  ]
  head = ('part', 'p50 [ms]', 'p90 [ms]', 'p99 [ms]', 'first call [s]', 'calls')
  return page.section(
    title,
    f'Until the result lies in host memory, on {report.latency["device"]}.',
    page.table(head, rows),
  )


def _setup(title: str, report: Report) -> str:
  blocks = []
  if report.environment:
    blocks.append(page.table(('environment', ''), report.environment.items(), text=True))
  if report.config:
    flat = page.table(('field', 'value'), _flatten(base.to_plain(report.config)), text=True)
    blocks.append(page.details('Configuration', flat))
  return page.section(title, 'Where and with what these numbers were computed.', *blocks)


def _flatten(config: Mapping[str, Any], prefix: str = ''):
  for key, value in config.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value
