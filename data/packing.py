"""Several events in one row of a fixed total of latent frames, planned from their lengths alone.

An event of n future latents costs 1 + n: its anchor comes along. The draws of one block of the plan
are packed best-fit decreasing, so that rows are full, all of them, so that none is lost. Blocks
differ a little in how many rows they need; how many came before a block is remembered as rows are
asked for in turn, and counted from the start, at a fraction of a second per million draws, where
it is not known. A landmark, two numbers, spares that after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from wallwm_jax.config import packed
from wallwm_jax.data.permutation import fold, shuffled
from wallwm_jax.data.sampler import EventPlan
from wallwm_jax.types import DataError, EventBatch, PackedBatch

_KEPT = 2  # blocks in memory
_PER_EVENT = (
  'raw_length', 'state', 'text', 'view_mask', 'pixel_mask', 'cameras', 'uid', 'prompt'
)


class PackedBlock(NamedTuple):
  """The rows of a block, int32: row i ends before ends[i] in events (positions in the plan) and
  places (in the block, of the draws that picked them)."""

  ends: np.ndarray
  events: np.ndarray
  places: np.ndarray


class PackedPlan:
  """Rows of events: row r is a pure function of the plan, the costs and r.

  Args:
    plan: the order in which events are drawn; costs: int [n], latent frames of each event;
      budget: latent frames of a row; key: seeds the order of the rows of a block.

  Raises:
    DataError: an event costs more than a row holds.
  """

  def __init__(self, plan: EventPlan, costs: np.ndarray, budget: int, key: int):
    costs = np.asarray(costs)
    if costs.min() < 1 or costs.max() > budget:
      raise DataError(
        f'latent frames of an event: expected 1..{budget}, what a row holds, got '
        f'{costs.min()}..{costs.max()}.'
      )
    self._plan, self._budget, self._key = plan, budget, key
    self._costs = costs.astype(np.min_scalar_type(budget))
    self._first = {0: 0}  # block -> number of its first row
    self._blocks: dict[int, PackedBlock] = {}

  def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Events (positions in the plan) of row number `row`, in the order of their draws, and the
    numbers of those draws."""
    block, first = self.landmark(row)
    ends, events, places = self.block(block)
    stop = ends[row - first]
    start = ends[row - first - 1] if row > first else 0
    return events[start:stop], block * self._plan.block_size + places[start:stop].astype(np.int64)

  def landmark(self, row: int) -> tuple[int, int]:
    """(the block that row number `row` lies in, the number of that block's first row)."""
    known = list(self._first.items())
    block, first = max(item for item in known if item[1] <= row)
    while row >= first + len(self.block(block).ends):
      first += len(self.block(block).ends)
      block += 1
      self._first[block] = first
    return block, first

  def seek(self, block: int, first: int) -> None:
    """Takes a landmark of this same plan, so that rows behind it need not be counted again."""
    self._first[block] = first

  def block(self, block: int) -> PackedBlock:
    """All rows of a block."""
    packed = self._blocks.get(block)
    if packed is None:
      packed = self._pack(block)
      if len(self._blocks) >= _KEPT:
        self._blocks.clear()
      self._blocks[block] = packed
    return packed

  def _pack(self, block: int) -> PackedBlock:
    events, size = self._plan.block(block), self._plan.block_size
    rows, count = pack(self._costs[events], self._budget)
    rows = shuffled(count, fold(self._key, block))[rows]
    places = np.sort(rows * size + np.arange(size)) % size  # in the order of (row, draw)
    ends = np.cumsum(np.bincount(rows, minlength=count))
    return PackedBlock(ends.astype(np.int32), events[places], places.astype(np.int32))


def pack(costs: np.ndarray, budget: int) -> tuple[np.ndarray, int]:
  """Best-fit decreasing: longest first, each into the fullest row that still has room for it.

  Args:
    costs: int [n], 1 <= cost <= budget.

  Returns:
    Row int64 [n] of every item, and how many rows there are. Items of one cost are dealt with
    together, so the work grows with the number of distinct costs and rooms, not of items.
  """
  costs = np.asarray(costs, np.int64)
  order = np.sort((budget - costs) * len(costs) + np.arange(len(costs))) % len(costs)
  rows, count = np.empty(len(costs), np.int64), 0
  rooms: dict[int, list[np.ndarray]] = {}  # latent frames left -> rows with so much room
  ends = np.flatnonzero(np.diff(costs[order], append=0)) + 1
  for start, end in zip([0, *ends[:-1].tolist()], ends.tolist()):
    cost, items = int(costs[order[start]]), order[start:end]
    for room in sorted(r for r in rooms if r >= cost):
      items = _fill(rows, items, np.concatenate(rooms.pop(room)), room, cost, rooms)
      if not len(items):
        break
    else:
      fresh = np.arange(count, count - (-len(items) // (budget // cost)))
      count += len(fresh)
      _fill(rows, items, fresh, budget, cost, rooms)
  return rows, count


def _fill(
  rows: np.ndarray,
  items: np.ndarray,
  free: np.ndarray,
  room: int,
  cost: int,
  rooms: dict[int, list[np.ndarray]],
) -> np.ndarray:
  """Puts items of one cost into rows that all have the same room, one row after the other, notes
  what room is left in them, and returns the items that found no place."""
  each = room // cost
  taken = min(len(items), each * len(free))
  rows[items[:taken]] = np.repeat(free, each)[:taken]
  full, rest = divmod(taken, each)
  for left, some in (
    (room - each * cost, free[:full]),
    (room - rest * cost, free[full : full + (rest > 0)]),
    (room, free[full + (rest > 0) :]),
  ):
    if left and len(some):
      rooms.setdefault(left, []).append(some)
  return items[taken:]


def join_windows(windows: Sequence[EventBatch], budget: int, rate: int) -> PackedBatch:
  """One row (no batch axis) of event windows (no batch axis), one behind the other.

  Args:
    windows: each cut to its own length: 1 + rate * n frames or 1 + n latents, rate * n steps.
    budget: latent frames of the row; rate: action steps per latent.

  Raises:
    DataError: the windows do not fit into the row.
  """
  latents = [window.actions.shape[0] // rate for window in windows]
  most, total = packed.most_events(budget), len(latents) + sum(latents)
  if not 1 <= len(windows) <= most or total > budget:
    raise DataError(
      f'packed row: expected 1..{most} events of {budget} latent frames together, got '
      f'{len(windows)} of {total}.'
    )
  fields = packed.layout(latents, budget, rate)
  frames, steps = packed.row_frames(budget, rate)
  decoded = windows[0].latents is None
  if not decoded:
    fields['frame_segment'] = None

  def join(name: str, size: int, axis: int) -> np.ndarray:
    parts = [getattr(window, name) for window in windows]
    return _padded(np.concatenate(parts, axis), size, axis)

  def each(name: str):
    parts = [getattr(window, name) for window in windows]
    return jax.tree.map(lambda *x: _padded(np.stack(x), most, 0), *parts)

  return PackedBatch(
    frames=join('frames', frames, 1) if decoded else None,
    latents=None if decoded else join('latents', budget, 1),
    actions=join('actions', steps, 0),
    action_mask=join('action_mask', steps, 0),
    event_mask=np.arange(most) < len(windows),
    num_latents=_padded(np.array(latents, np.int32), most, 0),
    **{name: each(name) for name in _PER_EVENT},
    **fields,
  )


def _padded(x: np.ndarray, size: int, axis: int) -> np.ndarray:
  return np.pad(x, [(0, size - x.shape[i] if i == axis else 0) for i in range(x.ndim)])
