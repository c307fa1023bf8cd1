"""Meshes: sizes, the -1 axis, and errors that say what to write instead."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from wallwm_jax.config import MeshConfig
from wallwm_jax.parallel import aot
from wallwm_jax.parallel.mesh import MESH_AXES, make_mesh
from wallwm_jax.types import ConfigError


def test_axes_sizes_and_types():
  mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
  assert mesh.axis_names == MESH_AXES == ('replica', 'fsdp', 'context', 'tensor')
  assert dict(mesh.shape) == {'replica': 1, 'fsdp': 2, 'context': 2, 'tensor': 2}
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_a_smaller_mesh_uses_the_first_devices():
  assert list(make_mesh(MeshConfig()).devices.flat) == jax.devices()[:1]
  assert set(make_mesh(MeshConfig(fsdp=4)).devices.flat) == set(jax.devices()[:4])


def test_minus_one_takes_the_rest():
  assert make_mesh(MeshConfig(fsdp=-1, tensor=2)).shape['fsdp'] == 4
  assert make_mesh(MeshConfig(fsdp=-1), jax.devices()[:2]).shape['fsdp'] == 2


@pytest.mark.parametrize('config,words', [
    (MeshConfig(fsdp=4, tensor=3), [
        '4 * 3 = 12 does not divide 8 devices', 'config.mesh.fsdp=4, config.mesh.tensor=3',
        'e.g. fsdp=4 tensor=2']),
    (MeshConfig(fsdp=16), ['16 = 16 does not divide 8', 'e.g. fsdp=8']),
    (MeshConfig(fsdp=-1, tensor=3), ['3 = 3 does not divide 8', 'e.g. tensor=8']),
    (MeshConfig(fsdp=-1, tensor=-1), ['one axis at most', 'fsdp and tensor']),
    (MeshConfig(context=0), ['config.mesh.context', 'got 0']),
])
def test_impossible_meshes_are_refused(config, words):
  with pytest.raises(ConfigError) as error:
    make_mesh(config)
  for word in words:
    assert word in str(error.value)


def test_axes_may_take_part_of_a_torus_dimension():
  mesh = make_mesh(MeshConfig(replica=32, fsdp=16), aot.tpu_devices('v5p:8x8x8'))
  assert (mesh.shape['replica'], mesh.shape['fsdp']) == (32, 16)
  assert len(set(mesh.devices.flat)) == 512


def test_only_replicas_cross_between_slices():
  devices = aot.tpu_devices('v5p:2x2x1', slices=2)
  mesh = make_mesh(MeshConfig(replica=4, fsdp=2), devices)
  slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)[..., 0, 0]
  assert (slices == slices[:, :1]).all()  # one slice along fsdp
  assert {tuple(row) for row in slices} == {(0, 0), (1, 1)}
  with pytest.raises(ConfigError, match='multiple of the 2 slices of this run, got 1'):
    make_mesh(MeshConfig(fsdp=8), devices)
