"""The weight-free text encoder."""

import numpy as np

from wallwm_jax.config import TextConfig
from wallwm_jax.text.factory import make_text_encoder


def test_text_encoder_is_deterministic_and_word_wise():
  encoder = make_text_encoder(TextConfig(tokens=6, width=32))
  a, b = encoder.encode(['Reach the red cube', '']), encoder.encode(['reach the blue cube'])
  np.testing.assert_array_equal(
    a.features,
    make_text_encoder(TextConfig(tokens=6, width=32)).encode(['Reach the red cube', '']).features,
  )
  np.testing.assert_array_equal(a.mask, [[True] * 4 + [False] * 2, [False] * 6])
  np.testing.assert_array_equal(a.features[0, [0, 1, 3]], b.features[0, [0, 1, 3]])
  assert np.abs(a.features[0, 2] - b.features[0, 2]).max() > 1
  assert not a.features[1].any()
