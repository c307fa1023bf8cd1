"""The video tower against diffusers' WanTransformer3DModel: layers, gradients, meshes, grafts."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from wallwm_jax import config as cfg
from wallwm_jax.convert import wan_dit
from wallwm_jax.convert.entries import assemble
from wallwm_jax.models import functional as F
from wallwm_jax.models import layers, video_dit
from wallwm_jax.models.binding import bind
from wallwm_jax.parallel import rules
from wallwm_jax.parallel.constraints import activation_sharding
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.types import Text, path_string

DATA = pathlib.Path(__file__).parents[1] / 'fixtures' / 'data'
NAMES = ('small', 'odd', 'channel')
KINDS = ('scalar', 'token')  # one noise level per sample; one per frame, frame 0 clean
every_fixture = pytest.mark.parametrize('name', NAMES)
every_kind = pytest.mark.parametrize('kind', KINDS)


class Fixture:
  """One reference model and its run, in our layouts."""

  def __init__(self, name: str):
    groups = {}
    with safe_open(DATA / f'wan_dit_{name}.safetensors', 'numpy') as file:
      source = json.loads(file.metadata()['config'])
      for key in file.keys():
        group, rest = key.split('.', 1)
        groups.setdefault(group, {})[rest] = file.get_tensor(key)
    self.inputs, self.outputs, self.mid = groups['inputs'], groups['outputs'], groups['mid']
    self.grads, self.source = groups['grads'], source
    shapes = {key: x.shape for key, x in groups['weights'].items()}
    self.naming, fields = wan_dit.infer(shapes, source)
    self.entries = wan_dit.model(fields)
    self.params = assemble(self.entries, groups['weights'], self.naming)
    video = fields['config']
    h, w = self.inputs['x'].shape[3:]
    self.config = cfg.ModelConfig(
      video=cfg.VideoConfig(**video),
      codec=cfg.CodecConfig(channels=fields['channels']),
      text=cfg.TextConfig(tokens=self.inputs['text'].shape[1], width=fields['text_width']),
      views=('front',),
      image_size=(8 * h, 8 * w),
    )
    self.z = np.moveaxis(self.inputs['x'], 1, -1)[:, None]  # [B, 1, F, h, w, C']
    self.text = Text(self.inputs['text'], np.ones(self.inputs['text'].shape[:2], bool))
    b, _, f = self.z.shape[:3]
    self.masks = F.video_masks(np.ones((b, 1), bool), np.ones((b, f), bool))

  def levels(self, kind: str) -> np.ndarray:
    t = self.inputs[f'{kind}.t'] / np.float32(1000)
    return np.broadcast_to(t[:, None], self.masks.frame.shape) if kind == 'scalar' else t

  def sample(self, kind: str) -> np.ndarray:
    return np.moveaxis(self.outputs[f'{kind}.sample'], 1, -1)[:, None]

  def per_frame(self, name: str, width: int) -> np.ndarray:
    """An intermediate of the time embedding as [B, F, width]."""
    b, f = self.masks.frame.shape
    x = self.mid[name].reshape(b, -1, width)
    return np.broadcast_to(x, (b, f, width)) if x.shape[1] == 1 else x[:, :: x.shape[1] // f]

  def forward(self, params, kind, config=None):
    return _forward(config or self.config, params, self.z, self.levels(kind), self.text, self.masks)


_forward = jax.jit(
  lambda config, params, z, t, text, masks: F.video_forward(params, config, z, t, text, masks),
  static_argnums=0,
)


# Compiled as a user compiles. Unoptimised loops, as in the rest of the test suite, choose which
# products and sums round together by how much is fused, and a branch beside them changes that.
_forward_as_released = jax.jit(
  _forward.__wrapped__,
  static_argnums=0,
  compiler_options={
    'xla_backend_optimization_level': 3,
    'xla_cpu_use_fusion_emitters': True,
  },
)


@pytest.fixture(scope='module')
def fixtures():
  return {name: Fixture(name) for name in NAMES}


def assert_first_difference(pairs, tolerances):
  """Compares (name, got, expected) in order of computation; the failure names the first."""
  for name, got, expected in pairs:
    got = np.asarray(got, np.float64)
    assert got.size == expected.size, f'{name}: got shape {got.shape}, expected {expected.shape}'
    error = np.abs(got.reshape(expected.shape) - expected).max()
    limit = next(limit for prefix, limit in tolerances if name.startswith(prefix))
    assert error <= limit, f'first difference at {name}: {error:.2e} > {limit:.0e}'


# What differs at t = 987.25 is the last bit of an angle.
TOLERANCES = (
  ('rope', 1e-6),
  ('patch', 1e-5),
  ('text', 1e-5),
  ('block0.', 3e-5),
  ('', 1e-4),
)


@every_fixture
@every_kind
def test_every_intermediate_matches(fixtures, monkeypatch, name, kind):
  fixture = fixtures[name]
  assert_first_difference(list(intermediates(fixture, kind, monkeypatch)), TOLERANCES)


def intermediates(fixture, kind, monkeypatch):
  """(name, ours, reference) in order of computation, run layer by layer outside of the scan."""
  config, mid = fixture.config, fixture.mid
  c, t = config.video, jnp.asarray(fixture.levels(kind))
  tower = bind(video_dit.VideoTower, config, fixture.params)
  grid = tuple(n // p for n, p in zip(fixture.z.shape[3:5], c.patch[1:]))
  x = tower.patch_embed(video_dit._patchify(jnp.asarray(fixture.z), c.patch))
  context = tower._context(x, grid, fixture.text, fixture.masks)
  yield 'rope_cos', context.self_rotation.cos, mid['rope_cos'][0, :, 0, 0::2]
  yield 'rope_sin', context.self_rotation.sin, mid['rope_sin'][0, :, 0, 1::2]
  conv = mid[f'{kind}.patch_embedding_conv']
  yield 'patch_embedding', x, conv.reshape(*conv.shape[:2], -1).swapaxes(1, 2)
  yield 'text', context.text, mid[f'{kind}.text']
  features = layers.timestep_features(t, c.freq_dim)
  yield 't_sinusoid', features, fixture.per_frame(f'{kind}.t_sinusoid', c.freq_dim)
  temb, e6 = tower.embed_time(t)
  yield 'temb', temb, fixture.per_frame(f'{kind}.temb', c.width)
  yield 'timestep_proj', e6, fixture.per_frame(f'{kind}.timestep_proj', 6 * c.width)
  record = _spy(monkeypatch)
  for i in range(c.layers):
    record.clear()
    graph, state = nnx.split(tower.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], state))
    x = block(x, e6, jnp.zeros_like(temb), context)
    if i == 0:
      ours = {
        'norm1': record['modulate', 0],
        # normed and rotated in one op; what lies between is not made
        **{
          f'attn1.norm_{part}': getattr(block.self_attn, f'{part}_norm')(
            record[id(getattr(block.self_attn, part))]
          )
          for part in ('q', 'k')
        },
        'attn1': record[id(block.self_attn.o)],
        'norm2': record[id(block.norm_cross)],
        'attn2': record[id(block.cross_attn.o)],
        'norm3': record['modulate', 1],
        'ffn': record[id(block.ffn.down)],
      }
      for part, got in ours.items():
        yield f'block0.{part}', got, mid[f'{kind}.block0.{part}']
    yield f'block{i}', x, mid[f'{kind}.block{i}']
  yield 'proj_out', tower.head(x, temb), mid[f'{kind}.proj_out_tokens']


def _spy(monkeypatch) -> dict:
  """Outputs of the small modules by id, and what `modulate` normalised by ('modulate', count)."""
  record, modulate = {}, layers.modulate
  for module in (layers.Linear, layers.RMSNorm, layers.AffineLayerNorm):
    call = module.__call__

    def recorded(self, *args, call=call):
      record[id(self)] = call(self, *args)
      return record[id(self)]

    monkeypatch.setattr(module, '__call__', recorded)

  def recorded_modulate(x, shift, scale, eps):
    count = sum(isinstance(key, tuple) for key in record)
    record['modulate', count] = layers.layer_norm(x, eps)
    return modulate(x, shift, scale, eps)

  monkeypatch.setattr(video_dit, 'modulate', recorded_modulate)
  return record


@every_fixture
@every_kind
def test_prediction_and_features_match(fixtures, name, kind):
  fixture = fixtures[name]
  out, features = fixture.forward(fixture.params, kind)
  pairs = [(f'block{i}', h, fixture.mid[f'{kind}.block{i}']) for i, h in enumerate(features)]
  assert_first_difference([*pairs, ('sample', out, fixture.sample(kind))], [('', 1e-4)])


def gradients(fixture, kind):
  """{name: (ours, reference)}: of sum(prediction * cotangent), by torch key."""
  cotangent = np.moveaxis(fixture.inputs['cotangent'], 1, -1)[:, None]

  @jax.jit
  def grad(params, z):
    def objective(params, z):
      out, _ = F.video_forward(
        params, fixture.config, z, fixture.levels(kind), fixture.text, fixture.masks
      )
      return jnp.sum(out * cotangent)

    return jax.grad(objective, argnums=(0, 1))(params, z)

  of_params, of_z = grad(fixture.params, fixture.z)
  leaves = {
    path_string(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_params)
  }
  ours = {'x': np.moveaxis(np.asarray(of_z)[:, 0], -1, 1)}
  for entry in fixture.entries:
    leaf = leaves[entry.path] if entry.layer is None else leaves[entry.path][entry.layer]
    ours[entry.diffusers] = entry.to_torch(leaf)
  prefix = f'{kind}.'
  reference = {k.removeprefix(prefix): g for k, g in fixture.grads.items() if k.startswith(prefix)}
  return {key: (ours[key], g) for key, g in reference.items()}


@every_fixture
def test_gradients_match(fixtures, name):
  kind = 'scalar' if name == 'channel' else 'token'
  pairs = gradients(fixtures[name], kind)
  assert len(pairs) == 13
  for key, (got, expected) in pairs.items():
    error, limit = np.abs(got - expected).max(), 1e-3 * np.abs(expected).max()
    assert limit > 0 and error <= limit, f'gradient of {key}: {error:.2e} > {limit:.2e}'


@every_fixture
def test_bfloat16_stays_close(fixtures, name):
  fixture = fixtures[name]
  config = dataclasses.replace(fixture.config, dtype='bfloat16')
  for kind in KINDS:
    got = np.asarray(fixture.forward(fixture.params, kind, config)[0], np.float64)
    expected = fixture.sample(kind)
    cosine = np.vdot(got, expected) / np.linalg.norm(got) / np.linalg.norm(expected)
    assert np.isfinite(got).all() and cosine >= 0.999, f'{kind}: cosine {cosine:.5f}'


MESHES = {
  'fsdp': cfg.MeshConfig(fsdp=8),
  'context': cfg.MeshConfig(context=2, fsdp=4),
  'tensor': cfg.MeshConfig(tensor=2, fsdp=4),
  'all': cfg.MeshConfig(fsdp=2, context=2, tensor=2),
}


@pytest.mark.parametrize('mesh_name', MESHES)
def test_parity_holds_on_eight_devices(fixtures, mesh_name):
  fixture, mesh_config = fixtures['small'], MESHES[mesh_name]
  mesh = make_mesh(mesh_config)
  assert mesh.size == 8
  copies = 8 // fixture.z.shape[0]  # the batch must divide over the devices

  def repeat(tree):
    return jax.tree.map(lambda x: np.repeat(x, copies, axis=0), tree)

  @jax.jit
  def forward(params, z, t, text, masks):
    with activation_sharding(mesh, mesh_config.rules):
      return F.video_forward(params['video'], fixture.config, z, t, text, masks)

  params = {'video': fixture.params}
  shardings = rules.param_shardings(params, mesh, mesh_config.rules)
  params = jax.device_put(params, shardings)
  up = params['video']['blocks']['ffn']['up']['kernel']
  assert up.addressable_shards[0].data.size < up.size
  for kind in KINDS:
    batch = repeat((fixture.z, fixture.levels(kind), fixture.text, fixture.masks))
    batch = jax.device_put(batch, rules.batch_shardings(batch, mesh, mesh_config.rules))
    out, features = forward(params, *batch)
    pairs = [(f'block{i}', h, repeat(fixture.mid[f'{kind}.block{i}']))
             for i, h in enumerate(features)]  # fmt: skip
    pairs.append(('sample', out, repeat(fixture.sample(kind))))
    assert_first_difference(pairs, [('', 1e-4)])


def multi_view(fixture, views: tuple[str, ...]) -> cfg.ModelConfig:
  video = dataclasses.replace(fixture.config.video, cross_view=True)
  return dataclasses.replace(fixture.config, video=video, views=views)


@every_kind
@pytest.mark.parametrize('views', [1, 3])
def test_grafts_leave_the_public_prediction_bit_identical(fixtures, kind, views):
  fixture = fixtures['odd']
  names = ('front', 'side', 'wrist')[:views]
  config, alone = multi_view(fixture, names), dataclasses.replace(fixture.config, views=names)
  fresh = F.init_params(config, jax.random.key(0))['video']
  grafted = video_dit.graft_views(fixture.params, fresh)
  assert jax.tree.map(jnp.shape, grafted) == jax.tree.map(jnp.shape, fresh)
  for part in ('q', 'k', 'v', 'q_norm', 'k_norm'):
    jax.tree.map(
      np.testing.assert_array_equal,
      grafted['blocks']['cross_view'][part],
      fixture.params['blocks']['self_attn'][part],
    )
  z = np.concatenate([fixture.z * (1 - 0.2 * v) for v in range(views)], axis=1)
  masks = F.video_masks(np.ones((len(z), views), bool), fixture.masks.frame)
  inputs = (z, fixture.levels(kind), fixture.text, masks)
  with_branch, features = _forward_as_released(config, grafted, *inputs)
  without, expected = _forward_as_released(alone, fixture.params, *inputs)
  np.testing.assert_array_equal(features, expected)
  np.testing.assert_array_equal(with_branch, without)
  np.testing.assert_allclose(with_branch[:, :1], fixture.sample(kind), atol=1e-4)


def test_grafted_branches_do_mix_views_once_they_have_an_output(fixtures):
  fixture = fixtures['small']
  config = multi_view(fixture, ('front', 'side'))
  grafted = video_dit.graft_views(fixture.params, F.init_params(config, jax.random.key(0))['video'])
  output = fixture.params['blocks']['self_attn']['o']
  grafted['blocks']['cross_view'] = grafted['blocks']['cross_view'] | {'o': output}
  masks = F.video_masks(np.ones((2, 2), bool), fixture.masks.frame)
  args = (fixture.levels('token'), fixture.text, masks)
  one = np.concatenate([fixture.z, fixture.z], axis=1)
  other = np.concatenate([fixture.z, -fixture.z], axis=1)
  a, b = (_forward(config, grafted, z, *args)[0][:, 0] for z in (one, other))
  assert np.abs(a - b).max() > 1e-3


@every_kind
def test_a_padded_clip_equals_the_clip_on_its_real_frames(fixtures, kind):
  fixture = fixtures['odd']
  rng = np.random.default_rng(0)
  b, v, f, *rest = fixture.z.shape
  padding = 100 * rng.standard_normal((b, v, 2, *rest)).astype(np.float32)
  z = np.concatenate([fixture.z, padding], axis=2)
  t = np.concatenate([fixture.levels(kind), rng.uniform(size=(b, 2)).astype(np.float32)], axis=1)
  frame = np.concatenate([fixture.masks.frame, np.zeros((b, 2), bool)], axis=1)
  out, _ = _forward(
    fixture.config, fixture.params, z, t, fixture.text, F.video_masks(fixture.masks.view, frame)
  )
  np.testing.assert_allclose(out[:, :, :f], fixture.sample(kind), atol=1e-4)


def test_masked_words_equal_a_shorter_caption(fixtures):
  fixture = fixtures['small']
  words = np.concatenate([fixture.text.features, 50 * fixture.text.features[:, :3]], axis=1)
  mask = np.arange(words.shape[1])[None].repeat(len(words), 0) < fixture.text.mask.shape[1]
  out, _ = _forward(
    fixture.config, fixture.params, fixture.z, fixture.levels('scalar'), Text(words, mask),
    fixture.masks,
  )  # fmt: skip
  np.testing.assert_allclose(out, fixture.sample('scalar'), atol=1e-4)


def test_eps_is_honoured_everywhere(fixtures):
  """With eps changed, every intermediate that a norm feeds must move away from the reference."""
  fixture = fixtures['odd']
  video = dataclasses.replace(fixture.config.video, eps=1e-6)
  other = dataclasses.replace(fixture.config, video=video)
  tower = nnx.eval_shape(lambda: video_dit.VideoTower(fixture.config, rngs=nnx.Rngs(0)))
  found = {m.eps for _, m in nnx.iter_graph(tower) if hasattr(m, 'eps')}
  assert found == {1e-3}
  wrong, _ = fixture.forward(fixture.params, 'token', other)
  assert np.abs(wrong - fixture.sample('token')).max() > 1e-4
