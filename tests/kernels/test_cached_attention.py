"""Attention over a cache: kernels (interpreted) and XLA form against float32, and what the TPU and
GPU compilers make of them without either.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import relative_error
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, SingleDeviceSharding

from wallwm_jax.kernels.cached_attention import api, pallas_gpu, pallas_tpu, reference
from wallwm_jax.kernels.cached_attention.rows import Rows
from wallwm_jax.parallel import aot
from wallwm_jax.types import ConfigError

TOLERANCE = {jnp.bfloat16: 4e-3, jnp.float32: 1e-5}
KERNELS = {
  'tpu': functools.partial(pallas_tpu.cached_attention, interpret=True),
  # memory starts as NaN, copies of blocks are simulated
  'tpu, simulated': functools.partial(
    pallas_tpu.cached_attention, interpret=pltpu.InterpretParams()
  ),
  'gpu': functools.partial(pallas_gpu.cached_attention, interpret=True),
}
# The simulation is slow; against the reference it runs always.
SIMULATED = pytest.param('tpu, simulated', marks=pytest.mark.slow)
every_kernel = pytest.mark.parametrize('form', ['tpu', SIMULATED, 'gpu'])
every_form = pytest.mark.parametrize('form', ['tpu', SIMULATED, 'gpu', 'xla'])


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """The kernels run on a CPU."""
  for form, kernel in KERNELS.items():
    monkeypatch.setitem(api._BACKENDS, form, kernel)


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 128 slots: several of them, the last one in parts."""
  monkeypatch.setattr(pallas_tpu, '_CONFIG', pallas_tpu.Config(lanes=256, block=1, interleave=2))


@dataclasses.dataclass(frozen=True)
class Call:
  """Sizes of one call; lengths None: all slots, without a length."""

  batch: int = 1
  caches: int = 1
  steps: int = 4
  heads: int = 2
  group: int = 1
  dim: int = 128
  slots: int = 256
  layers: int | None = 2
  lengths: tuple[int, ...] | None = None
  latents: bool = False

  def draw(self, dtype=jnp.bfloat16, seed=0):
    """(q, k, v), keywords; what lies behind the lengths is NaN."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
      return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    wide = self.heads * self.dim
    stack = () if self.layers is None else (self.layers,)
    q = normal(self.batch, self.steps, self.heads * self.group, self.dim)
    k, v = (normal(*stack, self.caches, self.slots, wide) for _ in range(2))
    keywords = {} if self.layers is None else {'layer': jnp.int32(self.layers - 1)}
    if self.latents:
      keywords['latents'] = tuple(normal(self.batch, self.steps, wide) for _ in range(2))
    if self.lengths is not None:
      keywords['lengths'] = jnp.array(self.lengths, jnp.int32)
      behind = (np.arange(self.slots) >= np.array(self.lengths)[:, None])[..., None]
      k, v = (jnp.where(behind, jnp.nan, x) for x in (k, v))
    return (q, k, v), keywords


CALLS = {
  'actions': Call(steps=64, heads=4, slots=512, layers=3),
  'actions, one layer, D 64': Call(steps=16, heads=4, dim=64, layers=None),
  'actions, ragged': Call(batch=2, caches=2, steps=33, slots=500, lengths=(129, 500)),
  'part of a block': Call(steps=5, slots=200),
  'rollouts share a cache': Call(batch=4, steps=8, slots=300, lengths=(127,)),
  'nothing and one': Call(batch=4, caches=2, steps=2, lengths=(0, 1)),
  '1 latent': Call(batch=2, caches=2, steps=1, group=4, dim=256, latents=True, lengths=(0, 1)),
  '2 latents of 3 draws': Call(batch=3, steps=2, group=4, latents=True, lengths=(128,)),
  '8 latents': Call(batch=2, caches=2, steps=8, group=4, latents=True, lengths=(127, 129)),
  '16 latents, D 64': Call(steps=16, group=4, dim=64, latents=True),
  '32 latents': Call(steps=32, heads=1, group=4, slots=130, latents=True, lengths=(130,)),
}
every_call = pytest.mark.parametrize('call', CALLS.values(), ids=list(CALLS))


def run(form, operands, keywords):
  attend = functools.partial(api.cached_attention, implementation=form)
  return jax.jit(attend)(*operands, **keywords)


def exact(operands, keywords):
  """The reference on the same rounded operands, not rounded at the end."""
  rise = functools.partial(jax.tree.map, lambda x: x if x.dtype == jnp.int32 else x.astype('f4'))
  return reference.cached_attention(*rise(operands), **rise(keywords))


# Numbers


@pytest.mark.parametrize('form', [*KERNELS, 'xla'])
@every_call
def test_matches_the_reference(form, call, small_blocks):
  operands, keywords = call.draw()
  got, want = run(form, operands, keywords), exact(operands, keywords)
  assert got.shape == operands[0].shape and got.dtype == jnp.bfloat16
  error = relative_error(got, want)
  assert error <= TOLERANCE[jnp.bfloat16]
  if form != 'xla':
    assert error <= 1.5 * relative_error(run('xla', operands, keywords), want)


@every_form
@pytest.mark.parametrize('name', ['actions, ragged', '8 latents'])
def test_float32_is_not_rounded(form, name, small_blocks):
  operands, keywords = CALLS[name].draw(jnp.float32)
  got = run(form, operands, keywords)
  assert relative_error(got, exact(operands, keywords)) <= TOLERANCE[jnp.float32]


@every_form
def test_a_query_that_sees_nothing_gets_zero(form, small_blocks):
  operands, keywords = CALLS['nothing and one'].draw()
  got = np.asarray(run(form, operands, keywords), np.float32)
  assert not np.any(got[:2])
  first = np.asarray(operands[2][-1, 1, 0], np.float32).reshape(2, 128)
  np.testing.assert_array_equal(got[2:], np.broadcast_to(first, got[2:].shape))


@pytest.mark.parametrize('form', ['tpu', 'xla'])
@pytest.mark.parametrize('seed', range(4))
def test_drawn_sizes(form, seed, small_blocks):
  rng = np.random.default_rng(seed)
  caches, draws, latents = rng.integers(1, 3), rng.integers(1, 4), bool(rng.integers(2))
  slots = int(rng.integers(1, 400))
  call = Call(
    batch=caches * draws, caches=caches, steps=int(rng.integers(1, 20)), heads=3, slots=slots,
    group=int(rng.choice([1, 2, 4])), dim=int(rng.choice([64, 128])), latents=latents,
    lengths=tuple(rng.integers(0, slots + 1, caches).tolist()),
  )  # fmt: skip
  operands, keywords = call.draw(seed=seed)
  error = relative_error(run(form, operands, keywords), exact(operands, keywords))
  assert error <= TOLERANCE[jnp.bfloat16], call


@every_kernel
def test_repeats_bit_by_bit(form, small_blocks):
  operands, keywords = CALLS['8 latents'].draw()
  first = run(form, operands, keywords)
  np.testing.assert_array_equal(first, run(form, operands, keywords))


@every_kernel
def test_no_row_is_touched_by_the_cache_of_another(form, small_blocks):
  operands, keywords = CALLS['8 latents'].draw()
  (q, k, v), clean = operands, run(form, operands, keywords)
  other = run(form, (q, k.at[:, 1].set(jnp.nan), v), keywords)
  np.testing.assert_array_equal(other[0], clean[0])
  assert np.isnan(np.asarray(other[1], np.float32)).all()
  elsewhere = run(form, (q, k.at[0].set(jnp.nan), v.at[0].set(jnp.nan)), keywords)
  np.testing.assert_array_equal(elsewhere, clean)  # another layer


# int8


@every_form
@pytest.mark.parametrize('name', ['actions, ragged', '8 latents'])
def test_int8_keys_and_values(form, name, small_blocks):
  (q, k, v), keywords = CALLS[name].draw()
  channels = 4.0 ** np.random.default_rng(1).standard_normal(k.shape[-1])
  k, v = ((x * channels).astype(x.dtype) for x in (k, v))
  q, keywords['latents'] = q / 4, keywords.get('latents')
  (k8, k_scale), (v8, v_scale) = (api.quantise(x, keywords['lengths']) for x in (k, v))
  assert k8.dtype == jnp.int8 and k_scale.shape == (*k.shape[:-2], k.shape[-1])
  got = run(form, (q, k8, v8), keywords | {'scales': (k_scale, v_scale)})
  back = [x.astype(jnp.float32) * s[..., None, :] for x, s in ((k8, k_scale), (v8, v_scale))]
  assert relative_error(got, exact((q, *back), keywords)) <= 5e-3
  assert relative_error(got, exact((q, k, v), keywords)) <= 1.5e-2


def test_quantise_uses_all_of_int8_and_only_what_is_there():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 50, 7)), jnp.float32)
  x = x.at[:, :, :, 3].set(0.0)
  lengths = jnp.array([50, 20, 1])
  poisoned = jnp.where((jnp.arange(50) < lengths[:, None])[..., None], x, jnp.nan)
  values, scale = api.quantise(poisoned, lengths)
  for b, n in enumerate((50, 20, 1)):
    seen = np.asarray(values[:, b, :n], np.float32)
    assert (np.abs(seen[..., [0, 1, 2, 4, 5, 6]]).max(-2) == 127).all()
    apart = np.abs(seen * scale[:, b, None] - x[:, b, :n])
    assert (apart <= 0.5001 * np.asarray(scale[:, b, None])).all()
  assert (scale[..., 3] == 1).all() and not np.any(values[:, 0, :, 3])


# Gradients: the staircase is trained through its cache


@every_kernel
def test_gradients_are_those_of_the_xla_form(form, small_blocks):
  call = dataclasses.replace(CALLS['8 latents'], slots=140, heads=1, lengths=(140, 9))
  operands, keywords = call.draw(jnp.float32)
  operands = jax.tree.map(jnp.nan_to_num, operands)

  def loss(form, operands, latents):
    return jnp.sum(jnp.sin(run(form, operands, keywords | {'latents': latents})))

  grads = [jax.grad(loss, (1, 2))(f, operands, keywords['latents']) for f in (form, 'xla')]
  for got, want in zip(*map(jax.tree.leaves, grads), strict=True):
    assert np.any(want) and relative_error(got, want) <= 1e-5


# Mutations: the checks above see a broken kernel


def test_wrong_results_are_out_of_tolerance(small_blocks, monkeypatch):
  operands, keywords = CALLS['8 latents'].draw()
  q, k, v = jax.tree.map(jnp.nan_to_num, operands)
  want = exact((q, k, v), keywords)
  lengths = keywords['lengths']
  wrong = {
    'one slot too few': ((q, k, v), {'lengths': lengths - 1}),
    'a layer below': ((q, k, v), {'layer': jnp.int32(0)}),
    'queries of another group': ((jnp.roll(q, 1, 2), k, v), {}),
    'values one slot on': ((q, k, jnp.roll(v, 1, 2)), {}),
    'no latents': ((q, k, v), {'latents': None}),
  }  # fmt: skip
  assert relative_error(run('tpu', (q, k, v), keywords), want) <= TOLERANCE[jnp.bfloat16]
  for name, (operands, change) in wrong.items():
    error = relative_error(run('tpu', operands, keywords | change), want)
    assert error > 5 * TOLERANCE[jnp.bfloat16], name
  visible = Rows.visible
  for shift in (-1, 1):  # not itself; one token ahead
    monkeypatch.setattr(Rows, 'visible', lambda rows, s=shift: np.roll(visible(rows), s, 1))
    jax.clear_caches()
    error = relative_error(run('tpu', (q, k, v), keywords), want)
    assert error > 5 * TOLERANCE[jnp.bfloat16], shift


# Entry point


def test_none_is_xla_off_tpu():
  operands, keywords = Call(latents=True).draw()
  rows = Rows.of(*operands[:2])
  assert pallas_tpu.supports(rows, *operands[:2])
  got = run(None, operands, keywords)
  np.testing.assert_array_equal(got, run('xla', operands, keywords))


def test_several_devices_are_left_to_xla():
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in Call(layers=None).draw()[0]]

  def text():
    trace = jax.jit(lambda *x: api.cached_attention(*x)).trace(*shapes)
    return trace.lower(lowering_platforms=('tpu',)).as_text()

  assert 'tpu_custom_call' in text()
  mesh = jax.sharding.AbstractMesh((2,), ('fsdp',), (AxisType.Auto,))
  with jax.sharding.use_abstract_mesh(mesh):
    assert 'tpu_custom_call' not in text()


def test_kernels_by_name_say_what_they_take():
  wide = Call(steps=257).draw()[0]
  odd = Call(dim=96, layers=None).draw()[0]
  for name, operands, message in (
    ('pallas_tpu', odd, r'multiple of 128.*heads of 96'),
    ('pallas_tpu', Call().draw(jnp.float32)[0], r'bfloat16 queries.*got float32'),
    ('pallas_tpu', wide, r'at most 256 rows.*257'),
    ('pallas_gpu', odd, r'power of two.*got 96'),
    ('pallas_gpu', wide, r'at most 128 rows.*257'),
  ):
    layer = None if operands[1].ndim == 3 else 0
    with pytest.raises(NotImplementedError, match=message):
      api.cached_attention(*operands, layer=layer, implementation=name)


def test_calls_that_make_no_sense_are_refused():
  (q, k, v), keywords = Call(batch=4, caches=2, layers=None).draw()
  for operands, change, message in (
    ((q, k, v[:, :5]), {}, r'expected q \[B, S, Hq, D\] and k, v \[Bk, N, Hkv \* D\].*\(2, 5, 256'),
    ((q, k, v), {'layer': 0}, r'\[L, Bk, N, Hkv \* D\] \(with a layer\)'),
    ((q[:3], k, v), {}, r'Bk a divisor of B.*\(3, 4, 2, 128\)'),
    ((q[:, :, :1], k, v), {}, r'Hkv of Hq'),
    ((q, k.astype('f4'), v.astype('f4')), {}, r'dtype of q \(bfloat16\).*float32 without scales'),
    ((q, k, v), {'scales': (jnp.ones((2, 256)),) * 2}, r'int8 with scales, got bfloat16 with'),
    ((q, k, v), {'lengths': jnp.ones(4, jnp.int32)}, r'integer lengths \[2\], got int32 \[4\]'),
    ((q, k, v), {'lengths': jnp.ones(2)}, r'integer lengths \[2\], got float32'),
    ((q, k, v), {'latents': (k[:, :4], v[:, :4])}, r'latents \[4, 4, 256\] bfloat16, got \[2, 4'),
    ((q, k, v), {'implementation': 'cudnn'}, r"expected None or one of .*got 'cudnn'"),
  ):
    with pytest.raises(ConfigError, match=message):
      api.cached_attention(*operands, **keywords | change)


# Compilers

VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)"')
CHIPS = ['v5p:2x2x1', 'v6e:2x2']
ACTIONS = [(n, rows) for n in (1024, 2048, 4096, 8192, 10240) for rows in (16, 32, 64, 128)]
STAIRCASE = [(n, latents) for n in (1024, 4096) for latents in (1, 8, 16, 32)]


def actions(slots, rows, dtype=jnp.bfloat16):
  """Specs of a call at the sizes of the 5B model."""
  spec = jax.ShapeDtypeStruct
  cache = spec((2, 1, slots, 24 * 128), dtype)
  scale = spec((2, 1, 24 * 128), jnp.float32)
  keywords = {'lengths': spec((1,), jnp.int32), 'layer': spec((), jnp.int32)}
  if dtype == jnp.int8:
    keywords['scales'] = (scale, scale)
  return (spec((1, rows, 24, 128), jnp.bfloat16), cache, cache), keywords


def latents(slots, count):
  """Specs of a call at the sizes of the 9B language model."""
  spec = jax.ShapeDtypeStruct
  cache, new = (spec((*lead, 4 * 256), jnp.bfloat16) for lead in ((2, 1, slots), (1, count)))
  keywords = {'lengths': spec((1,), jnp.int32), 'layer': spec((), jnp.int32)}
  return (spec((1, count, 16, 256), jnp.bfloat16), cache, cache), keywords | {'latents': (new, new)}


def check_compiles(topology, calls):
  """Compiles all calls in one program for one chip: each is one kernel of at most 15 MiB."""
  pytest.importorskip('libtpu')
  device = aot.tpu_devices(topology)[0]
  place = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
  calls = jax.tree.map(lambda x: place(x.shape, x.dtype), calls)
  with aot.tracing_for(topology):
    lowered = jax.jit(lambda calls: [api.cached_attention(*x, **y) for x, y in calls]).lower(calls)
    text = aot.compile_for_tpu(lowered, exec_time_optimization_effort=-1.0).as_text()
  kernels = [line for line in text.splitlines() if '"tpu_custom_call"' in line]
  assert len(kernels) == len(calls)
  for line in kernels:
    assert int(VMEM.search(line).group(1)) <= 15 * 2**20, line[:200]


@pytest.mark.parametrize('topology', CHIPS)
def test_the_tpu_program_holds_the_kernel(topology):
  check_compiles(topology, [actions(1024, 16), latents(1024, 1), actions(1024, 16, jnp.int8)])


@pytest.mark.slow
@pytest.mark.parametrize('topology', CHIPS)
@pytest.mark.parametrize('part', range(4))
def test_every_size_compiles(topology, part):
  calls = [
    *(actions(*size) for size in ACTIONS),
    *(actions(*size, jnp.int8) for size in ACTIONS[::3]),
    *(latents(*size) for size in STAIRCASE),
  ]
  check_compiles(topology, calls[part::4])


@pytest.mark.parametrize('call', [
  actions(4096, 64), actions(4096, 64, jnp.int8), latents(4096, 16), latents(1024, 1),
])  # fmt: skip
def test_the_gpu_kernel_lowers(call):
  operands, keywords = call
  attend = functools.partial(api.cached_attention, implementation='pallas_gpu')
  lowered = jax.jit(attend).trace(*operands, **keywords).lower(lowering_platforms=('cuda',))
  assert '__gpu$xla.gpu.triton' in lowered.as_text()
