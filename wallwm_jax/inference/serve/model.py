"""A trained model as a served policy, in event mode and unified mode.

A request holds the state, one picture (or the pictures since the last request, oldest first) of
every camera, text, the `mode` and the `source` of text; a session keeps texts, mode and source
until others come, what its source has planned, and the past that unified mode looks back on.
`reset` forgets all. A client may say which `action_dim` and `norm_hash` it counts on, and is
refused where this model has others. `length` is how many steps an event of the client's shall last,
all that event mode has unless it says so. Every other field is an error that names it.

Sources of text: 'instruction' is the client's `prompt` and 'atomic' its `event`; unless a session
has chosen, it is told by the text that came last. 'planner', 'conditioned' and 'staircase' ask a
VLM what to do next for the sake of the `prompt`; their clock is the number of steps that the robot
has `executed`, all of the last reply unless it says so.

Real-time chunking: a client that goes on executing while it waits says how many steps of the last
reply it had `executed` when it looked, and with how much `delay` (steps) it will switch over. Those
steps of the last reply are the beginning of the next one, and what follows is predicted to follow
on them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from wallwm_jax.geometry.poses import apply_relative, relative_pose
from wallwm_jax.inference.serve import fields
from wallwm_jax.inference.serve.engines import Engine, Mode
from wallwm_jax.inference.serve.fields import EVENT, PROMPT, Keys
from wallwm_jax.inference.serve.speakers import Said, Speakers
from wallwm_jax.inference.sources import Held
from wallwm_jax.types import (
  ActionChunk,
  ConfigError,
  DataError,
  Observation,
  Prompt,
  Text,
  WallWMError,
)

GIVEN = {'atomic': EVENT, 'instruction': PROMPT}  # sources that are a text of the client
# Features of texts that are kept: those of UMT5 are 512 x 4096 floats, 8 MiB a text.
_TEXTS = 64
_CLAIMS = ('action_dim', 'norm_hash')  # what a client may rely on, told in the metadata
_OPTIONS = ('mode', 'source', 'length', 'reset', 'executed', 'delay', *_CLAIMS)


@dataclasses.dataclass
class Session:
  """What a connection remembers. texts: by field; told: the field that came last; source: what it
  has chosen, '' = none; past: {view: uint8 [<= 4M, H, W, 3]}; turn: requests so far; clock: steps
  executed; last: actions [K, A] of the last reply, absolute, of which `length` are meant; plans: of
  each source that asks a VLM the prompt that it planned for last, and its memory."""

  mode: Mode
  texts: dict[str, str] = dataclasses.field(default_factory=dict)
  told: str = EVENT
  source: str = ''
  past: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  turn: int = 0
  clock: int = 0
  last: np.ndarray | None = None
  length: int = 0
  plans: dict[str, tuple[str, Held]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
  """One request, checked: frames uint8 [V, T, H, W, 3], state float32 [A], the absolute actions
  float32 [n, A] that its robot will have executed before the reply takes over, and who tells it
  what: the text of a client's own source, for `length` latents, or the tokens that a VLM is asked
  with."""

  frames: np.ndarray
  state: np.ndarray
  committed: np.ndarray
  mode: Mode
  source: str
  text: str
  length: int
  prompt: Prompt | None
  session: Session


class ModelPolicy:
  """Serves a model.

  Args:
    engine: computes actions. encode: texts -> Text features [n, X, E].
    resize: (uint8 [T, H, W, 3], (H', W')) -> uint8 [T, H', W', 3]. modes: what sessions may ask
      for, the first unless they do. keys: names of the fields (Keys.of).
    speakers: of a model whose VLM may tell it; source: the source of sessions that choose none, ''
      = the text that came last. example: a text that `encode` knows, to warm up with.

  Raises:
    ConfigError: keys of other views, or an unknown source.
  """

  heavy = True  # pictures are resized

  def __init__(
    self,
    engine: Engine,
    encode: Callable[[Sequence[str]], Text],
    resize: Callable[[np.ndarray, tuple[int, int]], np.ndarray],
    *,
    modes: Sequence[Mode] = ('event',),
    keys: Keys | None = None,
    speakers: Speakers | None = None,
    source: str = '',
    example: str = 'warm up',
  ):
    config = engine.config
    self._engine, self._config, self._resize = engine, config, resize
    self._keys = keys or Keys.of(config)
    if set(self._keys.views) != set(config.model.views):
      raise ConfigError(
        f'keys: expected a field for each of {config.model.views}, got {dict(self._keys.views)}.'
      )
    self._speakers = speakers
    self._sources = (*GIVEN, *(speakers.names if speakers else ()))
    if source and source not in self._sources:
      raise ConfigError(f'source: expected one of {list(self._sources)}, got {source!r}.')
    self._source, self._example = source, example
    self._windows = {mode: engine.windows[mode] for mode in modes}
    self._rate = config.model.steps_per_latent
    self._past = self._rate * max(window.history for window in self._windows.values())
    self._encode = functools.lru_cache(_TEXTS)(lambda text: encode([text]))
    self._absolute = jax.jit(lambda state, actions: apply_relative(state[:, None], actions))
    self.metadata = self._describe()

  def start(self) -> Session:
    """A session without text and past."""
    return Session(next(iter(self._windows)))

  def check(self, request: Mapping[str, Any], memory: Session) -> Work:
    """The request as arrays; notes its texts, choices and pictures in the session.

    Raises:
      DataError: a field that is missing, unknown, or not what it should be.
    """
    keys, dim = self._keys, self._config.model.action_spec.dim
    known = {keys.state, *keys.views.values(), *fields.TEXTS, *_OPTIONS}
    fields.check_names(request, known)
    for name in _CLAIMS:
      fields.claim(request, name, self.metadata[name])
    session = self.start() if fields.flag(request, 'reset') else dataclasses.replace(memory)
    mode = fields.choice(request, 'mode', tuple(self._windows), session.mode)
    given = {name: text for name in fields.TEXTS if (text := fields.text(request, name))}
    session.texts = session.texts | given
    session.told = next(iter(given), session.told)
    source, text, prompt = self._told(request, session)
    length = self._asked(request, mode, source)
    state = fields.numbers(request, keys.state, dim)
    committed = self._committed(request, session)
    came = {view: self._pictures(request, view) for view in self._config.model.views}
    lengths = {view: len(frames) for view, frames in came.items()}
    if len(set(lengths.values())) > 1:
      raise DataError(f'observation: expected as many pictures of every camera, got {lengths}.')
    seen = {view: self._window(frames, session.past.get(view)) for view, frames in came.items()}
    session.mode, session.turn = mode, session.turn + 1
    session.clock += request.get('executed', session.length)
    session.past = {view: frames[1:] for view, frames in seen.items()}
    # All is well, so the session is what it has become; before, it was not touched.
    vars(memory).update(vars(session))
    needed = 1 + self._rate * self._windows[mode].history
    frames = np.stack([x[len(x) - needed :] for x in seen.values()])
    return Work(frames, state, committed, mode, source, text, length, prompt, memory)

  def infer(self, works: Sequence[Work]) -> list[dict[str, Any]]:
    """For each {'actions': float32 [K, A] absolute targets, 'chunk_len': how many of them are of
    the event (the others repeat the last one), 'state', 'mode', 'source', 'event_text': what it
    goes by, '' = no words}, of a VLM's plan also 'remaining_steps' until it has run out."""
    heard = [self._hear(work) for work in works]
    replies: list[dict[str, Any]] = [{} for _ in works]
    for mode in self._windows:
      places = [i for i, work in enumerate(works) if work.mode == mode]
      if places:
        chunks = self._predict(mode, [works[i] for i in places], [heard[i][0] for i in places])
        for i, chunk in zip(places, chunks, strict=True):
          replies[i] = self._reply(works[i], heard[i][0], chunk)
    # Only now, so that a call that fails can be repeated.
    for work, (_, plan), reply in zip(works, heard, replies):
      work.session.last, work.session.length = reply['actions'], reply['chunk_len']
      if plan is not None:
        made = {work.source: (work.session.texts[PROMPT], plan)}
        work.session.plans = work.session.plans | made
    return replies

  def warm_up(self) -> None:
    """Compiles every mode, batch size and source, so that the first request does not wait."""
    model = self._config.model
    upright = np.tile(np.float32([0, 0, 0, 1, 0, 0, 0, 1, 0, 1]), model.action_spec.arms)
    nothing = np.zeros((0, len(upright)), np.float32)
    for mode, window in self._windows.items():
      shape = (len(model.views), 1 + self._rate * window.history, *model.image_size, 3)
      inputs = (np.zeros(shape, np.uint8), upright, nothing, mode)
      for size, length in itertools.product(self._engine.sizes, self._engine.lengths[mode]):
        self.infer([Work(*inputs, 'atomic', self._example, length, None, self.start())] * size)
      for source in self._speakers.names if self._speakers else ():
        session = dataclasses.replace(self.start(), texts={PROMPT: self._example})
        prompt = self._speakers.prompt(self._example)
        self.infer([Work(*inputs, source, '', window.future, prompt, session)])

  def _describe(self) -> dict[str, Any]:
    model = self._config.model
    return {
      'protocol': 'openpi',
      'policy': self._config.name,
      'modes': list(self._windows),
      'sources': list(self._sources),
      'action_dim': model.action_spec.dim,
      'state_dim': model.action_spec.dim,
      'action_groups': {name: list(at) for name, at in model.action_spec.groups().items()},
      'steps': {mode: self._steps(mode) for mode in self._windows},
      'actions': 'absolute poses: position m, rot6d, gripper 0..1 per arm, robot base frame',
      'views': list(model.views),
      'image_size': list(model.image_size),
      'past_frames': self._past,
      'real_time_chunking': True,
      'fields': {
        'state': self._keys.state,
        'views': dict(self._keys.views),
        'text': list(fields.TEXTS),
        'options': list(_OPTIONS),
      },
      'norm_hash': self._engine.norm_hash,
    }

  def _steps(self, mode: Mode) -> int:
    """K of a reply."""
    return self._windows[mode].future * self._rate

  def _told(self, request: Mapping[str, Any], session: Session) -> tuple[str, str, Prompt | None]:
    """(source, its text where that is the client's, else the prompt for the VLM)."""
    if 'source' in request:
      session.source = fields.choice(request, 'source', self._sources, '')
    given = {name: source for source, name in GIVEN.items()}
    source = session.source or self._source or given[session.told]
    name = GIVEN.get(source, PROMPT)
    text = session.texts.get(name, '')
    if not text:
      raise DataError(
        f'{name}: expected a text at least with the first request of source {source!r}, got none.'
      )
    if source in GIVEN:
      return source, text, None
    try:
      return source, '', self._speakers.prompt(text)
    except WallWMError as error:
      raise DataError(f'{name}: expected a text that the VLM can be asked with. {error}') from None

  def _asked(self, request: Mapping[str, Any], mode: Mode, source: str) -> int:
    """Future latents that what a client tells shall last."""
    whole = self._windows[mode].future
    if 'length' not in request:
      return whole
    if mode != 'event' or source not in GIVEN:
      raise DataError(
        f'length: expected none in mode {mode!r} with source {source!r}: only events that a client '
        'tells last as long as it says.'
      )
    steps = fields.steps(request, 'length')
    if not 1 <= steps <= self._steps(mode):
      raise DataError(f'length: expected 1 to {self._steps(mode)} steps, got {steps}.')
    return -(-steps // self._rate)

  def _hear(self, work: Work) -> tuple[Said, Held | None]:
    """What the source of a request says, and what it remembers then."""
    if work.prompt is None:
      return Said(self._encode(work.text), work.length, work.text, work.length), None
    session = work.session
    task, memory = session.plans.get(work.source) or ('', self._speakers.start(work.source))
    hold = work.mode == 'chunk' and task == session.texts[PROMPT]
    seen = Observation(work.frames[None], work.state[None], np.ones((1, len(work.frames)), bool))
    clock = session.clock // self._rate
    return self._speakers.speak(work.source, seen, work.prompt, memory, clock=clock, hold=hold)

  def _predict(self, mode: Mode, works: Sequence[Work], heard: Sequence[Said]) -> np.ndarray:
    """Absolute actions [b, K, A]."""
    obs = Observation(
      frames=np.stack([work.frames for work in works]),
      state=np.stack([work.state for work in works]),
      view_mask=np.ones((len(works), len(self._config.model.views)), bool),
    )
    text = jax.tree.map(lambda *x: np.concatenate(x), *(said.text for said in heard))
    turns = np.array([work.session.turn for work in works], np.uint32)
    lengths = [min(said.length, self._windows[mode].future) for said in heard]
    committed = self._pad([work.committed for work in works], obs.state, self._steps(mode))
    length = np.array(lengths, np.int32)
    actions = self._engine.act(mode, obs, text, length, committed, turns)
    return np.asarray(self._absolute(obs.state, actions))

  def _reply(self, work: Work, said: Said, chunk: np.ndarray) -> dict[str, Any]:
    length = len(chunk)
    if work.mode == 'event':
      length = min(length, self._rate * said.length)
    actions = chunk[np.minimum(np.arange(len(chunk)), length - 1)]
    reply = {
      'actions': actions,
      'chunk_len': length,
      'state': work.state,
      'mode': work.mode,
      'source': work.source,
      'event_text': said.caption,
    }
    if work.prompt is not None:
      reply['remaining_steps'] = self._rate * said.left
    return reply

  def _committed(self, request: Mapping[str, Any], session: Session) -> np.ndarray:
    """float32 [n, A], absolute: what will be executed between the observation and the reply."""
    nothing = np.zeros((0, self._config.model.action_spec.dim), np.float32)
    if 'executed' not in request and 'delay' not in request:
      return nothing
    if session.last is None:
      raise DataError('executed: there is no last reply in this session to have executed.')
    begin = fields.steps(request, 'executed')
    count = fields.steps(request, 'delay') if 'delay' in request else 0
    if begin + count > len(session.last):
      raise DataError(
        f'delay: executed {begin} + delay {count} steps, but the last reply had '
        f'{len(session.last)}.'
      )
    return session.last[begin : begin + count]

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
    x = fields.pictures(request, self._keys.views[view])
    return self._resize(x, tuple(self._config.model.image_size))

  def _window(self, came: np.ndarray, past: np.ndarray | None) -> np.ndarray:
    """uint8 [1 + 4M, H, W, 3]: what is remembered, then what came; where that is less, its first
    picture stands for what was before it."""
    seen = came if past is None else np.concatenate([past, came])
    missing = max(1 + self._past - len(seen), 0)
    seen = np.concatenate([np.repeat(seen[:1], missing, 0), seen])
    return seen[len(seen) - 1 - self._past :]
