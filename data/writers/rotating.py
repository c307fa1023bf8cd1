"""Files that are closed and numbered on when they are large: chunk-000/file-000, file-001, ..."""

from __future__ import annotations

import fractions
import pathlib

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.reformatter import VideoReformatter

from wallwm_jax.data.x264 import SAME_BYTES
from wallwm_jax.errors import DataError

CODECS = {  # FFmpeg's encoder and options that make each frame cheap to find
  'h264': ('libx264', {'preset': 'medium', 'bf': '0'} | SAME_BYTES),
  'av1': ('libsvtav1', {'preset': '12'}),
}


class Place:
  """chunk and file numbers, and the path they stand for."""

  def __init__(self, root: pathlib.Path, template: str, per_chunk: int, **names: str):
    self._root, self._template, self._per_chunk, self._names = root, template, per_chunk, names
    self.number = -1

  @property
  def indices(self) -> dict[str, int]:
    """{'chunk_index', 'file_index'} of the current file."""
    chunk, file = divmod(self.number, self._per_chunk)
    return {'chunk_index': chunk, 'file_index': file}

  def advance(self) -> pathlib.Path:
    """The path of the next file; its folder exists."""
    self.number += 1
    path = self._root / self._template.format(**self.indices, **self._names)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class RotatingParquet:
  """Tables appended as row groups; a file of more than `limit` bytes is followed by the next."""

  def __init__(self, place: Place, schema: pa.Schema, limit: int):
    self.place, self._schema, self._limit = place, schema, limit
    self._sink = self._writer = None

  def start(self) -> dict[str, int]:
    """Indices of the file that the next table goes to."""
    if self._writer is not None and self._sink.tell() > self._limit:
      self.close()
    if self._writer is None:
      self._sink = pa.OSFile(str(self.place.advance()), 'wb')
      self._writer = pq.ParquetWriter(self._sink, self._schema, compression='snappy')
    return self.place.indices

  def write(self, table: pa.Table) -> None:
    self.start()
    self._writer.write_table(table)

  def close(self) -> None:
    """Writes the footer."""
    if self._writer is not None:
      self._writer.close()
      self._sink.close()
      self._writer = None


class RotatingVideo:
  """Clips appended to one stream of one camera; a file of more than `limit` bytes is followed by
  the next, between clips."""

  def __init__(self, place: Place, codec: str, fps: float, crf: int, gop: int, limit: int):
    self.place, self._limit = place, limit
    self._encoder, options = CODECS[codec]
    self._options = options | {'crf': str(crf), 'g': str(gop)}
    self._fps = fractions.Fraction(fps).limit_denominator(100_000)
    self._container, self._frames, self._bytes = None, 0, 0
    self._convert = VideoReformatter()

  def write(self, frames: np.ndarray) -> dict[str, float]:
    """Appends uint8 [T, H, W, 3]; returns its file's indices and its bounds in that file, s.

    Raises:
      DataError: an odd height or width, which YUV 4:2:0 cannot hold.
    """
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
      raise DataError(f'expected an even height and width for video, got {height}x{width}.')
    if self._container is not None and self._bytes > self._limit:
      self.close()
    if self._container is None:
      self._open(height, width)
    first = self._frames
    for image in frames:
      frame = av.VideoFrame.from_ndarray(image, format='rgb24')
      frame = self._convert.reformat(frame, format='yuv420p', threads=1)
      frame.pts, frame.time_base = self._frames, 1 / self._fps
      self._mux(frame)
      self._frames += 1
    bounds = (float(count / self._fps) for count in (first, self._frames))
    return self.place.indices | dict(zip(('from_timestamp', 'to_timestamp'), bounds))

  def _open(self, height: int, width: int) -> None:
    self._container = av.open(str(self.place.advance()), 'w')
    self._stream = self._container.add_stream(self._encoder, rate=self._fps, options=self._options)
    self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, 'yuv420p'
    self._stream.codec_context.thread_count = 1  # another number gives other bytes
    self._stream.time_base = 1 / self._fps
    self._frames = self._bytes = 0

  def _mux(self, frame: av.VideoFrame | None) -> None:
    packets = self._stream.encode(frame)
    self._bytes += sum(packet.size for packet in packets)
    self._container.mux(packets)

  def close(self) -> None:
    """Writes what the encoder still holds, and the index."""
    if self._container is not None:
      self._mux(None)
      self._container.close()
      self._container = None
