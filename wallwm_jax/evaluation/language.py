"""Scores of the language side: which event the VLM names, when it says the event ends, and how much
of the reasoning trace the latents hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from wallwm_jax.evaluation.base import Interval, bootstrap_interval, wilson_interval
from wallwm_jax.types import DataError


@dataclasses.dataclass(frozen=True)
class PlanScore:
  """Plans at n moments of held-out events.

  top1: the caption of the running event was named. time_mae: s. relative: |error| / length of the
  event, mean; relative_mean: the same of always answering the mean of its kind. by_kind: {kind:
  (top1, relative)}.
  """

  n: int
  top1: Interval
  time_mae: Interval
  relative: Interval
  relative_mean: float
  by_kind: dict[str, tuple[Interval, Interval]]

  def to_json(self) -> dict:
    """Flat keys for scripts, and 'kinds'."""
    flat = {
      'n': self.n,
      'top1': self.top1.value,
      'top1_low': self.top1.low,
      'top1_high': self.top1.high,
      'time_mae_s': self.time_mae.value,
      'time_mae_relative': self.relative.value,
      'time_mae_relative_low': self.relative.low,
      'time_mae_relative_high': self.relative.high,
      'time_mae_relative_of_mean': self.relative_mean,
    }
    kinds = {
      kind: {'n': top1.n, 'top1': top1.value, 'time_mae_relative': relative.value}
      for kind, (top1, relative) in self.by_kind.items()
    }
    return flat | {'kinds': kinds}


def score_plans(
  named, truth, seconds, remaining, duration, kinds: Sequence[str], groups: Sequence
) -> PlanScore:
  """Scores n plans.

  Args:
    named, truth: [n] rows of the caption bank. seconds: [n] predicted, remaining: [n] true time to
      the end of the event; duration: [n] of the whole event, s, > 0.
    kinds: [n] kinds of event. groups: [n] what was drawn together (episodes), for the intervals.

  Raises:
    DataError: nothing to score, or arrays of different lengths.
  """
  named, truth = np.asarray(named), np.asarray(truth)
  seconds, remaining, duration = (
    np.asarray(x, np.float64) for x in (seconds, remaining, duration)
  )
  lengths = {len(x) for x in (named, truth, seconds, remaining, duration, kinds, groups)}
  if len(lengths) != 1 or not len(named):
    raise DataError(f'score_plans: expected n >= 1 of everything, got lengths {sorted(lengths)}.')
  kinds, groups = np.asarray(kinds), np.asarray(groups)
  hits, error = named == truth, np.abs(seconds - remaining)
  relative = error / duration

  def score(chosen):
    top1 = wilson_interval(int(hits[chosen].sum()), int(chosen.sum()))
    return top1, bootstrap_interval(relative[chosen], groups[chosen])

  by_kind = {kind: score(kinds == kind) for kind in dict.fromkeys(kinds.tolist())}
  usual = np.zeros_like(remaining)
  for kind in by_kind:
    usual[kinds == kind] = remaining[kinds == kind].mean()
  everything = np.ones(len(named), bool)
  top1, overall = score(everything)
  baseline = float(np.mean(np.abs(usual - remaining) / duration))
  mae = bootstrap_interval(error, groups)
  return PlanScore(len(named), top1, mae, overall, baseline, by_kind)


@dataclasses.dataclass(frozen=True)
class TraceScore:
  """Reconstruction of n reasoning traces from their latents, each token given those before it.

  tokens: accuracy over all tokens; exact: traces without a wrong token.
  """

  n: int
  tokens: Interval
  exact: Interval

  def to_json(self) -> dict:
    return {
      'n': self.n,
      'token_accuracy': self.tokens.value,
      'token_accuracy_low': self.tokens.low,
      'token_accuracy_high': self.tokens.high,
      'exact': self.exact.value,
    }


def score_traces(predicted, truth, mask) -> TraceScore:
  """Scores n traces: predicted, truth [n, M] token ids, mask [n, M] of the real ones.

  Raises:
    DataError: no traces, or arrays that do not fit together.
  """
  predicted, truth, mask = np.asarray(predicted), np.asarray(truth), np.asarray(mask, bool)
  if predicted.shape != truth.shape or mask.shape != truth.shape or not mask.any():
    raise DataError(
      f'score_traces: expected ids and mask [n, M] with real tokens, got {predicted.shape}, '
      f'{truth.shape}, {mask.shape}.'
    )
  hits = (predicted == truth) & mask
  trace = np.broadcast_to(np.arange(len(mask))[:, None], mask.shape)
  wrong = (~hits & mask).any(1)
  tokens = bootstrap_interval(hits[mask].astype(float), trace[mask])
  return TraceScore(len(mask), tokens, wilson_interval(int((~wrong).sum()), len(mask)))
