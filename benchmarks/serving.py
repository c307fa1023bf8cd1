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

IMAGES = {f'observation/image_{i}': np.zeros((224, 224, 3), np.uint8) for i in range(2)}
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
      'two images of 224x224': trips(port, STATE | IMAGES, args.trips // 4),
      'beside three clients, one that does not read': crowded(port, args.trips // 4),
      'malformed frames': malformed(port, args.malformed),
      'afterwards': trips(port, STATE, args.trips // 4),
    }
    assert server.poll() is None, 'the server ended'
  finally:
    server.terminate()
  harness.report(
    'round trip of the echo policy over loopback', 'ms', args.trips,
    value=figures['state only']['p50'], **figures, goal='p50 <= 1',
  )  # fmt: skip


def trips(port: int, request: dict, count: int) -> dict[str, float]:
  """Percentiles in ms; the encoding of the client is part of them."""
  with connect(f'ws://127.0.0.1:{port}', compression=None, max_size=None) as socket:
    socket.recv()
    times = []
    for _ in range(count + 20):
      begun = time.perf_counter()
      socket.send(wire.encode(request))
      wire.decode(socket.recv())
      times.append(1e3 * (time.perf_counter() - begun))
  return {f'p{q}': round(float(np.percentile(times[20:], q)), 3) for q in (50, 90, 99)}


def crowded(port: int, count: int) -> dict[str, float]:
  """One client's percentiles while two others ask all the time and a third never reads."""
  done = threading.Event()

  def busy():
    while not done.is_set():
      trips(port, STATE, 20)

  with connect(f'ws://127.0.0.1:{port}', compression=None, max_size=None) as deaf:
    for _ in range(100):
      deaf.send(wire.encode(STATE))
    others = [threading.Thread(target=busy) for _ in range(2)]
    for other in others:
      other.start()
    found = trips(port, STATE, count)
    done.set()
    for other in others:
      other.join()
  return found


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
