"""Two-way balance: how often each event is drawn, so that neither its (observation, caption)
cluster nor its action cluster is drowned by the common ones.

With n_va events in joint cluster (v, a) of N, the shares P_va are those closest to n_va / N (in
Kullback-Leibler divergence) with margins p(v) ~ n_v^tau_vl and p(a) ~ n_a^tau_act and no event
repeated more than `cap` times its natural frequency:

  P_va = n_va / N * min(x_v y_a, cap)

found by alternately solving for x and for y exactly (iterative proportional fitting, Deming and
Stephan 1940; the bound as in capacity-constrained transport, Benamou et al., arXiv 1412.5154,
sec. 5). Every event of a cell weighs P_va / n_va.

Sources, recovery data and video without actions are blocks: each has a share of its own and is
balanced inside. Act label < 0 means no action; such events are balanced by their vl label alone and
keep their natural share of their block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from wallwm_jax.data.labels import Labels
from wallwm_jax.data.store import EventStore
from wallwm_jax.types import ConfigError, DataError

RECOVERY = 'recovery'  # flag of events that show a recovery
_CONVERGED = 1e-10  # total variation at which a margin counts as met
_ITERATIONS, _PATIENCE = 2000, 25
_STALLED = 0.999  # no better than this, times the error `_PATIENCE` iterations ago: out of reach


@dataclasses.dataclass(frozen=True)
class BalanceSettings:
  """How a split is balanced.

  tau_vl, tau_act: exponent of each margin, 0 every cluster equally often .. 1 natural frequency.
  cap: most repeats of an event relative to its natural frequency in its block, >= 1, inf = none.
    Targets of clusters too small to be repeated that often are lowered to what it allows.
  tolerance: largest total variation between a margin and its target; beyond it the settings
    are refused (1 accepts the best compromise).
  sources: {source: ratio} > 0 of every source, exact; {} = as they come.
  recovery: share of events with the flag 'recovery', 0 < x < 1; None = as they come.

  Raises:
    ConfigError: a value out of range.
  """

  tau_vl: float = 0.4
  tau_act: float = 0.4
  cap: float = 16.0
  tolerance: float = 0.05
  sources: Mapping[str, float] = dataclasses.field(default_factory=dict)
  recovery: float | None = None

  def __post_init__(self):
    for name in ('tau_vl', 'tau_act', 'tolerance'):
      value = getattr(self, name)
      if not 0 <= value <= 1:
        raise ConfigError(f'balance.{name}: expected 0..1, got {value}.')
    if not self.cap >= 1:
      raise ConfigError(
        f'balance.cap: expected at least 1 (inf = none), got {self.cap}: shares could not sum to 1.'
      )
    for source, ratio in self.sources.items():
      if not 0 < ratio < math.inf:
        raise ConfigError(
          f'balance.sources[{source!r}]: expected a ratio > 0, got {ratio}. To leave a source out, '
          'build the split without it.'
        )
    if self.recovery is not None and not 0 < self.recovery < 1:
      raise ConfigError(
        f'balance.recovery: expected a share 0 < x < 1, or None, got {self.recovery}.'
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Balance:
  """The balance of a split: weights float64 [n], sum 1, share of the draws of each event; cells
  int64 [n], dense ids of groups of events that share one weight; metrics: see `balance_metrics`."""

  weights: np.ndarray
  cells: np.ndarray
  metrics: dict[str, Any]


def balance_store(
  store: EventStore, labels: Labels, rows: np.ndarray, settings: BalanceSettings
) -> Balance:
  """The balance of a split.

  Args:
    labels: those of this store; rows: int [n], rows of the event index that make up the split.
  """
  vl, act = labels.vl[rows], labels.act[rows]
  source = store.column('source', 'episodes')[store.column('episode')[rows]]
  flags = store.events['flags'].to_pylist()
  recovery = np.array([RECOVERY in flags[row] for row in rows], bool)
  weights = event_weights(vl, act, settings, source, recovery)
  metrics = balance_metrics(vl, act, weights, settings, source, recovery)
  return Balance(weights, cells(vl, act, source, recovery), metrics)


def two_way(
  vl: np.ndarray,
  act: np.ndarray,
  tau: float | tuple[float, float],
  cap: float,
  *,
  tolerance: float = BalanceSettings.tolerance,
) -> np.ndarray:
  """Weights float64 [n], sum 1, that balance both labels int [n]; arguments as the fields of
  `BalanceSettings`, tau for both margins or one each. Raises as `event_weights`."""
  tau_vl, tau_act = tau if isinstance(tau, tuple) else (tau, tau)
  return event_weights(vl, act, BalanceSettings(tau_vl, tau_act, cap, tolerance))


def event_weights(
  vl: np.ndarray,
  act: np.ndarray,
  settings: BalanceSettings,
  source: np.ndarray | None = None,
  recovery: np.ndarray | None = None,
) -> np.ndarray:
  """Weights float64 [n], sum 1: two-way balance inside every block, blocks in their exact shares.

  Args:
    vl, act: int [n] cluster labels, act < 0 = no action; source: str [n]; recovery: bool [n].

  Raises:
    DataError: labels are empty or differ in length.
    ConfigError: shares of sources or of recovery cannot be had from these events, or a margin
      stays further from its target than settings.tolerance.
  """
  vl, act = _check_labels(vl, act)
  block, share = _blocks(act, settings, source, recovery)
  weights = np.empty(len(vl))
  for b in range(len(share)):
    inside = np.flatnonzero(block == b)
    weights[inside] = share[b] * _balanced(vl[inside], act[inside], settings)
  return weights / weights.sum()


def cells(
  vl: np.ndarray,
  act: np.ndarray,
  source: np.ndarray | None = None,
  recovery: np.ndarray | None = None,
) -> np.ndarray:
  """Dense ids int64 [n] of the distinct (source, recovery, vl, act): events of a cell share one
  weight whatever the settings of `event_weights`."""
  vl, act = _check_labels(vl, act)
  return _codes(*(column for column in (source, recovery, vl, act) if column is not None))[0]


def balance_metrics(
  vl: np.ndarray,
  act: np.ndarray,
  weights: np.ndarray,
  settings: BalanceSettings,
  source: np.ndarray | None = None,
  recovery: np.ndarray | None = None,
  draws: int | None = None,
) -> dict[str, Any]:
  """What weights do to the clusters; JSON-able.

  Args:
    draws: for `unseen`; default n, as many as there are events.

  Returns:
    For 'vl' and 'act' each {clusters: K, effective: exp(entropy), entropy: / log K, max_over_min,
    tv: total variation to the target margin before any cap}; kish: effective sample size / n;
    max_repeat, p99_repeat: n w over the events; unseen: share of events that stay out of `draws`
    draws made without replacement inside each cell.
  """
  vl, act = _check_labels(vl, act)
  weights = np.asarray(weights, np.float64)
  block, share = _blocks(act, settings, source, recovery)
  sides = {'vl': (vl, settings.tau_vl), 'act': (act, settings.tau_act)}
  count = len(weights)
  return {
    **{
      name: _margin_metrics(labels, weights, _target_weights(labels, block, share, tau))
      for name, (labels, tau) in sides.items()
    },
    'kish': float(weights.sum() ** 2 / (weights**2).sum() / count),
    'max_repeat': float(weights.max() * count),
    'p99_repeat': float(np.quantile(weights, 0.99) * count),
    'unseen': float(np.maximum(1 - weights * (draws or count), 0).mean()),
  }


def _check_labels(vl: np.ndarray, act: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  vl, act = np.asarray(vl), np.asarray(act)
  if vl.ndim != 1 or vl.shape != act.shape or not len(vl):
    raise DataError(
      f'cluster labels: expected vl and act of one length n > 0, got {vl.shape} and {act.shape}.'
    )
  return vl, act


def _codes(*columns: np.ndarray) -> tuple[np.ndarray, int]:
  """(dense ids int64 [n] of the distinct rows of columns [n], how many)."""
  codes, size = np.zeros(len(columns[0]), np.int64), 1
  for column in columns:
    values, inverse = np.unique(column, return_inverse=True)
    codes = codes * len(values) + inverse
    size *= len(values)
    if size > len(codes):  # keep ids small, whatever the number of columns
      values, codes = np.unique(codes, return_inverse=True)
      size = len(values)
  values, codes = np.unique(codes, return_inverse=True)
  return codes.astype(np.int64), len(values)


def _blocks(
  act: np.ndarray,
  settings: BalanceSettings,
  source: np.ndarray | None,
  recovery: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
  """(block int64 [n] of each event, share float64 [blocks], sum 1). A block is a source (where
  settings.sources is given) x recovery (where its share is) x whether there are actions."""
  count = len(act)
  names, origin = np.array(['']), np.zeros(count, np.int64)
  ratios = np.ones(1)
  if settings.sources:
    names, origin = np.unique(_required(source, count, 'source'), return_inverse=True)
    ratios = _source_ratios(settings.sources, names)
  rescued, alpha = np.zeros(count, np.int64), np.ones(1)
  if settings.recovery is not None:
    rescued = _required(recovery, count, 'recovery').astype(np.int64)
    alpha = np.array([1 - settings.recovery, settings.recovery])
  kinds = len(alpha)
  coarse = origin * kinds + rescued
  counts = np.bincount(coarse, minlength=len(names) * kinds).reshape(len(names), kinds)
  table = _shares(counts, ratios, alpha, names)
  block, size = _codes(coarse, act >= 0)
  of = np.zeros(size, np.int64)
  of[block] = coarse
  natural = np.bincount(block) / counts.ravel()[of]
  return block, table.ravel()[of] * natural


def _required(values: np.ndarray | None, count: int, name: str) -> np.ndarray:
  if values is None or np.shape(values) != (count,):
    got = 'none' if values is None else f'shape {np.shape(values)}'
    raise DataError(f'{name}: settings ask for shares by it; expected [{count}] values, got {got}.')
  return np.asarray(values)


def _source_ratios(ratios: Mapping[str, float], names: np.ndarray) -> np.ndarray:
  """Shares [S] of the sources of the split, sum 1."""
  found = [str(name) for name in names]
  if set(found) != set(ratios):
    raise ConfigError(
      f'balance.sources: expected a ratio for each of {found}, got {sorted(ratios)}; missing '
      f'{sorted(set(found) - set(ratios))}, not in the split {sorted(set(ratios) - set(found))}.'
    )
  values = np.array([ratios[name] for name in found], np.float64)
  return values / values.sum()


def _shares(
  counts: np.ndarray, ratios: np.ndarray, alpha: np.ndarray, names: np.ndarray
) -> np.ndarray:
  """Shares [S, R] with row sums `ratios` and column sums `alpha`, 0 where counts [S, R] are."""
  row, column = np.nonzero(counts)
  start = np.outer(ratios, alpha)[row, column]
  share, off = start, 1.0
  if counts.any(0).all():
    share, off = _fit(start / start.sum(), row, column, ratios, alpha, math.inf)
  if off > 1e-9:
    able = names[counts[:, -1] > 0].tolist()
    only = names[counts[:, 0] == 0].tolist()
    raise ConfigError(
      f'balance.recovery={alpha[-1]:g} cannot be had: recovery events are in {able or "none"}, '
      f'with shares {dict(zip(names.tolist(), ratios.round(4).tolist()))}, and {only or "none"} '
      'have nothing else. Change the recovery share or balance.sources, or set recovery to None.'
    )
  table = np.zeros(counts.shape)
  table[row, column] = share
  return table


def _balanced(vl: np.ndarray, act: np.ndarray, settings: BalanceSettings) -> np.ndarray:
  """Weights [n], sum 1, of the events of one block."""
  sides = ('vl', 'act')
  codes = [np.unique(labels, return_inverse=True) for labels in (vl, act)]
  (_, row), (columns, column) = codes
  joint, cell = np.unique(row * len(columns) + column, return_inverse=True)
  cell_count = np.bincount(cell)
  cell_row, cell_column = np.divmod(joint, len(columns))
  targets = [
    _targets(np.bincount(code), tau, settings.cap)
    for (_, code), tau in zip(codes, (settings.tau_vl, settings.tau_act))
  ]
  natural = cell_count / len(vl)
  share, _ = _fit(natural, cell_row, cell_column, *targets, settings.cap)
  for side, (values, _), place, target in zip(sides, codes, (cell_row, cell_column), targets):
    got = np.bincount(place, share)
    if (off := np.abs(got - target).sum() / 2) > settings.tolerance:
      worst = int(np.abs(got - target).argmax())
      raise ConfigError(
        f'two-way balance: the {side} margin stays {off:.3g} (total variation) from its target, '
        f'tolerance {settings.tolerance:g}; worst is cluster {values[worst]}: target share '
        f'{target[worst]:.3g}, reached {got[worst]:.3g}. The clusters that occur together do not '
        f'allow both margins: lower data.balance (tau_vl={settings.tau_vl:g}, '
        f'tau_act={settings.tau_act:g}, 1 always works), raise data.balance_cap='
        f'{settings.cap:g}, make fewer clusters, or raise data.balance_tolerance to take the '
        'closest compromise.'
      )
  return (share / cell_count)[cell]


def _targets(counts: np.ndarray, tau: float, cap: float) -> np.ndarray:
  """Shares ~ counts^tau, at most cap times the natural ones; sum 1."""
  natural = counts / counts.sum()
  wanted = natural ** (tau - 1)
  one = np.zeros(len(counts), np.int64)
  return natural * np.minimum(_scale(natural, one, wanted, np.ones(1), cap)[0] * wanted, cap)


def _fit(
  natural: np.ndarray,
  row: np.ndarray,
  column: np.ndarray,
  row_target: np.ndarray,
  column_target: np.ndarray,
  cap: float,
) -> tuple[np.ndarray, float]:
  """(P [cells] = natural * min(x_row y_column, cap), worst total variation of a margin).

  Where both margins cannot be met, the mean of the two limits that fitting alternates between.
  """
  y = np.ones(len(column_target))
  errors: list[float] = []
  for _ in range(_ITERATIONS):
    x = _scale(natural, row, y[column], row_target, cap)
    by_row = natural * np.minimum(x[row] * y[column], cap)
    y = _scale(natural, column, x[row], column_target, cap)
    by_column = natural * np.minimum(x[row] * y[column], cap)
    errors.append(np.abs(np.bincount(row, by_column) - row_target).sum() / 2)
    if errors[-1] < _CONVERGED:
      return by_column, errors[-1]
    if len(errors) > _PATIENCE and errors[-1] > _STALLED * errors[-1 - _PATIENCE]:
      break
  share = (by_row + by_column) / 2
  margins = ((row, row_target), (column, column_target))
  return share, max(np.abs(np.bincount(i, share) - target).sum() / 2 for i, target in margins)


def _scale(
  natural: np.ndarray, group: np.ndarray, other: np.ndarray, target: np.ndarray, cap: float
) -> np.ndarray:
  """The factor f [groups] for which sum over each group of natural * min(f * other, cap) is its
  target.

  Cells found above the cap stay there, as f only grows while more of them are held: at most as many
  rounds as cells of a group. A group whose target is all that its cap allows has every cell at it.
  """
  held = np.zeros(len(natural), bool)
  lowest = np.full(len(target), math.inf)
  np.minimum.at(lowest, group, other)
  full = target >= cap * np.bincount(group, natural) * (1 - 1e-12)
  held[full[group]] = True
  while True:
    free = np.bincount(group, np.where(held, 0, natural * other), len(target))
    rest = target - np.bincount(group[held], natural[held] * cap, len(target))
    factor = np.where(free > 0, rest / np.where(free > 0, free, 1), cap / lowest)
    above = (factor[group] * other > cap) & ~held
    if not above.any():
      return factor
    held |= above


def _margin_metrics(labels: np.ndarray, weights: np.ndarray, target: np.ndarray) -> dict[str, Any]:
  code, _ = _codes(labels)
  margin = np.bincount(code, weights)
  used = margin[margin > 0]
  entropy = float(-(used * np.log(used)).sum())
  return {
    'clusters': len(margin),
    'effective': math.exp(entropy),
    'entropy': entropy / math.log(len(margin)) if len(margin) > 1 else 1.0,
    'max_over_min': float(margin.max() / margin.min()) if margin.min() > 0 else math.inf,
    'tv': float(np.abs(margin - np.bincount(code, target)).sum() / 2),
  }


def _target_weights(
  labels: np.ndarray, block: np.ndarray, share: np.ndarray, tau: float
) -> np.ndarray:
  """Weights [n] whose margin over `labels` is the target: counts^tau inside every block."""
  code, size = _codes(block, labels)
  counts = np.bincount(code)
  of = np.zeros(size, np.int64)
  of[code] = block
  wanted = counts**tau
  mass = share[of] * wanted / np.bincount(of, wanted)[of]
  return (mass / counts)[code]
