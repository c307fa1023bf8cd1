"""The heads of stage 3 and the prefix projector: what they read, what they ignore, what they
return.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wallwm_jax import config as cfg
from wallwm_jax.models.binding import bind, fresh
from wallwm_jax.models.vlm.heads import Heads, PrefixProjector
from wallwm_jax.types import path_string

VLM = cfg.QwenConfig(width=20, dtype='float32')
CONFIG = cfg.LanguageConfig(
  vlm=VLM,
  reader=cfg.QwenConfig(width=24, dtype='float32'),
  heads=cfg.HeadsConfig(width=16, heads=2),
)
TEXT = cfg.TextConfig(tokens=5, width=12)
B, S = 3, 7


@pytest.fixture(scope='module')
def heads() -> dict:
  """Every leaf random, so that nothing hides behind a zero initialisation."""
  rng = np.random.default_rng(0)
  params = fresh(Heads(CONFIG, TEXT, rngs=nnx.Rngs(0)))
  return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), params)


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(1)
  hidden = rng.standard_normal((B, S, VLM.width), np.float32)
  mask = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0]], bool)
  return hidden, mask


BANK = np.random.default_rng(2).standard_normal((4, TEXT.width), np.float32)
LAST = 2  # row of what was completed before


def next_event(params, hidden, mask, bank=BANK, last=None):
  last = np.full(len(mask), -1) if last is None else last
  return bind(Heads, CONFIG, params, TEXT).next_event(hidden, mask, bank, last)


@jax.jit
def outputs(params, hidden, mask):
  """(features, logits of presence, logits over the bank, remaining time)"""
  heads = bind(Heads, CONFIG, params, TEXT)
  features, present = heads.condition(hidden, mask)
  logits = heads.next_event(hidden, mask, BANK, jnp.full(len(mask), LAST))
  return features, present, logits, heads.remaining(hidden, mask)


def test_shapes_and_dtypes(heads, inputs):
  hidden, mask = inputs
  for dtype in ('float32', 'bfloat16'):
    got = outputs(heads, hidden.astype(dtype), mask)
    assert [x.shape for x in got] == [(B, 5, 12), (B, 5), (B, 4), (B,)]
    assert {x.dtype for x in got} == {jnp.dtype('float32')}


def test_padding_has_no_influence_whatever_it_holds(heads, inputs):
  hidden, mask = inputs
  base = outputs(heads, hidden, mask)
  spoiled = np.where(mask[..., None], hidden, np.nan)
  jax.tree.map(np.testing.assert_array_equal, outputs(heads, spoiled, mask), base)
  for row in range(B):
    alone = outputs(heads, hidden[row : row + 1, mask[row]], np.ones((1, mask[row].sum()), bool))
    for got, want in zip(alone, base):
      np.testing.assert_allclose(got[0], want[row], atol=2e-5)


def test_gradients_reach_real_states_only(heads, inputs):
  hidden, mask = inputs
  rng = np.random.default_rng(0)
  out, back = jax.vjp(lambda hidden: outputs(heads, hidden, mask), hidden)
  for part in range(len(out)):
    weights = [rng.standard_normal(x.shape, np.float32) * (i == part) for i, x in enumerate(out)]
    size = np.abs(back(tuple(weights))[0]).max(-1)
    assert (size[~mask] == 0).all() and (size[mask] > 1e-6).all(), part


def test_every_parameter_trains(heads, inputs):
  hidden, mask = inputs

  def loss(params):
    return sum(jnp.sum(jnp.sin(x)) for x in outputs(params, hidden, mask))

  gradients = jax.jit(jax.grad(loss))(heads)
  for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
    assert np.abs(gradient).max() > 1e-7, path_string(path)


def test_order_of_the_states_matters(heads, inputs):
  """Rows of text features follow the order of words."""
  hidden, mask = inputs
  swapped = hidden.copy()
  swapped[:, [2, 1]] = hidden[:, [1, 2]]
  both = mask[:, 1] & mask[:, 2]
  change = np.abs(outputs(heads, swapped, mask)[0] - outputs(heads, hidden, mask)[0])
  assert (change[both].max((1, 2)) > 1e-3).all()


def test_what_was_done_last_changes_what_comes_next(heads, inputs):
  base = np.asarray(next_event(heads, *inputs))
  for last in ([2, -1, -1], [-1, 3, 1]):
    moved = np.abs(np.asarray(next_event(heads, *inputs, last=np.array(last))) - base).max(1)
    np.testing.assert_array_equal(moved > 1e-3, np.array(last) >= 0)


def test_permuting_the_bank_permutes_the_logits(heads, inputs):
  order = [2, 0, 3, 1]
  got = next_event(heads, *inputs, BANK[order])
  base = np.asarray(next_event(heads, *inputs))
  np.testing.assert_allclose(got, base[:, order], atol=1e-5)
  # Captions do not compete before the softmax: one of them alone has the logit it has among all.
  np.testing.assert_allclose(next_event(heads, *inputs, BANK[:1]), base[:, :1], atol=1e-5)
  scale = np.exp(heads['event']['scale'])
  assert (np.abs(base) <= scale * (1 + 1e-5)).all() and base.std(1).min() > 0.01 * scale


def test_remaining_time_is_finite_and_not_negative(heads, inputs):
  hidden, mask = inputs
  for scale in (0.0, 1e-20, 1e4, 1e15):
    for bias in (-1e4, 0.0, 1e4):
      out = heads['time']['out'] | {'bias': jnp.float32(bias)}
      params = heads | {'time': heads['time'] | {'out': out}}
      got = outputs(params, np.float32(scale) * hidden, mask)[3]
      assert np.isfinite(got).all() and (got >= 0).all()
      assert bias <= 0 or (got > 0.9 * bias).all()
  nothing = outputs(heads, hidden, np.zeros_like(mask))
  assert all(np.isfinite(x).all() for x in nothing)


def test_names_tell_matrices_from_vectors():
  """Sharding and Muon rules go by path: a kernel is a matrix (or a stack of them) with sides >= 16
  at any real size, everything else is small."""
  config = cfg.LanguageConfig(heads=cfg.HeadsConfig(width=64, heads=2))
  text = cfg.TextConfig(tokens=16, width=64)
  make = lambda: (  # noqa: E731
    fresh(Heads(config, text, rngs=nnx.Rngs(0))),
    fresh(PrefixProjector(config, rngs=nnx.Rngs(0))),
  )
  for path, leaf in jax.tree_util.tree_flatten_with_path(jax.eval_shape(make))[0]:
    path = path_string(path)
    axes = leaf.ndim - ('/blocks/' in path)
    if path.endswith('/kernel'):
      assert axes == 2 and min(leaf.shape[-2:]) >= 16, path
    elif path.endswith('/embedding'):
      assert axes == 2, path
    else:
      assert path.endswith(('/scale', '/bias')) and axes <= 1, path


def test_projector_starts_at_the_size_of_embeddings():
  params = fresh(PrefixProjector(CONFIG, rngs=nnx.Rngs(0)))
  latents = 50 * np.random.default_rng(0).standard_normal((B, 4, VLM.width), np.float32)
  project = lambda p, x: bind(PrefixProjector, CONFIG, p)(x)  # noqa: E731
  out = np.asarray(project(params, latents))
  assert out.shape == (B, 4, 24) and out.dtype == np.float32
  np.testing.assert_allclose(np.sqrt(np.square(out).mean(-1)), 0.02, rtol=1e-3)
  gradient = jax.grad(lambda x: project(params, x)[1, 2].sum())(latents)
  touched = np.abs(gradient).max(-1) > 0
  assert touched[1, 2] and touched.sum() == 1  # every latent by itself
