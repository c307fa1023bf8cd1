"""TFRecord files and tf.train.Example, in NumPy.

A record is its length (8 bytes), the length's checksum (4), the payload, and the payload's checksum
(4). An Example is a protocol buffer, a map from names to one list of bytes, floats or integers.
"""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Iterator

import google_crc32c
import numpy as np

from wallwm_jax.errors import DataError

Values = np.ndarray | list[bytes]  # float32 [n], int64 [n] or n byte strings
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3  # fields of a Feature


def read_tfrecords(path: pathlib.Path) -> Iterator[bytes | None]:
  """Payloads of a TFRecord file; None for a record whose payload checksum fails.

  Raises:
    DataError: the file ends inside a record or a record's length is corrupt (nothing after it can
      be found).
  """
  with open(path, 'rb') as f:
    number = 0
    while header := f.read(12):
      if len(header) < 12:
        raise DataError(f'{path}: truncated in the header of record {number}.')
      length, length_crc = struct.unpack('<QI', header)
      if _masked_crc(header[:8]) != length_crc:
        raise DataError(f'{path}: length of record {number} does not match its checksum.')
      payload, tail = f.read(length), f.read(4)
      if len(payload) < length or len(tail) < 4:
        raise DataError(f'{path}: truncated in record {number} ({len(payload)} of {length} bytes).')
      yield payload if _masked_crc(payload) == struct.unpack('<I', tail)[0] else None
      number += 1


def parse_example(raw: bytes) -> dict[str, Values]:
  """{name: values} of a serialised tf.train.Example; raises DataError if it is none."""
  result = {}
  for features in _submessages(raw, 1):
    for entry in _submessages(features, 1):
      parts = dict((number, value) for number, _, value in _fields(entry))
      if not isinstance(parts.get(1), bytes) or not isinstance(parts.get(2, b''), bytes):
        raise DataError('an entry of the feature map has no name')
      result[parts[1].decode('utf-8', 'replace')] = _values(parts.get(2, b''))
  return result


def _masked_crc(data: bytes) -> int:
  """TFRecord's crc32c: rotated right by 15 bits plus a constant."""
  crc = google_crc32c.value(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _values(feature: bytes) -> Values:
  for number, wire, body in _fields(feature):
    if wire == _BYTES and number in (_BYTES_LIST, _FLOAT_LIST, _INT64_LIST):
      items = [(wire, value) for field, wire, value in _fields(body) if field == 1]
      if number == _BYTES_LIST:
        if any(wire != _BYTES for wire, _ in items):
          raise DataError('a bytes list holds something else')
        return [value for _, value in items]
      return _floats(items) if number == _FLOAT_LIST else _integers(items)
  return []


def _floats(items) -> np.ndarray:
  data = b''.join(value for wire, value in items if wire in (_BYTES, _FIXED32))
  if len(data) % 4:
    raise DataError(f'a float list of {len(data)} bytes')
  return np.frombuffer(data, '<f4')


def _integers(items) -> np.ndarray:
  packed = [_varints(v) if wire == _BYTES else np.array([v], np.uint64) for wire, v in items]
  return np.concatenate([*packed, np.zeros(0, np.uint64)]).astype(np.int64)


def _varints(data: bytes) -> np.ndarray:
  """uint64 [n] of concatenated base-128 numbers, least significant group first."""
  groups = np.frombuffer(data, np.uint8)
  ends = np.flatnonzero(groups < 128)
  if len(groups) and (not len(ends) or ends[-1] != len(groups) - 1):
    raise DataError('an integer list ends inside a number')
  if not len(groups):
    return np.zeros(0, np.uint64)
  starts = np.concatenate([[0], ends[:-1] + 1])
  place = np.arange(len(groups)) - np.repeat(starts, ends - starts + 1)
  if place.max() > 9:
    raise DataError('an integer of more than ten bytes')
  return np.add.reduceat((groups & 127).astype(np.uint64) << (7 * place).astype(np.uint64), starts)


def _submessages(data: bytes, wanted: int) -> Iterator[bytes]:
  for number, wire, value in _fields(data):
    if number == wanted:
      if wire != _BYTES:
        raise DataError(f'field {number} is not a message')
      yield value


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes | int]]:
  """(field number, wire type, value) of one protocol buffer message."""
  at = 0
  while at < len(data):
    key, at = _varint(data, at)
    wire = key & 7
    if wire == _VARINT:
      value, at = _varint(data, at)
    else:
      if wire == _BYTES:
        size, at = _varint(data, at)
      elif wire in (_FIXED64, _FIXED32):
        size = 8 if wire == _FIXED64 else 4
      else:
        raise DataError(f'unknown wire type {wire}')
      value, at = data[at : at + size], at + size
      if at > len(data):
        raise DataError(f'a field of {size} bytes goes beyond its message')
    yield key >> 3, wire, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
  value, shift = 0, 0
  while at < len(data) and shift < 70:
    byte = data[at]
    value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
    if byte < 128:
      return value, at
  raise DataError('a number without an end')
