"""Frechet distance against SciPy's matrix root and closed forms; the fixed net."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.evaluation import frechet, video
from wallwm_jax.types import DataError


@settings(deadline=None, max_examples=20)
@given(n=st.integers(8, 20), m=st.integers(8, 20), d=st.integers(1, 5), seed=st.integers(0, 99))
def test_distance_is_the_formula_with_scipys_root(n, m, d, seed):
  rng = np.random.default_rng(seed)
  a, b = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.normal(1, 2, (m, d))
  covariances = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b)]
  root = np.real(scipy.linalg.sqrtm(covariances[0] @ covariances[1]))
  want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(sum(covariances) - 2 * root)
  assert frechet.frechet_distance(a, b) == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_distance_of_shifted_features_is_the_squared_shift():
  a = np.random.default_rng(0).normal(size=(30, 4))
  assert frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
  assert frechet.frechet_distance(a, a + [3, 0, 4, 0]) == pytest.approx(25)


@pytest.mark.parametrize('a, b', [((1, 2), (3, 2)), ((3, 2), (3, 3)), ((3,), (3,))])
def test_features_that_cannot_be_compared_are_refused(a, b):
  with pytest.raises(DataError, match='expected finite features'):
    frechet.frechet_distance(np.zeros(a), np.zeros(b))


def test_the_net_sees_motion_and_is_always_the_same():
  still = np.tile(np.random.default_rng(0).uniform(size=(1, 1, 16, 16, 3)), (1, 5, 1, 1, 1))
  moving = np.stack([np.roll(still[0, 0], 3 * t, 1) for t in range(5)])[None]
  features = np.asarray(frechet.clip_features(np.concatenate([still, moving]).astype(np.float32)))
  assert features.shape == (2, frechet.WIDTH) and np.abs(features[0] - features[1]).max() > 1e-3
  assert [round(float(k.sum()), 4) for k in frechet._kernels()] == [3.467, 4.2503]


def test_videos_are_scored_and_hidden_parts_do_not_count():
  rng = np.random.default_rng(1)
  frames = rng.integers(0, 256, (3, 2, 5, 16, 16, 3), dtype=np.uint8)
  truth = {
    'frames': frames,
    'num_frames': np.array([5, 3, 5]),
    'view_mask': np.array([[1, 1], [1, 0], [1, 1]], bool),
    'pixel_mask': np.ones((3, 2, 16, 16), bool),
  }
  truth['pixel_mask'][..., 12:] = False
  exact = frames / 255
  hidden = exact.copy()
  hidden[1, :, 3:], hidden[1, 1], hidden[..., 12:, :] = 0, 0, 0
  noisy = np.clip(exact + rng.normal(0, 0.3, frames.shape), 0, 1)
  results = video.evaluate([(truth, {'hidden': hidden, 'noisy': noisy})])
  assert results['hidden'].frechet == pytest.approx(0, abs=1e-9)
  assert results['noisy'].frechet > 1e-5
  flat = video.to_json(results)
  assert flat['frechet_net'] == frechet.NAME and flat['frechet_noisy'] > flat['frechet_hidden']
