"""Sight-cone masks: which patches of different cameras could see the same point.

Source: WALL-WM (arXiv 2606.01955), eqs. 2-6. Used in training only.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from wallwm_jax.geometry.cameras import pixel_rays
from wallwm_jax.types import Cameras, ConfigError, pytree_dataclass

_PARALLEL = 1e-8  # squared sine of the angle below which two axes are treated as parallel


@pytree_dataclass
class Cones:
  """One cone per patch, world frame; ... is the batch.

  apex: [..., V, 3] m, the camera centre, shared by the patches of a view; axis: [..., V, P, 3]
  unit; half_angle: [..., V, P] rad; valid: [..., V], False where the view has no calibration.
  """

  apex: Float[Array, "... V 3"]
  axis: Float[Array, "... V P 3"]
  half_angle: Float[Array, "... V P"]
  valid: Bool[Array, "... V"]


def patch_cones(
    cameras: Cameras, image_size: tuple[int, int], grid: tuple[int, int], slack: float
) -> Cones:
  """The cone of every patch: axis through its centre, half-angle to the farthest corner * slack.

  Args:
    cameras: [..., V] calibrations for images of `image_size`.
    image_size: (H, W) px.
    grid: (rows, columns) of patches; P = rows * columns in row-major order.
    slack: >= 1, widens every cone (calibration error, finite parallax inside a patch).

  Raises:
    ConfigError: slack below 1.
  """
  if slack < 1:
    raise ConfigError(f'diffusion.cone_slack: expected >= 1 (1 = tight cones), got {slack}.')
  (height, width), (rows, columns) = image_size, grid
  # Offsets in patches: the centre first, then the four corners.
  offsets = np.array([[0.5, 0.5], [0, 0], [0, 1], [1, 0], [1, 1]])
  cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 1, 2)
  pixels = (cells + offsets) * np.array([width / columns, height / rows])
  pixels = jnp.asarray(pixels.reshape(-1, 2), cameras.intrinsics.dtype)
  apex, rays = pixel_rays(pixels, cameras.intrinsics, cameras.extrinsics)
  rays = rays.reshape(*rays.shape[:-2], rows * columns, len(offsets), 3)
  axis, corners = rays[..., :1, :], rays[..., 1:, :]
  sine = jnp.linalg.norm(jnp.cross(axis, corners), axis=-1)
  angle = jnp.arctan2(sine, (axis * corners).sum(-1)).max(-1)
  return Cones(apex, axis[..., 0, :], slack * angle, cameras.valid)


def sight_cone_mask(cones: Cones, depth_min: float, depth_max: float) -> Bool[Array, "... V P V P"]:
  """Which patch pairs of different views could see the same point.

  For a pair (u, u') take the closest points of the two axes, clamp the first depth t1 to the band,
  recompute t2 given t1 and clamp it; the pair is co-visible iff the two points are no farther apart
  than t1 * half_angle(u) + t2 * half_angle(u'). On parallel axes every depth is closest: there the
  deepest one inside both bands decides, where the cones are widest.

  Args:
    cones: see `Cones`.
    depth_min, depth_max: band of distances along the axes in m, 0 < depth_min < depth_max.

  Returns:
    [..., V, P, V, P], True where query patch (first V, P) may attend to key patch (last V, P).
    Pairs of one view are True, and so is every pair with a view that has no valid calibration.

  Raises:
    ConfigError: if the band is empty.
  """
  if not 0 < depth_min < depth_max:
    raise ConfigError(
        'diffusion.cone_depth: expected 0 < d_min < d_max in m, '
        f'got ({depth_min}, {depth_max}).')
  # Axes ... V P V' P' (3): the first cone varies over V P, the second over V' P'.
  v1, v2 = cones.axis[..., :, :, None, None, :], cones.axis[..., None, None, :, :, :]
  w = (cones.apex[..., :, None, :] - cones.apex[..., None, :, :])[..., :, None, :, None, :]
  cosine, ahead = (v1 * v2).sum(-1), (v2 * w).sum(-1)
  # t1 = -((w x v2) . n) / |n|^2, n = v1 x v2: this form stays accurate on nearly parallel axes.
  normal = jnp.cross(v1, v2)
  squared_sine = (normal * normal).sum(-1)
  parallel = squared_sine < _PARALLEL
  crossing = -(jnp.cross(w, v2) * normal).sum(-1) / jnp.where(parallel, 1, squared_sine)
  shared = jnp.where(cosine > 0, depth_max - ahead, ahead - depth_min)
  t1 = jnp.clip(jnp.where(parallel, shared, crossing), depth_min, depth_max)
  t2 = jnp.clip(ahead + cosine * t1, depth_min, depth_max)
  distance = jnp.linalg.norm(w + t1[..., None] * v1 - t2[..., None] * v2, axis=-1)
  angle1, angle2 = cones.half_angle[..., :, :, None, None], cones.half_angle[..., None, None, :, :]
  meet = distance <= t1 * angle1 + t2 * angle2
  uncalibrated = ~(cones.valid[..., :, None] & cones.valid[..., None, :])
  always = jnp.eye(cones.valid.shape[-1], dtype=bool) | uncalibrated
  return meet | always[..., :, None, :, None]
