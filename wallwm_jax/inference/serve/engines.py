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
  """config: of the model; windows: of each mode that it has; commits: whether actions can be
  committed; sizes: numbers of rows that a program is compiled for; norm_hash: of its statistics.
  """

  config: ExperimentConfig
  windows: Mapping[Mode, Window]
  commits: bool
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

  commits = True

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
    self.sizes = sorted({min(2**i, max_batch) for i in range(max_batch.bit_length() + 1)})
    self.norm_hash = stats_hash(params.norm)

  @property
  def programs(self) -> list[Program]:
    """Those of every mode and number of rows that was asked for so far."""
    return list(self._loaded.values())

  def act(self, mode, obs, text, length, committed, turns) -> np.ndarray:
    count = len(turns)
    size = next((size for size in self.sizes if size >= count), count)
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
  """A policy that `wallwm export` wrote; its rows are computed one by one.

  Args:
    policy: of `load_exported`; config: the one in its signature. bucket: only to be compared with
      that of the export. seed: of the noise, the same as a model's of this seed.

  Raises:
    ConfigError: another bucket than it was exported with, or a batch size that is not 1.
  """

  commits = False
  sizes = (1,)

  def __init__(
    self,
    policy: ExportedPolicy,
    config: ExperimentConfig,
    *,
    bucket: int | None = None,
    seed: int = 0,
  ):
    self.config, self._policy, self._key = config, policy, jax.random.key(seed)
    fixed = policy.signature
    if bucket not in (None, fixed['bucket']):
      raise ConfigError(
        f'bucket: expected {fixed["bucket"]}, fixed when the policy was exported, got {bucket}. '
        'Export again with another --bucket, or serve the run with --workdir.'
      )
    if fixed['batch_size'] != 1:
      raise ConfigError(
        f'batch size of the exported policy: expected 1, got {fixed["batch_size"]}: its rows share '
        'their noise, so that an answer would depend on who else asks. Export it with --batch 1.'
      )
    self.windows = {
      'event': Window.event(config, fixed['bucket']),
      'chunk': Window.chunk(config),
    }
    self.norm_hash = fixed['stats_hash']

  def act(self, mode, obs, text, length, committed, turns) -> np.ndarray:
    rows = []
    for i, turn in enumerate(turns):
      inputs = {
        'frames': obs.frames[i : i + 1],
        'state': obs.state[i : i + 1],
        'view_mask': obs.view_mask[i : i + 1],
        'text_features': np.asarray(text.features)[i : i + 1],
        'text_mask': np.asarray(text.mask)[i : i + 1],
        'key': np.asarray(jax.random.key_data(jax.random.fold_in(self._key, turn))),
      }
      if mode == 'event':
        inputs['length'] = length[i : i + 1]
      rows.append(getattr(self._policy, _FUNCTIONS[mode])(inputs)['actions'])
    return np.concatenate(rows)


def _act(params, obs, text, length, committed, turns, key, *, cfg, window):
  """Actions [B, K, A], each row with the noise of its own turn."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, turns)
  plan = runtime.answer(params, obs, text, length, committed, keys, cfg=cfg, window=window)
  return plan.chunk.actions
