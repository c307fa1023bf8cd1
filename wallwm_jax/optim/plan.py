"""Who orthogonalises which matrix: a static plan made once from shapes, shardings and the mesh.

Matrices of one shape and one placement form a group, whatever leaf and layer they come from. A
group is worked off in slots. In a slot every owner gets the same number of whole matrices, so all
devices do equal work and a greedy balance (longest processing time first) has nothing left to move;
the last slot of a group is padded with zeros. An owner is one device, or, where a group has fewer
matrices than there are devices, `parts` neighbouring devices that each hold some columns of a
matrix and add up their Gram matrices.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from wallwm_jax.optim.matrices import Matrix, MeshAxes
from wallwm_jax.optim.newton_schulz import NewtonSchulz
from wallwm_jax.types import ConfigError, path_string

MAX_SLOTS = 8  # of a group: beyond it an owner takes several matrices per slot
# One TPU v5p chip, for choosing `parts`; only the ratio matters.
_FLOPS_PER_S, _WIRE_BYTES_PER_S = 459e12, 180e9
_LANES = 128  # columns of a device's part come in whole vector registers


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter. axes: mesh axes that split (stack, fan_in, fan_out) of its matrices."""

  path: str
  shape: tuple[int, ...]
  view: Matrix
  axes: tuple[MeshAxes, MeshAxes, MeshAxes]

  @property
  def spec(self) -> PartitionSpec:
    """Of the leaf read as matrices."""
    return PartitionSpec(*(axes or None for axes in self.axes))


@dataclasses.dataclass(frozen=True)
class Group:
  """Matrices [rows, cols] that are orthogonalised together.

  leaves: (index in the plan, read transposed, matrices on one device) of every leaf.
  row_axes, col_axes: mesh axes over which a matrix is split; their devices exchange blocks.
  spare_axes: mesh axes over which it is copied; each copy takes other matrices.
  parts: devices that share one matrix by columns. per_slot: matrices of one owner in a slot.
  """

  rows: int
  cols: int
  leaves: tuple[tuple[int, bool, int], ...]
  row_axes: MeshAxes
  col_axes: MeshAxes
  spare_axes: MeshAxes
  row_split: int
  col_split: int
  spare: int
  parts: int = 1
  per_slot: int = 1

  @property
  def matrices(self) -> int:
    return sum(count for _, _, count in self.leaves)

  @property
  def peers(self) -> int:
    """Devices that together hold one copy of a matrix."""
    return self.row_split * self.col_split

  @property
  def owners(self) -> int:
    return self.peers * self.spare // self.parts

  @property
  def capacity(self) -> int:
    """Matrices a slot takes."""
    return self.owners * self.per_slot

  @property
  def slots(self) -> int:
    return -(-self.matrices // self.capacity)

  def flops(self, how: NewtonSchulz) -> float:
    """Matmul FLOPs of every device with full products, padding included."""
    form = 'gram' if self.parts > 1 else None
    one = how.flops(self.rows, self.cols, form, parts=self.parts)
    return self.slots * self.per_slot * one

  def wire_bytes(self, how: NewtonSchulz) -> dict[str, float]:
    """Bytes every device sends, by collective."""
    width = np.dtype(how.dtype).itemsize
    block = self.rows * self.cols / self.peers * width
    moved = self.slots * self.capacity * block  # one device's blocks of all matrices
    sent = {
      'all-to-all': 2 * moved / self.spare * (self.peers - 1) / self.peers,
      'all-gather': moved * (self.spare - 1) / self.spare,
      'all-reduce': 0.0,
    }
    if self.parts > 1:
      grams = len(how.segments()) * self.slots * self.per_slot * self.rows**2 * width
      sent['all-reduce'] = 2 * grams * (self.parts - 1) / self.parts
    return sent

  def seconds(self, how: NewtonSchulz) -> float:
    """Rough time on a TPU v5p, to compare choices of `parts`."""
    return self.flops(how) / _FLOPS_PER_S + self.wire_bytes(how)['all-reduce'] / _WIRE_BYTES_PER_S


@dataclasses.dataclass(frozen=True)
class Plan:
  """The work of one optimizer update on one mesh; None = one device.

  Static and hashable. It is no part of the optimizer's state, so a checkpoint moves between meshes.
  """

  leaves: tuple[Leaf, ...]
  groups: tuple[Group, ...]
  mesh: Mesh | None = None

  def check(self, tree: Any) -> None:
    """Refuses a tree other than the one the plan was made for.

    Raises:
      ConfigError: names the first path that differs, or an array that lies on another mesh.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    got = [(path_string(path), tuple(leaf.shape)) for path, leaf in leaves]
    planned = [(leaf.path, leaf.shape) for leaf in self.leaves]
    for ours, theirs in itertools.zip_longest(planned, got):
      if ours != theirs:
        raise ConfigError(
          f'Muon: the plan is for another tree: expected {_named(ours)}, got {_named(theirs)}. '
          'Make a plan for these parameters.'
        )
    for (path, shape), (_, leaf) in zip(got, leaves, strict=True):
      mesh = getattr(getattr(leaf, 'sharding', None), 'mesh', None)
      if isinstance(mesh, Mesh) and self.mesh is not None and mesh != self.mesh:
        raise ConfigError(
          f'Muon: the plan is for mesh {dict(self.mesh.shape)}, but {path!r} {shape} lies on '
          f'{dict(mesh.shape)}. Make a plan for that mesh.'
        )


def make_plan(
  shapes: Any,
  views: Sequence[Matrix],
  how: NewtonSchulz,
  shardings: Any | None = None,
  *,
  parts: int | None = None,
) -> Plan:
  """Groups the leaves of `shapes` and chooses owners.

  Args:
    shapes: tree of arrays or ShapeDtypeStructs, matrices only.
    views: how each leaf, in tree order, is read as matrices.
    shardings: tree of NamedShardings of one mesh; None = one device, each leaf by itself.
    parts: devices per matrix wherever legal; None = what the cost model finds fastest.

  Raises:
    ConfigError: a view that does not fit its leaf, or shardings of different meshes.
  """
  paths = jax.tree_util.tree_leaves_with_path(shapes)
  named = [(path_string(path), tuple(leaf.shape)) for path, leaf in paths]
  if shardings is None or not named:
    sizes, mesh, specs = {}, None, [PartitionSpec()] * len(named)
  else:
    placed = jax.tree.leaves(shardings)
    mesh, specs = _one_mesh(placed, named), [s.spec for s in placed]
    sizes = dict(mesh.shape)
    mesh = mesh if mesh.size > 1 else None
  leaves = tuple(
    Leaf(path, shape, view, view.spec(spec, shape, sizes))
    for (path, shape), view, spec in zip(named, views, specs, strict=True)
  )
  groups = _group(leaves, sizes, mesh)
  groups = [_owners(group, how, mesh, parts) for group in groups]
  # The first exchange has nothing to hide behind: begin with the smallest matrices.
  groups.sort(key=lambda g: g.rows * g.cols)
  return Plan(leaves, tuple(groups), mesh)


def format_plan(plan: Plan, how: NewtonSchulz) -> str:
  """The plan as a table for people."""
  mesh = dict(plan.mesh.shape) if plan.mesh else 'one device'
  lines = [
    f'Newton-Schulz on {mesh}, {how.dtype}',
    f'{"matrices":>9} {"shape":>14} {"form":>7} {"devices each":>13} {"slots":>6} {"fill":>6} '
    f'{"GFLOP/device":>13} {"MB sent":>9}  leaves',
  ]
  rows = collections.defaultdict(list)  # on one device every leaf is a group: show them together
  for group in plan.groups:
    rows[dataclasses.replace(group, leaves=(), per_slot=1)].append(group)
  for groups in rows.values():
    group, leaves = groups[0], [leaf for g in groups for leaf in g.leaves]
    form = 'gram' if group.parts > 1 else how.form_for(group.rows, group.cols)
    slots = f'{group.slots}' if group.per_slot == 1 else f'{group.slots}x{group.per_slot}'
    names = ', '.join(plan.leaves[i].path for i, _, _ in leaves[:2])
    more = f' and {len(leaves) - 2} more' if len(leaves) > 2 else ''
    lines.append(
      f'{sum(g.matrices for g in groups):9d} {group.rows:6d} x {group.cols:5d} {form:>7} '
      f'{group.parts:13d} {slots:>6} {group.matrices / (group.slots * group.capacity):6.0%} '
      f'{sum(g.flops(how) for g in groups) / 1e9:13,.1f} '
      f'{sum(sum(g.wire_bytes(how).values()) for g in groups) / 1e6:9,.1f}  {names}{more}'
    )
  executed = sum(group.flops(how) for group in plan.groups)
  balanced = sum(g.matrices * how.flops(g.rows, g.cols) / (g.peers * g.spare) for g in plan.groups)
  wire = sum(sum(group.wire_bytes(how).values()) for group in plan.groups)
  lines.append(
    f'per device: {executed / 1e9:,.1f} GFLOP of full products, {executed / balanced:.3f} times '
    f'those of an even split of whole matrices; {wire / 1e6:,.1f} MB sent'
  )
  return '\n'.join(lines)


def _named(leaf) -> str:
  return 'no further leaf' if leaf is None else f'{leaf[0]!r} {leaf[1]}'


def _one_mesh(shardings, named) -> Mesh:
  mesh = shardings[0].mesh
  for (path, shape), sharding in zip(named, shardings, strict=True):
    if sharding.mesh != mesh:
      raise ConfigError(
        f'Muon plan: {path!r} {shape} lies on mesh {dict(sharding.mesh.shape)}, but '
        f'{named[0][0]!r} on {dict(mesh.shape)}.'
      )
  return mesh


def _group(leaves: Sequence[Leaf], sizes: dict[str, int], mesh: Mesh | None) -> list[Group]:
  members = collections.defaultdict(list)
  for index, leaf in enumerate(leaves):
    stack, m, n = leaf.view.shape(leaf.shape)
    stack_axes, m_axes, n_axes = leaf.axes
    # Rows are the side that is split (by the earlier mesh axis), or the shorter one.
    order = list(sizes).index
    first = [min(map(order, axes), default=len(sizes)) for axes in (m_axes, n_axes)]
    transposed = first[0] > first[1] or (first[0] == first[1] and m > n)
    if transposed:
      (m, n), (m_axes, n_axes) = (n, m), (n_axes, m_axes)
    count = stack // math.prod(sizes[a] for a in stack_axes)
    alone = index if mesh is None else None  # concatenating leaves gains nothing on one device
    members[m, n, stack_axes, m_axes, n_axes, alone].append((index, transposed, count))
  groups = []
  for (m, n, stack_axes, row_axes, col_axes, _), entries in members.items():
    taken = {*stack_axes, *row_axes, *col_axes}
    spare_axes = tuple(
      a for a, size in sizes.items() if size > 1 and a not in taken and not _crosses_slices(mesh, a)
    )
    split = [math.prod(sizes[a] for a in axes) for axes in (row_axes, col_axes, spare_axes)]
    groups.append(Group(m, n, tuple(entries), row_axes, col_axes, spare_axes, *split))
  return groups


def _owners(group: Group, how: NewtonSchulz, mesh: Mesh | None, parts: int | None) -> Group:
  legal = [1, *(p for p in _divisions(group) if mesh is not None)]
  if parts is None:
    legal = [p for p in legal if p == 1 or group.cols // p % _LANES == 0]
  else:
    legal = [parts if parts in legal else 1]
  options = []
  for p in legal:
    option = dataclasses.replace(group, parts=p)
    per_slot = group.matrices if option.owners == 1 else -(-option.slots // MAX_SLOTS)
    options.append(dataclasses.replace(option, per_slot=per_slot))
  return min(options, key=lambda option: option.seconds(how))


def _divisions(group: Group) -> list[int]:
  """Ways to share one matrix: over its copies if there are any, else over its row peers."""
  axes = group.spare_axes or group.row_axes
  among = group.spare if group.spare_axes else group.row_split
  if len(axes) != 1 or group.col_split > 1 or group.rows > group.cols:
    return []
  powers = itertools.takewhile(lambda p: p <= among, (2**i for i in itertools.count(1)))
  return [p for p in powers if among % p == 0 and group.cols % p == 0]


def _crosses_slices(mesh: Mesh, axis: str) -> bool:
  """Whether an axis joins slices over the data-centre network: each slice then does all the work,
  which is faster than sending every update across.
  """
  ids = np.vectorize(lambda d: getattr(d, 'slice_index', 0) or 0, otypes=[int])(mesh.devices)
  first = np.take(ids, [0], axis=mesh.axis_names.index(axis))
  return bool((ids != first).any())
