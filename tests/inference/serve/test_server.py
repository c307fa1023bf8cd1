"""The server against clients of its own machine: the protocol, many at once, and bad ones."""

import threading
import time
import urllib.request

import numpy as np
import pytest
from clients import Client, serving
from websockets.exceptions import ConnectionClosed

from wallwm_jax.inference.serve import wire
from wallwm_jax.inference.serve.echo import EchoPolicy


@pytest.fixture
def port():
  with serving(EchoPolicy(steps=4, dim=3)) as port:
    yield port


def test_metadata_first_then_answers_with_timing(port):
  client = Client(port)
  assert client.metadata['policy'] == 'echo' and client.metadata['action_dim'] == 3
  first = client.infer({'state': np.float32([1, 2, 3]), 'prompt': 'pick it up'})
  second = client.infer({'observation/state': np.array([4, 5, 6])})
  np.testing.assert_array_equal(first['actions'], np.tile(np.float32([1, 2, 3]), (4, 1)))
  np.testing.assert_array_equal(second['actions'][0], [4, 5, 6])
  assert set(first['server_timing']) == {'infer_ms'}
  assert set(second['server_timing']) == {'infer_ms', 'prev_total_ms'}
  assert all(value >= 0 for value in second['server_timing'].values())


def test_health(port):
  with urllib.request.urlopen(f'http://127.0.0.1:{port}/healthz') as reply:
    assert (reply.status, reply.read()) == (200, b'OK\n')


def test_each_client_is_answered_in_its_own_encoding(port):
  state = np.float32([1, 2, 3])
  openpi, other = Client(port), Client(port, wire.NUMPY)
  other.socket.send(wire.encode({'state': state}, wire.NUMPY))
  assert wire.decode(other.socket.recv())[1] == wire.NUMPY
  openpi.socket.send(wire.encode({'state': state}))
  assert wire.decode(openpi.socket.recv())[1] == wire.OPENPI


@pytest.mark.parametrize(
  'frame, said',
  [
    (wire.encode({'state': np.ones(4)}), r'state: expected numbers [3], got float64 [4]'),
    (wire.encode({'state': np.full(3, np.nan)}), 'NaN'),
    (wire.encode([1, 2]), 'expected a dict of observations, got list'),
    (b'\xc1', 'expected one msgpack message'),
    ('hello', 'expected a binary frame'),
  ],
)
def test_a_bad_request_is_told_why_and_costs_its_connection_only(port, frame, said):
  other, bad = Client(port), Client(port)
  bad.socket.send(frame)
  reply = bad.socket.recv()
  assert isinstance(reply, str) and said in reply and 'Traceback' in reply
  with pytest.raises(ConnectionClosed) as closed:
    bad.socket.recv()
  assert closed.value.rcvd.code == 1011
  assert closed.value.rcvd.reason.startswith('Internal server error')
  assert other.infer({'state': np.zeros(3)})['actions'].shape == (4, 3)


def test_malformed_frames_are_each_answered(port):
  rng = np.random.default_rng(0)
  good = wire.encode({'state': np.zeros(3), 'prompt': 'x'})
  for _ in range(200):
    frame = bytearray(good)
    for place in rng.integers(0, len(good), rng.integers(1, 8)):
      frame[place] = rng.integers(256)
    client = Client(port)
    client.socket.send(bytes(frame[: rng.integers(1, len(good) + 1)]))
    assert client.socket.recv(timeout=10)  # an error, or an answer where it still made sense
    client.socket.close()
  assert Client(port).infer({'state': np.zeros(3)})['actions'].shape == (4, 3)


class Slow(EchoPolicy):
  """Notes how many requests come at once."""

  def __init__(self):
    super().__init__(steps=1, dim=1)
    self.batches = []

  def infer(self, works):
    self.batches.append(len(works))
    time.sleep(0.05)
    if any(work[0] == 13 for work in works):
      raise ValueError('unlucky')
    return super().infer(works)


def test_requests_that_wait_are_answered_together():
  policy = Slow()
  with serving(policy, max_batch=3) as port:
    clients = [Client(port) for _ in range(6)]
    for i, client in enumerate(clients):
      client.socket.send(wire.encode({'state': np.float32([i])}))
    replies = [wire.decode(client.socket.recv())[0]['actions'][0, 0] for client in clients]
  assert replies == list(range(6))
  assert sum(policy.batches) == 6 and max(policy.batches) in (2, 3) and len(policy.batches) < 6


def test_a_policy_that_fails_says_so_and_the_next_request_is_answered():
  with serving(Slow()) as port:
    with pytest.raises(RuntimeError, match='ValueError: unlucky'):
      Client(port).infer({'state': np.float32([13])})
    assert Client(port).infer({'state': np.float32([1])})['actions'][0, 0] == 1


class Gated(Slow):
  """Answers nobody before five have asked."""

  def __init__(self):
    super().__init__()
    self.everybody = threading.Barrier(2)
    self.asked = 0

  def check(self, request, memory):
    work = super().check(request, memory)
    self.asked += 1
    if self.asked == 5:
      self.everybody.wait(10)
    return work

  def infer(self, works):
    if not self.batches:
      self.everybody.wait(10)
    return super().infer(works)


def test_one_bad_request_of_a_batch_costs_only_its_own_client():
  policy = Gated()
  with serving(policy, max_batch=4) as port:
    clients = [Client(port) for _ in range(5)]
    for client, number in zip(clients, (0, 1, 13, 3, 4)):
      client.socket.send(wire.encode({'state': np.float32([number])}))
      while policy.asked <= number < 1:  # the first is asked for alone, the others wait
        time.sleep(0.01)
    replies = [client.socket.recv() for client in clients]
  assert policy.batches == [1, 4, 1, 1, 1, 1]
  assert 'ValueError: unlucky' in replies.pop(2)
  assert [wire.decode(reply)[0]['actions'][0, 0] for reply in replies] == [0, 1, 3, 4]


class Forgetful(EchoPolicy):
  """Leaves one reply out where the first request says so."""

  def infer(self, works):
    return super().infer(works[1:] if works[0][0] == 13 else works)


def test_too_few_replies_are_an_error_and_the_server_goes_on():
  with serving(Forgetful(steps=1, dim=1)) as port:
    with pytest.raises(RuntimeError, match='one reply for each of 1 requests, got 0'):
      Client(port).infer({'state': np.float32([13])})
    assert Client(port).infer({'state': np.float32([1])})['actions'][0, 0] == 1


class Heavy(EchoPolicy):
  """Takes its time over the requests of client 13."""

  heavy = True

  def __init__(self):
    super().__init__(steps=1, dim=1)
    self.others = threading.Event()

  def check(self, request, memory):
    if request['state'][0] == 13:
      assert self.others.wait(10)
    return super().check(request, memory)


def test_a_request_that_is_slow_to_check_delays_nobody():
  policy = Heavy()
  with serving(policy) as port:
    slow, other = Client(port), Client(port)
    slow.socket.send(wire.encode({'state': np.float32([13])}))
    for i in range(5):
      assert other.infer({'state': np.float32([i])})['actions'][0, 0] == i
    policy.others.set()
    assert wire.decode(slow.socket.recv(timeout=10))[0]['actions'][0, 0] == 13


def test_who_leaves_or_does_not_read_delays_nobody(port):
  gone, deaf, other = Client(port), Client(port), Client(port)
  gone.socket.send(wire.encode({'state': np.zeros(3)}))
  gone.socket.close()
  for _ in range(50):
    deaf.socket.send(wire.encode({'state': np.zeros(3), 'image': np.zeros((64, 64, 3), 'u1')}))
  for i in range(20):
    assert other.infer({'state': np.full(3, i)})['actions'][0, 0] == i
