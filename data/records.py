"""How an episode becomes bytes: one header record, then one record per block of 16 frames.

A record is a 20-byte frame (magic, version, episode row, block, crc32c of the payload) and a
msgpack payload. The checksum and the address make a flipped bit or a misplaced record an error,
never a picture; the index repeats the checksum, so that a record which was written anew is one too.
Blocks are separate records, so reading a window reads and decodes only the blocks it needs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import google_crc32c
import msgpack
import numpy as np

from wallwm_jax.data.clips import Codec
from wallwm_jax.data.schema import Calibration, CaptionSpan, EpisodeRecord, EventSpan
from wallwm_jax.types import CorruptStoreError

BLOCK_FRAMES = 16
HEADER = -1  # the block number of an episode's header record

_FRAME = struct.Struct('<4sIIiI')  # magic, version, episode row, block, crc32c
_MAGIC = b'WWE1'
_ARRAY = 1  # msgpack extension code of an ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class EpisodeInfo:
  """An episode without its pixels; fields as in EpisodeRecord, sizes: {view: (H, W)}."""

  episode_id: str
  source: str
  fps: float
  views: tuple[str, ...]
  num_frames: int
  sizes: Mapping[str, tuple[int, int]]
  state: np.ndarray | None
  actions: np.ndarray | None
  events: tuple[EventSpan, ...]
  calibration: Mapping[str, Calibration | None]
  pixel_mask: Mapping[str, np.ndarray | None]
  captions: tuple[CaptionSpan, ...]
  times: np.ndarray | None
  rig: str
  provenance: Mapping[str, Any]


def num_blocks(num_frames: int) -> int:
  return -(-num_frames // BLOCK_FRAMES)


def encode_header(record: EpisodeRecord, row: int) -> bytes:
  """The header record: everything but the pixels."""
  return seal(
    row,
    HEADER,
    {
      'episode_id': record.episode_id,
      'source': record.source,
      'fps': float(record.fps),
      'views': list(record.views),
      'num_frames': record.num_frames,
      'sizes': {view: list(record.frames[view].shape[1:3]) for view in record.views},
      'state': record.state,
      'actions': record.actions,
      'events': [
        dataclasses.asdict(event) | {'captions': record.event_captions(event)}
        for event in record.events
      ],
      'calibration': {
        view: c and [c.intrinsics, c.extrinsics] for view, c in record.calibration.items()
      },
      'pixel_mask': dict(record.pixel_mask),
      'captions': [dataclasses.astuple(span) for span in record.captions],
      'times': record.times,
      'rig': record.rig,
      'provenance': dict(record.provenance),
    },
  )


def decode_header(raw: bytes, row: int, promised: int | None = None) -> EpisodeInfo:
  """Inverse of `encode_header`; raises CorruptStoreError."""
  x = unseal(raw, row, HEADER, promised)
  return EpisodeInfo(
    x['episode_id'],
    x['source'],
    x['fps'],
    tuple(x['views']),
    x['num_frames'],
    {view: tuple(size) for view, size in x['sizes'].items()},
    x['state'],
    x['actions'],
    tuple(EventSpan(**event | {'flags': tuple(event['flags'])}) for event in x['events']),
    {view: c and Calibration(*c) for view, c in x['calibration'].items()},
    x['pixel_mask'],
    tuple(CaptionSpan(*span) for span in x['captions']),
    x.get('times'),
    x.get('rig', ''),
    x.get('provenance', {}),
  )


def encode_block(record: EpisodeRecord, row: int, block: int, codec: Codec) -> bytes:
  """The record of frames 16 * block .. 16 * block + 15 of every view."""
  part = slice(block * BLOCK_FRAMES, (block + 1) * BLOCK_FRAMES)
  return seal(row, block, codec.encode({view: record.frames[view][part] for view in record.views}))


def block_length(info: EpisodeInfo, block: int) -> int:
  """Frames of one block."""
  return min(BLOCK_FRAMES, info.num_frames - block * BLOCK_FRAMES)


def content_hash(record: EpisodeRecord) -> str:
  """16 hex digits of all that a record holds, whatever codec it is stored with."""
  digest = hashlib.blake2b(encode_header(record, 0), digest_size=8)
  for view in record.views:
    digest.update(google_crc32c.value(record.frames[view].tobytes()).to_bytes(4))
  return digest.hexdigest()


def seal(row: int, block: int, payload: dict[str, Any]) -> bytes:
  """A record: its address, a checksum, and msgpack of a payload that may hold arrays."""
  body = msgpack.packb(payload, default=_pack_array)
  return _FRAME.pack(_MAGIC, 1, row, block, google_crc32c.value(body)) + body


def checksum(raw: bytes) -> int:
  """crc32c of the payload, as a record states it."""
  return _FRAME.unpack_from(raw)[-1]


def address(raw: bytes) -> tuple[int, int]:
  """(row, block) that a record states."""
  return _FRAME.unpack_from(raw)[2:4]


def unseal(raw: bytes, row: int, block: int, promised: int | None = None) -> dict[str, Any]:
  """Inverse of `seal`; raises CorruptStoreError.

  Args:
    promised: checksum that the record must have; None = only its own is known.
  """
  if len(raw) < _FRAME.size:
    raise CorruptStoreError(f'expected at least {_FRAME.size} bytes, got {len(raw)}')
  magic, version, got_row, got_block, crc = _FRAME.unpack_from(raw)
  if (magic, version) != (_MAGIC, 1):
    raise CorruptStoreError(
      f'expected a version 1 record {_MAGIC!r}, got {magic!r} version {version}'
    )
  if (got_row, got_block) != (row, block):
    raise CorruptStoreError(
      f'expected episode {row} block {block}, got episode {got_row} block {got_block}'
    )
  body = raw[_FRAME.size :]
  if google_crc32c.value(body) != crc:
    raise CorruptStoreError(f'crc32c of {len(body)} payload bytes does not match')
  if promised is not None and crc != promised:
    raise CorruptStoreError(
      f'crc32c {crc:08x} is sound but the index promises {promised:08x}: the record was written '
      'anew (cameras or episodes mixed up?)'
    )
  return msgpack.unpackb(body, ext_hook=_unpack_array)


def _pack_array(x: Any) -> msgpack.ExtType:
  if not isinstance(x, np.ndarray):
    raise TypeError(f'cannot store {type(x).__name__}')
  return msgpack.ExtType(
    _ARRAY, msgpack.packb([x.dtype.str, list(x.shape), np.ascontiguousarray(x).tobytes()])
  )


def _unpack_array(code: int, data: bytes) -> np.ndarray:
  dtype, shape, content = msgpack.unpackb(data)
  return np.frombuffer(content, np.dtype(dtype)).reshape(shape)
