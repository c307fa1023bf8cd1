"""wall-x's dialect: what its clients send and read, and what is refused."""

import base64
import io

import numpy as np
import pytest
from clients import STATE, Client, encode, request, resize, serving
from PIL import Image

from wallwm_jax.geometry.poses import euler_to_matrix, matrix_to_rot6d
from wallwm_jax.inference.serve import wire
from wallwm_jax.inference.serve.engines import ModelEngine
from wallwm_jax.inference.serve.model import ModelPolicy
from wallwm_jax.inference.serve.wallx import WallX
from wallwm_jax.types import DataError

ARM = np.float32([0.1, 0.2, 0.3, 0.4, -0.5, 0.6, 1])  # position, roll, pitch, yaw, gripper


def pose(arm):
  rotation = matrix_to_rot6d(euler_to_matrix(arm[3:6]))
  return np.concatenate([arm[:3], rotation, arm[6:]])


class Recorder:
  """A policy of two arms that notes what it is asked and goes 1 cm up a step."""

  metadata = {
    'policy': 'recorder',
    'action_dim': 20,
    'sources': ['atomic', 'instruction', 'planner'],
    'fields': {'state': 'state', 'views': {'front': 'image', 'left_wrist': 'left'}},
  }

  def start(self):
    return None

  def check(self, request, memory):
    self.asked = request
    return request

  def infer(self, works):
    up = np.zeros((4, 20), np.float32)
    up[:, [2, 12]] = 0.01 * np.arange(1, 5)[:, None]
    return [
      {'actions': work['state'] + up, 'state': work['state'], 'event_text': 'go up'}
      for work in works
    ]


@pytest.fixture
def recorder():
  return Recorder()


def ask(policy, asked):
  (reply,) = policy.infer([policy.check(asked, policy.start())])
  return reply


def coded(pixels, kind='PNG'):
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind)
  return base64.b64encode(buffer.getvalue()).decode()


def late(**changes):
  pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  state = {'follow1_pos': ARM.tolist(), 'follow2_pos': (-ARM).tolist()}
  views = {'camera_front': coded(pixels), 'left_wrist_view': pixels}
  asked = {'state': state, 'views': views, 'instruction': 'tidy up'}
  return {k: v for k, v in (asked | changes).items() if v is not None}, pixels


def test_a_late_request_and_its_answer(recorder):
  asked, pixels = late()
  reply = ask(WallX(recorder), asked)
  given = recorder.asked
  assert set(given) == {'image', 'left', 'state', 'prompt'} and given['prompt'] == 'tidy up'
  np.testing.assert_array_equal(given['image'], pixels)
  np.testing.assert_array_equal(given['left'][0], pixels)
  np.testing.assert_allclose(given['state'], np.concatenate([pose(ARM), pose(-ARM)]), atol=1e-6)
  assert set(reply) == {'follow1_pos', 'follow2_pos'}
  for name, arm in (('follow1_pos', ARM), ('follow2_pos', -ARM)):
    want = np.tile(arm, (5, 1))
    want[:, 2] += 0.01 * np.arange(5)  # row 0 is the state
    assert isinstance(reply[name], list)
    np.testing.assert_allclose(reply[name], want, atol=1e-6)


def test_the_rest_of_the_robot_stays_where_it_is(recorder):
  asked, _ = late()
  asked['state'] |= {'head_pos': [0.1, -1.0], 'lift': 0.4, 'velocity_decomposed_odom': [1, 2, 3]}
  reply = ask(WallX(recorder), asked | {'robot_action_end_ratio': 0.8})
  np.testing.assert_allclose(reply['head_pos'], [[0.1, -1.0]] * 4)
  np.testing.assert_allclose(reply['lift'], [[0.4]] * 4)
  assert reply['velocity_decomposed_odom'] == [[0.0, 0.0, 0.0]] * 4
  assert np.shape(reply['follow1_pos']) == (4, 7)


def test_a_subtask_is_asked_for_by_its_mode(recorder):
  policy = WallX(recorder)
  told = ask(policy, late(infer_mode='flow_with_subtask')[0])
  assert told['subtask'] == 'go up' and recorder.asked['source'] == 'planner'
  assert 'subtask' not in ask(policy, late(infer_mode='flow')[0])
  assert recorder.asked['source'] == 'instruction'
  flat = ask(policy, late(state=np.arange(20.0), infer_mode='flow_with_subtask')[0])
  assert set(flat) == {'predict_action', 'subtask'}
  assert flat['predict_action'].shape == (4, 20) and flat['predict_action'].dtype == np.float32


def test_an_early_request_and_its_answer(recorder):
  pixels = np.zeros((8, 8, 3), np.uint8)
  asked = {
    'front_view': pixels, 'left_wrist_view': pixels + 1, 'prompt': 'tidy up',
    'state': np.arange(20, dtype=np.float32)[None], 'dataset_names': ['x2'],
  }  # fmt: skip
  reply = ask(WallX(recorder), asked)
  assert set(recorder.asked) == {'image', 'left', 'state', 'prompt'}
  assert recorder.asked['left'].max() == 1
  assert reply['predict_action'].shape == (1, 4, 20)
  np.testing.assert_array_equal(reply['action'], reply['predict_action'][0])


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'views': [1]}, 'views: expected a dict of cameras, got list'),
    ({'views': {'camera_back': 'x'}}, 'views.camera_back: not a camera of this policy. Known: im'),
    ({'views': {'camera_front': 'x!'}}, 'views.camera_front: expected base64 of a JPEG or PNG'),
    ({'views': {'camera_front': 'AAAA'}}, 'got 4 characters that are none'),
    ({'views': {'camera_front': 3}}, 'views.camera_front: .* got int'),
    ({'views': {'camera_front': np.zeros((2, 2))}}, r'camera_front: expected uint8 .* got float64'),
    ({'state': {'follow1_pos': [0.0] * 7}}, r"state: expected 2 of .*, got \['follow1_pos'\]"),
    ({'state': {'follow1_pos': [0.0] * 6, 'follow2_pos': [0.0] * 7}}, r'follow1_pos: .* \[6\]'),
    ({'state': {'follow1_pos': [np.nan] * 7, 'follow2_pos': ARM}}, 'follow1_pos: NaN'),
    ({'state': {'follow3_pos': 1}}, "state.follow3_pos: not a field .* 'state.follow"),
    ({'state': {'follow1_pos': ARM, 'follow2_pos': ARM, 'lift': 'up'}}, 'state.lift: expected'),
    ({'state': None}, r'state: missing. Expected numbers \[20\]'),
    ({'state': np.zeros(7)}, r'state: expected numbers \[20\], got float64 \[7\]'),
    ({'instruction': 7}, 'instruction: expected a text'),
    ({'infer_mode': 'ar'}, r"infer_mode: expected one of \['flow', 'flow_with_.*'\], got 'ar'"),
    ({'robot_action_start_ratio': 0.9, 'robot_action_end_ratio': 0.1}, 'start < end <= 1, got 0.9'),
    ({'robot_action_interpolate_multiplier': 10}, 'multiplier: expected 1, .* got 10'),
    ({'robot_action_interpolate_multiplier': np.ones(2)}, 'multiplier: expected 1, .* got array'),
  ],
)
def test_bad_fields_are_named(recorder, changes, message):
  with pytest.raises(DataError, match=message):
    WallX(recorder).check(late(**changes)[0], None)


def test_one_model_speaks_both_at_once(cfg, params):
  policy = ModelPolicy(ModelEngine(cfg, params, bucket=2, max_batch=1), encode, resize)
  with serving(WallX(policy)) as port:
    openpi, wallx = Client(port), Client(port, wire.NUMPY)
    assert wallx.metadata == policy.metadata | {
      'model': 'wall-x', 'env': cfg.name, 'batch_enabled': True, 'dialects': ['openpi', 'wall-x'],
    }  # fmt: skip
    asked = request()
    want = openpi.infer(asked)['actions']
    views = {f'camera_{view}': asked[f'observation/{view}'] for view in ('front', 'wrist')}
    same = {'state': STATE, 'views': views, 'instruction': asked['event']}
    reply = wallx.infer(same)
    np.testing.assert_array_equal(reply['predict_action'], want)
    assert set(reply['server_timing']) == {'infer_ms'}
    # Without an array in the request, the reply is still in wall-x's encoding.
    coded_views = {name: coded(pixels) for name, pixels in views.items()}
    bare = same | {'state': STATE.tolist(), 'views': coded_views}
    fresh = Client(port)
    fresh.socket.send(wire.encode(bare))
    reply, style = wire.decode(fresh.socket.recv())
    assert style == wire.NUMPY
    np.testing.assert_array_equal(reply['predict_action'], want)
    with pytest.raises(RuntimeError, match='DataError: views.camera_top: not a camera'):
      wallx.infer(same | {'views': {'camera_top': views['camera_front']}})
    assert openpi.infer(asked)['actions'].shape == want.shape
