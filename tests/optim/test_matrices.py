"""Views of tensors as matrices: round trips, shapes, shardings, and every refusal."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from wallwm_jax.optim.matrices import Matrix
from wallwm_jax.types import ConfigError

# The axes whose lengths `sizes` gives.
PATTERNS = {
  'l m n -> l m n': '',
  'm n -> 1 m n': '',
  'l m (p n) -> (p l) m n': 'p',
  'l m (h d) -> (h l) m d': 'h',
  'l (h d) n -> (h l) d n': 'd',
  'h w i o -> 1 (h w i) o': '',
  'a b c d -> (b a) d c': '',
  '(l a) (b m) n -> (a b l) m n': 'am',
}


@st.composite
def tensors(draw):
  """A view and a tensor that it fits, all entries different."""
  pattern = draw(st.sampled_from(sorted(PATTERNS)))
  source = pattern.split('->')[0]
  names = source.replace('(', ' ').replace(')', ' ').split()
  lengths = {name: draw(st.integers(1, 5), label=name) for name in names}
  groups = [group.split() for group in source.replace('(', ',').replace(')', ',').split(',')]
  composed = [i % 2 == 1 for i in range(len(groups))]  # every second piece stood in brackets
  shape = []
  for group, together in zip(groups, composed, strict=True):
    sizes = [lengths[name] for name in group]
    shape += [math.prod(sizes)] if together else sizes
  view = Matrix(pattern, tuple((name, lengths[name]) for name in PATTERNS[pattern]))
  return view, np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tensors())
def test_merge_undoes_split(case):
  view, x = case
  matrices = view.split(x)
  assert matrices.shape == view.shape(x.shape)
  np.testing.assert_array_equal(view.merge(matrices, x.shape), x)


def test_a_fused_kernel_is_its_projections_and_heads():
  x = np.random.default_rng(0).normal(size=(2, 6, 12))
  by_projection = Matrix('l m (p n) -> (p l) m n', (('p', 3),)).split(x)
  np.testing.assert_array_equal(by_projection, np.concatenate(np.split(x, 3, axis=-1)))
  by_head = Matrix('l m (h d) -> (h l) m d', (('h', 4),)).split(x)
  np.testing.assert_array_equal(by_head[2 * 1 + 0], x[0, :, 3:6])  # head 1 of layer 0


def test_fan_in_comes_first():
  assert Matrix().shape((30, 7, 11)) == (30, 7, 11)
  assert Matrix('m n -> 1 m n').shape((7, 11)) == (1, 7, 11)
  assert Matrix('l n m -> l m n').shape((30, 11, 7)) == (30, 7, 11)
  assert Matrix('h w i o -> 1 (h w i) o').shape((2, 3, 4, 5)) == (1, 24, 5)
  assert Matrix('l m (h d) -> (h l) m d', (('h', 24),)).shape((30, 64, 96)) == (720, 64, 4)
  assert Matrix('l m (h d) -> (h l) m d', (('d', 4),)).shape((30, 64, 96)) == (720, 64, 4)


FUSED = Matrix('l m (p n) -> (p l) m n', (('p', 4),))
HEADS = Matrix('l m (h d) -> (h l) m d', (('h', 8),))
CONVOLUTION = Matrix('h w i o -> 1 (h w i) o')
SIZES = {'replica': 1, 'fsdp': 4, 'context': 2, 'tensor': 8}


@pytest.mark.parametrize(
  'view,spec,shape,expected',
  [
    (Matrix(), P(None, 'fsdp', 'tensor'), (3, 16, 16), ((), ('fsdp',), ('tensor',))),
    (Matrix(), P(None, ('fsdp', 'tensor')), (3, 32, 16), ((), ('fsdp', 'tensor'), ())),
    (Matrix(), P('fsdp'), (8, 16, 16), (('fsdp',), (), ())),
    (Matrix(), P(), (3, 16, 16), ((), (), ())),
    # An axis of size 1 splits nothing.
    (Matrix(), P(None, ('replica', 'fsdp')), (3, 16, 16), ((), ('fsdp',), ())),
    (
      Matrix('l n m -> l m n'),
      P(None, 'fsdp', 'tensor'),
      (3, 16, 16),
      ((), ('tensor',), ('fsdp',)),
    ),
    (Matrix('m n -> 1 m n'), P('fsdp', 'tensor'), (16, 16), ((), ('fsdp',), ('tensor',))),
    # The leader of a composed axis may be split as long as its own length divides.
    (HEADS, P(None, 'fsdp', 'tensor'), (3, 16, 64), (('tensor',), ('fsdp',), ())),
    (FUSED, P(None, None, 'fsdp'), (3, 16, 64), (('fsdp',), (), ())),
    (FUSED, P(None, 'fsdp', 'tensor'), (3, 16, 64), ((), ('fsdp',), ())),
    (HEADS, P(None, None, ('fsdp', 'tensor')), (3, 16, 64), ((), (), ())),
    # A later factor may not: the layers come after the heads, the columns of a filter last.
    (HEADS, P('context', 'fsdp'), (4, 16, 64), ((), ('fsdp',), ())),
    (CONVOLUTION, P(None, None, 'fsdp', 'tensor'), (3, 3, 16, 16), ((), (), ('tensor',))),
    (CONVOLUTION, P('fsdp'), (4, 4, 16, 16), ((), ('fsdp',), ())),
  ],
)
def test_mesh_axes_follow_the_axes_they_split(view, spec, shape, expected):
  assert view.spec(spec, shape, SIZES) == expected


@pytest.mark.parametrize(
  'view,shape,message',
  [
    (Matrix(), (4, 8), r'on a tensor of shape \(4, 8\): expected 3 axes, got 2'),
    (Matrix(), (4, 8, 8, 8), 'expected 3 axes, got 4'),
    (Matrix('l m n'), (4, 8, 8), r"Matrix\('l m n'\): expected one \"->\""),
    (Matrix('l m n -> l m n -> l m n'), (4, 8, 8), 'expected one "->"'),
    (Matrix('m n -> m n'), (8, 8), r'expected three axes \(stack, fan_in, fan_out\).*got 2'),
    (Matrix('a l m n -> a l m n'), (2, 4, 8, 8), 'expected three axes.*got 4'),
    (
      Matrix('l m (h d) -> (h l) m d'),
      (4, 8, 8),
      r"shape \(4, 8, 8\): give the sizes of all but one of \['h', 'd'\]",
    ),
    (
      Matrix('l m (p n) -> (p l) m n', (('p', 3),)),
      (4, 8, 8),
      r"the axes \['p', 'n'\] do not multiply to 8",
    ),
    (
      Matrix('l m (h d) -> (h l) m d', (('h', 2), ('d', 3))),
      (4, 8, 8),
      r"the axes \['h', 'd'\] do not multiply to 8",
    ),
    (Matrix('l m n -> l m k'), (4, 8, 8), r"the sides name different axes: \['k', 'n'\]"),
    (Matrix('l h m n -> l m n'), (4, 2, 8, 8), r"the sides name different axes: \['h'\]"),
    (Matrix(sizes=(('h', 2),)), (4, 8, 8), r"sizes are given for \['h'\], which are not"),
  ],
)
def test_a_view_that_does_not_fit_is_refused(view, shape, message):
  with pytest.raises(ConfigError, match=message) as error:
    view.shape(shape)
  assert repr(view.pattern) in str(error.value)


def test_equal_views_are_one_label():
  assert Matrix() == Matrix('l m n -> l m n') and len({Matrix(), Matrix()}) == 1
  assert HEADS != Matrix(HEADS.pattern, (('h', 4),))
