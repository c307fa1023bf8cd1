"""The HTML page of one evaluation: what `wallwm eval ... --html` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.evaluation import report
from wallwm_jax.evaluation.base import Interval, environment
from wallwm_jax.evaluation.closed_loop import progress_reached
from wallwm_jax.evaluation.loop_sections import Loop
from wallwm_jax.evaluation.report import Card, Report

CURVE_KINDS = 12  # kinds of task whose progress is drawn


def closed_loop_page(
  runs: Sequence, clips: Sequence[report.RolloutClip], config: ExperimentConfig, subtitle: str
) -> Report:
  """The page of attempts in any world.

  Args:
    runs: `attempts.Attempts` on the same suite with one latency and way of waiting each; the first
      is the one that the page is about.
  """
  main, scores = runs[0], [run.score() for run in runs]
  names = [_run_name(run) for run in runs]
  delays: dict[str, dict[int, Interval]] = {}
  for run, score in zip(runs, scores, strict=True):
    # Without latency there is nothing to wait for: that run stands for both ways.
    ways = {run.waiting} if run.delay else {other.waiting for other in runs}
    for way in ways:
      delays.setdefault(way, {})[run.delay] = score.success
  reached = progress_reached(main.rollouts.progress, main.kinds)
  loop = Loop(
    results={names[0]: scores[0]},
    motion={name: run.motion() for name, run in zip(names, runs, strict=True)},
    delays=delays,
    reached=dict(list(reached.items())[:CURVE_KINDS]),
    rows=main.rows(),
  )
  success, progress = scores[0].success, scores[0].progress
  cards = [
    Card('success', f'{100 * success.value:.0f} %', _bounds(success, 100, 'attempts')),
    Card('progress', f'{progress.value:.0f}', _bounds(progress, 1, 'attempts')),
  ]
  motion = main.motion()
  for key, unit in (('time_to_success', ' s'), ('seam_jump', '')):
    if key in motion:
      bounds = f'95 %: {motion[f"{key}_low"]:.3g} to {motion[f"{key}_high"]:.3g}'
      cards.append(Card(key.replace('_', ' '), f'{motion[key]:.3g}{unit}', bounds))
  return _page('Closed loop', subtitle, config, cards, closed_loop=loop, clips=clips)


def open_loop_page(result, checks: Mapping[str, Any], traces, config, subtitle: str) -> Report:
  """The page of action errors: an OpenLoopResult, `action_checks`, a few ActionTraces."""
  low, high = result.interval.low, result.interval.high
  cards = [
    Card('action error (MAE)', f'{result.policy["mae"]:.4f}', f'95 %: {low:.4f} to {high:.4f}'),
    Card('hold still', f'{result.hold["mae"]:.4f}', f'skill {result.skill_hold:.2f}'),
    Card('predict the mean', f'{result.mean["mae"]:.4f}', f'skill {result.skill_mean:.2f}'),
    Card('position at the end', f'{100 * result.policy["endpoint"]:.1f} cm',
         f'hold still {100 * result.hold["endpoint"]:.1f} cm'),
  ]  # fmt: skip
  return _page(
    'Open loop', subtitle, config, cards, open_loop=result, actions=traces, action_checks=checks
  )


def video_page(results, checks: Mapping[str, Any], strips, config, subtitle: str) -> Report:
  """The page of predicted video: VideoResults, what was found beside them, a few VideoStrips."""
  cards = [
    Card(
      name.replace('_', ' '),
      f'{r.psnr:.1f} dB',
      f'SSIM {r.ssim:.3f}, at the end {r.psnr_end:.1f} dB',
    )
    for name, r in results.items()
  ]
  return _page(
    'Predicted video', subtitle, config, cards, video=results, strips=strips, video_checks=checks
  )


def latency_page(measured: Mapping[str, Any], config, subtitle: str) -> Report:
  """The page of latencies; measured: see `latency_sections.section`."""
  cards = [
    Card(name, f'{part.p50_ms:.1f} ms', f'p99 {part.p99_ms:.1f} ms, {part.hz:.1f} Hz')
    for name, part in measured['parts'].items()
    if name in ('whole prediction', 'actions against the cache')
  ]
  if memory := measured.get('peak_memory_mib'):
    cards.append(Card('peak memory', f'{memory:.0f} MiB', measured['peak_memory_of']))
  return _page('Latency', subtitle, config, cards, latency=measured)


def _page(name: str, subtitle: str, config: ExperimentConfig, cards, **parts) -> Report:
  return Report(
    f'{name}: {config.name}',
    subtitle,
    tuple(cards),
    config=dataclasses.asdict(config),
    environment=environment(),
    **parts,
  )


def _run_name(run) -> str:
  if not run.delay:
    return run.source
  doing = 'running on' if run.waiting == 'run' else 'holding'
  return f'{run.source}, {run.delay} steps late, {doing}'


def _bounds(interval: Interval, scale: float, unit: str) -> str:
  low, high = round(scale * interval.low), round(scale * interval.high)
  return f'95 %: {low} to {high}, {interval.n} {unit}'
