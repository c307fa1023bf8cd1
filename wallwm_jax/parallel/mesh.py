"""Device meshes with the four axes of this project; an axis of size 1 is always legal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from wallwm_jax.config import MeshConfig
from wallwm_jax.types import ConfigError

# Slow network to fast: between slices; parameters and batch; tokens; heads and mlp.
MESH_AXES = ('replica', 'fsdp', 'context', 'tensor')


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of `config` over the first devices of this run.

  An axis of -1 takes the devices the others leave. A product smaller than the number of devices
  uses the first ones only (a one-device run on a larger host), which needs a single process.

  Raises:
    ConfigError: an illegal size, a product that does not divide the number of devices, or fewer
      replicas than slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = _resolve({axis: getattr(config, axis) for axis in MESH_AXES}, len(devices))
  product = math.prod(sizes.values())
  if len(devices) % product:
    raise ConfigError(_does_not_divide(sizes, len(devices)))
  if product < len(devices) and len({d.process_index for d in devices}) > 1:
    raise ConfigError(
        f'mesh axis product {product} leaves some of the {len(devices)} devices unused, but this '
        'run has several processes and each must take part. Set one axis to -1 to use them all.')
  grid = _arrange(sizes, devices[:product])
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arrange(sizes: dict[str, int], devices: list[jax.Device]) -> np.ndarray:
  """Devices in the order that makes neighbours of a mesh axis neighbours on the network.

  An axis may take part of a dimension of a TPU torus (32 x 16 devices of an 8 x 8 x 8 one). Slices,
  joined by the data-centre network, differ along `replica` only.
  """
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True)
  if sizes['replica'] % slices:
    raise ConfigError(
        f'config.mesh.replica: expected a multiple of the {slices} slices of this run, got '
        f'{sizes["replica"]}. Only replica may cross between slices.')
  inside = sizes | {'replica': sizes['replica'] // slices}
  return mesh_utils.create_hybrid_device_mesh(
      tuple(inside.values()), (slices, 1, 1, 1), devices, allow_split_physical_axes=True)


def _resolve(sizes: dict[str, int], devices: int) -> dict[str, int]:
  """`sizes` with a -1 replaced by what the other axes leave of `devices`."""
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      raise ConfigError(
          f'config.mesh.{axis}: expected a size >= 1, or -1 for the remaining devices, got {size}.')
  rest = [axis for axis, size in sizes.items() if size == -1]
  if len(rest) > 1:
    raise ConfigError(f'config.mesh: one axis at most may be -1, got {" and ".join(rest)}.')
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if rest and devices % fixed:
    raise ConfigError(_does_not_divide({a: s for a, s in sizes.items() if s != -1}, devices))
  return {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}


def _does_not_divide(sizes: dict[str, int], devices: int) -> str:
  used = {axis: size for axis, size in sizes.items() if size > 1}
  wanted = ', '.join(f'config.mesh.{axis}={size}' for axis, size in used.items())
  # Keep of each axis what still fits; the last one that had to give takes the rest.
  remaining, example, changed = devices, {}, None
  for axis, size in used.items():
    example[axis] = math.gcd(size, remaining)
    remaining //= example[axis]
    changed = axis if example[axis] != size else changed
  example[changed] *= remaining
  product = f'{" * ".join(map(str, used.values()))} = {math.prod(used.values())}'
  return (
      f'mesh axis product {product} does not divide {devices} devices ({wanted}).\n'
      f'  Choose axes whose product is {devices}, '
      f'e.g. {" ".join(f"{a}={s}" for a, s in example.items())}.')
