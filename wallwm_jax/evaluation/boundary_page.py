"""Proposed event boundaries beside the true ones: F1 by tolerance, as JSON and as a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from wallwm_jax.evaluation import page, plots
from wallwm_jax.evaluation.boundaries import (
  BoundaryScore,
  mean_f1,
  score_by_seconds,
  score_by_share,
  uniform_boundaries,
)

SHOWN = 8  # episodes on the timeline


@dataclasses.dataclass(frozen=True, eq=False)
class Segmented:
  """One episode: boundaries in frames, how long it is and its frames per second."""

  name: str
  proposed: Sequence[int]
  true: Sequence[int]
  num_frames: int
  fps: float


Curves = dict[str, dict[str, dict[float, BoundaryScore]]]  # {unit: {'proposed' | 'chance': scores}}


def boundary_curves(episodes: Sequence[Segmented]) -> Curves:
  """Scores of the proposals and of as many evenly spaced boundaries as there are true ones, at
  tolerances in 'seconds' and in 'share' of the episode."""

  def both(score, unit: str) -> dict:
    chance = [uniform_boundaries(e.num_frames, len(e.true)) for e in episodes]
    cases = {'proposed': [e.proposed for e in episodes], 'chance': chance}
    return {
      name: score([(cut, e.true, getattr(e, unit)) for cut, e in zip(cuts, episodes, strict=True)])
      for name, cuts in cases.items()
    }

  return {'seconds': both(score_by_seconds, 'fps'), 'share': both(score_by_share, 'num_frames')}


def to_json(curves: Curves) -> dict:
  """{unit: {'proposed' | 'chance': {'f1': {tolerance: F1}, 'mean_f1'}}}."""
  return {
    unit: {
      name: {'f1': {str(x): score.f1 for x, score in scores.items()}, 'mean_f1': mean_f1(scores)}
      for name, scores in found.items()
    }
    for unit, found in curves.items()
  }


def render(episodes: Sequence[Segmented], title: str) -> str:
  """The page: cards, F1 curves, timelines of a few episodes."""
  curves = boundary_curves(episodes)
  cards = [
    page.card(
      f'mean F1 by {unit}',
      f'{mean_f1(found["proposed"]):.3f}',
      f'evenly spaced: {mean_f1(found["chance"]):.3f}',
    )
    for unit, found in curves.items()
  ]
  panels = {
    f'F1 by tolerance ({"s" if unit == "seconds" else "share of the episode"})': {
      name: {x: score.f1 for x, score in scores.items()} for name, scores in found.items()
    }
    for unit, found in curves.items()
  }
  spread = np.linspace(0, len(episodes) - 1, min(SHOWN, len(episodes))).astype(int)
  chosen = [episodes[i] for i in spread]
  shown = {
    e.name: {'true': np.divide(e.true, e.fps), 'proposed': np.divide(e.proposed, e.fps)}
    for e in chosen
  }
  lengths = [e.num_frames / e.fps for e in chosen]
  sections = {
    'Scores': page.section(
      'Scores',
      f'Boundaries of {len(episodes)} episodes, matched one to one within a tolerance.',
      page.figure(plots.tolerance_curves(panels), 'Evenly spaced guesses are the chance line.'),
    ),
    'Timelines': page.section(
      'Timelines',
      'Events of a few episodes as bars, cut where the boundaries are.',
      page.figure(plots.boundary_timeline(shown, lengths), 'Above: true. Below: proposed.'),
    ),
  }
  footer = 'Written by wallwm. This file is complete in itself and loads nothing from elsewhere.'
  return page.document(title, 'Event boundaries against the truth.', cards, sections, footer)
