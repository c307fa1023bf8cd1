"""Tube masks: shape, place, probability and determinism."""

import jax
import numpy as np
import pytest

from wallwm_jax.geometry.tube_mask import sample_tube
from wallwm_jax.types import ConfigError

GRID, VIEWS = (3, 4), 3
P = GRID[0] * GRID[1]


def sight_of(seen):
  """Sight [B, V, P, V, P] in which patch p of view v is seen by another view iff seen[b, v, p]."""
  sight = np.zeros((*seen.shape, VIEWS, P), bool)
  for v in range(VIEWS):
    sight[:, v, :, v, :] = True
    sight[:, v, :, (v + 1) % VIEWS, 0] = seen[:, v]
  return sight


def test_every_tube_is_one_square_window_of_patches_another_view_sees():
  seen = np.random.default_rng(0).random((64, VIEWS, P)) < 0.8
  tube = np.asarray(sample_tube(jax.random.key(0), sight_of(seen), GRID, (1, 2), 1.0))
  assert tube.shape == (64, VIEWS, P) and tube.dtype == bool
  assert not (tube & ~seen).any()
  sides = []
  for sample in tube:
    views = np.flatnonzero(sample.any(-1))
    assert len(views) <= 1
    if len(views):
      rows, columns = np.nonzero(sample[views[0]].reshape(GRID))
      side = rows.max() - rows.min() + 1
      assert side == columns.max() - columns.min() + 1 and len(rows) == side**2
      sides.append(side)
  assert set(sides) == {1, 2}
  assert set(tube.any(-1).argmax(-1)) == {0, 1, 2}  # every view gets its turn


def test_probability_and_determinism():
  sight = np.ones((2000, VIEWS, P, VIEWS, P), bool)
  tube = np.asarray(sample_tube(jax.random.key(1), sight, GRID, (1, 3), 0.3)).any((-2, -1))
  assert abs(tube.mean() - 0.3) < 0.04
  again = np.asarray(sample_tube(jax.random.key(1), sight, GRID, (1, 3), 0.3)).any((-2, -1))
  np.testing.assert_array_equal(tube, again)
  assert not np.asarray(sample_tube(jax.random.key(1), sight, GRID, (1, 3), 0.0)).any()


def test_no_tube_where_no_other_view_looks():
  seen = np.zeros((8, VIEWS, P), bool)
  assert not np.asarray(sample_tube(jax.random.key(2), sight_of(seen), GRID, (1, 1), 1.0)).any()
  seen[:, 2, 7] = True
  tube = np.asarray(sample_tube(jax.random.key(2), sight_of(seen), GRID, (1, 1), 1.0))
  np.testing.assert_array_equal(tube, seen)


@pytest.mark.parametrize('size', [(0, 1), (2, 1), (1, 4)])
def test_impossible_sizes_are_refused(size):
  with pytest.raises(ConfigError, match='tube_size'):
    sample_tube(jax.random.key(0), np.ones((1, VIEWS, P, VIEWS, P), bool), GRID, size, 1.0)
