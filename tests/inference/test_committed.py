"""Actions that are being executed already: kept to the letter, and followed on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.inference.event import predict_event
from wallwm_jax.inference.unified import predict_chunk
from wallwm_jax.types import ActionChunk

KEY = jax.random.key(5)


@pytest.fixture(scope='module', params=['event', 'chunk', 'symmetric'])
def predict(request, cfg):
  """(f(params, obs, text, committed), frames of an observation)."""
  if request.param == 'chunk':
    call = functools.partial(predict_chunk, key=KEY, cfg=cfg)
    return jax.jit(lambda p, o, t, c: call(p, o, t, committed=c).chunk.actions), 5
  if request.param == 'symmetric':
    cfg = dataclasses.replace(
      cfg, diffusion=dataclasses.replace(cfg.diffusion, mapping='symmetric')
    )
  call = functools.partial(predict_event, key=KEY, cfg=cfg, bucket=2)
  return jax.jit(lambda p, o, t, c: call(p, o, t, committed=c).chunk.actions), 1


def committed(steps, seed=0):
  """[2, 8, A] random actions, of which the first `steps` [2] of each row are committed."""
  actions = np.random.default_rng(seed).standard_normal((2, 8, 10)).astype(np.float32)
  return ActionChunk(jnp.asarray(actions), jnp.arange(8) < jnp.asarray(steps)[:, None])


def test_committed_actions_are_kept_and_the_others_follow_on_them(predict, params, make_inputs):
  run, frames = predict
  obs, text = make_inputs(frames)
  free = run(params, obs, text, committed([0, 0]))
  np.testing.assert_allclose(run(params, obs, text, None), free, rtol=1e-5, atol=1e-5)
  held = committed([3, 0])
  got = run(params, obs, text, held)
  np.testing.assert_allclose(got[0, :3], held.actions[0, :3], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(got[1], free[1], rtol=1e-4, atol=1e-4)
  other = run(params, obs, text, committed([3, 0], seed=1))
  assert np.abs(got[0, 3:] - free[0, 3:]).max() > 1e-3
  assert np.abs(got[0, 3:] - other[0, 3:]).max() > 1e-3


def test_what_is_not_committed_is_not_looked_at(predict, params, make_inputs):
  run, frames = predict
  obs, text = make_inputs(frames)
  held = committed([3, 5])
  garbage = jnp.where(held.mask[..., None], held.actions, 1e3)
  np.testing.assert_array_equal(
    run(params, obs, text, held), run(params, obs, text, ActionChunk(garbage, held.mask))
  )
