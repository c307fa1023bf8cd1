"""Tube masks: hide a window of one view that another view can still see (training only)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from wallwm_jax.types import ConfigError, PRNGKey


def sample_tube(
    key: PRNGKey,
    sight: Bool[Array, "B V P V P"],
    grid: tuple[int, int],
    size: tuple[int, int],
    prob: float,
) -> Bool[Array, "B V P"]:
  """With probability `prob` per sample, one k x k window of one view to hide in all latent frames.

  k is uniform in size[0]..size[1] patches; the window is uniform among all windows of that size, of
  any view, whose every patch is seen by some other view. A sample without such a window gets none.

  Args:
    sight: co-visibility (`sight_cone_mask`), with pairs of absent views already False.
    grid: (rows, columns) of patches, P = rows * columns.
    size: (l_min, l_max) window sides in patches.
    prob: p_tube, 0..1.

  Returns:
    [B, V, P], True inside the tube.

  Raises:
    ConfigError: if the sizes are not 1 <= l_min <= l_max <= the grid's shorter side.
  """
  if not 1 <= size[0] <= size[1] <= min(grid):
    raise ConfigError(
        f'diffusion.tube_size: expected 1 <= l_min <= l_max <= {min(grid)} (patch grid {grid}), '
        f'got {size}.')
  windows, sides = _windows(grid, size)
  batch, views = sight.shape[:2]
  other = ~jnp.eye(views, dtype=bool)[:, None, :, None]
  hidden = ~(sight & other).any((-2, -1))  # [B, V, P] seen by no other view
  eligible = ~(hidden[:, :, None, :] & windows).any(-1)  # [B, V, windows]
  use_key, side_key, window_key = jax.random.split(key, 3)
  side = jax.random.randint(side_key, (batch, 1, 1), size[0], size[1] + 1)
  eligible = (eligible & (sides == side)).reshape(batch, -1)
  choice = jax.random.categorical(window_key, jnp.where(eligible, 0.0, -jnp.inf), axis=-1)
  use = jax.random.bernoulli(use_key, prob, (batch,)) & eligible.any(-1)
  view, window = jnp.divmod(choice, len(windows))
  chosen_view = jax.nn.one_hot(view, views, dtype=bool)
  return use[:, None, None] & chosen_view[:, :, None] & jnp.asarray(windows)[window][:, None, :]


def _windows(grid: tuple[int, int], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """All square windows: membership [windows, P] bool and side length [windows]."""
  rows, columns = grid
  masks, sides = [], []
  for side in range(size[0], size[1] + 1):
    for top in range(rows - side + 1):
      for left in range(columns - side + 1):
        mask = np.zeros(grid, bool)
        mask[top:top + side, left:left + side] = True
        masks.append(mask.reshape(-1))
        sides.append(side)
  return np.stack(masks), np.array(sides)
