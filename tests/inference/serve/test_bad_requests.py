"""Requests that no client should send: each is refused by name, and nobody else pays."""

import copy

import numpy as np
import pytest
from clients import STATE, Client, encode, request, resize, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from websockets.exceptions import ConnectionClosed

from wallwm_jax.inference.serve import wire
from wallwm_jax.inference.serve.engines import ModelEngine
from wallwm_jax.inference.serve.model import ModelPolicy
from wallwm_jax.inference.serve.wallx import WallX
from wallwm_jax.types import DataError


@pytest.fixture(scope='module')
def policy(cfg, params):
  engine = ModelEngine(cfg, params, bucket=2, max_batch=2)
  return WallX(ModelPolicy(engine, encode, resize, modes=['event', 'chunk']))


def late():
  views = {f'camera_{v}': np.zeros((16, 16, 3), np.uint8) for v in ('front', 'wrist')}
  arm = [0.1, 0.2, 0.3, 0.0, 0.0, 0.0, 1.0]
  return {
    'views': views, 'state': {'follow1_pos': arm, 'lift': 0.4}, 'instruction': 'tidy up',
    'infer_mode': 'flow', 'robot_action_end_ratio': 0.5,
  }  # fmt: skip


NAMES = [
  *request(), 'prompt', 'mode', 'source', 'reset', 'executed', 'delay', 'action_dim', 'norm_hash',
  *late(), 'dataset_names', 'front_view', 'robot_action_interpolate_multiplier', 'robot_action_s',
]  # fmt: skip
ARRAYS = hnp.arrays(
  st.sampled_from(['<f4', '<f8', '|u1', '<i8', '|b1', '<U3', '|S2', '<f2', '>f4', '<u8']),
  st.one_of(
    hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
    st.sampled_from([(10,), (1, 10), (7,), (20,), (16, 16, 3), (2, 16, 16, 3), (3, 16, 16)]),
  ),
)
PLAIN = st.one_of(
  st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=9),
  st.binary(max_size=9), st.sampled_from(['event', 'chunk', 'planner', 'x' * 2001, 2**31]), ARRAYS,
)  # fmt: skip
KEYS = st.one_of(st.sampled_from(['follow1_pos', 'lift', 'camera_front']), st.text(max_size=5))
VALUES = st.recursive(
  PLAIN,
  lambda x: st.lists(x, max_size=10) | st.dictionaries(KEYS, x, max_size=3),
  max_leaves=12,
)  # fmt: skip
CHANGES = st.dictionaries(
  st.one_of(st.sampled_from(NAMES), st.text(max_size=9)), VALUES, min_size=1, max_size=3
)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([request, late]), CHANGES, st.sets(st.sampled_from(NAMES), max_size=2))
def test_any_change_of_a_request_is_refused_by_name_or_understood(policy, make, changes, lost):
  asked = {name: x for name, x in (make() | changes).items() if name not in lost}
  asked, _ = wire.decode(wire.encode(asked))  # as it arrives
  memory = policy.start()
  before = copy.deepcopy(memory)
  try:
    work, _ = policy.check(asked, memory)
  except DataError as error:
    named = {str(x) for x in asked} | set(NAMES) | {'observation'}
    assert any(str(error).startswith(name) for name in named), error
    assert memory == before
  else:
    assert work.frames.dtype == np.uint8 and work.frames.shape[2:] == (16, 16, 3)
    assert work.state.shape == (10,) and np.isfinite(work.state).all()
    assert work.text and memory.turn == 1


def refused(client, asked, message):
  client.socket.send(wire.encode(asked))
  reply = client.socket.recv(timeout=20)
  assert isinstance(reply, str) and message in reply and len(reply) < 10_000
  with pytest.raises(ConnectionClosed):
    client.socket.recv(timeout=20)


def test_others_are_served_meanwhile(policy):
  """A client of another robot, one of other statistics and several careless ones, beside a good
  one."""
  good = request(1)
  with serving(policy, max_batch=2) as port:
    client = Client(port)
    want = client.infer(good)['actions']
    two_arms = {'observation/state': np.concatenate([STATE, STATE])}
    for changes, message in (
      (two_arms, 'observation/state: expected numbers [10], got float32 [20]'),
      (two_arms | {'action_dim': 20}, 'action_dim: expected 10, that of this model, got 20'),
      ({'norm_hash': '0' * 16}, f"norm_hash: expected '{client.metadata['norm_hash']}'"),
      ({'observation/front': np.zeros((16, 16, 3))}, 'observation/front: expected uint8'),
      ({'observation/front': np.zeros((16, 16), 'u1')}, 'got uint8 [16, 16]'),
      ({'observation/state': np.full(10, np.nan)}, 'observation/state: NaN or infinite'),
      ({'event': 'x' * 2001}, 'event: expected a text of 1..2000 characters, got 2001'),
      ({'wirst': 1}, 'wirst: not a field of this policy'),
      ({'views': {}}, 'state: missing'),
      ({'mode': 'x' * 10**6}, "mode: expected one of ['event', 'chunk'], got 'xxxx"),
      ({'y' * 10**6: 1}, f'{"y" * 80}: not a field of this policy'),
    ):
      refused(Client(port), good | changes, message)
      np.testing.assert_allclose(client.infer(good | {'reset': True})['actions'], want, atol=1e-4)
    missing = {name: x for name, x in good.items() if name != 'observation/wrist'}
    refused(Client(port), missing, 'observation/wrist: missing. Expected a picture')
    np.testing.assert_allclose(client.infer(good | {'reset': True})['actions'], want, atol=1e-4)
