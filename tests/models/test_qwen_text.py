"""The text side of Qwen3.5 against a float64 forward token by token, and its properties."""

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import vlm_reference as reference
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.config import QwenConfig, VisionTowerConfig
from wallwm_jax.models.binding import bind, fresh
from wallwm_jax.models.vlm.backbone import Qwen
from wallwm_jax.models.vlm.layers import (
  Layers,
  append,
  segments,
  slice_cache,
  slice_layers,
)
from wallwm_jax.models.vlm.rotary import rotate, rotation, text_positions
from wallwm_jax.types import ConfigError

PATTERNS = {
  'period': ('linear', 'full') * 2,
  'full': ('full',),
  'linear': ('linear',) * 3,
  'mixed': ('full', 'linear', 'linear', 'full', 'linear'),
}
VOCAB = 40


def tiny(types=PATTERNS['mixed'], **changes) -> QwenConfig:
  config = QwenConfig(
    vocab=VOCAB,
    width=24,
    ffn=20,
    layer_types=types,
    heads=4,
    kv_heads=2,
    head_dim=12,
    linear_key_heads=2,
    linear_value_heads=4,
    linear_key_dim=6,
    linear_value_dim=5,
    rotary=2 / 3,
    mrope_section=(2, 1, 1),
    vision=VisionTowerConfig(layers=0),
    dtype='float32',
    tied=False,
  )
  return dataclasses.replace(config, **changes)


@functools.lru_cache
def weights(config: QwenConfig):
  """Random parameters; none stays at its 0 or 1."""
  params = fresh(Qwen(config, rngs=nnx.Rngs(1)))
  rng = np.random.default_rng(2)
  return jax.tree.map(lambda a: a + 0.2 * rng.standard_normal(a.shape).astype(np.float32), params)


@functools.partial(jax.jit, static_argnums=0, static_argnames='size')
def prefill(config, params, x, positions, mask, size):
  model = bind(Qwen, config, params)
  hidden, cache = model.prefill(x, positions, mask, size)
  return hidden, cache, model.logits(hidden)


@functools.partial(jax.jit, static_argnums=0)
def decode(config, params, x, cache):
  return bind(Qwen, config, params).decode(x, cache)


@functools.partial(jax.jit, static_argnums=0)
def each(config, params, x, positions, mask):
  return bind(Qwen, config, params).each(x, positions, mask)


def draw(config, batch, tokens, seed=0):
  """(x [B, S, D], positions [3, B, S]): no two of the three axes agree, each row goes forward."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((batch, tokens, config.width), np.float32)
  steps = rng.integers(0, 3, (3, batch, tokens))
  return x, np.cumsum(steps, -1).astype(np.int32)


def padded(tokens, front=0, behind=0):
  index = np.arange(tokens)
  return (index >= front) & (index < tokens - behind)


def assert_close(name, got, want, relative=1e-5, worst=1e-4):
  """Isolated tokens with a tiny readout amplify rounding, hence two bounds."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, (name, got.shape, want.shape)
  if not want.size:
    return
  apart = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
  most = np.abs(got - want).max() / max(1.0, np.sqrt(np.square(want).mean()))
  assert apart <= relative and most <= worst, f'{name}: relative {apart:.2e}, max {most:.2e}'


def assert_same_cache(got, want, **bounds):
  for field in ('mask', 'length', 'position'):
    np.testing.assert_array_equal(getattr(got, field), getattr(want, field), err_msg=field)
  slots = np.asarray(want.mask)[None, :, :, None]
  assert_close('k', got.k * slots, want.k * slots, **bounds)
  assert_close('v', got.v * slots, want.v * slots, **bounds)
  assert_close('conv', got.conv, want.conv, **bounds)
  assert_close('state', got.state, want.state, **bounds)


# Forward.


@pytest.mark.parametrize('pattern', PATTERNS)
def test_every_layer_matches_the_reference_wherever_the_padding_is(pattern):
  config = tiny(PATTERNS[pattern], tied=pattern == 'period')
  params, tokens = weights(config), 70  # more than one chunk
  x, positions = draw(config, 4, tokens)
  holes = np.random.default_rng(3).random(tokens) < 0.7
  mask = np.stack([padded(tokens), padded(tokens, front=7), padded(tokens, behind=9), holes])
  hidden, cache, logits = prefill(config, params, x, positions, mask, size=tokens + 3)
  streams = each(config, params, x, positions, mask)
  for b, real in enumerate(mask):
    want = reference.forward(params['text'], config, x[b, real], positions[:, b, real])
    for i in range(config.layers):
      assert_close(f'row {b}, layer {i}', streams[i, b, real], want['layers'][i])
    assert_close('hidden', hidden[b, real], want['hidden'])
    assert_close('logits', logits[b, real], want['logits'])
    assert not np.any(hidden[b, ~real])
    count = real.sum()
    assert cache.length[b] == count and cache.position[b] == positions[:, b, real].max() + 1
    np.testing.assert_array_equal(cache.mask[b], np.arange(tokens + 3) < count)
    for i, (kind, m) in enumerate(zip(config.layer_types, want['memory'], strict=True)):
      row = config.layer_types[:i].count(kind)
      if kind == 'full':
        assert_close('k', cache.k[row, b, :count], np.reshape(m['k'], (count, -1)))
        assert_close('v', cache.v[row, b, :count], np.reshape(m['v'], (count, -1)))
      else:
        assert_close('conv', cache.conv[row, b], m['inputs'])
        assert_close('state', cache.state[row, b], m['state'])


@pytest.mark.parametrize(
  ('pattern', 'prompt'), [*((pattern, 66) for pattern in PATTERNS), ('mixed', 2)]
)
def test_decoding_one_by_one_or_at_once_is_prefilling_everything(pattern, prompt):
  config = tiny(PATTERNS[pattern])
  params, batch, more = weights(config), 4, 6
  rng = np.random.default_rng(prompt)
  x, positions = draw(config, batch, prompt, seed=prompt)
  mask = np.stack([
    padded(prompt),
    padded(prompt, front=1),
    padded(prompt, front=rng.integers(prompt)),
    padded(prompt, behind=rng.integers(1, prompt)),
  ])  # fmt: skip
  x_more = rng.standard_normal((batch, more, config.width), np.float32)
  start = np.where(mask, positions, -1).max((0, 2)) + 1
  all_x = np.concatenate([x, x_more], 1)
  all_positions = np.concatenate([positions, text_positions(start, more)], -1)
  all_mask = np.concatenate([mask, np.ones((batch, more), bool)], 1)
  size = prompt + more
  want, full, _ = prefill(config, params, all_x, all_positions, all_mask, size=size)
  before = prefill(config, params, x, positions, mask, size=size)[1]
  at_once, after = decode(config, params, x_more, before)
  assert_close('at once', at_once, want[:, prompt:])
  assert_same_cache(after, full)
  cache, rows = before, []
  for n in range(more):
    row, cache = decode(config, params, x_more[:, n : n + 1], cache)
    rows.append(row)
  assert_close('one by one', np.concatenate(rows, 1), want[:, prompt:])
  assert_same_cache(cache, full)


def test_ranges_of_layers_make_the_whole_stack():
  types = ('linear', 'linear', 'full', 'linear')
  config = tiny(types)
  params = weights(config)
  stacked = params['text']['layers']
  x, positions = draw(config, 2, 9)
  mask = np.stack([padded(9), padded(9, front=2)])
  want, cache, _ = prefill(config, params, x, positions, mask, size=12)
  new = np.random.default_rng(5).standard_normal((2, 3, config.width), np.float32)
  after, longer = decode(config, params, new, cache)
  turn = rotation(config, text_positions(cache.position, 3))

  @jax.jit
  def by_ranges(x, new):
    parts = []
    for start, stop in ((0, 1), (1, 4)):
      part = types[start:stop]
      layers = bind(Layers, config, slice_layers(stacked, types, start, stop), part)
      x, *_ = layers.prefill(x, rotation(config, positions), mask, 12)
      new, *rows = layers.extend(new, turn, slice_cache(cache, types, start, stop))
      parts.append(rows)
    norm = bind(Qwen, config, params).text.norm
    return norm(x), norm(new), [jnp.concatenate(rows) for rows in zip(*parts, strict=True)]

  got, got_after, rows = by_ranges(x, new)
  assert_close('prefill', got, want)
  assert_close('extend', got_after, after)
  assert_same_cache(append(cache, *rows, 3), longer)
  assert set(slice_layers(stacked, types, 2, 3)) == {'full'}
  assert slice_layers(stacked, types, 3, 3) == {}


def test_bfloat16_points_the_same_way():
  config = tiny(PATTERNS['period'], width=64, ffn=96)
  params = fresh(Qwen(config, rngs=nnx.Rngs(1)))
  x, positions = draw(config, 2, 70)
  mask = np.stack([padded(70), padded(70, front=5)])
  want, *_ = prefill(config, params, x, positions, mask, size=76)
  half = dataclasses.replace(config, dtype='bfloat16')
  got, cache, logits = prefill(half, params, x, positions, mask, size=76)
  kinds = (cache.k.dtype, cache.v.dtype, cache.conv.dtype, cache.state.dtype, logits.dtype)
  assert kinds == (jnp.bfloat16,) * 3 + (jnp.float32,) * 2
  a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.dtype == jnp.bfloat16 and np.isfinite(a).all()
  assert (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) > 0.999
  assert np.abs(a - b).max() > 1e-4  # it did round
  after, cache = decode(half, params, x[:, :4], cache)
  assert after.dtype == jnp.bfloat16 and cache.k.dtype == jnp.bfloat16


# What a token may depend on.


@pytest.mark.parametrize('pattern', ['period', 'linear'])
def test_no_token_depends_on_a_later_or_a_hidden_one(pattern):
  config = tiny(PATTERNS[pattern])
  params, tokens = weights(config), 8
  x, positions = draw(config, 1, tokens)
  mask = np.array([[False, True, True, True, False, True, True, False]])

  def row_sums(x):
    hidden, _ = bind(Qwen, config, params).prefill(x, positions, mask, tokens)
    return jnp.square(bind(Qwen, config, params).logits(hidden)).sum((0, 2))

  reach = np.abs(jax.jit(jax.jacobian(row_sums))(x)[:, 0]).max(-1)  # [logits at, embedding at]
  real = mask[0]
  allowed = np.tri(tokens, dtype=bool) & real[:, None] & real
  assert (reach[~allowed] == 0).all()
  assert (reach[allowed] > 1e-6).all()
  garbage = np.where(mask[..., None], x, 1e6 * np.sign(x))
  want, cache, _ = prefill(config, params, x, positions, mask, size=tokens)
  positions = np.where(mask, positions, 77)
  got, other, _ = prefill(config, params, garbage, positions, mask, size=tokens)
  np.testing.assert_array_equal(got, want)
  assert_same_cache(other, cache, relative=0, worst=0)


def test_a_row_without_tokens_leaves_an_empty_cache():
  config = tiny()
  params = weights(config)
  x, positions = draw(config, 2, 5)
  mask = np.stack([padded(5), np.zeros(5, bool)])
  hidden, cache, _ = prefill(config, params, x, positions, mask, size=9)
  assert np.isfinite(hidden).all() and cache.length[1] == 0 and cache.position[1] == 0
  got, _ = decode(config, params, x[:, :4], cache)
  positions = np.asarray(text_positions(jnp.zeros(2, jnp.int32), 4))
  want, *_ = prefill(config, params, x[:, :4], positions, np.ones((2, 4), bool), size=4)
  assert_close('from nothing', got[1], want[1])


# Gradients.


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_gradients_match_differences_of_the_reference(remat):
  config = tiny(('linear', 'linear', 'full', 'linear'), remat=remat)
  params, tokens = weights(config), 13
  x, positions = draw(config, 1, tokens)
  rng = np.random.default_rng(4)
  weight = rng.standard_normal((tokens, VOCAB))

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(params, x):
    model = bind(Qwen, config, params)
    hidden, _ = model.prefill(x, positions, np.ones((1, tokens), bool), tokens)
    return (model.logits(hidden)[0] * weight).sum()

  of_params, of_x = gradient(params, x)
  # Biases of the decay are small numbers with large effects: a direction of their own size.
  along = jax.tree.map(lambda a: 0.1 * rng.standard_normal(a.shape), params)
  along_x = rng.standard_normal(x.shape)

  def loss(by, by_x):
    moved = jax.tree.map(lambda a, d: np.asarray(a, np.float64) + by * d, params, along)
    out = reference.forward(moved['text'], config, (x + by_x * along_x)[0], positions[:, 0])
    return (out['logits'] * weight).sum()

  step = 1e-5
  for name, gradient, way, want in (
    ('inputs', of_x, along_x, loss(0, step) - loss(0, -step)),
    ('parameters', of_params, along, loss(step, 0) - loss(-step, 0)),
  ):
    (gradient, _), (way, _) = (jax.flatten_util.ravel_pytree(x) for x in (gradient, way))
    gradient, way = np.asarray(gradient, np.float64), np.asarray(way, np.float64)
    size = np.linalg.norm(gradient) * np.linalg.norm(way)
    print(name, gradient @ way, want / (2 * step), size)
    assert abs(gradient @ way - want / (2 * step)) <= 1e-5 * size, name


def test_equal_tokens_are_finite_in_both_directions():
  config = tiny(PATTERNS['linear'])
  params, tokens = weights(config), 130
  layers = params['text']['layers']['linear']
  slow = layers | {'log_decay': layers['log_decay'] - 9, 'b': {'kernel': layers['b']['kernel'] * 9}}
  params = params | {'text': params['text'] | {'layers': {'linear': slow}}}
  x = np.repeat(draw(config, 1, 1)[0], tokens, 1)
  positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), (3, 1, tokens))

  def total(x):
    hidden, _ = bind(Qwen, config, params).prefill(x, positions, np.ones((1, tokens), bool), tokens)
    return jnp.square(hidden).sum() + hidden[0, -1, 0], hidden

  (_, hidden), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(x)
  want = reference.forward(params['text'], config, x[0], positions[:, 0])['hidden']
  assert_close('hidden', hidden[0], want, worst=1e-3)
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


# Rotary positions.


def test_published_frequencies_take_turns():
  config = QwenConfig()  # 32 pairs, section (11, 11, 10)
  for axis, count in enumerate((11, 11, 10)):
    positions = np.zeros((3, 1, 1), np.int32)
    positions[axis] = 1
    turned = np.asarray(rotation(config, positions).sin)[0, 0] > 0
    np.testing.assert_array_equal(np.flatnonzero(turned), axis + 3 * np.arange(count))


def test_text_positions_turn_like_ordinary_rope():
  config = tiny(mrope_section=(1, 2, 1))
  start = jnp.array([3, 11], jnp.int32)
  positions = text_positions(start, 5)
  np.testing.assert_array_equal(positions[2], [[3, 4, 5, 6, 7], [11, 12, 13, 14, 15]])
  x = np.random.default_rng(0).standard_normal((2, 5, 3, config.head_dim)).astype(np.float32)
  half = config.rotary_dims // 2
  angle = np.asarray(positions[0])[..., None] * config.rope_theta ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angle)[:, :, None]
  want = np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], -1)
  assert_close('rotated', rotate(jnp.asarray(x), rotation(config, positions)), want)


# Compile size.


@given(st.lists(st.sampled_from(['linear', 'full']), max_size=12).map(tuple), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_segments_spell_the_layers(types, repeats):
  types = types * repeats
  spelt = sum((pattern * times for pattern, times in segments(types)), ())
  assert spelt == types


@pytest.mark.parametrize(
  ('types', 'want'),
  [
    (('linear', 'linear', 'linear', 'full') * 8, [(4, 8)]),
    (('linear',) * 9, [(1, 9)]),
    (PATTERNS['mixed'], [(5, 1)]),
    ((('linear', 'linear', 'linear', 'full') * 6)[8:], [(4, 4)]),
  ],
)
def test_published_stacks_are_one_segment(types, want):
  assert [(len(pattern), times) for pattern, times in segments(types)] == want


def test_program_does_not_grow_with_depth():
  def size(layers):
    config = tiny(('linear', 'linear', 'linear', 'full') * layers)
    x, positions = draw(config, 1, 4)
    params = jax.eval_shape(lambda: fresh(Qwen(config, rngs=nnx.Rngs(0))))
    mask = np.ones((1, 4), bool)
    return len(prefill.lower(config, params, x, positions, mask, size=4).as_text().splitlines())

  assert size(8) == size(2)


# Embeddings and errors.


def test_placeholders_become_what_the_tower_sees_in_order():
  vision = VisionTowerConfig(layers=1, width=16, heads=2, ffn=8, patch=2, positions=16)
  config = tiny(PATTERNS['full'], vision=vision, image_token=5, video_token=6)
  params = weights(config)
  rng = np.random.default_rng(0)
  images = tuple(
    rng.standard_normal((n, h * w, vision.pixels), np.float32) for n, h, w in ((2, 2, 4), (1, 4, 4))
  )
  grids = ((2, 4), (4, 4))
  ids = rng.integers(7, VOCAB, (2, 10))
  ids[0, [1, 2, 4, 5, 9]], ids[1, [0, 3, 8]] = (5, 5, 6, 6, 5), 5
  model = bind(Qwen, config, params)
  got = jax.jit(lambda *images: bind(Qwen, config, params).embed(ids, images, grids))(*images)
  seen = [
    model.vision(x, grid).reshape(-1, config.width) for x, grid in zip(images, grids, strict=True)
  ]
  shown = np.isin(ids, (5, 6))
  assert_close('images', got[shown], np.concatenate(seen))
  np.testing.assert_array_equal(got[~shown], params['text']['embed']['embedding'][ids[~shown]])
  np.testing.assert_array_equal(model.embed(ids)[~shown], got[~shown])
  with pytest.raises(ConfigError, match='a grid per array of images'):
    model.embed(ids, images, grids[:1])
  with pytest.raises(ConfigError, match='no vision tower'):
    bind(Qwen, tiny(), weights(tiny())).embed(ids, images, grids)


def test_tokens_that_do_not_fit_are_refused():
  config = tiny()
  model = bind(Qwen, config, weights(config))
  x, positions = draw(config, 2, 6)
  mask = np.stack([padded(6), padded(6, behind=3)])
  with pytest.raises(ConfigError, match='6 tokens does not fit in a cache of size 5'):
    model.prefill(x, positions, mask, 5)
  with pytest.raises(ConfigError, match=r'expected positions \[3, 2, 6\], got \(2, 6\)'):
    model.prefill(x, positions[0], mask, 6)
  _, cache, _ = prefill(config, weights(config), x, positions, mask, size=8)
  with pytest.raises(ConfigError, match='3 more tokens after 6 do not fit in its 8 slots'):
    model.decode(x[:, :3], cache)
  model.decode(x[:, :2], cache)
  with pytest.raises(ConfigError, match='9 more tokens'):
    decode(config, weights(config), np.zeros((2, 9, config.width), np.float32), cache)
