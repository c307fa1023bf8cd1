"""Sessions whose text a VLM makes: what they are told is what the source says in a rollout."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clients import STATE, encode, request, resize
from tiny_language import IMAGE, PROMPT, VIEW_TOKENS, random_tokens

from wallwm_jax.geometry.poses import apply_relative
from wallwm_jax.inference import language, sources
from wallwm_jax.inference.language import PlanningTable
from wallwm_jax.inference.serve.engines import ModelEngine
from wallwm_jax.inference.serve.model import ModelPolicy
from wallwm_jax.inference.serve.speakers import Speakers
from wallwm_jax.inference.sources import CaptionTable, TextContext
from wallwm_jax.types import ActionChunk, ConfigError, DataError, Observation

FPS = 10.0
CAPTIONS = ('go up', 'go right')
TASK = 'tidy the table'


def prompts(instructions):
  """Tokens that depend on the instruction alone; long ones do not fit, as with a tokenizer."""
  if long := [text for text in instructions if len(text) > 40]:
    raise ConfigError(f'{long[0]!r} takes {len(long[0])} tokens')
  rows = [random_tokens(1, [16], PROMPT, seed=zlib.crc32(text.encode())) for text in instructions]
  made = jax.tree.map(lambda *x: np.concatenate(x), *rows)
  made.ids[:, : 2 * VIEW_TOKENS] = IMAGE
  return made


@pytest.fixture(scope='module')
def engine(side_cfg, side_params):
  return ModelEngine(side_cfg, side_params, bucket=2, max_batch=1)


@pytest.fixture(scope='module')
def policy(engine, side_cfg, side_params):
  speakers = Speakers(side_cfg, side_params, prompts, CAPTIONS, encode(CAPTIONS), fps=FPS)
  return ModelPolicy(engine, encode, resize, modes=['event', 'chunk'], speakers=speakers)


def ask(policy, memory, seed=0, **changes):
  asked = {k: v for k, v in request(seed).items() if k != 'event'}
  (reply,) = policy.infer([policy.check(asked | changes, memory)])
  return reply


@pytest.fixture(scope='module')
def expected(engine, side_cfg, side_params):
  """(source, request, turn, clock, memory) -> (actions, Request, memory), by the source itself."""
  table = PlanningTable(prompts([TASK]), np.arange(2))
  captions = CaptionTable(encode(CAPTIONS), np.ones(2, np.int32))

  @functools.partial(jax.jit, static_argnums=0)
  def speak(name, params, obs, clock, memory):
    source = language.SPEAKERS[name][0](params, table, cfg=side_cfg, fps=FPS)
    zero = jnp.int32(0)
    return source.speak(TextContext(obs, captions, zero, zero[None], zero, zero, clock), memory)

  def run(name, seed, turn, clock, memory):
    asked = request(seed)
    frames = np.stack([asked[f'observation/{view}'] for view in side_cfg.model.views])
    obs = Observation(
      frames[None, :, None], np.float32(asked['observation/state'])[None], np.ones((1, 2), bool)
    )
    if memory is None:
      memory = language.SPEAKERS[name][0](side_params, table, cfg=side_cfg, fps=FPS).start(captions)
    said, memory = speak(name, side_params, obs, np.int32(clock), memory)
    free = ActionChunk(np.zeros((1, 8, 10), np.float32), np.zeros((1, 8), bool))
    length = np.minimum(said.length, 2)[None]
    actions = engine.act('event', obs, said.text, length, free, np.uint32([turn]))
    return apply_relative(obs.state[:, None], actions)[0], said, memory

  return run


@pytest.mark.parametrize('name', language.SPEAKERS)
def test_a_session_is_told_what_the_source_says(policy, expected, name):
  memory, kept, clock = policy.start(), None, 0
  for turn, executed in ((1, None), (2, 5), (3, 8), (4, 8)):
    moved = {} if executed is None else {'executed': executed}
    clock += executed or 0
    reply = ask(policy, memory, seed=turn, prompt=TASK, source=name, **moved)
    actions, said, kept = expected(name, turn, turn, clock // 4, kept)
    length = min(int(said.length), 2) * 4
    assert reply['chunk_len'] == length and reply['remaining_steps'] == 4 * int(said.length)
    np.testing.assert_allclose(reply['actions'][:length], actions[:length], rtol=1e-3, atol=1e-3)
    assert (reply['actions'][length:] == reply['actions'][length - 1]).all()
    caption = CAPTIONS[int(said.caption)] if int(said.caption) != sources.NOTHING else ''
    assert (reply['source'], reply['event_text']) == (name, caption)
    done = memory.plans[name][1].inner
    jax.tree.map(np.testing.assert_array_equal, done, kept)


def test_sources_change_in_mid_session_and_each_keeps_its_memory(policy):
  memory = policy.start()
  first = ask(policy, memory, prompt=TASK, source='planner')
  asked = memory.plans['planner'][1].inner
  latent = ask(policy, memory, source='staircase')
  assert latent['event_text'] == '' and latent['source'] == 'staircase'
  told = ask(policy, memory, source='instruction')
  assert (told['event_text'], told['chunk_len']) == (TASK, 8) and 'remaining_steps' not in told
  atomic = ask(policy, memory, event='lift the cube', source='atomic')
  assert atomic['event_text'] == 'lift the cube'
  assert ask(policy, memory)['source'] == 'atomic'  # kept
  assert memory.plans['planner'][1].inner is asked  # rested meanwhile, but its clock went on
  again = ask(policy, memory, source='planner', executed=0)
  assert memory.clock == first['chunk_len'] + latent['chunk_len'] + 2 * 8
  assert again['source'] == 'planner' and set(memory.plans) == {'planner', 'staircase'}
  assert ask(policy, memory, reset=True, prompt='start over')['source'] == 'instruction'
  assert not memory.plans and memory.clock == 0


def test_over_chunks_a_plan_is_held_until_it_has_run_out(policy):
  memory = policy.start()
  first = ask(policy, memory, prompt=TASK, source='planner', mode='chunk')
  assert first['remaining_steps'] > 4  # else there is nothing to hold
  moved = ask(policy, memory, seed=5, executed=4)
  assert moved['remaining_steps'] == first['remaining_steps'] - 4
  assert moved['event_text'] == first['event_text']
  for _ in range(first['remaining_steps'] // 4):
    last = ask(policy, memory, seed=5, executed=4)
  fresh = ask(policy, memory, seed=5, mode='event', executed=0)
  assert last['remaining_steps'] > 0 and fresh['remaining_steps'] > 0
  # Another task is planned for at once.
  other = ask(policy, memory, seed=5, mode='chunk', prompt='something else', executed=0)
  assert memory.plans['planner'][0] == 'something else'
  assert other['source'] == 'planner'


def test_what_cannot_be_asked_of_a_vlm_is_refused(policy, side_cfg, side_params):
  def refused(message, policy=policy, **changes):
    memory = policy.start()
    with pytest.raises(DataError, match=message):
      ask(policy, memory, **changes)
    assert memory == policy.start()

  known = r"\['atomic', 'instruction', 'planner', 'conditioned', 'staircase'\]"
  refused(rf"source: expected one of {known}, got 'oracle'", source='oracle', prompt=TASK)
  refused("prompt: expected a text .* source 'planner', got none", source='planner')
  refused('event: expected a text .* of source .atomic.', source='atomic', prompt=TASK)
  refused('prompt: expected a text that the VLM can', source='planner', prompt='x' * 41)
  refused('source: expected one of', source=['planner'], prompt=TASK)
  plain = ModelPolicy(ModelEngine(side_cfg, side_params, bucket=2), encode, resize)
  refused(
    r"source: expected one of \['atomic', 'instruction'\], got 'planner'", plain,
    source='planner', prompt=TASK,
  )  # fmt: skip
  assert plain.metadata['sources'] == ['atomic', 'instruction']


def test_a_model_offers_the_sources_that_it_was_trained_for(side_cfg, side_params):
  model = {name: part for name, part in side_params.model.items() if name != 'staircase'}
  params = dataclasses.replace(side_params, model=model)
  speakers = Speakers(side_cfg, params, prompts, CAPTIONS, encode(CAPTIONS), fps=FPS)
  assert speakers.names == ('planner', 'conditioned')
  policy = ModelPolicy(
    ModelEngine(side_cfg, params, bucket=2), encode, resize, speakers=speakers, source='planner'
  )
  asked = request(observation_state=STATE)
  del asked['observation_state'], asked['event']
  assert policy.check(asked | {'prompt': TASK}, policy.start()).source == 'planner'
  with pytest.raises(ConfigError, match='source: expected one of'):
    ModelPolicy(ModelEngine(side_cfg, params), encode, resize, source='planner')
