"""What computes a served model's actions: the model itself, or an exported policy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import jax
import numpy as np

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.inference import runtime
from wallwm_jax.inference.denoiser import Window
from wallwm_jax.inference.exported import ExportedPolicy, stats_hash
from wallwm_jax.inference.programs import Program, Programs
from wallwm_jax.types import (
  ActionChunk,
  ConfigError,
  InferenceParams,
  Observation,
  Text,
)

Mode = Literal['event', 'chunk']
_FUNCTIONS = {'event': 'event', 'chunk': 'unified'}  # mode -> function of an exported policy


class Engine(Protocol):
  """config: of the model; windows: of each mode that it has; lengths: the longest predictions, in
  future latents, of each mode's programs; sizes: numbers of rows that a program is compiled for;
  norm_hash: of its statistics.
  """

  config: ExperimentConfig
  windows: Mapping[Mode, Window]
  lengths: Mapping[Mode, Sequence[int]]
  sizes: Sequence[int]
  norm_hash: str

  def act(
    self,
    mode: Mode,
    obs: Observation,
    text: Text,
    length: np.ndarray,
    committed: ActionChunk,
    turns: np.ndarray,
  ) -> np.ndarray:
    """Actions float32 [B, K, A] relative to the state.

    Every row has noise of its own turn, whatever its neighbours.

    Args:
      length: int32 [B] future latents of each event, 1..N; chunks are always whole. committed:
        relative actions [B, K, A] and which of them are [B, K]. turns: uint32 [B].
    """


class ModelEngine:
  """A model with its weights.

  Args:
    config, params: of `checkpoints.load_inference`. bucket: future latents N of event mode (the
      longest one). max_batch: most rows of a call; calls are padded to a power of two so that few
      programs are compiled. seed: of the noise. programs: where they are kept; None = nowhere.

  Raises:
    ConfigError: a bucket that the model does not have.
  """

  def __init__(
    self,
    config: ExperimentConfig,
    params: InferenceParams,
    *,
    bucket: int | None = None,
    max_batch: int = 8,
    seed: int = 0,
    programs: Programs | None = None,
  ):
    self.config, self._key = config, jax.random.key(seed)
    # A language side speaks, it does not act: programs are told of the towers alone.
    towers = {name: params.model[name] for name in ('video', 'action')}
    frozen = dataclasses.replace(params.frozen, language=None)
    self._params = jax.device_put(InferenceParams(towers, frozen))
    self._programs = programs or Programs()
    self._loaded: dict[tuple[Mode, int], Program] = {}
    bucket = config.data.buckets[-1] if bucket is None else bucket
    self.windows = {'event': Window.event(config, bucket), 'chunk': Window.chunk(config)}
    self.lengths = {mode: [window.future] for mode, window in self.windows.items()}
    self.sizes = _sizes(max_batch)
    self.norm_hash = stats_hash(params.norm)

  @property
  def programs(self) -> list[Program]:
    """Those of every mode and number of rows that was asked for so far."""
    return list(self._loaded.values())

  def act(self, mode, obs, text, length, committed, turns) -> np.ndarray:
    count = len(turns)
    size = _size(count, self.sizes)
    rows = np.minimum(np.arange(size), count - 1)
    if mode == 'chunk':
      length = np.full(count, self.windows[mode].future, np.int32)
    inputs = jax.tree.map(lambda x: np.asarray(x)[rows], (obs, text, length, committed, turns))
    args = (self._params, *inputs, self._key)
    program = self._loaded.get((mode, size)) or self._load(mode, size, args)
    return np.asarray(program(*args))[:count]

  def _load(self, mode: Mode, size: int, args) -> Program:
    function = functools.partial(_act, cfg=self.config, window=self.windows[mode])
    # The bucket is in the shapes of the committed actions.
    program = self._programs.load(f'serve-{mode}', function, args, config=self.config)
    self._loaded[mode, size] = program
    return program


class ExportedEngine:
  """A policy that `wallwm export` wrote.

  Args:
    policy: of `export.load`; config: the one in its manifest. bucket: future latents N of event
      mode, up to the longest one that was exported. max_batch: most rows of a call where their
      number is free; else calls have as many as the policy was exported for. seed: of the noise,
      the same as a model's of this seed.

  Raises:
    ConfigError: events longer than any that was exported.
  """

  def __init__(
    self,
    policy: ExportedPolicy,
    config: ExperimentConfig,
    *,
    bucket: int | None = None,
    max_batch: int = 8,
    seed: int = 0,
  ):
    self.config, self._policy, self._key = config, policy, jax.random.key(seed)
    longest = policy.buckets[-1]
    if bucket is not None and not 1 <= bucket <= longest:
      raise ConfigError(
        f'bucket: expected 1 to {longest}, the longest of those exported, {policy.buckets}, got '
        f'{bucket}. Export again with another --buckets, or serve the run with --workdir.'
      )
    self.windows = {
      'event': Window.event(config, bucket or longest),
      'chunk': Window.chunk(config),
    }
    whole = self.windows['event'].future
    events = sorted({min(exported, whole) for exported in policy.buckets})
    self.lengths = {'event': events, 'chunk': [config.model.future]}
    self.sizes = _sizes(max_batch)
    self.norm_hash = policy.manifest['stats_hash']

  def act(self, mode, obs, text, length, committed, turns) -> np.ndarray:
    keys = jax.random.key_data(jax.vmap(lambda turn: jax.random.fold_in(self._key, turn))(turns))
    inputs = {
      'frames': obs.frames,
      'state': obs.state,
      'view_mask': obs.view_mask,
      'text_features': text.features,
      'text_mask': text.mask,
      'key': keys,
      'committed': np.asarray(committed.actions, np.float32),
      'committed_mask': committed.mask,
    }
    if mode == 'event':
      inputs['length'] = length
    inputs = {name: np.asarray(x) for name, x in inputs.items()}
    steps = self.windows[mode].future * self.config.model.steps_per_latent
    actions = np.zeros((len(turns), steps, self.config.model.action_spec.dim), np.float32)
    buckets: dict[int | None, list[int]] = {}
    for row in range(len(turns)):
      last = inputs['committed_mask'][row].sum()  # committed steps are the first ones
      bucket = self._policy.bucket(length[row], last) if mode == 'event' else None
      buckets.setdefault(bucket, []).append(row)
    for bucket, rows in buckets.items():
      found = self._predict(_FUNCTIONS[mode], bucket, inputs, rows)
      # A bucket may be shorter or longer than the window; what the event is meant for fits both.
      actions[rows] = found[:, np.minimum(np.arange(steps), found.shape[1] - 1)]
    return actions

  def _predict(self, name: str, bucket: int | None, inputs, rows: list[int]) -> np.ndarray:
    """Actions [n, K, A] of n rows that one program answers."""
    size = self._policy.batch(name, bucket) or _size(len(rows), self.sizes)
    found = []
    for first in range(0, len(rows), size):
      some = rows[first : first + size]
      padded = [*some, *some[-1:] * (size - len(some))]
      outputs = getattr(self._policy, name)({key: x[padded] for key, x in inputs.items()})
      found.append(np.asarray(outputs['actions'])[: len(some)])
    return np.concatenate(found)


def _sizes(max_batch: int) -> list[int]:
  """Powers of two up to the most rows of a call, so that few programs are compiled."""
  return sorted({min(2**i, max_batch) for i in range(max_batch.bit_length() + 1)})


def _size(count: int, sizes: Sequence[int]) -> int:
  return next((size for size in sizes if size >= count), count)


def _act(params, obs, text, length, committed, turns, key, *, cfg, window):
  """Actions [B, K, A], each row with the noise of its own turn."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, turns)
  plan = runtime.answer(params, obs, text, length, committed, keys, cfg=cfg, window=window)
  return plan.chunk.actions
