"""Normalisation statistics of training windows: computed once, saved with every checkpoint,
checked before use."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from wallwm_jax.config import ActionSpec, ExperimentConfig
from wallwm_jax.data.pipeline import event_buckets, make_reader, split_events
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import Draw, WindowReader
from wallwm_jax.types import DataError, NormStats, StatsMismatchError, Text

# Smallest scale of a channel: a direction in which the data hardly move is not blown up to unit
# variance.
SCALE_FLOOR = {'position': 0.01, 'rotation': 0.1, 'gripper': 0.1}  # m, rot6d entries, 0..1
# Of the largest latent scale: faint high-frequency channels must not weigh as much as what is seen.
LATENT_FLOOR = 0.1

EncodeVideo = Callable[[np.ndarray], np.ndarray]  # uint8 [B, V, T, H, W, 3] -> [B, V, F, h, w, C]


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
  """Per channel, physical units, each float32 [A]: mean, standard deviation, 1 % and 99 %
  quantiles."""

  mean: np.ndarray
  std: np.ndarray
  q01: np.ndarray
  q99: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
  """Where statistics come from, and the data themselves in numbers.

  store: digest of the store; settings: what of a config they depend on (`settings_of`); moments:
  of 'action' (relative) and 'state', {} where no episode has any.
  """

  store: str
  settings: Mapping[str, Any]
  moments: Mapping[str, Moments]


def compute(
  store: EventStore,
  config: ExperimentConfig,
  encode_video: EncodeVideo | None = None,
  *,
  max_windows: int = 4096,
  max_videos: int = 64,
) -> NormStats:
  """Statistics over an evenly spaced sample of the windows of config.data.split.

  Args:
    store, config: windows are cut as in training; config.data.normalisation chooses mean and
      standard deviation or the centre and half-width of the 1 %..99 % range (latents always use
      the former).
    encode_video: the codec; None leaves latents unscaled (mean 0, scale 1). A codec of published
      statistics needs none.
    max_windows: windows read for actions and state; max_videos: windows encoded for latents.

  Returns:
    NormStats of float32 NumPy arrays; identity for actions and state where no episode has any.
  """
  blank = identity(config)
  reader = make_reader(config, store, blank, no_text)
  draws = _sample(store, config, max_windows)
  result = vars(blank).copy()
  for name, x in _robot(reader, draws).items():
    result[f'{name}_mean'], result[f'{name}_scale'] = center_and_scale(
      x, config.data.normalisation, config.model.action_spec
    )
  published = config.model.codec.published_stats()
  if published is not None:
    result['latent_mean'], result['latent_scale'] = published
  elif encode_video is not None:
    picked = [
      draws[i]
      for i in np.unique(np.linspace(0, len(draws) - 1, min(max_videos, len(draws))).astype(int))
    ]
    result['latent_mean'], result['latent_scale'] = _latent_moments(
      reader, picked, encode_video, config
    )
  return NormStats(**{k: np.asarray(v, np.float32) for k, v in result.items()})


def robot_sample(
  store: EventStore, config: ExperimentConfig, max_windows: int = 4096
) -> dict[str, np.ndarray]:
  """What statistics are computed over: 'action' [n, A] relative to their anchors and 'state' [m, A]
  at them, physical units; {} where no episode has any."""
  reader = make_reader(config, store, identity(config), no_text)
  return _robot(reader, _sample(store, config, max_windows))


def summarise(store: EventStore, config: ExperimentConfig, *, max_windows: int = 4096) -> Summary:
  """The Summary that goes with `compute` of the same arguments."""
  moments = {}
  for name, x in robot_sample(store, config, max_windows).items():
    x = x.astype(np.float64)
    values = x.mean(0), x.std(0), *np.quantile(x, [0.01, 0.99], axis=0)
    moments[name] = Moments(*(v.astype(np.float32) for v in values))
  return Summary(store.digest, settings_of(config), moments)


def settings_of(config: ExperimentConfig) -> dict[str, Any]:
  """What of a config the statistics of actions and state depend on, JSON-serialisable."""
  data, model = config.data, config.model
  return {
    'data.split': data.split,
    'data.window': data.window,
    'data.buckets': list(data.buckets),
    'data.stride': data.stride,
    'data.normalisation': data.normalisation,
    'model.action_spec.arms': model.action_spec.arms,
    'model.steps_per_latent': model.steps_per_latent,
  }


def save(norm: NormStats, path: str | os.PathLike, summary: Summary | None = None) -> None:
  """Writes JSON that `load` (and `load_summary`) reads back bit for bit."""
  values = {k: _numbers(v) for k, v in vars(norm).items()}
  if summary is not None:
    moments = {g: {k: _numbers(v) for k, v in vars(m).items()} for g, m in summary.moments.items()}
    note = {'store': summary.store, 'settings': dict(summary.settings), 'moments': moments}
    values['summary'] = note | {'hash': _json_hash(note)}
  pathlib.Path(path).write_text(json.dumps({'hash': stats_hash(norm), **values}, indent=1))


def load(path: str | os.PathLike) -> NormStats:
  """Inverse of `save`; raises DataError if the file is missing, malformed or was changed."""
  return _load(path)[0]


def load_summary(path: str | os.PathLike) -> Summary | None:
  """The Summary saved with statistics, None where there is none; raises DataError like `load`."""
  return _load(path)[1]


def _load(path: str | os.PathLike) -> tuple[NormStats, Summary | None]:
  try:
    values = json.loads(pathlib.Path(path).read_text())
    expected, note = values.pop('hash'), values.pop('summary', None)
    norm = NormStats(**{k: np.array(v, np.float32) for k, v in values.items()})
    intact = stats_hash(norm) == expected
    summary = None
    if note is not None:
      intact &= _json_hash({k: v for k, v in note.items() if k != 'hash'}) == note['hash']
      moments = {
        group: Moments(**{k: np.array(v, np.float32) for k, v in m.items()})
        for group, m in note['moments'].items()
      }
      summary = Summary(note['store'], note['settings'], moments)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise DataError(f'normalisation statistics {path}: cannot be read ({error!r}).') from None
  if not intact:
    raise DataError(
      f'normalisation statistics {path}: content does not match its hash, the file was changed.'
    )
  return norm, summary


def _numbers(x) -> list[float]:
  return [float(v) for v in np.asarray(x, np.float32)]


def _json_hash(note: dict) -> str:
  return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()[:16]


def stats_hash(norm: NormStats) -> str:
  """Hex digest of the content."""
  digest = hashlib.sha256()
  for name, value in vars(norm).items():
    value = np.ascontiguousarray(value, np.float32)
    digest.update(f'{name}{value.shape}'.encode() + value.tobytes())
  return digest.hexdigest()[:16]


def check_match(expected: NormStats, got: NormStats) -> None:
  """Raises StatsMismatchError naming the first group and channel in which two sets of statistics
  differ."""
  for name in vars(expected):
    a, b = (np.asarray(getattr(norm, name), np.float32) for norm in (expected, got))
    if a.shape != b.shape:
      raise StatsMismatchError(
        f'{name}: expected {a.size} channels, got {b.size}. '
        'These statistics belong to another model.'
      )
    differ = np.flatnonzero(~((a == b) | (np.isnan(a) & np.isnan(b))))
    if len(differ):
      i = int(differ[0])
      raise StatsMismatchError(
        f'{name}: {len(differ)} channels differ, first channel {i}: expected {a[i]!s}, '
        f'got {b[i]!s}. Use the statistics saved with the checkpoint.'
      )


def identity(config: ExperimentConfig) -> NormStats:
  """Statistics that change nothing."""
  a, c = config.model.action_spec.dim, config.model.codec.channels
  return NormStats(*(np.full(n, value, np.float32) for n in (a, a, c) for value in (0, 1)))


def no_text(captions: list[str]) -> Text:
  """Text features for readers whose captions nobody looks at."""
  return Text(np.zeros((len(captions), 1, 1), np.float32), np.zeros((len(captions), 1), bool))


def _sample(store: EventStore, config: ExperimentConfig, limit: int) -> list[Draw]:
  """Evenly spaced events; the anchors of chunk windows walk through their events."""
  events, buckets = split_events(store, config), event_buckets(store, config)
  starts, ends = store.column('start'), store.column('end')
  if config.data.window == 'chunk':  # every possible anchor is a window
    owner = np.repeat(events, (ends - starts - 1)[events])
    anchor = np.concatenate([np.arange(starts[e], ends[e] - 1) for e in events])
  else:
    owner, anchor = events, starts[events]
  picked = np.unique(np.linspace(0, len(owner) - 1, min(limit, len(owner))).astype(int))
  return [
    Draw(int(owner[i]), config.data.buckets[buckets[owner[i]]], int(anchor[i])) for i in picked
  ]


def _robot(reader: WindowReader, draws: list[Draw]) -> dict[str, np.ndarray]:
  states, actions = [], []
  for draw in draws:
    state, action, mask = reader.robot(draw)
    if mask.any():
      states.append(state)
      actions.append(action[mask].reshape(-1, action.shape[-1]))
  return {'action': np.concatenate(actions), 'state': np.stack(states)} if actions else {}


def scale_floor(spec: ActionSpec) -> np.ndarray:
  """Smallest scale of each channel, [A]."""
  floor = np.empty(spec.dim)
  for group, channels in spec.groups().items():
    floor[list(channels)] = SCALE_FLOOR[group]
  return floor


def center_and_scale(x: np.ndarray, kind: str, spec: ActionSpec) -> tuple[np.ndarray, np.ndarray]:
  """Centre and floored scale, [A] float64, of x [n, A] under a normalisation 'meanstd' or
  'quantile'."""
  x = x.astype(np.float64)
  if kind == 'quantile':
    low, high = np.quantile(x, [0.01, 0.99], axis=0)
    center, scale = (low + high) / 2, (high - low) / 2
  else:
    center, scale = x.mean(0), x.std(0)
  return center, np.maximum(scale, scale_floor(spec))


def _latent_moments(
  reader: WindowReader, draws: list[Draw], encode_video: EncodeVideo, config: ExperimentConfig
):
  """Mean and standard deviation per latent channel over real cameras and unpadded latent frames,
  [C] float64."""
  count, total, squares = 0, 0.0, 0.0
  for draw in draws:
    latents = np.asarray(encode_video(reader.frames(draw)[None]), np.float64)[0]
    view_mask, _, _ = reader.cameras(draw)
    real = 1 + (reader.window(draw).num_frames - 1) // config.model.steps_per_latent
    x = latents[view_mask, :real].reshape(-1, latents.shape[-1])
    count, total, squares = count + len(x), total + x.sum(0), squares + (x**2).sum(0)
  mean = total / count
  scale = np.sqrt(np.maximum(squares / count - mean**2, 0))
  return mean, np.maximum(scale, max(LATENT_FLOOR * scale.max(), 1e-6))
