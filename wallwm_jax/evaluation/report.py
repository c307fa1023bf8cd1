"""One self-contained HTML page about a run: numbers, curves, predicted video beside the true one,
actions."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wallwm_jax.evaluation import (
  action_sections,
  base,
  latency_sections,
  loop_sections,
  page,
  plots,
  video_sections,
)
from wallwm_jax.evaluation.action_sections import ActionTrace
from wallwm_jax.evaluation.language import PlanScore, TraceScore
from wallwm_jax.evaluation.loop_sections import Loop, RolloutClip, range_of
from wallwm_jax.evaluation.open_loop import OpenLoopResult
from wallwm_jax.evaluation.video import VideoResult
from wallwm_jax.evaluation.video_sections import VideoStrip
from wallwm_jax.types import DataError


@dataclasses.dataclass(frozen=True)
class Card:
  """A headline number; tone 'good' or 'bad' colours it."""

  label: str
  value: str
  note: str = ''
  tone: str = ''


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

  losses: {stage: {metric: (steps, values)}}, see `read_curves`; closed_loop: attempts of one or
  more policies; video: {predictor: result}; video_checks, action_checks: what else was found about
  them, as in the JSON; latency: what `latency.measure_parts` answers; plans: {where: score} and
  traces: {wording: score} of the language side; config: any nested dict; environment: of
  `base.environment`.
  """

  title: str
  subtitle: str = ''
  cards: tuple[Card, ...] = ()
  losses: Mapping[str, Mapping[str, plots.Curve]] = dataclasses.field(default_factory=dict)
  closed_loop: Loop | None = None
  clips: Sequence[RolloutClip] = ()
  video: Mapping[str, VideoResult] = dataclasses.field(default_factory=dict)
  strips: Sequence[VideoStrip] = ()
  video_checks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  open_loop: OpenLoopResult | None = None
  actions: Sequence[ActionTrace] = ()
  action_checks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
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










def _language(title: str, report: Report) -> str:
  blocks = []
  if report.plans:
    head = ('moments', 'plans', 'next event', '95 %', 'time error', 'of the event', 'mean answer')
    rows = [
      (
        where,
        p.n,
        f'{100 * p.top1.value:.1f} %',
        range_of(p.top1, 100),
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
        range_of(t.tokens, 100),
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


def _closed_loop(title: str, report: Report) -> str:
  return loop_sections.section(title, report.closed_loop or Loop(), report.clips)


def _video(title: str, report: Report) -> str:
  return video_sections.section(title, report.video, report.strips, report.video_checks)


def _actions(title: str, report: Report) -> str:
  return action_sections.section(title, report.open_loop, report.actions, report.action_checks)


def _latency(title: str, report: Report) -> str:
  return latency_sections.section(title, report.latency)


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
