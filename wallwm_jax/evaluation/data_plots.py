"""Figures of the data report as PNG bytes, in the style of `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from wallwm_jax.evaluation.plots import (
  BLUE,
  GREEN,
  GREY,
  INK,
  ORANGE,
  PURPLE,
  SERIES,
  SOFT,
  as_png,
  legend_above,
  panels,
)

MARKERS = 'os^Dv'  # beside colour, so that a print in grey can be read
_WIDE = 9.6  # inches of a figure as wide as the page
_FEW = 64  # bars that can be told apart


class LagRow(NamedTuple):
  """One camera of a rig: the lag that was applied and, for each judged episode, the one it would
  have had by itself, frames."""

  name: str
  lag: int
  estimates: np.ndarray


def lag_dots(rows: Sequence[LagRow]) -> bytes:
  """A row per camera: circles at the episodes' own lags, their area and number = how many; the tick
  is the lag that was applied."""
  figure, (axis,) = panels(1, width=_WIDE, height=1.0 + 0.4 * len(rows), columns=1)
  shown = np.concatenate([np.append(row.estimates, row.lag) for row in rows])
  most = max(np.unique(row.estimates, return_counts=True)[1].max(initial=1) for row in rows)
  for y, row in enumerate(rows):
    axis.plot([row.lag, row.lag], [y - 0.46, y + 0.46], color=ORANGE, linewidth=4, zorder=2,
              label=None if y else 'lag of the rig, applied')  # fmt: skip
    lags, counts = np.unique(row.estimates, return_counts=True)
    axis.scatter(lags, np.full(len(lags), y), s=130 + 130 * counts / most, color=BLUE, zorder=3,
                 label=None if y else 'episodes, by their own best lag')  # fmt: skip
    for lag, count in zip(lags, counts):
      axis.annotate(f'{count}', (lag, y), color='white', fontsize=8, ha='center', va='center')
  low, high = shown.min() - 1.5, shown.max() + 1.5
  axis.set_xlim(min(low, -3.5), max(high, 3.5))
  axis.xaxis.get_major_locator().set_params(integer=True)
  axis.set_ylim(len(rows) - 0.4, -0.6)
  axis.set_yticks(range(len(rows)), [row.name for row in rows])
  axis.set_xlabel('frames by which the robot stream is late')
  legend = figure.legend(loc='outside upper left', ncols=2, frameon=False, fontsize=9)
  for handle in legend.legend_handles:
    if hasattr(handle, 'set_sizes'):
      handle.set_sizes([60])
  return as_png(figure)


def sync_confidence(
  rigs: Mapping[str, tuple[np.ndarray, np.ndarray]], least: tuple[float, float]
) -> bytes:
  """Episodes by (correlation, evidence in nats) of each rig; least: of either, else refused."""
  figure, (axis,) = panels(1, width=5.4, height=3.2, columns=1)
  for i, (name, (r, nats)) in enumerate(rigs.items()):
    style = {'marker': MARKERS[i % 5], 'color': SERIES[i % 5]}
    axis.scatter(r, nats, s=22, alpha=0.7, linewidths=0, label=name, **style)
  axis.axvline(least[0], color=INK, linewidth=1, linestyle=':')
  axis.axhline(least[1], color=INK, linewidth=1, linestyle=':', label='least (refused below)')
  axis.set_yscale('log', subs=())
  axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
  axis.yaxis.set_major_formatter('{x:g}')
  axis.yaxis.set_minor_formatter('')
  axis.set_xlabel('mean correlation at the lag of the rig')
  axis.set_ylabel('evidence [nats per camera]')
  axis.set_xlim(0, 1)
  _legend_right(figure)
  return as_png(figure)


def residual_curves(rigs: Mapping[str, Mapping[str, np.ndarray]], tops: Mapping[str, int]) -> bytes:
  """A panel per rig: score [2 w + 1] against the lag that is left, a curve per camera; tops: where
  their mean is highest."""
  figure, axes = panels(len(rigs), width=4.8, height=2.9, columns=2)
  for axis, (rig, curves) in zip(axes, rigs.items()):
    axis.axvline(0, color=ORANGE, linewidth=2)
    for i, (view, curve) in enumerate(curves.items()):
      lags = np.arange(len(curve)) - len(curve) // 2
      axis.plot(lags, curve, color=(BLUE, GREEN, PURPLE, INK, GREY)[i % 5], linewidth=1.6,
                marker=MARKERS[i % 5], markersize=3.5, label=view)  # fmt: skip
    top = f'{tops[rig]:+d}' if tops[rig] else '0'
    axis.set_title(f'{rig}: highest at {top}', fontsize=9)
    axis.set_xlabel('frames of lag left in the store')
    axis.set_ylabel('correlation')
    axis.legend(frameon=False, fontsize=8)
  return as_png(figure)


def count_bars(counts: Mapping[str, int], label: str) -> bytes:
  """Horizontal bars with their numbers."""
  figure, (axis,) = panels(1, width=7.2, height=0.7 + 0.3 * len(counts), columns=1)
  places = np.arange(len(counts))
  axis.barh(places, list(counts.values()), 0.66, color=BLUE)
  for y, count in zip(places, counts.values()):
    axis.annotate(f' {count}', (count, y), va='center', fontsize=9, color=INK)
  axis.set_yticks(places, list(counts))
  axis.set_ylim(len(counts) - 0.4, -0.6)
  axis.set_xlim(0, 1.1 * max(counts.values()))
  axis.xaxis.get_major_locator().set_params(integer=True)
  axis.grid(visible=False, axis='y')
  axis.set_xlabel(label)
  return as_png(figure)


def episode_trace(
  seconds: np.ndarray,
  rows: Mapping[str, np.ndarray],
  events: Sequence[tuple[float, float]],
  unsure: Sequence[float] = (),
) -> bytes:
  """An episode over time: a panel per quantity [T, arms], over bands that are its events, numbered
  as in the strip beneath.

  Args:
    seconds: [T]; events: (first, last) s of each; unsure: s of boundaries below the threshold.
  """
  figure, axes = panels(len(rows), width=_WIDE, height=1.55, columns=1)
  for axis, (name, values) in zip(axes, rows.items()):
    for i, (start, end) in enumerate(events):
      axis.axvspan(start, end, color=(BLUE, GREY)[i % 2], alpha=0.13, linewidth=0)
    for edge in sorted({edge for event in events for edge in event}):
      weak = any(abs(edge - x) < 1e-6 for x in unsure)
      axis.axvline(edge, color=ORANGE, linewidth=1.3, linestyle=':' if weak else '-')
    for arm, column in enumerate(values.T):
      at = seconds[: len(column)]
      axis.plot(at, column, color=(INK, PURPLE)[arm % 2], linewidth=1.4, label=f'arm {arm + 1}')
    axis.set_xlim(seconds[0], seconds[-1])
    axis.set_ylabel(name)
    axis.tick_params(labelbottom=axis is axes[-1])
    if name.startswith('gripper'):
      axis.set_ylim(-0.06, 1.06)
    axis.grid(visible=False, axis='x')
  width = seconds[-1] - seconds[0]
  wide = [0.012 * width < end - start for start, end in events]
  for i, (start, end) in enumerate(events):
    if wide[i]:
      axes[0].annotate(
        f'{i + 1}', ((start + end) / 2, 1.03), xycoords=('data', 'axes fraction'), color=SOFT,
        fontsize=8, ha='center',
      )  # fmt: skip
  axes[-1].set_xlabel('s')
  figure.align_ylabels()
  if next(iter(rows.values())).shape[1] > 1:
    legend_above(figure, axes[0])
  return as_png(figure)


def length_histogram(seconds: Mapping[str, np.ndarray]) -> bytes:
  """Stacked histogram of event lengths by how they were found, with the median of all."""
  figure, (axis,) = panels(1, width=7.2, height=2.8, columns=1)
  everything = np.concatenate(list(seconds.values()))
  edges = np.linspace(0, max(np.quantile(everything, 0.995) * 1.05, 1e-3), 33)
  clipped = [np.minimum(x, edges[-1]) for x in seconds.values()]
  colors = [(BLUE, ORANGE, GREEN, GREY)[i % 4] for i in range(len(clipped))]
  axis.hist(clipped, edges, stacked=True, color=colors, label=list(seconds), rwidth=0.92)
  median = float(np.median(everything))
  axis.axvline(median, color=INK, linewidth=1.2, linestyle='--', label=f'median {median:.2g} s')
  axis.set_xlabel('length of an event [s], the longest in the last bar')
  axis.set_ylabel('events')
  axis.yaxis.get_major_locator().set_params(integer=True)
  axis.grid(visible=False, axis='x')
  axis.legend(frameon=False, fontsize=8)
  return as_png(figure)


def cluster_bars(sides: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
  """A panel per side: share of the events as recorded [K] and of the draws [K], most frequent
  cluster first."""
  figure, axes = panels(len(sides), width=_WIDE / 2, height=3.0, columns=2)
  for axis, (side, (natural, drawn)) in zip(axes, sides.items()):
    order = np.argsort(-natural, kind='stable')
    natural, drawn = 100 * natural[order], 100 * drawn[order]
    places = np.arange(len(order))
    axis.bar(places, natural, 0.8 if len(order) <= _FEW else 1.0, color=GREY,
             label='events, as recorded')  # fmt: skip
    edges = np.arange(len(order) + 1) - 0.5
    axis.stairs(drawn, edges, color=BLUE, linewidth=1.8, label='draws, balanced', baseline=None)
    if natural.min() > 0 and natural.max() > 20 * natural.min():
      axis.set_yscale('log')
      axis.yaxis.set_major_formatter('{x:g}')
    else:
      axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(visible=False, axis='x')
    axis.set_title(side)
    axis.set_xlabel('rank of the cluster')
    axis.set_ylabel('share [%]')
  legend_above(figure, axes[0])
  return as_png(figure)


class Trajectory(NamedTuple):
  """One arm in one event: seconds [L]; position [L, 3] m from the first pose, in its axes; grip
  [L]."""

  seconds: np.ndarray
  position: np.ndarray
  grip: np.ndarray


def trajectories(clusters: Mapping[str, Sequence[Trajectory]]) -> bytes:
  """A column per cluster: every trajectory from above, its height and its gripper over time."""
  count = len(clusters)
  figure, axes = panels(3 * count, width=max(_WIDE / max(count, 4), 1.6), height=1.9, columns=count)
  everything = [t for group in clusters.values() for t in group]
  reach = 105 * max(np.abs(t.position).max() for t in everything) + 0.1
  longest = max(t.seconds[-1] for t in everything)
  for i, (title, group) in enumerate(clusters.items()):
    above, height, grip = axes[i], axes[count + i], axes[2 * count + i]
    for t in group:
      x, y, z = 100 * t.position.T
      style = {'color': BLUE, 'alpha': max(0.25, min(0.8, 6 / len(group))), 'linewidth': 1.1}
      above.plot(x, y, **style)
      above.plot(x[-1], y[-1], 'o', color=ORANGE, markersize=2.6, zorder=3)
      height.plot(t.seconds, z, **style)
      grip.plot(t.seconds, t.grip, **style)
    above.plot(0, 0, 'o', color=INK, markersize=3.5, zorder=4)
    above.set_title(title, fontsize=9)
    above.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect='equal', xlabel='x [cm]')
    height.set(xlim=(0, longest), ylim=(-reach, reach))
    grip.set(xlim=(0, longest), ylim=(-0.05, 1.05), xlabel='s')
    if i:
      for axis in (above, height, grip):
        axis.tick_params(labelleft=False)
  for axis, label in zip(axes[::count], ('y [cm]', 'z [cm]', 'gripper (1 = open)')):
    axis.set_ylabel(label)
  return as_png(figure)


def packed_rows(filled: np.ndarray, events: np.ndarray, budget: int) -> bytes:
  """Histograms over planned rows: latent frames in use [R] and events [R]."""
  figure, (left, right) = panels(2, width=_WIDE / 2, height=2.7, columns=2)
  for axis, values, name, low in (
    (left, filled, f'latent frames in use, of {budget}', int(filled.min())),
    (right, events, 'events in a row', 0),
  ):
    places = np.arange(low, values.max() + 1)
    axis.bar(places, 100 * np.bincount(values, minlength=places[-1] + 1)[low:] / len(values), 0.85,
             color=BLUE)  # fmt: skip
    mean = values.mean()
    axis.axvline(mean, color=ORANGE, linewidth=2, label=f'mean {mean:.1f}')
    axis.set_xlabel(name)
    axis.set_ylabel('rows [%]')
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(visible=False, axis='x')
    axis.legend(frameon=False, fontsize=8)
  left.set_xlim(right=budget + 0.6)
  return as_png(figure)


def _legend_right(figure) -> None:
  figure.legend(loc='outside right upper', frameon=False, fontsize=8)
