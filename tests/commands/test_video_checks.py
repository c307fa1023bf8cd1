"""Checks of predicted video on a tiny store: what they measure, and what they leave out."""

import dataclasses

import numpy as np
import pytest

from wallwm_jax.commands import evaluators, video_checks
from wallwm_jax.data.schema import Calibration
from wallwm_jax.data.store import EpisodeStoreWriter, EventStore
from wallwm_jax.geometry import cameras

INTRINSICS = np.array([[20.0, 0, 8], [0, 20, 8], [0, 0, 1]], np.float32)


@pytest.fixture(scope='module')
def calibrated(tmp_path_factory, make_episode) -> EventStore:
  """Three episodes seen by two fixed cameras, and one whose second camera moves."""
  eyes = np.array([[0.0, -1, 1], [1, 0, 1]], np.float32)
  poses = cameras.look_at(eyes, np.zeros((2, 3), np.float32))
  path = tmp_path_factory.mktemp('calibrated') / 'store'
  with EpisodeStoreWriter(path, heldout=0.0) as writer:
    for index in range(4):
      record = make_episode(index)
      side = poses[1] if index < 3 else np.tile(poses[1], (record.num_frames, 1, 1))
      seen = {'front': Calibration(INTRINSICS, poses[0]), 'side': Calibration(INTRINSICS, side)}
      writer.add(dataclasses.replace(record, calibration=seen))
  return EventStore(path)


@pytest.fixture
def windows(config, calibrated, params):
  return evaluators.Windows(config, calibrated, params.norm, 'train')


def truth(windows):
  """A policy that gives the demonstrated actions."""
  from wallwm_jax.evaluation.open_loop import denormalise

  norm = windows.norm
  return lambda batch: denormalise(batch.actions, norm.action_mean, norm.action_scale)


def test_states_are_those_of_the_recording(windows, calibrated):
  for batch in windows.batches():
    states = windows.states(batch)
    rows = zip(windows.facts(batch, 'episode'), windows.facts(batch, 'start'), strict=True)
    lengths = windows.facts(batch, 'length')
    for i, (number, start) in enumerate(rows):
      recorded = calibrated.info(int(number)).state
      np.testing.assert_allclose(states[i, 0], recorded[start])
      end = start + min(int(batch.num_frames[i]), int(lengths[i]))
      np.testing.assert_allclose(states[i, : end - start], recorded[start:end])
    fixed = windows.fixed_views(batch)
    assert fixed[:, 0].all()
    moving = np.array(windows.facts(batch, 'episode')) == _moving(calibrated)
    np.testing.assert_array_equal(fixed[:, 1], ~moving)


def _moving(store) -> int:
  return next(i for i in range(4) if store.info(i).calibration['side'].extrinsics.ndim == 3)


def test_geometry_tells_the_true_video_from_another(windows):
  geometry = video_checks.Geometry(windows, truth(windows))
  for batch in windows.batches():
    frames = np.asarray(batch.frames)
    geometry.watch(batch, {'model': frames[:, :, ::-1], 'codec': frames})
  found = geometry.to_json()
  assert set(found) == set(video_checks.CHECKS)
  assert set(found['path']) == {'true', 'model', 'codec', 'copy_last'}
  assert found['path']['true'] == found['path']['codec'] != found['path']['model']
  # A still image puts the gripper where it was: consistent between views, but not with its path.
  assert found['epipolar']['copy_last']['value'] < 0.2 < found['path']['copy_last']['value']
  assert set(found['action_video']) == {'true', 'model', 'other event', 'hold still'}
  assert found['epipolar']['true']['n'] < found['path']['true']['n']  # one view is not enough


def test_caption_gap_is_zero_for_who_does_not_listen(windows):
  assert video_checks.caption_gap(windows, lambda batch: 1 / 0) == {}  # one caption per bucket
  data = dataclasses.replace(windows.config.data, buckets=(4,))
  windows = dataclasses.replace(windows, config=dataclasses.replace(windows.config, data=data))

  def deaf(batch):
    return np.asarray(batch.frames) / 255 * 0.9

  def listens(batch):
    said = np.asarray(batch.text.features).sum((1, 2))
    right = np.isclose(said, own[batch.uid.tobytes()])
    shade = np.where(right, 0.9, 0.5)[:, None, None, None, None, None]
    return np.asarray(batch.frames) / 255 * shade

  own = {
    batch.uid.tobytes(): np.asarray(batch.text.features).sum((1, 2)) for batch in windows.batches()
  }
  gap = video_checks.caption_gap(windows, deaf)
  assert gap['caption_gap']['gap'] == 0
  assert video_checks.caption_gap(windows, listens)['caption_gap']['gap'] > 1
