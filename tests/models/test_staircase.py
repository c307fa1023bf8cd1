"""The staircase and its baselines against one-token-at-a-time float64, and who sees whom by
gradients.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import staircase_reference as reference
from flax import nnx

from wallwm_jax import config as cfg
from wallwm_jax.models import staircase
from wallwm_jax.models.binding import bind, fresh
from wallwm_jax.models.vlm.backbone import Qwen
from wallwm_jax.types import CheckpointError, ConfigError, path_string

B, S, SIZE, D, VOCAB = 3, 9, 10, 12, 11
PERIODIC = ('linear', 'linear', 'linear', 'full') * 2
# Layer types and N_r.
PATTERNS = {
  'periodic': (PERIODIC, 4),
  'split inside a period': (PERIODIC, 2),
  'mixed': (('linear', 'full', 'full', 'linear', 'linear', 'full', 'linear'), 1),
  'all linear': (('linear',) * 6, 1),
  'all full': (('full',) * 6, 1),
  'no lower layers': (('linear', 'full') * 3, 0),
  'small': (('linear', 'full', 'linear', 'full'), 1),
}
MODES = {
  'staircase': dict(),
  'stagger 1': dict(stagger=1),
  'stagger 2': dict(stagger=2, latents=2),
  'serial': dict(mode='serial'),
  'parallel': dict(mode='parallel'),
}


def make_config(pattern: str, **stairs) -> cfg.LanguageConfig:
  types, relay = PATTERNS[pattern]
  vlm = cfg.QwenConfig(
    vocab=VOCAB,
    width=D,
    ffn=10,
    layer_types=types,
    heads=4,
    kv_heads=2,
    head_dim=8,
    linear_key_heads=2,
    linear_value_heads=4,
    linear_key_dim=4,
    linear_value_dim=6,
    eps=1e-3,  # far from 0: a norm of almost nothing makes float32 noise large
    rotary=0.75,
    mrope_section=(1, 1, 1),
    rope_theta=100.0,
    vision=cfg.VisionTowerConfig(layers=0),
    dtype='float32',
  )
  return cfg.LanguageConfig(
    kind='qwen',
    vlm=vlm,
    reader=dataclasses.replace(vlm, width=16),
    staircase=cfg.StaircaseConfig(**{'latents': 3, 'relay_depth': relay, **stairs}),
  )


def random_params(shapes, seed=0):
  """Every leaf random, so nothing hides behind a zero or a one. What a layer adds is small beside
  the residual stream, so that float32 noise does not grow from layer to layer."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    scale = 0.1 if path_string(path).endswith(('/o/kernel', '/out/kernel', '/down/kernel')) else 0.3
    return scale * rng.standard_normal(x.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def read(config, vlm, x, positions, mask):
  """(hidden states, cache) of prompts."""
  call = lambda p, x: bind(Qwen, config.vlm, p).prefill(x, positions, mask, SIZE)  # noqa: E731
  return jax.jit(call)(vlm, x)


@functools.cache
def prompts(pattern: str) -> SimpleNamespace:
  """A random VLM and what it remembers of prompts padded in front, behind and not at all; x
  [B, S, D], positions [3, B, S], mask [B, S]."""
  config, rng = make_config(pattern), np.random.default_rng(0)
  vlm = random_params(jax.eval_shape(lambda: fresh(Qwen(config.vlm, rngs=nnx.Rngs(0)))))
  mask = np.ones((B, S), bool)
  mask[0, :3] = mask[1, 5:] = False
  # Rows and columns of their own, as tokens of an image have.
  positions = np.stack([np.maximum(np.arange(S) - shift, shift % 2) for shift in (0, 1, 2)])
  positions = np.broadcast_to(positions[:, None], (3, B, S)).astype(np.int32)
  x = rng.standard_normal((B, S, D)).astype(np.float32)
  cache = read(config, vlm, x, positions, mask)[1]
  layers, memories = reference.f64(vlm)['text']['layers'], []
  for b in range(B):
    real = mask[b]
    tokens = x[b, real].astype(np.float64), positions[:, b, real]
    memory = reference.read(config.vlm, layers, *tokens)[1]
    memories.append((memory, tokens[1].max() + 1))
  return SimpleNamespace(vlm=vlm, cache=cache, memories=memories, x=x, positions=positions)


def branch_of(config, vlm, seed=1):
  """A branch whose weights are no longer the VLM's."""
  start = staircase.init(config, vlm, jax.random.key(seed))
  return jax.tree.map(lambda x, noise: x + 0.3 * noise, start, random_params(start, seed))


def latents(config, branch, vlm, cache):
  return jax.jit(lambda *args: staircase.latent_states(*args[:2], config, args[2]))(
    branch, vlm, cache
  )


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('pattern', [name for name in PATTERNS if name != 'small'])
def test_latents_match_float64_one_token_at_a_time(pattern, mode):
  given, config = prompts(pattern), make_config(pattern, **MODES[mode])
  branch = branch_of(config, given.vlm)
  got = latents(config, branch, given.vlm, given.cache)
  assert got.shape == (B, config.staircase.latents, D) and got.dtype == jnp.float32
  for b, (memory, position) in enumerate(given.memories):
    want = reference.latents(branch, given.vlm, config, memory, position)
    worst = np.abs(got[b] - want).max()
    print(f'{pattern}, {mode}, row {b}: {worst:.1e} at {np.abs(want).max():.1f}')
    assert worst < 1e-5, (b, worst)


@pytest.mark.parametrize('mode', MODES)
def test_a_latent_sees_those_before_it_and_no_other(mode):
  given, config = prompts('small'), make_config('small', **MODES[mode])
  branch, count = branch_of(config, given.vlm), config.staircase.latents

  def of_steps(steps):
    out = staircase.latent_states(branch | {'steps': steps}, given.vlm, config, given.cache)
    return out.sum(0)  # over the batch: [Z, D]

  influence = np.abs(jax.jit(jax.jacrev(of_steps))(branch['steps'])).max((1, 3))  # [k, step j]
  sees = np.eye(count, dtype=bool) if mode == 'parallel' else np.tri(count, dtype=bool)
  assert (influence[~sees] == 0).all() and (influence[sees] > 1e-4).all(), influence


@pytest.mark.parametrize('mode', ['staircase', 'serial', 'parallel'])
def test_the_cache_is_only_read_and_rows_do_not_mix(mode):
  given, config = prompts('small'), make_config('small', mode=mode)
  branch, before = branch_of(config, given.vlm), jax.tree.map(np.array, given.cache)
  got = latents(config, branch, given.vlm, given.cache)
  jax.tree.map(np.testing.assert_array_equal, before, given.cache)

  def of_cache(floats):
    cache = dataclasses.replace(given.cache, **floats)
    return staircase.latent_states(branch, given.vlm, config, cache)[1].sum()

  floats = {name: getattr(given.cache, name) for name in ('k', 'v', 'conv', 'state')}
  for name, gradient in jax.jit(jax.grad(of_cache))(floats).items():
    reach = np.abs(gradient).max((0, *range(2, gradient.ndim)))  # per row of the batch
    assert reach[1] > 1e-4 and (reach[[0, 2]] == 0).all(), (name, reach)
    if name in 'kv':  # free slots may hold anything
      free = ~np.asarray(given.cache.mask)
      assert (np.moveaxis(gradient, 0, 2)[free] == 0).all()
  # A cache without a free slot is as good as any.
  full = given.cache.mask.sum(1).max()
  exact = dataclasses.replace(
    given.cache, k=given.cache.k[:, :, :full], v=given.cache.v[:, :, :full],
    mask=given.cache.mask[:, :full],
  )  # fmt: skip
  np.testing.assert_allclose(latents(config, branch, given.vlm, exact), got, atol=1e-5)


@pytest.mark.parametrize('mode', ['staircase', 'serial', 'parallel'])
def test_an_untrained_branch_is_the_backbone(mode):
  """One latent, whose query is a token's embedding and whose step is 0, is that token."""
  given, config = prompts('periodic'), make_config('periodic', latents=1, mode=mode)
  branch = staircase.init(config, given.vlm, jax.random.key(0))
  token = given.vlm['text']['embed']['embedding'][7]
  branch |= {'query': token, 'steps': jnp.zeros_like(branch['steps'])}
  decode = lambda p, x, cache: bind(Qwen, config.vlm, p).decode(x, cache)[0]  # noqa: E731
  want = jax.jit(decode)(given.vlm, jnp.broadcast_to(token, (B, 1, D)), given.cache)
  got = latents(config, branch, given.vlm, given.cache)
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_without_lower_layers_latents_are_the_tokens_of_a_text():
  """N_r = 0, no staircase left: K_c tokens in one pass, as the backbone reads them."""
  given, config = prompts('no lower layers'), make_config('no lower layers')
  branch = staircase.init(config, given.vlm, jax.random.key(0))
  tokens = given.vlm['text']['embed']['embedding'][jnp.array([3, 1, 4])]
  branch |= {'query': jnp.zeros(D), 'steps': tokens}
  decode = lambda p, x, cache: bind(Qwen, config.vlm, p).decode(x, cache)[0]  # noqa: E731
  x = jnp.broadcast_to(tokens, (B, *tokens.shape))
  slack = dataclasses.replace(given.cache, length=given.cache.length * 0)  # decode wants slots
  want = jax.jit(decode)(given.vlm, x, slack)
  np.testing.assert_allclose(latents(config, branch, given.vlm, given.cache), want, atol=2e-6)


@pytest.mark.parametrize('mode', ['stagger 2', 'serial'])
def test_every_parameter_of_the_branch_trains(mode):
  given, config = prompts('small'), make_config('small', **MODES[mode])
  branch = branch_of(config, given.vlm)

  def loss(branch):
    return jnp.sum(jnp.sin(staircase.latent_states(branch, given.vlm, config, given.cache)))

  for path, gradient in jax.tree_util.tree_flatten_with_path(jax.jit(jax.grad(loss))(branch))[0]:
    per_layer = gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient[None]
    assert (np.abs(per_layer).max(1) > 1e-6).all(), path_string(path)


def test_init_copies_and_never_shares():
  """Training donates the branch's buffers; the frozen VLM keeps its own."""
  for pattern in ('periodic', 'no lower layers'):
    given, config = prompts(pattern), make_config(pattern)
    branch, types = staircase.init(config, given.vlm, jax.random.key(0)), config.vlm.layer_types
    assert branch['query'].shape == (D,) and branch['steps'].shape == (3, D)
    text, relay = given.vlm['text'], config.staircase.relay_depth
    for kind, layers in branch['layers'].items():
      first = types[:relay].count(kind)
      source = jax.tree.map(lambda x, n=first: x[n:], text['layers'][kind])
      jax.tree.map(np.testing.assert_array_equal, layers, source)
    jax.tree.map(np.testing.assert_array_equal, branch['norm'], text['norm'])
    pointers = {x.unsafe_buffer_pointer() for x in map(jnp.asarray, jax.tree.leaves(given.vlm))}
    assert not pointers & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(branch)}
  rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), given.vlm)
  branch = staircase.init(config, rounded, jax.random.key(0))
  assert {x.dtype for x in jax.tree.leaves(branch)} == {jnp.dtype('float32')}


@pytest.mark.parametrize('mode', ['staircase', 'serial'])
def test_bfloat16_points_the_same_way(mode):
  given, config = prompts('small'), make_config('small', mode=mode)
  branch, cache = branch_of(config, given.vlm), given.cache
  want = latents(config, branch, given.vlm, cache)
  config = dataclasses.replace(config, vlm=dataclasses.replace(config.vlm, dtype='bfloat16'))
  rounded = {name: getattr(cache, name).astype(jnp.bfloat16) for name in ('k', 'v', 'conv')}
  got = latents(config, branch, given.vlm, dataclasses.replace(cache, **rounded))
  assert got.dtype == jnp.float32
  cosine = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
  assert cosine.min() > 0.99 and np.abs(got - want).max() > 1e-3  # it did round


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(latents=0), 'expected K_c >= 1, got 0'),
    (dict(relay_depth=8), r'expected N_r in 0\.\.7 \(the VLM has 8 layers\), got 8'),
    (dict(relay_depth=-1), r'expected N_r in 0\.\.7'),
    (dict(stagger=-1), 'stagger: expected >= 0, got -1'),
    (dict(stagger=2), 'latent 3 enters at depth 8, but the VLM has 8 layers'),
    (dict(stagger=1, mode='serial'), "only mode 'staircase' has one, got 'serial'"),
  ],
)
def test_stairs_that_do_not_fit_are_refused(change, message):
  with pytest.raises(ConfigError, match=message):
    make_config('periodic', **change)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(relay_depth=3), r"of the staircase: expected \{.*'linear': 3.*got \{.*'linear': 4"),
    (dict(latents=5), r'steps of the staircase: expected \(5, 12\).*got \(3, 12\)'),
  ],
)
def test_parameters_of_another_config_are_refused(change, message):
  given, config = prompts('split inside a period'), make_config('split inside a period')
  branch = staircase.init(config, given.vlm, jax.random.key(0))
  other = make_config('split inside a period', **change)
  with pytest.raises(CheckpointError, match=message):
    staircase.latent_states(branch, given.vlm, other, given.cache)
  deeper = make_config('mixed')
  with pytest.raises(CheckpointError, match='layers of the VLM: expected'):
    staircase.init(deeper, given.vlm, jax.random.key(0))
  with pytest.raises(CheckpointError, match='layers of the cache: expected'):
    staircase.latent_states(branch, given.vlm, config, prompts('all full').cache)
