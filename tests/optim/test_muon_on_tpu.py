"""The distributed update of the 5B video tower, compiled for TPU pods without one."""

import jax
import jax.numpy as jnp
import optax
import pytest

from wallwm_jax.config import ExperimentConfig, MeshConfig, ModelConfig, OptimConfig, VideoConfig
from wallwm_jax.optim import Matrix, make_optimizer, route
from wallwm_jax.optim.distribute import orthogonalize_tree
from wallwm_jax.optim.newton_schulz import NewtonSchulz, coefficients
from wallwm_jax.optim.plan import make_plan
from wallwm_jax.parallel import aot, hlo, rules
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.training.state import param_shapes

TOWER = VideoConfig(width=3072, layers=30, heads=24, ffn=14336, cross_view=False)


def compiled(topology: str, mesh: MeshConfig):
  """One update at low compiler effort: structure and bytes are those of full effort."""
  devices = aot.tpu_devices(topology)
  mesh_ = make_mesh(mesh, devices)
  shapes = {'video': param_shapes(ExperimentConfig(model=ModelConfig(video=TOWER)))['video']}
  placed = rules.param_shardings(shapes, mesh_, mesh.rules)
  optimizer = make_optimizer(OptimConfig(clip_norm=0.0), shapes, route(shapes), 1000, placed)
  state = jax.eval_shape(optimizer.init, shapes)
  state_placed = rules.param_shardings(state, mesh_, mesh.rules)

  def step(params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  def inputs(tree, shardings):
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )

  params = inputs(shapes, placed)
  jitted = jax.jit(step, out_shardings=(placed, state_placed), donate_argnums=(0, 1))
  options = aot.compiler_options(mesh_) | {'exec_time_optimization_effort': -1.0}
  return aot.compile_for_tpu(jitted.lower(params, inputs(state, state_placed), params), **options)


@pytest.mark.slow
def test_64_chips_exchange_whole_matrices_and_nothing_else():
  program = compiled('v5p:4x4x4', MeshConfig(fsdp=64))
  text = program.as_text()
  cost = hlo.cost(text, aot.chip('v5p:4x4x4'), lambda op: 0.0)
  wire = cost.wire_bytes()
  assert 0.30e9 < wire.pop('all-to-all') <= 0.33e9
  assert sum(wire.values()) < 1e6
  exchanges = [c for c in cost.collectives if c.kind == 'all-to-all']
  assert len(exchanges) == 10  # in and out for four slots of squares and one of the FFN
  # Twice the 5 slots' products would not fit: the update holds a few matrices at a time.
  assert program.memory_analysis().temp_size_in_bytes <= 0.5e9
  assert program.cost_analysis()['flops'] <= 5.38e12
  assert text.count('custom_call_target="tpu_custom_call"') == 4 * 10 + 14  # syrk kernels


@pytest.mark.slow
def test_512_chips_share_the_long_matrices():
  program = compiled('v5p:8x8x8', MeshConfig(replica=1, fsdp=512))
  cost = hlo.cost(program.as_text(), aot.chip('v5p:8x8x8'), lambda op: 0.0)
  reductions = [c for c in cost.collectives if c.kind == 'all-reduce' and c.wire_bytes > 1e6]
  assert [c.group_size for c in reductions] == [8, 8, 8]  # one per Gram matrix of an FFN matrix
  assert cost.wire_bytes()['all-to-all'] < 0.08e9
  assert program.cost_analysis()['flops'] < 1.3e12


def test_exchanges_run_beside_the_matmuls():
  """Two slots of 1024 x 1024 matrices on four chips, at full compiler effort."""
  mesh = make_mesh(MeshConfig(fsdp=4), aot.tpu_devices('v5p:2x2x1'))
  q = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.float32)
  tree = {'blocks': {'self_attn': {'q': {'kernel': q}}}}
  (placed,) = jax.tree.leaves(rules.param_shardings(tree, mesh, MeshConfig().rules))
  how = NewtonSchulz(coefficients('polar_express', 5))
  plan = make_plan([q], [Matrix()], how, [placed])
  assert [group.slots for group in plan.groups] == [2]
  update = jax.jit(lambda x: orthogonalize_tree([x], plan, how)[0], out_shardings=placed)
  lowered = update.lower(jax.ShapeDtypeStruct(q.shape, q.dtype, sharding=placed))
  program = aot.compile_for_tpu(lowered, **aot.compiler_options(mesh))
  cost = hlo.cost(program.as_text(), aot.chip('v5p:2x2x1'), lambda op: 0.0)
  exchanges = [c for c in cost.collectives if c.kind == 'all-to-all']
  assert len(exchanges) == len(cost.collectives) == 4
  assert sum(c.asynchronous for c in exchanges) >= 2
  assert cost.exposed_s < 0.7 * sum(c.wire_bytes for c in exchanges) / 180e9
