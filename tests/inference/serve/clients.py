"""A client, a server for it, and requests to a tiny model."""

import asyncio
import contextlib
import hashlib
import threading

import numpy as np
from websockets.sync.client import connect

from wallwm_jax.inference.serve import wire
from wallwm_jax.inference.serve.server import PolicyServer
from wallwm_jax.types import Text

STATE = np.float32([0.1, 0.2, 0.3, 1, 0, 0, 0, 1, 0, 1])


def encode(texts):
  """Features that depend on the text alone."""
  seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
  features = [np.random.default_rng(seed).standard_normal((4, 8)) for seed in seeds]
  return Text(np.stack(features).astype(np.float32), np.ones((len(texts), 4), bool))


def resize(frames, size):
  """Repeats or drops pixels: enough to see that it was asked."""
  rows, columns = (np.arange(n) * m // n for n, m in zip(size, frames.shape[1:3]))
  return frames[:, rows][:, :, columns]


def request(seed=0, size=(16, 16), **changes):
  rng = np.random.default_rng(seed)
  pictures = {
    f'observation/{view}': rng.integers(0, 256, (*size, 3), np.uint8) for view in ('front', 'wrist')
  }
  return {'observation/state': STATE + seed, 'event': 'lift the cube'} | pictures | changes


class Client:
  """Speaks like the published one; asks one thing at a time."""

  def __init__(self, port, style=wire.OPENPI):
    self.socket = connect(f'ws://127.0.0.1:{port}', compression=None, max_size=None).__enter__()
    self.metadata, self.style = wire.decode(self.socket.recv())[0], style

  def infer(self, request):
    self.socket.send(wire.encode(request, self.style))
    reply = self.socket.recv()
    if isinstance(reply, str):
      raise RuntimeError(f'Error in inference server:\n{reply}')
    return wire.decode(reply)[0]


@contextlib.contextmanager
def serving(policy, **options):
  """The port of a server that runs in a thread of its own."""
  started, box = threading.Event(), {}

  async def main():
    async with PolicyServer(policy, '127.0.0.1', 0, **options) as server:
      box['port'], box['stop'] = server.port, asyncio.Event()
      box['loop'] = asyncio.get_running_loop()
      started.set()
      await box['stop'].wait()

  thread = threading.Thread(target=asyncio.run, args=(main(),))
  thread.start()
  try:
    assert started.wait(10)
    yield box['port']
  finally:
    box['loop'].call_soon_threadsafe(box['stop'].set)
    thread.join(10)
    assert not thread.is_alive()
