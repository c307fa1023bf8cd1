"""The language side at inference: a VLM that looks at what the robot sees and plans its next event,
tells the denoiser about it in the place of the text encoder, or thinks in latents.

  observation, prompt -> reading -> plan (caption, remaining time) -> text of the caption
                                 -> latents -> text of the latents, or what the reader says of them

`planner`, `conditioned` and `staircase` are these as sources of text for a rollout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.config import ExperimentConfig, QwenConfig
from wallwm_jax.inference import sources
from wallwm_jax.inference.sources import Source, TextContext
from wallwm_jax.models import language
from wallwm_jax.models.language import PromptCache
from wallwm_jax.types import (
  ConfigError,
  InferenceParams,
  Language,
  Observation,
  Params,
  Prompt,
  Text,
  pytree_dataclass,
)

_TRAINED_BY = {'heads': '3', 'staircase': '4', 'projector': '4'}  # part -> stage


@pytree_dataclass
class Reading:
  """What the VLM made of a moment: hidden states, which of them exist, and the cache after them."""

  hidden: Float[Array, 'B S D']
  mask: Bool[Array, 'B S']
  cache: PromptCache


@pytree_dataclass
class Plan:
  """What the VLM proposes: caption [B] int32 row of `Language.bank`, remaining [B] s until that
  event ends, logits [B, I] over the bank.
  """

  caption: Int[Array, 'B']
  remaining: Float[Array, 'B']
  logits: Float[Array, 'B I']


@pytree_dataclass
class PlanningTable:
  """The captions of an environment's table (I rows) as a VLM meets them.

  prompts: [I, S], the question where the task is that caption. rows: [J] int32, the row of the
  table of each caption of `Language.bank`.
  """

  prompts: Prompt
  rows: Int[Array, 'J']


def require_parts(params: InferenceParams, parts: tuple[str, ...], purpose: str) -> Language:
  """The frozen language side of a model that has the trained `parts`.

  Raises:
    ConfigError: it has none, or lacks one of them; names `purpose` and the stages to train.
  """
  missing = [part for part in parts if part not in params.model]
  if params.frozen.language is None or missing:
    stages = sorted({'3'} | {_TRAINED_BY[part] for part in parts})
    lacks = f'has no {" and no ".join(missing)}' if missing else 'has no frozen VLM'
    raise ConfigError(
      f'{purpose}: expected a model with a language side, got one that {lacks}. Train stage '
      f"{' and stage '.join(stages)} with language.kind='qwen', or use a run that did."
    )
  return params.frozen.language


def read(
  params: InferenceParams, obs: Observation, prompt: Prompt, *, cfg: ExperimentConfig, size: int = 0
) -> Reading:
  """The VLM's one pass over a moment; everything else here continues from it.

  Args:
    obs: frames [B, V, T, H, W, 3] uint8, of which the VLM sees only the last, state [B, A]
      physical. prompt: [B, S]. size: slots of the cache, 0 = enough for an answer.
  """
  side, norm = require_parts(params, (), 'reading a prompt'), params.norm
  state = (obs.state - norm.state_mean) / norm.state_scale
  frames = obs.frames[:, :, -1]
  return Reading(
    *language.read_prompt(side, cfg.language, frames, state, obs.view_mask, prompt, size=size)
  )


def plan(
  params: InferenceParams,
  obs: Observation,
  prompt: Prompt,
  last: Int[Array, 'B'],
  *,
  cfg: ExperimentConfig,
) -> Plan:
  """The next event and its remaining time, as the heads of stage 3 read them off the VLM.

  Args:
    last: [B] int32, row of `Language.bank` of the event that was completed before, -1 = none.
  """
  return plan_of(params, read(params, obs, prompt, cfg=cfg), last, cfg=cfg)


def plan_of(
  params: InferenceParams, reading: Reading, last: Int[Array, 'B'], *, cfg: ExperimentConfig
) -> Plan:
  """`plan` of a moment that has been read."""
  side = require_parts(params, ('heads',), 'planning')
  logits, seconds = language.plan(
    params.model['heads'], side, cfg.language, cfg.model.text,
    reading.hidden, reading.mask, reading.cache, last,
  )  # fmt: skip
  return Plan(jnp.argmax(logits, -1).astype(jnp.int32), seconds, logits)


def planned_text(
  params: InferenceParams,
  obs: Observation,
  prompt: Prompt,
  answer: Prompt,
  *,
  cfg: ExperimentConfig,
) -> Text:
  """The VLM in the place of the text encoder: features [B, X, E] of a caption, a planned one or a
  person's, in what the robot sees.

  Args:
    answer: [B, Y], the caption as an answer to `prompt`.
  """
  return text_of_answer(params, read(params, obs, prompt, cfg=cfg), answer, cfg=cfg)


def text_of_answer(
  params: InferenceParams, reading: Reading, answer: Prompt, *, cfg: ExperimentConfig
) -> Text:
  """`planned_text` in a moment that has been read."""
  side = require_parts(params, ('heads',), 'text from a VLM')
  hidden = language.read_answer(side, cfg.language, answer, reading.cache)
  return _condition(params, hidden, answer.mask, cfg)


def think(
  params: InferenceParams, obs: Observation, prompt: Prompt, *, cfg: ExperimentConfig
) -> Float[Array, 'B Z D']:
  """The staircase's latent reasoning states about what the robot sees."""
  return latents_of(params, read(params, obs, prompt, cfg=cfg), cfg=cfg)


def latents_of(
  params: InferenceParams, reading: Reading, *, cfg: ExperimentConfig
) -> Float[Array, 'B Z D']:
  """`think` in a moment that has been read."""
  side = require_parts(params, ('staircase',), 'latent reasoning')
  return language.latent_states(params.model['staircase'], side.vlm, cfg.language, reading.cache)


def latent_text(
  params: InferenceParams, obs: Observation, prompt: Prompt, *, cfg: ExperimentConfig
) -> Text:
  """Source 3 of unified mode: text features [B, X, E] of the latents, no token sampled on the way:
  differentiable in `params.model`'s staircase and heads.
  """
  return text_of_latents(params, think(params, obs, prompt, cfg=cfg), cfg=cfg)


def text_of_latents(
  params: InferenceParams, latents: Float[Array, 'B Z D'], *, cfg: ExperimentConfig
) -> Text:
  """Latents through the project-out head."""
  require_parts(params, ('heads',), 'text from latents')
  return _condition(params, latents, None, cfg)


def explain(
  params: InferenceParams,
  latents: Float[Array, 'B Z D'],
  *,
  cfg: ExperimentConfig,
  end: int,
) -> Int[Array, 'B M']:
  """What the frozen reader says the latents mean, as token ids: M = `language.trace_tokens`.

  Args:
    end: id that ends an answer (`<|im_end|>`).
  """
  side = require_parts(params, ('projector',), 'explaining latents')
  c = cfg.language
  x = language.soft_prefix(params.model['projector'], c, latents)
  batch, count = x.shape[:2]
  positions = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (3, batch, count))
  mask, size = jnp.ones((batch, count), bool), count + c.trace_tokens
  hidden, cache = language.prefill(side.reader, c.reader, x, positions, mask, size=size)
  return generate(side.reader, c.reader, hidden[:, -1], cache, tokens=c.trace_tokens, end=end)


def reason(
  params: InferenceParams,
  obs: Observation,
  prompt: Prompt,
  opening: Int[Array, 'Y'],
  *,
  cfg: ExperimentConfig,
  end: int,
) -> Int[Array, 'B M']:
  """What the VLM itself answers in words, greedily, after the ids `opening` of its answer; M as in
  `explain`.
  """
  c, batch = cfg.language, prompt.ids.shape[0]
  size = prompt.ids.shape[1] + len(opening) + c.trace_tokens
  cache = read(params, obs, prompt, cfg=cfg, size=size).cache
  vlm = params.frozen.language.vlm
  ids = jnp.broadcast_to(jnp.asarray(opening, jnp.int32), (batch, len(opening)))
  hidden, cache = language.decode(vlm, c.vlm, language.embed(vlm, c.vlm, ids), cache)
  return generate(vlm, c.vlm, hidden[:, -1], cache, tokens=c.trace_tokens, end=end)


def generate(
  params: Params,
  config: QwenConfig,
  hidden: Float[Array, 'B D'],
  cache: PromptCache,
  *,
  tokens: int,
  end: int,
) -> Int[Array, 'B n']:
  """Greedy continuation: n = `tokens` ids, all `end` once that has been said.

  Args:
    hidden: state of the last token, after the final norm. cache: after that token, with at least
      tokens - 1 free slots.
  """

  def likeliest(hidden):
    logits = language.logits(params, config, hidden[:, None])[:, 0]
    return jnp.argmax(logits, -1).astype(jnp.int32)

  def step(carry, _):
    token, cache = carry
    hidden, cache = language.decode(
      params, config, language.embed(params, config, token[:, None]), cache
    )
    following = jnp.where(token == end, end, likeliest(hidden[:, 0]))
    return (following, cache), following

  first = likeliest(hidden)
  _, rest = jax.lax.scan(step, (first, cache), None, length=tokens - 1)
  return jnp.concatenate([first[None], rest]).T


@pytree_dataclass
class Memory:
  """What a planner remembers, rows of `Language.bank` (-1 = none): the event it takes to be
  completed, the one it asked for last, and the clock at which that one has run out.
  """

  done: Int[Array, '']
  asked: Int[Array, '']
  until: Int[Array, '']


def planner(
  params: InferenceParams, table: PlanningTable, *, cfg: ExperimentConfig, fps: float
) -> Source:
  """The VLM names the next event; its text is that of the frozen encoder.

  Args:
    fps: actions per second of the policy, what turns remaining time into latents.
  """

  def say(context: TextContext, reading: Reading, asked, row):
    return sources.lookup(context.captions, row).text, row

  return _planning(params, table, say, cfg, fps)


def conditioned(
  params: InferenceParams, table: PlanningTable, *, cfg: ExperimentConfig, fps: float
) -> Source:
  """As `planner`, but the text too is the VLM's: its states at the caption, projected out."""

  side = require_parts(params, ('heads',), 'text from a VLM')

  def say(context: TextContext, reading: Reading, asked, row):
    answer = jax.tree.map(lambda x: jnp.asarray(x)[asked][None], side.answers)
    return text_of_answer(params, reading, answer, cfg=cfg), row

  return _planning(params, table, say, cfg, fps)


def staircase(
  params: InferenceParams, table: PlanningTable, *, cfg: ExperimentConfig, fps: float
) -> Source:
  """Source 3: text of the latents, which stand for no caption; they last as long as the event."""

  def say(context: TextContext, reading: Reading, asked, row):
    text = text_of_latents(params, latents_of(params, reading, cfg=cfg), cfg=cfg)
    return text, sources.NOTHING

  return _planning(params, table, say, cfg, fps)


# Sources that ask a VLM by name, and the trained parts of the model that each needs.
SPEAKERS = {
  'planner': (planner, ('heads',)),
  'conditioned': (conditioned, ('heads',)),
  'staircase': (staircase, ('heads', 'staircase')),
}
PLANNERS = ('planner', 'conditioned')  # those that name the caption they go by


def _planning(params, table: PlanningTable, say, cfg: ExperimentConfig, fps: float) -> Source:
  """A source that plans anew at every turn; say(context, reading, asked, row) answers with (text,
  caption asked for), given the planned caption's row of `Language.bank` and of the caption table.

  An event counts as completed once its planned time has passed: the policy has no other sign.
  """

  def start(captions) -> Memory:
    return Memory(jnp.int32(-1), jnp.int32(-1), jnp.int32(0))

  def speak(context: TextContext, memory: Memory):
    prompt = jax.tree.map(lambda x: jnp.asarray(x)[context.instruction][None], table.prompts)
    reading = read(params, context.obs, prompt, cfg=cfg)
    done = jnp.where(context.clock >= memory.until, memory.asked, memory.done)
    planned = plan_of(params, reading, done[None], cfg=cfg)
    latents = jnp.ceil(planned.remaining[0] * fps / cfg.model.steps_per_latent)
    # A wild estimate must not overflow; no window is longer than this.
    length = jnp.clip(latents, 1, 2**16).astype(jnp.int32)
    asked = planned.caption[0]
    text, caption = say(context, reading, asked, jnp.asarray(table.rows)[asked])
    return sources.request(text, length, caption), Memory(done, asked, context.clock + length)

  return Source(start, speak)


def _condition(params: InferenceParams, hidden, mask, cfg: ExperimentConfig) -> Text:
  heads = params.model['heads']
  return language.condition(heads, cfg.language, cfg.model.text, hidden, mask)[0]
