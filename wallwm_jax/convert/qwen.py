"""Qwen3.5 (dense) with or without its vision tower, as transformers names its tensors.

'diffusers' stands for the names of the whole model (Qwen3_5ForConditionalGeneration:
`model.language_model.*`, `model.visual.*`), which all public checkpoints have, and 'original' for
those of the text-only class (Qwen3_5ForCausalLM: `model.*`), which has no vision tower: written out
under them, a model is left with its language part.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from wallwm_jax.config import QwenConfig, VisionTowerConfig
from wallwm_jax.convert import qwen_config, qwen_sizes
from wallwm_jax.convert.entries import Entry, Layout, Naming
from wallwm_jax.types import ConfigError

Shapes = Mapping[str, tuple[int, ...]]
Row = tuple[str, tuple[int, ...], str, Layout]  # suffix in torch, torch shape, parameter, layout

# A tied model may be stored with a copy of its embedding.
ALIASES: dict[str, str] = {'lm_head.weight': 'model.language_model.embed_tokens.weight'}
# The heads of multi-token prediction, which public checkpoints carry; tables of rotary frequencies.
IGNORED: tuple[str, ...] = (r'mtp\..*', r'.*\.rotary_(pos_)?emb\.(original_)?inv_freq')

_TEXT: dict[Naming, str] = {'diffusers': 'model.language_model.', 'original': 'model.'}
# Siblings, by a key that only they have.
_SIBLINGS = (
  (r'\.mlp\.(experts\.|shared_expert|gate\.weight$)', 'a mixture of experts, such as qwen3_5_moe'),
  (r'deepstack_merger_list', 'the DeepStack of Qwen3-VL'),
  (r'linear_attn\.in_proj_(qkvz|ba)\.', 'the fused projections of Qwen3-Next'),
  (r'self_attn\.[qkv]_proj\.bias$', 'the attention biases of Qwen2'),
  (r'visual\.merger\.(mlp|ln_q)\.', 'the vision tower of Qwen2-VL'),
)


def entries(config: QwenConfig) -> list[Entry]:
  """Every tensor of the model of `config`, its multi-token heads apart; sizes in torch's order."""
  d = config.width
  found = [
    _text('embed_tokens.weight', (config.vocab, d), 'embed/embedding'),
    _text('norm.weight', (d,), 'norm/scale'),
  ]
  if not config.tied:
    head = ('lm_head.weight', 'lm_head.weight', (config.vocab, d), 'text/head/kernel', 'linear')
    found.append(Entry(*head))
  mixers, shared = {'linear': _linear, 'full': _full}, [*_shared(config)]
  rows = {kind: [*mixers[kind](config), *shared] for kind in set(config.layer_types)}
  above = collections.Counter()  # layers of each type so far: rows of its parameters
  for n, kind in enumerate(config.layer_types):
    for suffix, shape, path, layout in rows[kind]:
      path = f'layers/{kind}/{path}'
      found.append(_text(f'layers.{n}.{suffix}', shape, path, layout, above[kind]))
    above[kind] += 1
  return found + ([*_vision(config.vision, d)] if config.vision.layers else [])


def model(fields: Mapping[str, Any]) -> list[Entry]:
  """`entries` of the fields that `infer` returned, also after a round trip through JSON."""
  return entries(make_config(fields['config']))


def make_config(values: Mapping[str, Any]) -> QwenConfig:
  """The QwenConfig of `dataclasses.asdict`, lists in the place of tuples allowed."""
  plain = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
  return QwenConfig(**plain | {'vision': VisionTowerConfig(**values['vision'])})


def infer(
  shapes: Shapes, source_config: Mapping[str, Any] | None = None
) -> tuple[Naming, dict[str, Any]]:
  """Naming and sizes of a checkpoint.

  Args:
    shapes: key -> torch shape. source_config: the parsed config.json beside it, or None. What no
      shape shows (rotary embedding, epsilon, split of the linear layers' keys into heads, heads of
      the vision tower, ids of image tokens) comes from it, or else is what Qwen3.5 was published
      with.

  Returns:
    (naming, {'config': QwenConfig as a dict}).

  Raises:
    ConfigError: a sibling of another architecture, a key missing that a size follows from, or a
      config.json that contradicts the tensors.
  """
  shapes = {key: tuple(shape) for key, shape in shapes.items()}
  _check_family(shapes, source_config or {})
  naming = _naming(shapes)
  stated = qwen_config.read(source_config)
  tensors = qwen_sizes.Tensors(shapes, _TEXT[naming], stated)
  vocab, width = tensors.outer('embed_tokens.weight', 2, ('vocab_size', 'hidden_size'))
  vision = qwen_sizes.NO_VISION
  if naming == 'diffusers':
    vision = qwen_sizes.vision_sizes(tensors, width)
  default = QwenConfig()
  values = dict(
    vocab=vocab,
    width=width,
    layer_types=tensors.types,
    ffn=tensors.layer('mlp.gate_proj.weight', 2, ('intermediate_size',))[0],
    eps=float(qwen_config.number(stated.text, 'rms_norm_eps', default.eps)),
    rope_theta=float(qwen_config.number(stated.rope, 'rope_theta', default.rope_theta)),
    rotary=float(qwen_config.number(stated.rope, 'partial_rotary_factor', default.rotary)),
    mrope_section=qwen_config.sections(stated.rope, default.mrope_section),
    tied=qwen_sizes.tied(shapes, stated, tensors.wrong),
    image_token=int(qwen_config.number(stated.text, 'image_token_id', default.image_token)),
    video_token=int(qwen_config.number(stated.text, 'video_token_id', default.video_token)),
    **qwen_sizes.full_sizes(tensors, default),
    **qwen_sizes.linear_sizes(tensors, default),
    vision=vision,
  )
  if tensors.wrong:
    raise ConfigError(
      f'qwen: config.json does not fit the checkpoint: {"; ".join(tensors.wrong)}.'
    )
  return naming, {'config': dataclasses.asdict(QwenConfig(**values))}


def _text(
  suffix: str, shape: tuple[int, ...], path: str, layout: Layout = 'same', row: int | None = None
) -> Entry:
  keys = (f'{_TEXT[naming]}{suffix}' for naming in ('diffusers', 'original'))
  return Entry(*keys, shape, f'text/{path}', layout, row)


def _linear(c: QwenConfig) -> Iterator[Row]:
  """Of a gated delta-rule layer."""
  values, heads = c.linear_value_heads * c.linear_value_dim, c.linear_value_heads
  name = 'linear_attn.{}'.format
  for theirs, ours, size in (
    ('qkv', 'qkv', c.conv_channels), ('z', 'z', values), ('b', 'b', heads), ('a', 'a', heads),
  ):  # fmt: skip
    yield name(f'in_proj_{theirs}.weight'), (size, c.width), f'{ours}/kernel', 'linear'
  yield name('conv1d.weight'), (c.conv_channels, 1, c.conv), 'conv/kernel', 'flat'
  yield name('A_log'), (heads,), 'log_decay', 'same'
  yield name('dt_bias'), (heads,), 'dt_bias', 'same'
  yield name('norm.weight'), (c.linear_value_dim,), 'out_norm/scale', 'same'
  yield name('out_proj.weight'), (c.width, values), 'out/kernel', 'linear'


def _full(c: QwenConfig) -> Iterator[Row]:
  """Of a gated attention layer."""
  inner, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
  name = 'self_attn.{}'.format
  for part, size in (('q', 2 * inner), ('k', keys), ('v', keys)):
    yield name(f'{part}_proj.weight'), (size, c.width), f'{part}/kernel', 'linear'
  for part in ('q', 'k'):
    yield name(f'{part}_norm.weight'), (c.head_dim,), f'{part}_norm/scale', 'same'
  yield name('o_proj.weight'), (c.width, inner), 'o/kernel', 'linear'


def _shared(c: QwenConfig) -> Iterator[Row]:
  """Of every layer."""
  yield 'input_layernorm.weight', (c.width,), 'input_norm/scale', 'same'
  yield 'post_attention_layernorm.weight', (c.width,), 'post_norm/scale', 'same'
  for part in ('gate', 'up'):
    yield f'mlp.{part}_proj.weight', (c.ffn, c.width), f'{part}/kernel', 'linear'
  yield 'mlp.down_proj.weight', (c.width, c.ffn), 'down/kernel', 'linear'


def _vision(c: VisionTowerConfig, out: int) -> Iterator[Entry]:
  d, merged = c.width, c.width * c.merge**2
  patch = (d, 3, c.temporal, c.patch, c.patch)
  yield from _affine('patch_embed.proj', 'patch_embed', patch, 'flat')
  table = (f'{qwen_sizes.VISION}pos_embed.weight', '', (c.positions, d))
  yield Entry(*table, 'vision/positions/embedding')
  blocks = (
    ('attn.qkv', 'qkv', (3 * d, d)),
    ('attn.proj', 'proj', (d, d)),
    ('mlp.linear_fc1', 'fc1', (c.ffn, d)),
    ('mlp.linear_fc2', 'fc2', (d, c.ffn)),
  )
  for m in range(c.layers):
    for part in ('norm1', 'norm2'):
      yield from _affine(f'blocks.{m}.{part}', f'blocks/{part}', (d,), 'same', m)
    for theirs, ours, shape in blocks:
      yield from _affine(f'blocks.{m}.{theirs}', f'blocks/{ours}', shape, 'linear', m)
  yield from _affine('merger.norm', 'merger/norm', (d,), 'same')
  yield from _affine('merger.linear_fc1', 'merger/fc1', (merged, merged), 'linear')
  yield from _affine('merger.linear_fc2', 'merger/fc2', (out, merged), 'linear')


def _affine(theirs: str, ours: str, shape, layout: Layout, row: int | None = None):
  """Weight and bias of a linear map, or of a norm (layout 'same')."""
  weight = 'scale' if layout == 'same' else 'kernel'
  for suffix, name, size, how in (
    ('weight', weight, shape, layout), ('bias', 'bias', shape[:1], 'same'),
  ):  # fmt: skip
    key = f'{qwen_sizes.VISION}{theirs}.{suffix}'
    yield Entry(key, '', size, f'vision/{ours}/{name}', how, row)


def _naming(shapes: Shapes) -> Naming:
  for naming, prefix in _TEXT.items():
    if any(key.startswith((f'{prefix}embed_tokens.', f'{prefix}layers.')) for key in shapes):
      return naming
  raise ConfigError(
    f'qwen: expected keys {_TEXT["diffusers"]}embed_tokens.weight (the whole model) or '
    f'{_TEXT["original"]}embed_tokens.weight (the text-only class), got {len(shapes)} keys such as '
    f'{sorted(shapes)[:3]}. This is not a Qwen3.5 checkpoint.'
  )


def _check_family(shapes: Shapes, source: Mapping[str, Any]) -> None:
  found = []
  if (kind := source.get('model_type')) not in (None, *qwen_config.MODEL_TYPES):
    found.append(f'model_type {kind!r} in config.json')
  for pattern, what in _SIBLINGS:
    if key := next((key for key in shapes if re.search(pattern, key)), None):
      found.append(f'{key} ({what})')
  if found:
    raise ConfigError(f'qwen: expected a dense Qwen3.5 checkpoint, found {", ".join(found)}.')
