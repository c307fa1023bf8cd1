"""Repeated blocks: created stacked on a leading layer axis, run under `lax.scan` with a named remat
policy.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

_POLICIES = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack_blocks(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
  """One module whose every parameter has a leading axis of `layers`, each layer with its own
  key.
  """

  @nnx.split_rngs(splits=layers)
  @nnx.vmap(in_axes=0, out_axes=0)
  def create(rngs):
    return make(rngs)

  return create(rngs)


def scan_blocks(blocks: nnx.Module, apply: Callable, x, remat: str, xs=None):
  """x through every layer in order; returns (x, x after each layer [L, ...]).

  apply(block, x) or, with per-layer inputs `xs` (leading axis L), apply(block, x, xs_i).
  """
  graph, state = nnx.split(blocks)

  def layer(x, inputs):
    state_i, xs_i = inputs
    block = nnx.merge(graph, state_i)
    x = apply(block, x) if xs is None else apply(block, x, xs_i)
    return x, x

  return jax.lax.scan(rematerialise(layer, remat), x, (state, xs))


def rematerialise(layer: Callable, remat: str) -> Callable:
  """The body of a scan, its activations computed again in the backward pass by the policy
  `remat`: 'none', 'full' or 'dots'.
  """
  if remat == 'none':
    return layer
  return jax.checkpoint(layer, policy=_POLICIES[remat], prevent_cse=False)
