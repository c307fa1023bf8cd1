"""Messages of a policy server: msgpack with NumPy arrays, in the two encodings that clients speak.

OPENPI is that of the published openpi-client; NUMPY that of the package msgpack-numpy. Neither
reads the other's arrays and neither says so: an array of the other kind comes out as a dict. So
`decode` accepts both and tells which one it met, and a server answers in kind.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from wallwm_jax.types import DataError

OPENPI, NUMPY = 'openpi', 'msgpack_numpy'
_KINDS = 'biufSU'  # dtypes that travel: no objects, records or complex numbers
_MOST = 2**28  # bytes of one array


def encode(message: Any, style: str = OPENPI) -> bytes:
  """Dicts, lists, texts, numbers and arrays as msgpack.

  Raises:
    DataError: an array whose dtype has no encoding (bfloat16 must be cast first).
  """
  return msgpack.packb(message, default=functools.partial(_pack, style=style))


def decode(frame: bytes) -> tuple[Any, str | None]:
  """(message, encoding of its arrays or None without any); arrays are read-only.

  Raises:
    DataError: no msgpack, or an array that is not what its header says.
  """
  styles: set[str] = set()
  try:
    message = msgpack.unpackb(
      frame, object_hook=functools.partial(_unpack, styles=styles), max_ext_len=0
    )
  except DataError:
    raise
  except Exception as error:  # msgpack raises many kinds on nonsense
    raise DataError(
      f'request: expected one msgpack message, got {len(frame)} bytes that are none '
      f'({type(error).__name__}: {error}).'
    ) from None
  if len(styles) > 1:
    raise DataError(f'request: expected arrays of one encoding, got {sorted(styles)}.')
  return message, styles.pop() if styles else None


def _pack(x: Any, style: str) -> dict:
  if not isinstance(x, np.ndarray | np.generic):
    raise DataError(f'reply: expected numbers, texts and arrays, got {type(x).__name__}.')
  if x.dtype.kind not in _KINDS:
    raise DataError(f'Unsupported dtype: {x.dtype}. Cast it to one of NumPy\'s own first.')
  single = isinstance(x, np.generic)
  if style == NUMPY:
    head = {b'nd': not single, b'type': x.dtype.str}
    return head | ({} if single else {b'kind': b'', b'shape': x.shape}) | {b'data': x.tobytes()}
  if single:
    return {b'__npgeneric__': True, b'data': x.item(), b'dtype': x.dtype.str}
  return {b'__ndarray__': True, b'data': x.tobytes(), b'dtype': x.dtype.str, b'shape': x.shape}


def _unpack(x: Mapping, styles: set[str]) -> Any:
  if b'__ndarray__' in x:
    styles.add(OPENPI)
    return _array(x.get(b'data'), x.get(b'dtype'), x.get(b'shape'))
  if b'__npgeneric__' in x:
    styles.add(OPENPI)
    return _scalar(x.get(b'data'), x.get(b'dtype'))
  if b'nd' in x:
    styles.add(NUMPY)
    shape = x.get(b'shape') if x[b'nd'] else ()
    found = _array(x.get(b'data'), x.get(b'type'), shape)
    return found if x[b'nd'] else found[()]
  return x


def _array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
  kind = _dtype(dtype)
  sizes = isinstance(shape, list | tuple) and all(type(n) is int and n >= 0 for n in shape)
  if not sizes or not isinstance(data, bytes):
    raise DataError(
      f'array: expected bytes and a shape of sizes, got {type(data).__name__} and '
      f'{reprlib.repr(shape)}.'
    )
  expected = int(np.prod([int(n) for n in shape], dtype=object)) * kind.itemsize
  if expected != len(data) or expected > _MOST:
    raise DataError(
      f'array: shape {reprlib.repr(shape)} of {kind.str} is {expected} bytes (at most {_MOST}), '
      f'got {len(data)}.'
    )
  return np.frombuffer(data, kind).reshape(shape) if expected else np.zeros(shape, kind)


def _scalar(value: Any, dtype: Any) -> np.generic:
  kind = _dtype(dtype)
  try:
    return kind.type(value)
  except (TypeError, ValueError, OverflowError):
    raise DataError(f'scalar: expected a value of {kind.str}, got {reprlib.repr(value)}.') from None


def _dtype(name: Any) -> np.dtype:
  try:
    found = np.dtype(name) if isinstance(name, str) else None
  except (TypeError, ValueError):
    found = None
  if found is None or found.kind not in _KINDS:
    raise DataError(f'array: expected a dtype such as "<f4" or "|u1", got {reprlib.repr(name)}.')
  return found
