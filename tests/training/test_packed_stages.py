"""A packed row is trained on as its events are one by one, and its step runs on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax import presets
from wallwm_jax.config import MeshConfig
from wallwm_jax.data.packing import join_windows
from wallwm_jax.data.pipeline import make_reader
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import Draw
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.training import stages
from wallwm_jax.training.state import abstract_state, build_optimizer, init_params
from wallwm_jax.training.step import make_train_step
from wallwm_jax.types import ConfigError, Text

BUDGET = 8
ROWS = ((2, 1), (1, 1, 1))  # future latents of the events of each row
SIGMA = 0.6


@pytest.fixture(scope='module')
def reader(tiny, store):
  config, opened = tiny.config('joint', store=store), EventStore(store)

  def encode_text(captions):
    rng = np.random.default_rng(len(captions))
    return Text(
      rng.standard_normal((len(captions), 4, 8)).astype(np.float32),
      np.ones((len(captions), 4), bool),
    )

  return make_reader(config, opened, tiny.norm(config), encode_text), opened


@pytest.fixture(scope='module')
def windows(reader):
  """[row][event] windows of their own length, without a batch axis."""
  read, store = reader
  start, event = store.column('start'), iter(range(12))
  return [[read(Draw(e, n, int(start[e]))) for n, e in zip(row, event)] for row in ROWS]


def stacked(elements):
  return jax.tree.map(lambda *x: jnp.stack(x), *elements)


@pytest.fixture
def config(tiny, store):
  return tiny.config('joint', store=store, data={'pack': BUDGET, 'batch_size': 2})


@pytest.fixture(scope='module')
def packed(windows):
  return stacked([join_windows(row, BUDGET, 4) for row in windows])


@pytest.fixture
def params(config):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  return jax.tree.map(
    lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape), jnp.float32), shapes
  )


def test_clips_of_packed_rows_are_those_of_their_events(tiny, config, windows, packed):
  frozen = jax.tree.map(jnp.asarray, tiny.frozen(config))
  single = dataclasses.replace(config, data=dataclasses.replace(config.data, pack=0))
  packed_clip, alone_clip = (
    jax.jit(lambda batch, c=c: stages.encode_clip(batch, frozen, c)) for c in (config, single)
  )
  clip = packed_clip(packed)
  for b, row in enumerate(windows):
    for g, window in enumerate(row, 1):
      own = np.asarray(packed.segment[b] == g)
      alone = alone_clip(stacked([window]))
      np.testing.assert_allclose(clip.latents[b][:, own], alone.latents[0], atol=1e-6)
      np.testing.assert_array_equal(clip.supervised[b][:, own], alone.supervised[0])
      np.testing.assert_array_equal(clip.known[b][own], alone.known)
    padding = np.asarray(packed.segment[b] == 0)
    assert not clip.supervised[b][:, padding].any() and not clip.frame_mask[b][padding].any()


@pytest.mark.parametrize('mapping', ['anchor', 'symmetric'])
def test_the_loss_is_the_mean_over_the_events_of_a_row(
  tiny, config, params, windows, packed, mapping, monkeypatch
):
  """With one noise level and no noise, what is drawn does not depend on the shape of the batch."""
  level = jnp.float32(SIGMA)
  monkeypatch.setattr(stages, 'unit_noise', lambda key, shape: jnp.full(shape, 0.3))
  for name in ('sample_sigma', 'sample_anchor_sigma'):
    monkeypatch.setattr(
      stages.schedules, name, lambda key, shape, *_: jnp.broadcast_to(level, shape))
  frozen = jax.tree.map(jnp.asarray, tiny.frozen(config))

  def loss(pack):
    new = tiny.override(
      config, data={'pack': pack}, diffusion={
        'mapping': mapping, 'caption_drop': (0.0, 0.0, 1, 2), 'action_draws': 1, 'dct_weight': 0.0})
    return jax.jit(lambda params, batch: stages.stage_loss(
      params, batch, frozen, jax.random.key(0), config=new)[1])

  got, single = loss(BUDGET)(params, packed), loss(0)
  alone = [single(params, stacked([window])) for row in windows for window in row]
  futures = np.array([n for row in ROWS for n in row], np.float64)
  for name in ('loss_video', 'loss_action'):
    want = np.average([float(parts[name]) for parts in alone], weights=futures)
    assert float(got[name]) == pytest.approx(want, rel=2e-5)


def test_the_smoothness_loss_looks_at_each_event_alone(config, packed):
  """Steps are dealt out event by event, whatever lies between them."""
  steps = jnp.arange(packed.actions.shape[1], dtype=jnp.float32)
  x = jnp.broadcast_to(steps[:, None], (2, 3, len(steps), 10))
  out = stages._by_event(x, packed, 8).reshape(2, BUDGET // 2, 3, 8, 10)
  np.testing.assert_array_equal(out[0, 0, 0, :, 0], np.arange(8))
  np.testing.assert_array_equal(out[0, 1, 2, :, 4], [8, 9, 10, 11, 0, 0, 0, 0])
  np.testing.assert_array_equal(out[1, 2, 1, :, 0], [8, 9, 10, 11, 0, 0, 0, 0])
  assert not out[0, 2:].any() and not out[1, 3:].any()


@pytest.mark.parametrize('stage', ['1', '2', 'joint'])
def test_padding_and_absent_events_count_for_nothing(tiny, config, params, packed, stage):
  config = tiny.override(config, train={'stage': stage}, diffusion={
    'tube_prob': 0.5, 'tube_size': (1, 1), 'sight_cone': True, 'caption_drop': (0.5, 0.9, 4, 9)})
  frozen = jax.tree.map(jnp.asarray, tiny.frozen(config))
  loss = functools.partial(jax.jit(lambda params, batch: stages.stage_loss(
    params, batch, frozen, jax.random.key(1), config=config)[0]), params)
  frame, step = packed.frame_segment > 0, packed.step_segment > 0
  rotten = dataclasses.replace(
    packed,
    frames=jnp.where(frame[:, None, :, None, None, None], packed.frames, 255),
    actions=jnp.where(step[..., None], packed.actions, 1e6),
    state=jnp.where(packed.event_mask[..., None], packed.state, 1e6),
  )
  assert float(loss(packed)) == float(loss(rotten)) and np.isfinite(float(loss(packed)))


def test_the_reasoning_of_every_event_starts_from_its_own_anchor(tiny):
  config = tiny.language('2', data={'text': 'staircase'})
  alone = config.fake_batch(batch_size=3)
  new = tiny.override(config, data={'pack': 9, 'batch_size': 1})
  row = new.fake_batch()  # three events of two latents
  frames = jnp.concatenate([alone.frames[i] for i in range(3)], axis=1)[None]
  short = row.frames.shape[2] - frames.shape[2]
  frames = jnp.pad(frames, [(0, 0), (0, 0), (0, short)] + [(0, 0)] * 3)

  def events(x):
    return jnp.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1))[None]

  names = ('state', 'view_mask', 'prompt')
  told = {name: jax.tree.map(events, getattr(alone, name)) for name in names}
  row = dataclasses.replace(row, frames=frames, **told)
  frozen = jax.tree.map(jnp.asarray, tiny.frozen_language(config))

  params, read = init_params(config, jax.random.key(0)), stages.language.latent_text
  want, got = jax.jit(
    lambda params, frozen: (read(params, alone, frozen, config), read(params, row, frozen, new))
  )(params, frozen)
  np.testing.assert_allclose(got.features[0, :3], want.features, atol=1e-5)


@pytest.mark.slow
def test_the_mesh_does_not_change_a_packed_step(tiny, config, make_state):
  def train(mesh, start=None):
    # Muon on a mesh is for test_meshes; without it the step compiles in half of the time.
    new = tiny.override(config, data={'batch_size': 8}, optim={'optimizer': 'adamw'})
    new = dataclasses.replace(new, mesh=mesh)
    devices = make_mesh(mesh)
    optimizer = build_optimizer(new, devices)
    abstract = abstract_state(new, optimizer, devices)
    start = jax.device_get(start or make_state(new, optimizer, abstract))
    state = jax.device_put(start, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    step = make_train_step(new, devices, optimizer, abstract)
    frozen = jax.tree.map(jnp.asarray, tiny.frozen(new))
    losses = []
    for seed in range(2):
      state, metrics = step(state, new.fake_batch(seed=seed), frozen)
      losses.append(float(metrics['loss']))
    return start, losses

  start, single = train(MeshConfig())
  assert train(MeshConfig(fsdp=2, context=2, tensor=2), start)[1] == pytest.approx(single, rel=2e-5)


def test_codecs_that_need_whole_events_are_refused(tiny, config, packed):
  config = tiny.override(config, model={'codec': presets.CODECS['wan2_1']})
  frozen = jax.tree.map(jnp.asarray, tiny.frozen(config))
  with pytest.raises(ConfigError, match='data.latents'):
    stages.encode_clip(packed, frozen, config)
