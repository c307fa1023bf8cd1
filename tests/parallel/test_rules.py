"""Sharding rules: coverage of the real parameters, placement, divisibility, every refusal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from wallwm_jax.config import ExperimentConfig, MeshConfig
from wallwm_jax.models import functional
from wallwm_jax.parallel import rules
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.types import ConfigError

DEFAULT = MeshConfig().rules


@pytest.fixture(scope='module')
def shapes():
  init = functools.partial(functional.init_params, ExperimentConfig().model)
  return jax.eval_shape(init, jax.random.key(0))


@pytest.fixture(scope='module')
def mesh():
  return make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))


def test_the_model_and_the_rules_fit(shapes, mesh):
  rules.check_rules(shapes, mesh, DEFAULT)
  rules.check_rules(shapes, make_mesh(MeshConfig()), DEFAULT)


@pytest.mark.parametrize('path,shape,spec', [
    ('video/blocks/self_attn/q/kernel', (4, 128, 128), P(None, ('fsdp',), ('tensor',))),
    ('action/blocks/video_attn/o/kernel', (4, 128, 128), P(None, ('tensor',), ('fsdp',))),
    ('video/blocks/ffn/down/kernel', (4, 512, 128), P(None, ('tensor',), ('fsdp',))),
    ('video/blocks/cross_attn/k_norm/scale', (4, 128), P(None, ('tensor',))),
    ('video/blocks/modulation', (4, 6, 128), P(None, None, None)),
    ('video/patch_embed/kernel', (384, 128), P(None, ('fsdp',))),
    ('action/head_out/kernel', (128, 10), P(('fsdp',), None)),
])
def test_placement(mesh, path, shape, spec):
  tree = jax.ShapeDtypeStruct(shape, np.float32)
  for name in reversed(path.split('/')):
    tree = {name: tree}
  sharding, = jax.tree.leaves(rules.param_shardings(tree, mesh, DEFAULT))
  assert sharding.spec == spec


def test_optimizer_state_is_placed_like_the_parameters(shapes, mesh):
  state = jax.eval_shape(optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init, shapes)
  placed = rules.param_shardings(state, mesh, DEFAULT)
  params = rules.param_shardings(shapes, mesh, DEFAULT)
  adam = placed[1][0]
  assert adam.mu == params and adam.nu == params
  assert adam.count.spec == P()


def test_a_mesh_axis_is_used_once_per_array(mesh):
  table = rules.mesh_rules((('batch', ('replica', 'fsdp')), ('embed', ('fsdp', 'tensor'))), mesh)
  spec = rules.partition_spec(('batch', None, 'embed'), (8, 3, 8), table, mesh, 'x')
  assert spec == P(('replica', 'fsdp'), None, ('tensor',))


def test_batch_is_split_along_its_first_axis(mesh):
  spec = ExperimentConfig().inputs_spec()
  shardings = rules.batch_shardings(spec, mesh, DEFAULT)
  assert {s.spec[0] for s in jax.tree.leaves(shardings)} == {('replica', 'fsdp')}
  assert shardings.frames.shard_shape(spec.frames.shape)[0] == spec.frames.shape[0] // 2
  odd = ExperimentConfig().inputs_spec(batch_size=3)
  with pytest.raises(ConfigError, match="batch field 'frames': dimension 0.*size 3.*by 2"):
    rules.batch_shardings(odd, mesh, DEFAULT)


def test_sharding_round_trip_keeps_values(mesh):
  tree = {'video': {'head': {'kernel': jnp.arange(48.0).reshape(8, 6)}}}
  placed = jax.device_put(tree, rules.param_shardings(tree, mesh, DEFAULT))
  array = placed['video']['head']['kernel']
  assert array.sharding.shard_shape(array.shape) == (4, 6)
  np.testing.assert_array_equal(array, np.arange(48.0).reshape(8, 6))


def test_bad_tables_are_refused(shapes, mesh):
  with pytest.raises(ConfigError, match="unknown logical axis 'embd'. Did you mean 'embed'"):
    rules.check_rules(shapes, mesh, (('embd', ('fsdp',)),))
  with pytest.raises(ConfigError, match="unknown mesh axis 'tensr'. Did you mean 'tensor'"):
    rules.check_rules(shapes, mesh, (('heads', ('tensr',)),))
  with pytest.raises(ConfigError, match="'embed' has two rules"):
    rules.check_rules(shapes, mesh, (('embed', ('fsdp',)), ('embed', ('tensor',))))


def test_bad_parameter_rules_are_refused(shapes, mesh):
  dead = (*rules.PARAM_RULES, (r'blocks/mamba/kernel', ('layers', None, None)))
  with pytest.raises(ConfigError, match='mamba.*is the first match of none'):
    rules.check_rules(shapes, mesh, DEFAULT, dead)
  shadowed = (*rules.PARAM_RULES, (r'blocks/self_attn/q/kernel', ('layers', None, None)))
  with pytest.raises(ConfigError, match='self_attn.*is the first match of none'):
    rules.check_rules(shapes, mesh, DEFAULT, shadowed)
  extra = {'extra': jax.ShapeDtypeStruct((3,), np.float32)}
  stray = shapes | {'video': shapes['video'] | extra}
  with pytest.raises(ConfigError, match="'video/extra'.*has no sharding rule"):
    rules.check_rules(stray, mesh, DEFAULT)
  flat = {'video': {'blocks': {'self_attn': {'q': {'kernel': jax.ShapeDtypeStruct((8, 8), 'f4')}}}}}
  with pytest.raises(ConfigError, match='has 2 axes, but its sharding rule'):
    rules.param_shardings(flat, mesh, DEFAULT)


def test_a_dimension_that_does_not_divide_is_named(mesh):
  odd = {'video': {'blocks': {'ffn': {'up': {'kernel': jax.ShapeDtypeStruct((4, 16, 33), 'f4')}}}}}
  with pytest.raises(ConfigError) as error:
    rules.param_shardings(odd, mesh, DEFAULT)
  for word in ('video/blocks/ffn/up/kernel', 'dimension 2 (mlp)', 'size 33', '2 = mesh axes tens'):
    assert word in str(error.value)
