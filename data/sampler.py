"""Which window is seen when: a pure function of (seed, step, slot), so the state of a data stream
is one integer.

Two levels, both stratified without keeping state. A step picks a length bucket, a slot of that
step's batch picks a label, and the how-manieth draw of that label it is picks the event. Counts
per period are fixed integers, so the ordinal of any draw is known in closed form and every label
walks through its events epoch by epoch, without replacement inside an epoch.
"""

from __future__ import annotations

import numpy as np

from wallwm_jax.types import ConfigError, DataError

BUCKET_PERIOD = 256  # steps; bucket shares are exact to 1 / 256 over this many steps
LABEL_PERIOD = 4096  # draws, at least; label shares are exact to 1 / 4096
_BUCKETS, _LABELS, _EVENTS = range(3)  # purposes, so that no two random streams coincide


class StratifiedStream:
  """An infinite random sequence of categories whose counts are exact in every period.

  Args:
    weights: [C] positive, relative frequency of each category; period: length of a stratum; key:
      integers that seed it.
  """

  def __init__(self, weights: np.ndarray, period: int, key: tuple[int, ...]):
    self.counts = apportion(np.asarray(weights, np.float64), period)
    self._period, self._key = period, key
    self._strata: dict[int, tuple[np.ndarray, np.ndarray]] = {}

  def locate(self, index: int) -> tuple[int, int]:
    """(category of draw `index`, how many draws of that category came before it)."""
    stratum, place = divmod(index, self._period)
    categories, ranks = self._stratum(stratum)
    category = int(categories[place])
    return category, stratum * int(self.counts[category]) + int(ranks[place])

  def _stratum(self, stratum: int) -> tuple[np.ndarray, np.ndarray]:
    """Category of every draw of a stratum, and its rank among those of the same category."""
    if stratum not in self._strata:
      ordered = np.repeat(np.arange(len(self.counts)), self.counts)
      rank = np.arange(self._period) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
      categories = np.random.default_rng((*self._key, stratum)).permutation(ordered)
      ranks = np.empty(self._period, np.int64)
      ranks[np.argsort(categories, kind='stable')] = rank
      if len(self._strata) >= 4:  # threads read ahead by a few batches at most
        self._strata.clear()
      self._strata[stratum] = categories, ranks
      return categories, ranks
    return self._strata[stratum]


class EventPlan:
  """The order in which events are drawn.

  Args:
    labels: str [n], what is balanced over; buckets: int [n], index of each event's length bucket.
    batch_size: global; balance: 0 natural frequency of labels .. 1 every label equally often; seed.

  Every batch comes from one bucket. Over many steps label l is drawn in proportion to count_l **
  (1 - balance).
  """

  def __init__(
    self, labels: np.ndarray, buckets: np.ndarray, batch_size: int, balance: float, seed: int
  ):
    if not len(labels):
      raise DataError('no events to draw from: the split is empty.')
    self._batch_size, self._seed = batch_size, seed
    _, label, count = np.unique(labels, return_inverse=True, return_counts=True)
    weight = (count ** (1.0 - balance) / count)[label]  # of one event
    self._bucket_ids = np.unique(buckets)
    self._members: list[list[np.ndarray]] = []
    self._label_streams: list[StratifiedStream] = []
    shares = []
    for place, bucket in enumerate(self._bucket_ids):
      inside = np.flatnonzero(buckets == bucket)
      members = [inside[label[inside] == one] for one in np.unique(label[inside])]
      shares.append(weight[inside].sum())
      # A multiple of the number of events makes natural sampling (balance 0) exact.
      period = len(inside) * -(-LABEL_PERIOD // len(inside))
      self._members.append(members)
      self._label_streams.append(
        StratifiedStream(
          np.array([weight[m].sum() for m in members]), period, (seed, _LABELS, place)
        )
      )
    self._bucket_stream = StratifiedStream(np.array(shares), BUCKET_PERIOD, (seed, _BUCKETS))
    self._orders: dict[tuple[int, int, int], np.ndarray] = {}

  def bucket(self, step: int) -> int:
    """Index of the length bucket of every event of batch `step`."""
    return int(self._bucket_ids[self._bucket_stream.locate(step)[0]])

  def event(self, step: int, slot: int) -> int:
    """Position (in `labels`) of the event in slot 0 <= slot < batch_size of batch `step`."""
    place, batch = self._bucket_stream.locate(step)
    label, ordinal = self._label_streams[place].locate(batch * self._batch_size + slot)
    members = self._members[place][label]
    epoch, rank = divmod(ordinal, len(members))
    return int(members[self._order(place, label, epoch)[rank]])

  def uniform(self, step: int, slot: int, size: int) -> int:
    """A number in 0..size-1 that depends on (seed, step, slot) only."""
    return mix64(mix64(mix64(self._seed) ^ step) ^ slot) % size

  def _order(self, place: int, label: int, epoch: int) -> np.ndarray:
    key = (place, label, epoch)
    order = self._orders.get(key)
    if order is None:
      size = len(self._members[place][label])
      order = np.random.default_rng((self._seed, _EVENTS, *key)).permutation(size)
      if len(self._orders) >= 65536:
        self._orders.clear()
      self._orders[key] = order
    return order


def assign_buckets(
  lengths: np.ndarray, buckets: tuple[int, ...], rate: int, stride: int
) -> np.ndarray:
  """Index of the shortest bucket that holds each event, the longest one for events that are cut.

  Args:
    lengths: raw frames of each event; buckets: future latents, ascending; rate: steps per latent;
      stride: raw frames per model frame.
  """
  steps = -(-(np.asarray(lengths) - 1) // stride)
  latents = -(-steps // rate)
  return np.minimum(np.searchsorted(buckets, latents), len(buckets) - 1)


def apportion(weights: np.ndarray, total: int) -> np.ndarray:
  """Integers in proportion to `weights` that sum to `total`, each at least 1 (largest
  remainders)."""
  if len(weights) > total:
    raise ConfigError(f'cannot give {len(weights)} categories a share of {total} draws.')
  quota = weights / weights.sum() * total
  counts = np.maximum(np.floor(quota).astype(np.int64), 1)
  while (missing := total - counts.sum()) > 0:
    counts[np.argsort(counts - quota, kind='stable')[:missing]] += 1
  while counts.sum() > total:  # the minimum of 1 overdrew: take it back where most is
    counts[np.argmax(counts)] -= 1
  return counts


def mix64(x: int) -> int:
  """splitmix64 finaliser."""
  x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
  x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
  x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
  return x ^ (x >> 31)
