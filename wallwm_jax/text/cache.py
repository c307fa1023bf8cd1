"""Features of captions on disk: `FOLDER/<encoder>/<2 hex digits>/<sha256 of the caption>.features`.

An encoder is its identity (weights, tokenizer, config), written beside its entries as encoder.json;
so a cache can be read where the weights are not. A file is one line of JSON and the rows of the
real tokens, raw.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from wallwm_jax.types import CheckpointError

_FORMAT = 1
_DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
_log = logging.getLogger(__name__)

Identity = Mapping[str, Any]  # JSON-able


class FeatureCache:
  """One encoder's entries. Several threads, processes and machines may read and write at once: a
  file appears whole or not at all, and the last of equal ones stays.
  """

  def __init__(self, folder: pathlib.Path | str, identity: Identity):
    self._identity = json.dumps(identity, sort_keys=True)
    self.encoder = _key(self._identity)
    self._folder = pathlib.Path(folder) / self.encoder

  def get(self, text: str) -> np.ndarray | None:
    """Rows [n, E] in the dtype they were stored in; None if there is no sound entry of this text
    and encoder.
    """
    path = self._path(text)
    try:
      head, _, payload = path.read_bytes().partition(b'\n')
    except FileNotFoundError:
      return None
    try:
      header = json.loads(head)
      rows = np.frombuffer(payload, _DTYPES[header['dtype']]).reshape(header['shape'])
    except (ValueError, KeyError, TypeError):
      rows = None
    if rows is None or head != self._header(text, rows):
      _log.warning('%s is damaged or belongs elsewhere; its caption is encoded again.', path)
      return None
    return rows

  def put(self, text: str, rows: np.ndarray) -> None:
    """Stores the rows [n, E] (float32 or bfloat16) of a text.

    Raises:
      CheckpointError: the folder cannot be written to.
    """
    about = self._folder / 'encoder.json'
    if not (about.is_file() and about.read_bytes() == self._identity.encode()):
      _write(about, self._identity.encode())
    rows = np.ascontiguousarray(rows)
    _write(self._path(text), self._header(text, rows) + b'\n' + rows.tobytes())

  def _path(self, text: str) -> pathlib.Path:
    name = hashlib.sha256(text.encode()).hexdigest()
    return self._folder / name[:2] / f'{name}.features'

  def _header(self, text: str, rows: np.ndarray) -> bytes:
    header = {
      'format': _FORMAT,
      'encoder': self.encoder,
      'text': text,
      'shape': rows.shape,
      'dtype': rows.dtype.name,
      'sha256': hashlib.sha256(rows.tobytes()).hexdigest(),
    }
    return json.dumps(header).encode()


class RecentFeatures:
  """The rows of the texts used last, in memory, up to `limit` bytes."""

  def __init__(self, limit: int):
    self._limit, self._size = limit, 0
    self._rows: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

  def get(self, text: str) -> np.ndarray | None:
    if text in self._rows:
      self._rows.move_to_end(text)
    return self._rows.get(text)

  def put(self, text: str, rows: np.ndarray) -> None:
    old = self._rows.pop(text, None)
    self._size += rows.nbytes - (0 if old is None else old.nbytes)
    self._rows[text] = rows
    while self._size > self._limit:
      self._size -= self._rows.popitem(last=False)[1].nbytes


def find_identity(folder: pathlib.Path | str, config: Mapping[str, Any]) -> Identity | None:
  """The identity of the only encoder of `config` (its 'config' entry) in a cache; None if the cache
  has none.

  Raises:
    CheckpointError: the cache has several, so that the weights must say which is meant.
  """
  found = []
  for path in sorted(pathlib.Path(folder).glob('*/encoder.json')):
    text = path.read_text(errors='replace')
    if _key(text) == path.parent.name and json.loads(text).get('config') == config:
      found.append(path.parent.name)
      identity = json.loads(text)
  if len(found) > 1:
    raise CheckpointError(
      f'text cache {folder}: {len(found)} encoders have this config ({", ".join(found)}), and no '
      'weights say which is meant. Set model.text.weights, or remove the other folders.'
    )
  return identity if found else None


def _key(identity: str) -> str:
  return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _write(path: pathlib.Path, data: bytes) -> None:
  """`data` at `path`, whole or not at all, whoever else writes there."""
  temporary = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix='.tmp-', dir=path.parent)
    with os.fdopen(handle, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)  # a temporary file is private, a cache is shared
    os.replace(temporary, path)
  except OSError as error:
    if temporary is not None:
      pathlib.Path(temporary).unlink(missing_ok=True)
    raise CheckpointError(
      f'text cache: cannot write {path} ({error.strerror}). Set model.text.cache to a folder that '
      'can be written to, or fill the cache beforehand.'
    ) from error
