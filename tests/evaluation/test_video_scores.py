"""PSNR and SSIM against scikit-image, and what counts as a predicted frame."""

import numpy as np
import pytest
import skimage.metrics

from wallwm_jax.evaluation import video
from wallwm_jax.types import DataError

RNG = np.random.default_rng(0)


def scene(*shape: int) -> np.ndarray:
  """Smooth random images in 0..1, [*shape, 20, 24, 3] float32."""
  y, x = np.mgrid[:20, :24] / 20
  waves = (
    RNG.uniform(0, 6, (*shape, 1, 1, 3)) * x[..., None]
    + RNG.uniform(0, 6, (*shape, 1, 1, 3)) * y[..., None]
  )
  return (0.5 + 0.5 * np.sin(waves)).astype(np.float32)


def noisy(images: np.ndarray, level: float = 0.1) -> np.ndarray:
  return np.clip(images + RNG.normal(0, level, images.shape), 0, 1).astype(np.float32)


def test_psnr_and_ssim_match_scikit_image():
  true = scene(4)
  predicted = noisy(true)
  got_psnr, got_ssim = (
    np.asarray(video.psnr(predicted, true)),
    np.asarray(video.ssim(predicted, true)),
  )
  for i in range(4):
    want = skimage.metrics.peak_signal_noise_ratio(true[i], predicted[i], data_range=1)
    assert got_psnr[i] == pytest.approx(want, abs=1e-4)
    want = skimage.metrics.structural_similarity(
      true[i],
      predicted[i],
      data_range=1,
      channel_axis=-1,
      gaussian_weights=True,
      sigma=1.5,
      use_sample_covariance=False,
    )
    assert got_ssim[i] == pytest.approx(want, abs=1e-4)


def test_equal_images_score_one_and_the_8_bit_ceiling():
  true = scene(2)
  np.testing.assert_allclose(video.ssim(true, true), 1, atol=1e-5)
  np.testing.assert_allclose(video.psnr(true, true), 10 * np.log10(12 * 255**2), atol=1e-3)


def test_masked_pixels_do_not_count():
  true = scene(1)
  predicted = true.copy()
  predicted[:, :5] += 0.5
  mask = np.ones((1, 20, 24), bool)
  mask[:, :5] = False
  assert video.psnr(predicted, true, mask)[0] > 58
  assert video.psnr(predicted, true)[0] < 20


def test_small_images_are_refused():
  with pytest.raises(DataError, match='at least 11x11'):
    video.ssim(np.zeros((10, 20, 3)), np.zeros((10, 20, 3)))


def masks(batch: int, views: int, frames) -> dict:
  return {
    'num_frames': np.array(frames),
    'view_mask': np.ones((batch, views), bool),
    'pixel_mask': np.ones((batch, views, 20, 24), bool),
  }


def test_only_predicted_valid_frames_of_present_views_count():
  true = scene(2, 2, 5)
  predicted = true.copy()
  predicted[:, :, 0] = 0  # observed
  predicted[1, :, 3:] = 0  # padding
  predicted[0, 1] = 0  # camera absent
  given = masks(2, 2, [5, 3])
  given['view_mask'][0, 1] = False
  result = video.summarise([video.score_video(predicted, true, **given)])
  assert result.psnr > 58 and result.psnr_end > 58 and result.ssim == pytest.approx(1, abs=1e-5)
  assert (
    np.isnan(result.psnr_curve[0]) and np.isfinite(result.psnr_curve[1:]).all() and result.n == 2
  )


def test_end_scores_read_the_last_valid_frame_of_each_event():
  true = scene(2, 1, 4)
  predicted = true.copy()
  predicted[0, 0, 3] += 0.1
  predicted[1, 0, 1] += 0.1
  result = video.summarise(
    [
      video.score_video(
        np.clip(predicted, -1, 2), np.zeros_like(true) + true, **masks(2, 1, [4, 2])
      )
    ]
  )
  shifted = [
    skimage.metrics.peak_signal_noise_ratio(
      true[e, 0, t], np.clip(predicted[e, 0, t], 0, 1), data_range=1
    )
    for e, t in ((0, 3), (1, 1))
  ]
  assert result.psnr_end == pytest.approx(np.mean(shifted), abs=1e-3)
  assert result.psnr_curve[2] > 58


def test_windows_of_several_lengths_are_pooled():
  short, long = scene(1, 1, 3), scene(1, 1, 5)
  parts = [
    video.score_video(noisy(short), short, **masks(1, 1, [3])),
    video.score_video(noisy(long), long, **masks(1, 1, [5])),
  ]
  pooled, alone = video.summarise(parts), [video.summarise([part]) for part in parts]
  assert pooled.n == 2 and len(pooled.psnr_curve) == 5
  assert pooled.psnr == pytest.approx((2 * alone[0].psnr + 4 * alone[1].psnr) / 6)
  assert pooled.psnr_end == pytest.approx((alone[0].psnr_end + alone[1].psnr_end) / 2)
  np.testing.assert_allclose(pooled.psnr_curve[3:], alone[1].psnr_curve[3:])


def test_copy_last_repeats_the_anchor_and_is_scored_beside_every_predictor():
  frames = (255 * scene(1, 2, 5)).astype(np.uint8)
  copied = video.copy_last(frames, anchor=1)
  assert copied.dtype == np.uint8
  np.testing.assert_array_equal(copied, np.repeat(frames[:, :, 1:2], 5, axis=2))
  truth = {'frames': frames, **masks(1, 2, [5])}
  results = video.evaluate([(truth, {'model': frames / 255.0})], anchor=1)
  assert set(results) == {'model', 'copy_last'}
  assert results['model'].psnr > 58 > results['copy_last'].psnr
  assert np.isnan(results['model'].psnr_curve[:2]).all()
  flat = video.to_json(results)
  assert flat['psnr_end_model'] > flat['psnr_end_copy_last'] and flat['n'] == 1


def test_bad_input_is_an_error():
  true = scene(1, 1, 3)
  with pytest.raises(DataError, match='two videos'):
    video.score_video(true[:, :, :2], true, **masks(1, 1, [3]))
  with pytest.raises(DataError, match='at least one predicted frame'):
    video.summarise([video.score_video(true, true, **masks(1, 1, [1]))])
  with pytest.raises(DataError, match='at least one held-out window'):
    video.evaluate([])
