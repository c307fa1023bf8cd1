"""Plans: counts at full size on meshes no machine here has, complete assignment, and refusals."""

import collections
import dataclasses
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from wallwm_jax.config import MeshConfig
from wallwm_jax.optim import plan as plans
from wallwm_jax.optim.distribute import orthogonalize_tree
from wallwm_jax.optim.matrices import Matrix
from wallwm_jax.optim.newton_schulz import NewtonSchulz, coefficients
from wallwm_jax.optim.plan import MAX_SLOTS, format_plan, make_plan
from wallwm_jax.parallel import rules
from wallwm_jax.parallel.mesh import MESH_AXES, make_mesh
from wallwm_jax.types import ConfigError

HOW = NewtonSchulz(coefficients('polar_express', 5))


def stacks(layers, width, hidden):
  """The matrices of a tower: eight squares and both orientations of the FFN, as shapes."""

  def stack(m, n):
    return {'kernel': jax.ShapeDtypeStruct((layers, m, n), np.float32)}

  attention = {name: stack(width, width) for name in 'qkvo'}
  ffn = {'up': stack(width, hidden), 'down': stack(hidden, width)}
  blocks = {'self_attn': attention, 'cross_attn': attention, 'ffn': ffn}
  return {'video': {'blocks': blocks}}


def plan_for(shapes, mesh, **options):
  placed = rules.param_shardings(shapes, mesh, MeshConfig().rules)
  return make_plan(shapes, [Matrix()] * len(jax.tree.leaves(shapes)), HOW, placed, **options)


@pytest.fixture
def full_size(monkeypatch):
  """Plans of the 5B parameters by mesh sizes, without devices."""
  # An abstract mesh has no devices to ask for their slice.
  monkeypatch.setattr(plans, '_crosses_slices', lambda mesh, axis: False)

  def make(**sizes):
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    return plan_for(stacks(30, 3072, 14336), mesh)

  return make


def executed(plan):
  """FLOPs of a device over those of an even split of whole matrices."""
  even = sum(g.matrices * HOW.flops(g.rows, g.cols) / (g.peers * g.spare) for g in plan.groups)
  return sum(group.flops(HOW) for group in plan.groups) / even


def test_full_size_on_64_devices(full_size):
  square, ffn = full_size(fsdp=64).groups
  assert (square.rows, square.cols, square.matrices) == (3072, 3072, 240)
  assert (ffn.rows, ffn.cols, ffn.matrices) == (3072, 14336, 60)
  assert (square.slots, square.parts, square.per_slot) == (4, 1, 1)
  assert (ffn.slots, ffn.parts, ffn.per_slot) == (1, 1, 1)
  # down [hidden, width] is split along its columns, so it is read transposed; so is o.
  assert sum(transposed for _, transposed, _ in ffn.leaves) == 1
  assert sum(transposed for _, transposed, _ in square.leaves) == 2
  plan = full_size(fsdp=64)
  assert executed(plan) == pytest.approx(1.067, abs=5e-4)
  # 4 squares by the direct form and one long matrix by the Gram form; criterion P1.
  m, n = 3072, 14336
  flops = sum(group.flops(HOW) for group in plan.groups)
  assert flops == 4 * 30 * m**3 + 12 * m**2 * n + 22 * m**3
  assert flops <= 5.8e12
  assert sum(sum(group.wire_bytes(HOW).values()) for group in plan.groups) <= 0.33e9


def test_full_size_on_512_devices(full_size):
  square, ffn = full_size(fsdp=512).groups
  assert (square.slots, square.parts) == (1, 1)
  assert (ffn.slots, ffn.parts, ffn.owners) == (1, 8, 64)
  assert ffn.wire_bytes(HOW)['all-reduce'] > 0
  # Half the devices have a square; undivided, the long matrices would make it 4.65.
  assert executed(full_size(fsdp=512)) == pytest.approx(2.543, abs=5e-4)


@pytest.mark.parametrize(
  'sizes', [{'fsdp': 16, 'tensor': 4}, {'replica': 4, 'fsdp': 16}, {'fsdp': 32, 'context': 2}]
)
def test_every_layout_of_64_devices_works_as_little(full_size, sizes):
  plan = full_size(**sizes)
  assert executed(plan) == pytest.approx(1.067, abs=5e-4)
  for group in plan.groups:
    copies = {'replica', 'context'} & set(sizes)
    assert set(group.spare_axes) == copies and group.owners == 64


def test_few_matrices_of_a_split_that_cannot_be_shared_keep_one_owner_each(full_size):
  for group in full_size(fsdp=64, tensor=8).groups:
    assert (group.parts, group.slots, group.col_split) == (1, 1, 8)


def test_the_number_of_slots_is_bounded():
  mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
  square, ffn = plan_for(stacks(30, 32, 64), mesh).groups
  assert square.slots == MAX_SLOTS and square.per_slot == 15
  assert ffn.slots == MAX_SLOTS and ffn.per_slot == 4
  for group in (square, ffn):
    assert group.slots * group.capacity >= group.matrices > (group.slots - 1) * group.capacity


def test_one_device_takes_every_leaf_by_itself_at_once():
  shapes = stacks(30, 32, 64)
  plan = make_plan(shapes, [Matrix()] * 10, HOW)
  assert plan.mesh is None and len(plan.groups) == 10
  assert all((group.slots, group.per_slot) == (1, 30) for group in plan.groups)
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  assert plan_for(shapes, mesh) == plan


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  layers=st.integers(1, 40),
  sizes=st.sampled_from(
    [(1, 8, 1, 1), (2, 4, 1, 1), (1, 2, 1, 4), (2, 2, 2, 1), (8, 1, 1, 1), (1, 1, 2, 4)]
  ),
  hidden=st.sampled_from([16, 32, 64, 2048]),
  parts=st.sampled_from([None, 1, 2, 4, 8]),
)
def test_every_matrix_has_one_place_in_the_slots(layers, sizes, hidden, parts):
  mesh = make_mesh(MeshConfig(*sizes))
  shapes = stacks(layers, 32, hidden)
  plan = plan_for(shapes, mesh, parts=parts)
  seen = collections.Counter(i for group in plan.groups for i, _, _ in group.leaves)
  assert seen == dict.fromkeys(range(len(plan.leaves)), 1)
  for group in plan.groups:
    for index, transposed, count in group.leaves:
      leaf = plan.leaves[index]
      _, m, n = leaf.view.shape(leaf.shape)
      assert (group.rows, group.cols) == ((n, m) if transposed else (m, n))
      assert count == layers
    used = [group.row_axes, group.col_axes, group.spare_axes]
    assert sum(map(len, used)) == len({axis for axes in used for axis in axes})
    assert group.peers * group.spare == mesh.size == group.owners * group.parts
    # No slot too few, none empty, and at most a slot of padding.
    assert 1 <= group.slots <= MAX_SLOTS
    assert 0 <= group.slots * group.capacity - group.matrices < group.capacity
    assert group.cols % group.parts == 0


def test_equal_plans_are_one_key():
  mesh = make_mesh(MeshConfig(fsdp=8))
  first, second = (plan_for(stacks(3, 32, 64), mesh) for _ in range(2))
  assert first is not second and first == second and hash(first) == hash(second)
  others = [
    plan_for(stacks(4, 32, 64), mesh),
    plan_for(stacks(3, 32, 64), make_mesh(MeshConfig(fsdp=4, tensor=2))),
    plan_for(stacks(3, 32, 64), mesh, parts=2),
  ]
  assert len({first, *others}) == 4


def test_table_names_what_it_plans(full_size):
  for sizes in ({'fsdp': 64}, {'fsdp': 512}):
    plan = full_size(**sizes)
    table = format_plan(plan, HOW)
    assert 'video/blocks/cross_attn/k/kernel' in table and 'and 6 more' in table
    assert 'video/blocks/ffn/down/kernel, video/blocks/ffn/up/kernel' in table
    assert f'{executed(plan):.3f} times' in table
    assert '240   3072 x  3072  direct' in table and '60   3072 x 14336    gram' in table
  assert 'one device' in format_plan(make_plan(stacks(1, 32, 64), [Matrix()] * 10, HOW), HOW)


def slices(*ids):
  """A stand-in for a mesh of [replica, fsdp] devices in the given slices."""
  devices = np.array([[types.SimpleNamespace(slice_index=i) for i in row] for row in ids])
  return types.SimpleNamespace(devices=devices, axis_names=('replica', 'fsdp'))


def test_an_axis_between_slices_is_recognised():
  across = slices((0, 0, 0), (1, 1, 1))
  assert plans._crosses_slices(across, 'replica') and not plans._crosses_slices(across, 'fsdp')
  within = slices((0, 0), (0, 0))
  assert not any(plans._crosses_slices(within, axis) for axis in ('replica', 'fsdp'))
  assert plans._crosses_slices(slices((0, 1), (0, 1)), 'fsdp')
  mesh = make_mesh(MeshConfig(replica=2, fsdp=4))
  assert not any(plans._crosses_slices(mesh, axis) for axis in mesh.axis_names)


def test_work_is_not_split_between_slices(monkeypatch):
  mesh = make_mesh(MeshConfig(replica=2, fsdp=4))
  shapes = stacks(3, 32, 64)
  assert all(group.spare_axes == ('replica',) for group in plan_for(shapes, mesh).groups)
  monkeypatch.setattr(plans, '_crosses_slices', lambda mesh, axis: axis == 'replica')
  plan = plan_for(shapes, mesh)
  assert all(g.spare_axes == () and g.owners == 4 for g in plan.groups)
  # Nothing is sent between the slices, devices 0-3 and 4-7, and both have the result.
  how = dataclasses.replace(HOW, dtype='float32')
  placed = rules.param_shardings(shapes, mesh, MeshConfig().rules)
  key = jax.random.key(0)
  tree = jax.tree.map(lambda s: jax.random.normal(key, s.shape), shapes)
  run = jax.jit(lambda t: orthogonalize_tree(t, plan, how), out_shardings=placed)
  compiled = run.lower(jax.device_put(tree, placed)).compile()
  sends = [line for line in compiled.as_text().splitlines() if 'replica_groups=' in line]
  assert sends and all('replica_groups={{0,1,2,3},{4,5,6,7}}' in line for line in sends)
  alone = orthogonalize_tree(tree, make_plan(tree, [Matrix()] * 10, how), how)
  for a, b in zip(*map(jax.tree.leaves, (compiled(jax.device_put(tree, placed)), alone))):
    for shard in a.addressable_shards:
      np.testing.assert_allclose(shard.data, b[shard.index], atol=5e-5)


def test_a_plan_refuses_other_parameters():
  mesh = make_mesh(MeshConfig(fsdp=8))
  shapes = stacks(3, 32, 64)
  plan = plan_for(shapes, mesh)
  plan.check(shapes)
  with pytest.raises(
    ConfigError,
    match=r"expected 'video/blocks/cross_attn/k/kernel' \(3, 32, 32\), "
    r"got 'video/blocks/cross_attn/k/kernel' \(4, 32, 32\)",
  ):
    plan.check(stacks(4, 32, 64))
  renamed = {'action': shapes['video']}
  with pytest.raises(ConfigError, match=r"expected 'video/.*got 'action/blocks/cross_attn/k/"):
    plan.check(renamed)
  fewer = {'video': {'blocks': shapes['video']['blocks'] | {'self_attn': {}}}}
  with pytest.raises(ConfigError, match=r"expected 'video/blocks/self_attn/k/kernel'.*got no fur"):
    plan.check(fewer)
  with pytest.raises(ConfigError, match=r"expected no further leaf, got 'z' \(2, 2\)"):
    plan.check(shapes | {'z': jax.ShapeDtypeStruct((2, 2), np.float32)})


def test_a_plan_refuses_parameters_on_another_mesh():
  shapes = stacks(3, 32, 64)
  plan = plan_for(shapes, make_mesh(MeshConfig(fsdp=8)))
  other = make_mesh(MeshConfig(fsdp=4, tensor=2))
  placed = rules.param_shardings(shapes, other, MeshConfig().rules)
  tree = jax.tree.map(lambda s, p: jax.device_put(np.zeros(s.shape, s.dtype), p), shapes, placed)
  with pytest.raises(ConfigError, match=r"'fsdp': 8.*'video/blocks/cross_attn/k/kernel' \(3, 32, "):
    plan.check(tree)


def test_shardings_on_two_meshes_are_refused():
  shapes = {name: jax.ShapeDtypeStruct((2, 16, 16), np.float32) for name in 'ab'}
  a, b = (make_mesh(config) for config in (MeshConfig(fsdp=8), MeshConfig(fsdp=4)))
  placed = {'a': NamedSharding(a, P()), 'b': NamedSharding(b, P())}
  with pytest.raises(ConfigError, match=r"'b' \(2, 16, 16\) lies on mesh .*'fsdp': 4"):
    make_plan(shapes, [Matrix()] * 2, HOW, placed)


def test_a_view_that_does_not_fit_is_refused():
  shapes = {'bias': jax.ShapeDtypeStruct((2, 16), np.float32)}
  with pytest.raises(ConfigError, match=r'shape \(2, 16\): expected 3 axes, got 2'):
    make_plan(shapes, [Matrix()], HOW)


def test_no_matrices_make_an_empty_plan():
  """A run that trains a head only."""
  mesh = make_mesh(MeshConfig(fsdp=8))
  assert make_plan({}, [], HOW).groups == make_plan({}, [], HOW, {}).groups == ()
  assert orthogonalize_tree({}, make_plan({}, [], HOW, {}), HOW) == {}
  assert plan_for({}, mesh).groups == ()
