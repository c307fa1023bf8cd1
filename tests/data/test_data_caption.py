"""Captions: four nested levels from what is given, from a captioner, and from motion."""

import dataclasses

import numpy as np
import pytest
from episode_factory import make_episode, make_poses
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax.data.caption import Caption, CaptionSettings, caption, validate_levels
from wallwm_jax.data.primitives import Primitive, describe, merge_runs, motion_cuts
from wallwm_jax.data.schema import CaptionSpan, EventSpan, validate
from wallwm_jax.data.traces import objects_of, phrasings
from wallwm_jax.types import ConfigError, DataError

UPRIGHT = [1, 0, 0, 0, 1, 0]


def poses(positions, grips):
  """[T, 10] upright poses."""
  positions = np.asarray(positions, float)
  grips = np.broadcast_to(np.asarray(grips, float), len(positions))
  rows = np.tile(UPRIGHT, (len(positions), 1))
  return np.concatenate([positions, rows, grips[:, None]], 1).astype(np.float32)


def way(*steps):
  """Poses along straight legs: (frames, (x, y, z) m it moves by, grip it ends with)."""
  points, grips = [np.zeros(3)], [1.0]
  for frames, move, grip in steps:
    for k in range(1, frames + 1):
      points.append(points[-1] + np.asarray(move) / frames)
      grips.append(grips[-1] + (grip - grips[-1]) / (frames - k + 1))
  return poses(points, grips)


PICK = way((12, (0.2, 0, 0), 1), (6, (0, 0, 0), 0), (12, (0, 0, 0.15), 0), (6, (0, 0, 0), 1))
PICK_EVENTS = (EventSpan(0, 13, 'x'), EventSpan(12, 19, 'x'), EventSpan(18, 37, 'x'))


def episode(state=PICK, events=PICK_EVENTS, **changes):
  # Frames are cheap: one view of the least size.
  return make_episode(
    lengths=(len(state),),
    views=('front',),
    size=(8, 8),
    **{'state': state, 'actions': None, 'events': events, 'captions': ()} | changes,
  )


def texts(record, level):
  return [span.text for span in record.captions if span.level == level]


# Primitives


@pytest.mark.parametrize(
  'state, text, label',
  [
    (way((10, (0.12, 0, 0), 1)), 'move the gripper forward by 12 cm', 'move forward'),
    (way((10, (0, -0.3, 0), 1)), 'move the gripper right by 30 cm', 'move right'),
    (way((10, (-0.1, 0, 0.06), 1)), 'move the gripper back and up by 12 cm', 'move back'),
    (way((5, (0, 0, 0), 0)), 'close the gripper', 'close'),
    (way((5, (0, 0, 0.001), 1)), 'hold still', 'pause'),
    (
      way((10, (0, 0, -0.04), 0)),
      'move the gripper down by 4 cm and close the gripper',
      'close',
    ),
    (way((8, (0.1, 0, 0), 1), (8, (-0.1, 0, 0), 1)), 'move the gripper to and fro', 'move'),
  ],
)
def test_motion_in_words(state, text, label):
  assert describe(state, 'droid') == Primitive(text, label)


def test_directions_follow_the_frame_of_the_data_set():
  state = way((10, (0.12, 0, 0), 1))
  assert describe(state, 'tabletop').text == 'move the gripper right by 12 cm'


def test_a_turn_has_an_axis_and_an_angle():
  state = poses(np.zeros((9, 3)), 1)
  for k, angle in enumerate(np.linspace(0, np.pi / 2, 9)):
    c, s = np.cos(angle), np.sin(angle)
    state[k, 3:9] = [c, s, 0, -s, c, 0]
  assert describe(state, 'droid').text == 'turn the gripper about the vertical axis by 90 degrees'


def test_things_are_named_where_they_are_known():
  carried = describe(PICK[18:31], 'droid', held='the red cube', wanted='the red cube')
  assert carried == Primitive('carry the red cube up by 15 cm', 'carry up')
  closed = describe(PICK[12:19], 'droid', wanted='the red cube')
  assert closed.text == 'close the gripper on the red cube'
  opened = describe(PICK[30:], 'droid', held='the red cube')
  assert opened.text == 'open the gripper and release the red cube'


def test_of_two_arms_those_that_move_are_told():
  still, moving = poses(np.zeros((13, 3)), 1), PICK[:13]
  told = describe(np.concatenate([still, moving], 1), 'droid')
  assert told == Primitive('move the gripper forward by 20 cm with arm 2', 'move forward')
  assert describe(np.concatenate([still, still], 1), 'droid').label == 'pause'


def test_motion_changes_where_the_way_turns():
  state = way((15, (0.15, 0, 0), 1), (15, (0, 0.15, 0), 1))
  (cut,) = motion_cuts(state, 4)
  assert abs(cut - 15) <= 1


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9))
def test_merged_runs_are_long_enough_and_real(labels, shortest):
  labels = np.array(labels)
  cuts = merge_runs(labels, shortest)
  lengths = np.diff([0, *cuts, len(labels)])
  assert len(cuts) == 0 or lengths.min() >= shortest
  assert set(cuts.tolist()) <= set((np.flatnonzero(np.diff(labels)) + 1).tolist())
  if shortest == 1:
    assert len(cuts) == (np.diff(labels) != 0).sum()


def test_a_short_run_between_equal_ones_joins_them():
  assert merge_runs(np.array([1] * 6 + [2] * 2 + [1] * 6 + [3] * 5), 3).tolist() == [14]


# Levels


def test_a_silent_episode_is_told_from_its_motion():
  record = caption(episode())
  validate(record)
  validate_levels(record)
  assert texts(record, 'L1') == [
    'move the gripper forward by 20 cm',
    'close the gripper',
    'move the gripper up by 15 cm and open the gripper',
  ]
  assert [t.split(' by')[0] for t in texts(record, 'L0')[-2:]] == [
    'move the gripper up',
    'open the gripper',
  ]
  assert texts(record, 'L3') == [', then '.join(texts(record, 'L1'))]
  assert [e.label for e in record.events] == ['x'] * 3
  assert all(e.flags == ('template',) for e in record.events)
  assert record.provenance['caption']['L1'] == ['template'] * 3


def test_given_captions_stay_and_their_levels_get_their_names():
  given_spans = (
    CaptionSpan('task', 0, 37, 'pick up the red cube'),
    CaptionSpan('Action', 0, 13, 'reach the red cube'),
    CaptionSpan('human', 3, 9, 'careful'),
  )
  events = (EventSpan(0, 13, 'unlabelled'), *PICK_EVENTS[1:])
  record = caption(episode(events=events, captions=given_spans))
  validate_levels(record)
  assert texts(record, 'L3') == ['pick up the red cube']
  assert texts(record, 'human') == ['careful']
  assert texts(record, 'L1')[:2] == ['reach the red cube', 'close the gripper on the red cube']
  assert [e.flags for e in record.events] == [(), ('template',), ('template',)]
  assert [e.label for e in record.events] == ['reach', 'x', 'x']
  assert record.provenance['caption']['L3'] == ['given']
  assert record.provenance['caption']['L1'] == ['given', 'template', 'template']
  assert record.events[0].captions['L1'] == 'reach the red cube'


def test_captioning_twice_changes_nothing_but_the_sources():
  once = caption(episode(captions=(CaptionSpan('L3', 0, 37, 'pick up the red cube'),)))
  twice = caption(once)
  assert twice.captions == once.captions
  assert [e.captions for e in twice.events] == [e.captions for e in once.events]


def test_what_people_say_is_the_task_where_none_is_given():
  record = caption(episode(captions=(CaptionSpan('human', 0, 37, 'Grab the red cube'),)))
  assert texts(record, 'L3') == ['Grab the red cube']
  assert record.provenance['caption']['L3'] == ['given']


def test_a_release_ends_a_subtask():
  state = np.concatenate([PICK, PICK[1:] + np.float32([0.3, 0.3, 0.0, *[0] * 7])])
  starts = [0, 12, 18, 36, 48, 54]
  events = tuple(EventSpan(a, b + 1, 'x') for a, b in zip(starts, [*starts[1:], 72]))
  record = caption(episode(state, events))
  validate_levels(record)
  assert [(s.start, s.end) for s in record.captions if s.level == 'L2'] == [(0, 37), (36, 73)]


def retry(distance):
  """Closes, opens, goes on by `distance` m, and closes again."""
  return way(
    (6, (0.1, 0, 0), 1),
    (5, (0, 0, 0), 0),
    (5, (0, 0, 0), 1),
    (6, (0, distance, 0), 1),
    (5, (0, 0, 0), 0),
    (8, (0, 0, 0.1), 0),
  )


@pytest.mark.parametrize('distance, again', [(0.02, True), (0.3, False)])
def test_a_second_grasp_at_the_place_of_the_first_is_a_recovery(distance, again):
  starts = [0, 6, 11, 16, 22, 27]
  events = tuple(EventSpan(a, b + 1, 'x') for a, b in zip(starts, [*starts[1:], 35]))
  record = caption(episode(retry(distance), events))
  flagged = [e.start for e in record.events if 'recovery' in e.flags]
  assert flagged == ([16, 22] if again else [])
  recovered = {s.start for s in record.captions if s.text.startswith('recover: ')}
  assert bool(recovered) == again and all(16 <= start < 27 for start in recovered)
  assert not any(t.startswith('recover') for t in texts(record, 'L1'))


def test_a_given_recovery_is_named_as_one():
  events = (
    PICK_EVENTS[0],
    dataclasses.replace(PICK_EVENTS[1], flags=('recovery',)),
    PICK_EVENTS[2],
  )
  record = caption(episode(events=events))
  assert [s.start for s in record.captions if s.text.startswith('recover: ')] == [12]


def test_video_without_words_says_so_and_with_a_task_says_that():
  silent = caption(_video(()))
  assert texts(silent, 'L1') == ['unknown action'] * 3
  assert all('no_caption' in e.flags for e in silent.events)
  told = caption(_video((CaptionSpan('L3', 0, 37, 'fold the towel'),)))
  assert texts(told, 'L0') == ['fold the towel'] * 3
  assert all(e.flags == ('template',) for e in told.events)


def _video(captions):
  return dataclasses.replace(episode(), state=None, captions=captions)


def test_phrasings_are_of_the_asked_kind_and_the_same_every_time():
  record = episode(captions=(CaptionSpan('L3', 0, 37, 'pick up the red cube'),))
  for kind in ('train', 'heldout'):
    one, two = (caption(record, CaptionSettings(phrasing=kind)) for _ in range(2))
    assert one.captions == two.captions
    assert texts(one, 'L3')[0] in getattr(phrasings('pick up the red cube'), kind)
    for event, plain in zip(one.events, caption(record).events):
      assert event.captions['L1'] in getattr(phrasings(plain.captions['L1']), kind)


SPANS = st.lists(
  st.tuples(st.sampled_from(['L3', 'L2', 'L1', 'L0']), st.integers(0, 38), st.integers(1, 39)),
  max_size=8,
)


@settings(deadline=None, max_examples=60)
@given(SPANS, st.lists(st.integers(2, 36), unique=True, max_size=5), st.booleans(), st.booleans())
def test_any_record_ends_up_nested_and_without_gaps(spans, cuts, gap, video):
  edges = [0, *sorted(cuts), 39]
  events = [EventSpan(a, b + 1, 'x') for a, b in zip(edges, edges[1:])]
  if gap and len(events) > 2:
    del events[1]
  captions = tuple(CaptionSpan(lv, a, min(a + n, 40), f'{lv} {a}') for lv, a, n in spans)
  record = episode(make_poses(40, 3), tuple(events), captions=captions)
  record = dataclasses.replace(record, state=None) if video else record
  done = caption(record)
  validate(done)
  validate_levels(done)
  assert [(e.start, e.end) for e in done.events] == [(e.start, e.end) for e in events]


# A captioner


class Names:
  """Names events by their first frame, and remembers what it was asked."""

  def __init__(self, confidence=0.9, levels=('L3', 'L1', 'L0')):
    self.confidence, self.levels, self.calls = confidence, levels, []

  def __call__(self, requests):
    self.calls.append(list(requests))
    return [
      {level: Caption(f'{level} at {r.start}', self.confidence) for level in self.levels}
      for r in requests
    ]


def test_a_captioner_is_asked_in_batches_for_what_is_missing():
  names = Names()
  record = episode(captions=(CaptionSpan('L1', 0, 13, 'reach the red cube'),))
  done = caption(record, CaptionSettings(batch=2, frames=3), names)
  validate_levels(done)
  assert [len(call) for call in names.calls] == [2, 1]
  first = names.calls[0][0]
  assert first.wanted == ('L3', 'L2', 'L0') and first.known == {'L1': 'reach the red cube'}
  assert first.frames['front'].shape == (3, 8, 8, 3)
  assert first.frames['front'][:, 0, 0, 0].tolist() == [0, 6, 12]
  assert names.calls[0][1].previous == 'reach the red cube'
  assert first.motion == 'move the gripper forward by 20 cm'
  assert texts(done, 'L1') == ['reach the red cube', 'L1 at 12', 'L1 at 18']
  assert texts(done, 'L0') == ['L0 at 0', 'L0 at 12', 'L0 at 18']
  assert done.provenance['caption']['L1'] == ['given', 'vlm', 'vlm']
  assert done.provenance['caption']['L2'] == ['template']
  assert not any('template' in e.flags for e in done.events)


def test_the_surest_answer_names_what_several_events_share():
  class Growing(Names):
    def __call__(self, requests):
      return [{'L3': Caption(f'task {r.start}', 1 - r.start / 50)} for r in requests]

  assert texts(caption(episode(), captioner=Growing()), 'L3') == ['task 0']


def test_answers_of_low_confidence_are_not_used():
  done = caption(episode(), CaptionSettings(min_confidence=0.5), Names(confidence=0.4))
  assert done.captions == caption(episode()).captions


def test_a_captioner_must_answer_every_request():
  with pytest.raises(DataError, match='one answer of the captioner for each of 3 events, got 0'):
    caption(episode(), captioner=lambda requests: [])


# Refusals


def test_an_episode_without_events_is_refused():
  with pytest.raises(DataError, match="'episode-0': no events"):
    caption(episode(events=()))


@pytest.mark.parametrize(
  'spans, message',
  [
    ({'L2': [(0, 37)], 'L1': [(0, 37)], 'L0': [(0, 37)]}, 'level L3: expected frames 0..36'),
    ({'L1': [(0, 10), (12, 37)]}, 'level L1: gap at frames 10..11'),
    ({'L1': [(0, 10), (8, 37)]}, 'level L1: frames 8..9 are captioned twice'),
    ({'L2': [(0, 20)]}, 'level L2: expected to end with frame 36, the last ends with frame 19'),
    (
      {'L2': [(0, 20), (20, 37)], 'L1': [(0, 22), (22, 37)]},
      'level L1: frames 0..21 .*of level L2',
    ),
    ({'L0': [(2, 37)]}, 'level L0: gap at frames 0..1'),
  ],
)
def test_bad_levels_are_named_with_their_frames(spans, message):
  whole = {} if 'L3: exp' in message else dict.fromkeys(('L3', 'L2', 'L1', 'L0'), [(0, 37)])
  captions = [
    CaptionSpan(level, a, b, 'text') for level, where in (whole | spans).items() for a, b in where
  ]
  with pytest.raises(DataError, match=message):
    validate_levels(episode(captions=tuple(captions)))


@pytest.mark.parametrize(
  'change, message',
  [
    ({'min_confidence': 1.5}, 'min_confidence'),
    ({'segment_frames': 1}, 'segment_frames'),
    ({'batch': 0}, 'batch'),
    ({'frames': 0}, 'frames'),
    ({'retry_distance': -1}, 'retry_distance'),
    ({'phrasing': 'free'}, 'phrasing'),
  ],
)
def test_bad_settings(change, message):
  with pytest.raises(ConfigError, match=message):
    CaptionSettings(**change)


@pytest.mark.parametrize(
  'text, things',
  [
    ('pick up the puck and place it at the goal', ('the puck',)),
    ('Pick up the red cube, then open the drawer.', ('the red cube',)),
    ('pick up the salt and pepper', ('the salt and pepper',)),
    ('put the carrot on the plate', ('the carrot', 'the plate')),
  ],
)
def test_the_first_of_two_instructions_names_the_thing(text, things):
  assert objects_of(text) == things
