"""Random numbers and random orders that are pure functions of their arguments, the same on every
machine and with every version of NumPy: splitmix64 and a Feistel network on it."""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def mix64(x: int) -> int:
  """splitmix64: one bijection of the integers 0..2**64-1."""
  x = (x + _GOLDEN) & _MASK
  x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
  x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
  return x ^ (x >> 31)


def mix64_array(x: np.ndarray) -> np.ndarray:
  """`mix64` of every element of a uint64 array."""
  x = x + np.uint64(_GOLDEN)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def fold(*numbers: int) -> int:
  """One 64-bit key that depends on every number and on their order."""
  key = 0
  for number in numbers:
    key = mix64(key ^ mix64(number))
  return key


def shuffled(size: int, key: int) -> np.ndarray:
  """int64 [size]: 0..size-1 in an order that `key` picks; for orders that are needed whole."""
  return np.argsort(mix64_array(np.arange(size, dtype=np.uint64) ^ np.uint64(key)))


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
  """Where element `index` of 0..size-1 goes in the order that `key` picks, element by element.

  For orders of which single elements are needed: each costs the same whatever the size.

  Args:
    index: int [n], 0 <= index < size; size: int [n], 1 <= size < 2**31; key: uint64 [n].

  Returns:
    int64 [n], 0 <= result < size. For one size and key it is a bijection of `index`.

  Source: a Feistel network on a grid of size rows * columns >= size, walked along its cycles until
    it is back inside (Black and Rogaway, Ciphers with arbitrary finite domains, 2002).
  """
  size = np.asarray(size, np.uint64)
  rows = np.ceil(np.sqrt(size)).astype(np.uint64)
  columns = (size + rows - np.uint64(1)) // rows
  result = _feistel(np.asarray(index, np.uint64), rows, columns, key)
  while len(outside := np.flatnonzero(result >= size)):
    result[outside] = _feistel(result[outside], rows[outside], columns[outside], key[outside])
  return result.astype(np.int64)


def _feistel(
  index: np.ndarray, rows: np.ndarray, columns: np.ndarray, key: np.ndarray
) -> np.ndarray:
  """A bijection of 0..rows*columns-1: each half in turn is shifted by a hash of the other one."""
  row, column = np.divmod(index, columns)
  for turn in range(_ROUNDS):
    key = key + np.uint64(_GOLDEN)  # another function every round
    if turn % 2:
      column = _shift(column, columns, mix64_array(key ^ row))
    else:
      row = _shift(row, rows, mix64_array(key ^ column))
  return row * columns + column


def _shift(x: np.ndarray, size: np.ndarray, random: np.ndarray) -> np.ndarray:
  """(x + a number in 0..size-1 that the upper half of `random` picks) modulo size."""
  x = x + ((random >> np.uint64(32)) * size >> np.uint64(32))
  return np.where(x >= size, x - size, x)
