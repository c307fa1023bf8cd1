"""Clusters of the events of a store: k-means of what is seen and said, and of how the arm moves.

The same labels from every run, whatever the number of threads; `labels` keeps them on disk.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import tempfile

import numpy as np
import scipy.sparse
import sklearn
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from wallwm_jax.data.embed import DescriptorEmbedder, Embedder, EmbedSettings, embed_events
from wallwm_jax.data.labels import (
  FORMAT,
  NO_ACTION,
  VERSION,
  Labels,
  check_free,
  cluster_sizes,
  examples,
)
from wallwm_jax.data.store import EventStore
from wallwm_jax.types import ConfigError

__all__ = [
  'ClusterSettings',
  'Labels',
  'assign',
  'cluster_sizes',
  'cluster_store',
  'examples',
  'fit_centres',
]

_CHUNK = 8192  # rows assigned at once
# Seeding: events per cluster it looks at, rounds of drawing, passes over them before merging.
_SEEDING, _ROUNDS, _PASSES = 48, 6, 2


@dataclasses.dataclass(frozen=True)
class ClusterSettings:
  """How events are clustered.

  vl, act: most clusters per side; min_events: mean events per cluster, at least, so that a small
    store gets fewer. seed: of the sample and of k-means.
  sample: events that centres are fitted on, at most. candidates: first centres per cluster, of
    which neighbours are merged; refinements: passes over the sample (Lloyd) after that.
  embed: how events are embedded.

  Raises:
    ConfigError: a value out of range.
  """

  vl: int = 512
  act: int = 64
  min_events: int = 8
  seed: int = 0
  sample: int = 131_072
  candidates: int = 3
  refinements: int = 3
  embed: EmbedSettings = dataclasses.field(default_factory=EmbedSettings)

  def __post_init__(self):
    for name, value in vars(self).items():
      lowest = 0 if name in ('seed', 'refinements') else 1
      if name != 'embed' and value < lowest:
        raise ConfigError(f'clusters.{name}: expected >= {lowest}, got {value}.')


def cluster_store(
  store: EventStore,
  embedder: Embedder | None = None,
  settings: ClusterSettings = ClusterSettings(),
  out: str | os.PathLike | None = None,
) -> Labels:
  """Embeds and clusters all events of a store and writes the labels to the folder `out` (default:
  clusters/default of the store, beside whose data it lies).

  Centres are fitted on events of the split 'train', if there are any. Labels do not depend on the
  number of threads.

  Raises:
    DataError: `out` exists.
  """
  embedder = DescriptorEmbedder() if embedder is None else embedder
  out = pathlib.Path(store.path / 'clusters' / 'default' if out is None else out).absolute()
  check_free(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  train = store.column('split') == 'train'
  train = train if train.any() else np.ones_like(train)
  with tempfile.TemporaryDirectory(prefix='.embedding-', dir=out.parent) as folder:
    events = embed_events(store, embedder, settings.embed, folder=folder)
    sides = {}
    everything = np.ones(len(train), bool)
    for name, x, has in (('vl', events.vl, everything), ('act', events.act, events.has_action)):
      sides[name] = _cluster_side(x, has, train, settings, name)
    del events, x
  meta = {
    'format': FORMAT,
    'version': VERSION,
    'store': store.digest,
    'events': len(train),
    'algorithm': 'k-means|| seeding, weighted k-means++ merge, Lloyd',
    'libraries': {'scikit-learn': sklearn.__version__, 'numpy': np.__version__},
    'embedder': embedder.identity,
    'settings': dataclasses.asdict(settings),
    'clusters': {name: int(side[0].max()) + 1 for name, side in sides.items()},
  }
  (vl, vl_distance), (act, act_distance) = sides['vl'], sides['act']
  labels = Labels(store.column('uid'), vl, act, vl_distance, act_distance, meta)
  labels.save(out)
  return Labels.load(out, store)


def fit_centres(
  x: np.ndarray, k: int, settings: ClusterSettings, *, spherical: bool = False
) -> np.ndarray:
  """Centres float32 [k', D] of the rows of x [n, D], k' <= min(k, n); the same for every number of
  threads.

  Zipf-like data leave common seedings with several centres in a large cluster and none in small
  ones. So more candidates than needed are drawn far from one another, moved to the means of what
  is near them, and clustered themselves, each with the weight of its rows.

  Args:
    spherical: rows are of unit length and centres shall be, so that the objective is the mean
      cosine.

  Source: Bahmani et al., "Scalable K-Means++" (arXiv 1203.6402), with means for its sampled points.
  """
  random = np.random.RandomState(settings.seed)
  # One thread: sums in OpenMP and BLAS depend on how many take part.
  with threadpool_limits(limits=1):
    subset = x[np.sort(random.permutation(len(x))[: _SEEDING * k])]
    centres = _far_rows(subset, settings.candidates * k, random)
    for _ in range(_PASSES):
      centres, weight = _means(subset, centres)
    centres, weight = centres[weight > 0], weight[weight > 0]
    if len(centres) > k:
      model = KMeans(k, n_init=1, tol=1e-3, random_state=settings.seed)
      centres = model.fit(centres, sample_weight=weight).cluster_centers_
    for _ in range(settings.refinements):
      centres, _ = _means(x, _unit_rows(centres) if spherical else centres)
    return _unit_rows(centres) if spherical else centres


def _far_rows(x: np.ndarray, count: int, random: np.random.RandomState) -> np.ndarray:
  """At most `count` rows of x, drawn in rounds in proportion to the squared distance to those drawn
  before."""
  chosen = drawn = x[:1]
  nearest = np.full(len(x), np.inf)
  for _ in range(_ROUNDS):
    nearest = np.minimum(nearest, assign(x, drawn)[1].astype(np.float64) ** 2)
    size = min(-(-count // _ROUNDS), np.count_nonzero(nearest), count - len(chosen))
    if size <= 0:
      break
    drawn = x[random.choice(len(x), size, replace=False, p=nearest / nearest.sum())]
    chosen = np.concatenate([chosen, drawn])
  return chosen


def _means(x: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(mean of the rows nearest to each centre, or the centre where there are none; their number)."""
  labels, _ = assign(x, centres)
  member = scipy.sparse.csr_array(
    (np.ones(len(x), np.float32), labels, np.arange(len(x) + 1)), shape=(len(x), len(centres))
  )
  count = np.bincount(labels, minlength=len(centres)).astype(np.float32)
  means = (member.T @ x) / np.maximum(count, 1)[:, None]
  return np.where(count[:, None] > 0, means, centres).astype(np.float32), count


def assign(x: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(int32 [n] nearest centre, the first of equals; float32 [n] distance to it) of the rows of x
  [n, D] (may be a memory map). Chunks run in parallel; the result does not depend on how many."""
  labels, distance = np.empty(len(x), np.int32), np.empty(len(x), np.float32)
  half = 0.5 * (centres**2).sum(1)

  def one(start: int) -> None:
    rows = slice(start, start + _CHUNK)
    chunk = np.asarray(x[rows], np.float32)
    score = chunk @ centres.T - half
    best = score.argmax(1)
    labels[rows] = best
    distance[rows] = np.linalg.norm(chunk - centres[best], axis=1)

  with threadpool_limits(limits=1), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(one, range(0, len(x), _CHUNK)))
  return labels, distance


def _cluster_side(
  x: np.ndarray, has: np.ndarray, train: np.ndarray, settings: ClusterSettings, name: str
) -> tuple[np.ndarray, np.ndarray]:
  """(labels int32 [n], distance float32 [n]); NO_ACTION and NaN where `has` is False."""
  labels = np.full(len(x), NO_ACTION, np.int32)
  distance = np.full(len(x), np.nan, np.float32)
  fit = np.flatnonzero(has & train) if (has & train).any() else np.flatnonzero(has)
  if not len(fit):
    return labels, distance
  k = max(1, min(getattr(settings, name), len(fit) // settings.min_events))
  if len(fit) > settings.sample:
    chosen = np.random.RandomState(settings.seed).permutation(len(fit))[: settings.sample]
    fit = fit[np.sort(chosen)]
  centres = fit_centres(np.asarray(x[fit], np.float32), k, settings, spherical=name == 'vl')
  found, near = assign(x, centres)
  labels[has], distance[has] = _by_size(found[has]), near[has]
  return labels, distance


def _by_size(labels: np.ndarray) -> np.ndarray:
  """Labels int32 renumbered so that 0 is the largest cluster and none is empty."""
  values, code, count = np.unique(labels, return_inverse=True, return_counts=True)
  rank = np.empty(len(values), np.int32)
  rank[np.argsort(-count, kind='stable')] = np.arange(len(values))
  return rank[code]


def _unit_rows(x: np.ndarray) -> np.ndarray:
  norm = np.linalg.norm(x, axis=1, keepdims=True)
  return x / np.where(norm > 0, norm, 1)
