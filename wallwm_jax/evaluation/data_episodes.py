"""Sections of the data report about single episodes: where they were cut, and what is said of
them."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence

import numpy as np

from wallwm_jax.data import signals
from wallwm_jax.data.caption import validate_levels
from wallwm_jax.data.records import EpisodeInfo
from wallwm_jax.data.schema import ARM_WIDTH, LEVELS, CaptionSpan, EpisodeRecord
from wallwm_jax.data.store import EventStore
from wallwm_jax.evaluation import data_plots, page
from wallwm_jax.types import DataError

MAX_EVENTS = 20  # shown of an example
_NAMES = {'L3': 'task', 'L2': 'subtask', 'L1': 'action', 'L0': 'segment', 'human': 'by a person'}
_METHODS = {
  'given': 'annotated',
  'detector': 'found by the detector',
  'fixed': 'cut at fixed lengths',
  '': 'as the reader gave them',
}
_SOURCES = {
  'given': 'given with the data',
  'vlm': 'vision-language model',
  'template': 'told from motion',
  '': 'not noted',
}
_TRACK, _LETTER = 900, 6.9  # px: width of a track, of a letter in it


def pick(store: EventStore, notes: Mapping[int, Mapping], count: int) -> list[int]:
  """Episodes to show: of every (source, method of segmentation) in turn, those of more than one
  event first."""
  events, sources = (store.column(name, 'episodes').tolist() for name in ('events', 'source'))
  seen: collections.Counter = collections.Counter()
  ranked = []
  for row in sorted(notes, key=lambda row: (events[row] < 2, row)):
    group = sources[row], _segment(notes[row]).get('method', '')
    ranked.append((events[row] < 2, seen[group], row))
    seen[group] += 1
  return sorted(row for _, _, row in sorted(ranked)[:count])


def first_frames(store: EventStore, row: int, most: int) -> EpisodeRecord:
  """The first `most` frames of an episode, without events, captions and calibration."""
  info = store.info(row)
  count = min(info.num_frames, most)
  streams = {
    name: None if getattr(info, name) is None else getattr(info, name)[:count]
    for name in ('state', 'actions')
  }
  frames = store.frames(row, np.arange(count), info.views)
  return EpisodeRecord(
    info.episode_id, info.source, info.fps, info.views, frames, **streams, events=(), rig=info.rig
  )


def events(
  title: str, store: EventStore, notes: Mapping[int, Mapping], shown: Sequence[int]
) -> str:
  """Counts by method, lengths, and examples with their boundaries."""
  methods = {row: str(_segment(found).get('method', '')) for row, found in notes.items()}
  counts = store.column('events', 'episodes')
  rows = []
  used = sorted(set(methods.values()), key=lambda m: [*_METHODS, m].index(m))
  for method in used:
    of = [row for row, own in methods.items() if own == method]
    segments = [_segment(notes[row]) for row in of]
    forced = sum(int(s.get('forced', 0)) for s in segments)
    bounds = sum(len(s.get('boundaries', ())) for s in segments)
    rows.append(
      (
        _METHODS.get(method, method),
        f'{len(of):,}',
        f'{int(counts[of].sum()):,}',
        f'{bounds:,}' if bounds else '–',
        f'{forced:,}' if bounds else '–',
      )
    )
  head = ('how events were found', 'episodes', 'events', 'boundaries set', 'below the threshold')
  owner, length = store.column('episode'), store.column('length')
  seconds = (length - 1) / store.column('fps', 'episodes')[owner]
  by_method = {}
  for method in used:
    inside = np.isin(owner, [row for row, own in methods.items() if own == method])
    by_method[_METHODS.get(method, method)] = seconds[inside]
  blocks = [
    page.table(head, rows),
    page.figure(data_plots.length_histogram(by_method), 'Lengths of the events.'),
    *(_example(store, row, notes[row]) for row in shown),
  ]
  if used == ['']:
    blocks.append(
      '<p class="soft">No segmentation was noted: events are as the reader gave them. '
      '<code>wallwm data build --prepare</code> finds those of episodes that have none.</p>'
    )
  return page.section(
    title,
    'Episodes are cut where the behaviour changes. Below, each example shows its speed, its '
    'gripper and every boundary (orange; dotted where the detector was below its threshold and had '
    'to cut), then the frame at which each event starts and its action caption.',
    *blocks,
  )


def _segment(found: Mapping) -> Mapping:
  note = found.get('segment')
  return note if isinstance(note, Mapping) else {}


def _seconds(info: EpisodeInfo) -> np.ndarray:
  """float64 [T] s since the first frame."""
  if info.times is None:
    return np.arange(info.num_frames) / info.fps
  return info.times - info.times[0]


def _example(store: EventStore, row: int, found: Mapping) -> str:
  info = store.info(row)
  at = _seconds(info)
  spans = [(float(at[e.start]), float(at[e.end - 1])) for e in info.events]
  note = _segment(found)
  ranked = sorted(zip(note.get('expected', ()), note.get('boundaries', ())))
  unsure = [float(at[b]) for _, b in ranked[: int(note.get('forced', 0))] if b < len(at)]
  trace = data_plots.episode_trace(at, _quantities(store, row, info), spans, unsure)
  task = next((s.text for s in info.captions if s.level in ('L3', 'human')), '')
  method = _METHODS.get(str(note.get('method', '')), str(note.get('method', '')))
  head = f'<h3>{f"“{page.escape(task)}”" if task else page.escape(info.episode_id)}</h3>'
  count = f'{len(info.events)} events' if len(info.events) > 1 else '1 event'
  text = (
    f'{count}, {method}; {at[-1]:.1f} s at {info.fps:g} Hz; camera {info.views[0]}. Episode '
    f'{info.episode_id} of {info.source}.'
  )
  return f'<div class="example">{head}{page.figure(trace, text)}{_strip(store, row, info)}</div>'


def _quantities(store: EventStore, row: int, info: EpisodeInfo) -> dict[str, np.ndarray]:
  """What is plotted over time, [T or less, arms]: how the robot moves, or of video alone how much
  the picture changes."""
  if info.state is None:
    view = info.views[0]
    change = signals.visual_motion(store.frames(row, np.arange(info.num_frames), [view])[view])
    return {'picture changes\n[grey levels]': np.pad(change, (1, 1), mode='edge')[:, None]}
  arms = info.state.reshape(len(info.state), -1, ARM_WIDTH).astype(np.float64)
  at = _seconds(info)
  velocity = np.gradient(arms[..., :3], at, axis=0)
  speed = 100 * np.linalg.norm(velocity, axis=-1)
  return {'speed [cm/s]': speed, 'gripper\n(1 = open)': arms[..., 9]}


def _strip(store: EventStore, row: int, info: EpisodeInfo) -> str:
  """A card per event: the frame it starts with in the first view, number, time and caption."""
  view, at = info.views[0], _seconds(info)
  chosen = info.events[:MAX_EVENTS]
  frames = store.frames(row, np.array([e.start for e in chosen]), [view])[view]
  cards = ''
  for i, (event, frame) in enumerate(zip(chosen, frames)):
    text = event.captions.get('L1') or event.captions.get('L0') or event.label
    cards += film_card(frame, f'{i + 1} · {at[event.start]:.1f} s', text)
  rest = len(info.events) - len(chosen)
  more = f'<p class="soft">and {rest} more events</p>' if rest else ''
  return f'<div class="film">{cards}</div>{more}'


def film_card(frame: np.ndarray, label: str, text: str) -> str:
  """A frame uint8 [H, W, 3] with a label and its caption."""
  return (
    f'<div>{page.thumbnail(frame, text)}<b>{page.escape(label)}</b> '
    f'<span>{page.escape(text)}</span></div>'
  )


def captions(
  title: str, store: EventStore, notes: Mapping[int, Mapping], shown: Sequence[int]
) -> str:
  """Where captions came from, and the levels of one episode as nested bars."""
  text = (
    'Four levels, each without gaps and inside the one above: task (L3), subtask (L2), action '
    '(L1), segment (L0). What was given stays; the rest is asked of a model, or told from motion.'
  )
  infos = {row: store.info(row) for row in shown}
  levels = {row: len({s.level for s in _spans(info)}) for row, info in infos.items()}
  told = {row: len({x for of in _caption_note(notes[row]).values() for x in of}) for row in infos}
  row = max(levels, key=lambda r: (levels[r], told[r], len(_spans(infos[r])), -r))
  if not levels[row]:
    return page.section(
      title,
      text,
      '<p class="soft">There are no captions. <code>wallwm data build --prepare</code> tells them '
      'from motion.</p>',
    )
  blocks = [_caption_sources(store, notes)]
  if not any('caption' in found for found in notes.values()):
    blocks.append(
      '<p class="soft">Captions are as the reader gave them; <code>wallwm data build --prepare'
      '</code> fills in the levels that are missing.</p>'
    )
  return page.section(title, text, *blocks, _levels(infos[row], notes[row]))


def _caption_sources(store: EventStore, notes: Mapping[int, Mapping]) -> str:
  """Captions by level and source, and how many events have one."""
  made: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  for found in notes.values():
    for level, sources in _caption_note(found).items():
      made[level].update(sources)
  rows = []
  for level in LEVELS:
    texts = store.events[level]
    said = int((store.column(level) != '').sum())
    if not said and not made[level]:
      continue
    distinct = len(set(texts.unique().to_pylist()) - {'', None})
    counts = [made[level][source] for source in ('given', 'vlm', 'template')]
    cells = [f'{count:,}' if made[level] else '–' for count in counts]
    rows.append(
      (f'{level} {_NAMES[level]}', *cells, f'{said:,} of {len(store.events):,}', f'{distinct:,}')
    )
  head = ('level', 'given', 'from a model', 'told from motion', 'events that have one', 'distinct')
  return page.table(head, rows)


def _caption_note(found: Mapping) -> Mapping[str, Sequence[str]]:
  note = found.get('caption')
  if not isinstance(note, Mapping):
    return {}
  return {level: sources for level, sources in note.items() if isinstance(sources, (list, tuple))}


def _spans(info: EpisodeInfo) -> list[CaptionSpan]:
  """Captions of an episode; of one without any, those of its events."""
  return list(info.captions) or [
    CaptionSpan(level, e.start, e.end, said)
    for e in info.events
    for level, said in e.captions.items()
  ]


def _levels(info: EpisodeInfo, found: Mapping) -> str:
  """Tracks, one below the other; what does not fit into its bar is numbered and written out."""
  at, last = _seconds(info), info.num_frames - 1
  tracks, written = '', []
  for level in ('human', 'L3', 'L2', 'L1', 'L0'):
    spans = sorted((s for s in _spans(info) if s.level == level), key=lambda s: (s.start, s.end))
    if not spans:
      continue
    sources = _caption_note(found).get(level, ())
    sources = sources if len(sources) == len(spans) else [''] * len(spans)
    cells, columns, reached = '', [], 0
    for i, (span, source) in enumerate(zip(spans, sources)):
      after = spans[i + 1].start if i + 1 < len(spans) else last
      stop = after if after in (span.end - 1, span.end) else min(span.end - 1, last)
      start = max(span.start, reached)
      if start > reached:
        columns.append(start - reached)
        cells += '<div class="gap">gap</div>'
      columns.append(max(stop - start, 0.001))
      reached = max(stop, start)
      fits = _fits(span.text, _TRACK * (stop - start) / max(last, 1))
      label = span.text if fits else f'{len(written) + 1}'
      cells += f'<div class="{source or "other"}">{page.escape(label)}</div>'
      if not fits:
        time = f'{at[span.start]:.1f} – {at[span.end - 1]:.1f} s'
        written.append((len(written) + 1, level, time, span.text, _SOURCES.get(source, source)))
    if reached < last:
      columns.append(last - reached)
      cells += '<div class="gap">gap</div>'
    widths = ' '.join(f'minmax(0,{width:g}fr)' for width in columns)
    tracks += (
      f'<div class="name"><b>{level}</b> {_NAMES[level]}</div>'
      f'<div class="track" style="grid-template-columns:{widths}">{cells}</div>'
    )
  head = f'<h3>Episode {page.escape(info.episode_id)}, {at[-1]:.1f} s {_verdict(info)}</h3>'
  used = [source for source in _SOURCES if f'class="{source or "other"}"' in tracks]
  key = ' '.join(
    f'<span class="key {source or "other"}"></span>{_SOURCES[source]}' for source in used
  )
  table = page.table(('', 'level', 'time', 'caption', 'source'), written, text=(1, 3, 4))
  rest = f'<p class="soft">What did not fit into its bar:</p>{table}' if written else ''
  return f'{head}<div class="levels">{tracks}</div><p class="soft">{key}</p>{rest}'


def _fits(text: str, width: float) -> bool:
  """Whether a text can be read in a bar of `width` px, in up to four lines."""
  inner = width - 10
  longest = max((len(word) for word in re.split(r'\s+', text)), default=0)
  return longest * _LETTER <= inner and len(text) * _LETTER <= 3.2 * inner


def _verdict(info: EpisodeInfo) -> str:
  """A tag that says whether the levels are nested and gap-free."""
  fields = {k: v for k, v in vars(info).items() if k not in ('num_frames', 'sizes')}
  length = {view: np.empty((info.num_frames, 0, 0, 3), np.uint8) for view in info.views}
  try:
    validate_levels(EpisodeRecord(frames=length, **fields))
  except DataError as error:
    why = str(error).rpartition('captions of ')[2]
    return f'<span class="tag bad">{page.escape(why)}</span>'
  return '<span class="tag good">nested, no gaps</span>'
