"""Loading an exported policy. Needs jax and numpy only: no model code, no Flax.

A policy directory holds `event.jaxexport` and `unified.jaxexport` (serialised StableHLO),
`weights.npz` (flat dict, names joined by '/') and `signature.json`, written last, naming the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pathlib
from typing import Any

import jax
import jax.export
import numpy as np

from wallwm_jax.types import CheckpointError, DataError, NormStats, StatsMismatchError

FORMAT = 'wallwm-policy-1'
SIGNATURE = 'signature.json'


class ExportedPolicy:
  """Event and unified mode over plain dicts of arrays, described by `signature`."""

  def __init__(self, signature: dict[str, Any], functions: dict[str, jax.export.Exported],
               weights: dict[str, np.ndarray]):
    self.signature = signature
    self._weights = jax.device_put(weights)
    self._calls = {name: jax.jit(function.call) for name, function in functions.items()}

  def event(self, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """Event mode; `signature['functions']['event']` lists inputs and outputs.

    Raises:
      DataError: a missing or unknown input, or one of the wrong shape or dtype.
    """
    return self._call('event', inputs)

  def unified(self, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """Unified mode; otherwise as `event`."""
    return self._call('unified', inputs)

  def _call(self, name: str, inputs: dict[str, Any]):
    specs = self.signature['functions'][name]['inputs']
    if inputs.keys() != specs.keys():
      raise DataError(f'{name}: expected inputs {sorted(specs)}, got {sorted(inputs)}.')
    for key, spec in specs.items():
      have, want = inputs[key], (tuple(spec['shape']), spec['dtype'])
      if (tuple(np.shape(have)), str(have.dtype)) != want:
        raise DataError(f'{name}.{key}: expected {want[1]} {want[0]}, got {have.dtype} '
                        f'{tuple(np.shape(have))}. The batch size was fixed at export.')
    return self._calls[name](self._weights, inputs)


def load_exported(directory: str | pathlib.Path, norm: NormStats | None = None) -> ExportedPolicy:
  """The policy in `directory`, checked against its checksums.

  Args:
    directory: what `export_policy` wrote.
    norm: statistics the caller normalises or evaluates with; compared where given.

  Raises:
    CheckpointError: missing, incomplete or altered files, or another format.
    StatsMismatchError: weights or `norm` whose statistics are not those of the signature.
  """
  directory = pathlib.Path(directory)
  signature = _read_signature(directory)
  functions = {name: jax.export.deserialize(bytearray(_read(directory, entry)))
               for name, entry in signature['functions'].items()}
  weights = dict(np.load(io.BytesIO(_read(directory, signature['weights']))))
  stored = NormStats(**{f.name: weights[f'norm/{f.name}'] for f in dataclasses.fields(NormStats)})
  for where, stats in (('weights.npz', stored), ('the caller', norm)):
    if stats is not None and stats_hash(stats) != signature['stats_hash']:
      raise StatsMismatchError(
          f'{directory}: expected normalisation statistics {signature["stats_hash"]} '
          f'(signature.json), got {stats_hash(stats)} from {where}. Use the statistics saved with '
          'the policy, or export again from the right checkpoint.')
  return ExportedPolicy(signature, functions, weights)


def stats_hash(norm: NormStats) -> str:
  """First 16 hex digits of the SHA-256 of every statistic's name, shape and float32 bytes."""
  digest = hashlib.sha256()
  for field in dataclasses.fields(NormStats):
    values = np.asarray(getattr(norm, field.name), np.float32)
    digest.update(f'{field.name}{values.shape}'.encode() + values.tobytes())
  return digest.hexdigest()[:16]


def _read_signature(directory: pathlib.Path) -> dict[str, Any]:
  path = directory / SIGNATURE
  if not path.is_file():
    raise CheckpointError(f'{path}: expected an exported policy, found no {SIGNATURE}. It is '
                          'written last: the export may have been cut short, run it again.')
  try:
    signature = json.loads(path.read_text())
  except ValueError as error:
    raise CheckpointError(f'{path}: not valid JSON ({error}). Export again.') from None
  if signature.get('format') != FORMAT:
    raise CheckpointError(f'{path}: expected format {FORMAT!r}, got {signature.get("format")!r}. '
                          'Export again with this version.')
  return signature


def _read(directory: pathlib.Path, entry: dict[str, Any]) -> bytes:
  """The bytes of a file named in the signature, checked against its digest."""
  path = directory / entry['file']
  if not path.is_file():
    raise CheckpointError(f'{path}: missing, though {SIGNATURE} names it. Copy the whole policy.')
  data = path.read_bytes()
  if (got := hashlib.sha256(data).hexdigest()) != entry['sha256']:
    raise CheckpointError(f'{path}: expected sha256 {entry["sha256"]}, got {got}. The file is not '
                          'the one that was exported: copy it again.')
  return data
