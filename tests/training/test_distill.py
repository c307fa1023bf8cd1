"""Distillation: what moves and what may not, turns, resuming, and the way a rollout generates."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.inference import denoiser
from wallwm_jax.models import functional
from wallwm_jax.training import distill, loop, stages
from wallwm_jax.training.checkpoints import Checkpoints, load_inference
from wallwm_jax.training.state import abstract_state, build_optimizer, param_shapes
from wallwm_jax.types import ConfigError, InferenceParams, Observation

pytestmark = pytest.mark.usefixtures('plain_states')
TURNS = 2  # critic updates per update of the student


def snapshot(config, workdir, step=None):
  mesh = loop.make_mesh(config.mesh)
  abstract = abstract_state(config, build_optimizer(config, mesh), mesh)
  with Checkpoints(workdir, config.train.keep) as saved:
    return saved.restore(abstract, step)


def same(a, b) -> bool:
  return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


@pytest.fixture(scope='module')
def make_config(tiny):
  def make(stage='distill', store='', steps=4, video_steps=1, **sections):
    sections['train'] = {'stage': stage, 'init_from': 'nowhere', 'steps': steps,
                         'checkpoint_every': 1, 'keep': 9, 'log_every': 1,
                         } | sections.get('train', {})
    sections['distill'] = {'critic_updates': TURNS} | sections.get('distill', {})
    base = tiny.config('joint', store=store, diffusion={'action_draws': 1, 'anchor_step': 30})
    return tiny.override(base, inference={'video_steps': video_steps}, **sections)

  return make


@pytest.fixture(scope='module')
def teacher(tiny, store, tmp_path_factory):
  """Workdir of a run that could be a teacher: every weight is random, heads too."""
  config, workdir = tiny.config('joint', store=store), tmp_path_factory.mktemp('teacher')
  mesh = loop.make_mesh(config.mesh)
  abstract = abstract_state(config, build_optimizer(config, mesh), mesh)
  rng = np.random.default_rng(0)

  def draw(s):
    values = np.asarray(0.1 * rng.standard_normal(s.shape)).astype(s.dtype)
    return jax.device_put(values, s.sharding)

  state = jax.tree.map(draw, abstract)
  state = dataclasses.replace(state, ema=state.params)
  with Checkpoints(workdir, 1) as saved:
    saved.save(state, {}, tiny.norm(config), config)
  return workdir


@pytest.fixture(scope='module')
def run(make_config, teacher, store, tmp_path_factory):
  """(config, result) of four steps: the student moves in the first and the third."""
  config = make_config(store=store, train={'init_from': str(teacher)})
  return config, loop.train(config, tmp_path_factory.mktemp('distill'), progress=False)


@pytest.mark.slow
def test_the_student_moves_in_its_turns_and_the_teacher_never(run, teacher):
  config, result = run
  source = load_inference(teacher)[1].model
  states = [snapshot(config, result.workdir, step).state.params for step in (1, 2, 3, 4)]
  for state in states:
    assert same(state['teacher'], {'video': source['video']})
  for name in ('video', 'action'):
    assert not same(states[0][name], source[name])  # step 0 is a turn
    assert same(states[1][name], states[0][name])
    assert not same(states[2][name], states[1][name])
  for before, after in zip([{'critic': {'video': source['video']}}, *states[:-1]], states):
    assert not same(before['critic'], after['critic'])
  changed = jax.tree.map(lambda x, y: bool((x != y).any()), states[-1]['video'], source['video'])
  assert np.mean(jax.tree.leaves(changed)) > 0.9
  record = result.history
  assert {'loss', 'loss_critic', 'loss_matching', 'loss_action'} <= record[0].keys()
  assert record[1]['loss_matching'] == record[1]['loss_action'] == 0 < record[1]['loss_critic']


@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit_the_whole_one(run, tmp_path):
  config, whole = run
  shutil.copytree(whole.workdir, tmp_path / 'copy')
  for step in ('4', '3', '2'):  # stopped between two turns
    shutil.rmtree(tmp_path / 'copy' / 'checkpoints' / step)
  resumed = loop.train(config, tmp_path / 'copy', progress=False)
  a, b = (snapshot(config, result.workdir) for result in (whole, resumed))
  assert same(a.state, b.state) and a.data == b.data


@pytest.mark.slow
def test_a_rollout_loads_the_student_alone(run):
  config, result = run
  loaded, params = load_inference(result.workdir)
  assert loaded.inference.video_steps == 1 and params.model.keys() == {'video', 'action'}
  ema = snapshot(config, result.workdir).state.ema
  assert same(params.model, {name: ema[name] for name in params.model})


@pytest.mark.slow
def test_without_the_action_loss_the_action_tower_rests(make_config, teacher, store, tmp_path):
  config = make_config('distill_video', store, 2, train={'init_from': str(teacher)})
  result = loop.train(config, tmp_path, progress=False)
  source, params = load_inference(teacher)[1].model, snapshot(config, tmp_path).state.params
  assert same(params['action'], source['action'])
  assert same(params['teacher']['video'], source['video'])
  assert not same(params['video'], source['video'])
  assert 'loss_action' not in result.history[0]


def random_params(config, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), s.dtype), param_shapes(config))


@pytest.mark.parametrize('steps', [1, 2, 4])
def test_samples_come_from_the_way_that_a_rollout_goes(tiny, make_config, steps):
  config = make_config(video_steps=steps)
  batch, params = config.fake_batch(batch_size=2), random_params(config)
  frozen = tiny.frozen(config)
  clip = stages.encode_clip(batch, frozen, config)
  noise = jax.random.normal(jax.random.key(1), clip.latents.shape)

  @jax.jit
  def both(params):
    model = InferenceParams(params, frozen)
    cond = distill.conditioning(batch, clip, config.model.steps_per_latent)
    window = denoiser.Window.event(config, 2)
    obs = Observation(
      batch.frames[:, :, :1], batch.state, batch.view_mask)
    rollout = denoiser.encode_observation(model, obs, batch.text, cfg=config, window=window)
    return (denoiser.path_to_anchor(model, cond, noise, cfg=config),
            denoiser.denoise_to_anchor(model, rollout, noise, cfg=config))

  path, end = both(params)
  assert len(path) == 1 + steps
  np.testing.assert_array_equal(path[0], noise)
  np.testing.assert_allclose(path[-1], end, atol=1e-5)
  assert not np.allclose(path[-2], end, atol=1e-3)


def traced(tiny, config, monkeypatch):
  """How often the video tower is called in a trace of the loss."""
  calls, real = [], functional.video_forward

  def spy(params, *args):
    calls.append(args)
    return real(params, *args)

  monkeypatch.setattr(functional, 'video_forward', spy)
  loss = functools.partial(distill.stage_loss, config=config)
  jax.eval_shape(loss, param_shapes(config), config.inputs_spec(), tiny.frozen(config),
                 jax.random.key(0), jax.ShapeDtypeStruct((), jnp.int32))
  return len(calls)


def test_guidance_is_of_the_teacher_alone(tiny, make_config, monkeypatch):
  plain = traced(tiny, make_config(), monkeypatch)
  guided = traced(tiny, make_config(distill={'guidance': 3.0}), monkeypatch)
  assert guided - plain == 2  # one forward more, in a turn traced for its shapes and for itself


@pytest.mark.parametrize(
  'sections, words',
  [
    ({'train': {'init_from': ''}}, r'train.init_from.*teacher, got none'),
    ({'video_steps': 0}, r'inference.video_steps.*>= 1, got 0'),
    ({'inference': {'guidance': 2.0}}, r'inference.guidance.*expected 1, got 2.0'),
    ({'diffusion': {'mapping': 'symmetric'}}, r"diffusion.mapping.*'anchor', got 'symmetric'"),
    ({'data': {'pack': 9}}, r'data.pack.*expected pack=0'),
    ({'distill': {'critic_updates': 0}}, r'distill.critic_updates: expected >= 1, got 0'),
    ({'distill': {'action_weight': 0.0}}, r"distill.action_weight: expected > 0.*'distill_video'"),
  ],
)
def test_what_cannot_be_distilled_is_refused(tiny, make_config, sections, words):
  given = {name: sections.pop(name) for name in ('train', 'video_steps') if name in sections}
  with pytest.raises(ConfigError, match=words):
    tiny.override(make_config(**given), **sections)


def test_the_whole_tree_is_placed_and_routed(make_config):
  text = loop.dry_run(make_config())
  assert 'teacher: ' in text and 'critic/video/blocks/ffn/up/kernel' in text
