"""A conversion decided in full before a byte is written: which tensor becomes which parameter."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from wallwm_jax import weights
from wallwm_jax.config import LanguageConfig, ModelConfig
from wallwm_jax.convert import qwen, umt5, wan_dit, wan_vae
from wallwm_jax.convert.entries import Entry, Naming, parameter_shapes
from wallwm_jax.convert.source import FLOATS, MappedFile, Source, Tensor, pickles, resave_hint
from wallwm_jax.types import CheckpointError, ConfigError


class FamilyModule(Protocol):
  """What a module of a family of checkpoints offers."""

  ALIASES: dict[str, str]  # other name -> 'diffusers' key of the same tensor
  IGNORED: tuple[str, ...]  # keys that are no part of the model, regular expressions

  def infer(self, shapes, source_config) -> tuple[Naming, dict[str, Any]]: ...
  def model(self, fields: Mapping[str, Any]) -> list[Entry]: ...


@dataclasses.dataclass(frozen=True)
class Family:
  """name: of the verb; subfolder: where a diffusers pipeline keeps this model; stem: of its files.

  undecided: fields that no checkpoint decides, so that an experiment may differ in them. tokenizer:
  whether a tokenizer.json belongs to it. prefix: what the model's own keys begin with, in both
  namings, although other programs wrap models in a prefix of the same name.
  """

  name: str
  component: weights.Component
  module: FamilyModule
  subfolder: str
  stem: str
  undecided: tuple[str, ...]
  tokenizer: bool = False
  prefix: str = ''


FAMILIES = {
  family.name: family
  for family in (
    Family(
      'wan-dit', 'video', wan_dit, 'transformer', 'diffusion_pytorch_model',
      ('prediction', 'cross_view'),
    ),
    Family(
      'wan-vae', 'codec', wan_vae, 'vae', 'diffusion_pytorch_model',
      ('weights', 'vae.dtype', 'vae.chunk', 'vae.tile', 'vae.latent_mean', 'vae.latent_std'),
    ),
    Family(
      'umt5', 'text', umt5, 'text_encoder', 'model', ('weights', 'cache', 'tokens', 'umt5.dtype'),
      tokenizer=True,
    ),
    Family(
      'qwen', 'vlm', qwen, '', 'model', ('weights', 'dtype', 'remat'), tokenizer=True,
      prefix='model.',
    ),
  )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
  """A checkpoint that fits its model.

  used: entry of every used source key; statuses: of the other keys, 'alias' or 'ignored'.
  """

  family: Family
  source: Source
  naming: Naming
  fields: dict[str, Any]
  used: dict[str, Entry]
  statuses: dict[str, str]

  def alias_of(self, key: str) -> str:
    """The key whose tensor `key`, of status 'alias', is another name of."""
    return _aliases(self.family, [*self.used.values()], self.naming)[key]

  def leaves(self, mesh: Mapping[str, int]) -> dict[str, weights.Leaf]:
    """The parameters to write. One whose layers have several dtypes gets the one that holds all of
    them exactly."""
    shapes = parameter_shapes(self.used.values())
    dtypes: dict[str, np.dtype] = {}
    for key, entry in self.used.items():
      dtype = FLOATS[self.source.tensors[key].dtype]
      dtypes[entry.path] = _exact_type(dtypes.get(entry.path, dtype), dtype)
    stacked = frozenset(e.path for e in self.used.values() if e.layer is not None)
    sizes = {path: dtype.itemsize for path, dtype in dtypes.items()}
    grids = weights.grids(self.family.component, shapes, sizes, stacked, mesh)
    return {
      path: weights.Leaf(path, shape, dtypes[path], grids[path]) for path, shape in shapes.items()
    }

  def rows(self) -> Iterator[tuple[str, ...]]:
    """Table of every key: status, key, dtype, shape, parameter, its shape."""
    for key, tensor in self.source.tensors.items():
      shape = str(list(tensor.shape))
      if key in self.used:
        entry = self.used[key]
        layer = '' if entry.layer is None else f'[{entry.layer}]'
        ours = str(list(entry.jax_shape()))
        yield ('used', key, tensor.dtype, shape, f'{entry.path}{layer}', ours)
      else:
        yield (self.statuses[key], key, tensor.dtype, shape, '', '')

  def totals(self) -> dict[str, int]:
    tensors = [self.source.tensors[key] for key in self.used]
    statuses = [*self.statuses.values()]
    return {
      'used': len(tensors),
      'reshaped': sum(e.layout != 'same' for e in self.used.values()),
      'alias': statuses.count('alias'),
      'ignored': statuses.count('ignored'),
      'missing': 0,
      'unexpected': 0,
      'parameters': sum(math.prod(t.shape) for t in tensors),
      'bytes': sum(t.nbytes for t in tensors),
    }


def make_plan(
  family: Family,
  source: Source,
  config: ModelConfig | LanguageConfig | None = None,
  further: Sequence[str] = (),
) -> Plan:
  """Matches every tensor of `source` with a parameter.

  Args:
    config: of the experiment the weights are meant for; its sizes must be the checkpoint's. A
      LanguageConfig for Qwen.
    further: problems found elsewhere, to be listed with the rest.

  Raises:
    CheckpointError: missing, unexpected, misshaped or integer tensors, damaged files, sizes that
      are not the experiment's; all of them by name with expected and got.
  """
  source = source.restore(family.prefix)
  problems = [*source.problems]
  try:
    naming, fields = family.module.infer(source.shapes(), source.config)
  except ConfigError as error:
    raise _refusal(family, source, [*problems, str(error), *further]) from error
  problems += compare(family, fields, config) if config else []
  used, statuses, more = match(family, source, family.module.model(fields), naming)
  problems += [*more, *further]
  if problems:
    raise _refusal(family, source, problems)
  return Plan(family, source, naming, fields, used, statuses)


def match(
  family: Family, source: Source, entries: Sequence[Entry], naming: Naming
) -> tuple[dict[str, Entry], dict[str, str], list[str]]:
  """(used entries by source key, status of the other keys, problems)."""
  wanted = {entry.key(naming): entry for entry in entries}
  aliases = _aliases(family, entries, naming)
  names = {key: alias for alias, key in aliases.items()}
  used, statuses, problems = {}, {}, []
  for key, entry in wanted.items():
    found = key if key in source.tensors else names.get(key, key)
    if found in source.tensors:
      used[found] = entry
      problems += _check_tensor(source.tensors[found], entry)
    elif not {key, found} & source.lost:
      problems.append(f'{key}: missing; expected shape {entry.shape}.')
  for key, tensor in source.tensors.items():
    if key in used:
      continue
    if aliases.get(key) in used:
      statuses[key] = 'alias'
      problems += _check_alias(tensor, source.tensors[aliases[key]])
    elif any(re.fullmatch(pattern, key) for pattern in family.module.IGNORED):
      statuses[key] = 'ignored'
    else:
      problems.append(f'{key}: unexpected, got shape {tensor.shape} in {tensor.file.name}.')
  return used, statuses, problems


def compare(
  family: Family, fields: Mapping[str, Any], config: ModelConfig | LanguageConfig
) -> list[str]:
  """Sizes in which an experiment's model differs from the checkpoint."""
  if isinstance(config, LanguageConfig):
    return _compare_language(family, fields, config)
  section = {'video': config.video, 'codec': config.codec, 'text': config.text}[family.component]
  expected = _flatten(f'model.{family.component}', dataclasses.asdict(section))
  got = _flatten(f'model.{family.component}', fields['config'])
  for name in family.undecided:
    expected.pop(f'model.{family.component}.{name}')
  if family.component == 'video':
    expected |= {
      'model.codec.channels': config.codec.channels,
      'model.text.width': config.text.width,
    }
    got |= {
      'model.codec.channels': fields['channels'],
      'model.text.width': fields['text_width'],
    }
  return _differences(expected, got)


def _compare_language(family: Family, fields, config: LanguageConfig) -> list[str]:
  """As `compare`; the checkpoint has to be either the VLM's or the reader's. A part that sees no
  images has no use for a vision tower, so the checkpoint may have one."""
  if config.kind == 'none':
    return ["language.kind: expected 'qwen', got 'none': the experiment has no language side."]
  problems = []
  for part in ('vlm', 'reader'):
    expected = _flatten(f'language.{part}', dataclasses.asdict(getattr(config, part)))
    for name in [*expected]:
      field = name.split('.', 2)[2]
      blind = not getattr(config, part).vision.layers
      unused = blind and field.startswith(('vision.', 'image_token', 'video_token'))
      if field in family.undecided or unused:
        del expected[name]
    differing = _differences(expected, _flatten(f'language.{part}', fields['config']))
    if not differing:
      return []
    problems += differing
  return problems


def _differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
  return [
    f'{name}: expected {value} (the experiment), got {got.get(name)} (the checkpoint).'
    for name, value in expected.items()
    if got.get(name) != value
  ]


def _aliases(family: Family, entries: Sequence[Entry], naming: Naming) -> dict[str, str]:
  """{other name: key} in this naming; a name that is a key of its own is no other name."""
  keys = {entry.diffusers: entry.key(naming) for entry in entries}
  others = {alias: keys[key] for alias, key in family.module.ALIASES.items() if key in keys}
  return {alias: key for alias, key in others.items() if alias not in keys.values()}


def _exact_type(a: np.dtype, b: np.dtype) -> np.dtype:
  """The smallest of the floating types that holds all values of both (float16 and bfloat16 hold
  neither the other's)."""
  if a == b:
    return a
  return np.dtype(np.float64 if FLOATS['F64'] in (a, b) else np.float32)


def _check_tensor(tensor: Tensor, entry: Entry) -> list[str]:
  problems = []
  if tensor.shape != tuple(entry.shape):
    problems.append(f'{tensor.key}: expected shape {tuple(entry.shape)}, got {tensor.shape}.')
  if tensor.dtype not in FLOATS:
    problems.append(
      f'{tensor.key}: expected one of {", ".join(FLOATS)}, got {tensor.dtype}. Quantised '
      'checkpoints cannot be converted.'
    )
  return problems


def _check_alias(alias: Tensor, tensor: Tensor) -> list[str]:
  """Two names of one tensor must hold the same bytes."""
  same = (alias.shape, alias.dtype) == (tensor.shape, tensor.dtype)
  if same and _sha256(alias) == _sha256(tensor):
    return []
  return [
    f'{alias.key}: expected a copy of {tensor.key} ({tensor.dtype} {tensor.shape}), got other '
    f'values ({alias.dtype} {alias.shape}).'
  ]


def _sha256(tensor: Tensor) -> bytes:
  file = MappedFile(tensor.file)
  result = hashlib.sha256(file.bytes(tensor.start, tensor.end)).digest()
  file.forget(tensor.start, tensor.end)
  return result


def _refusal(family: Family, source: Source, problems: list[str]) -> CheckpointError:
  text = (
    f'{source.root} cannot be converted as {family.name}, {len(problems)} '
    f'{"problem" if len(problems) == 1 else "problems"}:\n  ' + '\n  '.join(problems)
  )
  if found := pickles(source.folder):
    names = ', '.join(p.name for p in found)
    text += f'\nThe folder also holds {names}, which were not read. {resave_hint(found[0])}'
  return CheckpointError(text)


def _flatten(name: str, values: Any) -> dict[str, Any]:
  """Nested dicts as {'a.b': value}; lists and tuples alike."""
  if isinstance(values, Mapping):
    parts = (_flatten(f'{name}.{key}', value) for key, value in values.items())
    return {k: v for part in parts for k, v in part.items()}
  return {name: tuple(values) if isinstance(values, list) else values}
