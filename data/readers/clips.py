"""Exact stretches of video files."""

from __future__ import annotations

import math
import pathlib

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from wallwm_jax.errors import DataError


def decode_clip(
  path: pathlib.Path, start: float, end: float, length: int, fps: float
) -> tuple[np.ndarray, np.ndarray]:
  """Frames of a stretch of a video, which may hold other episodes before and behind it.

  Args:
    start, end: s within the file; end may be infinite. length: frames there must be. fps: Hz.

  Returns:
    RGB frames uint8 [length, H, W, 3] and their times float64 [length] in s after `start`.

  Raises:
    DataError: no such file, not decodable, or another number of frames.
  """
  try:
    frames, times = _decode(path, start, end, length, 0.5 / fps)
  except (av.FFmpegError, IndexError) as error:
    raise DataError(f'{path}: cannot be decoded ({error}); truncated or no video?') from None
  if len(times) != length:
    raise DataError(
      f'{path}: expected {length} frames from {start:.3f} s to {end:.3f} s, decoded {len(times)} '
      '(truncated, or wrong bounds).'
    )
  return frames, np.asarray(times)


def _decode(path: pathlib.Path, start: float, end: float, length: int, slack: float):
  frames, times = None, []
  convert = VideoReformatter()  # one for all frames: it keeps the conversion it has set up
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    if start > 0:
      tick = math.floor(start / stream.time_base + 0.5) - 1
      container.seek(max(tick, 0), stream=stream, backward=True)
    for frame in container.decode(stream):
      time = float(frame.pts * stream.time_base)
      if time < start - slack:
        continue
      if time >= end - slack:
        break
      if len(times) < length:
        image = convert.reformat(frame, format='rgb24').to_ndarray()
        if frames is None:
          frames = np.empty((length, *image.shape), np.uint8)
        frames[len(times)] = image
      times.append(time - start)
  return frames, times


def video_facts(path: pathlib.Path) -> dict:
  """Size, codec, pixel format, rate (Hz) and frame count (None if the container has none) of a
  video's header; raises DataError."""
  try:
    with av.open(str(path)) as container:
      stream = container.streams.video[0]
      codec = stream.codec_context
      return {
        'size': [codec.height, codec.width],
        'codec': codec.codec.canonical_name,
        'pix_fmt': codec.pix_fmt,
        'fps': float(stream.average_rate),
        'frames': stream.frames or None,
      }
  except (av.FFmpegError, IndexError) as error:
    raise DataError(f'{path}: cannot be opened as a video ({error}).') from None
