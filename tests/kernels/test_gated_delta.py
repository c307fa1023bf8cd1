"""The gated delta rule: TPU kernel (interpreted) and XLA form against the recurrence, and what the
TPU compiler makes of them without a TPU.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import relative_error
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from wallwm_jax.kernels.gated_delta import api, pallas_tpu, reference, xla
from wallwm_jax.parallel import aot
from wallwm_jax.types import ConfigError

TOLERANCE = {jnp.bfloat16: 1e-2, jnp.float32: 1e-5}
# Two cores at once, memory that starts as NaN, and a report of every race between them.
TWO_CORES = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True)


def inputs(
  seed, tokens, heads=(2, 4), dims=(128, 128), batch=1, dtype=jnp.bfloat16, decays=(-6, 0)
):
  """q, k, v, g, beta, state; g = -exp of uniform numbers between `decays`."""
  rng = np.random.default_rng(seed)
  (hk, hv), (dk, dv) = heads, dims
  q, k = (rng.standard_normal((batch, tokens, hk, dk)) for _ in range(2))
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  v = rng.standard_normal((batch, tokens, hv, dv))
  g = -np.exp(rng.uniform(*decays, (batch, tokens, hv)))
  beta = rng.uniform(0, 1, (batch, tokens, hv))
  state = rng.standard_normal((batch, hv, dk, dv))
  wide = (jnp.asarray(x, jnp.float32) for x in (g, beta, state))
  return [*(jnp.asarray(x, dtype) for x in (q * dk**-0.5, k, v)), *wide]


def equal_keys(tokens, dtype=jnp.bfloat16, forget=False):
  """All keys equal; unless `forget`, beta = 1 and g = 0 too."""
  q, k, v, g, beta, state = inputs(tokens, tokens, dtype=dtype)
  k = jnp.broadcast_to(k[:, :1], k.shape)
  if not forget:
    g, beta = jnp.zeros_like(g), jnp.ones_like(beta)
  return [q, k, v, g, beta, state]


def wide(args):
  return [x.astype(jnp.float32) for x in args]


def kernel(*args, interpret=True):
  """As `api` hands the work over."""
  q, k, v, g, beta, state = args
  g = jnp.maximum(g, api._LEAST_DECAY)
  return jax.jit(functools.partial(pallas_tpu.gated_delta, interpret=interpret))(
    q, k, v, g, beta, state
  )


def xla_form(*args):
  return jax.jit(functools.partial(api.gated_delta, implementation='xla'))(*args)


recurrence = jax.jit(reference.gated_delta)
FORMS = {'kernel': kernel, 'xla': xla_form}
every_form = pytest.mark.parametrize('form', FORMS)


def check(form, args, tolerance=None, **options):
  tolerance = tolerance or TOLERANCE[args[2].dtype.type]
  got, expected = FORMS[form](*args, **options), recurrence(*wide(args))
  assert got[0].dtype == args[2].dtype and got[1].dtype == jnp.float32
  for x, y in zip(got, expected, strict=True):
    assert x.shape == y.shape
    assert relative_error(x, y) <= tolerance
  return got


# Numbers


def in_double(q, k, v, g, beta, state):
  q, k, v, g, beta, state = (np.asarray(x, np.float64) for x in (q, k, v, g, beta, state))
  state, out = state.copy(), np.zeros(v.shape)
  shared = v.shape[2] // k.shape[2]
  for b, t, h in np.ndindex(*g.shape):
    key, query = k[b, t, h // shared], q[b, t, h // shared]
    s = state[b, h] * np.exp(g[b, t, h])
    s = s + beta[b, t, h] * np.outer(key, v[b, t, h] - s.T @ key)
    state[b, h], out[b, t, h] = s, s.T @ query
  return out, state


@pytest.mark.parametrize(('tokens', 'chunk'), [(1, 64), (17, 64), (64, 64), (70, 32), (131, 64)])
@pytest.mark.parametrize('heads', [(3, 3), (2, 4)])
def test_chunks_compute_the_recurrence(tokens, chunk, heads):
  args = inputs(tokens, tokens, heads, (6, 5), batch=2, dtype=jnp.float32, decays=(-6, 3))
  want = in_double(*args)
  by_chunks = functools.partial(xla.gated_delta, chunk=chunk)
  for rule in (reference.gated_delta, by_chunks):
    for got, expected in zip(jax.jit(rule)(*args), want, strict=True):
      assert relative_error(got, expected) <= 5e-6

  def loss(rule, args):
    out, state = rule(*args)
    return (out**2).sum() + jnp.sin(state).sum()

  slow, fast = (
    jax.jit(jax.grad(functools.partial(loss, rule)))(args)
    for rule in (reference.gated_delta, by_chunks)
  )
  for a, b in zip(fast, slow, strict=True):
    assert relative_error(a, b) <= 2e-5


@pytest.mark.parametrize('n', [1, 2, 17, 64])
def test_inverse_of_a_unit_lower_matrix(n):
  rng = np.random.default_rng(n)
  drawn = np.tril(0.3 * rng.standard_normal((2, n, n)), -1)
  ones = np.tril(np.ones((1, n, n)), -1)
  lower = np.concatenate([drawn, ones]).astype(np.float32)
  want = np.linalg.inv(np.eye(n) + lower.astype(np.float64))
  inverse = jax.jit(xla.unit_lower_inverse)
  assert relative_error(inverse(lower), want) <= 3e-6
  towards = rng.standard_normal(lower.shape)
  gradient = jax.jit(jax.grad(lambda a: (inverse(a) * towards).sum()))(lower)
  turned = want.swapaxes(-1, -2)
  if n > 1:
    assert relative_error(gradient, -turned @ towards @ turned) <= 3e-6


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('tokens', [65, 128])
def test_kernel_matches_the_recurrence(tokens, dtype):
  check('kernel', inputs(tokens, tokens, dtype=dtype))


@pytest.mark.parametrize('heads, dims', [((2, 2), (128, 128)), ((2, 6), (128, 256))])
def test_kernel_with_other_heads(heads, dims):
  check('kernel', inputs(1, 100, heads, dims, batch=2))


@every_form
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('forget', [False, True])
def test_equal_keys(form, dtype, forget):
  check(form, equal_keys(128, dtype, forget))


@every_form
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_strong_decay_neither_overflows_nor_drowns_weak_decay(form, dtype):
  # sums of 64 decays of up to 20 are rounded by 6e-5
  tolerance = 5e-5 if dtype == jnp.float32 else None
  check(form, inputs(2, 128, dtype=dtype, decays=(-6, 10)), tolerance)


def test_the_limit_of_decay_is_needed():
  args = inputs(2, 128, dtype=jnp.float32, decays=(-6, 10))
  got, expected = jax.jit(xla.gated_delta)(*args), recurrence(*args)
  assert relative_error(got[0], expected[0]) > 1e-4


@every_form
def test_tokens_without_decay_and_write_leave_the_state(form):
  q, k, v, g, beta, state = inputs(3, 160)
  real = np.arange(160) < 70
  g, beta = (jnp.where(real[:, None], x, 0.0) for x in (g, beta))
  _, padded = FORMS[form](q, k, v, g, beta, state)
  _, alone = FORMS[form](*(x[:, :70] for x in (q, k, v, g, beta)), state)
  np.testing.assert_allclose(padded, alone, rtol=0, atol=1e-6)
  zero = jnp.zeros_like(g)
  _, same = FORMS[form](q, k, v, zero, zero, state)
  np.testing.assert_array_equal(same, state)


@every_form
def test_nan_stays_in_its_sequence_and_head(form):
  args = inputs(4, 100, batch=2)
  clean = FORMS[form](*args)
  args[2] = args[2].at[0, 10, 1].set(jnp.nan)
  out, state = FORMS[form](*args)
  assert np.isnan(np.asarray(state[0, 1])).any()
  np.testing.assert_array_equal(out[1], clean[0][1])
  np.testing.assert_array_equal(state[1], clean[1][1])
  for head in (2, 3):  # not of the pair whose products are shared
    np.testing.assert_array_equal(out[0, :, head], clean[0][0, :, head])


def test_states_start_afresh_in_every_sequence_and_head():
  args = inputs(5, 100, batch=2)
  both = kernel(*args)
  for i in range(2):
    alone = kernel(*(x[i : i + 1] for x in args))
    for x, y in zip(both, alone, strict=True):
      np.testing.assert_array_equal(x[i : i + 1], y)
  args[5] = jnp.zeros_like(args[5])
  check('kernel', args)


def test_two_calls_continue_one():
  q, k, v, g, beta, state = inputs(6, 192)
  whole = kernel(q, k, v, g, beta, state)
  first = kernel(*(x[:, :128] for x in (q, k, v, g, beta)), state)
  tokens = (x[:, 128:] for x in (q, k, v, g, beta))
  second = api.gated_delta(*tokens, first[1])
  assert relative_error(jnp.concatenate([first[0], second[0]], 1), whole[0]) <= 4e-3
  assert relative_error(second[1], whole[1]) <= 4e-3


def test_two_cores_at_once_write_everything_and_do_not_race(capfd):
  args = inputs(7, 100, heads=(2, 4))
  assert pallas_tpu._group(2, 4) == 2
  out = kernel(*args, interpret=TWO_CORES)
  for x, y in zip(out, kernel(*args), strict=True):
    np.testing.assert_array_equal(x, y)
  assert 'RACE DETECTED' not in capfd.readouterr().out


# Mutations: the checks above see a broken kernel


def test_wrong_results_are_out_of_tolerance():
  args = inputs(8, 128)
  q, k, v, g, beta, state = args
  got, expected = kernel(*args)[0], recurrence(*wide(args))[0]
  shifted = (jnp.roll(x, 1, 1) for x in (g, beta))
  wrong = {
    'no state': recurrence(*wide([q, k, v, g, beta, jnp.zeros_like(state)])),
    'decay of the next token': recurrence(*wide([q, k, v, next(shifted), beta, state])),
    'beta of the next token': recurrence(*wide([q, k, v, g, next(shifted), state])),
    'key head of the neighbour': recurrence(
      *wide([q[:, :, ::-1], k[:, :, ::-1], v, g, beta, state])
    ),
    'a chunk that does not read the state': recurrence(
      *wide([x[:, 64:] for x in (q, k, v, g, beta)]), jnp.zeros_like(state)
    ),
  }
  assert relative_error(got, expected) <= TOLERANCE[jnp.bfloat16]
  for name, (other, _) in wrong.items():
    n = other.shape[1]
    assert relative_error(other, expected[:, -n:]) > 5 * TOLERANCE[jnp.bfloat16], name


def test_an_inverse_that_is_not_merged_shows(monkeypatch):
  args = equal_keys(128)
  inverses = pallas_tpu._inverses

  def halves(lower, dot):
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (64, 128), axis) for axis in (0, 1))
    return [jnp.where(row // 32 == column % 64 // 32, x, 0.0) for x in inverses(lower, dot)]

  monkeypatch.setattr(pallas_tpu, '_inverses', halves)
  out, _ = pallas_tpu.gated_delta(*args, interpret=True)
  assert relative_error(out, recurrence(*wide(args))[0]) > 3 * TOLERANCE[jnp.bfloat16]


# Gradients


def test_gradients_are_those_of_the_xla_form():
  args = inputs(10, 70, dtype=jnp.float32)

  def gradient(rule):
    def loss(*args):
      out, state = rule(*args)
      return (out**2).sum() + jnp.sin(state).sum()

    return jax.jit(jax.grad(loss, argnums=range(6)))(*args)

  assert pallas_tpu.supports(args[0], args[2])
  for got, expected in zip(gradient(api.gated_delta), gradient(xla.gated_delta), strict=True):
    assert relative_error(got, expected) <= 1e-6


# Entry point


def test_none_is_the_recurrence_for_one_token_and_xla_off_tpu():
  args = inputs(11, 70)
  for got, expected in zip(api.gated_delta(*args), xla_form(*args), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-5)
  one = [*(x[:, :1] for x in args[:5]), args[5]]
  for got, expected in zip(api.gated_delta(*one), reference.gated_delta(*one), strict=True):
    np.testing.assert_array_equal(got, expected)


def takes(tokens, heads, dims=(128, 128), dtype=jnp.bfloat16):
  q, v = ((1, tokens, h, d) for h, d in zip(heads, dims, strict=True))
  return pallas_tpu.supports(*(jax.ShapeDtypeStruct(s, dtype) for s in (q, v)))


def test_what_the_kernel_takes():
  for heads in ((16, 32), (16, 16), (16, 48), (16, 64), (2, 2)):
    assert takes(2048, heads), heads
  assert takes(65, (16, 32)) and takes(2048, (16, 32), dtype=jnp.float32)
  assert not takes(64, (16, 32))  # one chunk
  assert not takes(2048, (3, 3))  # no pairs
  assert not takes(2048, (2, 4), (64, 128)) and not takes(2048, (2, 4), (128, 64))
  assert not takes(2048, (2, 4), dtype=jnp.float16)


def test_kernel_by_name_says_what_it_takes():
  with pytest.raises(NotImplementedError, match=r'more than 64 tokens.*got q \(1, 64, 2, 128\)'):
    api.gated_delta(*inputs(12, 64), implementation='pallas_tpu')


def test_calls_that_make_no_sense_are_refused():
  q, k, v, g, beta, state = inputs(13, 5, dims=(6, 4))
  cases = [
    ((q, k, v, g, beta, state), {'implementation': 'fla'}, "'recurrent', 'xla'.*got 'fla'"),
    ((q, k[:, 1:], v, g, beta, state), {}, r'expected q, k .*k \(1, 4, 2, 6\)'),
    ((q, k, v[:, :, :3], g, beta, state), {}, r'Hv a multiple of Hk.*v \(1, 5, 3, 4\)'),
    ((q, k, v, g, beta[..., :2], state), {}, r'beta \(1, 5, 2\)'),
    ((q, k, v, g, beta, state[:, :2]), {}, r'state \(1, 2, 6, 4\)'),
    ((q, k, v, g, beta, state.astype(q.dtype)), {}, 'float32 g, beta, state, got .*bfloat16$|16.'),
    ((q, k, v.astype(g.dtype), g, beta, state), {}, 'q, k, v of one dtype'),
  ]
  for args, options, message in cases:
    with pytest.raises(ConfigError, match=message):
      api.gated_delta(*args, **options)


# The TPU compiler

CHIPS = ['v5p:2x2x1', 'v6e:2x2']


def compiled(topology, tokens, heads=(16, 32), dtype=jnp.bfloat16, rule=api.gated_delta):
  """HLO of `rule` for one chip of a topology."""
  pytest.importorskip('libtpu')
  device = aot.tpu_devices(topology)[0]
  (hk, hv), shapes = heads, []
  shapes = [((1, tokens, h, 128), dtype) for h in (hk, hk, hv)]
  shapes += [((1, tokens, hv), jnp.float32)] * 2 + [((1, hv, 128, 128), jnp.float32)]
  args = [jax.ShapeDtypeStruct(*x, sharding=SingleDeviceSharding(device)) for x in shapes]
  with aot.tracing_for(topology):
    lowered = jax.jit(rule).lower(*args)
    return aot.compile_for_tpu(lowered, exec_time_optimization_effort=-1.0).as_text()


def kernels_in(text):
  """Names of the Pallas kernels in a program."""
  return re.findall(r'%\S*?(gated_delta_\d+x\d+)\S* = .*"tpu_custom_call"', text)


def vmem_of(text):
  pattern = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
  return [int(re.search(pattern, x)[1]) for x in text.splitlines() if 'tpu_custom_call' in x]


def test_the_tpu_program_and_its_gradient_hold_the_kernel_once():
  def gradient(*args):
    return jax.grad(lambda *a: api.gated_delta(*a)[0].astype(jnp.float32).sum(), range(6))(*args)

  def both(*args):
    return api.gated_delta(*args), gradient(*args)

  assert kernels_in(compiled('v5p:2x2x1', 130, (2, 4))) == ['gated_delta_130x4']
  assert kernels_in(compiled('v5p:2x2x1', 130, (2, 4), rule=both)) == ['gated_delta_130x4']


@pytest.mark.slow
@pytest.mark.parametrize('topology', CHIPS)
@pytest.mark.parametrize(
  'tokens, heads, dtype',
  [
    *((tokens, (16, 32), jnp.bfloat16) for tokens in (1024, 2000, 2048, 4096)),
    (2048, (16, 16), jnp.bfloat16),
    (2048, (16, 48), jnp.bfloat16),
    (1000, (16, 32), jnp.float32),
  ],
)
def test_the_kernel_compiles(topology, tokens, heads, dtype):
  text = compiled(topology, tokens, heads, dtype)
  assert kernels_in(text) == [f'gated_delta_{tokens}x{heads[1]}']
  assert max(vmem_of(text)) <= 15e6


def test_one_chunk_is_left_to_xla():
  assert not kernels_in(compiled('v5p:2x2x1', 32, (2, 4)))
