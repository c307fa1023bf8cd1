"""Checks of a store's robot data, and of the statistics that they are normalised with, before a
model is trained on either. What the data are in: see conventions.py."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.table import Table

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.data import stats
from wallwm_jax.data.conventions import Diagnosis, conventions
from wallwm_jax.data.records import EpisodeInfo
from wallwm_jax.data.schema import ARM_WIDTH
from wallwm_jax.data.store import EventStore
from wallwm_jax.types import ConfigError, NormStats

SEVERITIES = ('severe', 'warning', 'info')
_AXES = ('x', 'y', 'z', *(f'rotation {c}{a}' for c in (1, 2) for a in 'xyz'), 'gripper')
_ROBUST = 2 * 2.3263  # standard deviations between the 1 % and 99 % quantiles of a normal


@dataclasses.dataclass(frozen=True)
class DoctorSettings:
  """max_windows, max_episodes: evenly spaced ones that are looked at; blow_up: normalised
  magnitudes that are a warning and severe; outliers: ratio of the standard deviation to that of the
  1..99 % range; tolerance: how far a mean (in scales) or a scale (natural logarithm) may be from
  the store's."""

  max_windows: int = 2048
  max_episodes: int = 256
  blow_up: tuple[float, float] = (10.0, 50.0)
  outliers: float = 3.0
  tolerance: float = 0.5

  def __post_init__(self):
    for name, value in vars(self).items():
      if not np.all(np.asarray(value) > 0):
        raise ConfigError(f'doctor.{name}: expected > 0, got {value}.')


def diagnose(
  store: EventStore,
  config: ExperimentConfig,
  norm: NormStats | None = None,
  summary: stats.Summary | None = None,
  settings: DoctorSettings = DoctorSettings(),
) -> list[Diagnosis]:
  """What is wrong with the robot data of config.data.split and with statistics for them.

  Args:
    norm: statistics to check; None = those that would be computed. summary: what was saved with
      them, which tells whether they belong to this store and config.

  Returns:
    Findings, severe ones first; [] where all is well.

  Raises:
    ConfigError: the split is empty, or its cameras are not those of the config.
  """
  found = list(_check_index(store, config))
  if not any(d.check == 'mixed_widths' for d in found):  # such a store cannot be read as one
    infos = _infos(store, config, settings.max_episodes)
    found += _check_rigs(infos)
    found += conventions(infos)
    sample = stats.robot_sample(store, config, settings.max_windows)
    found += _check_sample(sample, config, settings)
    given = _own(sample, config)
    if norm is not None:
      found += _check_summary(summary, store, config)
      found += _check_values(norm, config)
      given = {
        group: tuple(np.asarray(getattr(norm, f'{group}_{k}'), float) for k in ('mean', 'scale'))
        for group in sample
      }
    if not any(d.check in ('shape', 'not_finite') for d in found):
      found += _check_fit(given, sample, infos, config, settings)
      found += _check_size(given, sample, settings)
  return sorted(found, key=lambda d: SEVERITIES.index(d.severity))


def show(found: list[Diagnosis], console: Console | None = None) -> None:
  """Prints findings as a table; what is the same of several channels in one row."""
  table = Table(title='normalisation and conventions', show_lines=True)
  for name in ('severity', 'check', 'channel', 'found', 'expected', 'what to do'):
    table.add_column(name, no_wrap=name in ('channel', 'found'))
  colour = {'severe': '[red]', 'warning': '[yellow]', 'info': ''}
  alike = collections.defaultdict(list)
  for d in found:
    alike[d.severity, d.check, d.expected, d.message].append(d)
  for (severity, check, expected, message), same in alike.items():
    channels = _plain('\n'.join(d.channel for d in same))
    values = '\n'.join(d.value for d in same)
    label = colour[severity] + severity
    table.add_row(label, check, channels, values, expected, _plain(message))
  (console or Console()).print(table if found else 'nothing found: statistics and data agree')


def _plain(text: str) -> str:
  return text.replace('[', r'\[')  # else rich takes it for markup


def _check_index(store: EventStore, config: ExperimentConfig) -> Iterator[Diagnosis]:
  rows = [e for e in store.episodes.to_pylist() if e['split'] == config.data.split]
  rates = collections.Counter(round(e['fps'], 3) for e in rows)
  if len(rates) > 1:
    yield Diagnosis(
      'mixed_fps', 'warning', '', _counted(rates, 'Hz'), 'one rate',
      'One action step means different times in different episodes. Resample to one rate, or '
      'build a store per rate.',
    )  # fmt: skip
  widths = collections.Counter(e['state_width'] for e in rows if e['state_width'])
  expected = config.model.action_spec.dim
  if set(widths) - {expected}:
    yield Diagnosis(
      'mixed_widths', 'severe', '', _counted(widths, 'wide'), f'all {expected} wide',
      'Some episodes do not fit model.action_spec. Set model.action_spec.arms, or build a store '
      'per kind of robot.',
    )  # fmt: skip


def _infos(store: EventStore, config: ExperimentConfig, limit: int) -> list[EpisodeInfo]:
  """Evenly spaced episodes of the split that have state and actions."""
  rows = np.flatnonzero(
    (store.column('split', 'episodes') == config.data.split)
    & store.episodes['has_actions'].to_numpy()
  )
  picked = np.unique(np.linspace(0, len(rows) - 1, min(limit, len(rows))).astype(int))
  return [store.info(int(rows[i])) for i in picked]


def _check_rigs(infos: list[EpisodeInfo]) -> Iterator[Diagnosis]:
  rigs = collections.Counter((info.source, info.rig) for info in infos)
  if len(rigs) > 1:
    names = collections.Counter({'/'.join(filter(None, k)): n for k, n in rigs.items()})
    yield Diagnosis(
      'mixed_rigs', 'info', '', _counted(names, ''), 'one rig',
      'One mean and scale serve several robots: make sure that they share base frame, units and '
      'gripper convention.',
    )  # fmt: skip
  if not infos:
    yield Diagnosis(
      'no_robot', 'info', '', 'no episode with actions', '', 'Statistics of actions are identity.'
    )


def _check_sample(sample, config: ExperimentConfig, settings: DoctorSettings):
  """Channels that never move, or whose spread a few outliers make; for action and state."""
  for group, x in sample.items():
    low, high = np.quantile(x, [0.01, 0.99], axis=0)
    std, whole = x.astype(np.float64).std(0), np.ptp(x, axis=0)
    for i in range(x.shape[1]):
      rotation = 3 <= i % ARM_WIDTH < 9
      if whole[i] < 1e-6:
        yield Diagnosis(
          'still', 'info' if rotation else 'warning', _channel(group, i), f'{x[0, i]:.4g} always',
          'some motion', 'The channel never moves: is it read from the right field?',
        )  # fmt: skip
        continue
      floor = stats.scale_floor(config.model.action_spec)[i]
      robust = (high[i] - low[i]) / _ROBUST
      if robust < floor / 10 and whole[i] > 2 * floor and config.data.normalisation == 'quantile':
        yield Diagnosis(
          'tiny_range', 'warning', _channel(group, i), f'{high[i] - low[i]:.2g}',
          f'> {floor / 5:.2g}',
          f'The 1..99 % range is empty though the channel moves by {whole[i]:.2g}: what is rare is '
          "scaled up. Use data.normalisation='meanstd'.",
        )  # fmt: skip
      elif robust >= floor / 10 and std[i] > settings.outliers * robust:
        yield Diagnosis(
          'outliers', 'warning', _channel(group, i), f'std {std[i]:.2g}',
          f'about {robust:.2g} (1..99 % range)',
          'A few values make the standard deviation. Clean the episodes that hold them, or use '
          "data.normalisation='quantile'.",
        )  # fmt: skip


def _check_summary(summary, store: EventStore, config: ExperimentConfig) -> Iterator[Diagnosis]:
  if summary is None:
    yield Diagnosis(
      'origin', 'info', '', 'unknown', 'digest of the store',
      'The statistics do not say what they were computed from. Save them again with `wallwm data '
      'stats`.',
    )  # fmt: skip
    return
  now = {'store': store.digest} | stats.settings_of(config)
  then = {'store': summary.store} | dict(summary.settings)
  for name in sorted(set(now) | set(then)):
    a, b = then.get(name), now.get(name)
    if a != b:
      yield Diagnosis(
        'stale', 'severe', '', f'{name} = {_short(a)}', _short(b),
        'The statistics belong to another store or config. Compute them again with `wallwm data '
        'stats`.',
      )  # fmt: skip


def _check_values(norm: NormStats, config: ExperimentConfig) -> Iterator[Diagnosis]:
  """Statistics on their own: channels, finite numbers, scales above the floor, gripper range."""
  spec = config.model.action_spec
  widths = {'action': spec.dim, 'state': spec.dim, 'latent': config.model.codec.channels}
  for group, width in widths.items():
    mean, scale = (np.asarray(getattr(norm, f'{group}_{k}')) for k in ('mean', 'scale'))
    if mean.shape != (width,) or scale.shape != (width,):
      yield Diagnosis(
        'shape', 'severe', group, f'{mean.size} and {scale.size} channels', f'{width}',
        'The statistics belong to another model.',
      )  # fmt: skip
      continue
    for i in np.flatnonzero(~(np.isfinite(mean) & np.isfinite(scale) & (scale > 0))):
      yield Diagnosis(
        'not_finite', 'severe', _channel(group, i), f'mean {mean[i]:g}, scale {scale[i]:g}',
        'finite, scale > 0', 'Every normalised value would be NaN or infinite. Compute them again.',
      )  # fmt: skip
    if group == 'latent':
      continue
    floor = stats.scale_floor(spec)
    for i in np.flatnonzero(scale < 0.999 * floor):
      yield Diagnosis(
        'tiny_scale', 'severe', _channel(group, i), f'{scale[i]:.2g}', f'>= {floor[i]:g}',
        f'Noise of this channel is blown up {floor[i] / max(scale[i], 1e-12):.3g} times. Compute '
        'the statistics with `wallwm data stats`, which keeps a floor.',
      )  # fmt: skip
    for i in spec.groups()['gripper']:
      if not (-0.05 <= mean[i] <= 1.05 and scale[i] <= 1.05):
        yield Diagnosis(
          'gripper_range', 'severe', _channel(group, i), f'{mean[i]:.3g} +- {scale[i]:.3g}',
          'within 0..1', 'The statistics are of a gripper in another range (-1..1, 0..255, m).',
        )  # fmt: skip


def _own(sample, config: ExperimentConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  kind, spec = config.data.normalisation, config.model.action_spec
  return {group: stats.center_and_scale(x, kind, spec) for group, x in sample.items()}


def _check_fit(given, sample, infos, config: ExperimentConfig, settings) -> Iterator[Diagnosis]:
  """Whether statistics describe the data of the store, and what else they would describe."""
  for group, own in _own(sample, config).items():
    far = _apart(given[group], own)
    wrong = np.flatnonzero(far > settings.tolerance)
    if not len(wrong):
      continue
    i, (mean, scale) = int(np.argmax(far)), given[group]
    known = _known(group, sample[group], infos, config)
    groups = config.model.action_spec.groups()
    rows = list(groups['position'] + groups['gripper'])
    distance = {name: _apart(given[group], fit)[rows].max() for name, fit in known.items()}
    best = min(distance, key=distance.__getitem__)
    fits = f'They fit {best}. ' if distance[best] < settings.tolerance else ''
    yield Diagnosis(
      'mismatch', 'severe', _channel(group, i), f'{mean[i]:.3g} +- {scale[i]:.3g}',
      f'{own[0][i]:.3g} +- {own[1][i]:.3g}',
      f'{len(wrong)} channels do not describe this store. {fits}Compute the statistics again with '
      '`wallwm data stats`.',
    )  # fmt: skip


def _check_size(given, sample, settings: DoctorSettings) -> Iterator[Diagnosis]:
  """How large normalised values get."""
  for group, x in sample.items():
    size = np.abs((x - given[group][0]) / given[group][1]).max(0)
    i = int(np.argmax(size))
    if size[i] > settings.blow_up[0]:
      yield Diagnosis(
        'blow_up', 'severe' if size[i] > settings.blow_up[1] else 'warning', _channel(group, i),
        f'{size[i]:.3g}', f'< {settings.blow_up[0]:g}',
        'A normalised value is so large that it dominates the loss. Clean the episodes that hold '
        'it, or compute the statistics again.',
      )  # fmt: skip


def _known(group: str, x: np.ndarray, infos, config: ExperimentConfig):
  """Statistics of the same data under other conventions, by what they are."""
  kind, spec = config.data.normalisation, config.model.action_spec
  position, grip = (list(spec.groups()[name]) for name in ('position', 'gripper'))
  inverted, steps = x.copy(), [np.diff(info.actions, axis=0) for info in infos]
  inverted[:, grip] = 1 - x[:, grip]
  data = {'a gripper with 1 = closed': inverted}
  if group == 'action':
    for step, info in zip(steps, infos):
      step[:, grip] = info.actions[1:, grip]
    data['absolute actions (relative ones are trained)'] = np.concatenate(
      [info.actions for info in infos]
    )
    data['changes per step (poses relative to the anchor are trained)'] = np.concatenate(steps)
  for unit, factor in (('millimetres', 1000), ('centimetres', 100)):
    data[f'positions in {unit}'] = x * np.where(np.isin(np.arange(spec.dim), position), factor, 1)
  known = {name: stats.center_and_scale(values, kind, spec) for name, values in data.items()}
  other = {'meanstd': 'quantile', 'quantile': 'meanstd'}[kind]
  return known | {f"data.normalisation='{other}'": stats.center_and_scale(x, other, spec)}


def _apart(a, b) -> np.ndarray:
  """[A]: how far (mean, scale) `a` are from `b`: of the means in scales, of the scales in log."""
  return np.maximum(np.abs(a[0] - b[0]) / b[1], np.abs(np.log(a[1] / b[1])))


def _channel(group: str, i: int) -> str:
  return f'{group}[{i}]' + ('' if group == 'latent' else f' {_AXES[i % ARM_WIDTH]}')


def _counted(counter: collections.Counter, unit: str) -> str:
  return ', '.join(f'{n} x {k} {unit}'.rstrip() for k, n in counter.most_common())


def _short(x) -> str:
  return str(x)[:16]
