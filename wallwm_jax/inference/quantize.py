"""Post-training quantisation of both towers to int8 or FP8, weights alone or inputs as well.

What is quantised are the matrices of the transformer blocks, nearly all of a tower's weights.
Embeddings, time networks, modulation, norms, biases, patch and state projections and heads keep
their precision, as does every matrix whose measured error is above the recipe's tolerance.

`calibrate.calibrate` sees what goes into each matrix when the float model predicts from real
observations; `quantize` chooses smoothing and exceptions by the error of each matrix on that.

The result is an ordinary `InferenceParams` of plain dicts (the form is `models.quantised`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from wallwm_jax.inference.calibrate import TARGET, TOWERS, Calibration, Inputs, relative, targets
from wallwm_jax.models import quantised
from wallwm_jax.types import (
  CheckpointError,
  ConfigError,
  InferenceParams,
  Params,
  path_string,
)


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
  """A recipe.

  dtype: of the weights. activations: quantise inputs too, by their own largest value in each token
  (and block), so that products are of `dtype`. block: input channels that share a scale, None =
  all, so that each output channel of each layer has one and a matrix is one product; smaller blocks
  are more accurate and slower, one product each. strengths: exponents of the
  smoothing that are tried on each layer, 0 = none. tolerance: largest relative L2 error of a
  matrix's output; where one layer is above it, the matrix stays as it is in all layers. keep:
  regular expressions of parameter paths that stay as they are.

  Raises:
    ConfigError: a value outside its range.
  """

  dtype: Literal['int8', 'float8_e4m3fn'] = 'int8'
  activations: bool = True
  block: int | None = None
  strengths: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7)
  tolerance: float = 0.1
  keep: tuple[str, ...] = ()

  def __post_init__(self):
    if self.dtype not in quantised.LARGEST:
      raise ConfigError(f'dtype: expected one of {sorted(quantised.LARGEST)}, got {self.dtype!r}.')
    if self.block is not None and self.block < 1:
      raise ConfigError(f'block: expected channels >= 1, or None for all, got {self.block}.')
    if not self.strengths or not all(0 <= s < 1 for s in self.strengths):
      raise ConfigError(f'strengths: expected numbers in [0, 1), got {self.strengths}.')
    if not self.tolerance > 0:
      raise ConfigError(f'tolerance: expected a number > 0, got {self.tolerance}.')


RECIPES = {
  'int8': QuantizeConfig('int8'),
  'fp8': QuantizeConfig('float8_e4m3fn'),
  'int8-weights': QuantizeConfig('int8', activations=False),
  'fp8-weights': QuantizeConfig('float8_e4m3fn', activations=False),
}


@dataclasses.dataclass(frozen=True)
class Choice:
  """What was done with one (stacked) matrix and why; a value per layer.

  error: relative L2 of its outputs on the calibration inputs, or of its entries where it is never
  called; strength: exponent of the smoothing; outlier: of `Inputs`, None without. kept: it stayed.
  """

  error: tuple[float, ...]
  strength: tuple[float, ...]
  outlier: tuple[float | None, ...]
  kept: bool


@dataclasses.dataclass(frozen=True)
class Quantization:
  """How a model was quantised: the recipe and {path: Choice}. `from_json(to_json())` is it."""

  recipe: QuantizeConfig
  choices: dict[str, Choice]

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> Quantization:
    """Raises CheckpointError where the values are not those of `to_json`."""
    try:
      recipe = QuantizeConfig(**_tuples(values['recipe']))
      choices = {path: Choice(**_tuples(choice)) for path, choice in values['choices'].items()}
    except (KeyError, TypeError, AttributeError) as error:
      raise CheckpointError(
        f'record of the quantisation: expected recipe and choices, got {error!r}. Quantise the run '
        'again with this version of wallwm_jax.'
      ) from None
    return cls(recipe, choices)

  def shapes(self, params: Params) -> Params:
    """ShapeDtypeStructs of the quantised form of float parameters with the shapes `params`."""
    return jax.eval_shape(lambda tree: self._pack(tree, lambda path, kernel: None), params)

  def _pack(self, params: Params, smooth: Callable[[str, Any], Any]) -> Params:
    """`params` with the chosen matrices packed; smooth(path, kernel) or None for ones."""
    recipe = self.recipe

    def pack(key_path, leaf):
      choice = self.choices.get(path_string(key_path))
      if choice is None or choice.kept:
        return leaf
      factors = smooth(path_string(key_path), leaf) if recipe.activations else None
      if recipe.activations and factors is None:
        factors = jnp.ones(leaf.shape[:-1], jnp.float32)
      return quantised.pack(leaf, recipe.dtype, recipe.block, factors)

    return jax.tree_util.tree_map_with_path(pack, params)


def quantize(
  params: InferenceParams, recipe: QuantizeConfig, calibration: Calibration
) -> tuple[InferenceParams, Quantization]:
  """The model with the matrices of its blocks in eight bits, and what was chosen.

  Deterministic. Of recipes that quantise inputs, each layer of each matrix is given the smoothing
  with the least error on its calibration inputs.

  Raises:
    ConfigError: parameters that are quantised already, or calibration of another model.
    CheckpointError: weights that are not finite, naming the first.
  """
  kernels = targets(params)
  _check_calibration(kernels, calibration)
  choices, smooths = {}, {}
  for path, kernel in kernels.items():
    if not bool(jnp.isfinite(kernel).all()):
      raise CheckpointError(
        f'{path}: expected finite weights, got NaN or infinity. The run has diverged: use an '
        'earlier checkpoint.'
      )
    stack = kernel[None] if kernel.ndim == 2 else kernel
    layers = [_choose(w, recipe, inputs) for w, inputs in zip(stack, calibration[path])]
    errors, strengths, smooth = zip(*layers)
    kept = any(re.search(pattern, path) for pattern in recipe.keep)
    smooths[path] = jnp.stack(smooth).reshape(kernel.shape[:-1])
    choices[path] = Choice(
      error=errors, strength=strengths, kept=kept or max(errors) > recipe.tolerance,
      outlier=tuple(None if x is None else x.outlier for x in calibration[path]),
    )  # fmt: skip
  chosen = Quantization(recipe, choices)
  model = chosen._pack(params.model, lambda path, _: smooths[path])
  return dataclasses.replace(params, model=model), chosen


def sizes(params: InferenceParams) -> dict[str, int]:
  """Bytes of the towers: all of them, of the matrices of blocks (with their scales), and of what is
  in eight bits (without)."""
  towers = {name: params.model[name] for name in TOWERS}
  leaves = [(path_string(path), x) for path, x in jax.tree_util.tree_leaves_with_path(towers)]
  matrices = [x for path, x in leaves if re.fullmatch(TARGET + r'(/\w+)?', path)]
  return {
    'towers': sum(x.nbytes for _, x in leaves),
    'matrices': sum(x.nbytes for x in matrices),
    'eight_bits': sum(x.nbytes for x in matrices if str(x.dtype) in quantised.LARGEST),
  }


def check_device(recipe: QuantizeConfig, device: jax.Device) -> None:
  """Refuses products that the device cannot make; warns where eight bits only save memory.

  Raises:
    ConfigError: inputs are quantised as well, and the device has no such products.
  """
  able, why = _multiplies(recipe.dtype, device)
  if able:
    return
  name = f'{device.device_kind} ({device.platform})'
  if recipe.activations:
    other = 'int8' if recipe.dtype != 'int8' and _multiplies('int8', device)[0] else None
    instead = f'{recipe.dtype.split("_")[0].replace("float8", "fp8")}-weights'
    raise ConfigError(
      f'quantised model: {recipe.dtype} x {recipe.dtype} products are not supported on {name}: '
      f'{why}. Quantise with --recipe {instead}{f" or {other}" if other else ""}, or use a device '
      'that has them.'
    )
  warnings.warn(
    f'{name}: {why}. Weights in {recipe.dtype} are turned into the compute dtype in every product: '
    'that saves memory and bandwidth, not arithmetic.',
    stacklevel=2,
  )


# First kinds of each platform, as devices name themselves, that multiply a dtype.
_TPU = {'int8': ('v4', 'v5', 'v6', '7'), 'float8_e4m3fn': ('v6', '7')}
_CUDA = {'int8': (7, 5), 'float8_e4m3fn': (8, 9)}


def _multiplies(dtype: str, device: jax.Device) -> tuple[bool, str]:
  """Whether a device has products of a dtype, and else why not."""
  if device.platform == 'tpu':
    kind = device.device_kind.lower().removeprefix('tpu').strip()
    return kind.startswith(_TPU[dtype]), f'needs TPU {_TPU[dtype][0]} or later'
  if device.platform in ('gpu', 'cuda'):
    least = _CUDA[dtype]
    got = tuple(int(part) for part in str(device.compute_capability).split('.'))
    return got >= least, f'needs compute capability {least[0]}.{least[1]}, this has {got}'
  return dtype == 'int8', 'CPUs have no float8 arithmetic'


def _choose(kernel, recipe: QuantizeConfig, inputs: Inputs | None):
  """(error, strength, smooth [I]) of one layer."""
  ones = jnp.ones(kernel.shape[0], jnp.float32)
  if inputs is None:  # what is never called needs no smoothing
    packed = quantised.Quantised(**quantised.pack(kernel, recipe.dtype, recipe.block))
    return relative([packed.dequantised()], [kernel]), 0.0, ones
  x, kernel = jnp.asarray(inputs.rows), jnp.asarray(kernel, jnp.float32)
  if not recipe.activations:
    error = _output_error(x, kernel, None, dtype=recipe.dtype, block=recipe.block)
    return float(error), 0.0, ones
  best = None
  for strength in recipe.strengths:
    smooth = _smoothing(kernel, inputs.largest, strength)
    error = float(_output_error(x, kernel, smooth, dtype=recipe.dtype, block=recipe.block))
    if best is None or error < best[0]:
      best = error, strength, smooth
  return best


@functools.partial(jax.jit, static_argnames=('dtype', 'block'))
def _output_error(x, kernel, smooth, *, dtype: str, block: int | None):
  """Relative L2 error of x [n, I] times the kernel [I, O], in float32."""
  packed = quantised.Quantised(**quantised.pack(kernel, dtype, block, smooth))
  exact = jnp.matmul(x, kernel, precision='highest')
  error = packed.matmul(x, jnp.float32) - exact
  return jnp.linalg.norm(error) / jnp.maximum(jnp.linalg.norm(exact), jnp.finfo(x.dtype).tiny)


def _smoothing(kernel, largest, strength: float):
  """What inputs are multiplied by, [I]: max|w_i|^(1-a) / max|x_i|^a, 1 where either is 0 or a is 0.

  Source: SmoothQuant (arXiv 2211.10438), eq. 4.
  """
  of_kernel, largest = jnp.max(jnp.abs(kernel), axis=1), jnp.asarray(largest)
  there = (of_kernel > 0) & (largest > 0)
  factors = jnp.where(there, of_kernel, 1.0) ** (1 - strength) / jnp.where(there, largest, 1.0) ** (
    strength
  )
  return jnp.where(there & (strength > 0), factors, 1.0)


def _check_calibration(kernels: Mapping[str, Any], calibration: Calibration) -> None:
  layers = {path: 1 if x.ndim == 2 else len(x) for path, x in kernels.items()}
  for path in sorted(kernels.keys() | calibration.keys()):
    expected, got = layers.get(path), calibration.get(path)
    inputs = kernels[path].shape[-2] if path in kernels else None
    widths = {len(x.largest) for x in got or () if x is not None}
    if expected is None or got is None or len(got) != expected or widths - {inputs}:
      raise ConfigError(
        f'calibration of another model: {path}: expected {expected} layers of {inputs} inputs, got '
        f'{None if got is None else len(got)} of {sorted(widths)}. Calibrate this run.'
      )


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
  return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
