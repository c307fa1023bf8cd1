"""Acting on the last anchor while the next one is computed.

`AnchoredPolicy` is the host side of `runtime.refresh` and `runtime.act`: a look at the world is
refreshed to an anchor in a thread of its own, and `act` takes the newest anchor that is ready,
whatever is still under way. Time is the number of the control step, given by the caller; nothing
here reads a clock.

Programs of one accelerator run one after the other: an `act` that is sent while a `refresh` runs on
the same chip waits for it there, although not here. Where that is too long, let `refresh` run on
another device and return its anchor by `jax.device_put`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from wallwm_jax.inference.runtime import Anchor, Now, Plan
from wallwm_jax.types import ActionChunk, ConfigError, DataError, WallWMError

_log = logging.getLogger(__name__)


class StaleAnchorError(WallWMError):
  """No anchor is ready that is new enough to act on."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Kept:
  """An anchor and the control step that it was observed at."""

  step: int
  anchor: Anchor


class AnchoredPolicy:
  """B robots that share control steps.

  A robot that gets no plan (`StaleAnchorError`) goes on along the last one and holds its last
  target where that ends; what it was told for every control step is kept here, and given to the
  next anchor as what was carried out since its observation.

  Args:
    refresh: sight -> Anchor, called in the thread; a sight is whatever the caller looks with.
    act: (Anchor, Now) -> Plan. steps: K of a plan. max_age: control steps after the observation of
      an anchor up to which it is acted on, the delay included; below K.
    executor: runs `refresh`, one at a time; None = a thread of its own.

  Raises:
    ConfigError: max_age outside 1..K-1.
  """

  def __init__(
    self,
    refresh: Callable[[Any], Anchor],
    act: Callable[[Anchor, Now], Plan],
    *,
    steps: int,
    max_age: int,
    executor: concurrent.futures.Executor | None = None,
  ):
    if not 1 <= max_age < steps:
      raise ConfigError(
        f'max_age: expected 1..{steps - 1} control steps (a plan has {steps}), got {max_age}.'
      )
    self._refresh, self._act, self._steps, self._max_age = refresh, act, steps, max_age
    self._executor = executor or concurrent.futures.ThreadPoolExecutor(1)
    self._kept: _Kept | None = None
    self._running: tuple[int, concurrent.futures.Future] | None = None
    self._next: tuple[int, Any] | None = None
    self._failure: BaseException | None = None
    self._told: dict[int, np.ndarray] = {}  # absolute targets [B, A] by control step
    self._newest = -1  # control step that was looked at last

  def look(self, step: int, sight: Any) -> None:
    """Takes a look for the next anchor. While a refresh is under way only the newest look waits.

    Raises:
      DataError: a control step that is not later than that of the look before.
    """
    if step <= self._newest:
      raise DataError(f'look: expected a control step after {self._newest}, got {step}.')
    self._newest, self._next = step, (step, sight)
    self._poll()

  def act(self, step: int, state: np.ndarray, delay: int = 0) -> Plan:
    """Plan from the newest anchor that is ready; does not wait for one.

    Args:
      step: number of this control step. state: [B, A] physical, measured now. delay: control steps
        that pass before the plan takes over; their targets stand.

    Returns:
      A plan by step since the observation of its anchor: its chunk's mask begins with the first
      step that is still open. A refresh that failed is logged, and the old anchor is used.

    Raises:
      StaleAnchorError: no anchor yet, or only ones that are older than `max_age`.
      DataError: a control step before that of the anchor's observation.
    """
    self._poll()
    kept = self._kept
    if kept is None:
      raise StaleAnchorError(
        'act: no anchor yet. Look first, and wait() for the first refresh.'
      ) from self._failure
    age = step - kept.step
    if age < 0:
      raise DataError(f'act: expected control step {kept.step} or later, got {step}.')
    if age + delay > self._max_age:
      raise StaleAnchorError(
        f'act: expected an anchor of at most {self._max_age} control steps, delay {delay} '
        f'included, but the newest is {age} old (seen at step {kept.step}); the refresh is late. '
        'Hold, look more often, or wait().'
      ) from self._failure
    now = Now(state, self._carried_out(kept.step, age + delay, np.asarray(state)))
    plan = self._act(kept.anchor, now)
    targets, meant = np.asarray(plan.targets), np.asarray(plan.chunk.mask)
    self._note(kept.step, age + delay, targets, meant)
    return plan

  @property
  def busy(self) -> bool:
    """Whether a refresh is under way."""
    self._poll()
    return self._running is not None

  @property
  def step(self) -> int | None:
    """Control step that the newest anchor was observed at."""
    self._poll()
    return None if self._kept is None else self._kept.step

  def wait(self, timeout: float | None = None) -> None:
    """Waits until every look has become an anchor.

    Raises:
      TimeoutError: not within `timeout` s. Otherwise what the last refresh raised.
    """
    while self._running is not None:
      concurrent.futures.wait([self._running[1]], timeout)
      if not self._running[1].done():
        raise TimeoutError(f'wait: no anchor within {timeout} s.')
      self._poll()
    if self._failure is not None:
      raise self._failure

  def close(self) -> None:
    """Ends the thread; a refresh under way is finished first."""
    self._executor.shutdown()

  def _poll(self) -> None:
    """Takes a finished refresh over and starts the next."""
    if self._running is not None and self._running[1].done():
      step, future = self._running
      self._running, self._failure = None, future.exception()
      if self._failure is None:
        self._kept = _Kept(step, future.result())
        oldest = max((at for at in self._told if at < step), default=step)
        self._told = {at: x for at, x in self._told.items() if at >= oldest}
      else:
        _log.warning('refresh of step %d failed: %r; the anchor before stays.', step, self._failure)
    if self._running is None and self._next is not None:
      (step, sight), self._next = self._next, None
      self._running = step, self._executor.submit(self._ready, sight)

  def _ready(self, sight: Any) -> Anchor:
    return jax.block_until_ready(self._refresh(sight))

  def _carried_out(self, begin: int, count: int, state: np.ndarray) -> ActionChunk:
    """Absolute [B, K, A] from control step `begin` on: the first `count` of them, as told."""
    poses = np.repeat(state[:, None], self._steps, axis=1).astype(np.float32)
    mask = np.zeros(poses.shape[:2], bool)
    earlier = [at for at in self._told if at < begin]
    held = self._told[max(earlier)] if earlier else None
    for place in range(count):
      held = self._told.get(begin + place, held)
      if held is not None:
        poses[:, place], mask[:, place] = held, True
    return ActionChunk(poses, mask)

  def _note(self, begin: int, first: int, targets: np.ndarray, meant: np.ndarray) -> None:
    """Keeps what the robots are told from control step begin + first on; a robot whose plan has
    ended holds."""
    before = [at for at in self._told if at < begin + first]
    held = self._told[max(before)] if before else targets[:, max(first - 1, 0)]
    self._told = {at: x for at, x in self._told.items() if at < begin + first}
    for place in range(first, self._steps):
      held = np.where(meant[:, place, None], targets[:, place], held)
      self._told[begin + place] = held
