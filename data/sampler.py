"""Which event is drawn when: a pure function of (seed, draw), so the state of a data stream is one
integer.

Events lie in cells, and each cell has a share of the draws (a label's, or that of a pair of
clusters). Two levels, neither of which keeps state:

- Which cell. Draws come in blocks. How often a cell was drawn before any block is a number in
  closed form, its share of the draws so far, rounded; the block holds the difference, in an order
  of its own. A binary tree over the cells does the rounding: a node's draws go to its left child in
  proportion to the mass there, rounded to the nearest, and the rest to the right. So counts are
  integers that add up, never decrease, and stay within about one draw of their share, however long
  the stream runs; random draws stray as the square root of their number.
- Which of its events. The how-manieth draw of the cell it is picks the event: a cell walks through
  its events epoch by epoch, without replacement, each time in another order.
"""

from __future__ import annotations

import hashlib

import numpy as np

from wallwm_jax.data.permutation import fold, mix64_array, permute, shuffled
from wallwm_jax.types import DataError

BLOCK = 65536  # draws of a block; less where there are fewer events
BUCKET_BLOCK = 256  # steps; bucket shares are exact to about one step over this many
_SMALLEST_BLOCK = 4096
_RUN = 256  # cells
_KEPT = 2  # blocks in memory: threads that read ahead reach into the next one
_TIES, _ORDER, _EVENTS, _BUCKETS = range(4)  # purposes, so that no two random streams coincide


class CellStream:
  """An infinite random sequence of cells, each of which has its share in every part of it.

  Args:
    mass: [C] positive, the share of each cell up to a factor; block: draws of a block; key: seeds
      the order.

  Shares are kept as multiples of 2**-32 of the next larger part of the cells, which moves a count
  by a whole draw only after more than 2**32 draws.
  """

  def __init__(self, mass: np.ndarray, block: int, key: int):
    self.block_size, self._key = block, key
    self._levels, self._leaf = _rounding_tree(np.asarray(mass, np.float64), fold(key, _TIES))
    self._located: dict[int, tuple[np.ndarray, np.ndarray]] = {}

  def counts(self, block: int) -> np.ndarray:
    """int64 [C]: draws of each cell in all blocks before `block`; they add up to all draws."""
    at = np.empty(2 * len(self._leaf) - 1, np.int64)
    at[0] = block * self.block_size
    for nodes, first, ratio in self._levels:
      parent = at[nodes].astype(np.uint64)
      high, low = parent >> np.uint64(32), parent & np.uint64(2**32 - 1)
      left = ratio * high + (ratio * low + np.uint64(2**31) >> np.uint64(32))
      at[first : first + 2 * len(nodes) : 2] = left
      at[first + 1 : first + 2 * len(nodes) : 2] = parent - left
    return at[self._leaf]

  def locate(self, draw: int) -> tuple[int, int]:
    """(cell of draw number `draw`, how many draws of that cell came before it)."""
    block, place = divmod(draw, self.block_size)
    located = self._located.get(block)
    if located is None:
      located = self.block(block)
      if len(self._located) >= _KEPT:
        self._located.clear()
      self._located[block] = located
    return int(located[0][place]), int(located[1][place])

  def block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Cell [block_size] of each draw of a block, and how many draws of that cell came before."""
    before = self.counts(block)
    here = self.counts(block + 1) - before
    ordered = np.repeat(np.arange(len(here)), here)
    rank = np.arange(self.block_size) - np.repeat(np.cumsum(here) - here, here)
    cells = ordered[shuffled(self.block_size, fold(self._key, _ORDER, block))]
    # Places in the order of (cell, place).
    places = np.sort(cells * self.block_size + np.arange(self.block_size)) % self.block_size
    ordinals = np.empty(self.block_size, np.int64)
    ordinals[places] = before[ordered] + rank
    return cells, ordinals


class EventPlan:
  """The order in which events are drawn.

  Args:
    cells: int [n], the cell 0 <= cell < C of each event; mass: float [C], how often each cell is
      drawn, up to a factor; a cell of mass 0 never is. key: seeds the order.

  Any draw can be asked for at any time; only the last few blocks are kept.

  Raises:
    DataError: no events, a cell to be drawn that has none, or masses that are not finite and >= 0.
  """

  def __init__(self, cells: np.ndarray, mass: np.ndarray, key: int):
    cells, mass = np.asarray(cells), np.asarray(mass, np.float64)
    if not len(cells):
      raise DataError('no events to draw from: the split is empty.')
    if not np.isfinite(mass).all() or (mass < 0).any() or not mass.any():
      raise DataError('masses of cells: expected finite numbers >= 0, not all of them 0.')
    size = np.bincount(cells, minlength=len(mass))
    if len(empty := np.flatnonzero((mass > 0) & (size == 0))):
      raise DataError(
        f'{len(empty)} cells shall be drawn but have no events, first {empty[:5].tolist()}. '
        'Make the shares from the events of this split.'
      )
    self._drawn = np.flatnonzero(mass > 0)
    self._size = size[self._drawn]
    order = np.argsort(cells, kind='stable')
    self._members = order[(mass > 0)[cells[order]]].astype(np.int32)
    self._first = np.cumsum(self._size) - self._size
    n = len(cells)
    # A multiple of the number of events: drawn evenly, every block shows each equally often.
    block = BLOCK if n >= BLOCK else n * -(-_SMALLEST_BLOCK // n)
    self._mass = mass[self._drawn]
    self._stream = CellStream(self._mass, block, key)
    self._cell_keys = mix64_array(
      mix64_array(self._drawn.astype(np.uint64)) ^ np.uint64(fold(key, _EVENTS))
    )
    self._blocks: dict[int, np.ndarray] = {}

  @property
  def block_size(self) -> int:
    """Draws of a block."""
    return self._stream.block_size

  def block(self, block: int) -> np.ndarray:
    """int32 [block_size]: events (positions in `cells`) of all draws of a block, in order."""
    events = self._blocks.get(block)
    if events is None:
      cells, ordinals = self._stream.block(block)
      size = self._size[cells]
      epoch, rank = np.divmod(ordinals, size)
      keys = mix64_array(self._cell_keys[cells] ^ epoch.astype(np.uint64))
      events = self._members[self._first[cells] + permute(rank, size, keys)]
      if len(self._blocks) >= _KEPT:
        self._blocks.clear()
      self._blocks[block] = events
    return events

  def event(self, draw: int) -> int:
    """The event of draw number `draw`."""
    block, place = divmod(draw, self.block_size)
    return int(self.block(block)[place])

  def counts(self, block: int) -> np.ndarray:
    """int64 [C]: draws of each cell in all blocks before `block`, without drawing them."""
    counts = np.zeros(int(self._drawn[-1]) + 1, np.int64)
    counts[self._drawn] = self._stream.counts(block)
    return counts

  def digest(self) -> str:
    """Hex digest of what is drawn and how often, whatever the seed."""
    share = np.round(self._mass / np.cumsum(self._mass)[-1] * 2.0**32).astype('<i8')
    content = hashlib.sha256(share.tobytes())
    content.update(self._size.astype('<i8').tobytes() + self._members.astype('<i4').tobytes())
    return content.hexdigest()[:16]


class BatchPlan:
  """The order in which events are drawn where every batch comes from one length bucket.

  Args:
    weights: float [n], how often each event is drawn, up to a factor, equal inside a cell; cells:
      int [n]; buckets: int [n], index of each event's length bucket; batch_size: global; seed.

  A step picks a bucket, in proportion to the weights inside, and takes the bucket's next draws.
  """

  def __init__(
    self, weights: np.ndarray, cells: np.ndarray, buckets: np.ndarray, batch_size: int, seed: int
  ):
    if not len(cells):
      raise DataError('no events to draw from: the split is empty.')
    self._batch_size = batch_size
    self._bucket_ids, place = np.unique(buckets, return_inverse=True)
    share = np.bincount(place, weights)
    self._bucket_ids, share = self._bucket_ids[share > 0], share[share > 0]
    self._members, self._plans = [], []
    for bucket in self._bucket_ids:
      inside = np.flatnonzero(buckets == bucket)
      own, mass = cell_mass(weights[inside], cells[inside])
      self._members.append(inside.astype(np.int32))
      self._plans.append(EventPlan(own, mass, fold(seed, int(bucket))))
    self._steps = CellStream(share, BUCKET_BLOCK, fold(seed, _BUCKETS))

  def bucket(self, step: int) -> int:
    """Index of the length bucket of every event of batch `step`."""
    return int(self._bucket_ids[self._steps.locate(step)[0]])

  def event(self, step: int, slot: int) -> int:
    """Position (in `cells`) of the event in slot 0 <= slot < batch_size of batch `step`."""
    place, batch = self._steps.locate(step)
    return int(self._members[place][self._plans[place].event(batch * self._batch_size + slot)])

  def digest(self) -> str:
    """Hex digest of what is drawn and how often, whatever the seed."""
    parts = [plan.digest() for plan in self._plans]
    return hashlib.sha256(repr((self._bucket_ids.tolist(), parts)).encode()).hexdigest()[:16]


def label_weights(labels: np.ndarray, balance: float) -> tuple[np.ndarray, np.ndarray]:
  """Weight [n] and cell [n] of every event, for labels that are each drawn in proportion to their
  count ** (1 - balance).

  Args:
    labels: [n], names or numbers; balance: 0 natural frequency .. 1 every label equally often.
  """
  _, cells, count = np.unique(labels, return_inverse=True, return_counts=True)
  return (count ** (1.0 - balance) / count)[cells], cells


def cell_mass(weights: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Cells [n] numbered 0..C-1 without a gap, and the sum of the weights [C] in each.

  Raises:
    DataError: weights that differ inside a cell, naming it, or are negative or not finite.
  """
  weights = np.asarray(weights, np.float64)
  ids, first, dense = np.unique(cells, return_index=True, return_inverse=True)
  wrong = np.flatnonzero(~(np.abs(weights - weights[first][dense]) <= 1e-9 * np.abs(weights)))
  if len(wrong):
    event = int(wrong[0])
    raise DataError(
      f'weight of event {event}: expected {weights[first][dense][event]}, as the others of cell '
      f'{ids[dense][event]}, got {weights[event]}.'
    )
  return dense, np.bincount(dense) * weights[first]


def assign_buckets(
  lengths: np.ndarray, buckets: tuple[int, ...], rate: int, stride: int
) -> np.ndarray:
  """Index of the shortest bucket that holds each event, the longest one for events that are cut.

  Args:
    lengths: raw frames of each event; buckets: future latents, ascending; rate: steps per latent;
      stride: raw frames per model frame.
  """
  latents = count_latents(lengths, rate, stride)
  return np.minimum(np.searchsorted(buckets, latents), len(buckets) - 1)


def count_latents(lengths: np.ndarray, rate: int, stride: int) -> np.ndarray:
  """Future latent frames of each event; arguments as those of `assign_buckets`."""
  steps = -(-(np.asarray(lengths) - 1) // stride)
  return -(-steps // rate)


def _rounding_tree(
  mass: np.ndarray, key: int
) -> tuple[list[tuple[np.ndarray, int, np.ndarray]], np.ndarray]:
  """(levels, leaf [C]) of a binary tree whose nodes halve the mass below them as well as can be.

  A level is (its inner nodes, the number of their first child, share of each left child as a
  multiple of 2**-32, uint64); children of a level are numbered in turn, the root is 0.
  """
  # Cells of like mass lie together, so that halves are nearly equal and no cell strays by more
  # than a draw; but only within runs, so that groups of cells (clusters, sources) stay close too.
  run = np.arange(len(mass)) // _RUN
  ties = mix64_array(np.arange(len(mass), dtype=np.uint64) ^ np.uint64(key))
  order = np.lexsort((ties, np.where(run % 2, -mass, mass), run))
  below = np.concatenate([[0.0], np.cumsum(mass[order])])
  leaf, levels = np.empty(len(mass), np.int64), []
  node, low, high, count = np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([len(mass)]), 1
  while len(node):
    alone = high - low == 1
    leaf[order[low[alone]]] = node[alone]
    node, low, high = node[~alone], low[~alone], high[~alone]
    middle = np.clip(np.searchsorted(below, (below[low] + below[high]) / 2), low + 1, high - 1)
    closer = below[middle] - below[low] > below[high] - below[np.maximum(middle - 1, low)]
    middle = np.maximum(np.where(closer, middle - 1, middle), low + 1)
    # Masses too small beside the others to count still get their 2**-32.
    ratio = (below[middle] - below[low]) / np.maximum(below[high] - below[low], 1e-300)
    share = np.clip(np.round(ratio * 2.0**32), 1, 2**32 - 1).astype(np.uint64)
    if len(node):
      levels.append((node, count, share))
    children = count + np.arange(2 * len(node))
    count += 2 * len(node)
    low, high = (np.stack(pair, 1).ravel() for pair in ((low, middle), (middle, high)))
    node = children
  return levels, leaf
