"""The symmetric product: TPU kernel (interpreted) and XLA form against float32, and what the TPU
compiler makes of them without a TPU.
"""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import relative_error
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from wallwm_jax.kernels.syrk import api, pallas_tpu, reference
from wallwm_jax.parallel import aot
from wallwm_jax.types import ConfigError

# bfloat16 rounds to 3 significant digits: 1.7e-3 in the relative L2 norm
TOLERANCE = {jnp.bfloat16: 4e-3, jnp.float32: 1e-5}
# Two cores at once, memory that starts as NaN, and a report of every race between them.
TWO_CORES = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True)


@pytest.fixture
def small_blocks(monkeypatch):
  """128-wide blocks in steps of 256: programs of many blocks, interpreted in a second."""
  monkeypatch.setattr(pallas_tpu, '_BLOCKS', ((128,), pallas_tpu._BLOCKS[1]))
  monkeypatch.setattr(pallas_tpu, '_MIN_STEP', 256)


def kernel(a, b, c=None, alpha=1.0, beta=0.0, interpret=True):
  alpha, beta = (api._per_matrix(x, a) for x in (alpha, beta))
  return pallas_tpu.syrk(a, b, c, alpha, beta, interpret=interpret)


def xla_form(a, b, c=None, alpha=1.0, beta=0.0):
  return api.syrk(a, b, c, alpha=alpha, beta=beta, implementation='xla')


def exact(a, b, c=None, alpha=1.0, beta=0.0):
  """The reference on the same rounded operands, not rounded at the end."""
  operands = [None if x is None else x.astype(jnp.float32) for x in (a, b, c)]
  return reference.syrk(*operands, alpha, beta)


FORMS = {'kernel': kernel, 'xla': xla_form}
every_form = pytest.mark.parametrize('form', FORMS)


def normal(seed, *shape, dtype=jnp.bfloat16):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def symmetric(seed, *shape, dtype=jnp.bfloat16):
  x = np.random.default_rng(seed).normal(size=(*shape, shape[-1]))
  return jnp.asarray(x + x.swapaxes(-1, -2), dtype)


def in_blocks(x):
  """[m, m] as [m / 128, m / 128, 128, 128], a writable copy."""
  return np.array(x).reshape(len(x) // 128, 128, -1, 128).swapaxes(1, 2)


def check(form, *args, **factors):
  got = FORMS[form](*args, **factors)
  assert got.dtype == args[0].dtype
  assert relative_error(got, exact(*args, **factors)) <= TOLERANCE[got.dtype.type]
  return got


# Numbers


EVERY_BLOCK = [
  (side, vmem) for sides, vmem in (pallas_tpu._BLOCKS, pallas_tpu._BLOCKS_V6) for side in sides
]


@pytest.mark.slow
@pytest.mark.parametrize('side, vmem', EVERY_BLOCK)
def test_kernel_with_every_block_size(side, vmem, monkeypatch):
  monkeypatch.setattr(pallas_tpu, '_BLOCKS', ((side,), vmem))
  m, k = pallas_tpu._MIN_BLOCKS * side, 2 * side
  a, c = normal(0, m, k), symmetric(1, m)
  assert pallas_tpu._tiles(m, k, epilogue=True)[0] == side
  check('kernel', a, a, c, alpha=0.5, beta=-2.0)


@every_form
@pytest.mark.parametrize('m, k', [(384, 512), (512, 1536), (640, 2560), (896, 512)])
def test_matches_the_reference(form, m, k, small_blocks):
  a, c = normal(0, m, k), symmetric(1, m)
  plain = check(form, a, a)
  with_c = check(form, a, a, c, alpha=0.7, beta=-1.3)
  for out in (plain, with_c):
    np.testing.assert_array_equal(out, out.T)


@pytest.mark.parametrize('m, k', [(5, 7), (64, 300), (300, 64)])
def test_float32_is_not_rounded(m, k):
  a, c = normal(2, m, k, dtype=jnp.float32), symmetric(3, m, dtype=jnp.float32)
  check('xla', a, a)
  check('xla', a, a, c, alpha=0.7, beta=-1.3)
  np.testing.assert_array_equal(
    xla_form(a, a, c, 0.7, -1.3), api.syrk(a, a, c, alpha=0.7, beta=-1.3)
  )


@every_form
@pytest.mark.parametrize('lead', [(3,), (2, 2)])
def test_leading_axes_with_factors_of_their_own(form, lead, small_blocks):
  a, c = normal(4, *lead, 384, 512), symmetric(5, *lead, 384)
  alpha, beta = (
    jnp.asarray(np.random.default_rng(s).uniform(0.5, 2.0, (*lead, 1, 1)), jnp.float32)
    for s in (6, 7)
  )
  check(form, a, a)
  batched = check(form, a, a, c, alpha=alpha, beta=beta)
  for i in np.ndindex(*lead):
    alone = FORMS[form](a[i], a[i], c[i], alpha[i], beta[i])
    if form == 'kernel':  # XLA may sum a batch in another order
      np.testing.assert_array_equal(batched[i], alone)
    assert relative_error(batched[i], exact(a[i], a[i], c[i], alpha[i], beta[i])) <= 4e-3


@every_form
def test_two_polynomials_of_one_matrix(form, small_blocks):
  s = symmetric(8, 512, dtype=jnp.float32) / 40
  p, q = (x.astype(jnp.bfloat16) for x in (s @ s + 0.5 * s, s - 2 * jnp.eye(512)))
  c = symmetric(9, 512)
  assert relative_error(exact(p, q), exact(p, p)) > 0.1  # really two factors
  check(form, p, q)
  check(form, p, q, c, alpha=1.5, beta=0.25)
  blocks, below = in_blocks(kernel(p, q)), np.tril_indices(4, -1)
  np.testing.assert_array_equal(blocks[below], blocks[below[::-1]].swapaxes(-1, -2))


def test_kernel_is_no_worse_than_xla(small_blocks):
  a = normal(10, 768, 2048)
  errors = {form: relative_error(f(a, a), exact(a, a)) for form, f in FORMS.items()}
  assert errors['kernel'] <= 1.05 * errors['xla']


@every_form
def test_nan_stays_in_its_matrix(form, small_blocks):
  a, c = normal(11, 3, 384, 512), symmetric(12, 3, 384)
  clean = FORMS[form](a, a, c, 0.5, 0.5)
  for poisoned in ((a.at[1, 200, 300].set(jnp.nan), c), (a, c.at[1, 7, 7].set(jnp.nan))):
    out = FORMS[form](poisoned[0], poisoned[0], poisoned[1], 0.5, 0.5)
    assert np.isnan(np.asarray(out[1], np.float32)).any()
    np.testing.assert_array_equal(out[::2], clean[::2])


@every_form
def test_repeats_bit_by_bit(form, small_blocks):
  a, c = normal(13, 640, 768), symmetric(14, 640)
  first = FORMS[form](a, a, c, 0.5, 0.5)
  np.testing.assert_array_equal(first, FORMS[form](a, a, c, 0.5, 0.5))


@pytest.mark.parametrize('blocks', [3, 4, 5])  # 5: one list is padded
def test_two_cores_at_once_write_everything_and_do_not_race(blocks, small_blocks, capfd):
  a, c = normal(15, 128 * blocks, 768), symmetric(16, 128 * blocks)
  out = kernel(a, a, c, 0.5, -0.5, interpret=TWO_CORES)
  assert np.isfinite(np.asarray(out, np.float32)).all()
  np.testing.assert_array_equal(out, kernel(a, a, c, 0.5, -0.5))
  assert 'RACE DETECTED' not in capfd.readouterr().out


# Mutations: the checks above see a broken kernel


def test_a_block_that_is_not_written_shows(small_blocks, monkeypatch):
  pairs = pallas_tpu._pairs
  a = normal(17, 512, 512)

  def forgetful(blocks):
    changed = pairs(blocks).copy()
    changed[:, 0] = changed[:, -1]  # an off-diagonal pair gives way to one done already
    return changed

  monkeypatch.setattr(pallas_tpu, '_pairs', forgetful)
  for interpret in (True, TWO_CORES):
    out = np.asarray(kernel(a, a, interpret=interpret), np.float32)
    assert np.isnan(out).sum() == 2 * 128 * 128


def test_a_list_that_does_not_end_on_the_diagonal_shows(small_blocks, monkeypatch):
  pairs = pallas_tpu._pairs
  monkeypatch.setattr(pallas_tpu, '_pairs', lambda blocks: pairs(blocks)[:, ::-1].copy())
  a = normal(18, 512, 512)
  assert not np.isfinite(np.asarray(kernel(a, a), np.float32)).all()


def test_cores_that_write_the_same_blocks_are_a_race(small_blocks, monkeypatch, capfd):
  pairs = pallas_tpu._pairs

  def same(blocks):
    first = pairs(blocks)[:, : pairs(blocks).shape[1] // 2]
    return np.concatenate([first, first], 1)

  monkeypatch.setattr(pallas_tpu, '_pairs', same)
  a = normal(19, 512, 512)
  kernel(a, a, interpret=TWO_CORES)
  assert 'RACE DETECTED' in capfd.readouterr().out


def test_wrong_results_are_out_of_tolerance(small_blocks):
  a, c = normal(20, 512, 512), symmetric(21, 512)
  got, expected = kernel(a, a, c, 0.7, 1.3), exact(a, a, c, 0.7, 1.3)
  above = np.triu_indices(4, 1)
  no_mirror, not_transposed = in_blocks(got), in_blocks(got)
  no_mirror[above] = 0
  not_transposed[above] = not_transposed[above[::-1]]
  wrong = {
    'no beta': exact(a, a, c, 0.7, 0.0),
    'no alpha': exact(a, a, c, 1.0, 1.3),
    'c of another block': exact(a, a, jnp.roll(c, 128, 0), 0.7, 1.3),
    'a step along k left out': exact(a[:, 256:], a[:, 256:], c, 0.7, 1.3),
    'no mirror': no_mirror,
    'mirror not transposed': not_transposed,
  }
  assert relative_error(in_blocks(got), in_blocks(expected)) <= TOLERANCE[jnp.bfloat16]
  for name, other in wrong.items():
    other = in_blocks(other) if other.ndim == 2 else other
    assert relative_error(other, in_blocks(expected)) > 10 * TOLERANCE[jnp.bfloat16], name


# Plans of the kernel


@pytest.mark.parametrize('blocks', range(3, 21))
def test_block_pairs_cover_the_lower_triangle_once(blocks):
  rows, cols = pallas_tpu._pairs(blocks)
  assert len(rows) == len(cols) and len(rows) % pallas_tpu._CORES == 0
  lists = np.stack([rows, cols], 1).reshape(pallas_tpu._CORES, -1, 2)
  count = collections.Counter(map(tuple, lists.reshape(-1, 2).tolist()))
  assert set(count) == {(i, j) for i in range(blocks) for j in range(i + 1)}
  assert all(n == 1 for (i, j), n in count.items() if i != j)
  assert count.total() - len(count) < pallas_tpu._CORES  # padding
  for mine in lists:
    assert mine[-1, 0] == mine[-1, 1]


@pytest.mark.parametrize('name, xla_gives', [('_BLOCKS', 16 * 2**20), ('_BLOCKS_V6', 32 * 2**20)])
def test_tiles_divide_and_fit(name, xla_gives, monkeypatch):
  sides, vmem = getattr(pallas_tpu, name)
  monkeypatch.setattr(pallas_tpu, '_BLOCKS', (sides, vmem))
  taken = set()
  for m in range(512, 8193, 128):
    for k in (512, 1024, 1536, 3072, 5120, 8960, 12032, 13824, 14336):
      for epilogue in (False, True):
        tiles = pallas_tpu._tiles(m, k, epilogue=epilogue)
        if tiles is None:
          continue
        side, step = tiles
        assert side in sides and m % side == 0 and m // side >= pallas_tpu._MIN_BLOCKS
        assert k >= 2 * side and k % step == 0 and k // step >= 2 and step % 128 == 0
        assert pallas_tpu._MIN_STEP <= step <= pallas_tpu._MAX_STEP
        # two float32 sums; two buffers of the result, of both factors and of c; all bfloat16
        held = 2 * 4 * side**2 + 2 * 2 * (side**2 * (1 + epilogue) + 2 * side * step)
        assert held <= vmem < xla_gives
        taken.add(side)
  assert taken == set(sides)


def takes(*shape, dtype=jnp.bfloat16):
  return pallas_tpu.supports(jax.ShapeDtypeStruct(shape, dtype))


def test_what_the_kernel_takes():
  for shape in ((3072, 3072), (3072, 14336), (30, 2048, 2048), (2, 3, 1536, 1024)):
    assert takes(*shape), shape
  assert not takes(3072, 3072, dtype=jnp.float32)
  assert not takes(1024, 4096)  # too few blocks to skip a triangle
  assert not takes(1536, 512)  # too short a sum
  assert not takes(3000, 3072) and not takes(3072, 3000)
  assert not takes(2560, 12032)  # 47 steps of 256


# Entry point


def test_none_is_xla_off_tpu():
  a, c = normal(22, 1536, 1024), symmetric(23, 1536)
  assert pallas_tpu.supports(a)
  np.testing.assert_array_equal(api.syrk(a, a, c, alpha=0.5, beta=2.0), xla_form(a, a, c, 0.5, 2.0))


def test_kernel_by_name_says_what_it_takes():
  for a in (normal(24, 512, 512), normal(25, 3072, 512, dtype=jnp.float32)):
    with pytest.raises(
      NotImplementedError, match=rf'expected bfloat16.*512 to 1280, got \({len(a)}, 512\)'
    ):
      api.syrk(a, a, implementation='pallas_tpu')


def test_calls_that_make_no_sense_are_refused():
  a = normal(26, 2, 6, 4)
  c = symmetric(27, 2, 6)
  cases = [
    ((a, a[:, :5]), {}, r'expected two factors.*got \(2, 6, 4\) bfloat16 and \(2, 5, 4\)'),
    ((a, a.astype(jnp.float32)), {}, r'one shape and dtype.*\(2, 6, 4\) float32'),
    ((a[0, 0], a[0, 0]), {}, r'got \(4,\)'),
    ((a, a, c[0]), {}, r'expected c \(2, 6, 6\) bfloat16, got \(6, 6\)'),
    (
      (a, a, c.astype(jnp.float32)),
      {},
      r'expected c \(2, 6, 6\) bfloat16, got \(2, 6, 6\) float32',
    ),
    ((a, a), {'implementation': 'cublas'}, r"\['pallas_tpu', 'xla'\], got 'cublas'"),
  ]
  for args, options, message in cases:
    with pytest.raises(ConfigError, match=message):
      api.syrk(*args, **options)


# The TPU compiler

CHIPS = ['v5p:2x2x1', 'v6e:2x2']
BOTH = [(3072, 3072), (5120, 5120), (3072, 14336), (5120, 13824)]
V5P_ONLY = [(1536, 1536), (2048, 2048), (1536, 8960)]  # loses to XLA on the larger MXUs


def compiled(topology, shape, epilogue=True, dtype=jnp.bfloat16):
  """HLO of `api.syrk` for one chip of a topology."""
  pytest.importorskip('libtpu')
  sharding = SingleDeviceSharding(aot.tpu_devices(topology)[0])

  def spec(shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def run(a, c, alpha, beta):
    return api.syrk(a, a, c if epilogue else None, alpha=alpha, beta=beta)

  *lead, m, _ = shape
  scale = spec((*lead, 1, 1), jnp.float32)
  with aot.tracing_for(topology):
    lowered = jax.jit(run).lower(spec(shape), spec((*lead, m, m)), scale, scale)
    return aot.compile_for_tpu(lowered, exec_time_optimization_effort=-1.0).as_text()


def kernels_in(text):
  """Names of the Pallas kernels in a program, e.g. syrk_3072x3072_c."""
  return re.findall(r'%\S*?(syrk_\d+x\d+(?:_c)?)\S* = .*"tpu_custom_call"', text)


def test_the_chip_decides():
  pytest.importorskip('libtpu')
  with aot.tracing_for('v5p:2x2x1'):
    assert takes(3072, 3072) and all(takes(*shape) for shape in V5P_ONLY)
  with aot.tracing_for('v6e:2x2'):
    assert takes(3072, 3072) and not any(takes(*shape) for shape in V5P_ONLY)


@pytest.mark.parametrize('topology, taken', [('v5p:2x2x1', True), ('v6e:2x2', False)])
def test_inside_shard_map_it_is_the_chip_of_the_mesh(topology, taken):
  pytest.importorskip('libtpu')
  mesh = Mesh(np.array(aot.tpu_devices(topology)), ('fsdp',))
  sharding = NamedSharding(mesh, P('fsdp'))
  specs = {'in_specs': P('fsdp'), 'out_specs': P('fsdp')}
  run = jax.shard_map(lambda a: api.syrk(a, a), mesh=mesh, check_vma=False, **specs)
  a = jax.ShapeDtypeStruct((mesh.size, 2048, 2048), jnp.bfloat16, sharding=sharding)
  text = jax.jit(run).trace(a).lower(lowering_platforms=('tpu',)).as_text()
  assert ('tpu_custom_call' in text) == taken


def test_the_tpu_program_holds_the_kernel():
  assert kernels_in(compiled('v5p:2x2x1', (2048, 2048))) == ['syrk_2048x2048_c']


@pytest.mark.slow
@pytest.mark.parametrize('topology', CHIPS)
@pytest.mark.parametrize(
  'shape, epilogue',
  [
    *((shape, True) for shape in [*BOTH, *V5P_ONLY, (3, 3072, 3072)]),
    ((3072, 14336), False),
    ((2, 3, 4096, 5120), False),
  ],
)
def test_the_kernel_compiles(topology, shape, epilogue):
  name = f'syrk_{shape[-2]}x{shape[-1]}' + ('_c' if epilogue else '')
  taken = topology == 'v5p:2x2x1' or shape not in V5P_ONLY
  assert kernels_in(compiled(topology, shape, epilogue)) == ([name] if taken else [])


@pytest.mark.slow
@pytest.mark.parametrize(
  'shape, dtype',
  [((1024, 1024), jnp.bfloat16), ((3000, 3072), jnp.bfloat16), ((1536, 1536), jnp.float32)],
)
def test_other_sizes_are_left_to_xla(shape, dtype):
  assert not kernels_in(compiled('v5p:2x2x1', shape, dtype=dtype))
