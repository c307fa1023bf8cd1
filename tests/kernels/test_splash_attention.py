"""Long attention on a TPU: the library kernel under our block tables, interpreted, against the
definition, forward and backward; which blocks it visits; and what the TPU compiler takes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import relative_error
from jax.sharding import SingleDeviceSharding

from wallwm_jax.kernels.attention import api, reference, splash_tpu
from wallwm_jax.parallel import aot

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 300, 260, 2, 128
TOLERANCE = 4e-3


REAL = {name: getattr(splash_tpu, name) for name in ('_BLOCK', '_LONG')}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """128-wide blocks and no least length: programs of many blocks, interpreted in seconds."""
  monkeypatch.setattr(splash_tpu, '_BLOCK', 128)
  monkeypatch.setattr(splash_tpu, '_LONG', 1)


@pytest.fixture
def real_blocks(small_blocks, monkeypatch):
  for name, value in REAL.items():
    monkeypatch.setattr(splash_tpu, name, value)


def operands(seed=0, dtype=jnp.bfloat16):
  rng = np.random.default_rng(seed)
  q, g = (rng.normal(size=(BATCH, QUERIES, HEADS, WIDTH)) for _ in range(2))
  k, v = (rng.normal(size=(BATCH, KEYS, HEADS, WIDTH)) for _ in range(2))
  return tuple(jnp.asarray(x, dtype) for x in (q, k, v, g))


def events(tokens, count=4, padding=20, seed=1):
  """int32 [B, tokens]: events in order, different in every row, padded at the end."""
  ids = np.sort(np.random.default_rng(seed).integers(1, count + 1, (BATCH, tokens)), 1)
  ids[:, tokens - padding :] = 0
  return jnp.asarray(ids, jnp.int32)


def cones(seed=2):
  """bool [B, 1, Sq, Sk] with whole blocks hidden, whole blocks visible and mixed ones; one query
  sees nothing.
  """
  rng = np.random.default_rng(seed)
  mask = rng.random((BATCH, 1, QUERIES, KEYS)) < 0.6
  mask[:, :, :128, 128:256], mask[1, :, 128:256] = False, True
  mask[0, :, 128:256, :128] = True
  mask[:, :, 7] = False
  return jnp.asarray(mask)


def keys_mask():
  return jnp.asarray(np.random.default_rng(3).random((BATCH, 1, 1, KEYS)) < 0.6)


SIGHTS = {
  'all': (None, None),
  'padding': (keys_mask(), None),
  'events': (None, (events(QUERIES), events(KEYS))),
  'padded events': (keys_mask(), (events(QUERIES), events(KEYS))),
  'cones': (cones(), None),
  'cones and events': (cones(), (events(QUERIES), events(KEYS))),
  'an event without keys': (None, (events(QUERIES, 5), events(KEYS, 2))),
}


@functools.partial(jax.jit, static_argnums=0)
def both_ways(attention, q, k, v, g, mask, segments):
  """Output and gradients."""
  run = functools.partial(attention, mask=mask, bias=None, segments=segments)
  out, pullback = jax.vjp(run, q, k, v)
  return out, *pullback(g)


ours = functools.partial(both_ways, functools.partial(splash_tpu.attention, interpret=True))


def exact(*args):
  q, k, v, g, mask, segments = args
  wide = (x.astype(jnp.float32) for x in (q, k, v, g))
  return both_ways(reference.attention, *wide, mask, segments)


@pytest.mark.parametrize('name', SIGHTS)
def test_matches_the_definition(name):
  args = (*operands(), *SIGHTS[name])
  for got, expected in zip(ours(*args), exact(*args), strict=True):
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, expected) <= TOLERANCE
    assert not np.asarray(got, np.float32)[np.asarray(expected) == 0].any()


@pytest.mark.parametrize('name', ['events', 'padded events'])
def test_what_padding_holds_does_not_matter(name):
  q, k, v, g = operands()
  mask, (owner, owned) = SIGHTS[name]
  seen = owned > 0 if mask is None else (owned > 0) & mask[:, 0, 0]
  clean = ours(q, k, v, g, mask, (owner, owned))
  q = jnp.where((owner > 0)[..., None, None], q, jnp.nan)
  k, v = (jnp.where(seen[..., None, None], x, jnp.nan) for x in (k, v))
  for a, b in zip(clean, ours(q, k, v, g, mask, (owner, owned)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_checks_see_mistakes():
  args = operands()
  _, (owner, owned) = SIGHTS['events']
  expected = exact(*args, None, (owner, owned))
  shifted = jnp.roll(owned, 1, 1)
  mask = cones()
  for other, right in (
    (exact(*args, None, (owner, shifted)), expected),
    (exact(*args, None, (owner, jnp.where(owned == 2, 3, owned))), expected),
    (exact(*args, jnp.roll(mask, 1, -1), None), exact(*args, mask, None)),
    (exact(*args, splash_rounded(mask), None), exact(*args, mask, None)),
  ):
    assert all(relative_error(a, b) > 5 * TOLERANCE for a, b in zip(other, right, strict=True))


def splash_rounded(mask):
  """Cones rounded out to blocks: another function, which the kernel must not compute."""
  sides = [-(-n // 128) * 128 for n in (QUERIES, KEYS)]
  full = jnp.pad(mask[:, 0], [(0, 0)] + [(0, s - n) for s, n in zip(sides, mask.shape[2:])])
  blocks = full.reshape(BATCH, sides[0] // 128, 128, sides[1] // 128, 128).any((2, 4))
  return blocks.repeat(128, 1).repeat(128, 2)[:, None, :QUERIES, :KEYS]


# Blocks


def visits(mask, segments, queries=QUERIES, keys=KEYS):
  """Tables of the forward and of the backward pass."""
  q, k = (jax.ShapeDtypeStruct((BATCH, n, HEADS, WIDTH), jnp.bfloat16) for n in (queries, keys))
  owner, owned, pairs = splash_tpu._sight(q, k, mask, segments)
  pad = functools.partial(splash_tpu._padded, size=128)
  pairs = None if pairs is None else pad(pad(pairs), axis=2)
  return splash_tpu._mask_infos(splash_tpu._Sight(pad(owner), pad(owned), pairs), 128, 128)


def test_events_do_not_pay_for_each_other():
  """Four events of two blocks each: 2 x 2 blocks of 8 x 8 are visited for each, both ways."""
  ids = jnp.broadcast_to(jnp.repeat(jnp.arange(1, 5), 256), (BATCH, 1024))
  forward, of_queries, back = visits(None, (ids, ids), 1024, 1024)
  for table in (forward, of_queries, back):
    assert int((table.block_mask > 0).sum()) == BATCH * 4 * 2 * 2
    # the steps in between fetch no block that is not visited
    fetched = np.asarray(table.data_next)
    assert fetched.min() == 0 and fetched.max() == BATCH * 8 - 1
  steps = np.asarray(forward.data_next)[0]
  assert all(len(set(row)) == 2 for row in steps)
  assert (steps[8:] >= 8).all() and (steps[:8] < 8).all()  # of the own sample


def test_padding_is_not_visited():
  ids = jnp.broadcast_to(jnp.where(jnp.arange(1024) < 256, 1, 0), (BATCH, 1024))
  forward, _, back = visits(None, (ids, ids), 1024, 1024)
  assert int((back.block_mask > 0).sum()) == BATCH * 2 * 2
  idle = BATCH * 6  # a block of padding queries visits one block, so that it divides by something
  assert int((forward.block_mask > 0).sum()) == BATCH * 2 * 2 + idle


def test_cones_hide_blocks_and_full_blocks_are_not_compared():
  mask = np.asarray(cones())[:, 0]
  full = np.zeros((BATCH, 384, 384), bool)
  full[:, :QUERIES, :KEYS] = mask
  blocks = full.reshape(BATCH, 3, 128, 3, 128)
  want = blocks.any((2, 4)).astype(int) + blocks.all((2, 4))
  forward, _, back = visits(cones(), None)
  got = np.asarray(forward.block_mask).reshape(BATCH, 3, 3)
  np.testing.assert_array_equal(got, want)
  assert {0, 1, 2} == set(want.ravel())
  np.testing.assert_array_equal(
    np.asarray(back.block_mask).reshape(3, BATCH, 3).swapaxes(0, 1), want
  )


def test_a_new_mask_compiles_nothing():
  args, traces = operands(), []

  @jax.jit
  def run(q, k, v, mask, segments):
    traces.append(1)
    return splash_tpu.attention(q, k, v, mask, None, segments, interpret=True)

  for seed in (4, 5):
    run(*args[:3], cones(seed), (events(QUERIES, seed=seed), events(KEYS, seed=seed)))
  assert len(traces) == 1


# Entry point and compiler


@pytest.mark.usefixtures('real_blocks')
def test_what_the_kernel_takes():
  def takes(queries=4096, keys=4096, width=128, dtype=jnp.bfloat16, mask=None, bias=None, batch=1):
    q, k = (jax.ShapeDtypeStruct((batch, n, 24, width), dtype) for n in (queries, keys))
    mask = None if mask is None else jax.ShapeDtypeStruct(mask, jnp.bool_)
    return splash_tpu.supports(q, k, mask, bias)

  assert takes() and takes(10240, 10240) and takes(4096, 512) and takes(width=256)
  assert takes(mask=(1, 1, 1, 4096)) and takes(mask=(1, 1, 4096, 4096)) and takes(mask=(4096, 4096))
  assert not takes(mask=(1, 24, 4096, 4096)) and not takes(mask=(1, 1, 4096, 1))
  assert not takes(width=64) and not takes(dtype=jnp.float32) and not takes(bias=1)
  assert not takes(512, 512) and not takes(16, 65536) and not takes(batch=1024)


def test_by_name_it_says_what_it_takes():
  q, k, v, _ = operands(dtype=jnp.float32)
  with pytest.raises(NotImplementedError, match=r'expected bfloat16 with heads.*float32'):
    api.dot_product_attention(q, k, v, implementation='splash_tpu')


def test_off_tpu_it_is_xla_with_its_gradients():
  q, k, v, g = operands()
  mask, segments = SIGHTS['cones and events']

  def run(one_device, q, k, v):
    return api.dot_product_attention(
      q, k, v, mask=mask, segments=segments, one_device=one_device
    )

  kept, plain = (jax.vjp(functools.partial(run, flag), q, k, v) for flag in (True, False))
  np.testing.assert_array_equal(kept[0], plain[0])
  for a, b in zip(kept[1](g), plain[1](g), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures('real_blocks')
@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5p:2x2x1', 'v6e:2x2'])
@pytest.mark.parametrize('tokens', [2640, 4096, 10240])
@pytest.mark.parametrize('kind', ['all', 'events', 'cones'])
def test_it_compiles(topology, tokens, kind):
  pytest.importorskip('libtpu')
  device = aot.tpu_devices(topology)[0]
  place = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
  x = place((1, tokens, 24, 128), jnp.bfloat16)
  mask = place((1, 1, tokens, tokens), jnp.bool_) if kind == 'cones' else None
  segments = (place((1, tokens), jnp.int32),) * 2 if kind == 'events' else None

  def loss(q, k, v, mask, segments):
    out = api.dot_product_attention(q, k, v, mask=mask, segments=segments, one_device=True)
    return jnp.square(out.astype(jnp.float32)).sum()

  with aot.tracing_for(topology):
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, mask, segments)
    text = aot.compile_for_tpu(lowered, exec_time_optimization_effort=-1.0).as_text()
  for phase in ('fwd', 'dq', 'dkv'):
    assert f'splash_mha_{phase}' in text, phase
