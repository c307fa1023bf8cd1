"""Writing a policy that runs without this code: serialised functions, weights, a signature."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.inference.denoiser import EventPrediction, Window, input_specs
from wallwm_jax.inference.event import predict_event
from wallwm_jax.inference.exported import FORMAT, SIGNATURE, load_exported, stats_hash
from wallwm_jax.inference.unified import predict_chunk
from wallwm_jax.types import Frozen, InferenceParams, NormStats, Observation, Text, nest

__all__ = ['export_policy', 'load_exported']

_UNITS = {
    'frames': 'uint8 RGB, camera order as config.model.views',
    'state': 'absolute pose in the robot base frame: m, rotation columns, gripper 0..1',
    'view_mask': 'True where the camera is present',
    'text_features': 'features of the frozen text encoder named in config.model.text',
    'text_mask': 'True on real tokens; all False = no caption',
    'length': 'future latent frames of the event, 1..bucket',
    'key': 'PRNG key data (jax.random.key_data)',
    'actions': 'target poses relative to the pose in `state`: m, rotation columns, gripper 0..1',
    'action_mask': 'True on steps inside the predicted length',
    'latents': 'codec latents, anchor frame first',
    'latent_mask': 'True on latent frames inside the predicted length',
}


def export_policy(cfg: ExperimentConfig, params: InferenceParams, out_dir: str | pathlib.Path, *,
                  batch_size: int, bucket: int,
                  platforms: Sequence[str] = ('cpu',)) -> dict[str, Any]:
  """Writes event and unified mode as `jax.export` artifacts with weights and signature.

  Both take text features as an input; what makes them, a language side included, stays out.

  Args:
    params: weights and statistics; any array type, stored as they are.
    out_dir: created where missing. An older policy in it is replaced only after everything has
      been written, so a full disk costs nothing that is there.
    batch_size, bucket: fixed B and N of the exported functions.
    platforms: what the artifacts are lowered for, e.g. ('cpu', 'tpu').

  Returns:
    The signature that was written.
  """
  frozen = {'norm': vars(params.norm), 'codec': params.frozen.codec}
  if params.frozen.null_text is not None:
    frozen['null_text'] = vars(params.frozen.null_text)
  towers = {name: params.model[name] for name in ('video', 'action')}
  weights = flatten({'model': towers} | frozen)
  weights = {name: np.asarray(value) for name, value in weights.items()}
  files, functions = {'weights.npz': _npz(weights)}, {}
  for name, (function, specs) in _functions(cfg, batch_size, bucket).items():
    trace = jax.export.export(jax.jit(function), platforms=list(platforms))
    exported = trace(_specs(weights), specs)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    files[f'{name}.jaxexport'] = bytes(exported.serialize())
    functions[name] = {**_entry(files, f'{name}.jaxexport'), 'inputs': _describe(specs),
                       'outputs': _describe(outputs)}
  signature = {
      'format': FORMAT,
      'jax': jax.__version__,
      'platforms': list(platforms),
      'batch_size': batch_size,
      'bucket': bucket,
      'stats_hash': stats_hash(params.norm),
      'action_groups': cfg.model.action_spec.groups(),
      'steps_per_latent': cfg.model.steps_per_latent,
      'functions': functions,
      'weights': _entry(files, 'weights.npz'),
      'config': dataclasses.asdict(cfg),
  }
  files[SIGNATURE] = json.dumps(signature, indent=1).encode()
  _replace_all(pathlib.Path(out_dir), files)
  return signature


def flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'a/b': leaf} of a nested dict."""
  flat = {}
  for key, value in tree.items():
    path = f'{prefix}{key}'
    flat.update(flatten(value, path + '/') if isinstance(value, dict) else {path: value})
  return flat


def _functions(cfg: ExperimentConfig, batch: int, bucket: int) -> dict[str, tuple[Callable, dict]]:
  """Name -> (function of plain dicts (weights, inputs), input specs)."""

  def event(weights, inputs):
    prediction = predict_event(*_records(weights, inputs), cfg=cfg, bucket=bucket,
                               length=inputs['length'])
    return _outputs(prediction)

  def unified(weights, inputs):
    return _outputs(predict_chunk(*_records(weights, inputs), cfg=cfg))

  length = {'length': jax.ShapeDtypeStruct((batch,), jnp.int32)}
  return {
      'event': (event, _input_specs(cfg, Window.event(cfg, bucket), batch) | length),
      'unified': (unified, _input_specs(cfg, Window.chunk(cfg), batch)),
  }


def _input_specs(cfg: ExperimentConfig, window: Window, batch: int) -> dict[str, Any]:
  obs, text = input_specs(cfg, window, batch)
  key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
  return {'frames': obs.frames, 'state': obs.state, 'view_mask': obs.view_mask,
          'text_features': text.features, 'text_mask': text.mask, 'key': key}


def _records(weights: dict[str, Any], inputs: dict[str, Any]):
  """(params, obs, text, key) of the flat dicts at the boundary."""
  tree = nest(weights)
  return (
      InferenceParams(tree['model'], _frozen(tree)),
      Observation(inputs['frames'], inputs['state'], inputs['view_mask']),
      Text(inputs['text_features'], inputs['text_mask']),
      jax.random.wrap_key_data(inputs['key']),
  )


def _frozen(tree: dict[str, Any]) -> Frozen:
  null_text = Text(**tree['null_text']) if 'null_text' in tree else None
  return Frozen(NormStats(**tree['norm']), tree.get('codec', {}), null_text)


def _outputs(prediction: EventPrediction) -> dict[str, jax.Array]:
  return {'actions': prediction.chunk.actions, 'action_mask': prediction.chunk.mask,
          'latents': prediction.latents, 'latent_mask': prediction.mask}


def _specs(arrays: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}


def _describe(specs: dict[str, Any]) -> dict[str, Any]:
  return {name: {'shape': list(s.shape), 'dtype': str(s.dtype), 'unit': _UNITS[name]}
          for name, s in specs.items()}


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def _entry(files: dict[str, bytes], name: str) -> dict[str, str]:
  return {'file': name, 'sha256': hashlib.sha256(files[name]).hexdigest()}


def _replace_all(out: pathlib.Path, files: dict[str, bytes]) -> None:
  """Writes every file beside its place, and only then moves them in, in order (signature last)."""
  out.mkdir(parents=True, exist_ok=True)
  partial = {name: out / f'{name}.partial' for name in files}
  try:
    for name, data in files.items():
      partial[name].write_bytes(data)
    for name in files:
      os.replace(partial[name], out / name)
  finally:
    for path in partial.values():
      path.unlink(missing_ok=True)
