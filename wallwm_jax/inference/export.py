"""Writing a policy that runs without this code, and loading it again.

`load` needs JAX and NumPy alone, so nothing of the model is imported before something is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jaxlib
import numpy as np

from wallwm_jax.errors import CheckpointError, ConfigError
from wallwm_jax.inference import exported
from wallwm_jax.inference.exported import FORMAT, MANIFEST, load, stats_hash, verify

if TYPE_CHECKING:
  from wallwm_jax.config import ExperimentConfig
  from wallwm_jax.inference.policy_functions import Program
  from wallwm_jax.types import InferenceParams, Text

__all__ = ['PLATFORMS', 'Captions', 'Choice', 'describe', 'export_policy', 'load', 'verify']

PLATFORMS = ('cpu', 'cuda', 'tpu')
LOADER, PARAMS, TEXT = 'policy.py', 'params.safetensors', 'text.safetensors'
_ALIGN = 64  # bytes: where tensors begin, so that readers may map them
_UNITS = {
  'frames': 'uint8 RGB, camera order as config.model.views, the last one now',
  'state': 'absolute pose in the robot base frame: m, rotation columns, gripper 0..1',
  'view_mask': 'True where the camera is present',
  'text_features': 'features of the frozen text encoder named in config.model.text',
  'text_mask': 'True on tokens that are attended to; all False = no caption',
  'length': 'future latent frames of the event, 1..bucket',
  'key': 'PRNG key data of each row (threefry2x32)',
  'committed': 'actions that are being executed already, in the units of `actions`',
  'committed_mask': 'True on steps that are committed',
  'actions': 'target poses relative to the pose in `state`: m, rotation columns, gripper 0..1',
  'action_mask': 'True on steps inside the predicted length',
  'latents': 'codec latents, anchor frame first',
  'latent_mask': 'True on latent frames inside the predicted length',
}


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which programs: for each platform, event mode of each bucket N (future latents) and unified
  mode. batch: rows of a call, None = any number where the program allows it.

  Raises:
    ConfigError: an unknown platform, no bucket, or a batch below 1.
  """

  platforms: tuple[str, ...]
  buckets: tuple[int, ...]
  batch: int | None = None

  def __post_init__(self):
    if unknown := set(self.platforms) - set(PLATFORMS) or not self.platforms:
      raise ConfigError(f'platforms: expected some of {PLATFORMS}, got {unknown or "none"}.')
    for name in ('platforms', 'buckets'):
      values = getattr(self, name)
      if not values or len(set(values)) < len(values):
        raise ConfigError(f'{name}: expected each once and at least one, got {values}.')
    if self.batch is not None and self.batch < 1:
      raise ConfigError(f'batch: expected at least 1 row, or dynamic, got {self.batch}.')


@dataclasses.dataclass(frozen=True)
class Captions:
  """Captions I with their features text [I, X, E], of the encoder the model was trained with."""

  captions: Sequence[str]
  text: Text


def export_policy(
  cfg: ExperimentConfig,
  params: InferenceParams,
  out: str | pathlib.Path,
  choice: Choice,
  captions: Captions | None = None,
) -> dict[str, Any]:
  """Writes a folder that `load` runs, and that runs anywhere by the policy.py in it.

  Parameters pass through memory one array at a time. An older policy in `out` gives way in one
  step after everything has been written, so whatever fails costs nothing that is there.

  Args:
    params: weights and statistics, in the dtypes they shall have; ShapeDtypeStructs in their place
      make programs only.

  Returns:
    The manifest.

  Raises:
    ConfigError: a bucket that the model does not have.
    CheckpointError: `out` holds something else than an exported policy.
  """
  from wallwm_jax.inference.policy_functions import export_program, flat_weights
  from wallwm_jax.weights.staging import new_folder

  weights = flat_weights(params)
  entries = []
  with new_folder(out, check=_check_replaceable) as folder:
    for plan in _plans(cfg, choice):
      program = export_program(cfg, weights, plan['mode'], plan['bucket'], plan['platform'],
                               choice.batch)
      path = folder / plan['file']
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(program.exported.serialize())
      entries.append(plan | _describe(program))
    manifest = _manifest(cfg, weights, choice, entries, captions)
    if manifest['params']['file']:
      write_tensors(folder / PARAMS, weights)
    if captions is not None:
      write_tensors(folder / TEXT, _text_tensors(captions))
    shutil.copyfile(exported.__file__, folder / LOADER)
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    manifest['files'] = {
      path.relative_to(folder).as_posix(): {'bytes': path.stat().st_size, 'sha256': _sha256(path)}
      for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + '\n')
  return manifest


def describe(cfg: ExperimentConfig, params: InferenceParams, choice: Choice) -> dict[str, Any]:
  """What `export_policy` would write, from shapes alone: programs with their inputs, bytes."""
  from wallwm_jax.inference.policy_functions import flat_weights, program_inputs, window_of

  def inputs(plan):
    window = window_of(cfg, plan['mode'], plan['bucket'])
    return _specs(program_inputs(cfg, window, 1), choice.batch or 'b')

  weights = flat_weights(params)
  programs = [plan | {'inputs': inputs(plan)} for plan in _plans(cfg, choice)]
  return {
    'platforms': list(choice.platforms),
    'programs': programs,
    'parameters': sum(int(np.prod(x.shape)) for x in weights.values()),
    'params_bytes': sum(_nbytes(x) for x in weights.values()),
    'files': [plan['file'] for plan in programs] + [PARAMS, LOADER, MANIFEST],
  }


def write_tensors(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """A safetensors file of arrays by name, brought to the host and written one at a time."""
  kinds = {dtype: name for name, dtype in exported.DTYPES.items()}
  header, end = {}, 0
  for name, x in arrays.items():
    if np.dtype(x.dtype) not in kinds:
      raise CheckpointError(
        f'{path}: {name}: expected a dtype of {sorted(map(str, kinds))}, got {x.dtype}.'
      )
    begin, end = end, end + _nbytes(x)
    about = {'dtype': kinds[np.dtype(x.dtype)], 'shape': list(x.shape)}
    header[name] = about | {'data_offsets': [begin, end]}
  head = json.dumps(header).encode()
  head += b' ' * (-(len(head) + 8) % _ALIGN)
  with path.open('wb') as file:
    file.write(len(head).to_bytes(8, 'little') + head)
    for x in arrays.values():
      file.write(np.ascontiguousarray(jax.device_get(x)).reshape(-1).view(np.uint8).data)


def _plans(cfg: ExperimentConfig, choice: Choice) -> list[dict[str, Any]]:
  """Mode, bucket, platform and file of each program."""
  modes = [('event', bucket, f'event-{bucket}') for bucket in sorted(choice.buckets)]
  modes.append(('unified', cfg.model.future, 'unified'))
  return [
    {'mode': mode, 'bucket': bucket, 'platform': platform,
     'file': f'programs/{platform}/{name}.jaxexport'}
    for platform in choice.platforms for mode, bucket, name in modes
  ]  # fmt: skip


def _describe(program: Program) -> dict[str, Any]:
  """What the manifest says of a program."""
  made = program.exported
  (_, inputs), _ = jax.tree.unflatten(made.in_tree, made.in_avals)
  outputs = jax.tree.unflatten(made.out_tree, made.out_avals)
  rows = program.batch or 'b'
  return {
    'batch': program.batch,
    'batch_reason': program.batch_reason,
    'calling_convention_version': made.calling_convention_version,
    'unstable_calls': program.unstable_calls,
    'inputs': _specs(inputs, rows),
    'outputs': _specs(outputs, rows),
  }


def _specs(specs: Mapping[str, Any], rows: int | str) -> dict[str, Any]:
  """Shapes (the first size is the number of rows), dtypes and units, as JSON."""
  return {
    name: {'shape': [rows, *s.shape[1:]], 'dtype': str(s.dtype), 'unit': _UNITS[name]}
    for name, s in specs.items()
  }


def _manifest(cfg, weights, choice: Choice, entries, captions: Captions | None) -> dict[str, Any]:
  norm = {name.removeprefix('norm/'): x for name, x in weights.items() if name.startswith('norm/')}
  abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in weights.values())
  arrays = {name: {'shape': list(x.shape), 'dtype': str(x.dtype)} for name, x in weights.items()}
  return {
    'format': FORMAT,
    # Older releases may read the programs, none was tried: the oldest is the one that wrote them.
    'requires': {'jax': jax.__version__, 'packages': ['jax', 'numpy', 'flatbuffers']},
    'made_with': {'jax': jax.__version__, 'jaxlib': jaxlib.__version__, 'numpy': np.__version__},
    'platforms': list(choice.platforms),
    'programs': entries,
    'params': {'file': None if abstract else PARAMS, 'arrays': arrays},
    'text': None if captions is None else TEXT,
    'stats_hash': None if abstract else stats_hash(norm),
    'norm': None if abstract else {name: np.asarray(x).tolist() for name, x in norm.items()},
    'action_groups': {name: list(at) for name, at in cfg.model.action_spec.groups().items()},
    'steps_per_latent': cfg.model.steps_per_latent,
    'config': dataclasses.asdict(cfg),
  }


def _text_tensors(captions: Captions) -> dict[str, np.ndarray]:
  """Features [n, E] of each caption up to its last row that is not zero, and its mask [X].

  In bfloat16 where that loses nothing: the larger encoders round to it themselves.
  """
  features, masks = np.asarray(captions.text.features), np.asarray(captions.text.mask)
  tensors = {}
  for caption, rows, mask in zip(captions.captions, features, masks, strict=True):
    used = np.flatnonzero(rows.any(-1))
    rows = rows[: used[-1] + 1 if used.size else 0]
    narrow = rows.astype(exported.DTYPES['BF16'])
    tensors[exported.FEATURES + caption] = narrow if (narrow == rows).all() else rows
    tensors[exported.MASK + caption] = mask
  return tensors


def _check_replaceable(out: pathlib.Path) -> None:
  """Raises CheckpointError where replacing what is there would cost what no export wrote."""
  if out.exists() and not out.is_dir():
    raise CheckpointError(f'{out}: expected a folder, but this is a file. Name another one.')
  here = {path.relative_to(out).as_posix() for path in out.rglob('*') if not path.is_dir()}
  here = {name for name in here if '__pycache__' not in name}
  if not here:
    return
  manifest = exported.read_manifest(out) if MANIFEST in here else {'files': {}}
  if strangers := sorted(here - manifest['files'].keys() - {MANIFEST}):
    raise CheckpointError(
      f'{out}: expected an exported policy or nothing, to be replaced, but {strangers[:4]} '
      f'({len(strangers)} files) were not written by an export. Move them, or name another folder.'
    )


def _nbytes(x: Any) -> int:
  return int(np.prod(x.shape, dtype=np.int64)) * np.dtype(x.dtype).itemsize


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
