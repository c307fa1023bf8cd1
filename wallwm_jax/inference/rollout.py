"""Closed-loop rollouts as one pure program, jit-able and vmappable over (task, key).

A scan over turns (events or chunks): observe -> source of text -> policy -> execute. Every turn
asks anew, so an event that was not finished is planned again. After success nothing moves any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.inference import sources, waiting
from wallwm_jax.inference.event import predict_event
from wallwm_jax.inference.sources import CaptionTable, Source, State, TextContext
from wallwm_jax.inference.unified import predict_chunk
from wallwm_jax.types import (
    ActionChunk,
    ConfigError,
    EnvFns,
    InferenceParams,
    Observation,
    PRNGKey,
    pytree_dataclass,
)

# act(obs, text, key, length [B]) -> ActionChunk, all with B = 1; `length` counts future latents.
# A policy that is asked while the robot runs on takes the committed actions as a fifth argument.
Act = Callable[..., ActionChunk]


@dataclasses.dataclass(frozen=True)
class LoopSpec:
  """Static shape of a rollout.

  turns: events or chunks at most; bucket: N, longest event in latents; history: M latents of past
  frames kept; steps_per_latent: frames per latent; record: keep the executed frames; delay: control
  steps that pass between an observation and the first action answered to it (the latency of the
  policy); waiting: what the robot does in them, 'hold' its last target or 'run' on along the chunk
  before (see `inference.waiting`).

  Raises:
    ConfigError: unknown waiting, or a delay of more than half a chunk to run on through.
  """

  turns: int
  bucket: int
  history: int = 0
  steps_per_latent: int = 4
  record: bool = False
  delay: int = 0
  waiting: str = waiting.HOLD

  def __post_init__(self):
    if self.waiting not in waiting.WAITING:
      raise ConfigError(f'waiting: expected one of {waiting.WAITING}, got {self.waiting!r}.')
    if self.waiting == waiting.RUN and 2 * self.delay > self.steps:
      raise ConfigError(
          f'delay: expected at most {self.steps // 2} control steps to run on through, half a '
          f'chunk of {self.steps}, got {self.delay}. Ask for longer chunks, or hold.')

  @property
  def steps(self) -> int:
    """K, action steps of the longest chunk."""
    return self.bucket * self.steps_per_latent

  @property
  def turn_steps(self) -> int:
    """Control steps from one observation to the next."""
    return self.steps + (self.delay if self.waiting == waiting.HOLD else -self.delay)


@pytree_dataclass
class Turn:
  """One turn (stacked over turns in a `Rollout`): what was asked, what was done, what came of it.

  caption: int32 id of the next scripted event; asked: of what the source asked for, -1 where that
  is no caption; acted: False once the task had succeeded (nothing was planned in such a turn);
  event_done: the environment moved on to another event or succeeded; progress: 0..100
  afterwards; actions: [K, A] relative to the pose at call time, with mask [K] of the steps carried
  out; poses: [turn_steps, A] reached, or None where only the environment knows; frames: [V,
  turn_steps, H, W, 3] or None where they are not recorded; poses and frames begin with the `delay`
  steps in which the policy computed.
  """

  caption: Int[Array, ""]
  asked: Int[Array, ""]
  acted: Bool[Array, ""]
  event_done: Bool[Array, ""]
  progress: Float[Array, ""]
  actions: ActionChunk
  poses: Float[Array, "K A"] | None
  frames: UInt8[Array, "V K H W 3"] | None


@pytree_dataclass
class Sight:
  """What an environment tells at the start of a turn: the observation without a batch axis, and
  rows of the caption table: of the instruction, of the task's events in order [S] (NOTHING behind
  the last), and of the next scripted event (`TextContext` says who may read which).
  """

  obs: Observation
  instruction: Int[Array, ""]
  script: Int[Array, "S"]
  event: Int[Array, ""]


@pytree_dataclass
class Mind:
  """What a policy carries from turn to turn: memory of its source of text, number of the turn, and
  the action steps of all turns before, which is its clock."""

  memory: State
  step: Int[Array, ""]
  passed: Int[Array, ""]


@pytree_dataclass
class Rollout:
  """One attempt: final success and progress (0..100), turns acted on, every turn [turns, ...], and
  the frames seen first [V, 1, H, W, 3], None where frames are not recorded."""

  success: Bool[Array, ""]
  progress: Float[Array, ""]
  attempted: Int[Array, ""]
  turns: Turn
  first: UInt8[Array, "V 1 H W 3"] | None


def event_policy(params: InferenceParams, cfg: ExperimentConfig, bucket: int) -> Act:
  """Event mode as a policy."""
  return lambda obs, text, key, length, committed=None: predict_event(
      params, obs, text, key, cfg=cfg, bucket=bucket, length=length, committed=committed).chunk


def chunk_policy(params: InferenceParams, cfg: ExperimentConfig) -> Act:
  """Unified mode as a policy; chunks have a fixed length."""
  return lambda obs, text, key, length, committed=None: predict_chunk(
      params, obs, text, key, cfg=cfg, committed=committed).chunk


def rollout_events(params: InferenceParams, env: EnvFns, task, key: PRNGKey,
                   captions: CaptionTable, *, cfg: ExperimentConfig, bucket: int,
                   max_events: int, source: Source = sources.atomic) -> Rollout:
  """Event mode in closed loop: one prediction per event, asked for by `source`.

  Args:
    task: whatever env.reset takes; key: drives the scene and the noise. vmap over both for a batch.
    captions: table indexed by env.caption ids. bucket: N; longer events are cut to it.
    max_events: turns at most (static).
    source: where each turn's text and length come from; `sources.switched` changes it in
      mid-rollout.
  """
  spec = LoopSpec(max_events, bucket, steps_per_latent=cfg.model.steps_per_latent)
  act = event_policy(params, cfg, bucket)
  return closed_loop(act, source, env, task, key, captions, spec=spec)


def rollout_chunks(params: InferenceParams, env: EnvFns, task, key: PRNGKey,
                   captions: CaptionTable, *, cfg: ExperimentConfig, max_chunks: int,
                   source: Source = sources.instruction) -> Rollout:
  """Unified mode in closed loop: fixed-length chunks over a window of past frames.

  Arguments as in `rollout_events`; `sources.held` keeps what a source asked for over as many chunks
  as it lasts.
  """
  model = cfg.model
  spec = LoopSpec(max_chunks, model.future, model.history, model.steps_per_latent)
  return closed_loop(chunk_policy(params, cfg), source, env, task, key, captions, spec=spec)


def closed_loop(act: Act, source: Source, env: EnvFns, task, key: PRNGKey,
                captions: CaptionTable, *, spec: LoopSpec) -> Rollout:
  """The loop for any policy `act` (trained, untrained or a baseline) and any source of text."""
  captions = jax.tree.map(jnp.asarray, captions)
  scene_key, noise_key = jax.random.split(key)
  state = env.reset(scene_key, task)
  instruction, script = env.task_caption(state), env.script(state)
  first = env.observe(state).frames
  past = jnp.repeat(first, spec.steps_per_latent * spec.history, axis=1)
  decide = policy_turn(act, source, captions, bucket=spec.bucket, rate=spec.steps_per_latent)
  running = spec.waiting == waiting.RUN

  def turn(carry, _):
    state, past, mind, tail, done = carry
    caption = env.caption(state)
    current = env.observe(state)
    obs = dataclasses.replace(current, frames=jnp.concatenate([past, current.frames], axis=1))
    sight = Sight(obs, instruction, script, caption)
    known = (waiting.committed(tail, current.state, spec.steps),) if running else ()
    # Nobody is asked about an attempt that is over.
    rest = ActionChunk(
        jnp.zeros((spec.steps, *current.state.shape)), jnp.zeros(spec.steps, bool))
    asked, chunk, mind = jax.lax.cond(
        done, lambda sight, mind: (jnp.int32(0), rest, mind),
        lambda *x: decide(*x, noise_key, *known), sight, mind)
    if running:
      whole = jnp.sum(chunk.mask, dtype=jnp.int32)
      actions, mask, own, tail = waiting.follow(chunk, tail, current.state)
      chunk = ActionChunk(chunk.actions, own)
      mind = dataclasses.replace(mind, passed=mind.passed - whole + jnp.sum(own, dtype=jnp.int32))
    else:
      actions, mask = waiting.held(chunk, spec.delay)
    reached, frames, poses = env.execute(state, actions, mask)
    seen = jnp.concatenate([past, current.frames, frames[:, :-1]], axis=1)
    moved = (reached, seen[:, seen.shape[1] - past.shape[1]:])
    state, past = jax.tree.map(lambda new, old: jnp.where(done, old, new), moved, (state, past))
    success = env.success(state)
    event_done = ~done & (success | (env.caption(state) != caption))
    record = Turn(caption, asked, ~done, event_done, env.progress(state), chunk, poses,
                  frames if spec.record else None)
    return (state, past, mind, tail, done | success), record

  tail = waiting.no_tail(spec.delay, env.observe(state).state.shape[0])
  start = (state, past, new_mind(source, captions), tail, env.success(state))
  (state, *_), turns = jax.lax.scan(turn, start, length=spec.turns)
  attempted = jnp.sum(turns.acted, dtype=jnp.int32)
  seen = first if spec.record else None
  return Rollout(env.success(state), env.progress(state), attempted, turns, seen)


def policy_turn(act: Act, source: Source, captions: CaptionTable, *, bucket: int, rate: int):
  """The policy's side of a turn, whatever carries it out: decide(sight, mind, key, *known) ->
  (caption asked for or -1, ActionChunk [K, A], mind); known: actions committed to already, or
  nothing.

  Args:
    bucket: N, longest event in latents; rate: action steps per latent.
  """

  def decide(sight: Sight, mind: Mind, key: PRNGKey, *known: ActionChunk):
    obs = jax.tree.map(lambda x: x[None], sight.obs)
    context = TextContext(obs, captions, sight.instruction, sight.script, sight.event, mind.step,
                          mind.passed // rate)
    asked, memory = source.speak(context, mind.memory)
    length = jnp.clip(asked.length, 1, bucket)[None]
    chunk = act(obs, asked.text, jax.random.fold_in(key, mind.step), length, *known)
    chunk = jax.tree.map(lambda x: x[0], chunk)
    passed = mind.passed + jnp.sum(chunk.mask, dtype=jnp.int32)
    return asked.caption, chunk, Mind(memory, mind.step + 1, passed)

  return decide


def new_mind(source: Source, captions: CaptionTable) -> Mind:
  """Before the first turn."""
  return Mind(source.start(captions), jnp.int32(0), jnp.int32(0))
