"""What is known of shapes when a program is traced."""

from __future__ import annotations

import jax


def is_static(*arrays: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Whether every size is a number: an exported policy may be traced with any number of rows, a
  symbol, which our kernels cannot lay out.
  """
  return all(isinstance(n, int) for x in arrays for n in x.shape)
