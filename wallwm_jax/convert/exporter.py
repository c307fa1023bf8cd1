"""From a weight folder back to a public checkpoint, one tensor at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from wallwm_jax import weights
from wallwm_jax.convert.entries import Entry, Naming, parameter_shapes
from wallwm_jax.convert.importer import Progress, contiguous
from wallwm_jax.convert.plan import FAMILIES, Family
from wallwm_jax.convert.source import FLOATS, INDEX
from wallwm_jax.convert.torch_config import torch_config
from wallwm_jax.types import CheckpointError

_SLAB_BYTES = 64 * 2**20  # of a tensor, brought into torch's layout at once
_EXTRAS = ('tokenizer.json', 'tokenizer_config.json')


@dataclasses.dataclass(frozen=True)
class _Item:
  """A tensor to write: its key, where it is, what the source said of it (no sha256 = no source)."""

  key: str
  entry: Entry
  dtype: str
  sha256: str

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.entry.shape)) * FLOATS[self.dtype].itemsize


def export_weights(
  path: str | os.PathLike,
  out: str | os.PathLike,
  *,
  family: Family | None = None,
  naming: Naming | None = None,
  shard_bytes: int = 5 * 10**9,
  progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
  """Writes the public checkpoint of a weight folder: safetensors with an index, and config.json.

  Every tensor gets back its dtype and bytes; that they are the source's is checked by checksum.
  Tensors that a naming does not have are left out.

  Args:
    path: weight folder. out: new folder. family: what it must hold (None = anything).
    naming: of the keys (None = the source's, together with its config.json and second names).
    shard_bytes: a new file begins before this size is exceeded.

  Returns:
    {'naming', 'files', 'tensors', 'left_out' (tensors), 'bytes'}.

  Raises:
    CheckpointError: no weight folder, another family, damaged values (all named; nothing is left
      of `out`), or `out` exists.
  """
  weights.check_new(out)
  manifest, items = _open(path, family, naming)
  family = FAMILIES[manifest.family]
  naming = naming or manifest.naming
  shards = _shards(items, shard_bytes)
  reader = weights.Reader(path)
  total = sum(item.nbytes for shard in shards for item in shard)
  names = [
    f'{family.stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors' if len(shards) > 1
    else f'{family.stem}.safetensors' for i in range(len(shards))
  ]  # fmt: skip
  with weights.new_folder(out) as folder:
    damaged, done = [], 0
    for name, shard in zip(names, shards):
      for problem, written in _write_shard(folder / name, shard, reader):
        damaged += problem
        progress(done := done + written, total)
    if damaged:
      raise CheckpointError(
        f'{path}: these tensors are not what was converted; convert the checkpoint again:\n  '
        + '\n  '.join(damaged)
      )
    index = {item.key: name for name, shard in zip(names, shards) for item in shard}
    _write_json(
      folder / f'{family.stem}{INDEX}', {'metadata': {'total_size': total}, 'weight_map': index}
    )
    _write_json(folder / 'config.json', _config(manifest, naming))
    for extra in _EXTRAS:
      if (pathlib.Path(path) / extra).is_file():
        shutil.copyfile(pathlib.Path(path) / extra, folder / extra)
  return {
    'naming': naming,
    'files': names,
    'tensors': len(index),
    'left_out': sum(not entry.key(naming) for entry in family.module.model(manifest.fields)),
    'bytes': total,
  }


def export_table(
  path: str | os.PathLike, family: Family | None = None, naming: Naming | None = None
) -> Iterator[tuple[str, ...]]:
  """Table of what `export_weights` would write: key, dtype, shape, parameter."""
  _, items = _open(path, family, naming)
  for item in items:
    layer = '' if item.entry.layer is None else f'[{item.entry.layer}]'
    yield item.key, item.dtype, str(list(item.entry.shape)), f'{item.entry.path}{layer}'


def _open(path, family: Family | None, naming: Naming | None):
  """(manifest, items) of a weight folder that holds `family`."""
  manifest = weights.read_manifest(path)
  if family and family.name != manifest.family:
    raise CheckpointError(
      f'{path}: expected weights of {family.name}, got {manifest.family}. Use `wallwm convert '
      f'{manifest.family} --to torch`.'
    )
  return manifest, _items(manifest, FAMILIES[manifest.family], naming or manifest.naming)


def _items(manifest: weights.Manifest, family: Family, naming: Naming) -> list[_Item]:
  """The tensors to write in the order of the source. Its second names of a tensor belong to its
  naming; in the other one every tensor has one."""
  if not manifest.keys:
    return _items_of_ours(manifest, family, naming)
  entries = {(e.path, e.layer): e for e in family.module.model(manifest.fields)}
  items = []
  for key, row in manifest.keys.items():
    status = row['status']
    if status == 'used' or (status == 'alias' and naming == manifest.naming):
      used = row if status == 'used' else manifest.keys[row['of']]
      entry = entries[used['path'], used['layer']]
      if name := key if naming == manifest.naming else entry.key(naming):
        items.append(_Item(name, entry, row['dtype'], row['sha256']))
  return items


def _items_of_ours(manifest: weights.Manifest, family: Family, naming: Naming) -> list[_Item]:
  """The tensors of weights that come from no checkpoint."""
  entries = family.module.model(manifest.fields)
  names = {dtype.name: name for name, dtype in FLOATS.items()}
  stored = {path: tuple(leaf['shape']) for path, leaf in manifest.leaves.items()}
  if stored != (expected := parameter_shapes(entries)):
    differ = sorted(p for p in stored.keys() | expected if stored.get(p) != expected.get(p))
    raise CheckpointError(
      f'expected the parameters of the {family.name} model that the manifest describes; these '
      f'differ: {", ".join(differ)}. Save the weights again.'
    )
  return [
    _Item(entry.key(naming), entry, names[manifest.leaves[entry.path]['dtype']], '')
    for entry in entries
    if entry.key(naming)
  ]


def _shards(items: Sequence[_Item], limit: int) -> list[list[_Item]]:
  shards: list[list[_Item]] = [[]]
  held = 0
  for item in items:
    if shards[-1] and held + item.nbytes > limit:
      shards.append([])
      held = 0
    shards[-1].append(item)
    held += item.nbytes
  return shards


def _write_shard(
  path: pathlib.Path, items: Sequence[_Item], reader: weights.Reader
) -> Iterator[tuple[list[str], int]]:
  """Writes one file; yields for each tensor what is wrong with its checksum, and its size."""
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  position = 0
  for item in items:
    offsets = [position, position + item.nbytes]
    header[item.key] = {
      'dtype': item.dtype, 'shape': list(item.entry.shape), 'data_offsets': offsets
    }  # fmt: skip
    position = offsets[1]
  raw = json.dumps(header).encode()
  raw += b' ' * (-len(raw) % 8)  # tensors start aligned
  with path.open('wb') as file:
    file.write(struct.pack('<Q', len(raw)) + raw)
    for item in items:
      sha = hashlib.sha256()
      for slab in _slabs(item, reader):
        sha.update(slab)
        file.write(slab)
      got = sha.hexdigest()
      wrong = f'{item.key}: expected sha256 {item.sha256}, got {got}'
      yield [] if item.sha256 in ('', got) else [wrong], item.nbytes


def _slabs(item: _Item, reader: weights.Reader) -> Iterator[memoryview]:
  """The tensor's bytes in torch's layout, a part of its first axis at a time."""
  entry, dtype = item.entry, FLOATS[item.dtype]
  x = entry.to_torch(reader.row(entry.path, entry.layer))
  step = max(1, _SLAB_BYTES * x.shape[0] // max(1, item.nbytes)) if x.ndim else 1
  for i in range(0, x.shape[0], step) if x.ndim else (...,):
    part = x if i is ... else x[i : i + step]
    yield contiguous(part, dtype).reshape(-1).view(np.uint8).data


def _config(manifest: weights.Manifest, naming: Naming) -> dict[str, Any]:
  if naming == manifest.naming and manifest.source_config is not None:
    return manifest.source_config
  return torch_config(manifest.component, manifest.fields, naming)


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + '\n')
