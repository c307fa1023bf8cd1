"""The data report: what it says is what the store holds, and what is missing it says."""

import dataclasses
import html.parser
import re

import numpy as np
import pytest

from wallwm_jax.data import clean, sync
from wallwm_jax.data.build import build_store
from wallwm_jax.data.labels import Labels
from wallwm_jax.data.schema import CaptionSpan, EpisodeRecord, EventSpan, Quarantined
from wallwm_jax.data.store import EventStore
from wallwm_jax.evaluation import data_plots, data_report, page
from wallwm_jax.types import DataError

PIXELS = 32


class Page(html.parser.HTMLParser):
  """Text of every element by its tag, tables as rows of cells; checks that tags nest."""

  def __init__(self, text: str):
    super().__init__()
    self.raw, self.open, self.links, self.rows, self.words = text, [], [], [], []
    self.feed(text)
    assert not self.open, f'left open: {self.open}'

  def handle_starttag(self, tag, attrs):
    self.links += [value for name, value in attrs if name in ('src', 'href')]
    if tag == 'tr':
      self.rows.append([])
    if tag in ('td', 'th'):
      self.rows[-1].append('')
    if tag not in ('meta', 'img', 'br'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if 'style' in self.open:
      return
    self.words.append(data)
    if self.open and self.open[-1] in ('td', 'th'):
      self.rows[-1][-1] += data

  @property
  def text(self) -> str:
    return ''.join(self.words)

  def row(self, *begin: str) -> list[str]:
    """The rest of the one row of a table that begins so."""
    (found,) = [row for row in self.rows if row[: len(begin)] == list(begin)]
    return found[len(begin) :]


def make_poses(num_frames, seed):
  """float32 [T, 10]: rest, then strokes with pauses, no rotation, gripper half way."""
  rng = np.random.default_rng(seed)
  goals = rng.uniform(-0.15, 0.15, (num_frames // 12 + 3, 3))
  goals[1] = goals[0]
  s = np.clip(np.arange(12) / 8, 0, 1)
  s = s**3 * (10 - 15 * s + 6 * s**2)
  path = np.concatenate([a + s[:, None] * (b - a) for a, b in zip(goals, goals[1:])])
  poses = np.zeros((num_frames, 10), np.float32)
  poses[:, :3], poses[:, 3], poses[:, 7], poses[:, 9] = path[:num_frames], 1, 1, 0.5
  return poses


def make_frames(poses, seed):
  """A bright square where the hand is, over a noisy ground: uint8 [T, H, W, 3]."""
  rng = np.random.default_rng(seed)
  frames = rng.integers(60, 90, (len(poses), PIXELS, PIXELS, 3)).astype(np.uint8)
  for frame, (x, _, z) in zip(frames, poses[:, :3]):
    right, down = int(PIXELS / 2 + 70 * x), int(PIXELS / 2 - 70 * z)
    frame[max(down - 4, 0) : down + 4, max(right - 4, 0) : right + 4] = 255
  return frames


def make_episode(index=0, num_frames=48, late=0, **changes):
  """An episode of three events whose robot stream is `late` frames late."""
  poses = make_poses(num_frames + 10, index)
  state = poses[5 - late : 5 - late + num_frames]
  cuts = (0, num_frames // 3, num_frames // 2, num_frames - 1)
  fields = {
    'episode_id': f'episode-{index}',
    'source': 'made',
    'fps': 10.0,
    'views': ('front',),
    'frames': {'front': make_frames(poses[5 : 5 + num_frames], index)},
    'state': state,
    'actions': np.concatenate([state[1:], state[-1:]]),
    'events': tuple(
      EventSpan(a, b + 1, label, {'L1': f'{label} <{index}>'})
      for a, b, label in zip(cuts, cuts[1:], ('reach', 'grasp', 'lift'))
    ),
    'rig': 'table',
  }
  return EpisodeRecord(**fields | changes)


def make_store(path, items, **options):
  build_store(items, path, progress=False, **{'heldout': 0.0, **options})
  return EventStore(path)


def render(store, *args) -> Page:
  return Page(data_report.render(store, *args))


FIGURES = (
  'cluster_bars', 'count_bars', 'episode_trace', 'lag_dots', 'length_histogram', 'packed_rows',
  'residual_curves', 'sync_confidence', 'trajectories',
)  # fmt: skip


@pytest.fixture
def caught(monkeypatch):
  """What figures were asked to show, by name; nothing is drawn, which takes longest."""
  calls = {}
  dot = page.png(np.zeros((3, 3, 3), np.uint8))
  for name in FIGURES:
    monkeypatch.setattr(
      data_plots, name, lambda *args, name=name: calls.setdefault(name, []).append(args) or dot
    )
  return calls


def test_counts_are_those_of_the_ledger(tmp_path, caught):
  first = make_episode(0)
  blank = make_episode(3, frames={'front': np.zeros((48, PIXELS, PIXELS, 3), np.uint8)})
  far = make_episode(4).state + np.float32([9] + [0] * 9)
  broken = make_episode(4, state=far, actions=None)
  refused = [clean.clean(x) for x in (blank, broken)]
  assert all(isinstance(x, Quarantined) for x in refused)
  elsewhere = [Quarantined(f'other-{i}', 'elsewhere', f'expected {i} frames') for i in range(4)]
  again = make_episode(0, captions=(CaptionSpan('L3', 0, 48, 'another'),))
  items = [first, make_episode(1), make_episode(2), *refused, *elsewhere, again]
  shown = render(make_store(tmp_path / 'store', items))
  assert re.search(r'10 read\s*=\s*3 stored\s*\+\s*6 quarantined\s*\+\s*1 rejected', shown.text)
  assert shown.row('made') == ['6', '3', '2', '1']
  assert shown.row('elsewhere') == ['4', '0', '4', '0']
  assert shown.row('cleaning: blank_camera')[:3] == ['1', 'quarantined', 'episode-3']
  assert shown.row('cleaning: workspace')[:3] == ['1', 'quarantined', 'episode-4']
  assert shown.row('expected # frames') == [
    '4', 'quarantined', 'other-0, other-1, other-2 and 1 more', 'expected 0 frames'
  ]  # fmt: skip
  assert shown.row('duplicate id.')[:3] == ['1', 'rejected', 'episode-0']
  ((bars, _),) = caught['count_bars']
  assert bars == {'blank_camera': 1, 'frozen': 1, 'workspace': 1}


def test_a_reason_is_filed_under_every_check_that_failed():
  record = make_episode(0)
  state = record.state.copy()
  state[7, 0] = np.nan
  blank = {'front': np.zeros_like(record.frames['front'])}
  reason = clean.clean(dataclasses.replace(record, state=state, frames=blank)).reason
  found = data_report.checks_of(reason)
  assert {'cleaning: blank_camera', 'cleaning: invalid_state'} <= set(found)
  assert set(found) == {f'cleaning: {f.check}' for f in clean.findings(
    dataclasses.replace(record, state=state, frames=blank))}  # fmt: skip


@pytest.mark.parametrize(
  ('reason', 'check'),
  [
    ('sync: inconsistent: -3 frames from the lag of its rig, threshold 2', 'sync: inconsistent'),
    ('sync: rig weak: margin 0.01 over other lags, threshold 0.02', 'sync: rig weak'),
    ('sync: expected cameras and state of one length, got {}.', 'sync: streams cannot be compared'),
    ("episode 'a-1' of 'x': expected 4 frames, got 2.", 'expected # frames, got #.'),
    ("episode 'a-1': duplicate id.", 'duplicate id.'),
    ('clip.mp4: cut off at 0.5 s', 'clip.mp4: cut off at # s'),
  ],
)
def test_reasons_that_differ_in_numbers_are_one(reason, check):
  assert data_report.checks_of(reason) == [check]


def test_a_bare_store_makes_a_page_that_says_what_is_missing(tmp_path):
  store = make_store(tmp_path / 'store', [make_episode(0)])
  path = data_report.write_data_report(str(store.path), str(tmp_path / 'sub' / 'data.html'))
  text = (tmp_path / 'sub' / 'data.html').read_text()
  assert path == str(tmp_path / 'sub' / 'data.html')
  shown = Page(text)
  assert all(link.startswith(('#', 'data:image/')) for link in shown.links)
  for missing in (
    'No lag was estimated',
    'written without cleaning',
    'No segmentation was noted',
    'No cluster labels were given',
    'Captions are as the reader gave them',
  ):
    assert missing in shown.text, missing
  assert text == data_report.render(EventStore(store.path))  # the same from every run
  with pytest.raises(DataError, match='examples'):
    data_report.render(store, None, 0)


def test_video_alone_has_a_page(tmp_path, caught):
  record = make_episode(0, state=None, actions=None)
  shown = render(make_store(tmp_path / 'store', [record]))
  assert list(caught['episode_trace'][0][1]) == ['picture changes\n[grey levels]']
  assert 'no episode has a robot stream' in shown.text


def test_boundaries_and_captions_shown_are_those_of_the_record(tmp_path, caught):
  times = np.cumsum(np.random.default_rng(0).uniform(0.05, 0.2, 48))
  note = {'method': 'detector', 'boundaries': [16, 24], 'expected': [0.9, 0.3], 'forced': 1}
  record = make_episode(0, times=times, provenance={'segment': note})
  shown = render(make_store(tmp_path / 'store', [record]))
  ((seconds, _, spans, unsure),) = caught['episode_trace']
  np.testing.assert_allclose(seconds, times - times[0])
  expected = [(times[e.start] - times[0], times[e.end - 1] - times[0]) for e in record.events]
  np.testing.assert_allclose(spans, expected)
  np.testing.assert_allclose(unsure, [times[24] - times[0]])  # the less sure of the two
  for i, event in enumerate(record.events):
    assert f'{i + 1} · {times[event.start] - times[0]:.1f} s {event.captions["L1"]}' in shown.text
  assert shown.row('found by the detector') == ['1', '3', '2', '1']


def test_both_arms_are_drawn(tmp_path, caught):
  both = np.concatenate([make_poses(48, 0), make_poses(48, 1)], 1)
  render(make_store(tmp_path / 'store', [make_episode(0, state=both, actions=both)]))
  ((_, rows, _, _),) = caught['episode_trace']
  velocity = np.gradient(both[:, 10:13].astype(np.float64), 0.1, axis=0)
  speed = 100 * np.linalg.norm(velocity, axis=-1)
  np.testing.assert_allclose(rows['speed [cm/s]'][:, 1], speed, atol=1e-9)


def test_a_gap_between_captions_is_seen(tmp_path, caught):
  whole = tuple(CaptionSpan(level, 0, 48, f'all of {level}') for level in ('L3', 'L2'))
  halves = (CaptionSpan('L1', 0, 25, 'first half'), CaptionSpan('L1', 24, 48, 'second half'))
  fine = tuple(dataclasses.replace(x, level='L0', text='fine') for x in halves)
  told = ['given', 'template']
  note = {'caption': {'L3': ['given'], 'L2': ['given'], 'L1': told, 'L0': told}}
  nested = make_episode(0, captions=whole + halves + fine, provenance=note)
  good = render(make_store(tmp_path / 'good', [nested]))
  assert 'nested, no gaps' in good.text and 'class="gap"' not in good.raw
  assert '<div class="template">second half</div>' in good.raw
  assert good.row('L1 action')[:3] == ['1', '0', '1']
  late = dataclasses.replace(halves[1], start=30)
  torn = dataclasses.replace(nested, captions=(*whole, halves[0], late, *fine))
  bad = render(make_store(tmp_path / 'bad', [torn]))
  assert 'nested, no gaps' not in bad.text and 'gap at frames 25..29' in bad.text
  assert bad.raw.count('class="gap"') == 1


def test_lags_that_were_applied_and_what_is_left_of_them(tmp_path, caught):
  records = [make_episode(i, 96, late=3) for i in range(4)]
  render(make_store(tmp_path / 'raw', records))
  assert 'lag_dots' not in caught
  assert caught['residual_curves'][0][1] == {'table': 3}
  lag = sync.estimate([sync.motion(x) for x in records])
  assert lag.lags == {'front': 3}, 'the scene does not show what it should'
  odd = make_episode(4, 96, late=4)  # within what its rig allows
  aligned = [sync.align(x, lag) for x in (*records, odd)]
  shown = render(make_store(tmp_path / 'aligned', aligned))
  assert caught['residual_curves'][1][1] == {'table': 0}
  (((row,),),) = caught['lag_dots']
  assert row.lag == 3
  assert sorted(row.estimates) == [3, 3, 3, 3, 4]
  assert shown.row('table')[:3] == ['front +3', '5', '4 of 5']


def make_labels(store, path, uid=None):
  uid = store.column('uid') if uid is None else uid
  n = len(uid)
  vl, act = np.arange(n, dtype=np.int32) % 3 // 2, np.arange(n, dtype=np.int32) % 2
  distance = np.arange(n, dtype=np.float32)
  meta = {'format': 'wallwm-clusters', 'version': 1, 'store': store.digest}
  Labels(uid, vl, act, distance, distance, meta).save(path)
  return vl, act


def test_clusters_are_those_of_the_labels(tmp_path, caught):
  store = make_store(tmp_path / 'store', [make_episode(i) for i in range(5)], heldout=0.2)
  vl, _ = make_labels(store, tmp_path / 'labels')
  shown = render(store, tmp_path / 'labels')
  train = store.column('split') == 'train'
  sizes = np.bincount(vl[train])
  for cluster, size in enumerate(sizes):
    share = 100 * size / train.sum()
    assert f'cluster {cluster} · {size} training events · {share:.1f} % of them' in shown.text
  ((sides,),) = caught['cluster_bars']
  natural, drawn = sides['vision-language: 2 clusters']
  np.testing.assert_allclose(natural, sizes / sizes.sum())
  # Balanced: in proportion to the root of the count.
  np.testing.assert_allclose(drawn, sizes**0.5 / (sizes**0.5).sum(), atol=0.02)
  make_labels(store, tmp_path / 'other', store.column('uid') + np.uint64(1))
  with pytest.raises(DataError, match='not those of store'):
    render(store, tmp_path / 'other')


def test_everything_is_drawn_of_a_full_store(tmp_path):
  both = np.concatenate([make_poses(48, 0), make_poses(48, 1)], 1)
  note = {'sync': {'lags': {'front': 2}, 'deviation': -1, 'r': 0.8, 'evidence': 30.0}}
  items = [make_episode(i, state=both, actions=both, provenance=note) for i in range(2)]
  items.append(Quarantined('x', 'made', 'cleaning: frozen: stands still (1, threshold 0.5)'))
  store = make_store(tmp_path / 'store', items)
  make_labels(store, store.path / 'clusters' / 'default')  # found without being named
  shown = render(store)
  assert 'cluster 1 · 2 training events' in shown.text
  assert shown.raw.count('<figure>') == len(FIGURES) + 1  # two examples
  assert len(shown.raw) < 3e6


def test_packed_rows_add_up(tmp_path, caught):
  spans = tuple(EventSpan(a, a + 13, 'move') for a in (0, 12, 24))  # 12 steps: 1 + 3 latents
  items = [make_episode(i, events=spans) for i in range(3)]
  shown = render(make_store(tmp_path / 'store', items))
  ((filled, events, budget),) = caught['packed_rows']
  assert budget == 34
  np.testing.assert_array_equal(filled, 4 * events)
  assert events.max() == budget // 4 and (events < budget // 4).sum() <= 1
  assert f'{events.sum():,} draws (balanced over labels) fill {len(filled):,} rows' in shown.text
