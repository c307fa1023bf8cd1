"""Qwen3.5: token and image embeddings, the layers, the output head."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.config import QwenConfig
from wallwm_jax.models.binding import bind, fresh
from wallwm_jax.models.layers import Embedding
from wallwm_jax.models.vlm.cache import PromptCache
from wallwm_jax.models.vlm.layers import Layers, Projection, ZeroCentredNorm, append, slice_layers
from wallwm_jax.models.vlm.rotary import rotation, text_positions
from wallwm_jax.models.vlm.vision import VisionTower
from wallwm_jax.parallel.constraints import constrain
from wallwm_jax.types import ConfigError


class Qwen(nnx.Module):
  """The model of `config`; `vision` is absent where the config has no vision layers.

  Matmul operands and the residual stream are in `config.dtype`; norms, softmax, rotary angles,
  decay, recurrent state and logits are float32.
  """

  def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.text = _Text(config, rngs=rngs)
    if config.vision.layers:
      dtype = jnp.dtype(config.dtype)
      self.vision = VisionTower(config.vision, config.width, dtype, rngs=rngs)

  def embed(
    self,
    ids: Int[Array, 'B S'],
    images: tuple[Float[Array, 'N P pixels'], ...] = (),
    grids: tuple[tuple[int, int], ...] = (),
  ) -> Float[Array, 'B S D']:
    """Embeddings of the tokens; those that stand for images are what the vision tower sees, in
    order. There must be as many of them as features: only the host can count them.

    Raises:
      ConfigError: images without a vision tower, or not one grid per array of images.
    """
    c = self.config
    x = self.text.embed(ids).astype(c.dtype)
    if len(images) != len(grids):
      raise ConfigError(f'embed: expected a grid per array of images ({len(images)}), got {grids}.')
    if images and not c.vision.layers:
      raise ConfigError('embed: got images, but the config has no vision tower (vision.layers=0).')
    if images:
      features = [
        self.vision(patches, grid).reshape(-1, c.width)
        for patches, grid in zip(images, grids, strict=True)
      ]
      features = jnp.concatenate(features).astype(x.dtype)
      shown = ((ids == c.image_token) | (ids == c.video_token)).reshape(-1)
      index = jnp.clip(jnp.cumsum(shown) - 1, 0, len(features) - 1).reshape(ids.shape)
      x = jnp.where(shown.reshape(*ids.shape, 1), features[index], x)
    return constrain(x, 'batch', 'text', None)

  def prefill(
    self,
    x: Float[Array, 'B S D'],
    positions: Int[Array, '3 B S'],
    mask: Bool[Array, 'B S'],
    size: int,
  ) -> tuple[Float[Array, 'B S D'], PromptCache]:
    """(hidden states after the final norm, cache of `size` slots) of embeddings x.

    The tokens where `mask` is False, wherever they are, might as well not be there: they have no
    slot in the cache, and their hidden states are 0.

    Raises:
      ConfigError: more tokens than slots, or positions of another shape.
    """
    b, s = x.shape[:2]
    if s > size:
      raise ConfigError(f'prefill: a prompt of {s} tokens does not fit in a cache of size {size}.')
    if positions.shape != (3, b, s):
      raise ConfigError(f'prefill: expected positions [3, {b}, {s}], got {positions.shape}.')
    x, k, v, conv, state = self.text.layers.prefill(
      x.astype(self.config.dtype), rotation(self.config, positions), mask, size
    )
    length = mask.sum(1, dtype=jnp.int32)
    position = jnp.where(mask, positions, -1).max((0, 2)).astype(jnp.int32) + 1
    slots = jnp.arange(size) < length[:, None]
    return self.text.norm(x), PromptCache(k, v, conv, state, slots, length, position)

  def decode(
    self, x: Float[Array, 'B n D'], cache: PromptCache
  ) -> tuple[Float[Array, 'B n D'], PromptCache]:
    """n more text tokens: (hidden states after the final norm, the cache with them).

    Raises:
      ConfigError: they do not fit in the cache, as far as `append` can know.
    """
    n = x.shape[1]
    turn = rotation(self.config, text_positions(cache.position, n))
    x, *new = self.text.layers.extend(x.astype(self.config.dtype), turn, cache)
    return self.text.norm(x), append(cache, *new, n)

  def logits(self, hidden: Float[Array, 'B S D']) -> Float[Array, 'B S U']:
    """float32 logits of hidden states after the final norm."""
    if not self.config.tied:
      return self.text.head(hidden, jnp.float32)
    dtype = self.config.dtype
    table = self.text.embed.embedding[...].astype(dtype)
    return jnp.matmul(hidden.astype(dtype), table.T, preferred_element_type=jnp.float32)

  def each(
    self,
    x: Float[Array, 'B S D'],
    positions: Int[Array, '3 B S'],
    mask: Bool[Array, 'B S'],
  ) -> Float[Array, 'L B S D']:
    """The residual stream after every layer, 0 where `mask` is False."""
    types, params = self.config.layer_types, fresh(self.text.layers)
    turn, out = rotation(self.config, positions), []
    x = x.astype(self.config.dtype)
    for i in range(len(types)):
      layer = bind(
        Layers, self.config, slice_layers(params, types, i, i + 1), types[i : i + 1]
      )
      x = layer.prefill(x, turn, mask, x.shape[1])[0]
      out.append(x)
    return jnp.stack(out)


class _Text(nnx.Module):
  """Parameters of the text side."""

  def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
    c = config
    self.embed = Embedding(c.vocab, c.width, std=c.width**-0.5, rngs=rngs)
    self.layers = Layers(c, c.layer_types, rngs=rngs)
    self.norm = ZeroCentredNorm(c.width, c.eps)
    if not c.tied:
      self.head = Projection(c, c.width, c.vocab, rngs=rngs)
