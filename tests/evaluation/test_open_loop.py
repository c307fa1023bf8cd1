"""Open-loop action error against NumPy by hand."""

import dataclasses

import numpy as np
import pytest
import scipy.spatial.transform

from wallwm_jax.config import ActionSpec, ExperimentConfig
from wallwm_jax.evaluation import open_loop
from wallwm_jax.types import DataError, NormStats

RNG = np.random.default_rng(0)
IDENTITY = np.array([1, 0, 0, 0, 1, 0.0])


def rot6d(rotations: scipy.spatial.transform.Rotation) -> np.ndarray:
  matrices = rotations.as_matrix()
  return np.concatenate([matrices[..., :, 0], matrices[..., :, 1]], -1)


def poses(events: int, steps: int, arms: int = 1) -> np.ndarray:
  """Random valid actions [events, steps, 10 * arms]."""
  shape = (events, steps, arms)
  turned = rot6d(scipy.spatial.transform.Rotation.random(events * steps * arms, RNG))
  parts = [RNG.normal(size=(*shape, 3)), turned.reshape(*shape, 6), RNG.uniform(size=(*shape, 1))]
  return np.concatenate(parts, -1).reshape(events, steps, 10 * arms)


def test_errors_of_one_event_by_hand():
  true = np.zeros((1, 3, 10))
  true[..., 3:9] = IDENTITY
  predicted = true.copy()
  predicted[0, :, 0] = (0.1, 0.2, 9.0)  # the third step is not supervised
  predicted[0, 1, 9] = 0.5
  turn = scipy.spatial.transform.Rotation.from_rotvec([0, 0, 0.3])
  predicted[0, 0, 3:9] = rot6d(turn)
  mask = np.ones((1, 3, 10), bool)
  mask[:, 2] = False
  errors = open_loop.action_errors(predicted, true, mask, ActionSpec())
  assert errors.position[0] == pytest.approx((0.1 + 0.2) / 6)
  assert errors.rotation[0] == pytest.approx(0.3 / 2)
  assert errors.gripper[0] == pytest.approx(0.25)
  assert errors.endpoint[0] == pytest.approx(0.2)
  assert errors.mae[0] == pytest.approx((0.3 + 0.5 + np.abs(rot6d(turn) - IDENTITY).sum()) / 20)


def test_squares_ends_and_shape_of_one_event_by_hand():
  true = np.zeros((1, 3, 10))
  true[..., 3:9] = IDENTITY
  predicted = true.copy()
  predicted[0, :, 0] = (0.1, 0.2, 9.0)  # the third step is not supervised
  turn = scipy.spatial.transform.Rotation.from_rotvec([0, 0, 0.3])
  predicted[0, 1, 3:9] = rot6d(turn)
  true[0, 1, 9] = 1
  mask = np.ones((1, 3, 10), bool)
  mask[:, 2] = False
  errors = open_loop.action_errors(predicted, true, mask, ActionSpec(), np.zeros((1, 10)))
  assert errors.position_rmse[0] == pytest.approx(np.sqrt((0.01 + 0.04) / 2))
  assert errors.rotation_rmse[0] == pytest.approx(np.sqrt(0.09 / 2))
  assert errors.endpoint_rotation[0] == pytest.approx(0.3)
  assert errors.dtw[0] == pytest.approx((0.1 + 0.2) / 2)
  assert errors.gripper_f1[0] == 0  # it never opens


def test_shuffled_images_keep_everything_but_the_frames(setting):
  batch = setting[0][0]
  shown = open_loop.shuffled_images(batch)
  np.testing.assert_array_equal(shown.frames, batch.frames[[1, 2, 0]])
  np.testing.assert_array_equal(shown.state, batch.state)
  np.testing.assert_array_equal(shown.actions, batch.actions)
  one = dataclasses.replace(batch, num_frames=batch.num_frames[:1])
  with pytest.raises(DataError, match='at least two windows'):
    open_loop.shuffled_images(one)


def test_image_sensitivity_is_the_paired_increase():
  plain, shuffled = RNG.uniform(size=6), RNG.uniform(size=6)
  found = open_loop.image_sensitivity(plain, shuffled, [0, 0, 1, 1, 2, 2])
  assert found['image_shuffle_increase'] == pytest.approx(np.mean(shuffled) - np.mean(plain))
  assert found['image_shuffle_increase_low'] <= found['image_shuffle_increase']
  with pytest.raises(DataError, match='expected two arrays'):
    open_loop.image_sensitivity([], [], [])


@pytest.mark.parametrize('arms', [1, 2])
def test_errors_match_scipy_for_random_poses(arms):
  predicted, true = poses(4, 5, arms), poses(4, 5, arms)
  errors = open_loop.action_errors(predicted, true, np.ones(true.shape, bool), ActionSpec(arms))

  def rotations(x):
    columns = x.reshape(-1, 10)[:, 3:9]
    first, second = columns[:, :3], columns[:, 3:]
    matrices = np.stack([first, second, np.cross(first, second)], -1)
    return scipy.spatial.transform.Rotation.from_matrix(matrices)

  angle = (rotations(predicted).inv() * rotations(true)).magnitude().reshape(4, -1)
  np.testing.assert_allclose(errors.rotation, angle.mean(1), atol=1e-7)
  np.testing.assert_allclose(errors.mae, np.abs(predicted - true).mean((1, 2)))
  last = (predicted - true)[:, -1].reshape(4, arms, 10)[..., :3]
  np.testing.assert_allclose(errors.endpoint, np.linalg.norm(last, axis=-1).mean(1))


def test_unsupervised_steps_and_events_do_not_count():
  true = poses(2, 4)
  mask = np.ones(true.shape, bool)
  mask[0, 2:] = False
  mask[1] = False
  noisy = true.copy()
  noisy[0, 2:] += 5
  noisy[1] += 5
  errors = open_loop.action_errors(noisy, true, mask, ActionSpec())
  assert errors.mae[0] == 0 and errors.endpoint[0] == 0 and np.isnan(errors.mae[1])


def test_shapes_are_checked():
  with pytest.raises(DataError, match=r'expected three arrays \[B, K, 20\]'):
    open_loop.action_errors(poses(1, 2), poses(1, 2), np.ones((1, 2, 10), bool), ActionSpec(2))


def test_hold_actions_stay_at_the_anchor_with_the_gripper_kept():
  state = poses(3, 1, arms=2)[:, 0]
  held = open_loop.hold_actions(state, 4)
  assert held.shape == (3, 4, 20)
  np.testing.assert_array_equal(held[:, :, [0, 1, 2, 10, 11, 12]], 0)
  np.testing.assert_array_equal(held[:, 1, 3:9], np.tile(IDENTITY, (3, 1)))
  np.testing.assert_array_equal(held[:, 3, [9, 19]], state[:, [9, 19]])


def test_mean_actions_average_what_is_supervised():
  short, long = poses(1, 2)[0], poses(1, 3)[0]
  mask = np.ones(long.shape, bool)
  mask[1] = False
  mask[2] = False
  mean = open_loop.mean_actions([(short, np.ones(short.shape, bool)), (long, mask)])
  np.testing.assert_allclose(mean[0], (short[0] + long[0]) / 2)
  np.testing.assert_allclose(mean[1], short[1])
  np.testing.assert_allclose(mean[2], short[1])  # never supervised: repeats the step before


def test_mean_actions_need_events():
  with pytest.raises(DataError, match='at least one training event'):
    open_loop.mean_actions([])


@pytest.fixture(scope='module')
def setting():
  """(batches, norm, physical actions) of two length buckets; K differs."""
  config = ExperimentConfig()
  norm = NormStats(
    action_mean=RNG.normal(size=10),
    action_scale=RNG.uniform(0.5, 2, 10),
    state_mean=RNG.normal(size=10),
    state_scale=RNG.uniform(0.5, 2, 10),
    latent_mean=np.zeros(96),
    latent_scale=np.ones(96),
  )
  batches, physical = [], []
  for bucket in (2, 4):
    actions = poses(3, 4 * bucket)
    batch = config.fake_batch(bucket, batch_size=3, seed=bucket)
    scaled = (actions - norm.action_mean) / norm.action_scale
    batches.append(dataclasses.replace(batch, actions=scaled.astype(np.float32)))
    physical.append(actions)
  return batches, norm, physical


def run(setting, predict, **more):
  batches, norm, _ = setting
  return open_loop.evaluate(
    batches,
    predict,
    norm=norm,
    spec=ActionSpec(),
    mean_action=np.tile(poses(1, 1)[0, 0], (8, 1)),
    **more,
  )


def test_a_perfect_policy_scores_zero_and_full_skill(setting):
  answers = iter(setting[2])
  result = run(setting, lambda _: next(answers))
  assert result.n == 6
  assert result.policy['mae'] == pytest.approx(0, abs=1e-6)
  assert result.skill_hold == pytest.approx(1, abs=1e-5) and result.skill_mean == pytest.approx(
    1, abs=1e-5
  )


def test_holding_still_scores_exactly_the_hold_baseline(setting):
  _, norm, _ = setting

  def hold(batch):
    state = open_loop.denormalise(batch.state, norm.state_mean, norm.state_scale)
    return open_loop.hold_actions(state, batch.actions.shape[1])

  result = run(setting, hold)
  assert result.policy == result.hold and result.skill_hold == pytest.approx(0)


def test_scores_are_means_over_events_with_intervals_and_labels(setting):
  answers = iter([x + 0.1 for x in setting[2][:1]] + [x + 0.4 for x in setting[2][1:]])
  labels = iter([['push'] * 3, ['lift'] * 2 + ['push']])
  result = run(
    setting,
    lambda _: next(answers),
    label_of=lambda _: next(labels),
    episode_of=lambda batch: [batch.actions.shape[1]] * 3,
  )
  assert result.policy['mae'] == pytest.approx(0.25, abs=1e-6)
  assert result.by_label['push'][0] == pytest.approx((3 * 0.1 + 0.4) / 4, abs=1e-6)
  assert result.by_label['lift'][2] == 2
  assert result.macro_mae == pytest.approx((0.175 + 0.4) / 2, abs=1e-6)
  assert result.interval.n == 2
  assert [row['label'] for row in result.rows] == ['push'] * 3 + ['lift'] * 2 + ['push']
  assert np.mean([row['action_mae'] for row in result.rows]) == pytest.approx(0.25, abs=1e-6)
  assert (result.interval.low, result.interval.high) == pytest.approx((0.1, 0.4), abs=1e-6)
  flat = result.to_json()
  assert {
    'action_mae',
    'action_mae_hold',
    'action_mae_mean',
    'action_position',
    'action_rotation',
    'action_gripper',
    'skill_hold',
    'skill_mean',
    'n',
  } <= set(flat)


def test_nothing_to_score_is_an_error(setting):
  batches, norm, physical = setting
  with pytest.raises(DataError, match='at least one held-out window'):
    open_loop.evaluate(
      [], lambda _: None, norm=norm, spec=ActionSpec(), mean_action=np.zeros((1, 10))
    )
  unlabelled = [
    dataclasses.replace(b, action_mask=np.zeros_like(b.action_mask)) for b in batches[:1]
  ]
  with pytest.raises(DataError, match='no event has a supervised action'):
    open_loop.evaluate(
      unlabelled, lambda _: physical[0], norm=norm, spec=ActionSpec(), mean_action=np.zeros((1, 10))
    )
