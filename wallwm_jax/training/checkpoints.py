"""Checkpoints: what a run needs to go on bit for bit, and what a rollout needs to start.

One Orbax step directory holds these items:
  params, ema   the model, and the running average of its trainable subtrees (inference reads these)
  optimizer     optimizer state, step and root key
  data          state of the data iterator, the same on every host
  norm, config  normalisation statistics and the experiment config
  meta          format version, shape of every leaf, model fingerprint, process count

A quantised model (`save_quantised`) is a workdir whose only step has no ema, optimizer and data: it
can be loaded for inference, not trained on. Its meta also says how it was quantised and has a
checksum of every leaf.

A step directory appears by one rename once it is whole: what a crash or a full disk leaves behind
is never listed, and older steps go only after the new one is in place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from wallwm_jax import weights
from wallwm_jax.config import ExperimentConfig, from_config_dict
from wallwm_jax.inference.quantize import Quantization, check_device
from wallwm_jax.text.factory import make_text_encoder
from wallwm_jax.text.planning import make_planning_texts
from wallwm_jax.training.pretrained import load_frozen, load_language
from wallwm_jax.training.stages import BESIDE_STUDENT
from wallwm_jax.training.state import TrainState, param_shapes
from wallwm_jax.types import (
    CheckpointError,
    ConfigError,
    InferenceParams,
    NormStats,
    Params,
    path_string,
)

FORMAT = 1
DIRECTORY = 'checkpoints'
_ARRAYS = ('params', 'ema', 'optimizer')
_SHOWN = 8  # differing paths listed in an error


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """One restored checkpoint: everything `Checkpoints.save` was given."""

  state: TrainState
  data: dict[str, Any]
  norm: NormStats
  config: ExperimentConfig


class Checkpoints:
  """The checkpoints of one workdir, written by its training run; a context manager."""

  def __init__(self, workdir: str | os.PathLike, keep: int):
    """Opens (and creates) workdir/checkpoints, clearing away what interrupted writes left there;
    the newest `keep` checkpoints are kept."""
    self.path = pathlib.Path(workdir).absolute() / DIRECTORY
    if jax.process_index() == 0:
      for partial in self.path.glob('*.orbax-checkpoint-tmp*'):
        shutil.rmtree(partial, ignore_errors=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    self._manager = ocp.CheckpointManager(self.path, options=options)

  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(
      self, state: TrainState, data: dict[str, Any], norm: NormStats, config: ExperimentConfig
  ) -> int:
    """Writes one checkpoint and waits until it is durable; returns its step.

    Args:
      data: JSON-like state of the data iterator after the batch of this step.

    Raises:
      CheckpointError: the write failed (a full disk, say). Every earlier checkpoint is untouched;
        what was half written is cleared away when the workdir is next opened for training.
    """
    step = int(jax.device_get(state.step))
    items = _items(state)
    leaves = {name: _table(items[name]) for name in _ARRAYS}
    meta = {'format': FORMAT, 'leaves': leaves, 'fingerprint': fingerprint(state.params),
            'processes': jax.process_count()}
    args = ocp.args.Composite(
        **{name: ocp.args.StandardSave(items[name]) for name in _ARRAYS},
        data=ocp.args.JsonSave(data),
        norm=ocp.args.JsonSave(norm_to_json(norm)),
        config=ocp.args.JsonSave(dataclasses.asdict(config)),
        meta=ocp.args.JsonSave(meta),
    )
    try:
      self._manager.save(step, args=args, force=True)
      self._manager.wait_until_finished()
    except Exception as error:  # the storage layers raise many types for one full disk
      raise CheckpointError(
          f'checkpoint {self.path / str(step)} could not be written: {error}. Complete ones: '
          f'{_steps(self.path)}. Free some space and start the run again; it resumes.') from error
    return step

  def restore(self, abstract: TrainState, step: int | None = None) -> Snapshot:
    """The newest (or a given) checkpoint on the devices and shardings of `abstract`, of any mesh.

    Raises:
      CheckpointError: no such checkpoint, it cannot be read, or it holds another model or another
        optimizer (the differing paths are named).
    """
    step = self.latest_step() if step is None else step
    meta = _read_meta(self._manager, self.path, step)
    _check_trainable(meta, f'{self.path / str(step)}')
    items = _items(abstract)
    for name in _ARRAYS:
      _check_leaves(meta['leaves'][name], _table(items[name]), f'{self.path / str(step)}/{name}')
    restored = _restore(self._manager, step, {
        **{name: ocp.args.StandardRestore(items[name]) for name in _ARRAYS},
        **{name: ocp.args.JsonRestore() for name in ('data', 'norm', 'config')}})
    optimizer = restored['optimizer']
    state = TrainState(optimizer['step'], restored['params'], restored['ema'],
                       optimizer['opt_state'], optimizer['key'])
    return Snapshot(state, restored['data'], norm_from_json(restored['norm']),
                    _config_from_json(restored['config']))

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_) -> None:
    self._manager.close()


def load_inference(
    workdir: str | os.PathLike, step: int | None = None, captions: Sequence[str] | None = None
) -> tuple[ExperimentConfig, InferenceParams]:
  """The config and EMA weights of a workdir with all that they were trained with, on the default
  device.

  Args:
    captions: loads the language side as well; its next-event head chooses among these. None = a
      model that is told by captions alone.

  Raises:
    ConfigError: `captions` for a run without heads (stages 3 and later of a config with
      language.kind), or a quantised run whose products this device does not have.
    CheckpointError: no complete checkpoint (or not that step), one of another format, quantised
      parameters that are not what was written, or the codec, text encoder or VLM that it was
      trained with is not where the config says.
  """
  manager, path, step = _open(workdir, step)
  with manager:
    meta = _read_meta(manager, path, step)
    config, norm = _load_context(manager, step)
    shapes, where = param_shapes(config), f'{path / str(step)}/params'
    if 'quantized' in meta:
      quantization = Quantization.from_json(meta['quantized'])
      check_device(quantization.recipe, jax.devices()[0])
      shapes = quantization.shapes(shapes)
    _check_leaves(meta['leaves']['params'], _table(shapes), where)
    read = {name: tree for name, tree in shapes.items() if name not in BESIDE_STUDENT}
    params = _load_params(manager, step, meta, read)
    if 'quantized' in meta:
      _check_digests(meta['digests'], params, where)
  online = dataclasses.replace(config, data=dataclasses.replace(config.data, latents=''))
  text = make_text_encoder(config.model.text)
  frozen = load_frozen(online, norm, text, config.inference.negative)
  if captions is not None:
    if 'heads' not in params:
      raise ConfigError(
          f'{path}: expected a run with a language side, got one of {sorted(params)}. Train stages '
          "3 and 4 of a config with language.kind='qwen', see docs/language.md.")
    texts, reader = make_planning_texts(config), bool(config.language.reader.weights)
    side = load_language(config, captions, text, texts, reader=reader)
    frozen = dataclasses.replace(frozen, language=side)
  return config, InferenceParams(params, frozen)


def save_quantised(
    workdir: str | os.PathLike, config: ExperimentConfig, params: InferenceParams,
    quantization: Quantization, step: int
) -> None:
  """Writes a quantised model as a new workdir that `load_inference` reads.

  Args:
    params: of `inference.quantize.quantize`. step: what its checkpoint is numbered, as a rule that
      of the float run.

  Raises:
    CheckpointError: `workdir` exists, or storage failed.
  """
  with weights.new_folder(workdir) as folder:
    meta = {'format': FORMAT, 'fingerprint': fingerprint(params.model), 'processes': 1,
            'leaves': {name: {} for name in _ARRAYS} | {'params': _table(params.model)},
            'quantized': quantization.to_json(), 'digests': _digests(params.model)}
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(params.model),
        norm=ocp.args.JsonSave(norm_to_json(params.norm)),
        config=ocp.args.JsonSave(dataclasses.asdict(config)),
        meta=ocp.args.JsonSave(meta),
    )
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    try:
      with ocp.CheckpointManager(folder / DIRECTORY, options=options) as manager:
        manager.save(step, args=args, force=True)
    except Exception as error:  # the storage layers raise many types for one full disk
      raise CheckpointError(f'{workdir} could not be written: {error}. Free some space.') from error


def latest_step(workdir: str | os.PathLike) -> int:
  """Step of the newest complete checkpoint of a workdir; CheckpointError where there is none."""
  manager, _, step = _open(workdir, None)
  manager.close()
  return step


def load_source(path: str | os.PathLike) -> tuple[ExperimentConfig, NormStats]:
  """Config and statistics of the run that `train.init_from` names."""
  manager, _, step = _open(path, None)
  with manager:
    return _load_context(manager, step)


def load_params_for_init(path: str | os.PathLike, target: Params) -> Params:
  """EMA weights of another run for the top-level subtrees of `target` that it has.

  Args:
    path: a workdir (its newest checkpoint) or one step directory.
    target: ShapeDtypeStructs, with the shardings the result shall have.

  Raises:
    CheckpointError: no complete checkpoint at `path`, or a shared subtree of another shape.
  """
  manager, root, step = _open(path, None)
  with manager:
    meta = _read_meta(manager, root, step)
    _check_trainable(meta, f'{root / str(step)}')
    stored = {name.split('/')[0] for name in meta['leaves']['params']}
    shared = {name: tree for name, tree in target.items() if name in stored}
    expected = {leaf: shape for leaf, shape in meta['leaves']['params'].items()
                if leaf.split('/')[0] in shared}
    _check_leaves(expected, _table(shared), f'{root / str(step)}/params')
    return _load_params(manager, step, meta, shared)


def fingerprint(params: Params) -> str:
  """Hex digest of the paths, shapes and dtypes of a parameter tree: the identity of a model."""
  return hashlib.sha256(json.dumps(_table(params), sort_keys=True).encode()).hexdigest()[:16]


def norm_to_json(norm: NormStats) -> dict[str, list[float]]:
  """Statistics as lists of floats; exact in both directions."""
  return {f.name: np.asarray(getattr(norm, f.name)).tolist() for f in dataclasses.fields(norm)}


def norm_from_json(values: dict[str, list[float]]) -> NormStats:
  """Inverse of `norm_to_json`, float32 NumPy."""
  return NormStats(**{name: np.asarray(x, np.float32) for name, x in values.items()})


def _items(state: TrainState) -> dict[str, Any]:
  optimizer = {'step': state.step, 'opt_state': state.opt_state, 'key': state.key}
  return {'params': state.params, 'ema': state.ema, 'optimizer': optimizer}


def _load_context(manager, step: int) -> tuple[ExperimentConfig, NormStats]:
  restored = _restore(
      manager, step, {name: ocp.args.JsonRestore() for name in ('config', 'norm')})
  return _config_from_json(restored['config']), norm_from_json(restored['norm'])


def _load_params(manager, step: int, meta, shapes: Params) -> Params:
  """`shapes` restored from the running average where there is one, else from the weights."""
  averaged = {name.split('/')[0] for name in meta['leaves']['ema']}
  here = SingleDeviceSharding(jax.devices()[0])
  targets = jax.tree.map(
      lambda s: s if s.sharding else jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)
  result = {}
  for item, names in (('ema', averaged), ('params', shapes.keys() - averaged)):
    part = {name: tree for name, tree in targets.items() if name in names}
    if part:
      args = ocp.args.PyTreeRestore(
          part, restore_args=ocp.checkpoint_utils.construct_restore_args(part),
          partial_restore=True)
      result |= _restore(manager, step, {item: args})[item]
  return result


def _open(path, step: int | None) -> tuple[ocp.CheckpointManager, pathlib.Path, int]:
  """A read-only manager for a workdir or a step directory, and the step to read."""
  root = pathlib.Path(path).absolute()
  if root.name.isdigit() and root.parent.name == DIRECTORY:
    root, step = root.parent, int(root.name)
  elif root.name != DIRECTORY:
    root = root / DIRECTORY
  steps = _steps(root)
  step = max(steps, default=None) if step is None else step
  if step not in steps:
    wanted = 'a complete checkpoint' if step is None else f'step {step}'
    raise CheckpointError(f'{root}: expected {wanted}, found steps {steps}. Is this a workdir that '
                          '`wallwm train` wrote?')
  manager = ocp.CheckpointManager(root, options=ocp.CheckpointManagerOptions(read_only=True))
  return manager, root, step


def _steps(root: pathlib.Path) -> list[int]:
  return sorted(int(p.name) for p in root.glob('*') if p.name.isdigit())


def _restore(manager, step: int, args: dict[str, Any]):
  try:
    return manager.restore(step, args=ocp.args.Composite(**args))
  except Exception as error:  # tensorstore, JSON and OS errors alike mean unreadable bytes
    raise CheckpointError(f'checkpoint {manager.directory / str(step)} cannot be read ({error}). '
                          'Use an older step or train again.') from error


def _read_meta(manager, path: pathlib.Path, step: int | None) -> dict[str, Any]:
  if step is None or step not in manager.all_steps():
    raise CheckpointError(f'{path}: expected a checkpoint of step {step}, found {_steps(path)}.')
  meta = _restore(manager, step, {'meta': ocp.args.JsonRestore()})['meta']
  if meta.get('format') != FORMAT:
    raise CheckpointError(f'checkpoint {path / str(step)}: expected format {FORMAT}, got '
                          f'{meta.get("format")}. Use the version of wallwm_jax that wrote it.')
  return meta


def _check_trainable(meta: dict[str, Any], where: str) -> None:
  if 'quantized' in meta:
    raise CheckpointError(f'checkpoint {where}: expected float weights to train, got a quantised '
                          'model. Use the run that it was made from.')


def _digests(params: Params) -> dict[str, str]:
  """{path: SHA-256 of the bytes} of every leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {path_string(path): hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
          for path, x in leaves}


def _check_digests(stored: dict[str, str], params: Params, where: str) -> None:
  for path, digest in _digests(params).items():
    if stored.get(path) != digest:
      raise CheckpointError(
          f'checkpoint {where}: {path}: expected sha256 {stored.get(path)}, got {digest}. The file '
          'is not what `wallwm quantize` wrote: quantise the run again.')


def _table(tree) -> dict[str, list]:
  """{path: [shape, dtype]} of every leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_string(path): [list(x.shape), str(x.dtype)]
          for path, x in leaves}


def _check_leaves(stored: dict[str, list], here: dict[str, list], where: str) -> None:
  """Raises CheckpointError unless both tables agree, naming the paths that differ."""
  absent = 'absent'
  paths = sorted(stored.keys() | here.keys())
  differing = [f'  {path}: expected {here.get(path, absent)}, got {stored.get(path, absent)}'
               for path in paths if stored.get(path) != here.get(path)]
  if differing:
    more = f'\n  ... and {len(differing) - _SHOWN} more' if len(differing) > _SHOWN else ''
    raise CheckpointError(
        f'checkpoint {where} is of another model or optimizer, {len(differing)} leaves differ:\n'
        + '\n'.join(differing[:_SHOWN]) + more
        + '\nUse the config it was trained with, or another workdir.')


def _config_from_json(values: dict[str, Any]) -> ExperimentConfig:
  return from_config_dict(ml_collections.ConfigDict(values))
