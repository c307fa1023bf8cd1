"""Qwen3.5 against transformers' on random weights: text, vision, both; prefill, cached decode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qwen_fixtures import load, pictures

from wallwm_jax.models import language
from wallwm_jax.models.binding import bind
from wallwm_jax.models.vlm import vision
from wallwm_jax.models.vlm.backbone import Qwen
from wallwm_jax.text import chat, media
from wallwm_jax.types import ConfigError, path_string

NAMES = ('small', 'odd')
# Cosines of transformers' own logits in bfloat16 with those in float32: random layers forgive less
# than trained ones.
BFLOAT16 = {'small': 0.9988, 'odd': 0.9961}
TOLERANCE = 2e-4  # on logits and on the residual stream after every layer, float32
VISION = 2e-5  # the two forms of GELU differ by ten times as much


@pytest.fixture(scope='module', params=NAMES)
def text(request):
  return load(f'text_{request.param}')


@pytest.fixture(scope='module', params=NAMES)
def vl(request):
  return load(f'vl_{request.param}')


def assert_close(name, got, want, tol=TOLERANCE):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, (name, got.shape, want.shape)
  worst = np.abs(got - want).max(initial=0)
  print(f'{name}: max error {worst:.2e}, max {np.abs(want).max(initial=0):.2f}')
  assert worst <= tol, f'{name} is the first that differs: {worst:.2e}'


def assert_gradients(got, want):
  flat = {path_string(p): x for p, x in jax.tree_util.tree_flatten_with_path(got)[0]}
  for p, x in jax.tree_util.tree_flatten_with_path(want)[0]:
    name = path_string(p)
    assert_close(name, flat.pop(name), x, 1e-3 * np.abs(x).max())
  assert not flat


def cosine(got, want):
  got, want = (np.asarray(x, np.float64).ravel() for x in (got, want))
  return got @ want / np.linalg.norm(got) / np.linalg.norm(want)


def counted(mask):
  """[3, B, S] positions of text: its real tokens counted from 0."""
  positions = np.where(mask, np.cumsum(mask, 1) - 1, 0).astype(np.int32)
  return np.broadcast_to(positions, (3, *mask.shape))


PREFILL = jax.jit(language.prefill, static_argnums=1, static_argnames='size')
DECODE = jax.jit(language.decode, static_argnums=1)
LOGITS = jax.jit(language.logits, static_argnums=1)
EMBED = jax.jit(language.embed, static_argnums=(1, 4))


@functools.partial(jax.jit, static_argnums=1)
def EACH(params, config, x, positions, mask):
  return bind(Qwen, config, params).each(x, positions, mask)


def test_text_layers_and_logits(text):
  f, ids = text, text['inputs.ids']
  mask = np.ones(ids.shape, bool)
  x = EMBED(f.params, f.config, ids)
  assert_close('embed', x, f['mid.embed'], 0)
  for n, h in enumerate(EACH(f.params, f.config, x, counted(mask), mask)):
    assert_close(f'layer{n}', h, f[f'mid.layer{n}'])
  hidden, _ = PREFILL(f.params, f.config, x, counted(mask), mask, size=ids.shape[1])
  assert_close('final_norm', hidden, f['mid.final_norm'])
  assert_close('logits', LOGITS(f.params, f.config, hidden), f['outputs.logits'])


@pytest.mark.parametrize('behind', [False, True])
def test_text_with_padding(text, behind):
  """transformers pads in front; the same tokens padded behind come out the same."""
  f, ids, mask = text, text['inputs.ids'], text['inputs.mask']
  want = f['outputs.logits_leftpad_valid']
  if behind:
    order = np.argsort(~mask, 1, kind='stable')
    ids, mask = (np.take_along_axis(x, order, 1) for x in (ids, mask))
    want = np.take_along_axis(want, order[..., None], 1)
  x = EMBED(f.params, f.config, ids)
  hidden, _ = PREFILL(f.params, f.config, x, counted(mask), mask, size=ids.shape[1])
  got = np.asarray(LOGITS(f.params, f.config, hidden))
  assert_close('logits', got[mask], want[mask])


@pytest.mark.parametrize('step', [1, 4])
def test_text_decodes_from_the_cache(text, step):
  f, ids = text, text['inputs.ids']
  want = f['outputs.logits_decode_last4']
  head = ids.shape[1] - want.shape[1]
  mask = np.ones((len(ids), head), bool)
  x = EMBED(f.params, f.config, ids)
  _, cache = PREFILL(f.params, f.config, x[:, :head], counted(mask), mask, size=80)
  parts = []
  for n in range(head, ids.shape[1], step):
    hidden, cache = DECODE(f.params, f.config, x[:, n : n + step], cache)
    parts.append(LOGITS(f.params, f.config, hidden))
  assert_close('decoded', np.concatenate(parts, 1), want)
  assert cache.length.tolist() == cache.position.tolist() == [ids.shape[1]] * len(ids)


def soft_loss(params, config, embeds, ids):
  """Cross entropy of `ids` behind soft embeddings."""
  positions = counted(np.ones(embeds.shape[:2], bool))
  hidden, _ = language.prefill(
    params, config, embeds, positions, jnp.ones(embeds.shape[:2], bool), size=embeds.shape[1]
  )
  behind = embeds.shape[1] - ids.shape[1] - 1
  chances = jax.nn.log_softmax(language.logits(params, config, hidden[:, behind:-1]))
  return -jnp.take_along_axis(chances, ids[..., None], -1).mean()


def test_gradients_of_a_soft_prompt(text):
  f, ids = text, jnp.asarray(text['inputs.ids'])
  embeds = jnp.asarray(f['inputs.inputs_embeds'])
  loss = jax.jit(jax.value_and_grad(soft_loss, (0, 2)), static_argnums=1)
  value, (params, embeds) = loss(f.params, f.config, embeds, ids)
  assert_close('loss', value, f['outputs.soft_loss'], 1e-5)
  assert_gradients({'inputs_embeds': embeds}, {'inputs_embeds': f['grads.inputs_embeds']})
  assert_gradients(params, f.gradients())


def test_text_in_bfloat16(text):
  f, ids = text, text['inputs.ids']
  config = dataclasses.replace(f.config, dtype='bfloat16')
  mask = np.ones(ids.shape, bool)
  x = EMBED(f.params, config, ids)
  hidden, cache = PREFILL(f.params, config, x, counted(mask), mask, size=ids.shape[1])
  got = LOGITS(f.params, config, hidden)
  assert hidden.dtype == cache.k.dtype == jnp.bfloat16
  assert got.dtype == cache.state.dtype == jnp.float32
  assert cosine(got, f['outputs.logits']) >= BFLOAT16[f.name]
  assert np.abs(got - f['outputs.logits']).max() > 1e-3  # it did round


def tower(f, dtype='float32') -> vision.VisionTower:
  config, width = f.config.vision, f.config.width
  empty = nnx.eval_shape(lambda: vision.VisionTower(config, width, dtype, rngs=nnx.Rngs(0)))
  return nnx.merge(nnx.split(empty)[0], nnx.State(f.params['vision']))


def split(f, kind):
  """(patches [N, P, pixels], grid, rows of the fixture's flat arrays) of each image or video."""
  pixels, grids = {
    'image': ('pixel_values', 'image_grid_thw'),
    'video': ('pixel_values_videos', 'video_grid_thw'),
  }[kind]
  start = 0
  for t, h, w in f[f'inputs.{grids}'].tolist():
    rows = slice(start, start + t * h * w)
    yield f[f'inputs.{pixels}'][rows].reshape(t, h * w, -1), (h, w), rows
    start = rows.stop


@pytest.mark.parametrize('kind', ['image', 'video'])
def test_every_step_of_the_vision_tower(vl, kind):
  f, model, merged = vl, tower(vl), 0
  c = f.config.vision
  for patches, grid, rows in split(f, kind):

    def flat(name, rows=rows):
      return f[f'mid.vis.{kind}.{name}'][rows]

    repeat = len(patches)
    coordinates = np.tile(np.stack(vision.patch_coordinates(grid, c.merge), -1), (repeat, 1))
    np.testing.assert_array_equal(coordinates, flat('position_hw'))
    angles = np.tile(vision.rotation_angles(grid, c), (repeat, 2))
    assert_close('rope_cos', np.cos(angles), flat('rope_cos'), 2e-6)
    assert_close('rope_sin', np.sin(angles), flat('rope_sin'), 2e-6)
    positions = np.tile(model.position_embedding(grid), (repeat, 1))
    assert_close('pos_embed', positions, flat('pos_embed'), 1e-6)
    embedded = model.patch_embed(patches).reshape(-1, c.width)
    assert_close('patch_embed', embedded, flat('patch_embed'), VISION)
    out, stream = jax.jit(model.layers, static_argnums=1)(patches, grid)
    for n, x in enumerate(stream):
      assert_close(f'block{n}', x.reshape(-1, c.width), flat(f'block{n}'), VISION)
    tokens = slice(merged, merged + out.shape[0] * out.shape[1])
    want = f[f'mid.vis.{kind}.merged'][tokens]
    assert_close('merged', out.reshape(-1, f.config.width), want, VISION)
    merged = tokens.stop
  assert merged == len(f[f'mid.vis.{kind}.merged'])


def test_vision_in_bfloat16(vl):
  f, model, got = vl, tower(vl, 'bfloat16'), []
  for patches, grid, _ in split(f, 'image'):
    out = jax.jit(model, static_argnums=1)(patches, grid)
    assert out.dtype == jnp.bfloat16
    got.append(out.reshape(-1, f.config.width))
  assert cosine(np.concatenate(got), f['mid.vis.image.merged']) > 0.999


def vl_inputs(f):
  """(ids, mask, images, grids, positions, position of the next token) of the fixture's prompts."""
  ids, mask = f['inputs.input_ids'], f['inputs.attention_mask'].astype(bool)
  frames = pictures(f)
  images, grids = media.model_inputs(frames, f.config.vision)
  left = iter(frames)
  positions, following = np.zeros((3, *ids.shape), np.int32), []
  for n, types in enumerate(f['inputs.mm_token_type_ids']):
    types = types[mask[n]]
    count = int(((types > 0) & (np.diff(types, prepend=0) != 0)).sum())
    media_of_row = [next(left).grid3 for _ in range(count)]
    positions[:, n, mask[n]], after = chat.rope_positions(
      types, media_of_row, f.config.vision.merge
    )
    following.append(after)
  return ids, mask, images, grids, positions, following


def test_positions_of_media(vl):
  f = vl
  _, mask, _, _, positions, following = vl_inputs(f)
  np.testing.assert_array_equal(positions, f['outputs.position_ids'])
  deltas = np.asarray(following) - mask.sum(1)
  np.testing.assert_array_equal(deltas[:, None], f['outputs.rope_deltas'])


@pytest.mark.parametrize('behind', [False, True])
def test_prompts_with_media(vl, behind):
  """Layers, logits and cached decode; `behind`: padded behind instead of in front."""
  f, tail = vl, vl['inputs.tail']
  ids, mask, images, grids, positions, following = vl_inputs(f)
  order = np.argsort(~mask if behind else mask, 1, kind='stable')

  def move(x):
    return np.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1)

  ids, mask, positions = move(ids), move(mask), np.stack([*map(move, positions)])
  x = EMBED(f.params, f.config, ids, images, grids)
  for n, h in enumerate(EACH(f.params, f.config, x, positions, mask)):
    assert_close(f'layer{n}', np.asarray(h)[mask], move(f[f'mid.layer{n}'])[mask])
  room = ids.shape[1] + tail.shape[1]
  hidden, cache = PREFILL(f.params, f.config, x, positions, mask, size=room)
  got = np.asarray(LOGITS(f.params, f.config, hidden))
  assert_close('logits', got[mask], move(f['outputs.logits_valid'])[mask])
  assert_close('text only', got[2][mask[2]], f['outputs.logits_text_only_row2'][0])
  np.testing.assert_array_equal(cache.position, following)
  new, steps = language.embed(f.params, f.config, tail), []
  for n in range(tail.shape[1]):
    hidden, cache = DECODE(f.params, f.config, new[:, n : n + 1], cache)
    steps.append(LOGITS(f.params, f.config, hidden))
  assert_close('decoded', np.concatenate(steps, 1), f['outputs.logits_decode_tail'])


@pytest.mark.slow
def test_gradients_through_the_vision_tower(vl):
  f = vl
  ids, mask, images, grids, positions, _ = vl_inputs(f)

  def loss(params):
    x = language.embed(params, f.config, ids, images, grids)
    hidden, _ = language.prefill(params, f.config, x, positions, mask, size=ids.shape[1])
    chances = jax.nn.log_softmax(language.logits(params, f.config, hidden))
    each = -jnp.take_along_axis(chances, f['inputs.targets'][..., None], -1)[..., 0]
    return (each * mask).sum() / mask.sum()

  value, grads = jax.jit(jax.value_and_grad(loss))(f.params)
  assert_close('loss', value, f['outputs.loss'], 1e-5)
  assert_gradients(grads, f.gradients())


def test_patches_of_another_grid_are_refused(vl):
  model, c = tower(vl), vl.config.vision
  patches = np.zeros((1, 4 * c.merge**2, c.pixels), np.float32)
  model(patches, (2 * c.merge, 2 * c.merge))
  for grid in ((2 * c.merge, c.merge), (4 * c.merge**2, 1), (c.merge + 1, c.merge)):
    with pytest.raises(ConfigError, match='patches of shape'):
      model(patches, grid)
