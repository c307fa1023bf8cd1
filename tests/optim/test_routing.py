"""Routing: the real parameter tree, precedence, and every refusal."""

import functools

import jax
import numpy as np
import pytest

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.models import functional
from wallwm_jax.optim import format_table, route
from wallwm_jax.optim.matrices import Matrix
from wallwm_jax.optim.routing import DEFAULT_RULES, optimizer_of
from wallwm_jax.types import ConfigError


@pytest.fixture(scope='module')
def shapes():
  init = functools.partial(functional.init_params, ExperimentConfig().model)
  return jax.eval_shape(init, jax.random.key(0))


def by_path(labels):
  flat = jax.tree_util.tree_flatten_with_path(labels)[0]
  return {jax.tree_util.keystr(p, simple=True, separator='/'): label for p, label in flat}


def spec(*shape):
  return jax.ShapeDtypeStruct(shape, np.float32)


def test_block_matrices_go_to_muon_and_everything_else_to_adamw(shapes):
  labels = by_path(route(shapes))
  for path, label in labels.items():
    parts = path.split('/')
    matrix = parts[1] == 'blocks' and parts[-1] == 'kernel'
    assert label == (Matrix() if matrix else 'adamw'), path
  muon = [path for path, label in labels.items() if optimizer_of(label) == 'muon']
  assert {path.split('/')[0] for path in muon} == {'video', 'action'}
  assert all(by_path(shapes)[path].ndim == 3 for path in muon)
  for trap in (
    'video/blocks/modulation',
    'video/blocks/self_attn/q/bias',
    'video/head/kernel',
    'video/patch_embed/kernel',
    'action/time_proj/kernel',
    'video/blocks/view_gate',
  ):
    assert labels[trap] == 'adamw'


@pytest.mark.parametrize('tower', ['video', 'action'])
def test_one_tower_alone_is_routed_the_same(shapes, tower):
  assert route({tower: shapes[tower]}) == {tower: route(shapes)[tower]}


def test_frozen_comes_from_the_trainable_tree(shapes):
  trainable = {
    'video': jax.tree.map(lambda _: False, shapes['video']),
    'action': jax.tree.map(lambda _: True, shapes['action']),
  }
  labels = route(shapes, trainable)
  assert set(jax.tree.leaves(labels['video'])) == {'frozen'}
  assert labels['action'] == route(shapes)['action']


def test_first_match_wins(shapes):
  rules = ((r'video/blocks/self_attn/q/kernel', 'adamw'), *DEFAULT_RULES)
  labels = by_path(route(shapes, rules=rules))
  assert labels['video/blocks/self_attn/q/kernel'] == 'adamw'
  assert labels['video/blocks/self_attn/k/kernel'] == Matrix()


def test_unmatched_parameter_is_named_with_the_nearest():
  tree = {
    'video': {
      'blocks': {
        'self_attn': {'q': {'kernel': spec(2, 32, 32)}},
        'ffn': {'up': {'kernl': spec(2, 32, 64)}},
      }
    }
  }
  with pytest.raises(ConfigError, match=r"no rule matches parameter 'video/blocks/ffn/up/kernl'"):
    route(tree)
  close = {
    'video': {
      'blocks': {'self_attn': {'q': {'kernel': spec(2, 32, 32)}, 'k': {'kernl': spec(2, 32, 32)}}}
    }
  }
  with pytest.raises(ConfigError, match="closest parameter is 'video/blocks/self_attn/q/kernel'"):
    route(close)


def test_dead_and_shadowed_rules_are_refused(shapes):
  with pytest.raises(ConfigError, match='mamba.*first match of no parameter'):
    route(shapes, rules=(*DEFAULT_RULES, (r'blocks/mamba/kernel', Matrix())))
  with pytest.raises(ConfigError, match='self_attn/q/kernel.*first match of no parameter'):
    route(shapes, rules=(*DEFAULT_RULES, (r'blocks/self_attn/q/kernel', 'adamw')))


@pytest.mark.parametrize(
  'path,reason',
  [
    ('modulation', r'makes matrices 6 x 128; Muon needs sides >= 16'),
    ('self_attn/q/bias', r'has no matrix view\..*expected 3 axes, got 2'),
    ('view_gate', r'has no matrix view\..*expected 3 axes, got 2'),
  ],
)
def test_stacked_vectors_labelled_as_matrices_are_refused(shapes, path, reason):
  """Criterion N8: a rule by the number of axes would take them for a matrix or a stack."""
  full = f'video/blocks/{path}'
  with pytest.raises(ConfigError, match=reason) as error:
    route(shapes, rules=((full, Matrix()), *DEFAULT_RULES))
  assert repr(full) in str(error.value) and str(by_path(shapes)[full].shape) in str(error.value)


def test_a_bias_read_as_one_matrix_is_refused_when_there_are_few_layers(shapes):
  """[L, D] read as one matrix couples the layers; the short side gives it away."""
  rules = ((r'video/blocks/self_attn/q/bias', Matrix('m n -> 1 m n')), *DEFAULT_RULES)
  with pytest.raises(ConfigError, match="'video/blocks/self_attn/q/bias'.*Label it 'adamw'"):
    route(shapes, rules=rules)


def test_a_view_that_does_not_divide_its_tensor_is_refused(shapes):
  view = Matrix('l m (h d) -> (h l) m d', (('h', 7),))
  with pytest.raises(ConfigError, match="'video/blocks/self_attn/q/kernel' has no matrix view"):
    route(shapes, rules=((r'video/blocks/self_attn/q/kernel', view), *DEFAULT_RULES))


def test_views_are_labels(shapes):
  heads = Matrix('l m (h d) -> (h l) m d', (('h', 2),))
  rules = ((r'blocks/self_attn/(q|k|v)/kernel', heads), *DEFAULT_RULES)
  labels = by_path(route(shapes, rules=rules))
  assert labels['video/blocks/self_attn/q/kernel'] == heads
  assert labels['video/blocks/self_attn/o/kernel'] == Matrix()
  assert [optimizer_of(label) for label in (heads, 'adamw', 'frozen')] == [
    'muon',
    'adamw',
    'frozen',
  ]


def test_table_counts_every_parameter(shapes):
  labels = route(shapes)
  table = format_table(labels, shapes)
  total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
  counts = [int(line.split()[2].replace(',', '')) for line in table.splitlines()[1:]]
  assert sum(counts) == total
  assert [line.split()[0] for line in table.splitlines()[1:]] == ['adamw', 'muon']
