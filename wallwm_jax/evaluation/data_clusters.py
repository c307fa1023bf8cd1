"""Sections of the data report about all events together: clusters, balance and packed rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from wallwm_jax.config import DataConfig, ModelConfig
from wallwm_jax.data.balance import Balance, BalanceSettings, balance_metrics, balance_store
from wallwm_jax.data.labels import Labels, cluster_sizes, examples
from wallwm_jax.data.packing import PackedPlan
from wallwm_jax.data.sampler import EventPlan, cell_mass, count_latents, label_weights
from wallwm_jax.data.schema import ARM_WIDTH
from wallwm_jax.data.store import EventStore
from wallwm_jax.evaluation import data_episodes, data_plots, page
from wallwm_jax.geometry.poses import relative_pose
from wallwm_jax.types import DataError

LARGEST, SMALLEST, PICTURES = 6, 2, 6  # clusters shown of either end, events of each
MOTIONS, CURVES = 6, 24  # action clusters shown, trajectories of each
BUDGET = 34  # latent frames of a packed row
_HOW = 'Make them with <code>wallwm data cluster STORE</code> and name the folder with --clusters.'


def find_labels(
  store: EventStore, path: str | os.PathLike | None
) -> tuple[Labels | None, str]:
  """The labels at `path` (default: clusters/default of the store), or None and why not (HTML).

  Raises:
    DataError: those at a given path are not of this store; CorruptStoreError.
  """
  if path is not None:
    return Labels.load(path, store), ''
  default = store.path / 'clusters' / 'default'
  if not default.is_dir():
    return None, f'No cluster labels were given. {_HOW}'
  try:
    return Labels.load(default, store), ''
  except DataError as error:
    return None, f'{page.escape(error)} {_HOW}'


def clusters(title: str, store: EventStore, labels: Labels | None, why: str) -> str:
  """Sizes before and after balancing, examples of what is seen, motions of what is done."""
  text = (
    'Events are grouped twice: by what is seen and said (vision-language), and by how the arm '
    'moves (action). Both kinds of groups are balanced at once, so that what is common does not '
    'drown what is rare.'
  )
  if labels is None:
    return page.section(title, text, f'<p class="soft">{why}</p>')
  rows = _split(store)
  settings, balanced = _balanced(store, labels, rows)
  weights = balanced.weights
  vl, act = labels.vl[rows], labels.act[rows]
  natural = np.full(len(rows), 1 / len(rows))
  sides = {'vision-language': vl}
  if (act >= 0).any():
    sides['action'] = act
  shares = {
    f'{name}: {int(of.max()) + 1} clusters': (_shares(of, natural), _shares(of, weights))
    for name, of in sides.items()
  }
  before = balance_metrics(vl, act, natural, settings)
  return page.section(
    title,
    text,
    page.figure(
      data_plots.cluster_bars(shares),
      f'Grey: share of the {len(rows):,} training events. Blue: how often each is drawn.',
    ),
    _balance_table(before, balanced.metrics, settings, act),
    *_pictures(store, labels, rows, weights),
    *_motions(store, labels),
  )


def _split(store: EventStore) -> np.ndarray:
  """Rows of the event index that are trained on."""
  train = np.flatnonzero(store.column('split') == 'train')
  return train if len(train) else np.arange(len(store.events))


def _balanced(
  store: EventStore, labels: Labels, rows: np.ndarray
) -> tuple[BalanceSettings, Balance]:
  """The balance that training uses by default, or the closest compromise there is."""
  data = DataConfig()
  tau = 1 - data.balance
  settings = BalanceSettings(tau, tau, data.balance_cap, tolerance=1.0)
  return settings, balance_store(store, labels, rows, settings)


def _shares(labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Share of the weight of each cluster [K], of those events that have one."""
  inside = labels >= 0
  total = np.bincount(labels[inside], weights[inside])
  return total / total.sum()


def _balance_table(
  before: Mapping, after: Mapping, settings: BalanceSettings, act: np.ndarray
) -> str:
  names = {'vl': 'vision-language'}
  if (act >= 0).any():
    names['act'] = 'action' if (act >= 0).all() else 'action (none at all as one more)'
  rows = []
  for side, name in names.items():
    a, b = before[side], after[side]
    rows.append(
      (
        name,
        b['clusters'],
        f'{a["effective"]:.1f} → {b["effective"]:.1f}',
        f'{a["max_over_min"]:.1f} → {b["max_over_min"]:.1f}',
        f'{a["tv"]:.3f} → {b["tv"]:.3f}',
      )
    )
  head = ('clusters', 'number', 'effective number', 'largest / smallest', 'from target (TV)')
  note = (
    f'Drawn as in training by default: clusters in proportion to count^{settings.tau_vl:g}, no '
    f'event more than {settings.cap:g} times its share. The most repeated event is drawn '
    f'{after["max_repeat"]:.1f} times in as many draws as there are events, '
    f'{100 * after["unseen"]:.0f} % of the events not at all; effective sample size '
    f'{100 * after["kish"]:.0f} %.'
  )
  return page.table(head, rows) + f'<p class="soft">{page.escape(note)}</p>'


def _pictures(
  store: EventStore, labels: Labels, rows: np.ndarray, weights: np.ndarray
) -> list[str]:
  """First frames of the events nearest to the centres of the largest and the smallest clusters."""
  count = int(labels.vl.max()) + 1
  chosen = sorted({*range(min(LARGEST, count)), *range(max(count - SMALLEST, 0), count)})
  nearest = examples(labels, 'vl', PICTURES)
  sizes = np.bincount(labels.vl[rows], minlength=count)
  drawn = np.bincount(labels.vl[rows], weights, minlength=count)
  blocks = [
    '<h3>What vision-language clusters show</h3>',
    '<p class="soft">First frames and captions of the events nearest to each centre'
    f'{f"; the {LARGEST} largest and {SMALLEST} smallest" if count > len(chosen) else ""}.</p>',
  ]
  for cluster in chosen:
    cards = ''.join(_event_card(store, int(row)) for row in nearest[cluster])
    label = (
      f'<b>cluster {cluster}</b> · {sizes[cluster]:,} training events · '
      f'{100 * sizes[cluster] / len(rows):.1f} % of them, {100 * drawn[cluster]:.1f} % of the draws'
    )
    blocks.append(f'<div class="example"><p>{label}</p><div class="film">{cards}</div></div>')
  return blocks


def _event_card(store: EventStore, row: int) -> str:
  event = store.events.slice(row, 1).to_pylist()[0]
  info = store.info(event['episode'])
  view = info.views[0]
  frame = store.frames(event['episode'], np.array([event['start']]), [view])[view][0]
  said = next((event[level] for level in ('L1', 'L0', 'L2', 'L3') if event[level]), event['label'])
  return data_episodes.film_card(frame, '', said)


def _motions(store: EventStore, labels: Labels) -> list[str]:
  """Trajectories of the largest action clusters, over one another."""
  if not (labels.act >= 0).any():
    return ['<p class="soft">There are no action clusters: no episode has actions.</p>']
  sizes = cluster_sizes(labels)['act']
  nearest = examples(labels, 'act', CURVES)
  columns: dict[str, Sequence[data_plots.Trajectory]] = {}
  for cluster in range(min(MOTIONS, len(sizes))):
    group = [t for row in nearest[cluster].tolist() for t in _trajectory(store, row)]
    columns[f'{cluster}: {sizes[cluster]:,} events'] = group
  return [
    '<h3>How action clusters move</h3>',
    page.figure(
      data_plots.trajectories(columns),
      f'The {len(columns)} largest of {len(sizes)} action clusters, up to {CURVES} events each: '
      'measured position of the hand from where it was at the start of the event (black dot), in '
      'its own axes of then; orange dots are ends.',
    ),
  ]


def _trajectory(store: EventStore, row: int) -> list[data_plots.Trajectory]:
  """One per arm."""
  start, end = (int(store.column(name)[row]) for name in ('start', 'end'))
  info = store.info(int(store.column('episode')[row]))
  state = info.state[start:end].astype(np.float64)
  moved = relative_pose(state[:1], state).reshape(len(state), -1, ARM_WIDTH)
  seconds = np.arange(len(state)) / info.fps
  return [
    data_plots.Trajectory(seconds, moved[:, arm, :3], moved[:, arm, 9])
    for arm in range(moved.shape[1])
  ]


def packing(title: str, store: EventStore, labels: Labels | None) -> str:
  """Fill of the rows that are planned first, and how many events they hold."""
  rows = _split(store)
  rate, stride = ModelConfig.steps_per_latent, DataConfig.stride
  latents = count_latents(store.column('length')[rows], rate, stride)
  costs = 1 + np.clip(latents, 1, BUDGET - 1)
  if labels is None:
    weights, cells = label_weights(store.codes('label')[1][rows], DataConfig.balance)
    drawn = 'over labels'
  else:
    _, balanced = _balanced(store, labels, rows)
    weights, cells = balanced.weights, balanced.cells
    drawn = 'over clusters'
  dense, mass = cell_mass(weights, cells)
  planned = PackedPlan(EventPlan(dense, mass, key=0), costs, BUDGET, key=0).block(0)
  filled = np.add.reduceat(costs[planned.events], np.append(0, planned.ends[:-1]))
  events = np.diff(planned.ends, prepend=0)
  padded = costs[planned.events].mean() / costs.max()
  cut = int((latents > BUDGET - 1).sum())
  result = (
    f'{len(planned.events):,} draws (balanced {drawn}) fill {len(filled):,} rows of {BUDGET} '
    f'latent frames to {100 * filled.mean() / BUDGET:.1f} %, {events.mean():.1f} events in each. '
    f'One event per row, padded to the longest, would fill {100 * padded:.1f} %.'
  )
  notes = [f'<p class="main">{page.escape(result)}</p>']
  if cut:
    notes.append(
      f'<p class="soft">{cut:,} events are longer than a row ({rate * (BUDGET - 1)} steps) and are '
      'cut at its end.</p>'
    )
  return page.section(
    title,
    f'Events of different lengths share rows of a fixed number of latent frames (data.pack = '
    f'{BUDGET}). An event costs 1 + its steps / {rate}; every draw is in exactly one row.',
    *notes,
    page.figure(
      data_plots.packed_rows(filled, events, BUDGET), 'The rows of the first block of the plan.'
    ),
  )
