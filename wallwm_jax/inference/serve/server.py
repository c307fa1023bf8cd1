"""A policy server: openpi's websocket protocol, many clients, one model.

The server speaks first (metadata), then answers each binary frame with one. A request that cannot
be answered gets a text frame that says why, and the connection is closed with code 1011, as the
published client expects; other connections are not touched. GET /healthz answers OK.

Frames are checked where they arrive; what passes waits in one queue, from which a single thread
takes all that is there (up to `max_batch`) for the next call of the policy. So a slow client, which
only ever waits in its own connection, delays nobody.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import http
import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from wallwm_jax.inference.serve import wallx, wire
from wallwm_jax.types import DataError, WallWMError

_LOG = logging.getLogger(__name__)
_MOST = 2**28  # bytes of a frame
_CHECKS = 4  # requests that are checked side by side
_GOODBYE = 2.0  # s that a client has to say goodbye
_CLOSED = 'Internal server error. Traceback included in previous frame.'


class Policy(Protocol):
  """What is served.

  metadata: what a client is told when it connects. start() -> what a connection remembers.
  check(request, memory) -> work: refuses what cannot be answered (DataError that names the field,
  what was expected and what came), and notes what the session asks for; `heavy` says that it
  takes more than a moment (it decodes pictures, say): then it runs in one of a few threads, else
  where frames arrive. infer(works) -> one reply each, in order; runs in a thread of its own,
  and once more for every single work where it fails for several.
  """

  metadata: Mapping[str, Any]
  heavy: bool

  def start(self) -> Any: ...

  def check(self, request: Mapping[str, Any], memory: Any) -> Any: ...

  def infer(self, works: Sequence[Any]) -> Sequence[Mapping[str, Any]]: ...


class _Waiting(NamedTuple):
  work: Any
  reply: asyncio.Future


class PolicyServer:
  """Serves one policy; use as an async context manager.

  Args:
    policy: what is served; host, port: where (port 0 = any free one); max_batch: requests of one
      call of the policy.
  """

  def __init__(self, policy: Policy, host: str = '0.0.0.0', port: int = 8000, max_batch: int = 8):
    self._policy, self._address, self._max_batch = policy, (host, port), max_batch
    self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'policy')
    self._checks = concurrent.futures.ThreadPoolExecutor(_CHECKS, 'check')
    self._server: Server | None = None
    self._worker: asyncio.Task | None = None

  async def __aenter__(self) -> PolicyServer:
    self._worker = asyncio.create_task(self._work())
    self._server = await serve(
      self._talk,
      *self._address,
      compression=None,
      max_size=_MOST,
      process_request=_health,
      close_timeout=_GOODBYE,
      ping_timeout=None,  # clients of wall-x need not answer pings while they are busy
    )
    return self

  async def __aexit__(self, *_) -> None:
    self._server.close()
    await self._server.wait_closed()
    self._worker.cancel()
    for threads in (self._thread, self._checks):
      threads.shutdown(wait=False, cancel_futures=True)

  @property
  def port(self) -> int:
    """The port it listens at."""
    return self._server.sockets[0].getsockname()[1]

  async def _talk(self, connection: ServerConnection) -> None:
    try:
      await connection.send(wire.encode(dict(self._policy.metadata)))
      memory, style, before = self._policy.start(), None, None
      async for frame in connection:
        begun = time.monotonic()
        try:
          request, met = _decode(frame)
          # A request without arrays is answered as the last one that had some.
          style = met or style or (wire.NUMPY if wallx.speaks(request) else None)
          reply = await self._answer(request, memory)
          timing = reply.setdefault('server_timing', {})
          timing['infer_ms'] = 1e3 * (time.monotonic() - begun)
          if before is not None:
            timing['prev_total_ms'] = before
          packed = wire.encode(reply, style or wire.OPENPI)
        except Exception as error:
          if not isinstance(error, WallWMError):
            _LOG.exception('the policy failed')
          await connection.send(traceback.format_exc())
          await connection.close(1011, _CLOSED)
          return
        await connection.send(packed)
        before = 1e3 * (time.monotonic() - begun)
    except ConnectionClosed:
      pass  # the client left; nobody waits for an answer

  async def _answer(self, request: dict, memory: Any) -> dict:
    loop, check = asyncio.get_running_loop(), self._policy.check
    if self._policy.heavy:
      work = await loop.run_in_executor(self._checks, check, request, memory)
    else:  # a thread costs as much as all the rest of a small request
      work = check(request, memory)
    waiting = _Waiting(work, loop.create_future())
    self._queue.put_nowait(waiting)
    reply = await waiting.reply
    if not isinstance(reply, Mapping):
      raise RuntimeError(
        f'{type(self._policy).__name__}.infer: expected a dict of a reply, got '
        f'{type(reply).__name__}.'
      )
    return dict(reply)

  async def _work(self) -> None:
    loop = asyncio.get_running_loop()
    while True:
      batch = [await self._queue.get()]
      while len(batch) < self._max_batch and not self._queue.empty():
        batch.append(self._queue.get_nowait())
      works = [waiting.work for waiting in batch]
      replies = await loop.run_in_executor(self._thread, _answers, self._policy, works)
      for waiting, reply in zip(batch, replies, strict=True):
        if waiting.reply.done():  # its connection is gone
          continue
        if isinstance(reply, Exception):
          waiting.reply.set_exception(reply)
        else:
          waiting.reply.set_result(reply)


def _answers(policy: Policy, works: Sequence[Any]) -> list[Mapping[str, Any] | Exception]:
  """A reply or an error for each; where a batch fails its works are tried one by one, so that the
  others do not pay for the one that cannot be answered."""
  try:
    replies = list(policy.infer(works))
    if len(replies) != len(works):
      raise RuntimeError(
        f'{type(policy).__name__}.infer: expected one reply for each of {len(works)} requests, got '
        f'{len(replies)}.'
      )
    return replies
  except Exception as error:
    if len(works) == 1:
      return [error]
  return [reply for work in works for reply in _answers(policy, [work])]


def _decode(frame: bytes | str) -> tuple[dict, str | None]:
  """(request, encoding of its arrays or None without any)."""
  if isinstance(frame, str):
    raise DataError(f'request: expected a binary frame, got a text of {len(frame)} characters.')
  request, style = wire.decode(frame)
  if not isinstance(request, dict):
    raise DataError(f'request: expected a dict of observations, got {type(request).__name__}.')
  return request, style


def _health(connection: ServerConnection, request: Request) -> Response | None:
  if request.path == '/healthz':
    return connection.respond(http.HTTPStatus.OK, 'OK\n')
  return None
