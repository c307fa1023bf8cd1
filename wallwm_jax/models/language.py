"""The door to the language side: pure functions over nested dicts of arrays, as `functional` is
that of the world-action model.

  frames, state, instruction -> prompt -> hidden states and cache -> next event, remaining time
                                                        caption -> conditioning of the denoiser
                                              staircase latents -> conditioning, reasoning trace
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from wallwm_jax.config import LanguageConfig, QwenConfig, TextConfig
from wallwm_jax.models import staircase as stairs
from wallwm_jax.models.binding import bind, fresh
from wallwm_jax.models.vlm.backbone import Qwen
from wallwm_jax.models.vlm.cache import PromptCache
from wallwm_jax.models.vlm.heads import Heads, PrefixProjector
from wallwm_jax.models.vlm.vision import frames_to_patches
from wallwm_jax.types import Language, Params, PRNGKey, Prompt, PromptLayout, Text

__all__ = [
  'PromptCache',
  'condition',
  'decode',
  'embed',
  'init_heads',
  'init_projector',
  'init_qwen',
  'init_staircase',
  'insert_state',
  'latent_states',
  'logits',
  'next_event',
  'opening',
  'plan',
  'prefill',
  'read_answer',
  'read_on',
  'read_prompt',
  'remaining_time',
  'soft_prefix',
  'tokens_per_view',
  'trace_logits',
]

Grid = tuple[int, int]


def init_qwen(config: QwenConfig, key: PRNGKey) -> Params:
  """Random float32 parameters {'text': ..., 'vision': ...}, the latter where the config has one."""
  return fresh(Qwen(config, rngs=nnx.Rngs(key)))


def embed(
  params: Params,
  config: QwenConfig,
  ids: Int[Array, 'B S'],
  images: tuple[Float[Array, 'N P pixels'], ...] = (),
  grids: tuple[Grid, ...] = (),
) -> Float[Array, 'B S D']:
  """Input embeddings; the tokens `config.image_token` and `config.video_token` become what the
  vision tower sees.

  Args:
    images: one array per run of `images` frames that share a size: N frames of P patches, in the
      order of their placeholders (row by row of the batch). grids: (rows, columns) of patches of
      each array; static.
  """
  return bind(Qwen, config, params).embed(ids, images, grids)


def prefill(
  params: Params,
  config: QwenConfig,
  x: Float[Array, 'B S D'],
  positions: Int[Array, '3 B S'],
  mask: Bool[Array, 'B S'],
  *,
  size: int,
) -> tuple[Float[Array, 'B S D'], PromptCache]:
  """One pass over a prompt padded in front or behind.

  Args:
    x: of `embed`. positions: rotary positions (time, row, column). size: slots of the cache, >= S.

  Returns:
    (hidden states after the final norm, cache). Rows where `mask` is False mean nothing, and
    nothing reads them.

  Raises:
    ConfigError: a prompt longer than the cache.
  """
  return bind(Qwen, config, params).prefill(x, positions, mask, size)


def decode(
  params: Params, config: QwenConfig, x: Float[Array, 'B n D'], cache: PromptCache
) -> tuple[Float[Array, 'B n D'], PromptCache]:
  """n more tokens, causal among themselves: (hidden states after the final norm, longer cache)."""
  return bind(Qwen, config, params).decode(x, cache)


def logits(params: Params, config: QwenConfig, hidden) -> Float[Array, 'B S U']:
  """float32 logits of the next token."""
  return bind(Qwen, config, params).logits(hidden)


def tokens_per_view(config: LanguageConfig, image_size: tuple[int, int]) -> int:
  """Image tokens of one camera whose frames are `image_size`."""
  h, w = config.image_size or image_size
  return (h // config.vlm.vision.factor) * (w // config.vlm.vision.factor)


def insert_state(
  ids: Int[Array, 'B S'], state: Float[Array, 'B A'], layout: PromptLayout
) -> Int[Array, 'B S']:
  """`ids` with the normalised state written into its slots as two digits per channel: 00 at -3
  standard deviations or below, 99 at +3 or above."""
  value = jnp.clip((jnp.asarray(state)[:, layout.channels] + 3.0) / 6.0, 0.0, 1.0)
  level = jnp.round(99 * value).astype(jnp.int32)
  layout = jax.tree.map(jnp.asarray, layout)
  tens, units = layout.digits[level // 10], layout.digits[level % 10]
  return jnp.asarray(ids).at[:, layout.slots].set(jnp.stack([tens, units], -1))


def read_prompt(
  language: Language,
  config: LanguageConfig,
  frames: UInt8[Array, 'B V H W 3'],
  state: Float[Array, 'B A'],
  view_mask: Bool[Array, 'B V'],
  prompt: Prompt,
  *,
  size: int = 0,
) -> tuple[Float[Array, 'B S D'], Bool[Array, 'B S'], PromptCache]:
  """The VLM's view of a moment: (hidden states, which of them exist, cache).

  Args:
    state: normalised. size: slots of the cache; 0 = as many as the prompt and an answer need.
      Absent cameras are not attended to.
  """
  vlm, layout = config.vlm, jax.tree.map(jnp.asarray, language.layout)
  b, s = prompt.ids.shape
  ids = insert_state(prompt.ids, state, layout)
  present = jnp.asarray(view_mask)[:, jnp.maximum(layout.view, 0)] | (layout.view < 0)
  mask = prompt.mask & present
  h, w = config.image_size or frames.shape[2:4]
  patches = frames_to_patches(frames.reshape(-1, *frames.shape[2:]), (h, w), vlm.vision)
  x = embed(language.vlm, vlm, ids, (patches,), ((h // vlm.vision.patch, w // vlm.vision.patch),))
  positions = jnp.broadcast_to(layout.positions[:, None], (3, b, s))
  size = size or s + config.answer_tokens
  hidden, cache = prefill(language.vlm, vlm, x, positions, mask, size=size)
  return hidden, mask, cache


def read_answer(
  language: Language, config: LanguageConfig, answer: Prompt, cache: PromptCache
) -> Float[Array, 'B Y D']:
  """Hidden states at the tokens of an answer that follows the cached prompt."""
  x = embed(language.vlm, config.vlm, answer.ids)
  return decode(language.vlm, config.vlm, x, cache)[0]


def read_on(
  language: Language,
  config: LanguageConfig,
  hidden: Float[Array, 'B S D'],
  mask: Bool[Array, 'B S'],
  cache: PromptCache,
  answer: Prompt,
) -> tuple[Float[Array, 'B n D'], Bool[Array, 'B n']]:
  """Hidden states of a prompt and of an answer to it, and which of them exist."""
  more = read_answer(language, config, answer, cache)
  return jnp.concatenate([hidden, more], 1), jnp.concatenate([mask, answer.mask], 1)


def opening(language: Language, batch: int) -> Prompt:
  """The first tokens of any plan, for `read_on`: where the VLM has made up its mind."""
  ids = jnp.asarray(language.layout.opening)
  return Prompt(jnp.broadcast_to(ids, (batch, len(ids))), jnp.ones((batch, len(ids)), bool))


def plan(
  heads: Params,
  language: Language,
  config: LanguageConfig,
  text: TextConfig,
  hidden: Float[Array, 'B S D'],
  mask: Bool[Array, 'B S'],
  cache: PromptCache,
  last: Int[Array, 'B'],
) -> tuple[Float[Array, 'B I'], Float[Array, 'B']]:
  """(logits over the captions of `language.bank`, seconds that the likeliest of them still takes)
  of a prompt as `read_prompt` returns it. last: as in `next_event`.
  """
  begun = read_on(language, config, hidden, mask, cache, opening(language, len(mask)))
  scores = next_event(heads, config, text, *begun, language.bank, last)
  named = jnp.argmax(scores, -1)
  answer = jax.tree.map(lambda x: jnp.asarray(x)[named], language.answers)
  told = read_on(language, config, hidden, mask, cache, answer)
  return scores, remaining_time(heads, config, text, *told)


def init_heads(config: LanguageConfig, text: TextConfig, key: PRNGKey) -> Params:
  """Random float32 parameters of the project-out, next-event and remaining-time heads."""
  return fresh(Heads(config, text, rngs=nnx.Rngs(key)))


def condition(
  heads: Params,
  config: LanguageConfig,
  text: TextConfig,
  hidden: Float[Array, 'B S D'],
  mask: Bool[Array, 'B S'] | None = None,
) -> tuple[Text, Float[Array, 'B X']]:
  """The project-out head: hidden states at text positions (or latents) as features that stand in
  for the frozen text encoder's.

  Args:
    mask: states that exist; None = all, as latents do.

  Returns:
    (Text in the shape of the encoder's, logits of its mask: a row exists where they are > 0).
  """
  mask = jnp.ones(hidden.shape[:2], bool) if mask is None else mask
  features, present = bind(Heads, config, heads, text).condition(hidden, mask)
  return Text(features, present > 0), present


def next_event(
  heads: Params,
  config: LanguageConfig,
  text: TextConfig,
  hidden,
  mask,
  bank: Float[Array, 'I E'],
  last: Int[Array, 'B'],
) -> Float[Array, 'B I']:
  """Logits over the captions of `bank` from hidden states of a prompt and of a plan's opening, and
  the row of the event that was completed `last` (-1 = none).
  """
  return bind(Heads, config, heads, text).next_event(hidden, mask, bank, last)


def remaining_time(
  heads: Params, config: LanguageConfig, text: TextConfig, hidden, mask
) -> Float[Array, 'B']:
  """Seconds to the end of the running event, >= 0, from hidden states of a prompt and its plan."""
  return config.heads.time_unit * bind(Heads, config, heads, text).remaining(hidden, mask)


def init_staircase(config: LanguageConfig, vlm: Params, key: PRNGKey) -> Params:
  """The latent branch, its layers copies of the upper layers of the VLM `vlm`; float32."""
  return stairs.init(config, vlm, key)


def latent_states(
  staircase: Params, vlm: Params, config: LanguageConfig, cache: PromptCache
) -> Float[Array, 'B Z D']:
  """Z = K_c latent reasoning states on a cached prompt, by the config's mode; the cache is only
  read."""
  return stairs.latent_states(staircase, vlm, config, cache)


def init_projector(config: LanguageConfig, key: PRNGKey) -> Params:
  """Random float32 parameters of the prefix projector."""
  return fresh(PrefixProjector(config, rngs=nnx.Rngs(key)))


def soft_prefix(
  projector: Params, config: LanguageConfig, latents: Float[Array, 'B Z D']
) -> Float[Array, 'B Z D']:
  """Latents as embeddings that the reader may be given before a trace, in its compute dtype."""
  return bind(PrefixProjector, config, projector)(latents).astype(config.reader.dtype)


def trace_logits(
  projector: Params,
  reader: Params,
  config: LanguageConfig,
  latents: Float[Array, 'B Z D'],
  trace: Prompt,
) -> Float[Array, 'B M U']:
  """Logits of every token of a trace from the latents, as a soft prefix of the reader, and the
  tokens before it."""
  prefix = soft_prefix(projector, config, latents)
  x = jnp.concatenate([prefix, embed(reader, config.reader, trace.ids[:, :-1])], 1)
  mask = jnp.concatenate([jnp.ones(prefix.shape[:2], bool), trace.mask[:, :-1]], 1)
  positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), (3, *x.shape[:2]))
  hidden, _ = prefill(reader, config.reader, x, positions, mask, size=x.shape[1])
  return logits(reader, config.reader, hidden[:, prefix.shape[1] - 1 :])
