"""From nothing to a report: demonstrations, event store, a small VLM, stages 1 to 5, rollouts,
scores, one page.

Every step leaves its result in the output folder and is skipped when that result is complete, so a
quickstart that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
from rich.console import Console

from wallwm_jax import presets
from wallwm_jax.commands import (
  action_checks,
  attempts,
  evaluators,
  language_scores,
  tabletop_attempts,
  tiny_vlm,
)
from wallwm_jax.commands.clock import Clock
from wallwm_jax.commands.evaluators import Windows
from wallwm_jax.commands.language_scores import Moments
from wallwm_jax.config import LANGUAGE_STAGES, ExperimentConfig
from wallwm_jax.data.build import build_store
from wallwm_jax.data.moments import caption_bank
from wallwm_jax.data.store import EventStore
from wallwm_jax.envs.tabletop import tasks
from wallwm_jax.envs.tabletop.collect import collect
from wallwm_jax.evaluation import base, report, video
from wallwm_jax.evaluation.loop_sections import Loop
from wallwm_jax.text.planning import make_planning_texts
from wallwm_jax.training import loop
from wallwm_jax.training.checkpoints import load_inference

STAGES = {
  'vlm': 'a small VLM and reader, from scratch',
  '1': 'video tower',
  '2': 'action tower, video frozen',
  '3': 'heads of the VLM, VLM frozen',
  '4': 'staircase and projector, VLM and reader frozen',
  '5': 'both towers, chunk windows',
}
TRAINED, UNTRAINED = 'event mode', 'untrained'
UNIFIED, LATENTS = 'unified mode', 'unified mode, latents'
MOMENTS_BATCH = 16  # moments are cheaper to learn from in small batches on two cores
COLLECT_SEED, SUITE_SEED = 0, 1_000_003
MAX_STEPS = 48  # control steps an attempt may take


@dataclasses.dataclass(frozen=True)
class Size:
  """How much of everything.

  episodes: demonstrations, drawn by `mix`; steps: optimizer steps of each of STAGES; attempts:
  rollouts per kind of event; events: held-out events scored open loop; calls: timed calls per
  latency.
  """

  episodes: int
  mix: str
  steps: tuple[int, ...]
  attempts: int
  events: int
  calls: int


SIZES = {
  'full': Size(900, 'single', steps=(240, 400, 500, 80, 120, 60), attempts=20, events=96, calls=30),
  'ci': Size(64, 'single', steps=(4, 20, 20, 4, 4, 10), attempts=4, events=16, calls=5),
}


def run(size: str, out: str | pathlib.Path) -> dict:
  """The whole tour at a size of SIZES; returns what it writes to `out`/summary.json.

  Raises:
    WallWMError: whatever a step refuses; what earlier steps produced stays.
  """
  plan, out, console = SIZES[size], pathlib.Path(out), Console()
  clock = Clock(console)
  out.mkdir(parents=True, exist_ok=True)
  jax.config.update('jax_compilation_cache_dir', str((out / 'jax_cache').absolute()))

  clock.start('collecting demonstrations in the tabletop')
  store = _demonstrations(out / 'store', plan)
  runs, losses = {}, {}
  previous = ''
  for name, steps in zip(STAGES, plan.steps, strict=True):
    clock.start(f'training stage {name}: {STAGES[name]}')
    config = _stage_config(name, steps, previous, store, out)
    if name == 'vlm':
      runs[name] = tiny_vlm.make(config, out / 'stage_vlm')
    else:
      runs[name] = loop.train(config, out / f'stage{name}')
      previous = str(runs[name].workdir)
    losses[f'stage {name}: {STAGES[name]}'] = report.read_curves(
      runs[name].workdir / 'metrics.jsonl'
    )

  clock.start('acting in the tabletop')
  bank = caption_bank(store)
  event, thinking = load_inference(out / 'stage2'), load_inference(out / 'stage4', captions=bank)
  chunk = load_inference(out / 'stage5', captions=bank)
  acted, clips = _rollouts(plan, event, chunk, store, bank)
  results = {name: done.score() for name, done in acted.items()}
  motion = {name: done.motion() for name, done in acted.items()}
  clock.start('scoring held-out events')
  actions = evaluators.evaluate_actions(*event, store, limit=plan.events)
  videos = evaluators.evaluate_video(*event, store, limit=plan.events)
  windows = Windows(event[0], store, event[1].norm, limit=plan.events)
  checks = action_checks.image_sensitivity(windows, evaluators.action_predictor(*event))
  checks |= action_checks.duration_error(store)
  few = dataclasses.replace(windows, limit=4)
  strips, traces = evaluators.video_strips(few, event[1]), evaluators.action_traces(few, event[1])
  latency = evaluators.measure_latency(*event, calls=plan.calls)
  planned, told, reasonings = _language(plan, thinking, store)

  clock.start('writing the report')
  summary = {
    'size': size,
    'wall_s': clock.total(),
    'success_event': results[TRAINED].success.value,
    'success_untrained': results[UNTRAINED].success.value,
    'success_unified': results[UNIFIED].success.value,
    'success_latents': results[LATENTS].success.value,
    'next_event_top1': planned['event starts'].top1.value,
    'time_mae_relative': planned['event starts'].relative.value,
    'trace_token_accuracy': told['training wordings'].tokens.value,
    'psnr_model': videos['model'].psnr_end,
    'psnr_copy_last': videos['copy_last'].psnr_end,
    'action_mae': actions.policy['mae'],
    'action_mae_hold': actions.hold['mae'],
    'action_mae_mean': actions.mean['mae'],
    'stages': {
      name: {'steps': result.step, 'workdir': result.workdir} for name, result in runs.items()
    },
    'seconds': clock.parts(),
    'closed_loop': {name: result.to_json() | motion[name] for name, result in results.items()},
    'video': video.to_json(videos),
    'open_loop': actions.to_json() | checks,
    'plans': {name: score.to_json() for name, score in planned.items()},
    'traces': {name: score.to_json() for name, score in told.items()},
    'latency': latency,
    'environment': base.environment(),
    'report': out / 'report.html',
  }
  page = report.Report(
    title='wallwm quickstart',
    subtitle='A small event-grounded world action model: trained on scripted demonstrations of '
    'the embedded tabletop, then asked to imagine and to act.',
    cards=_cards(summary),
    losses=losses,
    closed_loop=Loop(results, motion),
    clips=clips,
    video=videos,
    strips=strips,
    open_loop=actions,
    actions=traces,
    action_checks=checks,
    latency=latency,
    plans=planned,
    traces=told,
    reasonings=reasonings,
    config=dataclasses.asdict(thinking[0]),
    environment=base.environment(),
  )
  report.write_report(out / 'report.html', page)
  base.write_json(out / 'summary.json', summary)
  for card in page.cards:
    console.print(f'{card.label:>28}  [bold]{card.value}[/bold]  {card.note}')
  console.print(f'\nreport: {out / "report.html"}\nsummary: {out / "summary.json"}')
  return summary


def _demonstrations(path: pathlib.Path, plan: Size) -> EventStore:
  if not (path / 'manifest.json').exists():
    episodes = collect(plan.episodes, COLLECT_SEED, mix=plan.mix)
    build_store(episodes, path, total=plan.episodes)
  return EventStore(path)


def _stage_config(
  name: str, steps: int, source: str, store: EventStore, out: pathlib.Path
) -> ExperimentConfig:
  config = presets.tabletop_language(str((out / 'weights').absolute()))
  config = presets.stage(config, name, steps=steps, init_from=source)
  batch = MOMENTS_BATCH if name in LANGUAGE_STAGES else config.data.batch_size
  data = dataclasses.replace(config.data, store=str(store.path), batch_size=batch)
  return dataclasses.replace(config, data=data)


def _language(plan: Size, thinking, store: EventStore):
  """Scores of plans and traces on held-out events, and a few of them in words."""
  seen = Moments(*thinking, store, limit=plan.events)
  at = {'event starts': 'start', 'inside events': 'random'}
  planned = {
    name: language_scores.evaluate_plans(dataclasses.replace(seen, where=where))
    for name, where in at.items()
  }
  wordings = {'training wordings': 'train', 'held-out wordings': 'heldout'}
  told = {
    name: language_scores.evaluate_traces(dataclasses.replace(seen, phrasing=phrasing))
    for name, phrasing in wordings.items()
  }
  few = dataclasses.replace(seen, limit=4)
  return planned, told, language_scores.reasonings(few)


def _rollouts(plan: Size, event, chunk, store: EventStore, bank):
  """Attempts of the trained, untrained and unified policies on the same scenes (with latents: on a
  part of them), and a few filmed attempts.
  """
  suite = tasks.task_suite(jax.random.key(SUITE_SEED), tasks.SINGLE_KINDS, plan.attempts)
  captions = attempts.caption_table(event[0], store, tasks.CAPTIONS)

  def act(policy):
    return tabletop_attempts.attempt(*policy, suite, captions, max_steps=MAX_STEPS)

  runs = {
    TRAINED: act(event),
    UNTRAINED: act((event[0], attempts.untrained(*event))),
    UNIFIED: act(chunk),
  }
  few = jax.tree.map(lambda x: x[:: plan.attempts], suite)
  some = jax.tree.map(lambda x: x[::4], suite)
  planning = attempts.planning_table(make_planning_texts(chunk[0]), bank, tasks.CAPTIONS)
  runs[LATENTS] = tabletop_attempts.attempt(
    *chunk, some, captions, max_steps=MAX_STEPS, source='staircase', planning=planning
  )
  filmed = tabletop_attempts.attempt(*event, few, captions, max_steps=MAX_STEPS, record=True)
  return runs, attempts.clips(filmed, *event, captions)


def _cards(summary: dict) -> tuple[report.Card, ...]:
  trained, untrained = (summary['closed_loop'][name] for name in (TRAINED, UNTRAINED))
  low, high = (round(100 * trained[f'success_{end}']) for end in ('low', 'high'))
  interval = f'95 %: {low} to {high}, {trained["n"]} attempts'
  gain = summary['psnr_model'] - summary['psnr_copy_last']
  skill = summary['action_mae'] < min(summary['action_mae_hold'], summary['action_mae_mean'])
  return (
    report.Card(
      'event-mode success',
      f'{100 * trained["success"]:.0f} %',
      interval,
      'good'
      if trained['success'] >= 5 * untrained['success'] and trained['success'] >= 0.5
      else 'bad',
    ),
    report.Card('untrained', f'{100 * untrained["success"]:.0f} %', 'same scenes and noise'),
    report.Card(
      'unified-mode success', f'{100 * summary["success_unified"]:.0f} %', 'fixed chunks, stage 5'
    ),
    report.Card(
      'next event named',
      f'{100 * summary["next_event_top1"]:.0f} %',
      f'remaining time within {100 * summary["time_mae_relative"]:.0f} % of the event',
    ),
    report.Card(
      'reasoning in the latents',
      f'{100 * summary["trace_token_accuracy"]:.0f} %',
      'tokens of the trace reconstructed',
    ),
    report.Card(
      'PSNR at event end',
      f'{summary["psnr_model"]:.1f} dB',
      f'copy last frame: {summary["psnr_copy_last"]:.1f} dB',
      'good' if gain > 0 else 'bad',
    ),
    report.Card(
      'action error',
      f'{summary["action_mae"]:.4f}',
      f'hold still {summary["action_mae_hold"]:.4f}, mean {summary["action_mae_mean"]:.4f}',
      'good' if skill else 'bad',
    ),
    report.Card(
      'wall time',
      f'{summary["wall_s"] / 60:.1f} min',
      f'{summary["environment"]["cpus"]} CPU cores',
    ),
  )
