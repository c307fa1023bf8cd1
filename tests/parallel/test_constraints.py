"""Activation constraints: placement under jit, identity without a mesh, refusals either way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.config import MeshConfig
from wallwm_jax.parallel.constraints import (
  activation_sharding,
  constrain,
  map_batch,
  splits_only_batch,
)
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.types import ConfigError

RULES = MeshConfig().rules


def test_outputs_are_sharded_and_values_unchanged():
  mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
  x = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)

  @jax.jit
  def double(x):
    with activation_sharding(mesh, RULES):
      return constrain(2 * x, 'batch', 'patch', 'heads')

  out = double(x)
  assert out.sharding.shard_shape(out.shape) == (2, 3, 4)
  np.testing.assert_array_equal(out, 2 * x)


def test_vmap_sees_the_inner_rank():
  mesh = make_mesh(MeshConfig(fsdp=2))
  x = jnp.ones((3, 4, 5))

  @jax.jit
  def run(x):
    with activation_sharding(mesh, RULES):
      return jax.vmap(lambda row: constrain(row, 'batch', None) + 1)(x)

  np.testing.assert_array_equal(run(x), x + 1)


def test_no_mesh_is_the_identity_and_contexts_do_not_leak():
  x = jnp.ones((3, 5))
  assert constrain(x, 'batch', None) is x
  with pytest.raises(RuntimeError, match='inside'):
    with activation_sharding(make_mesh(MeshConfig()), RULES):
      raise RuntimeError('inside')
  assert constrain(x, 'batch', None) is x


@pytest.mark.parametrize('inside', [False, True])
def test_wrong_rank_and_unknown_names_are_refused(inside):
  def check(x):
    with pytest.raises(ConfigError, match='one axis per dimension'):
      constrain(x, 'batch')
    with pytest.raises(ConfigError, match="'token'. Did you mean 'tokens'"):
      constrain(x, 'batch', 'token')

  if inside:
    with activation_sharding(make_mesh(MeshConfig(fsdp=2)), RULES):
      check(jnp.ones((4, 4)))
  else:
    check(jnp.ones((4, 4)))


def test_a_dimension_that_does_not_divide_is_named():
  with activation_sharding(make_mesh(MeshConfig(context=2)), RULES):
    with pytest.raises(ConfigError, match=r'dimension 1 \(patch\) of size 9.*context'):
      constrain(jnp.ones((4, 9)), 'batch', 'patch')


def test_map_batch_gives_every_device_its_samples():
  x, table = np.arange(24.0).reshape(8, 3), np.arange(3.0)
  local = []

  def run(x, pair):
    local.append(x.shape)
    return x * pair[0] + pair[1]

  def on(config):
    with activation_sharding(make_mesh(config), RULES):
      return map_batch(run, (True, (False, True)), x, (table, x))

  for config in (MeshConfig(), MeshConfig(fsdp=4), MeshConfig(replica=2, fsdp=4)):
    np.testing.assert_array_equal(jax.jit(lambda config=config: on(config))(), x * table + x)
  assert local == [(8, 3), (2, 3), (1, 3)]
  np.testing.assert_array_equal(map_batch(run, (True, (False, True)), x, (table, x)), x * table + x)
  with pytest.raises(ConfigError, match=r'does not split leading axes \[8, 8\] alone'):
    on(MeshConfig(fsdp=2, tensor=2))


def test_which_meshes_split_only_the_batch():
  assert splits_only_batch(7)
  for config, size, only in (
    (MeshConfig(), 7, True), (MeshConfig(fsdp=4), 8, True), (MeshConfig(fsdp=4), 6, False),
    (MeshConfig(fsdp=2, context=2), 8, False), (MeshConfig(replica=2, tensor=2), 8, False),
  ):  # fmt: skip
    with activation_sharding(make_mesh(config), RULES):
      assert splits_only_batch(size) == only
