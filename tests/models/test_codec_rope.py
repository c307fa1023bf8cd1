"""The DCT codec and the rotary tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.config import CodecConfig
from wallwm_jax.kernels.qk_norm_rope.api import qk_norm_rope
from wallwm_jax.models import codec, rope
from wallwm_jax.types import ConfigError


def _frames(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@given(
  future=st.integers(0, 3), rows=st.integers(1, 2), cols=st.integers(1, 3), seed=st.integers(0, 99)
)
@settings(max_examples=10, deadline=None)
def test_all_coefficients_invert_exactly(future, rows, cols, seed):
  config = CodecConfig(spatial=4, channels=4 * 4 * 4 * 3)
  frames = _frames((1, 2, 1 + 4 * future, 4 * rows, 4 * cols, 3), seed)
  decoded = codec.decode(config, codec.encode(config, frames))
  np.testing.assert_allclose(decoded, frames / 255.0, atol=2e-6)


def test_basis_is_orthonormal_and_truncation_is_a_projection():
  config = CodecConfig(spatial=4, channels=20)
  basis = codec.dct_basis(config).astype(np.float64)
  np.testing.assert_allclose(basis.T @ basis, np.eye(20), atol=1e-6)
  latents = np.random.default_rng(0).standard_normal((1, 1, 3, 2, 2, 20)).astype(np.float32) * 0.05
  # The first latent frame codes one image, so only its time-constant coefficients are reachable.
  again = codec.encode(config, jnp.round(codec.decode(config, latents) * 255).astype(jnp.uint8))
  np.testing.assert_allclose(again[:, :, 1:], latents[:, :, 1:], atol=0.02)


def test_a_constant_clip_has_only_dc():
  config = CodecConfig()
  latents = codec.encode(config, np.full((1, 1, 5, 16, 16, 3), 200, np.uint8))
  assert np.abs(latents[..., 0]).min() > 1
  np.testing.assert_allclose(latents[..., 1:], 0, atol=1e-4)
  np.testing.assert_allclose(latents[:, :, 0], latents[:, :, 1], atol=1e-4)


def test_latents_are_causal_in_time():
  config, frames = CodecConfig(), _frames((1, 1, 9, 16, 16, 3))
  later = frames.copy()
  later[:, :, 5:] = 0
  a, b = codec.encode(config, frames), codec.encode(config, later)
  np.testing.assert_array_equal(a[:, :, :2], b[:, :, :2])
  assert np.abs(a[:, :, 2] - b[:, :, 2]).max() > 0


@pytest.mark.parametrize('shape', [(1, 1, 4, 16, 16, 3), (1, 1, 5, 12, 16, 3)])
def test_wrong_clip_sizes_are_refused(shape):
  with pytest.raises(ValueError, match='expected 1 \\+ 4N frames'):
    codec.encode(CodecConfig(), np.zeros(shape, np.uint8))


def test_too_many_channels_are_refused():
  with pytest.raises(ConfigError, match='channels'):
    CodecConfig(spatial=4, channels=193)


def test_rotation_preserves_norms_and_depends_on_relative_position():
  def rotated(x, rotation):
    turn = functools.partial(qk_norm_rope, heads=2, eps=0.0)
    return turn(x, jnp.ones(32), *map(jnp.asarray, rotation))

  x = jax.random.normal(jax.random.key(0), (1, 3, 32))
  x /= jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True))  # the norm changes nothing
  angles = rope.axis_angles(np.arange(3.0), 8, 100.0).astype(np.float32)
  turned = rotated(x, rope.Rotation.of(angles))
  assert np.abs(turned[:, 1:] - x.reshape(1, 3, 2, 16)[:, 1:]).max() > 0.1
  np.testing.assert_allclose(
    jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x.reshape(1, 3, 2, 16), axis=-1), rtol=1e-5
  )
  q, k = x[:, :1], x[:, 1:2]

  def score(shift):
    at_q, at_k = (rope.Rotation.of(angles[i : i + 1] + angles[shift]) for i in (0, 1))
    return jnp.sum(rotated(q, at_q) * rotated(k, at_k))

  np.testing.assert_allclose(score(0), score(2), rtol=1e-4)


def test_wan_split_of_the_head():
  # head 128: 22 time pairs, 21 row pairs, 21 column pairs.
  angles = rope.video_angles(np.arange(2), (1, 2), 128, 1e4)
  assert angles.shape == (4, 64)
  np.testing.assert_allclose(angles[2, :22], 1e4 ** (-np.arange(22) / 22), rtol=1e-6)
  np.testing.assert_allclose(angles[1, 43:], 1e4 ** (-np.arange(21) / 21), rtol=1e-6)
  assert not angles[1, :43].any()
