"""QK-norm with rotary embedding: TPU kernels (interpreted) and XLA form against float32, forward
and backward, and what the TPU compiler makes of them without a TPU.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import relative_error
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from wallwm_jax.config import MeshConfig
from wallwm_jax.kernels.qk_norm_rope import api, pallas_tpu, reference
from wallwm_jax.models.layers import Attention
from wallwm_jax.models.rope import Rotation
from wallwm_jax.parallel import aot
from wallwm_jax.parallel.constraints import activation_sharding
from wallwm_jax.types import ConfigError

TOLERANCE = {jnp.bfloat16: 4e-3, jnp.float32: 1e-5}
EPS = 1e-6
# Memory that starts as NaN, two cores at once and a report of every race between them.
TWO_CORES = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True)
every_dtype = pytest.mark.parametrize('dtype', TOLERANCE)
every_table = pytest.mark.parametrize('table', ['shared', 'own'])


def operands(rows, tokens, heads, table='shared', dtype=jnp.bfloat16, hd=128, seed=0):
  """x, scale, cos, sin and a cotangent g of the output."""
  rng = np.random.default_rng(seed)
  x, g = rng.normal(size=(2, rows, tokens, heads * hd))
  x *= rng.uniform(0.1, 10.0, (rows, tokens, 1))  # norms differ
  scale = rng.normal(1.0, 0.3, heads * hd)
  angle = rng.uniform(-20, 20, (*([rows] if table == 'own' else []), tokens, hd // 2))
  scale, cos, sin = (np.float32(a) for a in (scale, np.cos(angle), np.sin(angle)))
  return *map(jnp.asarray, (x.astype(dtype), scale, cos, sin)), jnp.asarray(g, dtype)


@functools.partial(jax.jit, static_argnums=5)
def exact(x, scale, cos, sin, g, heads):
  """Output and cotangents of x, scale, cos, sin: the reference on the same rounded operands."""
  wide = [a.astype(jnp.float32) for a in (x, scale, cos, sin)]
  out, pullback = jax.vjp(functools.partial(reference.qk_norm_rope, heads=heads, eps=EPS), *wide)
  return out, *pullback(g.astype(jnp.float32).reshape(out.shape))


def kernels(x, scale, cos, sin, g, heads, interpret=True, with_table=True):
  table = api._table(cos, sin)
  out = pallas_tpu.forward(x, scale, table, EPS, interpret=interpret)
  dx, dscale, dtable = pallas_tpu.backward(
    x, scale, table, g, EPS, with_table, interpret=interpret
  )
  parts = [] if dtable is None else [a.reshape(cos.shape) for a in jnp.split(dtable, 2, -1)]
  return out.reshape(*x.shape[:-1], heads, -1), dx, dscale, *parts


@functools.partial(jax.jit, static_argnums=5)
def xla_form(x, scale, cos, sin, g, heads):
  run = functools.partial(api.qk_norm_rope, heads=heads, eps=EPS, implementation='xla')
  out, pullback = jax.vjp(run, x, scale, cos, sin)
  return out, *pullback(g.reshape(out.shape))


FORMS = {'kernels': kernels, 'xla': xla_form}


def check(got, expected, dtype):
  for a, b in zip(got, expected, strict=True):
    assert a.shape == b.shape
    assert relative_error(a, b) <= TOLERANCE[dtype]


# Numbers


@pytest.mark.parametrize('form', FORMS)
@every_dtype
@every_table
@pytest.mark.parametrize('rows, tokens, heads', [(2, 128, 2), (1, 333, 1)])
def test_matches_the_reference(form, dtype, table, rows, tokens, heads):
  args = operands(rows, tokens, heads, table, dtype)
  got = FORMS[form](*args, heads)
  assert got[0].dtype == got[1].dtype == dtype
  check(got, exact(*args, heads), dtype)


@settings(deadline=None, max_examples=3)
@given(st.integers(1, 3), st.integers(128, 700), st.integers(1, 2), st.booleans())
def test_any_number_of_tokens(rows, tokens, heads, own):
  args = operands(rows, tokens, heads, 'own' if own else 'shared', seed=tokens)
  check(kernels(*args, heads), exact(*args, heads), jnp.bfloat16)


@settings(deadline=None, max_examples=4)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.sampled_from([2, 6, 64]))
def test_other_heads_are_left_to_xla(rows, tokens, heads, hd):
  args = operands(rows, tokens, heads, dtype=jnp.float32, hd=hd, seed=tokens)
  assert not pallas_tpu.supports(args[0], heads)
  check(xla_form(*args, heads), exact(*args, heads), jnp.float32)


@every_table
def test_two_cores_and_memory_that_starts_as_nan(table):
  args = operands(2, 333, 2, table)
  got = kernels(*args, 2, interpret=TWO_CORES)
  for a, b in zip(got, kernels(*args, 2), strict=True):
    np.testing.assert_array_equal(a, b)


def test_without_its_gradient_the_table_changes_nothing():
  args = operands(2, 200, 2)
  for a, b in zip(kernels(*args, 2, with_table=False), kernels(*args, 2), strict=False):
    np.testing.assert_array_equal(a, b)


def test_kernels_are_no_worse_than_xla():
  args = operands(2, 256, 2)
  true = exact(*args, 2)
  for ours, xla, right in zip(kernels(*args, 2), xla_form(*args, 2), true, strict=True):
    assert relative_error(ours, right) <= 1.5 * relative_error(xla, right) + 1e-6


def test_nan_stays_with_its_token():
  x, *rest = operands(2, 200, 2)
  clean, poisoned = (kernels(a, *rest, 2) for a in (x, x.at[1, 77, 5].set(jnp.nan)))
  for i in (0, 1):
    a, b = (np.array(part[i], np.float32) for part in (clean, poisoned))
    assert np.isnan(b[1, 77]).all()
    a[1, 77] = b[1, 77] = 0
    np.testing.assert_array_equal(a, b)


def test_the_checks_see_mistakes():
  x, scale, cos, sin, g = args = operands(2, 333, 2)
  expected = exact(*args, 2)
  halves = [jnp.roll(a, 1, -1) for a in (cos, sin)]  # another pair's angle
  wrong = {
    'angles of the next token': exact(x, scale, *(jnp.roll(a, 1, -2) for a in (cos, sin)), g, 2),
    'angles of the next pair': exact(x, scale, *halves, g, 2),
    'turned the other way': exact(x, scale, cos, -sin, g, 2),
    'scale of the other lane': exact(x, scale.reshape(-1, 2)[:, ::-1].ravel(), cos, sin, g, 2),
  }
  for name, other in wrong.items():
    for i in (0, 1):
      assert relative_error(other[i], expected[i]) > 10 * TOLERANCE[jnp.bfloat16], name
  norm_alone = exact(x[..., :128], scale[:128], cos, sin, g[..., :128], 1)[0]
  assert relative_error(norm_alone, expected[0][:, :, :1]) > 10 * TOLERANCE[jnp.bfloat16]
  lost_rows = exact(x[:, :320], scale, cos[:320], sin[:320], g[:, :320], 2)[2]
  assert relative_error(lost_rows, expected[2]) > 10 * TOLERANCE[jnp.bfloat16]


# Entry point


def named(args, heads, implementation):
  return api.qk_norm_rope(*args[:4], heads=heads, eps=EPS, implementation=implementation)


def test_none_is_xla_off_tpu_and_leading_axes_stay():
  x, scale, cos, sin, _ = operands(6, 130, 2, 'own')
  x, cos, sin = (a.reshape(2, 3, *a.shape[1:]) for a in (x, cos, sin))
  assert pallas_tpu.supports(x, 2)
  args = (x, scale, cos, sin)
  np.testing.assert_array_equal(named(args, 2, None), named(args, 2, 'xla'))
  assert named(args, 2, None).shape == (2, 3, 130, 2, 128)


def test_only_a_learned_table_costs_a_gradient(monkeypatch):
  """Whether the kernel writes one is known when it is traced, through scan, remat and shard_map."""
  asked, backward = [], pallas_tpu.backward

  def recorded(*args, **options):
    asked.append(args[5])
    return backward(*args, **options)

  monkeypatch.setattr(pallas_tpu, 'backward', recorded)
  x, scale, cos, sin, _ = operands(2, 128, 2)
  mesh = jax.make_mesh((2,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))

  def loss(x, scale, cos, sin):
    def layer(x, scale):
      run = functools.partial(named, heads=2, implementation=None)
      turn = jax.shard_map(
        lambda *args: run(args), mesh=mesh, check_vma=False,
        in_specs=(PartitionSpec('fsdp'), *(PartitionSpec(),) * 3), out_specs=PartitionSpec('fsdp'),
      )  # fmt: skip
      return turn(x, scale, cos, sin).reshape(x.shape), None

    return jax.lax.scan(jax.checkpoint(layer), x, jnp.stack([scale] * 3))[0].sum()

  jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, scale, cos, sin)
  assert asked and not any(asked)
  asked.clear()
  jax.jit(jax.grad(loss, argnums=(1, 2, 3))).trace(x, scale, cos, sin)
  assert asked and all(asked)


def test_kernel_by_name_says_what_it_takes():
  for args, heads in ((operands(1, 64, 2), 2), (operands(1, 128, 2, hd=64), 2)):
    with pytest.raises(NotImplementedError, match='expected heads of 128 and 128 or more tokens'):
      named(args, heads, 'pallas_tpu')


def test_calls_that_make_no_sense_are_refused():
  x, scale, cos, sin, _ = operands(2, 8, 3, hd=4)
  cases = [
    ((x, scale[:4], cos, sin), 3, r'got \(2, 8, 12\) and \(4,\)'),
    ((x, scale, cos, sin), 4, 'D = 4 heads of even width'),
    ((x, scale, cos[:4], sin[:4]), 3, r'expected cos and sin \[8, 2\] or \[2, 8, 2\]'),
    ((x, scale, cos, sin.astype(jnp.bfloat16)), 3, 'float32, float32, bfloat16'),
    ((x.astype(jnp.float16), scale, cos, sin), 3, 'got float16'),
  ]
  for args, heads, message in cases:
    with pytest.raises(ConfigError, match=message):
      named(args, heads, None)
  with pytest.raises(ConfigError, match=r"\['pallas_tpu', 'xla'\], got 'triton'"):
    named((x, scale, cos, sin), 3, 'triton')


# The TPU compiler

CHIPS = ['v5p:2x2x1', 'v6e:2x2']
NAMES = {'forward': 'qk_norm_rope', 'backward': 'qk_norm_rope_backward'}


def compiled(topology, tokens, width, back=False, table='shared', dtype=jnp.bfloat16):
  """HLO of one call, or of its gradients, for one chip of a topology."""
  pytest.importorskip('libtpu')
  device = aot.tpu_devices(topology)[0]
  place = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
  pairs = (*([2] if table == 'own' else []), tokens, 64)
  specs = [place((2, tokens, width), dtype), place((width,), jnp.float32)]
  specs += [place(pairs, jnp.float32)] * 2

  def run(*args):
    out = named(args, width // 128, None)
    return jnp.square(out.astype(jnp.float32)).sum() if back else out

  run = jax.grad(run, argnums=(0, 1, 2, 3) if table == 'own' else (0, 1)) if back else run
  with aot.tracing_for(topology):
    lowered = jax.jit(run).lower(*specs)
    return aot.compile_for_tpu(lowered, exec_time_optimization_effort=-1.0).as_text()


def kernels_in(text):
  """(name, bytes of VMEM) of every Pallas kernel of a program."""
  lines = [line for line in text.splitlines() if '"tpu_custom_call"' in line]
  vmem = r'"used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)"'
  return [
    (re.search(r'qk_norm_rope(_backward)?', line).group(), int(re.search(vmem, line).group(1)))
    for line in lines
  ]


@pytest.mark.parametrize('topology', CHIPS)
def test_the_tpu_program_holds_the_kernels(topology):
  (name, _), = kernels_in(compiled(topology, 256, 256))  # fmt: skip
  assert name == 'qk_norm_rope'
  names = [name for name, _ in kernels_in(compiled(topology, 252, 384, back=True, table='own'))]
  assert sorted(names) == ['qk_norm_rope', 'qk_norm_rope_backward']


@pytest.mark.slow
@pytest.mark.parametrize('topology', CHIPS)
@pytest.mark.parametrize('width', [1536, 3072, 5120])
@pytest.mark.parametrize('tokens', [4096, 10240, 1000])
@pytest.mark.parametrize('table', ['shared', 'own'])
def test_the_kernels_compile(topology, tokens, width, table):
  for dtype in TOLERANCE if tokens == 1000 else (jnp.bfloat16,):
    found = kernels_in(compiled(topology, tokens, width, True, table, dtype))
    assert sorted(name for name, _ in found) == ['qk_norm_rope', 'qk_norm_rope_backward']
    assert all(vmem <= 15e6 for _, vmem in found)


@pytest.mark.parametrize(
  'axes, taken',
  [({'fsdp': 4}, True), ({'fsdp': 2, 'context': 2}, False), ({'fsdp': 2, 'tensor': 2}, False)],
)
def test_on_a_mesh_each_device_runs_its_own_samples(axes, taken):
  """Attention of a model: kernels where the mesh splits the batch alone, XLA's own elsewhere."""
  pytest.importorskip('libtpu')
  mesh_config = MeshConfig(**axes)
  devices = np.array(aot.tpu_devices('v5p:2x2x1'))
  names = ('replica', 'fsdp', 'context', 'tensor')
  mesh = Mesh(devices.reshape([getattr(mesh_config, name) for name in names]), names)
  graph, state = nnx.split(
    nnx.eval_shape(lambda: Attention(256, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
  )
  rotation = Rotation.of(np.random.default_rng(0).normal(size=(128, 64)))

  def loss(state, x):
    with activation_sharding(mesh, mesh_config.rules):
      return jnp.square(nnx.merge(graph, state)(x, rotation=rotation).astype(jnp.float32)).sum()

  place = functools.partial(NamedSharding, mesh)
  x = jax.ShapeDtypeStruct((8, 128, 256), jnp.bfloat16, sharding=place(PartitionSpec('fsdp')))
  state = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(PartitionSpec())), state
  )
  lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, x)
  text = aot.compile_for_tpu(lowered, exec_time_optimization_effort=-1.0).as_text()
  assert len(kernels_in(text)) == (4 if taken else 0)


@pytest.mark.parametrize('axes', [{'fsdp': 8}, {'fsdp': 2, 'context': 2, 'tensor': 2}])
@every_table
def test_eight_devices_give_the_gradients_of_one(axes, table):
  mesh_config = MeshConfig(**axes)
  names = ('replica', 'fsdp', 'context', 'tensor')
  mesh = Mesh(np.array(jax.devices()).reshape([getattr(mesh_config, n) for n in names]), names)
  graph, state = nnx.split(Attention(64, 4, dtype=jnp.float32, rngs=nnx.Rngs(0)))
  x, _, cos, sin, _ = operands(8, 12, 4, table, jnp.float32, hd=16)

  def loss(state, x, cos, sin):
    return jnp.square(nnx.merge(graph, state)(x, rotation=Rotation(cos, sin))).sum()

  def on_mesh(*args):
    with activation_sharding(mesh, mesh_config.rules):
      return loss(*args)

  expected = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(state, x, cos, sin)
  got = jax.jit(jax.grad(on_mesh, argnums=(0, 1, 2, 3)))(state, x, cos, sin)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, expected)
