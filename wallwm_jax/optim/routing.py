"""Which optimizer updates which parameter: ordered first-match rules over parameter paths."""

from __future__ import annotations

import collections
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax

from wallwm_jax.optim.matrices import Matrix
from wallwm_jax.types import ConfigError, path_string

# A Matrix sends a parameter to Muon and says how it is read as matrices.
Label = Matrix | Literal['adamw', 'frozen']
Rules = Sequence[tuple[str, Label]]

# First match wins; a pattern must match the whole path or a whole number of its last components.
# Every rule holds in either tower alone. Stacks of weight matrices go to Muon; modulation tables
# are stacked too, but they are not matrices, and input, output and embedding layers are better
# served by AdamW.
DEFAULT_RULES: Rules = (
  (r'blocks/\w+/(q|k|v|o|gate|up|down)/kernel', Matrix()),
  (r'(video|action)/\w+/kernel', 'adamw'),
  (r'bias|scale|embedding|modulation|head_modulation|blocks/view_gate', 'adamw'),
)

# The parts of the language side: any run may have some of them and not others.
LANGUAGE_RULES: Rules = (
  (
    r'(vlm|reader|staircase|heads)/.*(blocks|linear|full)/(\w+/)?'
    r'(qkv|q|k|v|z|o|out|gate|up|down|proj|fc1|fc2)/kernel',
    Matrix(),
  ),
  (r'(vlm|reader|staircase|heads|projector)/.*', 'adamw'),
)

_MIN_SIDE = 16  # a "matrix" thinner than this is a table of vectors under a wrong label


def route(
  shapes: Any, trainable: Any | None = None, rules: Rules = DEFAULT_RULES
) -> Any:
  """Tree of labels with the structure of `shapes`: a Matrix (= Muon), 'adamw' or 'frozen'.

  Args:
    shapes: tree of arrays or ShapeDtypeStructs.
    trainable: tree of bool of the same structure; None = all True. False becomes 'frozen'.
    rules: (regex, label) in order of precedence, for what LANGUAGE_RULES do not match.

  Raises:
    ConfigError: a parameter no rule matches, a rule that is the first match of no parameter (where
      there are any for it), or a Matrix that does not fit its tensor or makes matrices with a side
      below 16 of it.
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
  paths = [path_string(p) for p, _ in leaves]
  known = [_first_match(path, LANGUAGE_RULES) for path in paths]
  others = [path for path, match in zip(paths, known, strict=True) if match is None]
  matches = {path: _first_match(path, rules) for path in others}
  if others:
    _check_coverage(others, [*matches.values()], rules)
  labels = [
    rules[matches[path]][1] if match is None else LANGUAGE_RULES[match][1]
    for path, match in zip(paths, known, strict=True)
  ]
  for path, label, (_, leaf) in zip(paths, labels, leaves, strict=True):
    if isinstance(label, Matrix):
      _check_matrix(path, tuple(leaf.shape), label)
  if trainable is not None:
    keep = treedef.flatten_up_to(trainable)
    labels = [label if k else 'frozen' for label, k in zip(labels, keep, strict=True)]
  return treedef.unflatten(labels)


def optimizer_of(label: Label) -> Literal['muon', 'adamw', 'frozen']:
  """The optimizer a label stands for."""
  return 'muon' if isinstance(label, Matrix) else label


def format_table(labels: Any, shapes: Any) -> str:
  """A table for people: tensors, parameters and the most frequent shapes of each label."""
  rows = collections.defaultdict(lambda: [0, 0, collections.Counter()])
  for label, leaf in zip(jax.tree.leaves(labels), jax.tree.leaves(shapes), strict=True):
    row = rows[optimizer_of(label)]
    row[0] += 1
    row[1] += math.prod(leaf.shape)
    row[2][str(tuple(leaf.shape))] += 1
  lines = [f'{"label":8} {"tensors":>8} {"parameters":>14}  most frequent shapes']
  for label, (tensors, parameters, kinds) in sorted(rows.items()):
    common = ', '.join(f'{n} x {shape}' for shape, n in kinds.most_common(3))
    lines.append(f'{label:8} {tensors:8d} {parameters:14,d}  {common}')
  return '\n'.join(lines)


def _check_matrix(path: str, shape: tuple[int, ...], label: Matrix) -> None:
  try:
    sides = label.shape(shape)[1:]
  except ConfigError as error:
    raise ConfigError(f'optim routing: {path!r} has no matrix view. {error}') from None
  if min(sides) < _MIN_SIDE:
    raise ConfigError(
      f'optim routing: {path!r} of shape {shape} read as {label.pattern!r} makes matrices '
      f"{sides[0]} x {sides[1]}; Muon needs sides >= {_MIN_SIDE}. Label it 'adamw'."
    )


def _first_match(path: str, rules: Rules) -> int | None:
  for i, (pattern, _) in enumerate(rules):
    if re.search(rf'(^|/)(?:{pattern})$', path):
      return i
  return None


def _check_coverage(paths: list[str], matches: list[int | None], rules: Rules) -> None:
  covered = [path for path, match in zip(paths, matches, strict=True) if match is not None]
  for path, match in zip(paths, matches, strict=True):
    if match is None:
      raise ConfigError(
        f'optim routing: no rule matches parameter {path!r}.{_closest(path, covered)} '
        f'Add a rule to optim.routing.DEFAULT_RULES.'
      )
  for i, (pattern, label) in enumerate(rules):
    if i not in matches:
      raise ConfigError(
        f'optim routing: rule {pattern!r} -> {label!r} is the first match of no parameter.'
        f'{_closest(pattern, paths)}'
      )


def _closest(name: str, options: list[str]) -> str:
  close = difflib.get_close_matches(name, options, n=1, cutoff=0.3)
  return f' The closest parameter is {close[0]!r}.' if close else ''
