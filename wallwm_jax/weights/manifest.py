"""The manifest of a weight folder: its parameters, and the public tensors that became them.

manifest.json   component, the model's sizes, every parameter and every source tensor, checksums
params/         an Orbax PyTree checkpoint of the parameters, in the dtypes of the source
tokenizer.json  of the text and vlm components
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any, Literal

from wallwm_jax.types import CheckpointError

FORMAT = 1
NAME = 'manifest.json'
PARAMS = 'params'

Component = Literal['video', 'codec', 'text', 'vlm']


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a weight folder holds and where it came from; all of it JSON.

  component: 'video' (the video tower), 'codec', 'text' or 'vlm' (also the small language model).
  family: the conversion that wrote it, or that would lead back to torch.
  naming: of the source keys, 'diffusers' or 'original'; prefix: stripped off all of them.
  fields: the model's sizes as the family's `infer` returns them.
  leaves: {parameter path: {shape, dtype, sha256}}; sha256 over the digests of its source tensors
  in layer order, so that it depends neither on layout nor on chunks. Weights that were trained
  here (`weights.save`) have no source: keys is {}, the digests are those of our own layers.
  keys: {source key: {status, file, dtype, shape, sha256, ...}}, status 'used' (with path, layer
  and, where our layout is another one, `reshaped`: our shape), 'alias' (with `of`) or 'ignored'.
  files: {name: {size in bytes, sha256}} of the source. source_config: its parsed config.json.
  mesh: axis sizes whose shards the stored chunks follow, {} = none.
  """

  component: Component
  family: str
  naming: str
  fields: dict[str, Any]
  leaves: dict[str, dict[str, Any]]
  keys: dict[str, dict[str, Any]]
  files: dict[str, dict[str, Any]]
  source_config: dict[str, Any] | None = None
  prefix: str = ''
  mesh: dict[str, int] = dataclasses.field(default_factory=dict)

  def counts(self) -> dict[str, int]:
    """Source tensors by status; 'reshaped' ones are among the used."""
    statuses = [key['status'] for key in self.keys.values()]
    counts = {status: statuses.count(status) for status in ('used', 'alias', 'ignored')}
    return counts | {'reshaped': sum('reshaped' in key for key in self.keys.values())}


def is_weights(path: str | os.PathLike) -> bool:
  """Whether `path` is a folder that a conversion wrote; '' is none."""
  return bool(str(path)) and (pathlib.Path(path) / NAME).is_file()


def read_manifest(path: str | os.PathLike, component: Component | None = None) -> Manifest:
  """The manifest of a weight folder, which must hold `component` if one is given.

  Raises:
    CheckpointError: no weight folder, a damaged manifest, or one of another format or component.
  """
  file = pathlib.Path(path) / NAME
  if not file.is_file():
    raise CheckpointError(
      f'{path}: expected a folder of converted weights with {NAME}, found none. Write one with '
      '`wallwm convert wan-dit|wan-vae|umt5|qwen --src DIR --out DIR`.'
    )
  try:
    values = json.loads(file.read_text())
    found = values.pop('format')
    manifest = Manifest(**values) if found == FORMAT else None
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise CheckpointError(f'{file} is damaged ({error}). Convert the checkpoint again.') from error
  if manifest is None:
    raise CheckpointError(
      f'{file}: expected format {FORMAT}, got {found!r}. Use the version of wallwm_jax that wrote '
      'it, or convert the checkpoint again.'
    )
  if component not in (None, manifest.component):
    raise CheckpointError(
      f'{path}: expected weights of the {component} component, got {manifest.component} '
      f'(`wallwm convert {manifest.family}`).'
    )
  return manifest


def write_manifest(path: str | os.PathLike, manifest: Manifest) -> None:
  """Writes it into the folder `path`."""
  values = {'format': FORMAT, **dataclasses.asdict(manifest)}
  (pathlib.Path(path) / NAME).write_text(json.dumps(values, indent=1) + '\n')


def digest(path: str | os.PathLike) -> str:
  """Identity of the weights in a folder, 16 hex digits: what caches of their outputs are named by.

  The same for both namings of a checkpoint and for every mesh; other values, dtypes, sizes or
  another tokenizer give another one.
  """
  manifest = read_manifest(path)
  tokenizer = manifest.files.get('tokenizer.json')
  identity = [manifest.component, manifest.fields, manifest.leaves, tokenizer]
  return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
