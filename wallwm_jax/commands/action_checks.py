"""What `wallwm eval openloop` asks beside the action error: does the policy look, how many
denoising steps does it need, how well is the length of an event known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from wallwm_jax.commands.evaluators import Predict, Windows, action_predictor
from wallwm_jax.data.schema import LEVELS
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import pick_caption
from wallwm_jax.evaluation import alignment, base, open_loop
from wallwm_jax.types import DataError, InferenceParams


def image_sensitivity(windows: Windows, predict: Predict) -> dict:
  """`open_loop.image_sensitivity` of the windows that share a batch with another; {} where none
  does."""
  maes: dict[str, list] = {'plain': [], 'shuffled': []}
  episodes: list = []
  for batch in windows.batches():
    if len(batch.num_frames) > 1:
      shown = {'plain': batch, 'shuffled': open_loop.shuffled_images(batch)}
      for name, seen in shown.items():
        maes[name] += _maes(windows, batch, predict(seen))
      episodes += windows.facts(batch, 'episode')
  known = np.isfinite(maes['plain'])
  if not known.any():
    return {}
  plain, shuffled = (np.array(maes[name])[known] for name in ('plain', 'shuffled'))
  return open_loop.image_sensitivity(plain, shuffled, np.array(episodes)[known])


def denoising_curve(
  windows: Windows, params: InferenceParams, steps: Sequence[int], seed: int = 0
) -> dict[str, base.Interval]:
  """{number of denoising steps of the actions: action MAE over the windows}; same noise for all."""
  curve = {}
  for count in steps:
    inference = dataclasses.replace(windows.config.inference, action_steps=count)
    config = dataclasses.replace(windows.config, inference=inference)
    predict = action_predictor(config, params, seed)
    maes: list = []
    episodes: list = []
    for batch in windows.batches():
      maes += _maes(windows, batch, predict(batch))
      episodes += windows.facts(batch, 'episode')
    known = np.isfinite(maes)
    curve[str(count)] = base.bootstrap_interval(np.array(maes)[known], np.array(episodes)[known])
  return curve


def duration_error(store: EventStore, split: str = 'heldout') -> dict:
  """Relative error of the length that a policy is told in closed loop: the median length of the
  training events with the same caption (of all where there is none).

  Returns:
    duration_error (mean over the events of `split`), with _low and _high by episode, duration_n.

  Raises:
    DataError: no events in `split` or in 'train'.
  """
  length, splits = np.asarray(store.column('length')), np.asarray(store.column('split'))
  levels = {level: store.column(level) for level in LEVELS}
  captions = np.array(
    [pick_caption({k: v[i] for k, v in levels.items()}, 'event') for i in range(len(length))]
  )
  chosen, train = splits == split, splits == 'train'
  if not chosen.any() or not train.any():
    raise DataError(f'duration_error: expected events in {split!r} and in \'train\', got none.')
  medians = {
    name: np.median(length[train & (captions == name)]) for name in set(captions[train].tolist())
  }
  rest = np.median(length[train])
  told = np.array([medians.get(name, rest) for name in captions[chosen].tolist()])
  errors = alignment.duration_error(told, length[chosen])
  found = base.bootstrap_interval(errors, np.asarray(store.column('episode'))[chosen])
  return {
    'duration_error': found.value,
    'duration_error_low': found.low,
    'duration_error_high': found.high,
    'duration_n': len(errors),
  }


def _maes(windows: Windows, batch, predicted) -> list[float]:
  """MAE of each window of a batch; NaN where nothing is supervised."""
  norm = windows.norm
  true = open_loop.denormalise(batch.actions, norm.action_mean, norm.action_scale)
  spec = windows.config.model.action_spec
  mask = np.asarray(batch.action_mask)
  return open_loop.action_errors(predicted, true, mask, spec).mae.tolist()
