"""The published clients, as they are, in a process of their own: `make test` installs them into
.cache/clients, which nothing else sees."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from clients import encode, request, resize, serving

from wallwm_jax.inference.export import Choice, export_policy
from wallwm_jax.inference.serve import wire
from wallwm_jax.inference.serve.engines import ModelEngine
from wallwm_jax.inference.serve.model import ModelPolicy
from wallwm_jax.inference.serve.wallx import WallX

ROOT = pathlib.Path(__file__).resolve().parents[3]
CLIENTS = ROOT / '.cache' / 'clients'

OPENPI = """
import json, sys
import numpy as np
import openpi_client
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

port, requests, horizon = int(sys.argv[1]), np.load(sys.argv[2]), int(sys.argv[3])
requests = {name: requests[name] for name in requests.files}
requests['event'] = str(requests['event'])
policy = WebsocketClientPolicy('127.0.0.1', port, api_key='secret')
found = {'from': openpi_client.__file__, 'metadata': policy.get_server_metadata()}
found['replies'] = []
for _ in range(2):
  reply = policy.infer(requests)
  found['replies'].append({k: np.asarray(v).tolist() if isinstance(v, np.ndarray) else v
                           for k, v in reply.items()})
broker = ActionChunkBroker(policy, action_horizon=horizon)
found['steps'] = [broker.infer(requests)['actions'].tolist() for _ in range(horizon)]
try:
  policy.infer(requests | {'nonsense': 1})
except RuntimeError as error:
  found['refused'] = str(error)
else:
  found['refused'] = ''
print(json.dumps(found))
"""

# The loop of docs/serving.md, with a robot that notes where it is sent and when it looks.
DRIVE = """
import json, sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

exec(open(sys.argv[2]).read())
moves, chunks = [], []

def look():
  image = np.full((16, 16, 3), 10 * len(moves), np.uint8)
  state = np.float32(moves[-1] if moves else [0, 0, 0, 1, 0, 0, 0, 1, 0, 1])
  return {'observation/front': image, 'observation/wrist': image, 'observation/state': state,
          'prompt': 'lift the cube'}

class Noting(WebsocketClientPolicy):
  def infer(self, request):
    reply = super().infer(request)
    chunks.append(reply['actions'].tolist())
    return reply

policy = Noting('127.0.0.1', int(sys.argv[1]))
drive(policy, look, lambda target: moves.append(target.tolist()), 0.01, turns=3, delay=2)
print(json.dumps({'moves': moves, 'chunks': chunks}))
"""

# As wall-x's own client does: msgpack patched, and each message packed and unpacked by it.
NUMPY = """
import json, sys
import msgpack
import msgpack_numpy
import numpy as np
from websockets.sync.client import connect

msgpack_numpy.patch()
rng = np.random.default_rng(0)
arrays = [np.arange(3, dtype='<f4'), rng.integers(0, 256, (2, 4, 3), np.uint8), np.zeros((0, 2)),
          np.array([True, False]), np.arange(4, dtype='>i2'), np.float32(1.5), np.int64(-3)]
message = {'views': arrays[1], 'rows': [1, 'two', None, 3.0, True], 'state': {'x': arrays[0]}}
found = {'bytes': [msgpack.packb(x).hex() for x in [*arrays, message]]}
with connect(f'ws://127.0.0.1:{sys.argv[1]}', compression=None, max_size=None) as socket:
  found['metadata'] = msgpack.unpackb(socket.recv())
  image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
  socket.send(msgpack.packb({'views': {'camera_front': image, 'camera_wrist': image},
                             'state': {'follow1_pos': [0.1, 0.2, 0.3, 0.0, 0.0, 0.5, 1.0]},
                             'instruction': 'lift the cube'}))
  found['moves'] = msgpack.unpackb(socket.recv())
  socket.send(msgpack.packb({'front_view': image, 'wrist_view': image, 'prompt': 'lift the cube',
                             'state': np.float32([[0, 0, 0, 1, 0, 0, 0, 1, 0, 1]]),
                             'dataset_names': ['x2']}))
  action = msgpack.unpackb(socket.recv())['action']
  assert isinstance(action, np.ndarray), action
  found['action'] = [str(action.dtype), action.shape]
  socket.send(msgpack.packb({'views': {}, 'state': image}))
  found['refused'] = socket.recv()
print(json.dumps(found))
"""


def published(script: str, *arguments) -> dict:
  """What a script prints that imports the published clients."""
  if not (CLIENTS / '.installed').is_file():
    pytest.fail(
      f'{CLIENTS}: expected the published clients, found none. `make test` installs them, and '
      '`make .cache/clients/.installed` does that alone.'
    )
  done = subprocess.run(
    [sys.executable, '-c', script, *map(str, arguments)],
    env=os.environ | {'PYTHONPATH': str(CLIENTS)},
    cwd=CLIENTS,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def drive(port: int, asked: dict, horizon: int, folder: pathlib.Path) -> dict:
  np.savez(folder / 'request.npz', **asked)
  found = published(OPENPI, port, folder / 'request.npz', horizon)
  assert pathlib.Path(found['from']).is_relative_to(CLIENTS.resolve())
  return found


def check_timing(replies) -> None:
  first, second = (reply.pop('server_timing') for reply in replies)
  assert set(first) == {'infer_ms'} and set(second) == {'infer_ms', 'prev_total_ms'}


@pytest.fixture(scope='module')
def command():
  """(arguments of `wallwm serve`) -> port; ended when the module is done."""
  running = []

  def start(*arguments):
    words = [sys.executable, '-m', 'wallwm_jax.cli', 'serve', *map(str, arguments), '--port', '0']
    running.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT))
    for line in running[-1].stdout:
      if line.startswith('serving at'):
        return int(line.split(',')[0].rsplit(':', 1)[1])
    raise AssertionError(f'{words} ended with {running[-1].wait()}')

  yield start
  for process in running:
    process.terminate()
    process.wait(20)


def test_openpi_drives_the_echo_policy(command, tmp_path):
  port = command('--echo', '--dim', '10')
  asked = request()
  found = drive(port, asked, 16, tmp_path)
  assert found['metadata']['policy'] == 'echo' and found['metadata']['cold_start_s'] > 0
  check_timing(found['replies'])
  state = asked['observation/state']
  for reply in found['replies']:
    np.testing.assert_array_equal(reply['actions'], np.tile(state, (16, 1)))
  np.testing.assert_array_equal(found['steps'], np.tile(state, (16, 1)))


def test_openpi_drives_a_model(cfg, params, tmp_path):
  policy = ModelPolicy(ModelEngine(cfg, params, bucket=2, max_batch=1), encode, resize)
  with serving(policy) as port:
    found = drive(port, request(), 8, tmp_path)
  check_timing(found['replies'])
  memory = policy.start()
  for reply in found['replies']:
    (want,) = policy.infer([policy.check(request(), memory)])
    for name in ('actions', 'state'):
      np.testing.assert_array_equal(np.float32(reply.pop(name)), want.pop(name))
    assert reply == want
  (want,) = policy.infer([policy.check(request(), memory)])
  np.testing.assert_array_equal(np.float32(found['steps']), want['actions'])
  assert 'nonsense: not a field of this policy' in found['refused']
  assert found['metadata'] == policy.metadata


def test_openpi_drives_an_exported_model_behind_the_command(command, cfg, params, tmp_path):
  export_policy(cfg, params, tmp_path / 'policy', Choice(('cpu',), (2,)))
  port = command('--artifact', tmp_path / 'policy', '--modes', 'event', 'chunk')
  found = drive(port, request(), 8, tmp_path)
  check_timing(found['replies'])
  assert np.shape(found['replies'][0]['actions']) == (8, 10)
  assert np.isfinite(found['replies'][0]['actions']).all()
  told = found['metadata']
  assert told['modes'] == ['event', 'chunk'] and told['environment']['jax']
  assert 0 < told['cold_start_s'] < 120 and told['real_time_chunking']


def test_msgpack_numpy_reads_and_writes_the_same_bytes_and_is_answered(cfg, params):
  policy = WallX(ModelPolicy(ModelEngine(cfg, params, bucket=2, max_batch=1), encode, resize))
  with serving(policy) as port:
    found = published(NUMPY, port)
  rng = np.random.default_rng(0)
  arrays = [
    np.arange(3, dtype='<f4'), rng.integers(0, 256, (2, 4, 3), np.uint8), np.zeros((0, 2)),
    np.array([True, False]), np.arange(4, dtype='>i2'), np.float32(1.5), np.int64(-3),
  ]  # fmt: skip
  message = {'views': arrays[1], 'rows': [1, 'two', None, 3.0, True], 'state': {'x': arrays[0]}}
  for value, golden in zip([*arrays, message], found['bytes'], strict=True):
    assert wire.encode(value, wire.NUMPY).hex() == golden
    back, style = wire.decode(bytes.fromhex(golden))
    assert style == wire.NUMPY
    np.testing.assert_equal(back, value)
  assert found['metadata']['model'] == 'wall-x' and found['metadata']['batch_enabled'] is True
  np.testing.assert_allclose(
    found['moves']['follow1_pos'][0], [0.1, 0.2, 0.3, 0, 0, 0.5, 1], atol=1e-6
  )
  assert np.shape(found['moves']['follow1_pos']) == (9, 7)
  assert set(found['moves']) == {'follow1_pos', 'server_timing'}
  assert found['action'] == ['float32', [8, 10]]
  assert 'state: expected numbers [10], got uint8 [16, 16, 3]' in found['refused']


def test_the_loop_of_the_documentation_joins_the_chunks(cfg, params, tmp_path):
  page = (ROOT / 'docs' / 'serving.md').read_text()
  (loop,) = [x for x in re.findall(r'```python\n(.*?)```', page, re.S) if 'def drive(' in x]
  (tmp_path / 'loop.py').write_text(loop)
  engine = ModelEngine(cfg, params, bucket=2, max_batch=1)
  with serving(ModelPolicy(engine, encode, resize)) as port:
    found = published(DRIVE, port, tmp_path / 'loop.py')
  chunks = np.array(found['chunks'])
  assert chunks.shape == (4, 8, 10)
  # 8 steps of the first chunk, then 4 + 2 of the next ones, whose first 2 are those before them.
  for last, following in zip(chunks, chunks[1:]):
    np.testing.assert_allclose(following[:2], last[6:], rtol=1e-3, atol=1e-3)
  moves = np.concatenate([chunks[0], *(chunk[2:] for chunk in chunks[1:3])])
  np.testing.assert_allclose(found['moves'], moves)
