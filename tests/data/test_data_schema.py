import dataclasses

import numpy as np
import pytest
from episode_factory import make_episode

from wallwm_jax.data.schema import Calibration, CaptionSpan, EventSpan, validate
from wallwm_jax.types import DataError


def _with(x, index, value):
  x = x.copy()
  x[index] = value
  return x


def _calibration(extrinsics):
  return {'front': Calibration(np.eye(3, dtype=np.float32), extrinsics)}


GOOD = make_episode()
BAD = {
  'missing camera': (lambda e: {'views': (*e.views, 'rear')}, "missing camera 'rear'"),
  'unlisted camera': (lambda e: {'views': e.views[:2]}, "cameras .'wrist'. are not in views"),
  'no camera': (lambda e: {'views': (), 'frames': {}}, 'at least one camera'),
  'camera length': (
    lambda e: {'frames': {**e.frames, 'side': e.frames['side'][:-1]}},
    'lengths differ',
  ),
  'frame dtype': (
    lambda e: {'frames': {**e.frames, 'side': e.frames['side'].astype(np.float32)}},
    'uint8',
  ),
  'action rows': (lambda e: {'actions': e.actions[:-1]}, 'actions: expected 32 rows'),
  'action NaN': (
    lambda e: {'actions': _with(e.actions, (5, 2), np.nan)},
    r'actions: 1 NaN .* \[5, 2\]',
  ),
  'state inf': (lambda e: {'state': _with(e.state, (3, 9), np.inf)}, r'state: 1 NaN .* \[3, 9\]'),
  'not a rotation': (lambda e: {'state': _with(e.state, (3, 4), 3.0)}, 'rotation matrix'),
  'gripper range': (
    lambda e: {'actions': _with(e.actions, (3, 9), 1.5)},
    'gripper expected in 0..1',
  ),
  'action width': (lambda e: {'actions': e.actions[:, :7]}, 'float32 .T, 10 or 20.'),
  'no state': (lambda e: {'state': None}, 'without state'),
  'fps': (lambda e: {'fps': float('nan')}, 'fps'),
  'times length': (lambda e: {'times': np.arange(31.0)}, r'times: expected float64 .32.'),
  'times repeat': (
    lambda e: {'times': _with(np.arange(32.0), 4, 3.0)},
    'frame 4 is not after',
  ),
  'no events': (lambda e: {'events': ()}, 'at least one'),
  'event past the end': (
    lambda e: {'events': (EventSpan(0, 33, 'x'),)},
    'outside the episode of 32',
  ),
  'event of one frame': (lambda e: {'events': (EventSpan(4, 5, 'x'),)}, 'at least 2 frames'),
  'events out of order': (lambda e: {'events': e.events[::-1]}, 'out of order'),
  'events overlap': (
    lambda e: {'events': (EventSpan(0, 9, 'x'), EventSpan(7, 12, 'x'))},
    'out of order',
  ),
  'empty label': (lambda e: {'events': (EventSpan(0, 9, ''),)}, 'empty label'),
  'caption level': (
    lambda e: {'captions': (CaptionSpan('L7', 0, 2, 'x'),)},
    "unknown caption level .'L7'.",
  ),
  'calibration': (lambda e: {'calibration': _calibration(np.eye(4) * 2)}, 'not orthonormal'),
  'calibration length': (lambda e: {'calibration': _calibration(np.eye(4)[None])}, r'\[32, 4, 4\]'),
  'pixel mask': (
    lambda e: {'pixel_mask': {'front': np.ones((4, 4), bool)}},
    r'pixel_mask.* \[16, 16\]',
  ),
}


def test_valid_records_pass():
  validate(GOOD)
  validate(dataclasses.replace(GOOD, actions=None))
  validate(dataclasses.replace(GOOD, actions=None, state=None))
  validate(dataclasses.replace(GOOD, calibration=_calibration(np.tile(np.eye(4), (32, 1, 1)))))
  validate(
    dataclasses.replace(GOOD, events=(EventSpan(0, 9, 'x'), EventSpan(8, 12, 'x')))
  )  # a shared boundary


@pytest.mark.parametrize('name', BAD)
def test_invalid_records_are_refused_with_the_reason(name):
  change, message = BAD[name]
  record = dataclasses.replace(GOOD, **change(GOOD))
  with pytest.raises(DataError, match=message) as error:
    validate(record)
  assert 'episode-0' in str(error.value)


def test_event_captions_come_from_the_event_then_from_the_span_covering_most_of_it():
  record = dataclasses.replace(
    GOOD,
    captions=(
      CaptionSpan('L2', 0, 12, 'early'),
      CaptionSpan('L2', 12, 32, 'late'),
      CaptionSpan('L1', 0, 32, 'lost'),
    ),
  )
  assert record.event_captions(GOOD.events[0]) == {'L1': 'reach it, episode 0', 'L2': 'early'}
  assert record.event_captions(GOOD.events[1])['L2'] == 'late'  # frames 9..25


def test_event_uid_depends_on_the_span_and_the_episode():
  other = make_episode(1)
  uids = {record.event_uid(event) for record in (GOOD, other) for event in record.events}
  assert len(uids) == 6
  assert GOOD.event_uid(GOOD.events[0]) == make_episode(0).event_uid(GOOD.events[0])
