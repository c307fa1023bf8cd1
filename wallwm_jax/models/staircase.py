"""Staircase decoding: continuous latent reasoning states on a cached prompt, in one pass.

  depth   latent 0   1   2   3
   L-1       o  >  o > o > o      upper layers: own weights, at first copies of the VLM's. A latent
   ...       o  >  o > o > o      reads the prompt's cache and, per layer, the latents before it
   N_r       o  >  o > o > o
             ^----/---/---/       the relay, plus a learned step embedding for each latent
   ...       o                    lower layers: the frozen VLM's, for the first latent alone
    0      query

With `stagger` s > 0 latent k enters s layers above latent k - 1, with that latent's state there in
place of the relay. Two baselines: 'serial', every latent through all layers after the one before it
(Coconut, arXiv 2412.06769), and 'parallel', the staircase without a view of other latents.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from wallwm_jax.config import LanguageConfig
from wallwm_jax.models.binding import bind
from wallwm_jax.models.vlm.cache import PromptCache
from wallwm_jax.models.vlm.layers import (
  Layers,
  ZeroCentredNorm,
  append,
  slice_cache,
  slice_layers,
)
from wallwm_jax.models.vlm.rotary import rotation, text_positions
from wallwm_jax.types import CheckpointError, Params, PRNGKey


def init(config: LanguageConfig, vlm_params: Params, key: PRNGKey) -> Params:
  """float32 parameters {query [D], steps [Z, D], layers, norm}: layers N_r.. and the final norm are
  copies of the VLM's, query and steps random, as large as its token embeddings.

  Raises:
    CheckpointError: the VLM has other layers than the config says.
  """
  c, stairs, text = config.vlm, config.staircase, vlm_params['text']
  _check_layers('the VLM', text['layers'], c.layer_types)
  upper = slice_layers(text['layers'], c.layer_types, stairs.relay_depth, c.layers)
  table = text['embed']['embedding']
  rms = jnp.sqrt(jnp.vdot(table, table, preferred_element_type=jnp.float32) / table.size)
  draw = rms * jax.random.normal(key, (1 + stairs.latents, c.width))
  # Never the VLM's own buffers: training donates these.
  own = jax.tree.map(lambda x: jnp.array(x, jnp.float32), {'layers': upper, 'norm': text['norm']})
  return {'query': draw[0], 'steps': draw[1:], **own}


def latent_states(
  params: Params, vlm_params: Params, config: LanguageConfig, cache: PromptCache
) -> Float[Array, 'B Z D']:
  """float32 latents after the final norm, by `config.staircase.mode`.

  Latent k has the rotary position of the k-th token after the prompt. The cache is only read and
  needs no free slots.

  Raises:
    CheckpointError: parameters or a cache of other layers, widths or latents than the config's.
  """
  _check(params, vlm_params, config, cache)
  run = {'staircase': _staircase, 'serial': _serial, 'parallel': _parallel}
  return run[config.staircase.mode](_Stack(params, vlm_params, config), cache)


class _Stack:
  """All layers: those below N_r are the VLM's, the others the branch's own."""

  def __init__(self, params: Params, vlm_params: Params, config: LanguageConfig):
    c = self.config = config.vlm
    stairs = self.stairs = config.staircase
    self.query, self.steps, self._scale = params['query'], params['steps'], params['norm']['scale']
    self._lower = bind(Layers, c, vlm_params['text']['layers'], c.layer_types)
    self._upper = bind(Layers, c, params['layers'], c.layer_types[stairs.relay_depth :])

  def caches(self, cache: PromptCache) -> tuple[PromptCache, PromptCache]:
    """The cache of the lower and of the upper layers."""
    types, relay = self.config.layer_types, self.stairs.relay_depth
    return slice_cache(cache, types, 0, relay), slice_cache(cache, types, relay, len(types))

  def lower(self, x, cache: PromptCache):
    """As `Layers.extend`; `cache`: of these layers or of more."""
    return self._lower.extend(*self._given(x, cache, 0), 0, self.stairs.relay_depth)

  def upper(self, x, cache: PromptCache, start: int, stop: int, first=0):
    """As `Layers.extend`, at the depths start..stop-1, for the latents from `first` on."""
    relay = self.stairs.relay_depth
    return self._upper.extend(*self._given(x, cache, first), start - relay, stop - relay)

  def _given(self, x, cache, first):
    turn = rotation(self.config, text_positions(cache.position + first, x.shape[1]))
    return x.astype(self.config.dtype), turn, cache

  def relay(self, cache: PromptCache):
    """[B, 1, D], what the lower layers make of the query."""
    x = jnp.broadcast_to(self.query, (len(cache.position), 1, self.config.width))
    return self.lower(x, cache)[0]

  def norm(self, x):
    norm = ZeroCentredNorm(self.config.width, self.config.eps)
    norm.scale = nnx.Param(self._scale)
    return norm(x.astype(jnp.float32))


def _staircase(stack: _Stack, cache: PromptCache):
  stairs, depth = stack.stairs, stack.config.layers
  entered = 1 if stairs.stagger else stairs.latents
  lower, upper = stack.caches(cache)
  x = stack.relay(lower) + stack.steps[:entered]
  for k in range(entered, stairs.latents):
    x = stack.upper(x, upper, stairs.entry(k - 1), stairs.entry(k))[0]
    x = jnp.concatenate([x, x[:, -1:] + stack.steps[k]], 1)
  return stack.norm(stack.upper(x, upper, stairs.entry(stairs.latents - 1), depth)[0])


def _parallel(stack: _Stack, cache: PromptCache):
  stairs, depth = stack.stairs, stack.config.layers
  lower, upper = stack.caches(cache)

  def alone(x, k):
    return stack.upper(x, upper, stairs.relay_depth, depth, k)[0]

  x = (stack.relay(lower) + stack.steps)[:, :, None]
  return stack.norm(jax.vmap(alone, (1, 0), 1)(x, jnp.arange(stairs.latents))[:, :, 0])


def _serial(stack: _Stack, cache: PromptCache):
  stairs, c = stack.stairs, stack.config

  def latent(carry, step):
    x, (lower, upper) = carry
    x, *new = stack.lower(x + step, lower)
    lower = append(lower, *new, 1)
    x, *new = stack.upper(x, upper, stairs.relay_depth, c.layers)
    x = stack.norm(x)
    return (x, (lower, append(upper, *new, 1))), x

  query = jnp.broadcast_to(stack.query, (len(cache.position), 1, c.width))
  caches = stack.caches(_grow(cache, stairs.latents))
  _, z = jax.lax.scan(latent, (query, caches), stack.steps)
  return jnp.moveaxis(z[:, :, 0], 0, 1)


def _grow(cache: PromptCache, slots: int) -> PromptCache:
  """The cache with more free slots."""
  k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, slots), (0, 0))) for x in (cache.k, cache.v))
  mask = jnp.pad(cache.mask, ((0, 0), (0, slots)))
  return PromptCache(k, v, cache.conv, cache.state, mask, cache.length, cache.position)


def _check(params, vlm_params, config: LanguageConfig, cache: PromptCache) -> None:
  c, stairs = config.vlm, config.staircase
  _check_layers('the VLM', vlm_params['text']['layers'], c.layer_types)
  _check_layers('the staircase', params['layers'], c.layer_types[stairs.relay_depth :])
  _expect('steps of the staircase', params['steps'].shape, (stairs.latents, c.width))
  found = {'full': len(cache.k), 'linear': len(cache.conv)}
  _expect('layers of the cache', found, {kind: c.layer_types.count(kind) for kind in found})


def _check_layers(whose: str, layers: Params, types: tuple[str, ...]) -> None:
  found = {kind: len(part['input_norm']['scale']) for kind, part in layers.items()}
  _expect(f'layers of {whose}', found, {kind: types.count(kind) for kind in set(types)})


def _expect(what: str, found, expected) -> None:
  if found != expected:
    raise CheckpointError(
      f'{what}: expected {expected} by config.language (vlm, staircase.latents, '
      f'staircase.relay_depth), got {found}. Were these parameters made with another config?'
    )
