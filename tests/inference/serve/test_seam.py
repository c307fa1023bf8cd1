"""Real-time chunking with a trained model: what is being executed is repeated to the letter, and
what follows on it joins better than what a model predicts that was not told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clients import encode, resize

from wallwm_jax.inference.serve.engines import ModelEngine
from wallwm_jax.inference.serve.model import ModelPolicy
from wallwm_jax.training import stages
from wallwm_jax.types import Frozen, InferenceParams, NormStats

STEP = 0.05  # m that either way goes in a control step, to the left or to the right
SCALE = 0.2  # m that is one unit to the model
BATCH, STEPS = 8, 200  # of training
SESSIONS, EXECUTED, DELAY = 24, 2, 3
UPRIGHT = np.float32([0, 0, 0, 1, 0, 0, 0, 1, 0, 0.5])
PICTURE = np.full((16, 16, 3), 128, np.uint8)


@pytest.fixture(scope='module')
def two_ways(cfg):
  """(config, params) of a model whose every demonstration went left or right, at even odds."""
  cfg = dataclasses.replace(
    cfg,
    train=dataclasses.replace(cfg.train, stage='2'),
    data=dataclasses.replace(cfg.data, batch_size=BATCH, buckets=(2,)),
    diffusion=dataclasses.replace(cfg.diffusion, action_draws=8),
    inference=dataclasses.replace(cfg.inference, action_steps=8),
  )
  nothing, channels = np.zeros(10, np.float32), np.zeros(cfg.model.codec.channels, np.float32)
  norm = NormStats(
    action_mean=UPRIGHT, action_scale=nothing + SCALE, state_mean=nothing, state_scale=nothing + 1,
    latent_mean=channels, latent_scale=channels + 1,
  )  # fmt: skip
  frozen = Frozen(norm)
  fake = cfg.fake_batch()
  fake = dataclasses.replace(fake, frames=np.full_like(fake.frames, 128), text=_text(BATCH))
  start = stages.functional.init_params(cfg.model, jax.random.key(0))
  optimizer = optax.adam(3e-3)

  def batch(key):
    way, where = jax.random.split(key)
    way = jax.random.choice(way, np.float32([-1, 1]), (BATCH, 1))
    actions = jnp.zeros(fake.actions.shape).at[:, :, 1].set(way * STEP * np.arange(1, 9) / SCALE)
    state = jnp.asarray(UPRIGHT).at[:3].set(0) + jnp.zeros((BATCH, 10))
    state = state.at[:, 1].set(jax.random.uniform(where, (BATCH,), minval=-0.5, maxval=0.5))
    return dataclasses.replace(fake, actions=actions, state=state)

  @jax.jit
  def train(params, key):
    def step(carry, key):
      action, memory = carry

      def loss(action):
        whole = params | {'action': action}
        return stages.stage_loss(whole, batch(key), frozen, key, config=cfg)[0]

      value, grads = jax.value_and_grad(loss)(action)
      updates, memory = optimizer.update(grads, memory)
      return (optax.apply_updates(action, updates), memory), value

    first = (params['action'], optimizer.init(params['action']))
    (action, _), losses = jax.lax.scan(step, first, jax.random.split(key, STEPS))
    return params | {'action': action}, losses

  params, losses = train(start, jax.random.key(1))
  assert losses[-20:].mean() < 0.5 * losses[:20].mean()
  return cfg, InferenceParams(params, frozen)


def _text(rows):
  return jax.tree.map(lambda x: np.repeat(x, rows, 0), encode(['go']))


def ask(policy, memory, y, **changes):
  state = UPRIGHT + np.eye(10, dtype=np.float32)[1] * y
  pictures = {f'observation/{view}': PICTURE for view in ('front', 'wrist')}
  asked = {'observation/state': state, 'event': 'go'} | pictures | changes
  (reply,) = policy.infer([policy.check(asked, memory)])
  return reply['actions'][:, 1]


@pytest.mark.slow
def test_the_seam_is_smaller_with_what_is_executed_than_without(two_ways):
  policy = ModelPolicy(ModelEngine(*two_ways, bucket=2, max_batch=1), encode, resize)
  seams = {'with': [], 'without': []}
  for session in range(SESSIONS):
    for name, told in (('with', {'executed': EXECUTED, 'delay': DELAY}), ('without', {})):
      memory = policy.start()
      memory.turn = 2 * session  # noise of its own
      first = ask(policy, memory, 0.0)
      here = first[EXECUTED - 1]  # where the robot is when it looks again
      second = ask(policy, memory, here, **told)
      if told:
        meanwhile = first[EXECUTED : EXECUTED + DELAY]
        np.testing.assert_allclose(second[:DELAY], meanwhile, rtol=1e-4, atol=1e-4)
      seams[name].append(abs(second[DELAY] - first[EXECUTED + DELAY - 1]))
  told, free = np.array(seams['with']), np.array(seams['without'])
  assert told.mean() < 0.95 * free.mean()
  assert (told < free).mean() > 0.75
