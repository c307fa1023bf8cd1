"""Figures of the report as PNG bytes (Matplotlib without a display)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wallwm_jax.evaluation.base import Interval
from wallwm_jax.geometry.poses import POSE_WIDTH, geodesic_angle, rot6d_to_matrix

INK, SOFT, LINE = '#16202e', '#5b6778', '#dfe4ea'
BLUE, ORANGE, GREY, GREEN, PURPLE = '#2563c9', '#d9762b', '#9aa5b4', '#1d7f55', '#7b4fb5'
SERIES = (BLUE, ORANGE, GREEN, PURPLE, GREY)

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


def loss_curves(stages: Mapping[str, Mapping[str, Curve]]) -> bytes:
  """One panel per stage: every curve, faint as logged and bold smoothed."""
  figure, axes = panels(len(stages), width=5.2, height=2.9, columns=2)
  for axis, (stage, curves) in zip(axes, stages.items()):
    for color, (name, (steps, values)) in zip(SERIES, curves.items()):
      axis.plot(steps, values, color=color, alpha=0.25, linewidth=1)
      axis.plot(steps, smooth(values), color=color, linewidth=1.8, label=name)
    if all((np.asarray(v) > 0).all() for _, v in curves.values()):
      axis.set_yscale('log')
      axis.yaxis.set_major_formatter('{x:g}')
      axis.yaxis.set_minor_formatter('{x:.2g}')
    axis.set_title(stage)
    axis.set_xlabel('optimizer step')
    axis.legend(frameon=False)
  return as_png(figure)


def smooth(values, span: float = 0.05) -> np.ndarray:
  """Centred running mean over `span` of the curve, shrinking at its ends."""
  values = np.asarray(values, np.float64)
  half = int(len(values) * span / 2)
  total = np.concatenate([[0.0], np.cumsum(values)])
  centre = np.arange(len(values))
  low, high = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(values))
  return (total[high] - total[low]) / (high - low)


def action_traces(predicted, true, mask, hold) -> bytes:
  """One event: position per axis, rotation from the anchor and gripper over the action steps.

  Args:
    predicted, true, hold: [K, A] physical, relative to the anchor; mask: [K, A], True = supervised.
  """
  arms = true.shape[-1] // POSE_WIDTH
  figure, axes = panels(5 * arms, width=2.15, height=2.2, columns=5)
  styles = (
    ('held still', hold, {'color': GREY, 'linestyle': ':'}),
    ('demonstrated', true, {'color': INK}),
    ('predicted', predicted, {'color': BLUE, 'linestyle': '--'}),
  )
  steps = np.arange(1, len(true) + 1)
  for arm in range(arms):
    part = slice(POSE_WIDTH * arm, POSE_WIDTH * (arm + 1))
    shown = np.asarray(mask)[:, part].any(-1)
    for label, actions, style in styles:
      shown_values = _channels(np.asarray(actions)[:, part])
      for axis, (title, values) in zip(axes[5 * arm :], shown_values.items()):
        axis.plot(steps[shown], values[shown], linewidth=1.6, label=label, **style)
        axis.set_title(title if arms == 1 else f'arm {arm + 1}: {title}')
        axis.set_xlabel('step')
    axes[5 * arm + 4].set_ylim(-0.08, 1.08)
  legend_above(figure, axes[0])
  return as_png(figure)


def _channels(actions: np.ndarray) -> dict[str, np.ndarray]:
  """Plotted quantities of one arm's relative actions [K, 10]."""
  turned = geodesic_angle(np.eye(3), rot6d_to_matrix(actions[:, 3:9].astype(np.float64)))
  position = {f'{name} [cm]': 100 * actions[:, i] for i, name in enumerate('xyz')}
  return position | {'rotation [deg]': np.degrees(turned), 'gripper': actions[:, 9]}


def success_bars(policies: Mapping[str, Mapping[str, Interval]]) -> bytes:
  """Grouped bars with confidence intervals: {policy: {kind: Interval}}; kinds of the first
  policy."""
  kinds = list(next(iter(policies.values())))
  figure, (axis,) = panels(1, width=max(5.0, 1.3 * len(kinds) + 2), height=3.2, columns=1)
  width = 0.8 / len(policies)
  for i, (color, (policy, scores)) in enumerate(zip((BLUE, GREY, ORANGE, GREEN), policies.items())):
    shown = [k for k in kinds if k in scores]
    x = np.array([kinds.index(k) for k in shown]) + (i - (len(policies) - 1) / 2) * width
    rate = np.array([scores[k].value for k in shown])
    error = np.array([[s.value - s.low, s.high - s.value] for s in (scores[k] for k in shown)]).T
    axis.bar(x, 100 * rate, 0.92 * width, color=color, label=policy)
    axis.errorbar(x, 100 * rate, 100 * error, fmt='none', ecolor=INK, elinewidth=1, capsize=2.5)
  axis.set_xticks(range(len(kinds)), kinds)
  axis.set_ylim(0, 105)
  axis.set_ylabel('success [%]')
  axis.grid(visible=False, axis='x')
  legend_above(figure, axis)
  return as_png(figure)


def delay_curves(waits: Mapping[str, Mapping[int, Interval]]) -> bytes:
  """Success [%] by control steps of latency, one line per way of waiting: {way: {steps: rate}}."""
  percent = {
    name: {
      steps: Interval(100 * rate.value, 100 * rate.low, 100 * rate.high, rate.n)
      for steps, rate in found.items()
    }
    for name, found in waits.items()
  }
  return interval_curves(percent, 'control steps of latency', 'success [%]')


def interval_curves(
  lines: Mapping[str, Mapping[int, Interval]], x_label: str, y_label: str
) -> bytes:
  """Lines through estimates with their bounds: {name: {x: Interval}}."""
  figure, (axis,) = panels(1, width=5.2, height=2.9, columns=1)
  for i, (color, (name, found)) in enumerate(zip(SERIES, lines.items())):
    shown = sorted(found)
    value = np.array([found[x].value for x in shown])
    bounds = np.array([[found[x].value - found[x].low, found[x].high - found[x].value]
                       for x in shown]).T  # fmt: skip
    x = np.array(shown, float) + 0.04 * (i - (len(lines) - 1) / 2)  # whiskers side by side
    axis.errorbar(x, value, bounds, color=color, marker='o', markersize=4, capsize=2.5, label=name)
  axis.set_xticks(sorted({x for found in lines.values() for x in found}))
  axis.set_xlabel(x_label)
  axis.set_ylabel(y_label)
  axis.set_ylim(bottom=0)
  legend_above(figure, axis)
  return as_png(figure)


def progress_steps(kinds: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
  """Share of attempts [%] that reached at least so much progress: {kind: (percent, share)}."""
  figure, axes = panels(len(kinds), width=2.6, height=2.1, columns=4)
  for axis, (kind, (percent, share)) in zip(axes, kinds.items()):
    axis.step(percent, 100 * np.asarray(share), where='pre', color=BLUE, linewidth=1.8)
    axis.set_title(kind)
    axis.set_xlabel('progress [%]')
    axis.set_xlim(0, 100)
    axis.set_ylim(-3, 103)
  return as_png(figure)


def error_bars(groups: Mapping[str, Mapping[str, Interval]]) -> bytes:
  """One panel of horizontal bars with intervals per group: {group: {kind: Interval}}."""
  tallest = max(len(found) for found in groups.values())
  figure, axes = panels(len(groups), width=3.4, height=0.9 + 0.27 * tallest, columns=3)
  for axis, (group, found) in zip(axes, groups.items()):
    values = np.array([x.value for x in found.values()])
    bounds = np.array([[x.value - x.low, x.high - x.value] for x in found.values()]).T
    axis.barh(range(len(found)), values, color=BLUE, height=0.7)
    axis.errorbar(values, range(len(found)), xerr=bounds, fmt='none', ecolor=INK, capsize=2.5,
                  elinewidth=1)  # fmt: skip
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.grid(visible=False, axis='y')
    axis.set_title(group)
  return as_png(figure)


def latency_histogram(parts: Mapping[str, Sequence[float]], bins: int = 40) -> bytes:
  """One row per part: calls by milliseconds on its own axis, the median marked."""
  figure, axes = panels(len(parts), width=3.4, height=1.5, columns=3)
  for axis, (name, times) in zip(axes, parts.items()):
    axis.hist(np.asarray(times), bins=min(bins, max(5, len(times) // 4)), color=BLUE)
    axis.axvline(np.median(times), color=ORANGE, linewidth=1.6)
    axis.set_title(name)
    axis.set_xlabel('ms')
  return as_png(figure)


def tolerance_curves(panels_of: Mapping[str, Mapping[str, Mapping[float, float]]]) -> bytes:
  """F1 by tolerance, one panel per unit: {unit: {name: {tolerance: F1}}}."""
  figure, axes = panels(len(panels_of), width=5.2, height=2.9, columns=2)
  for axis, (title, lines) in zip(axes, panels_of.items()):
    for color, (name, found) in zip((BLUE, GREY), lines.items()):
      axis.plot(list(found), list(found.values()), color=color, marker='o', markersize=3.5,
                label=name)  # fmt: skip
    axis.set_title(title)
    axis.set_ylim(0, 1.03)
  legend_above(figure, axes[0])
  return as_png(figure)


def boundary_timeline(
  episodes: Mapping[str, Mapping[str, Sequence[float]]], lengths: Sequence[float]
) -> bytes:
  """Events of episodes as bars cut at their boundaries.

  Args:
    episodes: {name: {'true' | 'proposed' | ...: boundaries in s}}; lengths: s of each episode.
  """
  rows = [(name, kind, cuts) for name, kinds in episodes.items() for kind, cuts in kinds.items()]
  figure, (axis,) = panels(1, width=9.6, height=0.7 + 0.26 * len(rows), columns=1)
  ends = dict(zip(episodes, lengths, strict=True))
  kinds = list(next(iter(episodes.values())))
  for place, (name, kind, cuts) in enumerate(rows):
    edges = np.concatenate([[0.0], np.sort(np.asarray(cuts, float)), [ends[name]]])
    color = (INK, BLUE, ORANGE)[kinds.index(kind)]
    for i, (start, end) in enumerate(zip(edges, edges[1:])):
      axis.barh(place, end - start, left=start, height=0.72, color=color, alpha=(0.85, 0.5)[i % 2])
  axis.set_yticks(range(len(rows)), [f'{name} {kind}' for name, kind, _ in rows])
  axis.invert_yaxis()
  axis.set_xlabel('s')
  axis.grid(visible=False, axis='y')
  return as_png(figure)


def horizon_curves(
  curves: Mapping[str, Mapping[str, Sequence[float]]], fps: float | None = None
) -> bytes:
  """One panel per metric: {metric: {predictor: [T]}} over the frames of the window (NaN =
  observed)."""
  figure, axes = panels(len(curves), width=5.2, height=2.9, columns=2)
  for axis, (metric, predictors) in zip(axes, curves.items()):
    for color, (name, values) in zip(SERIES, predictors.items()):
      values = np.asarray(values, np.float64)
      x = np.arange(len(values)) / (fps or 1)
      axis.plot(x, values, color=color, linewidth=1.8, marker='o', markersize=3, label=name)
    axis.set_title(metric)
    axis.set_xlabel('s after the observation' if fps else 'frame')
  legend_above(figure, axes[0])
  return as_png(figure)


def panels(count: int, width: float, height: float, columns: int):
  """A figure with `count` styled axes, at most `columns` side by side."""
  columns = min(columns, count)
  rows = -(-count // columns)
  figure = Figure(figsize=(width * columns, height * rows), layout='constrained')
  FigureCanvasAgg(figure)
  axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
  for axis in axes:
    axis.spines[['top', 'right']].set_visible(False)
    axis.spines[['left', 'bottom']].set_color(LINE)
    axis.grid(visible=True, color=LINE, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(which='both', colors=SOFT, labelsize=8, length=0)
    axis.xaxis.label.set(color=SOFT, size=9)
    axis.yaxis.label.set(color=SOFT, size=9)
    axis.title.set(color=INK, size=10)
  return figure, axes


def legend_above(figure: Figure, axis) -> None:
  """One legend for the whole figure, outside the axes."""
  handles, labels = axis.get_legend_handles_labels()
  figure.legend(
    handles, labels, loc='outside upper left', ncols=len(labels), frameon=False, fontsize=9
  )


def as_png(figure: Figure) -> bytes:
  out = io.BytesIO()
  figure.savefig(out, format='png', dpi=150, facecolor='white')
  return out.getvalue()
