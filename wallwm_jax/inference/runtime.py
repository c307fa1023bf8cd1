"""From observation to action in one call, and its two halves apart.

  refresh: observation -> anchor (encoded, few-step video, action keys/values)
  act:     anchor, newest state, what was carried out since -> actions from here on
  replan:  both, with the memory of the turn before donated and replaced

All are pure and take B robots, each with a text, length, view mask, key and past of its own: an
answer does not depend on who else is in the batch. `inference.programs` compiles them,
`inference.anchored` runs the halves side by side.
Source: WALL-WM (arXiv 2606.01955); committed actions after real-time chunking (arXiv 2506.07339).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.geometry.poses import apply_relative, relative_pose
from wallwm_jax.inference import denoiser
from wallwm_jax.inference.denoiser import Conditioning, Noise, Window
from wallwm_jax.models.functional import ServingCache
from wallwm_jax.types import (
  ActionChunk,
  ConfigError,
  InferenceParams,
  Observation,
  PRNGKey,
  Text,
  pytree_dataclass,
)


@pytree_dataclass
class Anchor:
  """All that actions need of one observation.

  cond: conditioning, nothing committed; cache: action keys and values of the anchored video
  forward; pose: [B, A] physical, the frame of the window's actions; key: [B] of the noise, one for
  all actions from this anchor, so that plans made from it one after the other agree.
  """

  cond: Conditioning
  cache: ServingCache
  pose: Float[Array, 'B A']
  key: PRNGKey


@pytree_dataclass
class Now:
  """A robot some steps after the observation of its anchor.

  state: [B, A] physical, measured now. committed: absolute poses [B, K, A] by step since the
  anchor, and which of them [B, K] have been carried out or will be, whatever is answered.
  """

  state: Float[Array, 'B A']
  committed: ActionChunk


@pytree_dataclass
class Plan:
  """What to do, by step since the observation of the anchor.

  chunk: [B, K, A] physical and relative to the state that was given, with mask [B, K] of the steps
  inside the length that are still to come. targets: [B, K, A], the same as absolute poses.
  """

  chunk: ActionChunk
  targets: Float[Array, 'B K A']


@pytree_dataclass
class Memory:
  """What a batch of robots carries from turn to turn, on the device: the last anchor, the last
  targets (absolute [B, K, A] and which of them are meant [B, K]) and the key [B] of what comes."""

  anchor: Anchor
  last: ActionChunk
  key: PRNGKey


@pytree_dataclass
class Turn:
  """How a turn begins. length: [B] int32 future latents of each event, 1..N. executed: [B] int32
  steps of the last targets that were carried out when the observation was made; delay: [B] int32
  steps of them that will be, before the answer takes over; 0 and 0 for a robot that begins or that
  stands and waits.
  """

  length: Int[Array, 'B']
  executed: Int[Array, 'B']
  delay: Int[Array, 'B']


def refresh(
  params: InferenceParams,
  obs: Observation,
  text: Text,
  length: Int[Array, 'B'],
  key: PRNGKey,
  *,
  cfg: ExperimentConfig,
  window: Window,
) -> Anchor:
  """The anchor of an observation: everything that does not depend on what the robot does next.

  Args:
    obs: frames [B, V, 1 + 4M, H, W, 3] uint8, state [B, A] physical, view_mask [B, V]. text:
      features [B, X, E]. length: [B] future latents, 1..N. key: [B] typed keys, one per robot.

  Raises:
    ConfigError: the symmetric map, which runs the video at every action step and has no anchor.
    DataError, StatsMismatchError: see `denoiser.encode_observation`.
  """
  if cfg.diffusion.mapping == 'symmetric':
    raise ConfigError(
      "refresh: expected config.diffusion.mapping 'anchor', got 'symmetric', whose actions cannot "
      'be computed from a kept video forward. Ask for whole answers instead.'
    )
  cond = denoiser.encode_observation(params, obs, text, length, cfg=cfg, window=window)
  z = denoiser.denoise_to_anchor(params, cond, _noise(key, cfg, window).video, cfg=cfg)
  cache, _ = denoiser.anchor_cache(params, cond, z, cfg=cfg, window=window)
  return Anchor(cond, cache, obs.state, key)


def act(
  params: InferenceParams, anchor: Anchor, now: Now, *, cfg: ExperimentConfig, window: Window
) -> Plan:
  """Actions from an anchor that may be some steps old.

  The window stays where it was observed, as training knows it: its state token is the anchor's, its
  actions are relative to the anchor's pose. Steps that were carried out since, or are committed,
  are put in place at every noise level, the others follow on them. What comes of it is expressed
  relative to the newest state; a robot that still stands at the anchor's pose gets it unchanged.
  """
  poses = now.committed.actions
  committed = ActionChunk(relative_pose(anchor.pose[:, None], poses), now.committed.mask)
  return _act(params, anchor, committed, now.state, cfg, window)


def answer(
  params: InferenceParams,
  obs: Observation,
  text: Text,
  length: Int[Array, 'B'],
  committed: ActionChunk,
  key: PRNGKey,
  *,
  cfg: ExperimentConfig,
  window: Window,
) -> Plan:
  """`refresh` and `act` on the same observation, which keeps nothing: a server's whole request.

  Args:
    committed: [B, K, A] relative to the state of `obs`, and which of them [B, K]. Others as in
      `refresh`; the symmetric map is answered too.
  """
  if cfg.diffusion.mapping == 'symmetric':
    cond = denoiser.encode_observation(params, obs, text, length, committed, cfg=cfg, window=window)
    chunk = denoiser.predict(
      params, cond, _noise(key, cfg, window), cfg=cfg, window=window
    ).chunk
    targets = apply_relative(obs.state[:, None], chunk.actions)
    return Plan(ActionChunk(chunk.actions, chunk.mask & ~committed.mask), targets)
  anchor = refresh(params, obs, text, length, key, cfg=cfg, window=window)
  # The halves are compiled as they are when they run apart: equal to the last bit.
  anchor = jax.lax.optimization_barrier(anchor)
  return _act(params, anchor, committed, obs.state, cfg, window)


def replan(
  params: InferenceParams,
  memory: Memory,
  obs: Observation,
  text: Text,
  turn: Turn,
  *,
  cfg: ExperimentConfig,
  window: Window,
) -> tuple[Plan, Memory]:
  """A turn of B robots: a new anchor, actions that follow on what they are about to do, and what
  the next turn needs. Compile it with `memory` donated and unused arguments kept (of the old anchor
  nothing is read): its buffers are written again.

  Raises:
    ConfigError, DataError, StatsMismatchError: as `refresh`.
  """
  keys = jax.vmap(jax.random.split)(memory.key)
  anchor = refresh(params, obs, text, turn.length, keys[:, 0], cfg=cfg, window=window)
  anchor = jax.lax.optimization_barrier(anchor)
  plan = act(params, anchor, Now(obs.state, begun(memory.last, turn)), cfg=cfg, window=window)
  steps = denoiser.action_mask(cfg, anchor.cond.future_mask)
  return plan, Memory(anchor, ActionChunk(plan.targets, steps), keys[:, 1])


def begun(last: ActionChunk, turn: Turn) -> ActionChunk:
  """Of the last targets [B, K, A] those that are committed when a turn begins, from its first step
  on: absolute [B, K, A] and mask [B, K]."""
  steps = last.mask.shape[1]
  place = jnp.arange(steps)
  index = turn.executed[:, None] + place
  inside = jnp.minimum(index, steps - 1)
  poses = jnp.take_along_axis(last.actions, inside[..., None], axis=1)
  meant = jnp.take_along_axis(last.mask, inside, axis=1)
  return ActionChunk(poses, (place < turn.delay[:, None]) & (index < steps) & meant)


def new_memory(
  params: InferenceParams, key: PRNGKey, *, cfg: ExperimentConfig, window: Window
) -> Memory:
  """The memory of robots that have not acted yet; key: [B]. No network is run: zeros in the shapes
  of an anchor."""
  batch = key.shape[0]
  obs, text = denoiser.input_specs(cfg, window, batch)
  length = jax.ShapeDtypeStruct((batch,), jnp.int32)
  function = functools.partial(refresh, cfg=cfg, window=window)
  shapes = jax.eval_shape(function, params, obs, text, length, key)
  anchor = dataclasses.replace(shapes, key=None)
  anchor = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), anchor)
  # Every leaf is a buffer of its own, for all of them are donated.
  anchor = dataclasses.replace(anchor, key=jnp.copy(key))
  return Memory(anchor, no_targets(cfg, window, batch), jnp.copy(key))


def no_targets(cfg: ExperimentConfig, window: Window, batch: int) -> ActionChunk:
  """[B, K, A] and [B, K], none of them meant."""
  steps = window.future * cfg.model.steps_per_latent
  poses = jnp.zeros((batch, steps, cfg.model.action_spec.dim))
  return ActionChunk(poses, jnp.zeros((batch, steps), bool))


def _act(params, anchor: Anchor, committed: ActionChunk, state, cfg, window: Window) -> Plan:
  """`act` with committed actions relative to the anchor's pose."""
  norm = params.norm
  known = (committed.actions - norm.action_mean) / norm.action_scale
  cond = dataclasses.replace(anchor.cond, committed=ActionChunk(known, committed.mask))
  noise = _noise(anchor.key, cfg, window).action
  actions = denoiser.denoise_actions(params, cond, anchor.cache, noise, cfg=cfg)
  actions = actions * norm.action_scale + norm.action_mean
  targets = apply_relative(anchor.pose[:, None], actions)
  stands = jnp.all(state == anchor.pose, axis=-1)[:, None, None]
  chunk = jnp.where(stands, actions, relative_pose(state[:, None], targets))
  mask: Bool[Array, 'B K'] = denoiser.action_mask(cfg, cond.future_mask) & ~committed.mask
  return Plan(ActionChunk(chunk, mask), targets)


def _noise(key: PRNGKey, cfg: ExperimentConfig, window: Window) -> Noise:
  """Noise of every robot from its own key [B]."""

  def one(key: PRNGKey) -> Noise:
    return jax.tree.map(lambda x: x[0], denoiser.sample_noise(key, cfg, 1, window))

  return jax.vmap(one)(key)
