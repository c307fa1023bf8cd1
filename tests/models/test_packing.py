"""Packed rows: every event comes out as it does alone, and no event reaches another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_video_dit import TINY, _random_params

from wallwm_jax.models import functional as F
from wallwm_jax.types import Packing, Text

# Future latents of the events of two rows of 7 latent frames; the rest of a row is padding.
ROWS = ((2, 1), (1, 3))
B, G, V, FRAMES, DRAWS = 2, 3, 3, 7, 2
RATE = TINY.steps_per_latent
STEPS = RATE * 5
PREDICTS_X = dataclasses.replace(
  TINY, video=dataclasses.replace(TINY.video, prediction='x', conditioning='frame')
)


def packing() -> Packing:
  rows = []
  for lengths in ROWS:
    events = [(g, n) for g, n in enumerate(lengths, 1)]
    frame = [(g, i) for g, n in events for i in range(1 + n)]
    step = [(g, i) for g, n in events for i in range(RATE * n)]
    frame += [(0, 0)] * (FRAMES - len(frame))
    step += [(0, 0)] * (STEPS - len(step))
    rows.append([*zip(*frame), *zip(*step)])
  return Packing(*(np.array([row[i] for row in rows], np.int32) for i in range(4)))


class Case:
  """Random inputs of packed rows, and those of any one event in them."""

  def __init__(self, config=TINY):
    self.config = config
    self.params = jax.tree.map(jnp.asarray, _random_params(config))
    self.packing, rng = packing(), np.random.default_rng(0)
    h, w = config.latent_size
    p = config.patches

    def normal(*shape):
      return rng.standard_normal(shape).astype(np.float32)

    self.z = normal(B, V, FRAMES, h, w, config.codec.channels)
    self.t = rng.uniform(0.1, 1, (B, FRAMES)).astype(np.float32)
    self.t[self.packing.frame_index == 0] = 0  # anchors are clean
    self.text = Text(normal(B, G, 5, 12), rng.uniform(size=(B, G, 5)) < 0.7)
    self.text.mask[..., 0] = True
    self.views = np.ones((B, G, V), bool)
    self.views[0, 1, 2] = self.views[1, 0, 0] = False
    self.sight = rng.uniform(size=(B, G, V, p, V, p)) < 0.6
    self.a, self.levels = normal(B, DRAWS, STEPS, 10), rng.uniform(size=(B, G, DRAWS))
    self.levels, self.state = self.levels.astype(np.float32), normal(B, G, 10)

  def inputs(self) -> dict:
    names = ('z', 'text', 'a', 'levels', 'state')
    return {name: getattr(self, name) for name in names}

  def forward(self, z, text, a, levels, state):
    """(video prediction, its features, action prediction) of the rows."""
    packing, views, sight = jax.tree.map(jnp.asarray, (self.packing, self.views, self.sight))
    params, t = self.params, jnp.asarray(self.t)
    masks = F.video_masks(views, packing.frame_event > 0, sight, packing)
    out, features = F.video_forward(params['video'], self.config, z, t, text, masks)
    cache = F.prefill_actions(params['action'], self.config, features, np.arange(FRAMES), masks)
    steps = packing.step_event > 0
    actions = F.action_forward(
      params['action'], self.config, a, levels, state, cache, steps, packing
    )
    return out, features, actions

  def alone(self, b: int, g: int):
    """The same of event g = 1.. of row b, not packed."""
    frames, steps = self.packing.frame_event[b] == g, self.packing.step_event[b] == g
    row = slice(b, b + 1)
    text = Text(self.text.features[row, g - 1], self.text.mask[row, g - 1])
    return self._single(
      self.z[row][:, :, frames], self.t[row][:, frames], text, self.a[row][:, :, steps],
      self.levels[row, g - 1], self.state[row, g - 1], self.views[row, g - 1],
      self.sight[row, g - 1],
    )  # fmt: skip

  @functools.partial(jax.jit, static_argnums=0)
  def _single(self, z, t, text, a, levels, state, views, sight):
    config, params, frames = self.config, self.params, z.shape[2]
    masks = F.video_masks(views, jnp.ones((1, frames), bool), sight)
    out, features = F.video_forward(params['video'], config, z, t, text, masks)
    cache = F.prefill_actions(params['action'], config, features, np.arange(frames), masks)
    actions = F.action_forward(
      params['action'], config, a, levels, state, cache, jnp.ones((1, a.shape[2]), bool)
    )
    return out, features, actions


EVENTS = [(b, g) for b, lengths in enumerate(ROWS) for g in range(1, len(lengths) + 1)]


@pytest.fixture(scope='module', params=[TINY, PREDICTS_X], ids=['v', 'x'])
def case(request):
  return Case(request.param)


def test_packed_events_are_what_they_are_alone(case):
  out, features, actions = jax.jit(case.forward)(**case.inputs())
  for b, g in EVENTS:
    frames, steps = case.packing.frame_event[b] == g, case.packing.step_event[b] == g
    want_out, want_features, want_actions = case.alone(b, g)
    views = case.views[b, g - 1]
    for got, want in (
      (out[b][views][:, frames], want_out[0][views]),
      (features[:, b][:, views][:, :, frames], want_features[:, 0][:, views]),
      (actions[b][:, steps], want_actions[0]),
    ):
      np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_no_event_has_a_gradient_in_another(case):
  frames, steps = case.packing.frame_event, case.packing.step_event

  @jax.jit
  @jax.grad
  def gradient(inputs, b, g):
    text = Text(inputs['text'], jnp.asarray(case.text.mask))
    out, _, actions = case.forward(**inputs | {'text': text})
    own_frames, own_steps = jnp.asarray(frames)[b] == g, jnp.asarray(steps)[b] == g
    video = jnp.where(own_frames[None, :, None, None, None], out[b], 0)
    acts = jnp.where(own_steps[None, :, None], actions[b], 0)
    return jnp.sum(video**2) + jnp.sum(acts**2)

  inputs = jax.tree.map(jnp.asarray, case.inputs() | {'text': case.text.features})
  for b, g in EVENTS:
    grads = gradient(inputs, b, g)
    for other in range(B):
      for name, own in (
        ('z', np.moveaxis(grads['z'][other], 1, 0)[frames[other] != (g if other == b else -1)]),
        ('a', np.moveaxis(grads['a'][other], 1, 0)[steps[other] != (g if other == b else -1)]),
      ):
        assert not own.any(), f'{name} of row {other} reaches event {g} of row {b}'
      for name in ('text', 'levels', 'state'):
        rest = np.delete(grads[name][other], [g - 1] if other == b else [], axis=0)
        assert not rest.any(), f'{name} of row {other} reaches event {g} of row {b}'
    assert all(np.abs(grads[name][b]).max() > 0 for name in grads)


def test_what_padding_holds_is_not_read(case):
  poisoned = case.inputs()
  pad_f, pad_s = case.packing.frame_event == 0, case.packing.step_event == 0
  poisoned['z'] = np.where(pad_f[:, None, :, None, None, None], 1e4, case.z)
  poisoned['a'] = np.where(pad_s[:, None, :, None], 1e4, case.a)
  run = jax.jit(case.forward)
  out, _, actions = run(**case.inputs())
  other, _, moved = run(**poisoned)
  keep, step = ~pad_f[:, None, :, None, None, None], ~pad_s[:, None, :, None]
  np.testing.assert_array_equal(np.where(keep, out, 0), np.where(keep, other, 0))
  np.testing.assert_array_equal(np.where(step, actions, 0), np.where(step, moved, 0))
