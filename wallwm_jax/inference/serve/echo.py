"""A policy without a model: clients are tried against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wallwm_jax.types import DataError


class EchoPolicy:
  """Stays where it is: every action is the state of the observation.

  Args:
    steps: K of a reply; dim: A.
  """

  heavy = False

  def __init__(self, steps: int = 16, dim: int = 10):
    self._steps, self._dim = steps, dim
    self.metadata = {'protocol': 'openpi', 'policy': 'echo', 'action_dim': dim, 'steps': steps}

  def start(self) -> None:
    """Nothing is remembered."""

  def check(self, request: Mapping[str, Any], memory: None) -> np.ndarray:
    """The state [A] of the observation: 'state' or 'observation/state', zeros without one."""
    name = 'state' if 'state' in request else 'observation/state'
    state = np.asarray(request.get(name, np.zeros(self._dim)))
    if state.shape != (self._dim,) or state.dtype.kind not in 'fiu':
      raise DataError(
        f'{name}: expected numbers [{self._dim}], got {state.dtype} {list(state.shape)}.'
      )
    if not np.isfinite(state).all():
      raise DataError(f'{name}: NaN or infinite values.')
    return state.astype(np.float32)

  def infer(self, works: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """{'actions': float32 [K, A]} for each."""
    return [{'actions': np.tile(state, (self._steps, 1))} for state in works]
