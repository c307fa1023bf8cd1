"""Two evaluations of the same events or attempts, row against row.

Both sides see the same scenes or windows, so every number is a paired difference: its interval is
bootstrapped over episodes, its p-value comes from flipping the signs of whole episodes, and that
of successes from McNemar's exact test. p-values are not corrected for the number of metrics.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wallwm_jax.evaluation import page
from wallwm_jax.evaluation.base import Interval, bootstrap_interval
from wallwm_jax.evaluation.closed_loop import mcnemar
from wallwm_jax.types import DataError

KEYS = {'openloop': 'uid', 'closedloop': 'attempt'}  # what names a row in each kind of evaluation
# Of a row, not scores.
FACTS = ('uid', 'attempt', 'episode', 'label', 'kind', 'instruction', 'seed', 'reached')
EXACT = 12  # episodes up to which every flip of signs is tried


@dataclasses.dataclass(frozen=True)
class Difference:
  """One metric over the n rows that both sides have: means, and second - first with 95 % bounds.

  method: 'mcnemar' or 'sign flips'; dropped: rows in which a side has no value.
  """

  first: float
  second: float
  change: Interval
  p: float
  n: int
  dropped: int
  method: str


def sign_flip_test(differences, groups, *, resamples: int = 10_000, seed: int = 0) -> float:
  """Two-sided p-value that paired differences are as likely to be positive as negative.

  All flips of the signs of whole groups are tried where there are at most EXACT groups, else
  `resamples` random ones; the observed one counts as one of them.

  Args:
    differences: [n]; groups: [n] labels of what stays together (episodes).

  Raises:
    DataError: no differences, or a different number of groups.
  """
  differences, groups = np.asarray(differences, np.float64), np.asarray(groups)
  if differences.ndim != 1 or not len(differences) or groups.shape != differences.shape:
    raise DataError(
      f'sign_flip_test: expected differences [n], n >= 1, and groups [n], got '
      f'{differences.shape} and {groups.shape}.'
    )
  sums = np.bincount(np.unique(groups, return_inverse=True)[1], differences)
  exact = len(sums) <= EXACT
  if exact:
    signs = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
  else:
    signs = np.random.default_rng(seed).choice((-1, 1), (resamples, len(sums)))
  # Sums that differ by rounding only are equal.
  extreme = np.abs(signs @ sums) >= np.abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
  return float(extreme.mean() if exact else (extreme.sum() + 1) / (resamples + 1))


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Difference]:
  """Differences of every metric of two evaluation files, as `wallwm eval ... --json` writes them.

  Raises:
    DataError: files without rows, of another suite (kind, tasks, seed, number of episodes, split),
      or with other events or attempts.
  """
  left, right = check_comparable(first, second)
  shared = [name for name in left[0] if name in right[0] and name not in FACTS]
  by_event = first['suite']['kind'] == 'openloop'
  groups = np.array([row['episode'] if by_event else i for i, row in enumerate(left)])
  return {name: _difference(name, left, right, groups) for name in shared}


def check_comparable(
  first: Mapping[str, Any], second: Mapping[str, Any]
) -> tuple[list[dict], list[dict]]:
  """The rows of both files in one order; DataError where they were not asked the same."""
  for side, scores in (('first', first), ('second', second)):
    if not isinstance(scores.get('suite'), Mapping) or not scores.get('rows'):
      raise DataError(
        f'compare: expected "suite" and "rows" in the {side} file. Write it with --json of '
        '`wallwm eval openloop` or `closedloop`.'
      )
  for name in sorted({*first['suite'], *second['suite']} - {'store'}):
    a, b = (scores['suite'].get(name) for scores in (first, second))
    if a != b:
      raise DataError(
        f'compare: expected one suite, got {name} = {a!r} in the first file and {b!r} in the '
        f'second. Evaluate both with the same {name}.'
      )
  kind = first['suite'].get('kind')
  if kind not in KEYS:
    raise DataError(f'compare: expected a suite of kind {" or ".join(KEYS)}, got {kind!r}.')
  rows = [_by_key(scores['rows'], KEYS[kind]) for scores in (first, second)]
  if missing := set(rows[0]) ^ set(rows[1]):
    raise DataError(
      f'compare: expected the same {KEYS[kind]}s in both files, got {len(rows[0])} and '
      f'{len(rows[1])} with {len(missing)} in one only, such as {min(missing)}. Evaluate both on '
      'the same store, with the same number of episodes.'
    )
  for key in rows[0]:
    for name in ('kind', 'instruction', 'label'):
      a, b = (side[key].get(name) for side in rows)
      if a != b:
        raise DataError(f'compare: {KEYS[kind]} {key}: {name} is {a!r} in the first file, {b!r} in '
                        'the second. The suites were not drawn alike.')  # fmt: skip
  return list(rows[0].values()), [rows[1][key] for key in rows[0]]


def to_json(differences: Mapping[str, Difference]) -> dict:
  """{metric: {first, second, difference, low, high, p, n, dropped, method}}."""
  return {
    name: {
      'first': d.first,
      'second': d.second,
      'difference': d.change.value,
      'low': d.change.low,
      'high': d.change.high,
      'p': d.p,
      'n': d.n,
      'dropped': d.dropped,
      'method': d.method,
    }
    for name, d in differences.items()
  }


def render(
  differences: Mapping[str, Difference], names: tuple[str, str], suite: Mapping[str, Any]
) -> str:
  """The comparison as one self-contained HTML page; names: how the two sides are called."""
  head = ('metric', *('first', 'second'), 'second - first', '95 %', 'p', 'rows', 'test')
  rows = [
    (
      name.replace('_', ' '),
      f'{d.first:.4g}',
      f'{d.second:.4g}',
      f'{d.change.value:+.4g}',
      f'{d.change.low:+.3g} to {d.change.high:+.3g}',
      f'{d.p:.3g}',
      f'{d.n} of {d.n + d.dropped}',
      d.method,
    )
    for name, d in differences.items()
  ]
  text = (
    'Means over the rows that both sides have, and paired differences with intervals bootstrapped '
    'over episodes. p-values are two-sided and not corrected for the number of metrics.'
  )
  asked = page.table(('asked', ''), [('first', names[0]), ('second', names[1]), *suite.items()],
                     text=True)  # fmt: skip
  sections = {
    'Differences': page.section('Differences', text, page.table(head, rows)),
    'Suite': page.section('Suite', 'What both sides were asked.', asked),
  }
  cards = [
    page.card(name.replace('_', ' '), f'{d.change.value:+.3g}', f'p = {d.p:.2g}, {d.n} rows')
    for name, d in differences.items()
    if name in ('success', 'progress', 'action_mae', 'action_dtw')
  ]
  footer = 'Written by wallwm. This file is complete in itself and loads nothing from elsewhere.'
  subtitle = f'{names[1]} against {names[0]}'
  return page.document('wallwm comparison', subtitle, cards, sections, footer)


def _by_key(rows: Sequence[Mapping[str, Any]], key: str) -> dict:
  found = {row.get(key): dict(row) for row in rows}
  if len(found) != len(rows) or None in found:
    raise DataError(f'compare: expected a different {key} in every row, got {len(found)} of '
                    f'{len(rows)}.')  # fmt: skip
  return found


def _difference(name: str, left: list[dict], right: list[dict], groups: np.ndarray) -> Difference:
  # A missing value (null) becomes NaN here.
  a, b = (np.array([row.get(name) for row in rows], np.float64) for rows in (left, right))
  both = np.isfinite(a) & np.isfinite(b)
  dropped, method = int((~both).sum()), 'mcnemar' if name == 'success' else 'sign flips'
  if not both.any():
    nan = float('nan')
    return Difference(nan, nan, Interval(nan, nan, nan, 0), nan, 0, dropped, method)
  a, b, groups = a[both], b[both], groups[both]
  p = mcnemar(a, b) if name == 'success' else sign_flip_test(b - a, groups)
  change = bootstrap_interval(b - a, groups)
  return Difference(float(a.mean()), float(b.mean()), change, p, len(a), dropped, method)
