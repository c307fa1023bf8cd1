"""Between Flax modules and nested dicts: how the doors of this package meet their towers."""

from __future__ import annotations

import functools

from flax import nnx

from wallwm_jax.models.quantised import as_leaves
from wallwm_jax.types import Params


def fresh(module: nnx.Module) -> Params:
  """The parameters of a module as nested dicts."""
  return nnx.to_pure_dict(nnx.state(module, nnx.Param))


@functools.lru_cache
def _graph(tower: type[nnx.Module], *config) -> nnx.GraphDef:
  return nnx.split(nnx.eval_shape(lambda: tower(*config, rngs=nnx.Rngs(0))))[0]


def bind(tower: type[nnx.Module], config, params: Params, *more) -> nnx.Module:
  """The module `tower(config, *more)` with `params`, merged from its cached graph definition.

  Raises:
    CheckpointError: a quantised matrix whose parts do not fit together.
  """
  return nnx.merge(_graph(tower, config, *more), nnx.State(as_leaves(params)))
