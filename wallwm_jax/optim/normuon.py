"""NorMuon: neurons of equal update size on top of Muon's orthogonal ones (arXiv 2510.05491)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wallwm_jax.optim.matrices import Matrix

_EPS = 1e-8


class NeuronNormState(NamedTuple):
  """v: mean square update of every neuron, float32 [B, 1, n] per leaf of matrices [B, m, n]."""

  v: Any


def normalize_neurons(b2: float, views: Sequence[Matrix]) -> optax.GradientTransformation:
  """U -> U / sqrt(v), rescaled to the Frobenius norm of U, for every matrix.

  v <- b2 v + (1 - b2) mean(U^2) over the fan-in of every neuron (column). Orthogonal updates leave
  neurons of very different size; this evens them out and keeps the size of the whole.

  Args:
    views: how each leaf, in tree order, is read as matrices.
  """

  def init(params):
    leaves, treedef = jax.tree.flatten(params)

    def zeros(view, p):
      stack, _, fan_out = view.shape(p.shape)
      return jnp.zeros((stack, 1, fan_out), jnp.float32)

    return NeuronNormState(treedef.unflatten(map(zeros, views, leaves)))

  def update(updates, state, params=None):
    del params
    leaves, treedef = jax.tree.flatten(updates)
    even, moments = [], []
    for view, u, v in zip(views, leaves, treedef.flatten_up_to(state.v), strict=True):
      x = view.split(u)
      v = b2 * v + (1 - b2) * jnp.mean(jnp.square(x), axis=-2, keepdims=True)
      y = x / (jnp.sqrt(v) + _EPS)
      before, after = (jnp.linalg.norm(z, axis=(-2, -1), keepdims=True) for z in (x, y))
      y = y * (before / jnp.where(after == 0, 1.0, after))
      even.append(view.merge(y, u.shape).astype(u.dtype))
      moments.append(v)
    return treedef.unflatten(even), NeuronNormState(treedef.unflatten(moments))

  return optax.GradientTransformation(init, update)
