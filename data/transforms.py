"""From a planned draw to one normalised training window.

Window geometry (r = steps per latent = 4, N = bucket, M = history latents, stride = raw frames per
model frame): an event window has 1 + 4N frames, anchored on the event's first frame (or inside the
event, see data.midway); a chunk window has 4M history frames, the anchor and 4N future frames. With
L model frames from the anchor to the end, n = min(N, ceil((L - 1) / 4)) latents are real: inside
1 + 4n frames the last frame is repeated and the last target held (the end pose is supervised);
beyond them everything is padding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.data import augment, images, packing, traces
from wallwm_jax.data.captions import CaptionTable
from wallwm_jax.data.index import only_used
from wallwm_jax.data.latents import LatentStore
from wallwm_jax.data.records import EpisodeInfo
from wallwm_jax.data.store import EventStore
from wallwm_jax.geometry import yuv
from wallwm_jax.geometry.poses import relative_pose
from wallwm_jax.types import Cameras, EventBatch, NormStats, PackedBatch, Prompt

EncodePrompts = Callable[[Sequence[str]], Prompt]

# Which level says what happens in a window, and what was asked for: the first that is there.
CAPTION_ORDERS = {
  'event': ('L1', 'L0', 'L2', 'L3', 'human'),
  'chunk': ('L3',),
  'instruction': ('L3', 'L2', 'human', 'L1', 'L0'),
}


class Draw(NamedTuple):
  """One planned window: row of the event index, future latents N, raw anchor frame in the episode,
  and a number that decides between wordings of its instruction and how its images are jittered."""

  event: int
  bucket: int
  anchor: int
  choice: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
  """Raw frames of one window.

  frames: int [T], raw frame of each model frame; targets: int [K], raw frame whose command is each
  step's target; num_frames: valid model frames; num_steps: supervised action steps (4n).
  """

  frames: np.ndarray
  targets: np.ndarray
  num_frames: int
  num_steps: int


@functools.lru_cache(maxsize=64)  # a draw asks for its window several times
def cut_window(
  first: int, anchor: int, last: int, *, history: int, future: int, rate: int, stride: int
) -> Window:
  """The window around `anchor` inside raw frames first..last (inclusive); see the module docstring.

  Args:
    history, future: latent frames M and N; rate: action steps per latent frame; stride: raw frames
      per model frame.
  """
  available = -(-(last - anchor) // stride)  # L - 1
  latents = min(future, -(-available // rate))
  ahead = np.arange(-rate * history, rate * future + 1)
  return Window(
    frames=_fixed(np.clip(anchor + stride * ahead, first, last)),
    # Model step i covers raw steps stride * i .. stride * i + stride - 1; its target is the last
    # command of those.
    targets=_fixed(np.minimum(anchor + stride * np.arange(1, rate * future + 1), last) - 1),
    num_frames=1 + rate * (history + latents),
    num_steps=rate * latents,
  )


def _fixed(x: np.ndarray) -> np.ndarray:
  x.flags.writeable = False
  return x


def pick_caption(captions: dict[str, str], purpose: str) -> str:
  """The caption ('' if there is none) that a window 'event' or 'chunk' is trained with, or the
  'instruction' that it was recorded for."""
  order = CAPTION_ORDERS[purpose]
  return next((captions[level] for level in order if captions.get(level)), '')


def event_captions(store: EventStore, purpose: str) -> list[str]:
  """`pick_caption` of every event of a store."""
  distinct, row = caption_rows(store, purpose)
  return np.array(distinct, object)[row].tolist()


def caption_rows(store: EventStore, purpose: str) -> tuple[list[str], np.ndarray]:
  """The distinct captions of `event_captions`, sorted, and int [events]: which one each has."""
  texts, chosen = np.array([''], object), np.zeros(len(store.events), np.int32)
  for level in CAPTION_ORDERS[purpose]:
    said, row = store.codes(level)
    place = np.where(said == '', 0, np.arange(len(said)) + len(texts)).astype(np.int32)
    chosen = np.where(chosen == 0, place[row], chosen)
    texts = np.concatenate([texts, said])
  distinct, chosen = only_used(texts, chosen)
  return distinct.tolist(), chosen


class Instructions:
  """Prompts of the events of a store, in one of the wordings of their instruction; picklable.

  Args:
    phrasing: 'canonical', 'train' or 'heldout' wordings. prompts: texts -> Prompt [n, S] (NumPy).
  """

  def __init__(self, store: EventStore, phrasing: str, prompts: EncodePrompts):
    self.canonical = event_captions(store, 'instruction')
    self._phrasing, self._prompts = phrasing, prompts

  def wording(self, draw: Draw) -> str:
    return traces.instruct(self.canonical[draw.event], self._phrasing, draw.choice)

  def __call__(self, draw: Draw) -> Prompt:
    """Without a batch axis: ids [S], mask [S]."""
    prompt = self._prompts([self.wording(draw)])
    return Prompt(prompt.ids[0], prompt.mask[0])


class WindowReader:
  """Reads the window of a Draw out of a store; picklable, stateless.

  Args:
    store: where the pixels are; config: model.views, model.image_size, data.window, data.stride
      are used.
    norm: statistics that actions and state are normalised with.
    captions: features of the distinct captions; caption_of: int [events], caption of each event.
    latents: precomputed ones that take the place of frames; None = none.
    ask: prompts of the events; None = none are wanted.
    jitter: whether images are jittered by data.photometric and data.crop; for training alone.
    planes: frames are the I420 planes of the store's clips, to be converted on the device.
  """

  def __init__(
    self,
    store: EventStore,
    config: ExperimentConfig,
    norm: NormStats,
    captions: CaptionTable,
    caption_of: np.ndarray,
    latents: LatentStore | None = None,
    ask: Instructions | None = None,
    *,
    jitter: bool = False,
    planes: bool = False,
  ):
    self._latents, self._ask, self._planes = latents, ask, planes
    data = config.data
    self._augment = augment.AugmentSettings(photometric=data.photometric, crop=data.crop)
    self._jitters = jitter and data.split == 'train' and (data.photometric or data.crop) > 0
    self._store, self._config, self._norm = store, config, norm
    self._captions, self._caption_of = captions, caption_of
    self._episode, self._start, self._end, self._uid = (
      store.column(name) for name in ('episode', 'start', 'end', 'uid')
    )

  def __call__(self, draw: Draw) -> EventBatch:
    """One EventBatch element (no batch axis)."""
    norm = self._norm
    window = self.window(draw)
    state, actions, mask = self.robot(draw)
    frames, latents = None, None
    if self._latents is None:
      frames = self.frames(draw)
    else:
      latents = self._padded_latents(draw)
    view_mask, pixel_mask, cameras = self.cameras(draw)
    scaled = (actions - norm.action_mean) / norm.action_scale
    return EventBatch(
      frames=frames,
      num_frames=np.int32(window.num_frames),
      raw_length=np.int32(self.raw_length(draw)),
      state=((state - norm.state_mean) / norm.state_scale).astype(np.float32),
      actions=np.where(mask, scaled, 0).astype(np.float32),
      action_mask=mask,
      text=self._captions[self._caption_of[draw.event]],
      view_mask=view_mask,
      pixel_mask=pixel_mask,
      cameras=cameras,
      uid=self.uid(draw),
      latents=latents,
      prompt=self._ask and self._ask(draw),
    )

  def packed(self, draws: Sequence[Draw]) -> PackedBatch:
    """One PackedBatch element (no batch axis): the whole windows of draws whose buckets are the
    events' own future latents."""
    budget, rate = self._config.data.pack, self._config.model.steps_per_latent
    return packing.join_windows([self(draw) for draw in draws], budget, rate)

  def window(self, draw: Draw) -> Window:
    model, data = self._config.model, self._config.data
    if data.window == 'event':
      first, last, history = self._start[draw.event], self._end[draw.event] - 1, 0
    else:
      first, last, history = 0, self._info(draw).num_frames - 1, model.history
    return cut_window(
      int(first),
      draw.anchor,
      int(last),
      history=history,
      future=draw.bucket,
      rate=model.steps_per_latent,
      stride=data.stride,
    )

  def raw_length(self, draw: Draw) -> int:
    """Raw frames of the whole event, or those from a chunk window's anchor to its end."""
    if self._config.data.window == 'event':
      return int(self._end[draw.event] - self._start[draw.event])
    left = self._info(draw).num_frames - draw.anchor
    return min(
      left, 1 + self._config.data.stride * self._config.model.steps_per_latent * draw.bucket
    )

  def state(self, draw: Draw) -> np.ndarray:
    """[A] at the anchor, physical units; the training mean for action-free video."""
    state = self._info(draw).state
    return np.asarray(self._norm.state_mean) if state is None else state[draw.anchor]

  def robot(self, draw: Draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Physical units: state [A] at the anchor, actions [K, A] relative to it, mask [K, A].

    Zeros and an all-False mask for action-free video, whose state is taken as the training mean.
    """
    info, window = self._info(draw), self.window(draw)
    shape = (len(window.targets), self._config.model.action_spec.dim)
    state = self.state(draw)
    if info.state is None or info.actions is None:
      return state, np.zeros(shape, np.float32), np.zeros(shape, bool)
    mask = np.broadcast_to(np.arange(shape[0])[:, None] < window.num_steps, shape)
    actions = relative_pose(state[None], info.actions[window.targets])
    return state, np.where(mask, actions, 0).astype(np.float32), mask.copy()

  def frames(self, draw: Draw) -> np.ndarray:
    """uint8 [V, T, H, W, 3] or planes [V, T, H * 3/2, W], black where a camera is absent."""
    info, window = self._info(draw), self.window(draw)
    names, size = self._config.model.views, self._config.model.image_size
    black = yuv.black(size) if self._planes else np.zeros((*size, 3), np.uint8)
    frames = np.empty((len(names), len(window.frames), *black.shape), np.uint8)
    out = {}
    for v, name in enumerate(names):
      if name not in info.views:
        frames[v] = black
      elif not self._jitters and tuple(info.sizes[name]) == tuple(size):
        out[name] = frames[v]  # decoded where it is needed, without a copy
      else:
        out[name] = np.empty((len(window.frames), *info.sizes[name], 3), np.uint8)
    self._store.read_frames(int(self._episode[draw.event]), window.frames, out)
    for name, raw in out.items():
      if raw.base is not frames:
        v = names.index(name)
        frames[v] = self._image(draw, v, raw, info)
    return frames

  def cameras(self, draw: Draw) -> tuple[np.ndarray, np.ndarray, Cameras]:
    """view_mask [V], pixel_mask [V, H, W], calibration at the anchor frame."""
    info = self._info(draw)
    names, size = self._config.model.views, self._config.model.image_size
    view_mask = np.array([name in info.views for name in names])
    pixel_mask = np.zeros((len(names), *size), bool)
    for v in np.flatnonzero(view_mask):
      pixel_mask[v] = self._pixel_mask(draw, int(v), info)
    return view_mask, pixel_mask, self._calibration(draw, info)

  def _jitter(self, draw: Draw, view: int) -> augment.Jitter | None:
    if not self._jitters:
      return None
    seed, uid = self._config.data.seed, int(self._uid[draw.event])
    return augment.draw(self._augment, seed, uid, draw.choice, view)

  def _box(self, draw: Draw, view: int, info: EpisodeInfo) -> images.Box | None:
    """The part of the recorded image that is seen; None = all of it."""
    jitter = self._jitter(draw, view)
    return jitter and jitter.box(info.sizes[self._config.model.views[view]])

  def _image(self, draw: Draw, view: int, raw: np.ndarray, info: EpisodeInfo) -> np.ndarray:
    """uint8 [T, *image_size, 3] of one camera's recorded frames."""
    box = self._box(draw, view, info)
    frames = images.letterbox(raw, self._config.model.image_size, box)
    if self._jitters and self._augment.photometric:
      mask = self._pixel_mask(draw, view, info)
      frames = augment.recolour(frames, self._jitter(draw, view), mask)
    return frames

  def _pixel_mask(self, draw: Draw, view: int, info: EpisodeInfo) -> np.ndarray:
    name, box = self._config.model.views[view], self._box(draw, view, info)
    own, size = info.pixel_mask.get(name), self._config.model.image_size
    return images.letterbox_mask(info.sizes[name], size, own, box)

  def _padded_latents(self, draw: Draw) -> np.ndarray:
    """float32 [V, 1 + N, h, w, C], zeros beyond the real latent frames."""
    real = 1 + (self.window(draw).num_frames - 1) // self._config.model.steps_per_latent
    stored = self._latents.stored(draw.event)
    padded = np.zeros((len(stored), 1 + draw.bucket, *stored.shape[2:]), np.float32)
    padded[:, :real] = stored[:, :real]
    return padded

  def _calibration(self, draw: Draw, info: EpisodeInfo) -> Cameras:
    names, size = self._config.model.views, self._config.model.image_size
    intrinsics = np.tile(np.eye(3, dtype=np.float32), (len(names), 1, 1))
    extrinsics = np.tile(np.eye(4, dtype=np.float32), (len(names), 1, 1))
    valid = np.zeros(len(names), bool)
    for v, name in enumerate(names):
      camera = info.calibration.get(name)
      if camera is not None:
        box = self._box(draw, v, info)
        intrinsics[v] = images.letterbox_intrinsics(
          camera.intrinsics, info.sizes[name], size, box
        )
        extrinsics[v] = camera.at(draw.anchor)
        valid[v] = True
    return Cameras(intrinsics, extrinsics, valid)

  def _info(self, draw: Draw) -> EpisodeInfo:
    return self._store.info(int(self._episode[draw.event]))

  def uid(self, draw: Draw) -> np.ndarray:
    """[2] uint32: the event's id, offset by the anchor's place in the event."""
    uid = (int(self._uid[draw.event]) + draw.anchor - int(self._start[draw.event])) % 2**64
    return np.array([uid & 0xFFFFFFFF, uid >> 32], np.uint32)
