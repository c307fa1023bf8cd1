"""A trained model as a served policy, in event mode and unified mode.

A request holds the state, one picture (or the pictures since the last request, oldest first) of
every camera, the text (`event` or `prompt`) and the `mode`; a session keeps text and mode until
others come, and the past that unified mode looks back on. `reset` forgets all. Every other field is
an error that names it.

Real-time chunking: a client that goes on executing while it waits says how many steps of the last
reply it had `executed` when it looked, and with how much `delay` (steps) it will switch over. Those
steps of the last reply are the beginning of the next one, and what follows is predicted to follow
on them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax.config import ExperimentConfig, nearest
from wallwm_jax.geometry.poses import apply_relative, relative_pose
from wallwm_jax.inference.denoiser import Window
from wallwm_jax.inference.event import predict_event
from wallwm_jax.inference.unified import predict_chunk
from wallwm_jax.types import (
  ActionChunk,
  ConfigError,
  DataError,
  InferenceParams,
  Observation,
  Text,
)

TEXTS = ('event', 'prompt')  # the first one given counts
LONGEST = 2000  # characters of a text
Mode = Literal['event', 'chunk']


@dataclasses.dataclass(frozen=True)
class Keys:
  """What requests call things. views: {view of the model: field}; state: field of the state [A]."""

  views: Mapping[str, str]
  state: str = 'observation/state'

  @classmethod
  def of(cls, config: ExperimentConfig) -> Keys:
    """'observation/' and the model's own names."""
    return cls({view: f'observation/{view}' for view in config.model.views})


@dataclasses.dataclass
class Session:
  """What a connection remembers. past: {view: uint8 [<= 4M, H, W, 3]}; turn: requests so far; last:
  actions [K, A] of the last reply, absolute."""

  mode: Mode
  text: str = ''
  past: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  turn: int = 0
  last: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
  """One request, checked: frames uint8 [V, T, H, W, 3], state float32 [A], and the absolute actions
  float32 [n, A] that its robot will have executed before the reply takes over."""

  frames: np.ndarray
  state: np.ndarray
  committed: np.ndarray
  session: Session


class ModelPolicy:
  """Serves a model.

  Args:
    config, params: of `checkpoints.load_inference`. encode: texts -> Text features [n, X, E].
    resize: (uint8 [T, H, W, 3], (H', W')) -> uint8 [T, H', W', 3]. modes: what sessions may ask
      for, the first unless they do; bucket: future latents N of event mode. keys: names of the
      fields (Keys.of).
    max_batch: most requests of one call; calls are padded to a power of two so that few programs
      are compiled. seed: of the noise; a session's turn n always gets the same.

  Raises:
    ConfigError: a bucket that the model does not have, or keys of other views.
  """

  def __init__(
    self,
    config: ExperimentConfig,
    params: InferenceParams,
    encode: Callable[[Sequence[str]], Text],
    resize: Callable[[np.ndarray, tuple[int, int]], np.ndarray],
    *,
    modes: Sequence[Mode] = ('event',),
    bucket: int | None = None,
    keys: Keys | None = None,
    max_batch: int = 8,
    seed: int = 0,
  ):
    self._config, self._params, self._resize = config, params, resize
    self._keys = keys or Keys.of(config)
    if set(self._keys.views) != set(config.model.views):
      raise ConfigError(
        f'keys: expected a field for each of {config.model.views}, got {dict(self._keys.views)}.'
      )
    bucket = config.data.buckets[-1] if bucket is None else bucket
    windows = {'event': Window.event(config, bucket), 'chunk': Window.chunk(config)}
    self._windows = {mode: windows[mode] for mode in modes}
    self._rate = config.model.steps_per_latent
    self._past = self._rate * max(window.history for window in self._windows.values())
    self._encode = functools.lru_cache(4096)(lambda text: encode([text]))
    self._max_batch, self._seed = max_batch, seed
    self._act = {
      mode: jax.jit(functools.partial(_act, cfg=config, window=window))
      for mode, window in self._windows.items()
    }
    self.metadata = {
      'protocol': 'openpi',
      'policy': config.name,
      'modes': list(self._windows),
      'action_dim': config.model.action_spec.dim,
      'steps': {mode: self._steps(mode) for mode in self._windows},
      'actions': 'absolute poses: position m, rot6d, gripper 0..1 per arm, robot base frame',
      'image_size': list(config.model.image_size),
      'past_frames': self._past,
      'fields': {'state': self._keys.state, 'views': dict(self._keys.views), 'text': list(TEXTS)},
    }

  def start(self) -> Session:
    """A session without text and past."""
    return Session(next(iter(self._windows)))

  def check(self, request: Mapping[str, Any], memory: Session) -> Work:
    """The request as arrays; notes its text and pictures in the session.

    Raises:
      DataError: a field that is missing, unknown, or not what it should be.
    """
    keys = self._keys
    known = {keys.state, *keys.views.values(), *TEXTS, 'mode', 'reset', 'executed', 'delay'}
    for name in request:
      if name not in known:
        raise DataError(f'{name}: not a field of this policy.{nearest(str(name), sorted(known))}')
    reset = request.get('reset', False)
    if not isinstance(reset, bool):
      raise DataError(f'reset: expected true or false, got {type(reset).__name__}.')
    text = self._text(request) or ('' if reset else memory.text)
    if not text:
      raise DataError(f'{TEXTS[0]}: expected a text at least with the first request, got none.')
    mode = request.get('mode', next(iter(self._windows)) if reset else memory.mode)
    if mode not in self._windows:
      raise DataError(f'mode: expected one of {list(self._windows)}, got {mode!r}.')
    state = self._state(request)
    committed = self._committed(request, None if reset else memory.last)
    past = {} if reset else memory.past
    came = {view: self._pictures(request, view) for view in self._config.model.views}
    lengths = {view: len(frames) for view, frames in came.items()}
    if len(set(lengths.values())) > 1:
      raise DataError(f'observation: expected as many pictures of every camera, got {lengths}.')
    seen = {view: self._window(frames, past.get(view)) for view, frames in came.items()}
    memory.text, memory.mode = text, mode
    memory.past = {view: frames[1:] for view, frames in seen.items()}
    memory.turn = 1 if reset else memory.turn + 1
    needed = 1 + self._rate * self._windows[mode].history
    return Work(np.stack([x[len(x) - needed :] for x in seen.values()]), state, committed, memory)

  def infer(self, works: Sequence[Work]) -> list[dict[str, Any]]:
    """{'actions': float32 [K, A] absolute targets, 'state', 'event_text', 'mode'} for each."""
    chunks: dict[int, np.ndarray] = {}
    for mode in self._windows:
      places = [i for i, work in enumerate(works) if work.session.mode == mode]
      if places:
        chunks |= zip(places, self._predict(mode, [works[i] for i in places]))
    for i, work in enumerate(works):
      work.session.last = chunks[i]
    return [
      {'actions': chunks[i], 'state': work.state, 'event_text': work.session.text,
       'mode': work.session.mode}
      for i, work in enumerate(works)
    ]  # fmt: skip

  def _predict(self, mode: Mode, works: Sequence[Work]) -> np.ndarray:
    """Absolute actions [b, K, A], b >= len(works)."""
    size = min(1 << (len(works) - 1).bit_length(), self._max_batch)
    padded = [*works, *[works[-1]] * (size - len(works))]
    obs = Observation(
      frames=np.stack([work.frames for work in padded]),
      state=np.stack([work.state for work in padded]),
      view_mask=np.ones((size, len(self._config.model.views)), bool),
    )
    texts = [self._encode(work.session.text) for work in padded]
    text = jax.tree.map(lambda *x: np.concatenate(x), *texts)
    turns = np.array([work.session.turn for work in padded], np.uint32)
    committed = self._pad([work.committed for work in padded], obs.state, self._steps(mode))
    key = jax.random.key(self._seed)
    return np.asarray(self._act[mode](self._params, obs, text, committed, key, turns))

  def warm_up(self) -> None:
    """Compiles every mode and batch size, so that the first request does not wait for it."""
    model = self._config.model
    upright = np.tile(np.float32([0, 0, 0, 1, 0, 0, 0, 1, 0, 1]), model.action_spec.arms)
    nothing = np.zeros((0, len(upright)), np.float32)
    for mode, window in self._windows.items():
      shape = (len(model.views), 1 + self._rate * window.history, *model.image_size, 3)
      work = Work(np.zeros(shape, np.uint8), upright, nothing, Session(mode, 'warm up'))
      for size in {min(2**i, self._max_batch) for i in range(self._max_batch.bit_length() + 1)}:
        self.infer([work] * size)

  def _steps(self, mode: Mode) -> int:
    """K of a reply."""
    return self._windows[mode].future * self._rate

  def _text(self, request: Mapping[str, Any]) -> str:
    for name in TEXTS:
      if name in request:
        text = request[name]
        if not isinstance(text, str) or not text.strip() or len(text) > LONGEST:
          got = f'{len(text)} characters' if isinstance(text, str) else type(text).__name__
          raise DataError(f'{name}: expected a text of 1..{LONGEST} characters, got {got}.')
        return text
    return ''

  def _state(self, request: Mapping[str, Any]) -> np.ndarray:
    name, dim = self._keys.state, self._config.model.action_spec.dim
    if name not in request:
      raise DataError(f'{name}: missing. Expected numbers [{dim}].')
    state = np.asarray(request[name])
    if state.shape != (dim,) or state.dtype.kind not in 'fiu':
      raise DataError(f'{name}: expected numbers [{dim}], got {state.dtype} {list(state.shape)}.')
    if not np.isfinite(state).all():
      raise DataError(f'{name}: NaN or infinite values at {np.flatnonzero(~np.isfinite(state))}.')
    return state.astype(np.float32)

  def _committed(self, request: Mapping[str, Any], last: np.ndarray | None) -> np.ndarray:
    """float32 [n, A], absolute: what will be executed between the observation and the reply."""
    if 'executed' not in request and 'delay' not in request:
      return np.zeros((0, self._config.model.action_spec.dim), np.float32)
    if last is None:
      raise DataError('executed: there is no last reply in this session to have executed.')
    for name in ('executed', 'delay'):
      if type(request.get(name)) is not int or request[name] < 0:
        raise DataError(f'{name}: expected a number of steps >= 0, got {request.get(name)!r}.')
    begin, count = request['executed'], request['delay']
    if begin + count > len(last):
      raise DataError(
        f'delay: executed {begin} + delay {count} steps, but the last reply had {len(last)}.'
      )
    return last[begin : begin + count]

  def _pad(self, committed: Sequence[np.ndarray], state: np.ndarray, steps: int) -> ActionChunk:
    """Committed actions of each row, relative to its state: [B, K, A] and which they are [B, K]."""
    committed = [x[:steps] for x in committed]
    mask = np.arange(steps) < np.array([len(x) for x in committed])[:, None]
    absolute = np.repeat(state[:, None], mask.shape[1], 1)
    for row, x in zip(absolute, committed):
      row[: len(x)] = x
    return ActionChunk(relative_pose(state[:, None], absolute), mask)

  def _pictures(self, request: Mapping[str, Any], view: str) -> np.ndarray:
    """uint8 [T, H, W, 3] of one camera, of the model's size."""
    name = self._keys.views[view]
    if name not in request:
      raise DataError(f'{name}: missing. Expected a picture uint8 [H, W, 3].')
    x = np.asarray(request[name])
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.shape[-1] != 3 or not x.size:
      raise DataError(
        f'{name}: expected uint8 [H, W, 3], or [T, H, W, 3] since the last request, got '
        f'{x.dtype} {list(x.shape)}.'
      )
    return self._resize(x if x.ndim == 4 else x[None], tuple(self._config.model.image_size))

  def _window(self, came: np.ndarray, past: np.ndarray | None) -> np.ndarray:
    """uint8 [1 + 4M, H, W, 3]: what is remembered, then what came; where that is less, its first
    picture stands for what was before it."""
    seen = came if past is None else np.concatenate([past, came])
    missing = max(1 + self._past - len(seen), 0)
    seen = np.concatenate([np.repeat(seen[:1], missing, 0), seen])
    return seen[len(seen) - 1 - self._past :]


def _act(params, obs, text, committed, key, turns, *, cfg, window):
  """Actions [B, K, A], absolute; every row has noise of its own turn, whatever its neighbours."""

  def one(obs, text, committed, turn):
    obs, text, committed = jax.tree.map(lambda x: x[None], (obs, text, committed))
    inputs = (params, obs, text, jax.random.fold_in(key, turn))
    if window.kind == 'chunk':
      return predict_chunk(*inputs, cfg=cfg, committed=committed).chunk.actions[0]
    bucket = window.future
    return predict_event(*inputs, cfg=cfg, bucket=bucket, committed=committed).chunk.actions[0]

  relative = jax.vmap(one)(obs, text, committed, turns)
  return apply_relative(jnp.asarray(obs.state)[:, None], relative)
