"""Moves the robot stream of an episode against its cameras by whole frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from wallwm_jax.data.schema import EpisodeRecord


def shift(record: EpisodeRecord, lags: Mapping[str, int]) -> EpisodeRecord:
  """The record with state row t + lags[view] at frame t of every view, trimmed to what all have;
  events of which fewer than two frames are left go."""
  n, first = record.num_frames, lags[record.views[0]]
  start, stop = max(0, *lags.values()), n + min(0, *lags.values())  # robot rows that are kept
  rows = slice(start, stop)
  kept = slice(start - first, stop - first)  # frames of the first view
  frames = {view: x[start - lags[view] : stop - lags[view]] for view, x in record.frames.items()}
  calibration = {
    view: camera
    if camera is None or camera.extrinsics.ndim == 2
    else dataclasses.replace(camera, extrinsics=camera.extrinsics[rows])
    for view, camera in record.calibration.items()
  }
  return dataclasses.replace(
    record,
    frames=frames,
    state=record.state[rows],
    actions=None if record.actions is None else record.actions[rows],
    times=None if record.times is None else record.times[kept],
    calibration=calibration,
    events=_trimmed(record.events, kept, 2),
    captions=_trimmed(record.captions, kept, 1),
  )


def _trimmed(spans: Sequence[Any], kept: slice, shortest: int) -> tuple[Any, ...]:
  """Spans that have `shortest` frames or more in what is kept, counted from its first frame."""
  out = []
  for span in spans:
    start, end = max(span.start, kept.start), min(span.end, kept.stop)
    if end - start >= shortest:
      out.append(dataclasses.replace(span, start=start - kept.start, end=end - kept.start))
  return tuple(out)
