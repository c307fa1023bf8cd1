"""How the pixels of a block become bytes: `Zstd` keeps them exactly, `H264` keeps what the eye sees
in a small part of the space.

H.264 clips are yuv420p, BT.601 limited range, one closed group of pictures per block without
B-frames: packet k is frame k, and a window decodes only its blocks, up to its last frame. Cameras
of one size are stacked into one tall picture (twice the speed at 64x64). There is no container:
opening one costs more than decoding a block.

RGB is made by one pinned converter (`_to_rgb`), which rounds towards zero: against the exact
formula of `geometry.yuv` a channel is 0 to 3 levels lower, 0.8 on average.
"""

from __future__ import annotations

import fractions
import threading
from collections.abc import Iterator, Mapping
from typing import Protocol

import av
import numpy as np
import pyarrow as pa
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import Interpolation, VideoReformatter

from wallwm_jax.data.x264 import SAME_BYTES
from wallwm_jax.types import ConfigError, CorruptStoreError, DataError

Frames = dict[str, np.ndarray]  # by camera
Sizes = Mapping[str, tuple[int, int]]  # (H, W) by camera

LUMA_LIMIT = 32  # levels: a mean error beyond this is another picture, not a compressed one
_SEI = 'filter_units=remove_types=6'  # drops the encoder's note about itself, 0.6 KB a clip
_COLOURS = {'src_colorspace': 'ITU601', 'dst_colorspace': 'ITU601', 'threads': 1}
_local = threading.local()  # decoders are costly to make and cannot be shared by threads


class Codec(Protocol):
  """Encodes and decodes the frames of one block."""

  def settings(self) -> dict:
    """What the manifest says about it."""

  def encode(self, frames: Mapping[str, np.ndarray]) -> dict:
    """The payload of uint8 [n, H, W, 3] per camera. Raises DataError for what it cannot hold."""

  def decode(
    self, payload: dict, count: int, sizes: Sizes, where: np.ndarray, wanted: np.ndarray,
    out: Frames,
  ) -> None:
    """Fills out[view][where] with frames `wanted` (ascending) of a block of `count`.

    Args:
      out: uint8 [N, H, W, 3], or I420 planes [N, H * 3/2, W] where the codec has them.

    Raises:
      CorruptStoreError: the payload is not that of such a block.
      ConfigError: planes of a codec without.
    """


def make_codec(name: str, crf: int | None = None) -> Codec:
  """Codec 'zstd', or 'h264' of a constant rate factor (0..51, default 20).

  Raises:
    ConfigError: unknown name, or a rate factor outside its range or of a codec without one.
  """
  if name == 'h264':
    return H264(20 if crf is None else crf)
  if name != 'zstd' or crf is not None:
    raise ConfigError(f"codec: expected 'zstd', or 'h264' with a crf, got {name!r}, crf={crf}.")
  return Zstd()


class Zstd:
  """Raw RGB under zstd 3: real 48x48 frames decode at ~2 GB/s per core and take half their size
  (measured, pyarrow 26)."""

  _codec = pa.Codec('zstd', compression_level=3)

  def settings(self) -> dict:
    return {'name': 'zstd'}

  def encode(self, frames: Mapping[str, np.ndarray]) -> dict:
    return {
      view: self._codec.compress(np.ascontiguousarray(x).tobytes(), asbytes=True)
      for view, x in frames.items()
    }

  def decode(self, payload, count, sizes, where, wanted, out) -> None:
    for view, target in out.items():
      if target.ndim != 4:
        raise ConfigError('planes: a zstd store holds RGB. Build it with codec h264, or read RGB.')
      shape = (count, *sizes[view], 3)
      try:
        raw = self._codec.decompress(payload[view], int(np.prod(shape)))
        pixels = np.frombuffer(raw, np.uint8).reshape(shape)
      except (KeyError, OSError, ValueError, pa.ArrowException) as error:
        raise CorruptStoreError(f'camera {view!r}: expected {shape} pixels ({error!r})') from None
      if (np.diff(where) == 1).all() and target.flags.c_contiguous:
        into = target[where[0] : where[-1] + 1]
        np.take(pixels, wanted, 0, out=into, mode='clip')  # 'raise' would go through a copy
      else:
        target[where] = pixels[wanted]


class H264:
  """See the module docstring.

  Args:
    crf: constant rate factor of x264, 0 (best) .. 51.
  """

  def __init__(self, crf: int):
    if not 0 <= crf <= 51:
      raise ConfigError(f'crf: expected 0 (best) .. 51, got {crf}.')
    self._crf = crf

  def settings(self) -> dict:
    return {'name': 'h264', 'crf': self._crf, 'pixels': 'yuv420p', 'colours': 'bt601 limited'}

  def encode(self, frames: Mapping[str, np.ndarray]) -> dict:
    clips = []
    for size, views in _by_size({view: x.shape[1:3] for view, x in frames.items()}).items():
      if size[0] % 2 or size[1] % 2:
        raise DataError(
          f'cameras {views}: h264 halves the colours, so it expects even sizes, got '
          f'{size[0]}x{size[1]}. Store with codec zstd, or resize.'
        )
      tall = np.concatenate([frames[view] for view in views], axis=1)
      clips.append([views, _encode(tall, self._crf)])
    return {'clips': clips}

  def decode(self, payload, count, sizes, where, wanted, out) -> None:
    try:
      for views, packets in payload['clips']:
        if not any(view in out for view in views):
          continue
        height, width = sizes[views[0]]
        if len(packets) != count:
          raise CorruptStoreError(f'cameras {views}: expected {count} frames, got {len(packets)}')
        places = np.searchsorted(wanted, np.arange(wanted[-1] + 2))
        tall = (height * len(views), width)
        for i, picture in enumerate(_decode(packets[: wanted[-1] + 1], tall)):
          here = where[places[i] : places[i + 1]]
          if len(here):
            _unstack(picture, views, height, here, out)
    except (av.FFmpegError, KeyError, TypeError, ValueError) as error:
      raise CorruptStoreError(f'clip cannot be decoded ({error!r})') from None


def _by_size(sizes: Sizes) -> dict[tuple[int, int], list[str]]:
  groups: dict[tuple[int, int], list[str]] = {}
  for view, size in sizes.items():
    groups.setdefault(tuple(size), []).append(view)
  return groups


def _encode(tall: np.ndarray, crf: int) -> list[bytes]:
  """Packets of uint8 [n, H, W, 3], one per frame, decoded once to see that they are."""
  encoder = av.CodecContext.create('libx264', 'w')
  encoder.height, encoder.width = tall.shape[1:3]
  encoder.pix_fmt, encoder.time_base = 'yuv420p', fractions.Fraction(1, 25)
  encoder.options = {
    'crf': str(crf), 'preset': 'veryfast', 'tune': 'fastdecode', 'bf': '0', 'g': str(len(tall)),
    'sc_threshold': '0', 'threads': '1',
  } | SAME_BYTES
  planes, packets = [], []
  for i, rgb in enumerate(tall):
    picture = _to_yuv(rgb)
    picture.pts = i
    planes.append(_plane(picture.planes[0], tall.shape[2]).copy())
    packets += encoder.encode(picture)
  packets += encoder.encode(None)
  strip = BitStreamFilterContext(_SEI, 'h264')
  stripped = [bytes(p) for packet in packets for p in strip.filter(packet)]
  lumas = [_plane(p.planes[0], p.width).copy() for p in _decode(stripped, tall.shape[1:3])]
  error = max(np.abs(a.astype(np.int16) - b).mean() for a, b in zip(planes, lumas, strict=True))
  if error > LUMA_LIMIT:
    raise DataError(
      f'h264 at crf {crf} changes the luma of a frame by {error:.0f} levels on average, expected '
      f'at most {LUMA_LIMIT}. Lower crf, or store with codec zstd.'
    )
  return stripped


def _decode(packets: list[bytes], size: tuple[int, int]) -> Iterator[av.VideoFrame]:
  """One picture per packet; raises CorruptStoreError where that is not what comes out."""
  decoders = _local.__dict__.setdefault('decoders', {})
  decoder = decoders.pop(size, None) or _decoder()  # back again only after a clip without error
  decoder.flush_buffers()
  for i, packet in enumerate(packets):
    pictures = decoder.decode(av.Packet(packet))
    if len(pictures) != 1 or (pictures[0].height, pictures[0].width) != tuple(size):
      got = [(p.height, p.width) for p in pictures]
      raise CorruptStoreError(f'clip: expected one picture of {size} at frame {i}, got {got}')
    yield pictures[0]
  if len(decoders) >= 16:
    decoders.clear()
  decoders[size] = decoder


def _decoder() -> av.CodecContext:
  decoder = av.CodecContext.create('h264', 'r')
  decoder.thread_count = 1
  decoder.flags |= av.codec.context.Flags.low_delay
  return decoder


def _reformatter() -> VideoReformatter:
  """PyAV's own default makes a scaler, and asks for its threads, once per frame."""
  if not hasattr(_local, 'reformatter'):
    _local.reformatter = VideoReformatter()
  return _local.reformatter


def _to_yuv(rgb: np.ndarray) -> av.VideoFrame:
  picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format='rgb24')
  return _reformatter().reformat(
    picture, format='yuv420p', interpolation=Interpolation.AREA, src_color_range='JPEG',
    dst_color_range='MPEG', **_COLOURS,
  )  # fmt: skip


def _to_rgb(picture: av.VideoFrame) -> av.VideoFrame:
  return _reformatter().reformat(
    picture, format='rgb24', interpolation=Interpolation.POINT, src_color_range='MPEG',
    dst_color_range='JPEG', **_COLOURS,
  )  # fmt: skip


def _plane(plane, width: int) -> np.ndarray:
  """uint8 [rows, width] without the padding of the plane's lines; no copy."""
  return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, :width]


def _unstack(
  picture: av.VideoFrame, views: list[str], height: int, here: np.ndarray, out: Frames
) -> None:
  """Writes a tall picture to out[view][here] of each of its views that is there."""
  width, sample = picture.width, next(iter(out.values()))
  if sample.ndim == 4:
    rgb = _plane(_to_rgb(picture).planes[0], 3 * width)
  else:
    y, u, v = (_plane(p, w) for p, w in zip(picture.planes, (width, width // 2, width // 2)))
  for i, view in enumerate(views):
    if view not in out:
      continue
    target = out[view][here[0]]
    if sample.ndim == 4:
      target.reshape(height, 3 * width)[:] = rgb[i * height : (i + 1) * height]
    else:
      target[:height] = y[i * height : (i + 1) * height]
      colour = target[height:].reshape(2, height // 2, width // 2)
      half = slice(i * height // 2, (i + 1) * height // 2)
      colour[0], colour[1] = u[half], v[half]
    for other in here[1:]:
      out[view][other] = target
