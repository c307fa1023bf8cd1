"""What a record has and LeRobot has no place for, as one JSON text per episode.

Names, clocks, exact event bounds, captions, calibration, pixel masks and provenance. Poses and
frames are LeRobot's own.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from wallwm_jax.data.readers.spec import DatasetSpec
from wallwm_jax.data.schema import Calibration, CaptionSpan, EpisodeRecord, EventSpan
from wallwm_jax.errors import DataError


def pack(record: EpisodeRecord) -> str:
  """The JSON text of everything but frames, state, actions and fps."""
  calibration = {
    view: c and {'intrinsics': c.intrinsics.tolist(), 'extrinsics': c.extrinsics.tolist()}
    for view, c in record.calibration.items()
  }
  masks = {view: None if m is None else _pack_mask(m) for view, m in record.pixel_mask.items()}
  return json.dumps(
    {
      'episode_id': record.episode_id,
      'source': record.source,
      'rig': record.rig,
      'times': None if record.times is None else record.times.tolist(),
      'events': [
        dataclasses.asdict(event) | {'captions': dict(event.captions)} for event in record.events
      ],
      'captions': [list(dataclasses.astuple(span)) for span in record.captions],
      'calibration': calibration,
      'pixel_mask': masks,
      'provenance': dict(record.provenance),
    }
  )


def unpack(text: str, spec: DatasetSpec, views: tuple[str, ...]) -> dict[str, Any]:
  """Fields of EpisodeRecord; what the spec says itself (name, captions, events) wins.

  Raises:
    DataError: not a text of `pack`.
  """
  try:
    x = json.loads(text)
    fields = {
      'episode_id': x['episode_id'],
      'source': spec.name or x['source'],
      'rig': x['rig'],
      'times': None if x['times'] is None else np.array(x['times'], np.float64),
      'calibration': {v: _calibration(c) for v, c in x['calibration'].items() if v in views},
      'pixel_mask': {v: _unpack_mask(m) for v, m in x['pixel_mask'].items() if v in views},
      'provenance': x['provenance'],
    }
    if spec.events is None:
      fields['events'] = tuple(EventSpan(**e | {'flags': tuple(e['flags'])}) for e in x['events'])
    if spec.captions is None:
      fields['captions'] = tuple(CaptionSpan(*span) for span in x['captions'])
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise DataError(f'the record carried along with the episode is damaged ({error!r}).') from None
  return fields


def _calibration(x: Mapping[str, Any] | None) -> Calibration | None:
  if x is None:
    return None
  return Calibration(*(np.array(x[name], np.float32) for name in ('intrinsics', 'extrinsics')))


def _pack_mask(mask: np.ndarray) -> dict[str, Any]:
  return {
    'shape': list(mask.shape),
    'bits': base64.b64encode(np.packbits(mask).tobytes()).decode('ascii'),
  }


def _unpack_mask(x: Mapping[str, Any] | None) -> np.ndarray | None:
  if x is None:
    return None
  bits = np.frombuffer(base64.b64decode(x['bits'], validate=True), np.uint8)
  height, width = x['shape']
  return np.unpackbits(bits, count=height * width).reshape(height, width).astype(bool)
