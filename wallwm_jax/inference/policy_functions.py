"""Event and unified mode as functions of plain dicts of arrays, and as `jax.export` programs.

A program is made for one platform, so that what a kernel is there for is all that it holds: no
branch over platforms is left in it. The number of rows is a symbol where every operation allows it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.inference import denoiser
from wallwm_jax.inference.denoiser import Window, input_specs
from wallwm_jax.inference.exported import KEYS
from wallwm_jax.types import (
  ActionChunk,
  Frozen,
  InferenceParams,
  NormStats,
  Observation,
  Text,
  nest,
  path_string,
)

Mode = Literal['event', 'unified']
Arrays = Mapping[str, Any]  # name -> array or ShapeDtypeStruct

# Kernels whose encoding a later JAX may not read: such programs are bound to the JAX that wrote
# them.
UNSTABLE_CALLS = ('__gpu$xla.gpu.triton',)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Program:
  """One exported program. batch: rows of every call, None = any; batch_reason: why it is fixed."""

  mode: Mode
  bucket: int
  exported: jax.export.Exported
  batch: int | None
  batch_reason: str

  @property
  def unstable_calls(self) -> list[str]:
    module = self.exported.mlir_module()
    return [name for name in UNSTABLE_CALLS if f'@{name}' in module or f'"{name}"' in module]


def window_of(cfg: ExperimentConfig, mode: Mode, bucket: int) -> Window:
  """The window that a program of `mode` predicts; unified mode has only one."""
  return Window.event(cfg, bucket) if mode == 'event' else Window.chunk(cfg)


def policy_function(cfg: ExperimentConfig, window: Window) -> Callable[[Arrays, Arrays], Arrays]:
  """f(weights, inputs) -> outputs of a prediction in `window`: what the exported programs compute.

  weights: of `flat_weights`; inputs: as in `program_inputs`. Every row has noise of its own key,
  whoever its neighbours are. Outputs: actions [B, K, A] physical, relative to the state,
  action_mask [B, K], latents [B, V, 1+N, h, w, C], latent_mask [B, 1+N].
  """

  def predict(weights: Arrays, inputs: Arrays) -> Arrays:
    params = _params(weights)
    cond = denoiser.encode_observation(
      params,
      Observation(inputs['frames'], inputs['state'], inputs['view_mask']),
      Text(inputs['text_features'], inputs['text_mask']),
      inputs.get('length'),
      ActionChunk(inputs['committed'], inputs['committed_mask']),
      cfg=cfg,
      window=window,
    )

    def noise(key):
      one = denoiser.sample_noise(jax.random.wrap_key_data(key, impl=KEYS), cfg, 1, window)
      return jax.tree.map(lambda x: x[0], one)

    noises = jax.vmap(noise)(inputs['key'])
    found = denoiser.predict(params, cond, noises, cfg=cfg, window=window)
    return {
      'actions': found.chunk.actions,
      'action_mask': found.chunk.mask,
      'latents': found.latents,
      'latent_mask': found.mask,
    }

  return predict


def program_inputs(cfg: ExperimentConfig, window: Window, batch: Any) -> Arrays:
  """ShapeDtypeStructs of the inputs of `policy_function`; `batch` may be a symbol."""
  obs, text = input_specs(cfg, window, batch)
  steps, s = window.future * cfg.model.steps_per_latent, jax.ShapeDtypeStruct
  key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=KEYS)))
  inputs = {
    'frames': obs.frames,
    'state': obs.state,
    'view_mask': obs.view_mask,
    'text_features': text.features,
    'text_mask': text.mask,
    'key': s((batch, *key.shape), key.dtype),
    'committed': s((batch, steps, cfg.model.action_spec.dim), jnp.float32),
    'committed_mask': s((batch, steps), np.dtype(bool)),
  }
  return inputs | ({'length': s((batch,), jnp.int32)} if window.kind == 'event' else {})


def export_program(
  cfg: ExperimentConfig,
  weights: Arrays,
  mode: Mode,
  bucket: int,
  platform: str,
  batch: int | None,
) -> Program:
  """The program of one mode, bucket and platform, lowered from shapes on whatever machine this is.

  Args:
    weights: arrays or ShapeDtypeStructs of `flat_weights`. batch: rows, None = a symbol; where
      something in the program allows none, one row, and the reason stands in the result.
  """
  window = window_of(cfg, mode, bucket)
  function = jax.jit(policy_function(cfg, window))
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
  allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in UNSTABLE_CALLS]

  def lower(rows):
    trace = jax.export.export(function, platforms=[platform], disabled_checks=allowed)
    return trace(shapes, program_inputs(cfg, window, rows))

  if batch is not None:
    return Program(mode, bucket, lower(batch), batch, 'asked for')
  try:
    anyhow, reason = lower(jax.export.symbolic_shape('b')[0]), None
  except Exception as error:  # everything that meets a symbol refuses it in its own way
    reason = f'no symbolic number of rows: {type(error).__name__}: {str(error).splitlines()[0]}'
  if reason is None and platform != 'tpu':  # the kernels there are chosen by name only
    return Program(mode, bucket, anyhow, None, '')
  single = lower(1)  # another fault than the symbol shows itself here again, and is raised
  if reason is None:
    if not (lost := _kernels(single) - _kernels(anyhow)):
      return Program(mode, bucket, anyhow, None, '')
    reason = f'{lost} kernel calls take no symbolic number of rows'
  program = Program(mode, bucket, single, 1, reason)
  _log.warning('%s, bucket %d, %s: one row per call (%s)', mode, bucket, platform, reason)
  return program


def _kernels(made: jax.export.Exported) -> int:
  return made.mlir_module().count('@tpu_custom_call')


def flat_weights(params: InferenceParams) -> Arrays:
  """{'model/video/...': leaf, 'norm/...', ...}: what programs read of the params.

  They take text features as an input: what makes them, a language side included, stays out.
  """
  frozen = {'norm': vars(params.norm), 'codec': params.frozen.codec}
  if params.frozen.null_text is not None:
    frozen['null_text'] = vars(params.frozen.null_text)
  towers = {name: params.model[name] for name in ('video', 'action')}
  leaves = jax.tree_util.tree_leaves_with_path({'model': towers} | frozen)
  return {path_string(path): leaf for path, leaf in leaves}


def _params(weights: Arrays) -> InferenceParams:
  """Inverse of `flat_weights`."""
  tree = nest(weights)
  null_text = Text(**tree['null_text']) if 'null_text' in tree else None
  frozen = Frozen(NormStats(**tree['norm']), tree.get('codec', {}), null_text)
  return InferenceParams(tree['model'], frozen)
