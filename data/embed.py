"""Vectors of events, for clustering: what is seen and said (vl), and how the arm moves (act).

vl = [text, pixels] of unit length: text is the mean of the unit embeddings of the task, subtask and
action captions, pixels the mean over cameras of the first, middle and last frame; an event without
captions has zeros there and the whole length in its pixels.

act = principal components of the trajectory relative to the event's first pose: position, rotation
and gripper at 32 equal steps, log duration and path lengths, each block scaled to equal variance.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import HashingVectorizer
from threadpoolctl import threadpool_limits

from wallwm_jax.data.records import EpisodeInfo
from wallwm_jax.data.schema import ARM_WIDTH
from wallwm_jax.data.store import EventStore
from wallwm_jax.geometry.poses import relative_pose
from wallwm_jax.types import ConfigError, DataError

CAPTIONS, CAPTIONS_ELSE = ('L3', 'L2', 'L1'), ('human', 'L0')  # what is embedded; for want of it
# Smallest scale of a block: one in which the data hardly move is not blown up to unit variance.
FLOORS = {'position': 0.01, 'rotation': 0.1, 'gripper': 0.1, 'duration': 0.1, 'path': 0.01}
_IDENTITY = np.array([0, 0, 0, 1, 0, 0, 0, 1, 0], np.float32)  # of position and rot6d


class Embedder(Protocol):
  """What turns pixels and captions into vectors whose distances mean something; frozen.

  identity: names it and everything its vectors depend on; image_dim, text_dim: widths.
  """

  identity: str
  image_dim: int
  text_dim: int

  def images(self, frames: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W, 3] -> float32 [n, image_dim] of unit length."""

  def texts(self, texts: Sequence[str]) -> np.ndarray:
    """Texts, none empty -> float32 [n, text_dim] of unit length."""


@dataclasses.dataclass(frozen=True)
class EmbedSettings:
  """How events are embedded.

  text: whether captions take part. steps: of the resampled trajectory; components: of the action
  vector, at most; sample: events its scales and components are fitted on, at most; seed: of that
  sample.

  Raises:
    ConfigError: a value out of range.
  """

  text: bool = True
  steps: int = 32
  components: int = 64
  sample: int = 32_768
  seed: int = 0

  def __post_init__(self):
    for name, lowest in {'steps': 1, 'components': 1, 'sample': 2, 'seed': 0}.items():
      if getattr(self, name) < lowest:
        raise ConfigError(f'embed.{name}: expected >= {lowest}, got {getattr(self, name)}.')


class EventFeatures(NamedTuple):
  """Of the events of a store, in the order of its index: vl float32 [n, D] of unit length, act
  float32 [n, P] (zeros without actions), has_action bool [n]."""

  vl: np.ndarray
  act: np.ndarray
  has_action: np.ndarray


class DescriptorEmbedder:
  """Hand-made descriptors under random projections: nothing is learned, nothing is downloaded.

  It tells scenes, viewpoints, colours and wordings apart, not meanings: 'pick' and 'grasp' are as
  far apart as any two words. Give `embed_events` a learned embedder where there is one.

  Pixels: gradients in 8 directions and opponent colours, pooled over grids of 8x8, 4x4, 2x2 and one
  cell, then random Fourier features of a Gaussian kernel (Rahimi and Recht 2007). Texts: hashed
  counts of words, pairs of words and 3 to 5 letters, then a Gaussian projection.

  Args:
    image_dim, text_dim: widths; seed: of the projections.
  """

  SIDE, DIRECTIONS, GRIDS = 64, 8, (8, 4, 2, 1)
  BANDWIDTH = 0.4  # distance of descriptors at which the kernel is exp(-1/2)
  BUCKETS = 2**14  # of hashed text features

  def __init__(self, image_dim: int = 256, text_dim: int = 256, seed: int = 0):
    self.image_dim, self.text_dim = image_dim, text_dim
    self.identity = f'descriptors/1 image_dim={image_dim} text_dim={text_dim} seed={seed}'
    random = np.random.RandomState(seed)  # the one generator of NumPy whose numbers never change
    width = sum(grid**2 for grid in self.GRIDS) * (self.DIRECTIONS + 3)
    self._frequencies = (random.standard_normal((width, image_dim)) / self.BANDWIDTH).astype('f4')
    self._phases = random.uniform(0, 2 * np.pi, image_dim).astype('f4')
    self._projection = random.standard_normal((self.BUCKETS, text_dim)).astype('f4')
    options = {'n_features': self.BUCKETS, 'dtype': np.float32, 'norm': 'l2'}
    self._vectorizers = (
      HashingVectorizer(ngram_range=(1, 2), token_pattern=r'\w+', **options),
      HashingVectorizer(analyzer='char_wb', ngram_range=(3, 5), **options),
    )

  def images(self, frames: np.ndarray) -> np.ndarray:
    waves = np.cos(self._descriptors(frames) @ self._frequencies + self._phases)
    return _unit(waves)

  def texts(self, texts: Sequence[str]) -> np.ndarray:
    counts = sum(vectorizer.transform(texts) for vectorizer in self._vectorizers)
    return _unit(np.asarray(counts @ self._projection))

  def _descriptors(self, frames: np.ndarray) -> np.ndarray:
    """float32 [n, width]; of gradients each grid has unit length, colours are means in -1..1."""
    side = (self.SIDE, self.SIDE)
    small = [Image.fromarray(x).resize(side, Image.Resampling.BILINEAR) for x in frames]
    rgb = np.stack([np.asarray(image) for image in small]).astype(np.float32) / 255
    red, green, blue = np.moveaxis(rgb, -1, 0)
    gray = rgb.mean(-1)
    down, right = np.gradient(gray, axis=(1, 2))
    angle = 2 * np.pi * np.arange(self.DIRECTIONS) / self.DIRECTIONS
    edges = right[..., None] * np.cos(angle, dtype='f4') + down[..., None] * np.sin(
      angle, dtype='f4'
    )
    colours = np.stack([gray, red - green, blue - (red + green) / 2], -1)
    parts = []
    for x, is_edge in ((np.maximum(edges, 0), True), (colours, False)):
      for grid in self.GRIDS:
        cell = x.shape[1] // grid
        x = x.reshape(len(x), grid, cell, grid, cell, -1).mean((2, 4))
        flat = x.reshape(len(x), -1)
        parts.append(_unit(np.sqrt(flat)) if is_edge else flat / grid)
    return np.concatenate(parts, 1)


def embed_events(
  store: EventStore,
  embedder: Embedder,
  settings: EmbedSettings = EmbedSettings(),
  *,
  folder: str | os.PathLike | None = None,
) -> EventFeatures:
  """The vectors of all events of a store, read one episode at a time.

  Args:
    folder: where vl.npy and act.npy are written and mapped from, so that memory does not grow with
      the store; None = in memory.

  Raises:
    DataError: the embedder gave something else than it promised.
    CorruptStoreError: the store cannot be read.
  """
  count = len(store.events)
  # One thread: a sum in BLAS may depend on how many take part.
  with threadpool_limits(limits=1):
    actions = _ActionSpace(store, settings)
    width = embedder.image_dim + settings.text * embedder.text_dim
    vl = _array(folder, 'vl', (count, width))
    act = _array(folder, 'act', (count, actions.dim))
    has_action = store.column('has_actions', 'episodes')[store.column('episode')].astype(bool)
    captions, spans = store.events.select([*CAPTIONS, *CAPTIONS_ELSE]), _spans(store)
    for episode, rows in _episodes(store):
      info = store.info(episode)
      vectors = _pixels(store, embedder, episode, info, spans[rows])
      if settings.text:
        said = captions.slice(int(rows[0]), len(rows)).to_pylist()
        vectors = _unit(np.concatenate([_text(embedder, said), vectors], 1))
      vl[rows] = vectors
      if info.actions is not None:
        act[rows] = actions.project(_motions(info, spans[rows], settings, actions.arms))
  return EventFeatures(vl, act, has_action)


def trajectory_features(
  state: np.ndarray, actions: np.ndarray, fps: float, steps: int
) -> dict[str, np.ndarray]:
  """The motion of one event, by block.

  Args:
    state: [L, A] measured poses of its frames; actions: [L - 1, A] commanded ones; fps: Hz.

  Returns:
    position [steps, arms, 3] m and rotation [steps, arms, 6] (rot6d less the identity's) relative
    to the first pose, gripper [steps, arms], at equal steps up to the last command; duration [1]
    log s; path [arms, 2], m and rot6d units along the trajectory.
  """
  first = state[:1].reshape(1, -1, ARM_WIDTH)
  moved = relative_pose(state[:1], actions).reshape(len(actions), -1, ARM_WIDTH)
  start = np.concatenate([np.broadcast_to(_IDENTITY, (*first.shape[:2], 9)), first[..., 9:]], -1)
  poses = np.concatenate([start, moved])
  at = np.arange(1, steps + 1) * (len(actions) / steps)
  low = np.minimum(at.astype(int), len(actions) - 1)
  part = (at - low)[:, None, None]
  curve = poses[low] * (1 - part) + poses[low + 1] * part
  hops = np.diff(poses, axis=0)
  path = [np.linalg.norm(hops[..., i], axis=-1).sum(0) for i in (slice(0, 3), slice(3, 9))]
  return {
    'position': curve[..., :3],
    'rotation': curve[..., 3:9] - _IDENTITY[3:],
    'gripper': curve[..., 9],
    'duration': np.log([len(actions) / fps]),
    'path': np.stack(path, -1),
  }


class _ActionSpace:
  """From the motion of events to vectors [.., dim]: block scales and principal components, fitted
  on a sample of the split 'train' (of everything if it has no actions)."""

  def __init__(self, store: EventStore, settings: EmbedSettings):
    self.arms = max(int(store.column('state_width', 'episodes').max()) // ARM_WIDTH, 1)
    sample = _sample(store, settings)
    self._pca = None
    self.dim = 1
    if len(sample) < 2:
      return  # nothing to compare
    blocks = []
    spans = _spans(store)
    for episode, rows in _episodes(store, sample):
      blocks += _motions(store.info(episode), spans[rows], settings, self.arms)
    stacked = {name: np.stack([block[name] for block in blocks]) for name in FLOORS}
    self._scale = {
      name: np.sqrt(max(x.var(0).sum(), x[0].size * FLOORS[name] ** 2))
      for name, x in stacked.items()
    }
    flat = self._flatten(blocks)
    self.dim = min(settings.components, flat.shape[1], len(flat) - 1)
    self._pca = PCA(self.dim, svd_solver='covariance_eigh').fit(flat)

  def project(self, blocks: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """float32 [n, dim] of n events."""
    if self._pca is None:
      return np.zeros((len(blocks), self.dim), np.float32)
    return self._pca.transform(self._flatten(blocks)).astype(np.float32)

  def _flatten(self, blocks: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    return np.stack(
      [np.concatenate([b[name].ravel() / self._scale[name] for name in FLOORS]) for b in blocks]
    ).astype(np.float32)


def _sample(store: EventStore, settings: EmbedSettings) -> np.ndarray:
  """Rows of the events that the action space is fitted on, ascending."""
  able = store.column('has_actions', 'episodes')[store.column('episode')].astype(bool)
  train = able & (store.column('split') == 'train')
  rows = np.flatnonzero(train if train.any() else able)
  if len(rows) > settings.sample:
    order = np.random.RandomState(settings.seed).permutation(len(rows))
    rows = np.sort(rows[order[: settings.sample]])
  return rows


def _episodes(
  store: EventStore, rows: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray]]:
  """(episode, rows of its events) of all events or of `rows` (ascending)."""
  episode = store.column('episode')
  rows = np.arange(len(episode)) if rows is None else rows
  for number, group in itertools.groupby(rows.tolist(), key=lambda row: episode[row]):
    yield int(number), np.array(list(group))


def _spans(store: EventStore) -> np.ndarray:
  """int [events, 2]: first frame, and the one after the last."""
  return np.stack([store.column('start'), store.column('end')], 1)


def _motions(
  info: EpisodeInfo, spans: np.ndarray, settings: EmbedSettings, arms: int
) -> list[dict[str, np.ndarray]]:
  """`trajectory_features` of events of one episode, missing arms filled with no motion."""
  blocks = []
  for a, b in spans.tolist():
    block = trajectory_features(info.state[a:b], info.actions[a : b - 1], info.fps, settings.steps)
    missing = arms - block['path'].shape[0]
    for name, axis in {'position': 1, 'rotation': 1, 'gripper': 1, 'path': 0}.items():
      width = [(0, missing if i == axis else 0) for i in range(block[name].ndim)]
      block[name] = np.pad(block[name], width)
    blocks.append(block)
  return blocks


def _pixels(
  store: EventStore, embedder: Embedder, episode: int, info: EpisodeInfo, spans: np.ndarray
) -> np.ndarray:
  """float32 [spans, image_dim] of unit length."""
  start, last = spans[:, 0], spans[:, 1] - 1
  picked = np.stack([start, (start + last) // 2, last], 1)
  frames, place = np.unique(picked, return_inverse=True)
  pixels = store.frames(episode, frames, info.views)
  total = np.zeros((len(spans), embedder.image_dim), np.float32)
  for view in info.views:
    vectors = _checked(embedder.images(pixels[view]), len(frames), embedder.image_dim, 'images')
    total += vectors[place.reshape(picked.shape)].sum(1)
  return _unit(total)


def _text(embedder: Embedder, events: Sequence[Mapping[str, str]]) -> np.ndarray:
  """float32 [events, text_dim] of unit length, zeros without a caption."""
  said = [_captions(event) for event in events]
  distinct = sorted({text for texts in said for text in texts})
  total = np.zeros((len(events), embedder.text_dim), np.float32)
  if distinct:
    vectors = _checked(embedder.texts(distinct), len(distinct), embedder.text_dim, 'texts')
    of = {text: vector for text, vector in zip(distinct, vectors)}
    for row, texts in enumerate(said):
      for text in texts:
        total[row] += of[text]
  return _unit(total)


def _captions(event: Mapping[str, str]) -> list[str]:
  texts = [event[level] for level in CAPTIONS if event[level]]
  return texts or [event[level] for level in CAPTIONS_ELSE if event[level]][:1]


def _checked(x: np.ndarray, count: int, width: int, what: str) -> np.ndarray:
  if x.shape != (count, width) or not np.isfinite(x).all():
    raise DataError(
      f'embedder.{what}: expected finite [{count}, {width}], got shape {list(x.shape)}.'
    )
  return x


def _unit(x: np.ndarray) -> np.ndarray:
  """Rows of unit length; zero rows stay zero."""
  norm = np.linalg.norm(x, axis=-1, keepdims=True)
  return x / np.where(norm > 0, norm, 1)


def _array(folder: str | os.PathLike | None, name: str, shape: tuple[int, int]) -> np.ndarray:
  if folder is None:
    return np.zeros(shape, np.float32)
  path = pathlib.Path(folder) / f'{name}.npy'
  return np.lib.format.open_memmap(path, 'w+', np.float32, shape)
