"""Converted public weights on disk: a manifest beside an Orbax checkpoint."""

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

__all__ = [
  'PARAMS',
  'Component',
  'Grid',
  'Leaf',
  'Manifest',
  'Part',
  'Reader',
  'digest',
  'grids',
  'is_weights',
  'load',
  'parse_mesh',
  'parts_of',
  'read_manifest',
  'write',
  'write_manifest',
]
