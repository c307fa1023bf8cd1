"""Stages 3, 4 and 'vlm': what they train, what they leave alone, and that they learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.config import MeshConfig
from wallwm_jax.models import language
from wallwm_jax.parallel import rules
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.training import stages
from wallwm_jax.training.state import abstract_state, build_optimizer, init_params
from wallwm_jax.training.step import make_train_step
from wallwm_jax.types import ConfigError, path_string

LANGUAGE = ('3', '4', 'vlm')


def test_a_run_carries_what_it_needs(tiny):
  def parts(stage, window='event', **sections):
    return set(stages.parts(tiny.language(stage, window, **sections)))

  towers = {'video', 'action'}
  assert parts('1') == parts('2') == towers
  assert parts('3') == towers | {'heads'}
  assert parts('4') == parts('5', 'chunk') == towers | {'heads', 'staircase', 'projector'}
  assert parts('2', data={'text': 'staircase'}) == parts('4')
  assert parts('vlm') == {'vlm', 'reader'}
  assert set(stages.parts(tiny.config('5', 'chunk'))) == towers


def test_what_cannot_be_unfrozen_is_refused(tiny):
  config = tiny.language('2', train={'unfreeze': ('staircase',)})
  with pytest.raises(ConfigError, match=r'unfreeze.*staircase'):
    stages.stage_of(config)


@pytest.mark.parametrize('stage', ('1', '5', *LANGUAGE))
def test_parameters_have_a_type_of_their_own(tiny, stage):
  """A weakly typed parameter is a strong one after the first step, which then compiles again."""
  config = tiny.language(stage, 'chunk' if stage == '5' else 'event')
  shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  weak = [path_string(p) for p, x in jax.tree_util.tree_leaves_with_path(shapes) if x.weak_type]
  assert not weak


@pytest.mark.parametrize('stage', LANGUAGE)
def test_a_model_without_language_has_no_such_stage(tiny, stage):
  with pytest.raises(ConfigError, match=r"language.kind.*'none'"):
    tiny.config(stage)


class Run:
  """Some steps of a stage on one fake batch, from `start` (on the host) or a fresh state."""

  def __init__(self, make_state, config, frozen, mesh=None, start=None):
    self.config, mesh = config, mesh or MeshConfig()
    self.config = dataclasses.replace(config, mesh=mesh)
    self.mesh = make_mesh(mesh)
    optimizer = build_optimizer(self.config, self.mesh)
    self.abstract = abstract_state(self.config, optimizer, self.mesh)
    self.start = start or jax.device_get(make_state(self.config, optimizer, self.abstract))
    self.state = jax.device_put(self.start, jax.tree.map(lambda x: x.sharding, self.abstract))
    self.step = make_train_step(self.config, self.mesh, optimizer, self.abstract)
    self.frozen = jax.tree.map(jnp.asarray, frozen)
    self.batch = self.config.fake_batch()

  def train(self, steps: int) -> list[dict]:
    history = []
    for _ in range(steps):
      self.state, metrics = self.step(self.state, self.batch, self.frozen)
      history.append({name: float(value) for name, value in metrics.items()})
    return history


@pytest.fixture(scope='module', params=LANGUAGE)
def learned(request, tiny, make_state):
  """(a run of twelve steps on one device, its history)."""
  config = tiny.language(
    request.param, train={'steps': 12}, optim={'lr': 1e-2, 'warmup_steps': 1})
  run = Run(make_state, config, tiny.frozen_language(config))
  return run, run.train(12)


def test_a_stage_learns_and_leaves_the_rest_bit_for_bit(learned):
  run, history = learned
  stage = run.config.train.stage
  before, after = run.start.params, jax.device_get(run.state.params)
  trained = set(stages.STAGES[stage].trainable)
  for name in before:
    changed = [not np.array_equal(a, b) for a, b in
               zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True)]
    assert all(changed) if name in trained else not any(changed), name
  # Twelve steps teach a branch little through a random frozen reader.
  assert history[-1]['loss'] < (0.99 if stage == '4' else 0.8) * history[0]['loss']
  parts = sum(value for name, value in history[0].items() if name.startswith('loss_'))
  assert parts == pytest.approx(history[0]['loss'], rel=1e-5)
  assert set(run.state.ema) == trained


@pytest.mark.slow
def test_the_mesh_does_not_change_the_loss(make_state, learned):
  run, single = learned
  for mesh in (MeshConfig(fsdp=8), MeshConfig(fsdp=2, context=2, tensor=2)):
    spread = Run(make_state, run.config, run.frozen, mesh, run.start).train(2)
    for a, b in zip(single[:2], spread, strict=True):
      assert b['loss'] == pytest.approx(a['loss'], rel=2e-5)
      assert b['grad_norm'] == pytest.approx(a['grad_norm'], rel=1e-3)


@pytest.mark.parametrize('stage', ('3', '4'))
def test_padding_of_an_answer_and_a_trace_counts_for_nothing(tiny, stage):
  config = tiny.language(stage)
  frozen, params = tiny.frozen_language(config), init_params(config, jax.random.key(0))
  frozen = jax.tree.map(jnp.asarray, frozen)
  loss = jax.jit(lambda params, batch, frozen: stages.stage_loss(
    params, batch, frozen, jax.random.key(0), config=config)[0])
  batch = config.fake_batch()
  name = 'answer' if stage == '3' else 'trace'
  tokens = getattr(batch, name)
  mask = np.arange(tokens.mask.shape[1]) < np.array([9, 5, 12, 7, 3, 11, 2, 8])[:, None]
  losses = []
  for fill in (0, 200):
    ids = np.where(mask, tokens.ids, fill).astype(np.int32)
    filled = dataclasses.replace(batch, **{name: type(tokens)(ids, mask)})
    losses.append(float(loss(params, filled, frozen)))
  assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_actions_are_continuous_in_the_reasoning(tiny):
  """The action loss has a gradient in the staircase and the project-out head, through the text
  that the video tower reads, once they are unfrozen."""
  train = {'unfreeze': ('staircase', 'heads')}
  config = tiny.language('2', train=train, data={'text': 'staircase'})
  frozen, params = tiny.frozen_language(config), init_params(config, jax.random.key(0))
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), params)
  batch, key = config.fake_batch(), jax.random.key(0)
  trainable, resting = stages.split_trainable(params, config)
  assert set(trainable) == {'action', 'staircase', 'heads'}

  def loss(trainable):
    return stages.stage_loss(resting | trainable, batch, frozen, key, config=config)[0]

  grads = jax.jit(jax.grad(loss))(trainable)
  for path in (('staircase', 'steps'), ('staircase', 'query'), ('heads', 'project', 'out')):
    tree = grads
    for name in path:
      tree = tree[name]
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree)) > 0, path
  # What only planning reads has none.
  assert all(not np.any(g) for g in jax.tree.leaves(grads['heads']['time']))


def test_the_state_is_told_in_digits(tiny):
  config = tiny.language('3')
  layout = tiny.frozen_language(config).language.layout
  ids = np.zeros((3, config.language.prompt_tokens), np.int32)
  state = np.zeros((3, 10), np.float32)
  state[:, 0] = [-5.0, 0.0, 2.9]
  told = np.asarray(language.insert_state(ids, state, layout))[:, layout.slots] - 10
  assert told[:, 0].tolist() == [[0, 0], [5, 0], [9, 7]]  # round(99 * (x + 3) / 6)
  assert (told[:, 1] == [5, 0]).all()


@pytest.mark.parametrize('stage', LANGUAGE)
def test_every_part_is_divided_among_eight(tiny, stage):
  config = dataclasses.replace(tiny.language(stage), mesh=MeshConfig(fsdp=8))
  mesh = make_mesh(config.mesh)
  state = abstract_state(config, build_optimizer(config, mesh), mesh)
  for name in stages.parts(config):
    shards = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(state.params[name])]
    sizes = [x.size for x in jax.tree.leaves(state.params[name])]
    assert any(8 * np.prod(shard) == size for shard, size in zip(shards, sizes)), name


def test_every_rule_of_the_language_side_places_something(tiny):
  config = tiny.language('4')
  shapes = jax.eval_shape(
    lambda: init_params(config, jax.random.key(0))
    | init_params(tiny.language('vlm'), jax.random.key(0))
    | {'head': {'text': {'head': {'kernel': jnp.zeros((32, 320))}}}}
  )
  paths = [
    '/'.join(str(k.key) for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
  ]
  for name, table in (('QWEN_RULES', rules.QWEN_RULES), ('LANGUAGE_RULES', rules.LANGUAGE_RULES)):
    used = {rules._first_match(path, table) for path in paths}
    idle = [p for i, (p, _) in enumerate(table) if i not in used and 'blocks/' not in p]
    assert not idle, f'{name}: {idle}'
