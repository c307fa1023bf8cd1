"""Round trips of the policy server over loopback, without a model: what the protocol costs.

wallwm bench serving -- --trips 2000 --malformed 10000
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time

import harness
import numpy as np
from websockets.sync.client import connect

from wallwm_jax.inference.serve import wire

IMAGES = {f'observation/image_{i}': np.zeros((224, 224, 3), np.uint8) for i in range(3)}
STATE = {'observation/state': np.zeros(8, np.float32)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--trips', type=int, default=2000)
  parser.add_argument('--malformed', type=int, default=10_000, help='broken frames that are sent')
  args = parser.parse_args()
  command = [sys.executable, '-m', 'wallwm_jax.cli', 'serve', '--echo', '--dim', '8', '--port', '0']
  server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  try:
    port = int(server.stdout.readline().split(',')[0].rsplit(':', 1)[1])
    figures = {
      'state only': trips(port, STATE, args.trips),
      'three pictures of 224x224': trips(port, STATE | IMAGES, args.trips),
      'three clients at 20 Hz': crowd(port, args.trips // 10, slow=False),
      'the same three beside a slow one': crowd(port, args.trips // 10, slow=True),
      'malformed frames': malformed(port, args.malformed),
      'afterwards, state only': trips(port, STATE, args.trips),
    }
    assert server.poll() is None, 'the server ended'
  finally:
    server.terminate()
  harness.report(
    'round trip of the echo policy over loopback', 'ms', args.trips,
    value=figures['three pictures of 224x224']['p50'], **figures, goal='p50 <= 1',
  )  # fmt: skip


def trips(port: int, request: dict, count: int, period: float = 0.0) -> dict[str, float]:
  """Percentiles in ms, asking every `period` seconds (0 = at once); the encoding of the client is
  part of them."""
  return percentiles(measure(port, request, count, period))


def percentiles(times: list[float]) -> dict[str, float]:
  ranks = {'min': 0, 'p50': 50, 'p90': 90, 'p99': 99}
  return {name: round(float(np.percentile(times, q)), 3) for name, q in ranks.items()}


def measure(port: int, request: dict, count: int, period: float) -> list[float]:
  """Round trips in ms, the first 20 left out."""
  with connect(f'ws://127.0.0.1:{port}', compression=None, max_size=None) as socket:
    socket.recv()
    times = []
    for _ in range(count + 20):
      begun = time.perf_counter()
      socket.send(wire.encode(request))
      wire.decode(socket.recv())
      times.append(1e3 * (time.perf_counter() - begun))
      time.sleep(max(period - times[-1] / 1e3, 0))
  return times[20:]


def crowd(port: int, count: int, slow: bool) -> dict[str, float]:
  """Percentiles over three clients that ask with three pictures every 50 ms; `slow` adds one whose
  requests arrive bit by bit, with a reply that it does not read for a while."""
  times, done = [], threading.Event()

  def ask():
    times.extend(measure(port, STATE | IMAGES, count, 0.05))

  def dawdle():
    frame = wire.encode(STATE | IMAGES)
    with connect(f'ws://127.0.0.1:{port}', compression=None, max_size=None) as socket:
      socket.recv()
      while not done.is_set():
        socket.send(slowly(frame))
        time.sleep(0.1)
        socket.recv()

  clients = [threading.Thread(target=ask) for _ in range(3)]
  dawdler = threading.Thread(target=dawdle)
  for thread in [*clients, *([dawdler] if slow else [])]:
    thread.start()
  for thread in clients:
    thread.join()
  done.set()
  if slow:
    dawdler.join()
  return percentiles(times)


def slowly(frame: bytes, parts: int = 20):
  """A frame in fragments, 20 ms apart."""
  for part in np.array_split(np.frombuffer(frame, np.uint8), parts):
    yield part.tobytes()
    time.sleep(0.02)


def malformed(port: int, count: int) -> dict[str, int]:
  """What became of requests with random bytes in random places, cut at random."""
  rng, good = np.random.default_rng(0), wire.encode(STATE | {'prompt': 'x'})
  found = {'sent': count, 'refused with a reason': 0, 'answered': 0}
  socket = None
  for _ in range(count):
    if socket is None:
      opened = connect(f'ws://127.0.0.1:{port}', compression=None, max_size=None)
      socket = opened.__enter__()
      socket.recv()
    frame = bytearray(good)
    for place in rng.integers(0, len(good), rng.integers(1, 8)):
      frame[place] = rng.integers(256)
    socket.send(bytes(frame[: rng.integers(1, len(good) + 1)]))
    refused = isinstance(socket.recv(timeout=10), str)
    found['refused with a reason' if refused else 'answered'] += 1
    if refused:
      socket.close()
      socket = None
  return found


if __name__ == '__main__':
  main()
