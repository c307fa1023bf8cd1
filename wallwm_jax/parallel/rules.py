"""Sharding policy as data: parameter path -> logical axes -> mesh axes.

`PARAM_RULES` and `LANGUAGE_RULES` name the axes of every parameter; `MeshConfig.rules` says which
mesh axes each logical axis is split over. Swapping a mesh edits only the latter. All checks raise
ConfigError with the path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wallwm_jax.config import nearest
from wallwm_jax.types import ConfigError, path_string

LogicalAxes = tuple[str | None, ...]  # None = never split
MeshRules = Sequence[tuple[str, tuple[str, ...]]]
MeshTable = dict[str, tuple[str, ...]]
ParamRules = Sequence[tuple[str, LogicalAxes]]

LOGICAL_AXES = (
    'batch', 'view', 'frame', 'patch', 'tokens', 'embed', 'heads', 'mlp', 'layers', 'text',
    'action',
)

# First match wins; a pattern must match a whole number of trailing path components, so the same
# rules place parameters, their EMA and their optimizer state. Biases and norms that act on the
# residual stream and other small tables are replicated: splitting them saves nothing and costs a
# gather each.
BLOCK_RULES: ParamRules = (
    # [L, D, heads * hd] and [L, heads * hd]
    (r'blocks/\w+/(q|k|v)/kernel', ('layers', 'embed', 'heads')),
    (r'blocks/\w+/((q|k|v)/bias|(q_norm|k_norm)/scale)', ('layers', 'heads')),
    # [L, heads * hd, D]
    (r'blocks/\w+/o/kernel', ('layers', 'heads', 'embed')),
    # [L, D, ffn], [L, ffn], [L, ffn, D]
    (r'blocks/ffn/(gate|up)/kernel', ('layers', 'embed', 'mlp')),
    (r'blocks/ffn/(gate|up)/bias', ('layers', 'mlp')),
    (r'blocks/ffn/down/kernel', ('layers', 'mlp', 'embed')),
    # [L, D] vectors of the residual stream
    (r'blocks/(\w+/(o/|down/)?(bias|scale)|view_gate)', ('layers', None)),
)

# Both towers.
PARAM_RULES: ParamRules = BLOCK_RULES + (
    # [L, 6 | 9, D] modulation tables
    (r'blocks/modulation', ('layers', None, None)),
    # [D, outputs] and [inputs, D] outside the blocks
    (r'(head|head_in|head_out)/kernel', ('embed', None)),
    (r'(patch_embed|action_in|state_in|text_in|text_out|time_in|time_out|time_proj|view_gate)/kernel',
     (None, 'embed')),
    (r'(video|action)/\w+/bias', (None,)),
    (r'(video|action)/\w+/embedding', (None, None)),
    (r'(head/modulation|head_modulation)', (None, None)),
)


# The frozen UMT5 encoder: as the towers, its relative position tables by head.
UMT5_RULES: ParamRules = (
    # [vocab, E]
    (r'embed/embedding', (None, 'embed')),
    # [L, E, H * hd], [L, H * hd, E]
    (r'blocks/(q|k|v)/kernel', ('layers', 'embed', 'heads')),
    (r'blocks/o/kernel', ('layers', 'heads', 'embed')),
    # [L, E, F], [L, F, E]
    (r'blocks/(gate|up)/kernel', ('layers', 'embed', 'mlp')),
    (r'blocks/down/kernel', ('layers', 'mlp', 'embed')),
    # [L, buckets, H]
    (r'blocks/rel_bias/embedding', ('layers', None, 'heads')),
    (r'blocks/(attn_norm|ffn_norm)/scale', ('layers', None)),
    (r'norm/scale', (None,)),
)

# The text layers of Qwen3.5, also as the staircase branch holds them. q, k and v of a linear layer
# are one axis; vectors are too small to be worth splitting.
QWEN_LAYERS: ParamRules = (
    # [n, D, heads * hd], [n, heads * hd, D]
    (r'layers/(linear|full)/(qkv|z|q|k|v)/kernel', ('layers', 'embed', 'heads')),
    (r'layers/(linear|full)/(out|o)/kernel', ('layers', 'heads', 'embed')),
    # [n, D, F], [n, F, D]
    (r'layers/(linear|full)/(gate|up)/kernel', ('layers', 'embed', 'mlp')),
    (r'layers/(linear|full)/down/kernel', ('layers', 'mlp', 'embed')),
    # [n, D, H], [n, taps, channels]
    (r'layers/linear/(a|b)/kernel', ('layers', 'embed', None)),
    (r'layers/linear/conv/kernel', ('layers', None, 'heads')),
    (r'layers/(linear|full)/(log_decay|dt_bias|\w+/scale)', ('layers', None)),
)

# All of Qwen3.5: the layers above, what surrounds them, the vision tower.
QWEN_RULES: ParamRules = QWEN_LAYERS + (
    # [U, D], [D], [D, U]
    (r'text/embed/embedding', (None, 'embed')),
    (r'text/norm/scale', (None,)),
    (r'text/head/kernel', ('embed', None)),
    (r'vision/patch_embed/kernel', (None, 'embed')),
    (r'vision/positions/embedding', (None, 'embed')),
    (r'vision/blocks/qkv/kernel', ('layers', 'embed', 'heads')),
    (r'vision/blocks/proj/kernel', ('layers', 'heads', 'embed')),
    (r'vision/blocks/fc1/kernel', ('layers', 'embed', 'mlp')),
    (r'vision/blocks/fc2/kernel', ('layers', 'mlp', 'embed')),
    (r'vision/blocks/\w+/(scale|bias)', ('layers', None)),
    (r'vision/merger/fc1/kernel', ('embed', 'mlp')),
    (r'vision/merger/fc2/kernel', ('mlp', 'embed')),
    (r'vision/(\w+/)*(scale|bias)', (None,)),
)


# What the language side trains beside such layers: small, so only their matrices are split.
LANGUAGE_RULES: ParamRules = QWEN_RULES + BLOCK_RULES + (
    (r'staircase/(query|norm/scale)', (None,)),
    (r'staircase/steps', (None, None)),
    (r'(heads|projector)/(\w+/)*kernel', ('embed', None)),
    (r'(heads|projector)/(\w+/)*embedding', (None, None)),
    (r'(heads|projector)/(\w+/)*(scale|bias)', (None,)),
)
_LANGUAGE_PARTS = r'(^|/)(vlm|reader|heads|projector|staircase)/'


def logical_axes(path: str, ndim: int, param_rules: ParamRules = PARAM_RULES) -> LogicalAxes:
  """Logical axes of the parameter that `path` ends with ('/'-joined); () for scalars.

  Raises:
    ConfigError: no rule matches, or the rule names another number of axes than `ndim`.
  """
  if ndim == 0:
    return ()
  index = _first_match(path, param_rules)
  if index is None:
    raise ConfigError(
        f'parameter {path!r} ({ndim} axes) has no sharding rule. '
        'Add one to parallel.rules.PARAM_RULES.')
  pattern, axes = param_rules[index]
  if len(axes) != ndim:
    raise ConfigError(
        f'parameter {path!r} has {ndim} axes, but its sharding rule {pattern!r} names '
        f'{len(axes)}: {axes}.')
  return axes


def param_shardings(
    shapes: Any, mesh: Mesh, rules: MeshRules, param_rules: ParamRules = ()
) -> Any:
  """NamedShardings for a tree whose leaf paths end with parameter paths (params, EMA, optimizer
  state).

  Args:
    shapes: tree of arrays or ShapeDtypeStructs; scalars are replicated.
    rules: `MeshConfig.rules`. param_rules: logical axes by path; () = those of a training run, the
      towers and the language side.

  Raises:
    ConfigError: see `logical_axes` and `partition_spec`.
  """
  table = mesh_rules(rules, mesh)

  def place(key_path, leaf):
    path = path_string(key_path)
    axes = logical_axes(path, len(leaf.shape), param_rules or _rules_of(path))
    # Statistics that an optimizer keeps per row or column of a parameter have sides of 1.
    axes = tuple(a if size > 1 else None for a, size in zip(axes, leaf.shape, strict=True))
    return NamedSharding(mesh, partition_spec(axes, leaf.shape, table, mesh, f'parameter {path!r}'))

  return jax.tree_util.tree_map_with_path(place, shapes)


def batch_shardings(batch: Any, mesh: Mesh, rules: MeshRules) -> Any:
  """NamedShardings that split the leading (batch) axis of every leaf of an EventBatch-like tree."""
  table = mesh_rules(rules, mesh)

  def place(key_path, leaf):
    axes = ('batch', *(None for _ in leaf.shape[1:]))
    where = f'batch field {path_string(key_path)!r}'
    return NamedSharding(mesh, partition_spec(axes, leaf.shape, table, mesh, where))

  return jax.tree_util.tree_map_with_path(place, batch)


def check_rules(
    shapes: Any, mesh: Mesh, rules: MeshRules, param_rules: ParamRules = PARAM_RULES
) -> None:
  """Refuses a mesh, rules and full parameter tree that do not fit together; call once per run.

  Args:
    param_rules: of all that is not part of the language side.

  Raises:
    ConfigError: a rule that matches no parameter or names an unknown axis, a parameter without a
      rule, a dimension that its mesh axes do not divide; the message names path, dimension and
      axes.
  """
  table = mesh_rules(rules, mesh)
  leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
  leaves = [(path_string(key_path), leaf.shape) for key_path, leaf in leaves]
  language = [(path, shape) for path, shape in leaves if _rules_of(path) is LANGUAGE_RULES]
  for path, shape in language:
    axes = logical_axes(path, len(shape), LANGUAGE_RULES)
    partition_spec(axes, shape, table, mesh, f'parameter {path!r}')
  leaves = [leaf for leaf in leaves if leaf not in language]
  for path, shape in leaves:
    axes = logical_axes(path, len(shape), param_rules)
    partition_spec(axes, shape, table, mesh, f'parameter {path!r}')
  used = {_first_match(path, param_rules) for path, _ in leaves}
  for index, (pattern, _) in enumerate(param_rules if leaves else ()):
    if index not in used:
      raise ConfigError(
          f'sharding rule {pattern!r} is the first match of none of the {len(leaves)} parameters. '
          'Correct or remove it.')


def mesh_rules(rules: MeshRules, mesh: Mesh) -> MeshTable:
  """`MeshConfig.rules` as a checked table: known logical names, known mesh axes, each name once."""
  table = {}
  for logical, axes in rules:
    if logical not in LOGICAL_AXES:
      raise ConfigError(
          f'mesh.rules: unknown logical axis {logical!r}.{nearest(logical, LOGICAL_AXES)}')
    if logical in table:
      raise ConfigError(f'mesh.rules: logical axis {logical!r} has two rules. Merge them into one.')
    for axis in axes:
      if axis not in mesh.axis_names:
        raise ConfigError(
            f'mesh.rules: {logical!r} refers to the unknown mesh axis {axis!r}.'
            f'{nearest(axis, mesh.axis_names)}')
    table[logical] = tuple(axes)
  return table


def partition_spec(
    axes: LogicalAxes, shape: Sequence[int], table: MeshTable, mesh: Mesh, where: str
) -> PartitionSpec:
  """The PartitionSpec of an array with logical `axes`.

  A mesh axis can split only one dimension of an array: on its second occurrence it is dropped.

  Raises:
    ConfigError: unknown logical name, wrong rank, or a dimension its mesh axes do not divide;
    starts with `where`.
  """
  if len(axes) != len(shape):
    raise ConfigError(f'{where}: expected {len(axes)} axes {axes}, got shape {tuple(shape)}.')
  used, entries = set(), []
  for dim, (logical, size) in enumerate(zip(axes, shape, strict=True)):
    if logical is not None and logical not in LOGICAL_AXES:
      raise ConfigError(
          f'{where}: unknown logical axis {logical!r}.{nearest(logical, LOGICAL_AXES)}')
    split = tuple(a for a in table.get(logical, ()) if a not in used)
    used.update(split)
    parts = math.prod(mesh.shape[a] for a in split)
    if size % parts:
      raise ConfigError(
          f'{where}: dimension {dim} ({logical}) of size {size} is not divisible by {parts} '
          f'= mesh axes {" * ".join(split)}. Change config.mesh, its rules, or the size.')
    entries.append(split if parts > 1 else None)
  return PartitionSpec(*entries)


def _rules_of(path: str) -> ParamRules:
  """Of a parameter of a training run, or of its average or optimizer state."""
  return LANGUAGE_RULES if re.search(_LANGUAGE_PARTS, path) else PARAM_RULES


def _first_match(path: str, param_rules: ParamRules) -> int | None:
  for index, (pattern, _) in enumerate(param_rules):
    if re.search(rf'(^|/)(?:{pattern})$', path):
      return index
  return None
