"""The joints between store, model and scores."""

import dataclasses

import jax
import numpy as np
import pytest

from wallwm_jax.commands import action_checks, evaluators
from wallwm_jax.evaluation import open_loop


def as_chunks(config):
  return dataclasses.replace(
    config, data=dataclasses.replace(config.data, window='chunk', buckets=(2,))
  )


def held_out(store):
  return np.flatnonzero(store.column('split') == 'heldout')


def test_windows_cover_the_split_once_with_their_facts(config, store, params):
  windows = evaluators.Windows(config, store, params.norm)
  batches = list(windows.batches())
  assert all(len(b.num_frames) <= config.data.batch_size for b in batches)
  uids = np.concatenate([b.uid.astype(np.uint64) for b in batches])
  got = sorted((uids[:, 0] | uids[:, 1] << np.uint64(32)).tolist())
  assert got == sorted(store.column('uid')[held_out(store)].tolist())
  for batch in batches:
    labels = windows.facts(batch, 'label')
    lengths = {'go': 8, 'come': 14}
    assert [lengths[label] for label in labels] == batch.raw_length.tolist()
    captions = {'go': 'go there', 'come': 'come back'}
    assert windows.captions(batch) == [captions[label] for label in labels]


def test_limit_spreads_over_the_split(config, store, params):
  windows = evaluators.Windows(config, store, params.norm, limit=2)
  rows = [row for batch in windows.batches() for row in windows.facts(batch, 'episode')]
  events = held_out(store)
  assert sorted(rows) == sorted(store.column('episode')[[events[0], events[-1]]].tolist())


def test_window_actions_are_the_batches_actions(config, store, params):
  windows = evaluators.Windows(config, store, params.norm)
  direct = list(windows.actions())
  batched = [
    (open_loop.denormalise(a, params.norm.action_mean, params.norm.action_scale), m)
    for b in windows.batches()
    for a, m in zip(b.actions, b.action_mask)
  ]
  for (actions, mask), (want, want_mask) in zip(direct, batched, strict=True):
    np.testing.assert_allclose(actions, want, atol=1e-6)
    np.testing.assert_array_equal(mask, want_mask)


def test_the_policy_sees_nothing_after_the_anchor(config, store, params):
  chunks = as_chunks(config)
  batch = next(evaluators.Windows(chunks, store, params.norm).batches())
  obs = evaluators.observe(chunks, params.norm, batch)
  assert obs.frames.shape[2] == 1 + 4 * config.model.history
  np.testing.assert_array_equal(obs.frames, batch.frames[:, :, :5])
  np.testing.assert_allclose(obs.state, 2 * batch.state, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('window', ['event', 'chunk'])
def test_predictions_do_not_depend_on_how_a_batch_is_filled_up(config, store, params, window):
  chosen = config if window == 'event' else as_chunks(config)
  batch = next(evaluators.Windows(chosen, store, params.norm).batches())
  whole = evaluators.action_predictor(chosen, params)(batch)
  first = jax.tree.map(lambda x: np.asarray(x)[:1], batch)
  alone = evaluators.action_predictor(chosen, params)(first)
  assert whole.shape == batch.actions.shape and alone.shape == (1, *whole.shape[1:])
  np.testing.assert_allclose(alone[0], whole[0], atol=1e-5)


@pytest.mark.slow
def test_scores_of_actions_and_video(config, store, params):
  actions = evaluators.evaluate_actions(config, params, store)
  assert actions.n == len(held_out(store)) and set(actions.by_label) == {'go', 'come'}
  assert np.isfinite(list(actions.policy.values())).all()
  assert actions.interval.n == len(set(store.column('episode')[held_out(store)].tolist()))
  videos = evaluators.evaluate_video(config, params, store, steps=2, limit=2)
  assert set(videos) == {'model', 'codec', 'copy_last'} and videos['model'].n == 2
  assert videos['codec'].psnr > videos['model'].psnr


@pytest.mark.slow
def test_chunk_video_is_scored_from_the_anchor_on(config, store, params):
  chunks = as_chunks(config)
  videos = evaluators.evaluate_video(chunks, params, store, steps=1, limit=2)
  assert len(videos['model'].psnr_curve) == 1 + 4 * 2
  batch = next(evaluators.Windows(chunks, store, params.norm, limit=1).batches())
  film = evaluators.video_predictor(chunks, params, steps=1)(batch)
  seen = batch.frames[:, :, 4:5] / 255
  assert np.abs(film[:, :, :1] - seen).mean() < np.abs(film[:, :, 4:5] - seen).mean()


@pytest.mark.slow
def test_samples_show_valid_frames_of_present_cameras(config, store, params):
  windows = evaluators.Windows(config, store, params.norm, limit=2)
  strips = evaluators.video_strips(windows, params, steps=1)
  traces = evaluators.action_traces(windows, params)
  assert {s.caption for s in strips} == {'go there', 'come back'} == {t.caption for t in traces}
  for strip in strips:
    assert strip.views == ('front', 'side') and strip.fps == 10
    frames = 9 if strip.caption == 'go there' else 17
    assert strip.predicted.shape == strip.true.shape == (2, frames, 16, 16, 3)


@pytest.mark.slow
def test_latency_names_every_part(config, params):
  result = evaluators.measure_latency(config, params, calls=2)
  assert {'whole prediction', 'actions against the cache'} <= set(result['parts'])
  assert all(part.p50_ms > 0 for part in result['parts'].values())


def test_a_policy_that_looks_is_told_from_one_that_does_not(config, store, params):
  windows = evaluators.Windows(config, store, params.norm)

  def looks(batch):
    shade = np.asarray(batch.frames)[:, 0, 0].mean((1, 2, 3))
    return np.broadcast_to(shade[:, None, None], batch.actions.shape)

  blind = action_checks.image_sensitivity(windows, lambda batch: np.zeros(batch.actions.shape))
  assert blind['image_shuffle_increase'] == 0 and blind['image_shuffle_n'] == len(held_out(store))
  assert action_checks.image_sensitivity(windows, looks)['image_shuffle_increase'] != 0
  alone = dataclasses.replace(windows, limit=1)
  assert action_checks.image_sensitivity(alone, looks) == {}


def test_events_last_as_long_as_those_of_their_caption(store):
  found = action_checks.duration_error(store)
  assert found['duration_error'] == 0 and found['duration_n'] == len(held_out(store))


@pytest.mark.slow
def test_denoising_curve_has_the_error_at_every_number_of_steps(config, store, params):
  windows = evaluators.Windows(config, store, params.norm, limit=2)
  own, rng = config.inference.action_steps, np.random.default_rng(0)
  # Fresh weights answer zero velocity, whatever the number of steps.
  model = jax.tree.map(lambda x: x + rng.normal(0, 0.05, x.shape).astype(x.dtype), params.model)
  params = dataclasses.replace(params, model=model)
  curve = action_checks.denoising_curve(windows, params, [1, own])
  whole = evaluators.evaluate_actions(config, params, store, limit=2)
  assert curve[str(own)].value == pytest.approx(whole.policy['mae'], rel=1e-5)
  assert curve['1'].value != curve[str(own)].value
