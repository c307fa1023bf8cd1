"""What the kernels are compared on. One module for each folder of `kernels/`, with

  NAMES            names of the cases that belong in the table
  case(name)       the `Case` of a name; may understand more names than the table has
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KERNEL = 'kernel'  # the program of a case that is ours; every other is a formulation left to XLA


@dataclasses.dataclass(frozen=True)
class Case:
  """One comparison.

  programs: functions of `operands` by name, `KERNEL` first, that compute the same. operands:
  ShapeDtypeStructs (any pytrees). kernel_bytes: HBM bytes that one run of each Pallas kernel moves,
  by the first part of its name: what it reads of a stack is not in the program's text. ideal_bytes:
  the least that one unit of the work moves. units: how many units a program does, such as layers.
  """

  programs: Mapping[str, Callable]
  operands: tuple[Any, ...]
  kernel_bytes: Mapping[str, float]
  ideal_bytes: float
  units: int = 1

  def arrays(self, seed: int = 0) -> tuple[Any, ...]:
    """Operands to run on: unit Gaussians, whole numbers 0."""
    rng = np.random.default_rng(seed)

    def draw(spec):
      if jnp.issubdtype(spec.dtype, jnp.floating):
        return jnp.asarray(rng.standard_normal(spec.shape, np.float32), spec.dtype)
      return jnp.zeros(spec.shape, spec.dtype)

    return jax.tree.map(draw, self.operands)


def ops() -> list[str]:
  """Kernels that have cases."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(op: str):
  """The module of cases of a kernel."""
  return importlib.import_module(f'{__name__}.{op}')
