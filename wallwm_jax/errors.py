"""The errors this project raises on purpose; each message says expected, got, where, what to do.

Apart from types.py, which brings JAX with it: code that only reads files starts without.
"""

from __future__ import annotations


class WallWMError(Exception):
  """Base of the errors this project raises on purpose; the message says expected, got and where."""


class ConfigError(WallWMError, ValueError):
  """A configuration that cannot be run."""


class DataError(WallWMError, ValueError):
  """Input data that breaks its schema."""


class CorruptStoreError(DataError):
  """A store whose bytes are not the bytes that were written."""


class CheckpointError(WallWMError, ValueError):
  """A checkpoint that does not belong to this model, or could not be written or read."""


class StatsMismatchError(WallWMError, ValueError):
  """Normalisation statistics that differ from those a model was trained with."""
