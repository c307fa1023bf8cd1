"""Weights on disk, public or trained here: a manifest beside an Orbax checkpoint."""

from wallwm_jax.weights.arrays import Leaf, Part, Reader, load, parts_of, write
from wallwm_jax.weights.chunks import Grid, grids, parse_mesh
from wallwm_jax.weights.manifest import (
  PARAMS,
  Component,
  Manifest,
  digest,
  is_weights,
  read_manifest,
  write_manifest,
)
from wallwm_jax.weights.saving import copy_files, save
from wallwm_jax.weights.staging import check_new, new_folder

__all__ = [
  'PARAMS',
  'Component',
  'Grid',
  'Leaf',
  'Manifest',
  'Part',
  'Reader',
  'check_new',
  'copy_files',
  'digest',
  'grids',
  'is_weights',
  'load',
  'new_folder',
  'parse_mesh',
  'parts_of',
  'read_manifest',
  'save',
  'write',
  'write_manifest',
]
