"""Small synthetic episodes whose every pixel, pose and caption can be recomputed by hand."""

import numpy as np

from wallwm_jax.data.build import build_store
from wallwm_jax.data.schema import Calibration, CaptionSpan, EpisodeRecord, EventSpan
from wallwm_jax.data.store import EventStore
from wallwm_jax.types import Text

LABELS = ('reach', 'grasp', 'lift')


def make_poses(num_frames, seed):
  """A random walk with random rotations: float32 [T, 10]."""
  rng = np.random.default_rng(seed)
  q, _ = np.linalg.qr(rng.standard_normal((num_frames, 3, 3)))
  position = np.cumsum(rng.normal(0, 0.02, (num_frames, 3)), 0)
  grip = rng.integers(0, 2, (num_frames, 1))
  return np.concatenate([position, q[:, :, 0], q[:, :, 1], grip], -1).astype(np.float32)


def make_frames(num_frames, seed, size=(16, 16)):
  """Frame t is filled with t, plus seeded noise in the lower half."""
  frames = np.zeros((num_frames, *size, 3), np.uint8)
  frames[:] = np.arange(num_frames, dtype=np.uint8)[:, None, None, None]
  noise = np.random.default_rng(seed).integers(0, 256, (num_frames, size[0] // 2, size[1], 3))
  frames[:, size[0] // 2 :] = noise
  return frames


def make_episode(
  index=0, lengths=(9, 17, 6), views=('front', 'side', 'wrist'), size=(16, 16), **changes
):
  """An episode of consecutive events of the given lengths; keyword arguments replace fields."""
  num_frames = sum(lengths)
  ends = np.cumsum(lengths)
  events = tuple(
    EventSpan(
      int(end - length), int(end), LABELS[i % 3], {'L1': f'{LABELS[i % 3]} it, episode {index}'}
    )
    for i, (length, end) in enumerate(zip(lengths, ends))
  )
  camera = Calibration(
    np.array([[20, 0, 8], [0, 20, 8], [0, 0, 1]], np.float32), np.eye(4, dtype=np.float32)
  )
  fields = {
    'episode_id': f'episode-{index}',
    'source': 'synthetic',
    'fps': 10.0,
    'views': views,
    'frames': {
      view: make_frames(num_frames, 100 * index + v, size) for v, view in enumerate(views)
    },
    'state': make_poses(num_frames, 2 * index),
    'actions': make_poses(num_frames, 2 * index + 1),
    'events': events,
    'calibration': {view: camera for view in views[:1]},
    'captions': (CaptionSpan('L3', 0, num_frames, f'task {index}'),),
  }
  return EpisodeRecord(**fields | changes)


def make_store(path, episodes=6, heldout=0.0, **kwargs):
  build_store(
    [make_episode(i, **kwargs) for i in range(episodes)], path, heldout=heldout, progress=False
  )
  return EventStore(path)


def encode_text(captions):
  """Text features that name their caption: feature [0, 0] is a hash of it, the mask is False for
  ''."""
  features = np.array([[[sum(c.encode()) % 997]] for c in captions], np.float32)
  return Text(features, np.array([[bool(c)] for c in captions]))
