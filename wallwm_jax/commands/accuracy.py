"""What quantisation costs: errors of matrices, of blocks and of actions, and bytes; as JSON and as
a page."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from wallwm_jax.commands.evaluators import Windows, action_predictor
from wallwm_jax.config import ExperimentConfig
from wallwm_jax.evaluation import open_loop, page
from wallwm_jax.evaluation.base import bootstrap_interval, environment
from wallwm_jax.inference.calibrate import feature_errors
from wallwm_jax.inference.quantize import Quantization, sizes
from wallwm_jax.types import DataError, InferenceParams

# Fields of ActionErrors, and their units.
GROUPS = {'mae': '', 'position': 'm', 'rotation': 'rad', 'gripper': '', 'endpoint': 'm'}
_FEATURE_BATCHES = 2  # whose features are compared


def accuracy_report(
  config: ExperimentConfig,
  reference: InferenceParams,
  model: InferenceParams,
  quantization: Quantization,
  windows: Windows,
  *,
  seed: int = 0,
) -> dict[str, Any]:
  """What a quantised model has lost on held-out windows, with the noise of the float one.

  Args:
    reference, model: before and after `quantize`; quantization: what that chose.

  Returns:
    actions: {group: reference and quantised error against the demonstrations, mean over events;
      change, relative, of the second against the first, and low, high (95 %, episodes drawn);
      difference between both predictions}, groups and units as in GROUPS. n: events.
    blocks: relative L2 of block outputs, as `feature_errors`. matrices: a row per matrix and layer.
    bytes: `sizes` before and after.

  Raises:
    DataError: no window.
  """
  predict = functools.partial(action_predictor, config, seed=seed)
  before, after = predict(reference), predict(model)
  rows: dict[str, list] = {'reference': [], 'quantised': [], 'difference': []}
  episodes, first = [], []
  norm, spec = reference.norm, config.model.action_spec
  for batch in windows.batches():
    first += [batch] * (len(first) < _FEATURE_BATCHES)
    true = open_loop.denormalise(batch.actions, norm.action_mean, norm.action_scale)
    old, new = (np.asarray(f(batch), np.float64) for f in (before, after))
    for name, pair in (
      ('reference', (old, true)), ('quantised', (new, true)), ('difference', (new, old))
    ):  # fmt: skip
      rows[name].append(open_loop.action_errors(*pair, batch.action_mask, spec))
    episodes += windows.facts(batch, 'episode')
  if not episodes:
    raise DataError(f'accuracy report: expected windows of split {windows.split!r}, got none.')
  errors = {
    name: {group: np.concatenate([getattr(row, group) for row in found]) for group in GROUPS}
    for name, found in rows.items()
  }
  return {
    'actions': {group: _group(errors, group, np.array(episodes)) for group in GROUPS},
    'n': len(episodes),
    'blocks': feature_errors(reference, model, predict, first),
    'matrices': _matrices(quantization),
    'bytes': {'before': sizes(reference), 'after': sizes(model)},
  }


def _group(errors: Mapping[str, Mapping[str, np.ndarray]], group: str, episodes) -> dict[str, Any]:
  old, new, apart = (errors[name][group] for name in ('reference', 'quantised', 'difference'))
  there = np.isfinite(old) & np.isfinite(new)
  if not there.any():
    return {'reference': None, 'quantised': None, 'change': None, 'difference': None}
  mean = old[there].mean()
  change = bootstrap_interval((new - old)[there], episodes[there])
  relative = {'change': change.value, 'low': change.low, 'high': change.high}
  return {
    'reference': mean,
    'quantised': new[there].mean(),
    'difference': apart[there].mean(),
  } | {name: x / mean if mean else None for name, x in relative.items()}


def _matrices(quantization: Quantization) -> list[dict[str, Any]]:
  return [
    {'path': path, 'layer': layer, 'error': error, 'smoothing': strength, 'outlier': outlier,
     'kept': choice.kept}
    for path, choice in quantization.choices.items()
    for layer, (error, strength, outlier) in enumerate(
      zip(choice.error, choice.strength, choice.outlier, strict=True)
    )
  ]  # fmt: skip


def render(report: Mapping[str, Any], title: str) -> str:
  """The report as a page that is complete in itself."""
  actions, before, after = report['actions'], *(report['bytes'][x] for x in ('before', 'after'))
  cards = [
    page.card('action error (MAE)', _percent(actions['mae']['change']), f'{report["n"]} events'),
    page.card('bytes of the towers', f'{after["towers"] / 1e6:.2f} MB',
              f'before {before["towers"] / 1e6:.2f} MB'),
    page.card('stayed as they are', str(len({m['path'] for m in report['matrices'] if m['kept']})),
              'of the matrices of blocks, in all layers'),
  ]  # fmt: skip
  groups = page.table(
    ('group', 'unit', 'float', 'quantised', 'change', '95 %', 'between predictions'),
    [
      (group, GROUPS[group], *(_number(row[x]) for x in ('reference', 'quantised')),
       _percent(row['change']), f'{_percent(row.get("low"))} to {_percent(row.get("high"))}',
       _number(row['difference']))
      for group, row in actions.items()
    ],
  )  # fmt: skip
  blocks = page.table(
    ('tower', 'block', 'relative L2'),
    [(tower, i, _percent(x, '')) for tower, of in report['blocks'].items()
     for i, x in enumerate(of)],
  )  # fmt: skip
  matrices = page.table(
    ('matrix', 'layer', 'relative L2', 'smoothing', 'largest / median channel', ''),
    [(m['path'], m['layer'], _percent(m['error'], ''), m['smoothing'], _number(m['outlier']),
      'kept' if m['kept'] else '') for m in report['matrices']],
    text=(0,),
  )  # fmt: skip
  sections = {
    'Actions': page.section('Actions', 'Mean absolute error against the demonstrations, mean over '
                            'events; the last column is between both predictions.', groups),
    'Blocks': page.section('Blocks', 'Output of each block as its reader gets it, quantised '
                           'against float, errors of earlier blocks included.', blocks),
    'Matrices': page.section('Matrices', 'Output of each matrix by itself on the calibration '
                             'inputs.', matrices),
  }  # fmt: skip
  footer = 'Written by wallwm. This file is complete in itself and loads nothing from elsewhere.'
  return page.document('wallwm quantisation', f'{title} On {environment()["device"]}.', cards,
                       sections, footer)  # fmt: skip


def _percent(x: float | None, sign: str = '+') -> str:
  return '-' if x is None else f'{100 * x:{sign}.2f} %'


def _number(x: float | None) -> str:
  return '-' if x is None else f'{x:.4g}'
