"""Joins a trained model, a store or an environment, and the scores of wallwm_jax.evaluation.

`wallwm eval` and the quickstart call these; the evaluation package itself never sees a model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.data import pipeline
from wallwm_jax.data.schema import LEVELS
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import Draw, WindowReader, pick_caption
from wallwm_jax.evaluation import latency, open_loop, video
from wallwm_jax.evaluation.action_sections import ActionTrace
from wallwm_jax.evaluation.video_sections import VideoStrip
from wallwm_jax.inference import denoiser, runtime
from wallwm_jax.inference.denoiser import Window
from wallwm_jax.inference.event import predict_event
from wallwm_jax.inference.unified import predict_chunk
from wallwm_jax.models import functional
from wallwm_jax.text.factory import make_text_encoder
from wallwm_jax.types import EventBatch, InferenceParams, NormStats, Observation

DEADLINES = (10, 20, 30)  # Hz
# Parts that a control loop waits for: replanning, and new actions from a cached anchor.
LOOPS = ('whole prediction', 'actions against the cache')
VIDEO_STEPS = 4  # Euler steps of a predicted video; few, as PSNR asks for the mean of futures
Predict = Callable[[EventBatch], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
  """The windows of one split of a store as a model was trained to see them, one per event.

  Chunk windows are anchored at the first frame of their event. limit: at most this many events,
  evenly spread over the split (None = all).
  """

  config: ExperimentConfig
  store: EventStore
  norm: NormStats
  split: str = 'heldout'
  limit: int | None = None

  def batches(self) -> Iterator[EventBatch]:
    """Batches of config.data.batch_size or fewer, each of one bucket."""
    size = self.config.data.batch_size
    for draws in self._by_bucket().values():
      for start in range(0, len(draws), size):
        yield pipeline.stack([self._reader(draw) for draw in draws[start : start + size]])

  def actions(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(actions [K, A] physical, mask [K, A]) of each window; reads no pixels."""
    for draws in self._by_bucket().values():
      for draw in draws:
        _, actions, mask = self._reader.robot(draw)
        yield actions, mask

  def facts(self, batch: EventBatch, column: str) -> list:
    """A column of the event index ('label', 'episode', 'L1', ...) for each window of a batch."""
    return self.store.column(column)[self._rows_of(batch)].tolist()

  def captions(self, batch: EventBatch) -> list[str]:
    """The caption that conditions each window of a batch."""
    levels = {level: self.facts(batch, level) for level in LEVELS}
    return [
      pick_caption({level: texts[i] for level, texts in levels.items()}, self.config.data.window)
      for i in range(len(batch.num_frames))
    ]

  def states(self, batch: EventBatch) -> np.ndarray:
    """Measured states [B, T, A] of the robot at every frame of a batch, physical and absolute; NaN
    where a recording has none."""
    rows, starts = self._rows_of(batch), self.store.column('start')
    future = np.asarray(batch.actions).shape[1] // self.config.model.steps_per_latent
    paths = []
    for row in rows:
      frames = self._reader.window(Draw(row, future, int(starts[row]))).frames
      state = self.store.info(int(self.store.column('episode')[row])).state
      lost = np.full((len(frames), self.config.model.action_spec.dim), np.nan)
      paths.append(lost if state is None else state[frames])
    return np.stack(paths).astype(np.float64)

  def fixed_views(self, batch: EventBatch) -> np.ndarray:
    """Bool [B, V]: views there whose camera is calibrated and stands still."""
    fixed = []
    for episode in self.facts(batch, 'episode'):
      cameras = self.store.info(int(episode)).calibration
      shown = [cameras.get(name) for name in self.config.model.views]
      fixed.append([camera is not None and camera.extrinsics.ndim == 2 for camera in shown])
    return np.array(fixed) & np.asarray(batch.view_mask)

  def _rows_of(self, batch: EventBatch) -> list[int]:
    uid = np.asarray(batch.uid, np.uint64)
    return [self._rows[key] for key in (uid[:, 0] | uid[:, 1] << np.uint64(32)).tolist()]

  def _by_bucket(self) -> dict[int, list[Draw]]:
    events = pipeline.split_events(self.store, self._config)
    if self.limit is not None and self.limit < len(events):
      events = events[np.linspace(0, len(events) - 1, self.limit).round().astype(int)]
    buckets = pipeline.event_buckets(self.store, self._config)
    starts = self.store.column('start')
    draws: dict[int, list[Draw]] = {}
    for event in events.tolist():
      future = self._config.data.buckets[buckets[event]]
      draws.setdefault(future, []).append(Draw(event, future, int(starts[event])))
    return draws

  @functools.cached_property
  def _config(self) -> ExperimentConfig:
    """The config with its split set to this one; what is compared are frames."""
    return dataclasses.replace(
      self.config, data=dataclasses.replace(self.config.data, split=self.split, latents='')
    )

  @functools.cached_property
  def _reader(self) -> WindowReader:
    encode = make_text_encoder(self.config.model.text).encode
    return pipeline.make_reader(self._config, self.store, self.norm, encode)

  @functools.cached_property
  def _rows(self) -> dict[int, int]:
    return {uid: row for row, uid in enumerate(self.store.column('uid').tolist())}


def anchor_frame(config: ExperimentConfig) -> int:
  """Index of the last observed frame of a window."""
  history = config.model.history if config.data.window == 'chunk' else 0
  return config.model.steps_per_latent * history


def observe(config: ExperimentConfig, norm: NormStats, batch: EventBatch) -> Observation:
  """What the policy may see of a window: frames up to the anchor, and the physical state there."""
  frames = np.asarray(batch.frames)[:, :, : anchor_frame(config) + 1]
  state = open_loop.denormalise(batch.state, norm.state_mean, norm.state_scale).astype(np.float32)
  return Observation(frames, state, np.asarray(batch.view_mask))


def action_predictor(config: ExperimentConfig, params: InferenceParams, seed: int = 0) -> Predict:
  """batch -> physical actions [B, K, A] from the trained policy.

  In event mode the length of the event is given, as a caller of that mode would give it; chunks
  have a fixed length. Batches are filled up to config.data.batch_size, so every bucket compiles
  once.
  """

  @functools.partial(jax.jit, static_argnames='bucket')
  def run(params, obs, text, key, length, bucket):
    if config.data.window == 'chunk':
      return predict_chunk(params, obs, text, key, cfg=config).chunk.actions
    return predict_event(
      params, obs, text, key, cfg=config, bucket=bucket, length=length
    ).chunk.actions

  return _whole_batches(config, params, run, seed)


def video_predictor(
  config: ExperimentConfig, params: InferenceParams, steps: int = VIDEO_STEPS, seed: int = 0
) -> Predict:
  """batch -> predicted frames [B, V, 1+4N, H, W, 3] in 0..1 from the anchor on.

  `steps` Euler steps from noise to clean video, in both kinds of window.
  """
  @functools.partial(jax.jit, static_argnames='bucket')
  def run(params, obs, text, key, length, bucket):
    chunk = config.data.window == 'chunk'
    window = Window.chunk(config) if chunk else Window.event(config, bucket)
    cond = denoiser.encode_observation(params, obs, text, length, cfg=config, window=window)
    noise = denoiser.sample_noise(key, config, len(length), window).video
    return denoiser.imagine(params, cond, noise, cfg=config, window=window, steps=steps)

  return _whole_batches(config, params, run, seed)


def _whole_batches(config: ExperimentConfig, params: InferenceParams, run, seed: int) -> Predict:
  rate, anchor = config.model.steps_per_latent, anchor_frame(config)

  def predict(batch: EventBatch) -> np.ndarray:
    own = len(batch.num_frames)
    rows = np.minimum(np.arange(max(own, config.data.batch_size)), own - 1)
    batch = jax.tree.map(lambda x: np.asarray(x)[rows], batch)
    length = np.maximum((batch.num_frames - 1 - anchor) // rate, 1).astype(np.int32)
    key = jax.random.fold_in(jax.random.key(seed), int(batch.uid[0, 0]))
    obs = observe(config, params.norm, batch)
    bucket = batch.actions.shape[1] // rate
    return np.asarray(run(params, obs, batch.text, key, length, bucket))[:own]

  return predict


def evaluate_actions(
  config: ExperimentConfig,
  params: InferenceParams,
  store: EventStore,
  *,
  split: str = 'heldout',
  limit: int | None = None,
  seed: int = 0,
) -> open_loop.OpenLoopResult:
  """Open-loop action error on `split`, beside hold-still and the mean action of the training
  split."""
  held_out = Windows(config, store, params.norm, split, limit)
  training = Windows(config, store, params.norm, 'train')
  return open_loop.evaluate(
    held_out.batches(),
    action_predictor(config, params, seed),
    norm=params.norm,
    spec=config.model.action_spec,
    mean_action=open_loop.mean_actions(training.actions()),
    episode_of=lambda batch: held_out.facts(batch, 'episode'),
    label_of=lambda batch: held_out.facts(batch, 'label'),
  )


def evaluate_video(
  config: ExperimentConfig,
  params: InferenceParams,
  store: EventStore,
  *,
  split: str = 'heldout',
  limit: int | None = None,
  steps: int = VIDEO_STEPS,
  seed: int = 0,
  watch: Callable[[EventBatch, dict[str, np.ndarray]], None] | None = None,
) -> dict[str, video.VideoResult]:
  """PSNR and SSIM of 'model', 'codec' (the ceiling) and 'copy_last'; `watch` is shown every batch
  and the videos [B, V, T, H, W, 3] of the former two, from the anchor on."""
  predict, anchor = video_predictor(config, params, steps, seed), anchor_frame(config)

  @jax.jit
  def reconstruct(codec, frames):
    latents = functional.encode_video(config.model, frames, codec)
    return functional.decode_video(config.model, latents, codec)

  def pairs():
    for batch in Windows(config, store, params.norm, split, limit).batches():
      frames = np.asarray(batch.frames)[:, :, anchor:]
      truth = {
        'frames': frames,
        'num_frames': batch.num_frames - anchor,
        'view_mask': batch.view_mask,
        'pixel_mask': batch.pixel_mask,
      }
      codec = np.asarray(reconstruct(params.frozen.codec, frames))
      videos = {'model': predict(batch), 'codec': codec}
      if watch is not None:
        watch(batch, videos)
      yield truth, videos

  return video.evaluate(pairs())


def video_strips(
  windows: Windows, params: InferenceParams, steps: int = VIDEO_STEPS, seed: int = 0
) -> list[VideoStrip]:
  """Predicted beside true video of every window, for a page."""
  config = windows.config
  film, anchor = video_predictor(config, params, steps, seed), anchor_frame(config)
  strips = []
  for batch in windows.batches():
    frames = film(batch)
    names, episodes = windows.captions(batch), windows.facts(batch, 'episode')
    for i, (name, episode) in enumerate(zip(names, episodes)):
      seen, end = np.flatnonzero(batch.view_mask[i]), int(batch.num_frames[i])
      fps = windows.store.episodes['fps'][episode].as_py() / config.data.stride
      shown = frames[i, seen, : end - anchor]
      views = tuple(config.model.views[v] for v in seen)
      strips.append(VideoStrip(name, views, shown, batch.frames[i, seen, anchor:end], fps))
  return strips


def action_traces(windows: Windows, params: InferenceParams, seed: int = 0) -> list[ActionTrace]:
  """Predicted beside demonstrated actions of every window, for a page."""
  act, norm = action_predictor(windows.config, params, seed), params.norm
  traces = []
  for batch in windows.batches():
    actions, names = act(batch), windows.captions(batch)
    true = open_loop.denormalise(batch.actions, norm.action_mean, norm.action_scale)
    state = open_loop.denormalise(batch.state, norm.state_mean, norm.state_scale)
    hold = open_loop.hold_actions(state, true.shape[1])
    for i, name in enumerate(names):
      traces.append(ActionTrace(name, actions[i], true[i], hold[i], batch.action_mask[i]))
  return traces


def one_prediction(config: ExperimentConfig):
  """(params, obs, text, key) -> physical actions [B, K, A] of the longest window."""
  bucket = config.data.buckets[-1]

  def predict(params, obs, text, key):
    if config.data.window == 'chunk':
      return predict_chunk(params, obs, text, key, cfg=config).chunk.actions
    return predict_event(params, obs, text, key, cfg=config, bucket=bucket).chunk.actions

  return predict


def measure_latency(config: ExperimentConfig, params: InferenceParams, *, calls: int = 200) -> dict:
  """Latency of one prediction (batch 1, longest bucket) and of its parts.

  Returns:
    What `latency.measure_parts` answers, with deadline_misses {loop: {Hz: share of calls}},
    replan_hz, action_hz (steps of a chunk times replan_hz), action_refresh_hz (actions anew against
    the cached anchor), asked (what decides the time) and `latency.peak_memory`.
  """
  chunk = config.data.window == 'chunk'
  window = Window.chunk(config) if chunk else Window.event(config, config.data.buckets[-1])
  batch = config.fake_batch(batch_size=1)
  obs, key = observe(config, params.norm, batch), jax.random.key(0)
  encode = jax.jit(functools.partial(denoiser.encode_observation, cfg=config, window=window))
  imagine = jax.jit(functools.partial(denoiser.denoise_to_anchor, cfg=config))
  read = jax.jit(functools.partial(denoiser.anchor_cache, cfg=config, window=window))
  act = jax.jit(functools.partial(denoiser.denoise_actions, cfg=config))
  whole = jax.jit(functools.partial(runtime.answer, cfg=config, window=window))
  length, free = np.full(1, window.future, np.int32), runtime.no_targets(config, window, 1)
  noise = denoiser.sample_noise(key, config, 1, window)
  cond = _ones(encode, params, obs, batch.text)
  z = _ones(imagine, params, cond, noise.video)
  cache, _ = _ones(read, params, cond, z)
  asked = (obs, batch.text, length, free)
  parts = {
    'encode the observation': lambda: encode(params, obs, batch.text),
    'video to the anchor step': lambda: imagine(params, cond, noise.video),
    'anchored video forward': lambda: read(params, cond, z)[1],
    'actions against the cache': lambda: act(params, cond, cache, noise.action),
    'whole prediction': lambda: whole(params, *asked, key[None]).chunk.actions,
  }
  measured = latency.measure_parts(parts, calls=calls)
  measured['parts']['actions to the host'] = latency.measure_copy(
    lambda: act(params, cond, cache, noise.action), calls=calls
  )
  whole_time, refresh = (measured['parts'][name] for name in LOOPS)
  return measured | {
    'deadline_misses': {
      name: {str(rate): measured['parts'][name].missed(rate) for rate in DEADLINES}
      for name in LOOPS
    },
    'replan_hz': whole_time.hz,
    'action_hz': whole_time.hz * noise.action.shape[1],
    'action_refresh_hz': refresh.hz,
    'asked': _asked(config, noise),
  } | latency.peak_memory()


def _asked(config: ExperimentConfig, noise: denoiser.Noise) -> dict:
  """What decides how long a prediction takes."""
  inference, model = config.inference, config.model
  return {
    'action_steps': inference.action_steps,
    'video_steps': inference.video_steps,
    'guidance': inference.guidance,
    'horizon': noise.action.shape[1],
    'views': len(model.views),
    'image_size': list(model.image_size),
    'batch': 1,
  }


def _ones(function, *args):
  """Ones in the shapes of `function(*args)`: inputs for the next part that compile nothing."""
  return jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), jax.eval_shape(function, *args))
