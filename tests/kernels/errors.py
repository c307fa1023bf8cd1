"""How far a kernel is off."""

import numpy as np


def relative_error(got, expected) -> float:
  """Relative L2 error; the absolute one where nothing but 0 is expected."""
  got, expected = (np.asarray(x, np.float64) for x in (got, expected))
  return np.linalg.norm(got - expected) / (np.linalg.norm(expected) or 1.0)
