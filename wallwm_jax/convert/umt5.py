"""The UMT5 encoder: `text_encoder/` of the diffusers repositories, the authors'
`models_t5_umt5-xxl-enc-bf16.pth`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from wallwm_jax import presets
from wallwm_jax.config import TextConfig, UMT5Config
from wallwm_jax.convert.entries import Entry, Layout, Naming
from wallwm_jax.types import ConfigError

# transformers ties both names to one tensor; a file may hold either or both.
ALIASES: dict[str, str] = {'encoder.embed_tokens.weight': 'shared.weight'}
# A whole encoder-decoder checkpoint serves too: only its encoder is read.
IGNORED: tuple[str, ...] = (r'decoder\..*', r'lm_head\.weight')

_EMBEDDING = {'diffusers': 'shared.weight', 'original': 'token_embedding.weight'}


def entries(config: TextConfig) -> list[Entry]:
  """Every tensor of the encoder of `config`; sizes in the order of torch."""
  c, width = config.umt5, config.width
  inner = c.heads * c.head_dim
  found = [
    Entry('shared.weight', 'token_embedding.weight', (c.vocab, width), 'embed/embedding'),
    Entry('encoder.final_layer_norm.weight', 'norm.weight', (width,), 'norm/scale'),
  ]
  # suffix in transformers, suffix of the authors, torch shape, parameter, layout
  rows: list[tuple[str, str, tuple[int, ...], str, Layout]] = [
    ('layer.0.layer_norm', 'norm1', (width,), 'attn_norm/scale', 'same'),
    *(
      (f'layer.0.SelfAttention.{n}', f'attn.{n}', (inner, width), f'{n}/kernel', 'linear')
      for n in ('q', 'k', 'v')
    ),
    ('layer.0.SelfAttention.o', 'attn.o', (width, inner), 'o/kernel', 'linear'),
    (
      'layer.0.SelfAttention.relative_attention_bias',
      'pos_embedding.embedding',
      (c.buckets, c.heads),
      'rel_bias/embedding',
      'same',
    ),
    ('layer.1.layer_norm', 'norm2', (width,), 'ffn_norm/scale', 'same'),
    ('layer.1.DenseReluDense.wi_0', 'ffn.gate.0', (c.ffn, width), 'gate/kernel', 'linear'),
    ('layer.1.DenseReluDense.wi_1', 'ffn.fc1', (c.ffn, width), 'up/kernel', 'linear'),
    ('layer.1.DenseReluDense.wo', 'ffn.fc2', (width, c.ffn), 'down/kernel', 'linear'),
  ]
  for n in range(c.layers):
    found += [
      Entry(
        f'encoder.block.{n}.{theirs}.weight',
        f'blocks.{n}.{authors}.weight',
        shape,
        f'blocks/{path}',
        layout,
        n,
      )
      for theirs, authors, shape, path, layout in rows
    ]
  return found


def model(fields: Mapping[str, Any]) -> list[Entry]:
  """`entries` of the fields that `infer` returned, also after a round trip through JSON."""
  config = dict(fields['config'])
  return entries(TextConfig(**config | {'umt5': UMT5Config(**config['umt5'])}))


def infer(
  shapes: Mapping[str, tuple[int, ...]], source_config: Mapping[str, Any] | None = None
) -> tuple[Naming, dict[str, Any]]:
  """Which naming a checkpoint has, and the sizes of its encoder.

  Args:
    shapes: key -> torch shape. source_config: the parsed config.json beside it, or None; then the
      distance of the last bucket and epsilon, which no shape shows, are umt5-xxl's.

  Returns:
    (naming, {'config': TextConfig as a dict}), X as Wan runs it.

  Raises:
    ConfigError: another family (T5 shares one bias table, plain FFNs), a key without which the
      sizes are unknown, or a config.json that contradicts the tensors.
  """
  shapes = {ALIASES.get(key, key): tuple(shape) for key, shape in shapes.items()}
  naming = _naming(shapes)
  block = {'diffusers': r'encoder\.block\.(\d+)\.', 'original': r'blocks\.(\d+)\.'}[naming]
  rows = [int(match[1]) for key in shapes if (match := re.match(block, key))]
  layers = max(rows, default=-1) + 1
  tiny = UMT5Config(layers=1)
  keys = {
    entry.path: entry.key(naming) for entry in entries(TextConfig(umt5=tiny)) if entry.layer == 0
  }
  bias, q, gate = (
    _shape(shapes, keys[f'blocks/{name}'])
    for name in ('rel_bias/embedding', 'q/kernel', 'gate/kernel')
  )
  _check_family(shapes, keys['blocks/rel_bias/embedding'], layers)
  vocab, width = shapes[_EMBEDDING[naming]]
  buckets, heads = bias
  if q[0] % heads:
    raise ConfigError(
      f'umt5: {keys["blocks/q/kernel"]} has {q[0]} rows, which its {heads} heads (the columns of '
      f'{keys["blocks/rel_bias/embedding"]}) do not divide.'
    )
  sizes = dict(
    vocab=vocab, layers=layers, heads=heads, head_dim=q[0] // heads, ffn=gate[0], buckets=buckets
  )
  published = _published(source_config or {}, sizes | {'width': width})
  config = TextConfig(
    kind='umt5',
    tokens=presets.UMT5_XXL.tokens,
    width=width,
    umt5=UMT5Config(**sizes, **published),
  )
  return naming, {'config': dataclasses.asdict(config)}


def _naming(shapes: Mapping[str, tuple[int, ...]]) -> Naming:
  for naming, key in _EMBEDDING.items():
    if key in shapes:
      return naming
  raise ConfigError(
    f'umt5: expected a key {" or ".join(map(repr, _EMBEDDING.values()))}, got {len(shapes)} keys '
    f'such as {sorted(shapes)[:3]}. This is not the checkpoint of a UMT5 encoder.'
  )


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str) -> tuple[int, ...]:
  if key in shapes and len(shapes[key]) == 2:
    return shapes[key]
  plain = re.sub(r'wi_0|gate\.0', 'wi', key)
  if plain != key and plain in shapes:
    raise ConfigError(
      f'umt5: expected a gated feed-forward ({key}), got a plain one ({plain}). Only UMT5 encoders '
      'with gated-gelu are supported.'
    )
  raise ConfigError(
    f'umt5: {key!r} tells the sizes of the encoder; expected a matrix, got '
    f'{shapes.get(key, "no such key")}. Is a shard of the checkpoint missing?'
  )


def _check_family(shapes: Mapping[str, tuple[int, ...]], first: str, layers: int) -> None:
  """T5 has one table of relative biases, in its first layer; UMT5 one in every layer."""
  tables = [re.sub(r'\.0\.', f'.{n}.', first, count=1) in shapes for n in range(layers)]
  if layers > 1 and sum(tables) == 1:
    raise ConfigError(
      f'umt5: expected a table of relative biases in each of {layers} layers, got only {first}. '
      'That is T5, not UMT5.'
    )


def _published(source: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
  """Epsilon and the last bucket's distance from config.json, after a check of everything else."""
  names = dict(
    vocab='vocab_size',
    width='d_model',
    layers='num_layers',
    heads='num_heads',
    head_dim='d_kv',
    ffn='d_ff',
    buckets='relative_attention_num_buckets',
  )
  wrong = [
    f'{theirs}={source[theirs]} but the tensors say {sizes[ours]}'
    for ours, theirs in names.items()
    if theirs in source and source[theirs] != sizes[ours]
  ]
  expected = {'model_type': 'umt5', 'feed_forward_proj': 'gated-gelu'}
  wrong += [
    f'{key}={source[key]!r}, expected {value!r}'
    for key, value in expected.items()
    if source.get(key, value) != value
  ]
  if wrong:
    raise ConfigError(f'umt5: config.json does not fit the checkpoint: {"; ".join(wrong)}.')
  default = UMT5Config()
  return dict(
    max_distance=int(source.get('relative_attention_max_distance', default.max_distance)),
    eps=float(source.get('layer_norm_epsilon', default.eps)),
  )
