"""The text encoder a config names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jax.sharding import Mesh

from wallwm_jax.config import MeshConfig, TextConfig
from wallwm_jax.parallel.rules import MeshRules
from wallwm_jax.text.hashed import HashTextEncoder
from wallwm_jax.types import Text


class TextEncoder(Protocol):
  """Anything that turns captions into Text features (NumPy, float32), on the host."""

  def encode(self, captions: Sequence[str]) -> Text:
    """Features [B, X, E] and mask [B, X] (True = the model attends to it) of B captions."""


def make_text_encoder(
  config: TextConfig, *, mesh: Mesh | None = None, rules: MeshRules = MeshConfig.rules
) -> TextEncoder:
  """The encoder of `config.kind`.

  Args:
    mesh: devices of this process that hold the weights of one that has some, split by `rules`
      (`MeshConfig.rules`); None = the first device. Weights are read when a caption needs them.
  """
  if config.kind == 'hash':
    return HashTextEncoder(config)
  # The hash encoder, made in every loader, needs neither the model nor the tokenizer library.
  from wallwm_jax.text.umt5 import UMT5TextEncoder

  return UMT5TextEncoder(config, mesh=mesh, rules=rules)
