"""Closed-loop rollouts as one pure program, jit-able and vmappable over (task, key).

A scan over turns (events or chunks): observe -> text -> policy -> execute. A turn whose event is
not finished is planned again, because the environment then names the same caption. After success
nothing moves any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.inference import unified
from wallwm_jax.inference.event import predict_event
from wallwm_jax.inference.unified import TextContext, TextSource, predict_chunk
from wallwm_jax.types import (
    ActionChunk,
    EnvFns,
    InferenceParams,
    Observation,
    PRNGKey,
    Text,
    pytree_dataclass,
)

# act(obs, text, key, length [B]) -> ActionChunk, all with B = 1; `length` counts future latents.
Act = Callable[[Observation, Text, PRNGKey, Array], ActionChunk]


@pytree_dataclass
class CaptionTable:
  """Every caption an environment can name, encoded once, and how long its event usually lasts.

  text: features [I, X, E], mask [I, X] for I captions; lengths: [I] int32 future latents.
  """

  text: Text
  lengths: Int[Array, "I"]


@dataclasses.dataclass(frozen=True)
class LoopSpec:
  """Static shape of a rollout.

  turns: events or chunks at most; bucket: N, longest event in latents; history: M latents of past
  frames kept; steps_per_latent: frames per latent; record: keep the executed frames.
  """

  turns: int
  bucket: int
  history: int = 0
  steps_per_latent: int = 4
  record: bool = False


@pytree_dataclass
class Turn:
  """One turn (stacked over turns in a `Rollout`): what was asked, what was done, what came of it.

  caption: int32 id of the next scripted event; acted: False once the task had succeeded (what such
  a turn planned was not carried out); event_done: the environment moved on to another event or
  succeeded; progress: 0..100 afterwards; actions: [K, A] relative to the pose at call time, with
  mask [K]; poses: [K, A] reached; frames: [V, K, H, W, 3] or None where they are not recorded.
  """

  caption: Int[Array, ""]
  acted: Bool[Array, ""]
  event_done: Bool[Array, ""]
  progress: Float[Array, ""]
  actions: ActionChunk
  poses: Float[Array, "K A"]
  frames: UInt8[Array, "V K H W 3"] | None


@pytree_dataclass
class Rollout:
  """One attempt: final success and progress (0..100), turns acted on, every turn [turns, ...]."""

  success: Bool[Array, ""]
  progress: Float[Array, ""]
  attempted: Int[Array, ""]
  turns: Turn


def event_policy(params: InferenceParams, cfg: ExperimentConfig, bucket: int) -> Act:
  """Event mode as a policy."""
  return lambda obs, text, key, length: predict_event(
      params, obs, text, key, cfg=cfg, bucket=bucket, length=length).chunk


def chunk_policy(params: InferenceParams, cfg: ExperimentConfig) -> Act:
  """Unified mode as a policy; chunks have a fixed length."""
  return lambda obs, text, key, length: predict_chunk(params, obs, text, key, cfg=cfg).chunk


def rollout_events(params: InferenceParams, env: EnvFns, task, key: PRNGKey,
                   captions: CaptionTable, *, cfg: ExperimentConfig, bucket: int,
                   max_events: int) -> Rollout:
  """Event mode in closed loop: one prediction per event, captions from the environment's script.

  Args:
    task: whatever env.reset takes; key: drives the scene and the noise. vmap over both for a batch.
    captions: table indexed by env.caption ids. bucket: N; longer typical lengths are cut to it.
    max_events: turns at most (static).
  """
  spec = LoopSpec(max_events, bucket, steps_per_latent=cfg.model.steps_per_latent)
  act = event_policy(params, cfg, bucket)
  return closed_loop(act, unified.atomic_source, env, task, key, captions, spec=spec)


def rollout_chunks(params: InferenceParams, env: EnvFns, task, key: PRNGKey,
                   captions: CaptionTable, *, cfg: ExperimentConfig, max_chunks: int,
                   source: TextSource = unified.instruction_source) -> Rollout:
  """Unified mode in closed loop: fixed-length chunks over a window of past frames.

  Arguments as in `rollout_events`; `source` says where each chunk's text comes from, and
  `unified.switched_source` changes it in mid-rollout.
  """
  model = cfg.model
  spec = LoopSpec(max_chunks, model.future, model.history, model.steps_per_latent)
  return closed_loop(chunk_policy(params, cfg), source, env, task, key, captions, spec=spec)


def closed_loop(act: Act, source: TextSource, env: EnvFns, task, key: PRNGKey,
                captions: CaptionTable, *, spec: LoopSpec) -> Rollout:
  """The loop for any policy `act` (trained, untrained or a baseline) and any text source."""
  captions = jax.tree.map(jnp.asarray, captions)
  scene_key, noise_key = jax.random.split(key)
  state = env.reset(scene_key, task)
  instruction = _gather(captions.text, env.task_caption(state))
  first = env.observe(state).frames
  past = jnp.repeat(first, spec.steps_per_latent * spec.history, axis=1)

  def turn(carry, step):
    state, past, done = carry
    caption = env.caption(state)
    current = env.observe(state)
    obs = dataclasses.replace(current, frames=jnp.concatenate([past, current.frames], axis=1))
    obs = jax.tree.map(lambda x: x[None], obs)
    text = source(TextContext(obs, instruction, _gather(captions.text, caption), step))
    length = jnp.clip(captions.lengths[caption], 1, spec.bucket)[None]
    chunk = act(obs, text, jax.random.fold_in(noise_key, step), length)
    chunk = jax.tree.map(lambda x: x[0], chunk)

    reached, frames, poses = env.execute(state, chunk.actions, chunk.mask)
    seen = jnp.concatenate([past, current.frames, frames[:, :-1]], axis=1)
    moved = (reached, seen[:, seen.shape[1] - past.shape[1]:])
    state, past = jax.tree.map(lambda new, old: jnp.where(done, old, new), moved, (state, past))
    success = env.success(state)
    event_done = ~done & (success | (env.caption(state) != caption))
    record = Turn(caption, ~done, event_done, env.progress(state), chunk, poses,
                  frames if spec.record else None)
    return (state, past, done | success), record

  start = (state, past, env.success(state))
  (state, _, _), turns = jax.lax.scan(turn, start, jnp.arange(spec.turns))
  attempted = jnp.sum(turns.acted, dtype=jnp.int32)
  return Rollout(env.success(state), env.progress(state), attempted, turns)


def _gather(table: Text, index) -> Text:
  """Row `index` of a caption table as a batch of one."""
  return jax.tree.map(lambda x: x[index][None], table)
