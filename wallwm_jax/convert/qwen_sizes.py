"""Sizes of a Qwen3.5 checkpoint from the shapes of its tensors, checked against its config.json."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping

from wallwm_jax.config import QwenConfig, VisionTowerConfig
from wallwm_jax.convert import qwen_config
from wallwm_jax.types import ConfigError

Shapes = Mapping[str, tuple[int, ...]]

VISION = 'model.visual.'
NO_VISION = VisionTowerConfig(layers=0)
_MIXERS = {'linear_attn': 'linear', 'self_attn': 'full'}


class Tensors:
  """Sizes of the decoder as its tensors have them, and `wrong`: what config.json says otherwise.

  Args:
    shapes: of the whole checkpoint. prefix: of the decoder's keys. stated: its config.json.

  Raises (all methods):
    ConfigError: a tensor that is missing or has another rank, layers of no known type.
  """

  def __init__(self, shapes: Shapes, prefix: str, stated: qwen_config.Stated):
    self.shapes, self.stated, self._prefix = shapes, stated, prefix
    self.wrong: list[str] = []
    self.types = self._layer_types()

  def outer(self, name: str, rank: int, fields: tuple[str, ...] = ()) -> tuple[int, ...]:
    """Shape of a tensor outside the layers, compared with config.json's `fields`."""
    key = self._prefix + name
    return self._compare(key, [self.shapes[key]] if key in self.shapes else [], rank, fields)

  def layer(
    self, name: str, rank: int, fields: tuple[str, ...] = (), kind: str | None = None
  ) -> tuple[int, ...]:
    """Shape that a tensor has in most layers (of a type)."""
    keys = [
      f'{self._prefix}layers.{n}.{name}' for n, t in enumerate(self.types) if kind in (None, t)
    ]
    found = [self.shapes[key] for key in keys if key in self.shapes]
    return self._compare(keys[0], found, rank, fields)

  def check(self, field: str, size: int, key: str) -> None:
    """Notes a size of config.json that is not that of the tensors."""
    said = self.stated.text.get(field, size)
    if said != size:
      self.wrong.append(f'{field}={said!r}, but the tensors say {size} ({key})')

  def _compare(self, key, found, rank, fields):
    found = [shape for shape in found if len(shape) == rank and all(shape)]
    if not found:
      raise ConfigError(
        f'qwen: {key!r} tells sizes of the model; expected {rank} axes, got '
        f'{self.shapes.get(key, "no such key")}. Is a shard of the checkpoint missing?'
      )
    shape = collections.Counter(found).most_common(1)[0][0]
    for field, size in zip(fields, shape):
      self.check(field, size, key)
    return shape

  def _layer_types(self) -> tuple[str, ...]:
    """From the keys of each layer; config.json fills in where they are missing."""
    pattern = re.compile(re.escape(self._prefix) + r'layers\.(\d+)\.(\w+)\.')
    found: dict[int, set[str]] = {}
    for key in self.shapes:
      if match := pattern.match(key):
        found.setdefault(int(match[1]), set()).update({_MIXERS.get(match[2], '')} - {''})
    count = max(found, default=-1) + 1
    stated = self.stated.layer_types(count)
    said = self.stated.text.get('num_hidden_layers', len(stated) if stated else count)
    if said != count:
      self.wrong.append(f'num_hidden_layers={said!r}, but the tensors have {count} layers')
    types = []
    for n in range(count):
      kinds = found.get(n) or ({stated[n]} if stated and n < len(stated) else set())
      if len(kinds) != 1:
        raise ConfigError(
          f'qwen: {self._prefix}layers.{n}: expected keys of either {" or ".join(_MIXERS)}, got '
          f'{"both" if kinds else "neither"}. Is a shard of the checkpoint missing?'
        )
      types += kinds
    for n, kind in enumerate(stated or ()):
      if n < count and kind != types[n]:
        self.wrong.append(f'layer {n} is {kind!r}, but the tensors say {types[n]!r}')
    if not count:
      raise ConfigError(f'qwen: expected keys {self._prefix}layers.*, got none.')
    return tuple(types)


def full_sizes(tensors: Tensors, default: QwenConfig) -> dict[str, int]:
  """heads, kv_heads, head_dim; of config.json or published where no layer has them."""
  names = dict(heads='num_attention_heads', kv_heads='num_key_value_heads', head_dim='head_dim')
  if 'full' not in tensors.types:
    return {
      ours: qwen_config.whole(tensors.stated.text, theirs, getattr(default, ours))
      for ours, theirs in names.items()
    }
  q, k, o, norm = (
    tensors.layer(f'self_attn.{part}.weight', rank, kind='full')
    for part, rank in (('q_proj', 2), ('k_proj', 2), ('o_proj', 2), ('q_norm', 1))
  )
  if q[0] == o[1]:
    raise ConfigError(
      f'qwen: expected the gated attention of Qwen3.5, in which self_attn.q_proj has twice the '
      f'rows ({2 * o[1]}) that o_proj has columns; got {q[0]}: the plain attention of Qwen3.'
    )
  sizes = dict(
    heads=_ratio(q[0], 2 * norm[0], 'self_attn.q_proj', '2 x head_dim (of q_norm)'),
    kv_heads=_ratio(k[0], norm[0], 'self_attn.k_proj', 'head_dim (of q_norm)'),
    head_dim=norm[0],
  )
  for ours, part in (('heads', 'q_proj'), ('kv_heads', 'k_proj'), ('head_dim', 'q_norm')):
    tensors.check(names[ours], sizes[ours], f'self_attn.{part}')
  return sizes


def linear_sizes(tensors: Tensors, default: QwenConfig) -> dict[str, int]:
  """Heads of the delta-rule layers. Shapes show the width of all keys, not how many heads share it:
  that is config.json's to say, or else they are as wide as the values, as in every public model."""
  stated = tensors.stated.text
  names = dict(
    linear_key_heads='linear_num_key_heads',
    linear_value_heads='linear_num_value_heads',
    linear_key_dim='linear_key_head_dim',
    linear_value_dim='linear_value_head_dim',
    conv='linear_conv_kernel_dim',
  )
  if 'linear' not in tensors.types:
    return {
      ours: qwen_config.whole(stated, theirs, getattr(default, ours))
      for ours, theirs in names.items()
    }
  (heads,) = tensors.layer('linear_attn.A_log', 1, (names['linear_value_heads'],), 'linear')
  (dim,) = tensors.layer('linear_attn.norm.weight', 1, (names['linear_value_dim'],), 'linear')
  taps = tensors.layer('linear_attn.conv1d.weight', 3, kind='linear')[2]
  tensors.check(names['conv'], taps, 'linear_attn.conv1d')
  rows = tensors.layer('linear_attn.in_proj_qkv.weight', 2, kind='linear')[0]
  keys = _ratio(rows - heads * dim, 2, 'linear_attn.in_proj_qkv less its values', 'q and k')
  what = 'the keys of linear_attn.in_proj_qkv'
  if 'linear_num_key_heads' not in stated:
    key_dim = qwen_config.whole(stated, 'linear_key_head_dim', dim)
    key_heads = _ratio(keys, key_dim, what, 'linear_key_head_dim')
  else:
    key_heads = qwen_config.whole(stated, 'linear_num_key_heads', 0)
    if 'linear_key_head_dim' in stated:
      key_dim = qwen_config.whole(stated, 'linear_key_head_dim', 0)
    else:
      key_dim = _ratio(keys, key_heads, what, 'linear_num_key_heads')
  if key_heads * key_dim != keys:
    tensors.wrong.append(
      f'linear_num_key_heads={key_heads} times linear_key_head_dim={key_dim}, but the tensors say '
      f'{keys} (linear_attn.in_proj_qkv)'
    )
  return dict(
    linear_key_heads=key_heads,
    linear_value_heads=heads,
    linear_key_dim=key_dim,
    linear_value_dim=dim,
    conv=taps,
  )


def vision_sizes(tensors: Tensors, width: int) -> VisionTowerConfig:
  """The vision tower of a model whose decoder is `width` wide."""
  shapes, said, wrong = tensors.shapes, tensors.stated.vision, tensors.wrong
  if not any(key.startswith(VISION) for key in shapes):
    if said is not None and said.get('depth', 1):
      wrong.append(f'vision_config of depth {said.get("depth")}, but no tensor {VISION}*')
    return NO_VISION
  if tensors.stated.present and said is None:
    raise ConfigError(f'qwen: config.json has no vision_config, but there are tensors {VISION}*.')
  patch, positions, merger, fc1 = (
    _vision_shape(shapes, name, rank)
    for name, rank in (
      ('patch_embed.proj.weight', 5), ('pos_embed.weight', 2), ('merger.linear_fc1.weight', 2),
      (r'blocks\.\d+\.mlp\.linear_fc1.weight', 2),
    )
  )  # fmt: skip
  numbers = [int(m[1]) for key in shapes if (m := re.match(rf'{VISION}blocks\.(\d+)\.', key))]
  d, merge = patch[0], math.isqrt(merger[1] // patch[0])
  sizes = dict(
    layers=max(numbers) + 1,
    width=d,
    ffn=fc1[0],
    patch=patch[4],
    temporal=patch[2],
    merge=merge,
    positions=positions[0],
  )
  names = ('depth', 'hidden_size', 'intermediate_size', 'patch_size', 'temporal_patch_size',
           'spatial_merge_size', 'num_position_embeddings')  # fmt: skip
  said = said or {}
  for name, size in [*zip(names, sizes.values()), ('out_hidden_size', width)]:
    values = said.get(name, size)
    if any(value != size for value in (values if isinstance(values, list) else [values])):
      wrong.append(f'vision_config.{name}={values!r}, but the tensors say {size}')
  if merger[1] != d * merge**2 or patch[3] != patch[4]:
    raise ConfigError(
      f'qwen: expected square patches and groups of them in {VISION}*, got patches of '
      f'{patch[3:]} and {merger[1]} merged values of {d} each.'
    )
  # No shape shows the heads: 12 in the tower of the 0.8B model, 16 in the others'.
  heads = 12 if d == VisionTowerConfig().width else 16
  if 'num_heads' not in said:
    _ratio(d, 4 * heads, f'the width of {VISION}*', f'4 x {heads} heads, as published,')
  heads = qwen_config.whole(said, 'num_heads', heads)
  return VisionTowerConfig(heads=heads, **sizes)


def _vision_shape(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
  found = [shape for key, shape in shapes.items() if re.fullmatch(VISION + name, key)]
  found = [shape for shape in found if len(shape) == rank and all(shape)]
  if not found:
    raise ConfigError(
      f'qwen: {VISION}{name} tells sizes of the vision tower; expected {rank} axes, found no such '
      'tensor. Is a shard of the checkpoint missing?'
    )
  return collections.Counter(found).most_common(1)[0][0]


def tied(shapes: Shapes, stated: qwen_config.Stated, wrong: list[str]) -> bool:
  """Whether the embedding is the output head. A head that is stored is kept as one of its own,
  unless config.json calls it the embedding's."""
  if 'lm_head.weight' in shapes:
    return stated.tied == {True}
  if stated.tied == {False}:
    wrong.append('tie_word_embeddings=False, but no tensor lm_head.weight')
  return True


def _ratio(a: int, b: int, what: str, by: str) -> int:
  if not isinstance(b, int) or b < 1 or a < 1 or a % b:
    raise ConfigError(
      f'qwen: {what}: expected a multiple of {by} = {b!r}, got {a}. If there is no config.json '
      'beside the checkpoint, put it there.'
    )
  return a // b
