"""What the config.json of a Qwen3.5 checkpoint says, wherever a version of transformers put it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from wallwm_jax.types import ConfigError

MODEL_TYPES = ('qwen3_5', 'qwen3_5_text')
_LAYERS = {'linear_attention': 'linear', 'full_attention': 'full'}
# What the model of this project does whatever the config says; absent fields mean the same.
_FIXED_TEXT = {'hidden_act': ('silu',), 'attention_bias': (False,), 'attn_output_gate': (True,)}
_FIXED_ROPE = {
  'rope_type': ('default',),
  'type': ('default', 'mrope'),
  'mrope_interleaved': (True,),
}
_FIXED_VISION = {
  'hidden_act': ('gelu_pytorch_tanh',),
  'in_channels': (3,),
  'deepstack_visual_indexes': ([],),
}


@dataclasses.dataclass(frozen=True)
class Stated:
  """The fields that are there and not null.

  text: of the decoder, those under text_config before those beside it; rope: of its rotary
  embedding, from rope_parameters, rope_scaling or flat fields, in this order; vision: None without
  a vision_config. tied: every value that tie_word_embeddings has.
  """

  model_type: str | None
  text: Mapping[str, Any]
  rope: Mapping[str, Any]
  vision: Mapping[str, Any] | None
  tied: frozenset[bool]
  present: bool

  def layer_types(self, layers: int) -> tuple[str, ...] | None:
    """'linear' or 'full' per layer, None where the file does not say.

    Raises:
      ConfigError: other types of layers, or no interval.
    """
    if (named := self.text.get('layer_types')) is not None:
      if not isinstance(named, Sequence) or not {*map(str, named)} <= {*_LAYERS}:
        raise ConfigError(
          f'qwen: config.json layer_types: expected a list of {" and ".join(_LAYERS)}, got {named}.'
        )
      return tuple(_LAYERS[kind] for kind in named)
    if (interval := self.text.get('full_attention_interval')) is None:
      return None
    if not isinstance(interval, int) or interval < 1:
      raise ConfigError(
        f'qwen: config.json full_attention_interval: expected >= 1, got {interval!r}.'
      )
    return tuple('linear' if (i + 1) % interval else 'full' for i in range(layers))


def read(source: Mapping[str, Any] | None) -> Stated:
  """The parsed config.json, {} and None alike for none.

  Raises:
    ConfigError: a section that is no object, or a setting of another architecture.
  """
  top = _fields(source or {}, 'config.json')
  text = top | _fields(top.get('text_config', {}), 'config.json text_config')
  rope = {
    name: text[name]
    for name in ('rope_theta', 'partial_rotary_factor', 'mrope_section', 'mrope_interleaved')
    if name in text
  }
  for section in ('rope_scaling', 'rope_parameters'):
    rope |= _fields(text.get(section, {}), f'config.json {section}')
  vision = top.get('vision_config')
  vision = None if vision is None else _fields(vision, 'config.json vision_config')
  wrong = [
    *_other(text, _FIXED_TEXT, 'text_config.'),
    *_other(rope, _FIXED_ROPE, 'rope_parameters.'),
    *_other(vision or {}, _FIXED_VISION, 'vision_config.'),
  ]
  if wrong:
    raise ConfigError(f'qwen: config.json is that of another architecture: {"; ".join(wrong)}.')
  tied = {
    bool(part['tie_word_embeddings'])
    for part in (top, top.get('text_config') or {})
    if part.get('tie_word_embeddings') is not None
  }
  return Stated(top.get('model_type'), text, rope, vision, frozenset(tied), bool(source))


def number(fields: Mapping[str, Any], name: str, default: float) -> float:
  """A number of `fields`.

  Raises:
    ConfigError: it is none.
  """
  value = fields.get(name, default)
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise ConfigError(f'qwen: config.json {name}: expected a number, got {value!r}.')
  return value


def whole(fields: Mapping[str, Any], name: str, default: int) -> int:
  """As `number`, whole and at least 1."""
  value = number(fields, name, default)
  if value != int(value) or value < 1:
    raise ConfigError(f'qwen: config.json {name}: expected a whole number >= 1, got {value!r}.')
  return int(value)


def sections(fields: Mapping[str, Any], default: tuple[int, ...]) -> tuple[int, ...]:
  """mrope_section: three counts of frequencies."""
  value = fields.get('mrope_section', default)
  whole_numbers = isinstance(value, Sequence) and all(isinstance(n, int) for n in value)
  if not whole_numbers or len(value) != 3:
    raise ConfigError(f'qwen: config.json mrope_section: expected three counts, got {value!r}.')
  return tuple(value)


def _fields(values: Any, where: str) -> dict[str, Any]:
  if not isinstance(values, Mapping):
    raise ConfigError(f'qwen: {where}: expected an object, got {values!r}.')
  return {name: value for name, value in values.items() if value is not None}


def _other(fields: Mapping[str, Any], fixed: Mapping[str, tuple], where: str) -> list[str]:
  return [
    f'{where}{name}: expected {" or ".join(map(repr, known))}, got {fields[name]!r}'
    for name, known in fixed.items()
    if name in fields and fields[name] not in known
  ]
