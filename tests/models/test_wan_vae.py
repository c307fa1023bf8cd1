"""Wan's video VAEs against diffusers layer by layer; what streaming, tiling and sharding promise.

The fixtures hold random small models of both layouts (tests/fixtures/wan_vae.py).
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from wan_vae_fixtures import NAMES, build, fixture, loaded

from wallwm_jax.config import CodecConfig, MeshConfig, ModelConfig, VAEConfig
from wallwm_jax.models import functional
from wallwm_jax.models.vae import WanVAE, tile_weights
from wallwm_jax.models.vae_layers import (
  AverageDown,
  ChannelNorm,
  Downsample,
  DuplicateUp,
  patchify,
  unpatchify,
)
from wallwm_jax.parallel.constraints import activation_sharding
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.types import ConfigError


def close(got, want, name: str, tol: float = 2e-5, rms_tol: float = 1e-5):
  """max|d| <= tol * max(1, rms) and ||d|| <= rms_tol * ||want||."""
  assert got.shape == want.shape, f'{name}: expected shape {want.shape}, got {got.shape}'
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  error = np.abs(got - want).max()
  limit = tol * max(1.0, math.sqrt((want**2).mean()))
  assert error <= limit, f'{name}: max |d| = {error:.2e}, allowed {limit:.2e}'
  relative = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
  assert relative <= rms_tol, f'{name}: ||d|| / ||ref|| = {relative:.2e}, allowed {rms_tol:.0e}'


def trace(coder, x) -> dict[str, jax.Array]:
  """Outputs of every layer of an encoder or decoder for a whole clip, by path."""
  seen = {}

  def down(prefix, stages, x):
    for name, stage in stages:
      path = f'{prefix}/{name}'
      if hasattr(stage, 'stages'):
        down(path, stage.stages(), x)
      x, _ = stage(x, None)
      seen[path] = x

  down('', coder.stages(), x)
  seen['/conv_out'] = coder(x, None)[0]
  return {path[1:]: x for path, x in seen.items()}


def test_fixtures_differ_where_it_matters():
  configs = [fixture(name).config for name in NAMES]
  assert [c.vae.residual for c in configs] == [False, False, True, True]
  assert len({c.vae.res_blocks for c in configs}) == 3
  assert len({c.vae.dim_mult for c in configs}) == 3
  assert {c.temporal for c in configs} == {2, 4}


@pytest.mark.parametrize('name', NAMES)
def test_every_layer_matches_diffusers(name):
  """In the order of computation, so the first layer that differs is the one named."""
  f, model = fixture(name), loaded(name, chunk=100)
  frames = 1 + 8 // f.config.temporal

  @jax.jit
  def encode(x):
    return trace(model.encoder, patchify(x, f.config.vae.patch))

  @jax.jit
  def decode(z):
    return trace(model.decoder, model.post_quant_conv(z, None)[0])

  got = {f'encoder/{k}': v for k, v in encode(f.clip('inputs.video')[:, :9]).items()}
  got |= {f'decoder/{k}': v for k, v in decode(f.clip('inputs.latent')[:, :frames]).items()}
  moments = model.quant_conv(got['encoder/conv_out'], None)[0]
  want = {k.removeprefix('mid.') for k in f.tensors if k.startswith('mid.')}
  assert want <= set(got) and len(want) > 20
  for path in (p for p in got if p in want):
    close(got[path], f.clip(f'mid.{path}'), path)
  close(moments, f.clip('outputs.moments_9'), 'moments')


@pytest.mark.parametrize('name, frames', [
  ('2_1_small', 1), ('2_1_small', 5), ('2_1_small', 9), ('2_1_odd', 1), ('2_1_odd', 17),
  ('2_2_small', 1), ('2_2_small', 5), ('2_2_small', 9), ('2_2_odd', 1), ('2_2_odd', 17),
])  # fmt: skip
def test_encode_and_decode_match_diffusers(name, frames):
  f, model = fixture(name), loaded(name)  # streaming, one latent frame at a time
  latent_frames = 1 + (frames - 1) // f.config.temporal
  mean = jax.jit(model.encode)(f.clip('inputs.video')[:, :frames])
  decoded = jax.jit(model.decode)(f.clip('inputs.latent')[:, :latent_frames])
  close(mean, f.clip(f'outputs.latent_mode_{frames}'), 'latent_mode')
  # Random channels of width 4 amplify rounding in the norms: 2e-5 at worst, by another summation.
  close(decoded, f.clip(f'outputs.decoded_{frames}'), 'decoded', tol=5e-5)
  assert mean.dtype == decoded.dtype == jnp.float32


def cosine(a, b) -> float:
  a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize('name', ['2_1_small', '2_2_small'])
def test_bfloat16_stays_close(name):
  f, model = fixture(name), loaded(name, dtype='bfloat16', chunk=100)
  mean = jax.jit(model.encode)(f.clip('inputs.video')[:, :5])
  decoded = jax.jit(model.decode)(f.clip('inputs.latent')[:, :2])
  assert mean.dtype == decoded.dtype == jnp.float32
  want = f.clip('outputs.latent_mode_5')
  assert cosine(mean, want) >= 0.999
  assert cosine(decoded, f.clip('outputs.decoded_5')) >= 0.999
  assert np.abs(mean - want).max() > 1e-4, 'bfloat16 was not used'


def tiny(residual: bool, **changes) -> WanVAE:
  """Random weights; two levels halve time, so pieces meet every first-frame rule."""
  vae = VAEConfig(
    base=4,
    decoder_base=4,
    dim_mult=(1, 2, 2),
    res_blocks=1,
    temporal_downsample=(True, True),
    residual=residual,
    patch=1 + residual,
  )
  vae = dataclasses.replace(vae, **changes)
  return build(
    CodecConfig(kind='wan', spatial=vae.spatial, temporal=vae.temporal, channels=3, vae=vae)
  )


@pytest.mark.parametrize('residual', [False, True])
def test_pieces_do_not_change_the_result(residual):
  """Four latent frames at once, one by one (as the reference), and by sizes that divide the three
  after the first or do not.
  """
  rng, s = np.random.default_rng(0), 8 if residual else 4
  x = rng.uniform(-1, 1, (2, 13, 2 * s, 3 * s, 3)).astype(np.float32)
  z = rng.normal(size=(2, 4, 2, 3, 3)).astype(np.float32)
  results = {}
  for chunk in (4, 1, 2, 3):
    model = tiny(residual, chunk=chunk)
    results[chunk] = jax.jit(model.encode)(x), jax.jit(model.decode)(z)
  whole = results.pop(4)
  for chunk, pieces in results.items():
    for got, want in zip(pieces, whole):
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-5, err_msg=f'chunk={chunk}')


def test_a_longer_clip_costs_no_longer_program():
  """Streaming traces the network twice (start, loop), whatever the number of frames."""
  model = tiny(True)

  def equations(frames):
    x = jax.ShapeDtypeStruct((1, frames, 32, 32, 3), jnp.float32)
    return len(str(jax.make_jaxpr(model.encode)(x)).splitlines())

  assert equations(9) == equations(65)


def test_later_frames_change_nothing_earlier():
  """Causality: latents of a prefix are the prefix of the latents, first frame alone included."""
  model = tiny(True)
  x = np.random.default_rng(0).uniform(-1, 1, (1, 9, 16, 16, 3)).astype(np.float32)
  changed = x.copy()
  changed[:, 5:] = 0.0
  encode = jax.jit(model.encode)
  a, b = encode(x), encode(changed)
  np.testing.assert_array_equal(a[:, :2], b[:, :2])
  assert np.abs(a[:, 2] - b[:, 2]).max() > 1e-3


# Layers, where a slip would hide in a whole model.


def test_norm_guards_small_vectors_as_torch_does():
  norm = ChannelNorm(4)
  x = jnp.array([[3e-13, 0, 0, 4e-13], [0, 0, 0, 0], [3, 0, 0, 4]], jnp.float32)
  want = np.array([[0.3, 0, 0, 0.4], [0, 0, 0, 0], [0.6, 0, 0, 0.8]]) * 2.0
  np.testing.assert_allclose(norm(x), want, rtol=1e-6)
  gradient = jax.grad(lambda x: norm(x).sum())(jnp.zeros((1, 4)))
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize('size', [5, 6])
def test_downsampling_pads_below_and_right_only(size):
  layer = Downsample(1, False, dtype=jnp.float32, rngs=nnx.Rngs(0))
  layer.conv.kernel[...] = jnp.ones((3, 3, 1, 1))
  x = np.arange(size * size, dtype=np.float32).reshape(1, 1, size, size, 1)
  padded = np.pad(x[0, 0, :, :, 0], (0, 1))
  want = [[padded[i : i + 3, j : j + 3].sum() for j in range(0, size - 1, 2)]
          for i in range(0, size - 1, 2)]
  np.testing.assert_allclose(layer(x, None)[0][0, 0, :, :, 0], want)


def test_average_down_orders_channels_and_completes_the_first_group_with_zeros():
  x = np.arange(3 * 2 * 2 * 2, dtype=np.float32).reshape(1, 3, 2, 2, 2) + 1.0
  y = AverageDown(2, 4, 2, 2)(x, start=True)
  # Groups of 2 * 8 / 4 = 4 consecutive entries (channel, time, row, column): one frame's space.
  frames = np.concatenate([np.zeros_like(x[:, :1]), x], 1)[0]
  want = [[frames[2 * j + dt, :, :, c].mean() for c in range(2) for dt in range(2)]
          for j in range(2)]
  np.testing.assert_allclose(y[0, :, 0, 0], want)


def test_duplicate_up_inverts_the_order_and_drops_what_precedes_the_clip():
  x = np.arange(2 * 4, dtype=np.float32).reshape(1, 2, 1, 1, 4)
  layer = DuplicateUp(4, 1, 2, 2)  # repeats 1 * 8 / 4 = 2: entries (time, row, column)
  later = layer(x, start=False)
  want = np.repeat(x.reshape(2, 4), 2, axis=-1).reshape(4, 2, 2)
  np.testing.assert_array_equal(later[0, ..., 0], want)
  np.testing.assert_array_equal(layer(x, start=True), later[:, 1:])


def test_patches_are_ordered_channel_column_row():
  x = np.arange(2 * 4 * 3, dtype=np.float32).reshape(1, 2, 4, 3)
  y = patchify(x, 2)
  want = [x[0, row, 2 + column, c] for c in range(3) for column in range(2) for row in range(2)]
  np.testing.assert_array_equal(y[0, 0, 1], want)
  np.testing.assert_array_equal(unpatchify(y, 2), x)


# Tiles.


def test_one_tile_is_the_untiled_result():
  f, model = fixture('2_1_odd'), loaded('2_1_odd')
  x, z = f.clip('inputs.video')[:, :5], f.clip('inputs.latent')[:, :3]
  encode, decode = (jax.jit(functools.partial(call, tile=32, overlap=8))
                    for call in (model.tiled_encode, model.tiled_decode))
  np.testing.assert_allclose(encode(x), jax.jit(model.encode)(x), atol=1e-6)
  np.testing.assert_allclose(decode(z), jax.jit(model.decode)(z), atol=1e-6)


@given(st.integers(1, 60), st.integers(1, 16), st.integers(0, 15), st.integers(1, 3))
@settings(deadline=None, max_examples=200)
def test_tiles_cover_every_place_and_their_weights_sum_to_one(n, tile, overlap, scale):
  overlap = min(overlap, tile - 1)
  starts, weights = tile_weights(n, tile, overlap, scale)
  total, slopes = np.zeros(n * scale), []
  for start, weight in zip(starts * scale, weights):
    total[start : start + len(weight)] += weight
    assert (weight >= 0).all()
    padded = np.zeros(n * scale)
    padded[start : start + len(weight)] = weight
    slopes.append(np.abs(np.diff(padded)).max(initial=0))
  np.testing.assert_allclose(total, 1.0, atol=1e-12)
  assert starts[0] == 0 and starts[-1] + min(tile, n) == n
  # No seam: where tiles lie at their full distance, a weight moves by one step of its ramp.
  if len(starts) > 1 and (n - overlap) % (tile - overlap) == 0 and 2 * overlap <= tile:
    assert max(slopes) <= 1.0 / (overlap * scale + 1) + 1e-12


def test_blending_hides_seams():
  """Tiles are exact a receptive field inside their borders; in between the blend is no further
  from the untiled result than the worse tile, and an overlap of zero would be.
  """
  f, model = fixture('2_1_small'), loaded('2_1_small')
  z = np.random.default_rng(0).normal(size=(1, 2, 2, 12, f.config.channels)).astype(np.float32)
  whole = np.asarray(jax.jit(model.decode)(z))
  blended, cut = (
    np.asarray(jax.jit(functools.partial(model.tiled_decode, tile=64, overlap=overlap))(z))
    for overlap in (32, 0)
  )
  assert blended.shape == whole.shape
  assert np.abs(blended - whole).max() > 1e-3  # tiles do see less

  def jump(x):  # at the cut of the tiling without overlap, beyond the untiled clip's own step
    return np.abs((x - whole)[:, :, :, 64] - (x - whole)[:, :, :, 63]).mean()

  assert jump(blended) < 0.5 * jump(cut)


# Sharding.


@pytest.mark.parametrize('residual, grid', [(True, (8, 2)), (False, (2, 8)), (True, (3, 5))],
                         ids=['rows', 'columns', 'neither'])
def test_a_clip_split_over_eight_devices_is_the_same_clip(residual, grid):
  mesh = make_mesh(MeshConfig(context=8))
  model = tiny(residual)
  rng, s = np.random.default_rng(0), model.config.spatial
  x = rng.uniform(-1, 1, (1, 9, grid[0] * s, grid[1] * s, 3)).astype(np.float32)
  z = rng.normal(size=(1, 3, *grid, 3)).astype(np.float32)

  def sharded(call):
    def run(x):
      with activation_sharding(mesh, MeshConfig().rules):
        return call(x)

    return jax.jit(run)

  for call, argument in ((model.encode, x), (model.decode, z)):
    compiled = sharded(call).lower(argument).compile()
    got, want = compiled(argument), jax.jit(call)(argument)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    # Neighbours exchange the rows or columns of their border; only attention gathers, one frame's
    # queries, keys and values at a time.
    text = compiled.as_text()
    assert ('collective-permute' in text) == (8 in grid)
    gathered = re.findall(r'\[([\d,]+)\]\S* all-gather\(', text)
    cells = grid[0] * grid[1]
    assert all(math.prod(map(int, dims.split(','))) <= 24 * cells for dims in gathered), gathered
    assert 'all-to-all' not in text


# Refusals.


@pytest.mark.parametrize('shape', [(1, 4, 16, 16, 3), (1, 5, 20, 16, 3), (1, 5, 16, 12, 3),
                                   (1, 0, 16, 16, 3), (1, 5, 16, 16, 4), (5, 16, 16, 3)])
def test_frames_that_do_not_fit_are_refused(shape):
  model = nnx.eval_shape(lambda: WanVAE(fixture('2_1_small').config, nnx.Rngs(0)))
  with pytest.raises(ValueError, match='WanVAE.encode: expected .* got'):
    model.encode(jnp.zeros(shape))


def test_latents_and_tiles_that_do_not_fit_are_refused():
  model = nnx.eval_shape(lambda: WanVAE(fixture('2_1_small').config, nnx.Rngs(0)))
  with pytest.raises(ValueError, match=r'\[B, F, h, w, 4\].* got shape \(1, 2, 2, 2, 5\)'):
    model.decode(jnp.zeros((1, 2, 2, 2, 5)))
  for tile, overlap in ((20, 0), (16, 4), (16, 16)):
    with pytest.raises(ValueError, match=f'got tile={tile}, overlap={overlap}'):
      model.tiled_decode(jnp.zeros((1, 1, 4, 4, 4)), tile, overlap)


def test_widths_that_a_shortcut_cannot_average_are_refused():
  vae = VAEConfig(base=4, decoder_base=4, dim_mult=(1, 3), temporal_downsample=(True,))
  config = CodecConfig(kind='wan', spatial=vae.spatial, temporal=2, channels=2, vae=vae)
  with pytest.raises(ConfigError, match='from 4 to 12 channels'):
    nnx.eval_shape(lambda: WanVAE(config, nnx.Rngs(0)))
  with pytest.raises(ConfigError, match="kind='wan'"):
    WanVAE(CodecConfig(), nnx.Rngs(0))


# Through the door.


@pytest.mark.parametrize('tile', [0, 32])
def test_frames_and_latents_go_through_the_codec_view_by_view(tile):
  f, vae = fixture('2_1_small'), loaded('2_1_small')
  codec = dataclasses.replace(f.config, vae=dataclasses.replace(f.config.vae, tile=tile))
  model = ModelConfig(codec=codec, views=('a', 'b'), image_size=(48, 64),
                      steps_per_latent=codec.temporal)
  params = nnx.to_pure_dict(nnx.state(vae, nnx.Param))
  frames = np.random.default_rng(0).integers(0, 256, (1, 2, 5, 48, 64, 3), np.uint8)
  latents = jax.jit(functools.partial(functional.encode_video, model))(frames, params)
  pixels = jax.jit(functools.partial(functional.decode_video, model))(latents, params)
  encode, decode = (
    (functools.partial(vae.tiled_encode, tile=32, overlap=8),
     functools.partial(vae.tiled_decode, tile=32, overlap=8)) if tile else (vae.encode, vae.decode)
  )
  encode, decode = jax.jit(encode), jax.jit(decode)
  for v in range(2):
    x = frames[:, v].astype(np.float32) / 127.5 - 1
    z = encode(x)
    np.testing.assert_allclose(latents[:, v], z, atol=1e-5)
    shown = decode(z)
    np.testing.assert_allclose(pixels[:, v], 0.5 * shown + 0.5, atol=1e-5)


def test_a_tile_that_cannot_be_quartered_is_refused():
  with pytest.raises(ConfigError, match='vae.tile: expected 0 or a multiple of 64 pixels, got 96'):
    VAEConfig(tile=96)
