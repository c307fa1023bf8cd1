"""The cache that inference reads: the same actions as training's, and no copy of it in the loop."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, SingleDeviceSharding
from test_video_dit import TINY, _full_masks, _random_params

from wallwm_jax import config as configs
from wallwm_jax.diffusion import samplers
from wallwm_jax.models import functional as F
from wallwm_jax.parallel import aot, hlo
from wallwm_jax.types import ConfigError

SOME = ([[True, False, True], [False, True, True]], [[True, True, False], [True, False, True]])


@functools.cache
def setup():
  """(params, features with absent tokens NaN, forward(cache), masks)."""
  params = jax.tree.map(jnp.asarray, _random_params(TINY)['action'])
  rng = np.random.default_rng(0)
  features = rng.standard_normal((2, 2, 3, 3, TINY.patches, 24)).astype(np.float32)
  a = rng.standard_normal((2, 3, 8, 10)).astype(np.float32)
  t = rng.uniform(size=(2, 3)).astype(np.float32)
  state, steps = rng.standard_normal((2, 10)).astype(np.float32), np.ones((2, 8), bool)

  @jax.jit
  def forward(cache):
    return F.action_forward(params, TINY, a, t, state, cache, steps)

  return params, features, forward


@pytest.mark.parametrize('masks', [None, SOME], ids=['all', 'some'])
def test_inference_computes_what_training_does(masks):
  params, features, forward = setup()
  masks = _full_masks() if masks is None else F.video_masks(*map(jnp.array, masks))
  tau = F.window_tau(TINY, 'event', 3)
  want = forward(F.prefill_actions(params, TINY, features, tau, masks))
  cache = F.prefill_serving(params, TINY, features, tau, masks)
  count = masks.view.sum(1) * masks.frame.sum(1) * TINY.patches
  np.testing.assert_array_equal(cache.length, count)
  np.testing.assert_allclose(forward(cache), want, atol=1e-5)
  behind = (np.arange(cache.k.shape[2]) >= count[:, None])[..., None]
  poisoned = dataclasses.replace(
    cache, k=jnp.where(behind, jnp.nan, cache.k), v=jnp.where(behind, jnp.nan, cache.v)
  )
  np.testing.assert_array_equal(forward(poisoned), forward(cache))
  short = dataclasses.replace(cache, length=cache.length - 1)
  assert np.abs(forward(short) - want).max() > 1e-4  # every token counts


def test_int8_cache_is_close():
  params, features, forward = setup()
  tau, masks = F.window_tau(TINY, 'event', 3), F.video_masks(*map(jnp.array, SOME))
  whole, rounded = (
    F.prefill_serving(params, TINY, features, tau, masks, dtype) for dtype in ('compute', 'int8')
  )
  assert rounded.k.dtype == rounded.v.dtype == jnp.int8
  assert rounded.k_scale.shape == (2, 2, whole.k.shape[-1])
  want, got = forward(whole), forward(rounded)
  assert 0 < np.linalg.norm(got - want) <= 2e-2 * np.linalg.norm(want)


def test_other_cache_dtypes_are_refused():
  params, features, _ = setup()
  tau = F.window_tau(TINY, 'event', 3)
  with pytest.raises(ConfigError, match=r"'compute', 'int8'.*got 'int4'"):
    F.prefill_serving(params, TINY, features, tau, _full_masks(), 'int4')


# On a TPU

LAYERS, TOKENS, WIDTH = 3, 1024, 256
SERVED = configs.ModelConfig(
  dtype='bfloat16',
  video=configs.VideoConfig(width=WIDTH, layers=LAYERS, heads=2, ffn=256, patch=(1, 2, 2)),
  action=configs.ActionConfig(width=WIDTH, heads=2, ffn=256),
  views=('front', 'wrist'), image_size=(256, 256), history=0, future=1, max_future=1,
)  # fmt: skip


def denoising_program(topology):
  """HLO of prefill and four action steps for one chip; the cache as a loop-invariant."""
  pytest.importorskip('libtpu')
  device = aot.tpu_devices(topology)[0]
  place = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
  shapes = jax.eval_shape(lambda key: F.init_params(SERVED, key), jax.random.key(0))['action']
  frames = TOKENS // (2 * SERVED.patches)
  features = place((LAYERS, 1, 2, frames, SERVED.patches, WIDTH), jnp.bfloat16)

  def run(params, features, a, state):
    masks = F.video_masks(jnp.ones((1, 2), bool), jnp.ones((1, frames), bool))
    tau = F.window_tau(SERVED, 'event', frames)
    cache = F.prefill_serving(params, SERVED, features, tau, masks)

    def velocity(a, sigma):
      t = jnp.full((1, 1), sigma)
      return F.action_forward(params, SERVED, a, t, state, cache, jnp.ones((1, a.shape[2]), bool))

    return samplers.euler(velocity, a, np.linspace(1.0, 0.0, 5, dtype=np.float32))

  dim = SERVED.action_spec.dim
  operands = (
    jax.tree.map(lambda x: place(x.shape, x.dtype), shapes),
    features,
    place((1, 1, 4, dim), jnp.float32),
    place((1, dim), jnp.float32),
  )
  mesh = Mesh(np.array([device]), ('one',))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(run).lower(*operands)
    return aot.compile_for_tpu(lowered, exec_time_optimization_effort=-1.0).as_text()


def inside(computations, op):
  """All instructions that a `while` repeats, those of computations it calls included."""
  todo = [hlo.loop(computations, op)[0]]
  while todo:
    for inner in computations[todo.pop()]:
      yield inner
      todo += [hlo.loop(computations, inner)[0]] if inner.opcode == 'while' else inner.called


def of_all_tokens(op):
  """Whether an instruction makes keys, values or anything as large."""
  result = op.text.split(f' {op.opcode}(')[0]
  return re.search(rf'\b{TOKENS},{WIDTH}\]', result) is not None


@pytest.mark.parametrize('topology', ['v5p:2x2x1', 'v6e:2x2'])
def test_the_loop_over_steps_reads_the_cache_in_place(topology):
  computations, entry = hlo.parse(denoising_program(topology))
  loops = [list(inside(computations, op)) for op in computations[entry] if op.opcode == 'while']
  kernels = [[op for op in ops if 'tpu_custom_call' in op.text] for ops in loops]
  assert sorted(map(len, kernels)) == [0, 1]  # the prefill over layers, the steps
  (prefill,), (steps,) = ([ops for ops, k in zip(loops, kernels) if len(k) == n] for n in (0, 1))
  names = {'parameter', 'get-tuple-element', 'tuple', 'while', 'bitcast'}
  made = [op.text for op in steps if of_all_tokens(op) and op.opcode not in names]
  assert not made, made
  projections = [op for op in prefill if op.opcode in ('dot', 'convolution') and of_all_tokens(op)]
  assert len(projections) == 2
