"""Carries out a plan: whole matrices to their owners, Newton-Schulz there, blocks back.

Everything runs inside one `shard_map`, with explicit collectives. Left to the partitioner, the
products of a split matrix are gathered or reduced in every step of the iteration.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from wallwm_jax.optim.newton_schulz import NewtonSchulz, orthogonalize
from wallwm_jax.optim.plan import Group, Plan


def orthogonalize_tree(tree, plan: Plan, how: NewtonSchulz):
  """The orthogonal factor of every matrix of `tree`, placed like `tree`; `how.dtype`.

  Raises:
    ConfigError: the plan was made for another tree or mesh.
  """
  plan.check(tree)
  leaves, treedef = jax.tree.flatten(tree)
  blocks = [
    leaf.view.split(x.astype(how.dtype)) for leaf, x in zip(plan.leaves, leaves, strict=True)
  ]
  run = functools.partial(_run, plan, how)
  if plan.mesh is not None:
    specs = tuple(leaf.spec for leaf in plan.leaves)
    run = jax.shard_map(run, mesh=plan.mesh, in_specs=specs, out_specs=specs, check_vma=False)
  merged = [
    leaf.view.merge(x, leaf.shape) for leaf, x in zip(plan.leaves, run(*blocks), strict=True)
  ]
  return treedef.unflatten(merged)


def _run(plan: Plan, how: NewtonSchulz, *blocks: jax.Array) -> tuple[jax.Array, ...]:
  """`blocks`: this device's [stack, m, n] part of every leaf."""
  out = list(blocks)
  for group in plan.groups:
    done: list[list[jax.Array]] = [[] for _ in group.leaves]
    for slot in range(group.slots):
      taken = list(_taken(group, slot))
      pieces = [_oriented(blocks[group.leaves[i][0]][a:b], group.leaves[i][1]) for i, a, b in taken]
      whole = _to_owners(_padded(pieces, group.capacity), group)
      whole = orthogonalize(whole, how, _sum_over_parts(group))
      back = _to_blocks(whole, group)
      at = 0
      for i, a, b in taken:
        done[i].append(_oriented(back[at : at + b - a], group.leaves[i][1]))
        at += b - a
    for (leaf, _, _), parts in zip(group.leaves, done, strict=True):
      out[leaf] = _joined(parts)
  return tuple(out)


def _taken(group: Group, slot: int):
  """(leaf, first, last) of the matrices of a slot, the leaves of the group end to end."""
  first, last, start = slot * group.capacity, (slot + 1) * group.capacity, 0
  for i, (_, _, count) in enumerate(group.leaves):
    a, b = max(first - start, 0), min(last - start, count)
    if a < b:
      yield i, a, b
    start += count


def _to_owners(blocks: jax.Array, group: Group) -> jax.Array:
  """[capacity, rows / row_split, cols / col_split] -> [per_slot, rows, cols of this device]."""
  peers, parts = group.peers, group.parts
  if group.spare > 1:
    shared = parts if _over_copies(group) else 1
    index = jax.lax.axis_index(group.spare_axes)
    blocks = blocks.reshape(group.spare // shared, -1, *blocks.shape[1:])[index // shared]
    if shared > 1:
      width = blocks.shape[-1] // shared
      blocks = jax.lax.dynamic_slice_in_dim(blocks, index % shared * width, width, axis=-1)
    parts //= shared
  if peers == 1:
    return blocks
  # Destination first: an all-to-all over the leading axis needs no copy on either side.
  x = blocks.reshape(peers // parts, group.per_slot, blocks.shape[-2], parts, -1)
  x = jnp.moveaxis(x, 3, 1).reshape(peers, group.per_slot, blocks.shape[-2], -1)
  x = jax.lax.all_to_all(x, group.row_axes + group.col_axes, 0, 0)
  x = x.reshape(group.row_split, group.col_split, *x.shape[1:])
  return x.transpose(2, 0, 3, 1, 4).reshape(group.per_slot, group.rows, -1)


def _to_blocks(whole: jax.Array, group: Group) -> jax.Array:
  """Reverses `_to_owners`."""
  peers, parts = group.peers, group.parts
  shared = parts if _over_copies(group) else 1
  x = whole
  if peers > 1:
    parts //= shared
    x = x.reshape(
      group.per_slot, group.row_split, group.rows // group.row_split, group.col_split, -1
    )
    x = x.transpose(1, 3, 0, 2, 4).reshape(peers, group.per_slot, x.shape[2], -1)
    x = jax.lax.all_to_all(x, group.row_axes + group.col_axes, 0, 0)
    x = x.reshape(peers // parts, parts, *x.shape[1:])
    x = jnp.moveaxis(x, 1, 3).reshape(peers // parts * group.per_slot, x.shape[3], -1)
  if group.spare > 1:
    x = jax.lax.all_gather(x, group.spare_axes)
    x = x.reshape(group.spare // shared, shared, *x.shape[1:])
    x = jnp.moveaxis(x, 1, 3).reshape(group.capacity, x.shape[3], -1)
  return x


def _sum_over_parts(group: Group):
  """The sum over the devices that share a matrix; None where each has its own."""
  if group.parts == 1:
    return None
  copies = _over_copies(group)
  among = group.spare if copies else group.row_split
  (axis,) = group.spare_axes if copies else group.row_axes
  groups = [list(range(i, i + group.parts)) for i in range(0, among, group.parts)]
  return lambda x: jax.lax.psum(x, axis, axis_index_groups=groups)


def _over_copies(group: Group) -> bool:
  """Whether a matrix is shared among the devices that hold copies of it, not among its peers."""
  return group.parts > 1 and group.spare > 1


def _oriented(x, transposed: bool):
  return x.swapaxes(-1, -2) if transposed else x


def _padded(pieces: list[jax.Array], size: int) -> jax.Array:
  missing = size - sum(len(p) for p in pieces)
  if missing:
    pieces = [*pieces, jnp.zeros((missing, *pieces[0].shape[1:]), pieces[0].dtype)]
  return _joined(pieces)


def _joined(pieces: list[jax.Array]) -> jax.Array:
  return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
