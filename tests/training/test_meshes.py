"""The mesh is a choice about speed: losses, gradients and randomness do not depend on it."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from wallwm_jax.config import MeshConfig
from wallwm_jax.parallel import distributed, rules
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.training.state import abstract_state, build_optimizer, init_state
from wallwm_jax.training.step import make_train_step

MESHES = {
  'fsdp8': MeshConfig(fsdp=8),
  'tensor2-fsdp4': MeshConfig(tensor=2, fsdp=4),
  'context2': MeshConfig(context=2),
  'mixed': MeshConfig(fsdp=2, context=2, tensor=2),
}
STEPS = 5


class Run:
  """The 'joint' stage (both towers, both losses, Muon) on one mesh."""

  def __init__(self, tiny, mesh: MeshConfig):
    config = tiny.config('joint', train={'steps': STEPS}, diffusion={'mapping': 'symmetric'})
    self.config = dataclasses.replace(config, mesh=mesh)
    self.mesh = make_mesh(mesh)
    self.optimizer = build_optimizer(self.config, self.mesh)
    self.abstract = abstract_state(self.config, self.optimizer, self.mesh)
    self.frozen = tiny.frozen(config)

  def init(self):
    return init_state(self.config, self.optimizer, self.abstract)

  def losses(self, start) -> np.ndarray:
    """[STEPS, 2] loss and gradient norm from host state `start`, a new batch each step."""
    state = jax.device_put(start, jax.tree.map(lambda leaf: leaf.sharding, self.abstract))
    frozen = jax.device_put(self.frozen, NamedSharding(self.mesh, PartitionSpec()))
    shardings = rules.batch_shardings(self.config.inputs_spec(), self.mesh, self.config.mesh.rules)
    step = make_train_step(self.config, self.mesh, self.optimizer, self.abstract)
    # Machine code quality is not what is tested, and costs half of the time.
    step = step.lower(self.abstract, self.config.inputs_spec(), frozen).compile(
      {'xla_backend_optimization_level': 0}
    )
    record = []
    for seed in range(STEPS):
      batch = distributed.put_batch(self.config.fake_batch(seed=seed), shardings)
      state, metrics = step(state, batch, frozen)
      record.append([metrics['loss'], metrics['grad_norm']])
    return np.array(record)


@pytest.fixture(scope='module')
def single(tiny):
  """(initial state on the host, its losses) of a run on one device."""
  run = Run(tiny, MeshConfig())
  start = jax.device_get(run.init())
  return start, run.losses(start)


@pytest.mark.slow
@pytest.mark.parametrize('name', MESHES)
def test_loss_is_the_same_on_every_mesh(tiny, single, name):
  start, expected = single
  got = Run(tiny, MESHES[name]).losses(start)
  np.testing.assert_allclose(got[:, 0], expected[:, 0], rtol=1e-5)
  np.testing.assert_allclose(got[:, 1], expected[:, 1], rtol=1e-4)


@pytest.mark.slow
def test_a_sharded_init_draws_the_same_numbers_and_is_really_sharded(tiny, single):
  state = Run(tiny, MESHES['fsdp8']).init()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), single[0])
  for tree in (state.params['video'], state.opt_state):
    kernel = next(
      leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
      if jax.tree_util.keystr(path).endswith("['ffn']['up']['kernel']")
    )
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
