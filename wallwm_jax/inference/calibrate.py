"""What goes into the matrices of a model while it runs: for choosing how to quantise them, and for
telling how far two models are apart, block by block.

Programs run as they are, jitted and with layers stacked; only the matrices that are looked at are
wrapped (`quantised.Probed`). On the default device alone: calls are told apart by their order.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax.models import quantised
from wallwm_jax.types import ConfigError, DataError, InferenceParams, path_string

TOWERS = ('video', 'action')
TARGET = r'(video|action)/blocks/.+/kernel'  # what can be quantised
_ROWS = 32  # of the inputs of a matrix, kept of each call

Predict = Callable[[Any], Any]  # batch -> anything; runs the model on it
MakePredict = Callable[[InferenceParams], Predict]


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What went into a matrix: rows [n, I] evenly from every call, and over all rows the largest
  absolute value of each channel, largest [I]."""

  rows: np.ndarray
  largest: np.ndarray

  @property
  def outlier(self) -> float:
    """Largest channel over the median one; 1 = all alike."""
    return float(self.largest.max() / max(np.median(self.largest), np.finfo(np.float32).tiny))


Calibration = Mapping[str, tuple[Inputs | None, ...]]  # of each layer; None = it was never called


def calibrate(
  params: InferenceParams, make_predict: MakePredict, batches: Iterable[Any]
) -> Calibration:
  """What goes into each matrix that can be quantised while `batches` are predicted.

  Args:
    make_predict: of parameters, a function that runs the model; it is traced with them.

  Raises:
    DataError: no batch, or inputs that are not finite.
    ConfigError: parameters that are quantised already.
  """
  kernels = targets(params)
  seen: dict[int, list] = collections.defaultdict(list)

  def probe(index, x):
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    rows = x[np.linspace(0, len(x) - 1, min(_ROWS, len(x))).round().astype(int)]
    largest = jnp.max(jnp.abs(x), axis=0)
    jax.debug.callback(
      lambda i, *of: seen[int(i)].append(jax.tree.map(np.array, of)), index, rows, largest,
      ordered=True,
    )  # fmt: skip

  probed, numbers = _probed(params, kernels, probe)
  if not _run(make_predict(probed), batches):
    raise DataError('calibration: expected at least one batch of observations, got none.')
  found = {}
  for path, indices in numbers.items():
    layers = [seen.get(index) for index in indices]
    found[path] = tuple(
      None if calls is None else Inputs(
        np.concatenate([rows for rows, _ in calls]), np.max([top for _, top in calls], axis=0)
      )
      for calls in layers
    )  # fmt: skip
    for layer, inputs in enumerate(found[path]):
      if inputs is not None and not np.isfinite(inputs.largest).all():
        raise DataError(
          f'calibration: {path}, layer {layer}: expected finite inputs, got NaN or infinity. The '
          'float model fails on these observations already.'
        )
  return found


def feature_errors(
  reference: InferenceParams,
  model: InferenceParams,
  make_predict: MakePredict,
  batches: Iterable[Any],
) -> dict[str, list[float]]:
  """Relative L2 difference of every block's output between two models that run by themselves.

  Outputs are compared as their readers get them, normalised: the video tower's where the action
  tower's block of the same place in the depth map reads them, the action tower's where the next
  block does, and of the last block where the head does. Differences of earlier blocks and earlier
  denoising steps are part of them.

  Returns:
    {'video': [L], 'action': [L]}.
  """
  batches = list(batches)
  ours, theirs = (_read_features(p, make_predict, batches) for p in (reference, model))
  if ours.keys() != theirs.keys():
    raise ConfigError('feature_errors: expected two models of one config, got other blocks.')
  difference = {name: relative(theirs[name], ours[name]) for name in sorted(ours)}
  return {
    tower: [error for (of, _), error in difference.items() if of == tower] for tower in TOWERS
  }


def targets(params: InferenceParams) -> dict[str, jax.Array]:
  """The matrices that can be quantised, by path."""
  missing = [name for name in TOWERS if name not in params.model]
  if missing:
    raise ConfigError(f'quantisation: expected both towers, got a model without {missing}.')
  leaves = jax.tree_util.tree_leaves_with_path(params.model)
  paths = {path_string(path): leaf for path, leaf in leaves}
  if packed := [path for path in paths if path.endswith('/kernel/q')]:
    raise ConfigError(f'{packed[0]}: is quantised already. Start from the float run.')
  return {path: leaf for path, leaf in paths.items() if re.fullmatch(TARGET, path)}


def relative(got, expected) -> float:
  """L2 norm of the difference of two lists of arrays over that of the second; 0 where both are."""
  pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(got, expected)]
  error = sum(np.sum((x - y) ** 2) for x, y in pairs) ** 0.5
  size = sum(np.sum(y**2) for _, y in pairs) ** 0.5
  return float(error / size) if size else float(error)


def _probed(params: InferenceParams, kernels: Iterable[str], probe):
  """`params` with each of `kernels` probed, and {path: its number in each layer}."""
  numbers: dict[str, list[int]] = {}
  count = 0

  def wrap(node, path):
    nonlocal count
    if path not in kernels:
      if not isinstance(node, dict):
        return node
      return {name: wrap(x, f'{path}/{name}') for name, x in node.items()}
    shape = (node['q'] if isinstance(node, dict) else node).shape[:-2]
    index = np.arange(count, count + int(np.prod(shape))).reshape(shape)
    count += index.size
    numbers[path] = index.reshape(-1).tolist()
    held = quantised.Quantised(**node) if isinstance(node, dict) else node
    return quantised.Probed(held, jnp.asarray(index, jnp.int32), probe)

  model = {name: wrap(tree, name) for name, tree in params.model.items()}
  return dataclasses.replace(params, model=model), numbers


_READERS = {  # matrices whose inputs are the output of a block of the tower, in the order of blocks
  'video': ('action/blocks/video_attn/k/kernel',),
  'action': ('action/blocks/self_attn/q/kernel', 'action/head_in/kernel'),
}


def _read_features(params: InferenceParams, make_predict: MakePredict, batches) -> dict:
  """{(tower, block): arrays in the order in which they were read}."""
  seen: dict[int, list] = collections.defaultdict(list)

  def probe(index, x):
    jax.debug.callback(
      lambda i, x: seen[int(i)].append(np.array(x, np.float32)), index, x, ordered=True
    )

  paths = {path for readers in _READERS.values() for path in readers}
  probed, numbers = _probed(params, paths, probe)
  _run(make_predict(probed), batches)
  video = [seen[i] for i in numbers[_READERS['video'][0]]]
  # The first block of the action tower reads no block.
  action = [seen[i] for path in _READERS['action'] for i in numbers[path]][1:]
  blocks = {'video': video, 'action': action}
  return {(tower, i): x for tower, of in blocks.items() for i, x in enumerate(of)}


def _run(predict: Predict, batches: Iterable[Any]) -> int:
  count = 0
  for batch in batches:
    jax.block_until_ready(predict(batch))
    count += 1
  jax.effects_barrier()
  return count
