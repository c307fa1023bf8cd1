"""Newton-Schulz spread over a mesh: equal to one device, whatever the layout."""

import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from wallwm_jax.config import MeshConfig
from wallwm_jax.optim import distribute
from wallwm_jax.optim.distribute import orthogonalize_tree
from wallwm_jax.optim.matrices import Matrix
from wallwm_jax.optim.muon import muon
from wallwm_jax.optim.newton_schulz import NewtonSchulz, coefficients
from wallwm_jax.optim.plan import make_plan
from wallwm_jax.parallel import rules
from wallwm_jax.parallel.mesh import make_mesh

FLOAT32 = NewtonSchulz(coefficients('polar_express', 5), 'float32')
BFLOAT16 = NewtonSchulz(coefficients('polar_express', 5))
LAYOUTS = {
  'fsdp8': (MeshConfig(fsdp=8), None),
  'fsdp4': (MeshConfig(fsdp=4), None),
  'fsdp2 x tensor4': (MeshConfig(fsdp=2, tensor=4), None),
  'fsdp4 x tensor2': (MeshConfig(fsdp=4, tensor=2), None),
  'tensor8': (MeshConfig(tensor=8), None),
  'replica8': (MeshConfig(replica=8), None),
  'replica2 x fsdp4': (MeshConfig(replica=2, fsdp=4), None),
  'replica2 x context2 x fsdp2': (MeshConfig(replica=2, fsdp=2, context=2), None),
  'context2 x fsdp2 x tensor2': (MeshConfig(fsdp=2, context=2, tensor=2), None),
  'fsdp8, 4 devices a matrix': (MeshConfig(fsdp=8), 4),
  'fsdp8, 8 devices a matrix': (MeshConfig(fsdp=8), 8),
  'replica4 x fsdp2, 2 devices a matrix': (MeshConfig(replica=4, fsdp=2), 2),
  'replica4 x fsdp2, 4 devices a matrix': (MeshConfig(replica=4, fsdp=2), 4),
}


def tree(seed, layers=3, width=32, hidden=64):
  """Square stacks that share a shape, and both orientations of the FFN, at paths of the model."""
  keys = iter(jax.random.split(jax.random.key(seed), 5))

  def stack(*shape):
    return {'kernel': jax.random.normal(next(keys), (layers, *shape))}

  attn = {'q': stack(width, width), 'k': stack(width, width), 'o': stack(width, width)}
  ffn = {'up': stack(width, hidden), 'down': stack(hidden, width)}
  return {'video': {'blocks': {'self_attn': attn, 'ffn': ffn}}}


def fit(optimizer, steps, place=lambda x: x):
  """Parameters after `steps` updates towards another tree."""
  params, target = place(tree(0)), place(tree(1))
  state = optimizer.init(params)

  @jax.jit
  def step(params, state):
    grads = jax.tree.map(lambda p, t: p - t, params, target)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(steps):
    params, state = step(params, state)
  return params


def planned(config, parts=None, how=FLOAT32, **sizes):
  mesh, params = make_mesh(config), tree(0, **sizes)
  placed = rules.param_shardings(params, mesh, config.rules)
  views = [Matrix()] * len(jax.tree.leaves(params))
  return make_plan(params, views, how, placed, parts=parts), placed


@functools.cache
def alone():
  return fit(muon(0.02, FLOAT32, weight_decay=0.1), 5)


def assert_close(a, b, atol):
  for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=atol)


@pytest.mark.parametrize('name', LAYOUTS)
def test_every_layout_equals_one_device(name):
  """Criterion N2: three layers, which divide no mesh, and both orientations of the FFN."""
  config, parts = LAYOUTS[name]
  plan, placed = planned(config, parts)
  if parts:
    assert all(group.parts == parts for group in plan.groups)
  got = fit(
    muon(0.02, FLOAT32, plan=plan, weight_decay=0.1), 5, lambda t: jax.device_put(t, placed)
  )
  for b, s in zip(*map(jax.tree.leaves, (alone(), tree(0))), strict=True):
    assert np.abs(b - s).max() > 0.05  # it went somewhere
  assert_close(got, alone(), atol=1e-6)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
  name=st.sampled_from(sorted(LAYOUTS)),
  layers=st.integers(1, 18),
  dtype=st.sampled_from(['float32', 'bfloat16']),
)
def test_every_matrix_meets_its_owner_once_and_whole(name, layers, dtype):
  """The exchange alone: owners turn the rows of their matrices upside down and add 1."""
  how = NewtonSchulz(FLOAT32.coefficients, dtype)
  config, parts = LAYOUTS[name]
  plan, placed = planned(config, parts, how, layers=layers)
  whole = set()

  def turn(x, how, total):
    whole.add(x.shape)
    assert (total is None) == (parts is None) and x.dtype == how.dtype
    return x[:, ::-1] + jnp.ones((), x.dtype)

  values = tree(0, layers=layers)
  expected = jax.tree.leaves(jax.tree.map(lambda x: np.asarray(x.astype(dtype)), values))
  for group in plan.groups:
    for leaf, transposed, _ in group.leaves:
      expected[leaf] = np.flip(expected[leaf], axis=2 if transposed else 1) + np.ones((), dtype)
  with mock.patch.object(distribute, 'orthogonalize', turn):
    run = jax.jit(lambda t: orthogonalize_tree(t, plan, how))
    got = jax.tree.leaves(run(jax.device_put(values, placed)))
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_array_equal(np.asarray(a), b)
  assert whole == {(g.per_slot, g.rows, g.cols // g.parts) for g in plan.groups}


@pytest.mark.parametrize(
  'config,sizes',
  [
    (MeshConfig(fsdp=8), {'layers': 9}),
    (MeshConfig(replica=2, fsdp=4), {'layers': 1}),
    (MeshConfig(fsdp=4, tensor=2), {'layers': 2, 'hidden': 16}),  # wider than the hidden layer
  ],
)
def test_layer_counts_and_widths(config, sizes):
  plan, placed = planned(config, **sizes)
  values = tree(0, **sizes)
  one = make_plan(values, [Matrix()] * 5, FLOAT32)
  expected = jax.jit(lambda t: orthogonalize_tree(t, one, FLOAT32))(values)
  got = jax.jit(lambda t: orthogonalize_tree(t, plan, FLOAT32))(jax.device_put(values, placed))
  assert_close(got, expected, atol=5e-5)  # of the ill-conditioned factor itself, not a step


FUSED = Matrix('l m (p n) -> (p l) m n', (('p', 3),))
PAIR = Matrix('l m (p n) -> (p l) m n', (('p', 2),))
HEADS = Matrix('l m (h d) -> (h l) m d', (('h', 4),))
CONVOLUTION = Matrix('h w i o -> 1 (h w i) o')
FSDP2_TENSOR4 = MeshConfig(fsdp=2, tensor=4)


@pytest.mark.parametrize(
  'view,shape,config,spec,local',
  [
    (FUSED, (3, 16, 96), MeshConfig(fsdp=8), P(None, 'fsdp'), (9, 2, 32)),
    # Three projections on four devices: gathered before they are split.
    (FUSED, (3, 16, 96), FSDP2_TENSOR4, P(None, 'fsdp', 'tensor'), (9, 8, 32)),
    # Two on two devices: each already has its projection.
    (PAIR, (3, 16, 64), MeshConfig(fsdp=4, tensor=2), P(None, 'fsdp', 'tensor'), (3, 4, 32)),
    (FUSED, (3, 16, 96), MeshConfig(fsdp=4), P(None, None, 'fsdp'), (9, 16, 32)),
    (HEADS, (3, 32, 64), MeshConfig(fsdp=8), P(None, 'fsdp'), (12, 4, 16)),
    (HEADS, (3, 32, 64), FSDP2_TENSOR4, P(None, 'fsdp', 'tensor'), (3, 16, 16)),
    (Matrix(), (8, 16, 24), MeshConfig(fsdp=8), P('fsdp'), (1, 16, 24)),
    (Matrix(), (3, 16, 32), FSDP2_TENSOR4, P(None, ('fsdp', 'tensor')), (3, 2, 32)),
    (Matrix('m n -> 1 m n'), (16, 32), FSDP2_TENSOR4, P('fsdp', 'tensor'), (1, 8, 8)),
    (CONVOLUTION, (3, 3, 4, 32), MeshConfig(fsdp=8), P(None, None, None, 'fsdp'), (1, 36, 4)),
    (CONVOLUTION, (4, 2, 4, 32), MeshConfig(fsdp=4), P('fsdp'), (1, 8, 32)),
    (CONVOLUTION, (3, 3, 4, 32), MeshConfig(fsdp=4), P(None, None, 'fsdp'), (1, 36, 32)),
  ],
)
def test_views_on_a_mesh(view, shape, config, spec, local):
  """The exchange alone: owners turn whole matrices by half a circle. `local`: what a device holds
  of the tensor read as matrices.
  """
  x = jax.random.normal(jax.random.key(0), shape)
  sharding = NamedSharding(make_mesh(config), spec)
  plan = make_plan({'kernel': x}, [view], FLOAT32, {'kernel': sharding})
  inside = NamedSharding(sharding.mesh, plan.leaves[0].spec)
  assert inside.shard_shape(view.shape(shape)) == local
  with mock.patch.object(distribute, 'orthogonalize', lambda x, how, total: x[:, ::-1, ::-1]):
    run = jax.jit(lambda t: orthogonalize_tree(t, plan, FLOAT32))
    got = run({'kernel': jax.device_put(x, sharding)})['kernel']
  expected = view.merge(view.split(np.asarray(x))[:, ::-1, ::-1], shape)
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
  'name',
  [
    'fsdp8',
    'fsdp4 x tensor2',
    'replica2 x context2 x fsdp2',
    'replica8',
    'fsdp8, 4 devices a matrix',
    'replica4 x fsdp2, 4 devices a matrix',
  ],
)
def test_the_compiled_update_sends_what_the_plan_says(name):
  """Every byte: no gathered or reduced matrix, as the partitioner would have it."""
  config, parts = LAYOUTS[name]
  plan, placed = planned(config, parts)
  values = jax.device_put(tree(0), placed)
  optimizer = muon(0.02, FLOAT32, plan=plan, weight_decay=0.1)
  program = jax.jit(optimizer.update, out_shardings=(placed, None))
  compiled = program.lower(values, optimizer.init(values), values).compile()
  sent = wire_bytes(compiled.as_text())
  planned_bytes = dict.fromkeys(('all-to-all', 'all-gather', 'all-reduce'), 0.0)
  for group in plan.groups:
    for kind, nbytes in group.wire_bytes(FLOAT32).items():
      planned_bytes[kind] += nbytes
  assert sent == {kind: pytest.approx(n) for kind, n in planned_bytes.items() if n}
  if config.fsdp > 1:
    assert sent['all-to-all'] > 0
  if name == 'fsdp8':
    assert set(sent) == {'all-to-all'}


def wire_bytes(program):
  """Bytes each device sends, by kind of collective, all of float32."""
  factor = {'all-reduce': 2, 'reduce-scatter': 8}
  sent = {}
  for result, kind, groups in re.findall(
    r'= (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\('
    r'.*?(?:replica_groups=\{\{([\d,]+)\}|$)',
    program,
    re.MULTILINE,
  ):
    shapes = re.findall(r'f32\[([\d,]*)\]', result)
    nbytes = 4 * sum(math.prod(map(int, filter(None, dims.split(',')))) for dims in shapes)
    size = len(groups.split(',')) if groups else 2
    sent[kind] = sent.get(kind, 0.0) + nbytes * factor.get(kind, 1) * (size - 1) / size
  return sent


def test_a_run_moves_between_meshes():
  """Criterion N7: saved on 8 devices, restored on 2 x 4 and on one; the state knows no mesh."""

  def steps(optimizer, place, params, state, count):
    params, target = place(params), place(tree(1))
    # What a checkpoint holds: host arrays, placed like the fresh state of the new optimizer.
    fresh = optimizer.init(params)
    state = fresh if state is None else jax.tree.map(place_like, state, fresh)

    @jax.jit
    def step(params, state):
      grads = jax.tree.map(lambda p, t: p - t, params, target)
      updates, state = optimizer.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    for _ in range(count):
      params, state = step(params, state)
    return jax.device_get((params, state))

  def place_like(value, like):
    return jax.device_put(value, like.sharding) if value.ndim else value

  def on(config):
    plan, placed = planned(config)
    return muon(0.02, FLOAT32, plan=plan), lambda t: jax.device_put(t, placed)

  saved = steps(*on(MeshConfig(fsdp=8)), tree(0), None, 3)
  expected, state = steps(*on(MeshConfig(fsdp=8)), *saved, 5)
  assert state[0].count == 8
  elsewhere = [
    on(MeshConfig(replica=2, fsdp=4)),
    on(MeshConfig(fsdp=2, tensor=4)),
    (muon(0.02, FLOAT32), lambda t: t),
  ]
  for optimizer, place in elsewhere:
    got, _ = steps(optimizer, place, *saved, 5)
    assert_close(got, expected, atol=5e-6)
  # The momentum matters: a run that forgets it ends elsewhere.
  forgot, _ = steps(*on(MeshConfig(fsdp=8)), saved[0], None, 5)
  assert np.abs(np.subtract(*(jax.tree.leaves(t)[0] for t in (forgot, expected)))).max() > 1e-4


def test_production_precision_trains_as_well_as_float32():
  """Criterion N5: a residual network learns a wider one, from fresh batches at a falling rate."""
  layers, width, hidden, steps = 4, 16, 64, 60

  def network(params, x):
    ffn = params['video']['blocks']['ffn']
    for up, down in zip(ffn['up']['kernel'], ffn['down']['kernel'], strict=True):
      x = x + jnp.tanh(x @ up) @ down
    return x

  def scaled(seed, **sizes):
    values = tree(seed, width=width, **sizes)
    return jax.tree.map(lambda p: p / np.sqrt(p.shape[1]), values)

  teacher = scaled(7, layers=2, hidden=2 * hidden)
  batches = jax.random.normal(jax.random.key(9), (steps, 128, width))
  final = jax.random.normal(jax.random.key(10), (2048, width))

  def loss(params, x):
    return jnp.mean(jnp.square(network(params, x) - network(teacher, x)))

  def train(how, config):
    plan, placed = planned(config, how=how, layers=layers, width=width, hidden=hidden)
    rate = optax.cosine_decay_schedule(0.02, steps)
    optimizer = muon(rate, how, plan=plan if config.fsdp > 1 else None)
    params = scaled(0, layers=layers, hidden=hidden)
    params = jax.device_put(params, placed) if config.fsdp > 1 else params
    start, state = loss(params, final), optimizer.init(params)

    @jax.jit
    def step(params, state, x):
      updates, state = optimizer.update(jax.grad(loss)(params, x), state, params)
      return optax.apply_updates(params, updates), state

    for x in batches:
      params, state = step(params, state, x)
    return float(loss(params, final)), float(start)

  exact, start = train(FLOAT32, MeshConfig())
  rounded, _ = train(BFLOAT16, MeshConfig(fsdp=8))
  assert exact < 0.1 * start
  assert rounded == pytest.approx(exact, rel=5e-3)
