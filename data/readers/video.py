"""Plain multi-view video folders: action-free episodes for the video tower."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import av
import numpy as np

from wallwm_jax.data import images
from wallwm_jax.data.schema import EpisodeRecord, EventSpan, Quarantined
from wallwm_jax.errors import DataError

SUFFIXES = ('.mp4', '.mkv', '.webm', '.avi', '.mov')


class VideoReader:
  """Iterates over episodes of synchronised camera videos as EpisodeRecord | Quarantined.

  Args:
    source: a folder of videos (one episode, one file per camera, the stem is the view's name) or
      of such folders.
    image_size: (H, W) stored; frames are letterboxed and the borders recorded in pixel_mask.
    fps: frames per second to keep, at most the recorded rate (None keeps all).
    event_frames: nothing marks the events, so an episode is cut into spans of this many frames.

  Raises:
    DataError: no video below `source`.
  """

  def __init__(
    self,
    source: str | os.PathLike,
    image_size: tuple[int, int] = (96, 160),
    fps: float | None = None,
    event_frames: int = 65,
  ):
    self._source = pathlib.Path(source)
    self._size, self._fps, self._event_frames = tuple(image_size), fps, event_frames
    if event_frames < 2:
      raise DataError(f'event_frames: expected at least 2, got {event_frames}.')
    self._folders = video_folders(self._source)
    if not self._folders:
      raise DataError(
        f'{self._source}: expected a folder of videos {SUFFIXES}, or of such folders; found none.'
      )

  def __len__(self) -> int:
    return len(self._folders)

  def __iter__(self) -> Iterator[EpisodeRecord | Quarantined]:
    return self.starting_at(0)

  def starting_at(self, count: int) -> Iterator[EpisodeRecord | Quarantined]:
    """The episodes after the first `count`, which are not decoded."""
    for folder in self._folders[count:]:
      try:
        yield self._read(folder)
      except (DataError, av.FFmpegError) as error:
        yield Quarantined(folder.name, self._source.name, str(error))

  def _read(self, folder: pathlib.Path) -> EpisodeRecord:
    frames, masks, rates = {}, {}, {}
    for path in video_files(folder):
      frames[path.stem], masks[path.stem], rates[path.stem] = self._decode(path)
    if len(set(rates.values())) > 1:
      raise DataError(f'cameras differ in frame rate: {rates} Hz')
    count = min(map(len, frames.values()))
    return EpisodeRecord(
      episode_id=folder.name,
      source=self._source.name,
      fps=next(iter(rates.values())),
      views=tuple(frames),
      frames=frames,
      state=None,
      actions=None,
      events=fixed_spans(count, self._event_frames),
      calibration={view: None for view in frames},
      pixel_mask=masks,
    )

  def _decode(self, path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Letterboxed frames [T, H, W, 3], their mask [H, W], and their rate in Hz."""
    with av.open(str(path)) as container:
      stream = container.streams.video[0]
      native, promised = float(stream.average_rate), stream.frames
      rate = native if self._fps is None else self._fps
      if rate > native * 1.001:
        raise DataError(f'{path.name}: asked for {rate} Hz, recorded at {native:.3f} Hz')
      kept, seen, size = [], 0, None
      for frame in container.decode(stream):
        if int(seen * rate / native + 1e-6) == len(kept):  # the first frame at or after k / rate
          image = frame.to_ndarray(format='rgb24')
          size = image.shape[:2]
          kept.append(images.letterbox(image[None], self._size)[0])
        seen += 1
    if promised and seen != promised:
      raise DataError(f'{path.name}: decoded {seen} of {promised} frames (truncated?)')
    if not kept:
      raise DataError(f'{path.name}: no frames')
    return np.stack(kept), images.letterbox_mask(size, self._size), rate


def fixed_spans(num_frames: int, length: int) -> tuple[EventSpan, ...]:
  """Consecutive spans of at most `length` frames that share their boundary frame, flagged
  'fixed_span'."""
  starts = range(0, max(num_frames - 1, 1), length - 1)
  return tuple(
    EventSpan(s, min(s + length, num_frames), 'unlabelled', {}, ('fixed_span',)) for s in starts
  )


def video_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The cameras of one episode."""
  return sorted(p for p in folder.glob('*') if p.suffix.lower() in SUFFIXES)


def video_folders(source: pathlib.Path) -> list[pathlib.Path]:
  """The episodes: `source` or folders in it, as far as they hold videos."""
  folders = [source, *sorted(p for p in source.glob('*') if p.is_dir())]
  return [folder for folder in folders if video_files(folder)]
