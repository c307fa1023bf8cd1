"""Weight folders of parameters in memory: models that were trained here."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from wallwm_jax.types import Params, path_string
from wallwm_jax.weights.arrays import Leaf, Part, parts_of, write
from wallwm_jax.weights.chunks import component_axes, grids
from wallwm_jax.weights.manifest import PARAMS, Component, Manifest, write_manifest
from wallwm_jax.weights.staging import new_folder


def save(
  path: str | os.PathLike,
  component: Component,
  family: str,
  fields: Mapping[str, Any],
  params: Params,
  files: Mapping[str, str | os.PathLike] | None = None,
) -> Manifest:
  """Writes a weight folder that `load` reads and `wallwm convert FAMILY --to torch` exports.

  One array at a time is brought to the host, in the dtype it has.

  Args:
    path: new folder; it appears whole or not at all.
    component, family, fields: as in `Manifest`; fields are JSON, tuples allowed.
    params: nested dict of floating-point arrays, whole on this process.
    files: copied into the folder by name, such as {'tokenizer.json': FILE}.

  Raises:
    CheckpointError: `path` exists, or storage failed.
    ConfigError: a parameter without a sharding rule, which no run could place.
  """
  arrays = {path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
  stacked = frozenset(
    name for name, x in arrays.items()
    if component_axes(component, name, np.ndim(x))[:1] == ('layers',)
  )  # fmt: skip
  shapes = {name: tuple(np.shape(x)) for name, x in arrays.items()}
  dtypes = {name: np.dtype(x.dtype) for name, x in arrays.items()}
  sizes = {name: dtype.itemsize for name, dtype in dtypes.items()}
  cut = grids(component, shapes, sizes, stacked, {})
  leaves = {name: Leaf(name, shapes[name], dtypes[name], cut[name]) for name in arrays}
  digests: dict[str, str] = {}

  def parts() -> Iterator[Part]:
    for name, leaf in leaves.items():
      x = np.ascontiguousarray(jax.device_get(arrays[name])).reshape(leaf.shape)
      rows = [*x] if name in stacked else [x]
      joined = ''.join(hashlib.sha256(row.tobytes()).hexdigest() for row in rows)
      digests[name] = hashlib.sha256(joined.encode()).hexdigest()
      for i, row in enumerate(rows):
        yield from parts_of(leaf, row, i if name in stacked else None)

  with new_folder(path) as folder:
    write(folder / PARAMS, leaves.values(), parts())
    manifest = Manifest(
      component=component,
      family=family,
      naming='diffusers',
      fields=dict(fields),
      leaves={
        name: {'shape': list(leaf.shape), 'dtype': leaf.dtype.name, 'sha256': digests[name]}
        for name, leaf in leaves.items()
      },
      keys={},
      files=copy_files(folder, files or {}),
    )
    write_manifest(folder, manifest)
  return manifest


def copy_files(
  folder: pathlib.Path, files: Mapping[str, str | os.PathLike]
) -> dict[str, dict[str, Any]]:
  """Copies {name: file} into a folder; what a manifest says of them."""
  rows = {}
  for name, path in files.items():
    shutil.copyfile(path, folder / name)
    data = (folder / name).read_bytes()
    rows[name] = {'size': len(data), 'sha256': hashlib.sha256(data).hexdigest()}
  return rows
