"""The language side at inference: plans, the VLM's text, latents, words, and rollouts that follow
them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import point_mass_env
import pytest
from tiny_language import IMAGE, PROMPT, TRACE, VIEW_TOKENS, VOCAB, random_tokens

from wallwm_jax import config as configs
from wallwm_jax.inference import denoiser, language, sources
from wallwm_jax.inference.denoiser import Window
from wallwm_jax.inference.language import PlanningTable
from wallwm_jax.inference.rollout import LoopSpec, closed_loop, rollout_chunks, rollout_events
from wallwm_jax.models import language as door
from wallwm_jax.types import (
  ActionChunk,
  ConfigError,
  InferenceParams,
  Prompt,
  path_string,
)

KEY = jax.random.key(3)
GO_RIGHT, GO_UP, INSTRUCTION = range(point_mass_env.NUM_CAPTIONS)
LAST = np.array([-1, 1])  # what was completed before, in each row of `moment`
ROWS = (GO_UP, GO_RIGHT)  # the bank has the captions of events, in another order than the table
FPS = 10.0


@pytest.fixture(scope='module')
def table() -> PlanningTable:
  prompts = random_tokens(3, [18, 14, 16], PROMPT, seed=1)
  prompts.ids[:, : 2 * VIEW_TOKENS] = IMAGE
  return PlanningTable(prompts, np.array(ROWS))


@pytest.fixture(scope='module')
def moment(make_inputs, table, side_params):
  """(observation, prompt, answer) of B = 2 with a history of frames."""
  obs, _ = make_inputs(frames=5)
  prompt = jax.tree.map(lambda x: jnp.asarray(x[:2]), table.prompts)
  return obs, prompt, side_params.frozen.language.answers


@pytest.fixture(scope='module')
def everything(side_cfg):
  """Jitted (params, obs, prompt, answer) -> all that the VLM makes of a moment."""

  @jax.jit
  def run(side_params, obs, prompt, answer):
    return {
      'plan': language.plan(side_params, obs, prompt, LAST, cfg=side_cfg),
      'planned': language.planned_text(side_params, obs, prompt, answer, cfg=side_cfg),
      'latent': language.latent_text(side_params, obs, prompt, cfg=side_cfg),
    }

  return run


@pytest.fixture(scope='module')
def outcome(side_params, moment, everything):
  return everything(side_params, *moment)


def different(a, b) -> bool:
  return max(float(np.abs(x - y).max()) for x, y in zip(a, b)) > 1e-4


def read_off(outcome):
  """The numbers of an outcome that must change when what is seen changes."""
  texts = [outcome[name].features for name in ('planned', 'latent')]
  return [outcome['plan'].logits, outcome['plan'].remaining, *texts]


def test_a_plan_is_what_the_heads_say(side_cfg, side_params, moment, outcome):
  obs, prompt, _ = moment
  norm, side, found = side_params.norm, side_params.frozen.language, outcome['plan']

  @jax.jit
  def expected():
    state = (obs.state - norm.state_mean) / norm.state_scale
    c, heads = side_cfg.language, side_params.model['heads']
    reading = door.read_prompt(
      side, c, obs.frames[:, :, -1], state, obs.view_mask, prompt
    )
    hidden, mask, cache = reading
    # The next event is read where a plan has begun, the time where the plan has been said.
    begun = door.read_answer(side, c, door.opening(side, len(mask)), cache)
    exists = jnp.concatenate([mask, jnp.ones(begun.shape[:2], bool)], 1)
    seen = jnp.concatenate([hidden, begun], 1)
    logits = door.next_event(heads, c, side_cfg.model.text, seen, exists, side.bank, LAST)
    answer = jax.tree.map(lambda x: x[jnp.argmax(logits, -1)], side.answers)
    told = door.read_on(side, c, hidden, mask, cache, answer)
    return logits, door.remaining_time(heads, c, side_cfg.model.text, *told)

  logits, remaining = expected()
  np.testing.assert_allclose(found.logits, logits, atol=1e-4)
  np.testing.assert_allclose(found.remaining, remaining, atol=1e-4)
  np.testing.assert_array_equal(found.caption, np.argmax(found.logits, -1))
  assert found.caption.dtype == jnp.int32 and np.all(found.remaining > 0)


def test_the_vlm_sees_the_last_frame_only(side_params, moment, everything, outcome):
  obs, *asked = moment
  past = dataclasses.replace(obs, frames=obs.frames.at[:, :, :-1].set(0))
  jax.tree.map(np.testing.assert_array_equal, everything(side_params, past, *asked), outcome)
  now = dataclasses.replace(obs, frames=obs.frames.at[:, :, -1].set(0))
  for a, b in zip(read_off(everything(side_params, now, *asked)), read_off(outcome)):
    assert different([a], [b])


def test_the_state_and_the_instruction_are_read(side_params, moment, everything, outcome):
  obs, prompt, answer = moment
  moved = dataclasses.replace(obs, state=obs.state.at[:, 0].add(1.0))
  assert different(read_off(everything(side_params, moved, prompt, answer)), read_off(outcome))
  other = dataclasses.replace(prompt, ids=prompt.ids.at[:, 13].add(1))
  assert different(read_off(everything(side_params, obs, other, answer)), read_off(outcome))


def test_an_absent_camera_is_not_looked_at(side_params, moment, everything, outcome):
  obs, *asked = moment
  hidden = [
    dataclasses.replace(obs, frames=frames, view_mask=jnp.array([[True, False]] * 2))
    for frames in (obs.frames, obs.frames.at[:, 1].set(0))
  ]
  a, b = (everything(side_params, seen, *asked) for seen in hidden)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), a, b)
  assert different(read_off(a), read_off(outcome))


@pytest.mark.parametrize('kind', ['planned', 'latent'])
def test_text_of_the_vlm_stands_in_for_the_encoders(side_cfg, moment, outcome, kind):
  text = outcome[kind]
  denoiser.check_inputs(side_cfg, Window.chunk(side_cfg), moment[0], text)
  assert 0 < np.asarray(text.mask).mean() and np.isfinite(text.features).all()


def test_generation_is_argmax_of_whole_prompts(side_cfg, side_params):
  """Against a prefill of everything said so far at every token, with rows of different length."""
  c, reader = side_cfg.language.reader, side_params.frozen.language.reader
  lengths, tokens = [6, 4], 5
  prompt = random_tokens(2, lengths, 6, seed=3)

  @functools.partial(jax.jit, static_argnames='size')
  def prefill(ids, mask, size):
    x = door.embed(reader, c, ids)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), (3, *ids.shape))
    hidden, cache = door.prefill(reader, c, x, positions, mask, size=size)
    last = mask.sum(1) - 1
    return hidden[jnp.arange(2), last], cache

  said = [[], []]
  for _ in range(tokens):
    for row, n in enumerate(lengths):
      ids = np.zeros((2, 6 + tokens), np.int32)
      so_far = [*prompt.ids[row, :n], *said[row]]
      ids[:, : len(so_far)] = so_far
      hidden, _ = prefill(ids, np.arange(6 + tokens)[None] < [[len(so_far)]] * 2, 6 + tokens)
      said[row].append(int(np.argmax(door.logits(reader, c, hidden[:1, None])[0, 0])))
  hidden, cache = prefill(prompt.ids, prompt.mask, 6 + tokens - 1)
  generate = jax.jit(functools.partial(language.generate, config=c, tokens=tokens),
                     static_argnames='end')
  free = generate(reader, hidden=hidden, cache=cache, end=VOCAB)
  assert np.asarray(free).tolist() == said
  end = said[0][1]
  stopped = np.asarray(generate(reader, hidden=hidden, cache=cache, end=end))[0].tolist()
  first = said[0].index(end)
  assert stopped == said[0][:first] + [end] * (tokens - first)


def test_words_of_the_latents_are_the_readers_likeliest(side_cfg, side_params, moment):
  """What is said, given back as a trace, is the argmax at every one of its tokens."""
  c, side = side_cfg.language, side_params.frozen.language

  @jax.jit
  def run(obs, prompt):
    latents = language.think(side_params, obs, prompt, cfg=side_cfg)
    said = language.explain(side_params, latents, cfg=side_cfg, end=VOCAB)
    trace = Prompt(said, jnp.ones_like(said, bool))
    projector = side_params.model['projector']
    return latents, said, door.trace_logits(projector, side.reader, c, latents, trace)

  latents, said, logits = run(*moment[:2])
  assert latents.shape == (2, 3, 32) and said.shape == (2, TRACE)
  np.testing.assert_array_equal(np.argmax(logits, -1), said)
  assert len(set(np.asarray(said).flat)) > 2


def test_the_vlms_own_words_continue_the_opening(side_cfg, side_params, moment):
  c, side, opening = side_cfg.language, side_params.frozen.language, np.array([7, 9])

  @jax.jit
  def run(obs, prompt):
    said = language.reason(side_params, obs, prompt, opening, cfg=side_cfg, end=VOCAB)
    whole = jnp.concatenate([jnp.broadcast_to(opening, (2, 2)), said], 1)[:, :-1]
    size = PROMPT + whole.shape[1]
    cache = language.read(side_params, obs, prompt, cfg=side_cfg, size=size).cache
    hidden = door.read_answer(side, c, Prompt(whole, jnp.ones_like(whole, bool)), cache)
    return said, door.logits(side.vlm, c.vlm, hidden[:, 1:])

  said, logits = run(*moment[:2])
  np.testing.assert_array_equal(np.argmax(logits, -1), said)
  assert len(set(np.asarray(said).flat)) > 2


def speakers(side_params, table, side_cfg):
  """The sources of unified mode, in the order of this list."""
  ask = {'cfg': side_cfg, 'fps': FPS}
  return [
    sources.instruction,
    sources.atomic,
    language.staircase(side_params, table, **ask),
    sources.held(language.planner(side_params, table, **ask)),
    sources.held(language.conditioned(side_params, table, **ask)),
  ]


@pytest.fixture(
  scope='module', params=['chunk', pytest.param('event', marks=pytest.mark.slow)]
)
def roll(request, side_cfg, side_params, env, captions, table):
  """roll(schedule, rows=ROWS, lie=False) -> Rollout of two attempts, jitted and vmapped.

  rows: of the table, for the captions of the bank; lie: the environment names a wrong event. The
  goal is out of reach, so GO_RIGHT is the right one for ever.
  """

  @jax.jit
  def run(schedule, rows, lie):
    phrases = dataclasses.replace(table, rows=rows)
    source = sources.switched(speakers(side_params, phrases, side_cfg), schedule)
    world = env._replace(caption=lambda state: jnp.where(lie, GO_UP, env.caption(state)))
    fixed = {'cfg': side_cfg, 'source': source}
    if request.param == 'event':
      one = functools.partial(rollout_events, bucket=2, max_events=3, **fixed)
    else:
      one = functools.partial(rollout_chunks, max_chunks=3, **fixed)
    return jax.vmap(lambda key: one(side_params, world, 2.0, key, captions))(
      jax.random.split(KEY, 2)
    )

  return lambda schedule, rows=ROWS, lie=False: run(jnp.array(schedule), jnp.array(rows), lie)


def test_rollouts_follow_every_source_and_switch_between_them(roll):
  alone = [roll([i] * 3) for i in range(5)]
  allowed = [{INSTRUCTION}, {GO_RIGHT}, {sources.NOTHING}, {*ROWS}, {*ROWS}]
  for i, out in enumerate(alone):
    assert np.isfinite(out.turns.actions.actions).all()
    assert set(np.asarray(out.turns.asked).flat) <= allowed[i]
  heard = [alone[i].turns.actions.actions[:, 0] for i in (0, 1, 2, 4)]
  assert all(np.abs(a - b).max() > 1e-4 for i, a in enumerate(heard) for b in heard[:i])
  switched = roll([4, 2, 0]).turns
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 0], b[:, 0]), switched,
               alone[4].turns)
  np.testing.assert_array_equal(switched.asked[:, 1:], [[sources.NOTHING, INSTRUCTION]] * 2)
  assert np.all(np.any(switched.poses[:, 1] != alone[4].turns.poses[:, 1], axis=(1, 2)))


def test_who_said_it_changes_no_bit_of_the_chunk(roll):
  """A VLM that can only name the caption of the script leads to the script's chunks exactly, as
  far as both want events of one length."""
  rows = (GO_RIGHT, GO_RIGHT)
  script, *others = (roll(schedule, rows).turns for schedule in ([1] * 3, [3] * 3, [1, 3, 1]))
  same_length = [
    np.logical_and.accumulate(np.all(x.actions.mask == script.actions.mask, axis=2), axis=1)
    for x in others
  ]
  assert any(same.any() for same in same_length)
  for turns, same in zip(others, same_length):
    for a, b in zip(jax.tree.leaves(turns), jax.tree.leaves(script)):
      np.testing.assert_array_equal(np.asarray(a)[same], np.asarray(b)[same])


def test_planners_do_not_know_the_script(roll):
  """An environment that lies about its next event is planned for exactly the same."""
  for schedule in ([2, 3, 4], [4, 4, 4]):
    honest, lied = (roll(schedule, lie=lie).turns for lie in (False, True))
    assert np.all(lied.caption == GO_UP) and np.all(honest.caption == GO_RIGHT)
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(lied, caption=honest.caption),
                 honest)


@pytest.fixture
def simple_vlm(monkeypatch):
  """simple_vlm(seconds): a VLM that plans GO_RIGHT while x < 0.5, then GO_UP, for so long."""

  def patch(seconds):
    def read(params, obs, prompt, *, cfg, size=0):
      return language.Reading(obs.state[:, None, :1], jnp.ones((1, 1), bool), None)

    def plan(heads, side, config, text, hidden, mask, cache, last):
      logits = jnp.where(hidden[:, 0] < 0.5, jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0]))
      return logits, jnp.array([seconds], jnp.float32)

    monkeypatch.setattr(language, 'read', read)
    monkeypatch.setattr(door, 'plan', plan)

  return patch


def walk(obs, text, key, length):
  """A quarter to the right in every turn of two latents, whatever is said."""
  actions = jnp.zeros((1, 8, 10)).at[0, :, 0].set(jnp.linspace(0.0, 0.25, 9)[1:])
  return ActionChunk(actions, jnp.ones((1, 8), bool))


@pytest.mark.parametrize(
  ('seconds', 'latents'), [(0.0, 1), (0.39, 1), (0.41, 2), (1.9, 5), (1e9, 2**16)]
)
def test_remaining_time_is_the_length_of_the_event(
  side_cfg, side_params, env, captions, table, simple_vlm, seconds, latents
):
  """4 steps per latent at 10 per second: a latent lasts 0.4 s; windows cut what is longer."""
  simple_vlm(seconds)
  planner = language.planner(side_params, table, cfg=side_cfg, fps=FPS)
  lengths = []

  def act(obs, text, key, length):
    chunk = walk(obs, text, key, length)
    return dataclasses.replace(chunk, mask=jnp.arange(8)[None] < 4 * length[:, None])

  def speak(context, state):
    asked, state = planner.speak(context, state)
    jax.debug.callback(lambda n: lengths.append(int(n)), asked.length)
    return asked, state

  out = closed_loop(act, sources.Source(planner.start, speak), env, 0.9, KEY, captions,
                    spec=LoopSpec(turns=1, bucket=2))
  jax.effects_barrier()
  assert lengths == [latents]
  assert int(out.turns.actions.mask.sum()) == 4 * min(latents, 2)


def test_a_planner_remembers_what_has_run_out(
  side_cfg, side_params, env, captions, table, monkeypatch
):
  """An event counts as done once its planned time has passed, not when a turn is over."""
  told = []

  def plan(heads, side, config, text, hidden, mask, cache, last):
    jax.debug.callback(lambda row: told.append(int(row)), last[0])
    return jnp.array([[1.0, 0.0]]), jnp.array([3 * 0.4], jnp.float32)

  monkeypatch.setattr(door, 'plan', plan)
  planner = language.planner(side_params, table, cfg=side_cfg, fps=FPS)
  closed_loop(walk, planner, env, 5.0, KEY, captions, spec=LoopSpec(turns=4, bucket=2))
  jax.effects_barrier()
  # Turns carry out 2 latents of the 3 that each plan asks for: none has run out.
  assert told == [-1, -1, -1, -1]

  def short(*args):
    logits, _ = plan(*args)
    return logits, jnp.array([2 * 0.4], jnp.float32)

  told.clear()
  monkeypatch.setattr(door, 'plan', short)
  planner = language.planner(side_params, table, cfg=side_cfg, fps=FPS)
  closed_loop(walk, planner, env, 5.0, KEY, captions, spec=LoopSpec(turns=3, bucket=2))
  jax.effects_barrier()
  assert told == [-1, 0, 0]


def test_a_plan_is_made_anew_or_held(side_cfg, side_params, env, captions, table, simple_vlm):
  """x at the turns is about 0.1, 0.35, 0.6, 0.85; a plan of 5 latents covers three chunks of 2."""
  simple_vlm(1.9)
  planner = language.planner(side_params, table, cfg=side_cfg, fps=FPS)
  asked = [
    np.asarray(
      closed_loop(walk, source, env, 0.99, KEY, captions, spec=LoopSpec(4, bucket=2)).turns.asked
    ).tolist()
    for source in (planner, sources.held(planner))
  ]
  assert asked == [[GO_RIGHT, GO_RIGHT, GO_UP, GO_UP], [GO_RIGHT, GO_RIGHT, GO_RIGHT, GO_UP]]


def test_actions_reach_the_staircase_and_the_head(side_cfg, side_params, moment):
  """d(action loss)/d(staircase and project-out head), and nothing where the path is cut."""
  obs, prompt, _ = moment
  now = dataclasses.replace(obs, frames=obs.frames[:, :, -1:])
  short = configs.InferenceConfig(video_steps=1, action_steps=1)
  cfg = dataclasses.replace(side_cfg, inference=short)
  window = Window.event(cfg, 1)
  noise = denoiser.sample_noise(KEY, cfg, 2, window)

  def loss(trained, is_open):
    model = dataclasses.replace(side_params, model=side_params.model | trained)
    text = language.latent_text(model, now, prompt, cfg=cfg)
    cut = jax.lax.stop_gradient(text.features)
    text = dataclasses.replace(text, features=jnp.where(is_open, text.features, cut))
    cond = denoiser.encode_observation(model, now, text, cfg=cfg, window=window)
    out = denoiser.predict(model, cond, noise, cfg=cfg, window=window)
    return jnp.mean(jnp.square(out.chunk.actions - 1.0))

  trained = {name: side_params.model[name] for name in ('staircase', 'heads')}
  grads = jax.jit(jax.grad(loss))
  whole, cut = grads(trained, True), grads(trained, False)
  assert all(not np.any(x) for x in jax.tree.leaves(cut))
  for part in (whole['staircase'], whole['heads']['project']['reader']):
    sizes = {path_string(path): float(np.abs(x).max())
             for path, x in jax.tree.leaves_with_path(part)}
    assert all(np.isfinite(size) and size > 1e-9 for size in sizes.values()), sizes
  assert all(not np.any(x) for x in jax.tree.leaves(whole['heads']['event']))


@pytest.mark.parametrize(
  ('absent', 'ask', 'message'),
  [
    ('language', 'planned', 'no frozen VLM. Train stage 3'),
    ('heads', 'planned', 'has no heads. Train stage 3'),
    ('staircase', 'latent', 'has no staircase. Train stage 3 and stage 4'),
  ],
)
def test_a_model_without_a_language_side_says_what_to_train(
  side_cfg, side_params, moment, absent, ask, message
):
  model = {name: part for name, part in side_params.model.items() if name != absent}
  frozen = dataclasses.replace(side_params.frozen, language=None)
  poor = InferenceParams(model, frozen if absent == 'language' else side_params.frozen)
  obs, prompt, answer = moment
  with pytest.raises(ConfigError, match=message):
    if ask == 'planned':
      jax.eval_shape(lambda: language.planned_text(poor, obs, prompt, answer, cfg=side_cfg))
    else:
      jax.eval_shape(lambda: language.latent_text(poor, obs, prompt, cfg=side_cfg))
