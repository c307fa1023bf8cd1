"""Ray casting of the tabletop in JAX: boxes, a table plane with zones, one light with shadows.

Written as elementwise arithmetic over all rays with a colour packed in one int32, so that XLA fuses
the image into a
single vectorised loop: no gathers, one output.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from wallwm_jax.envs.tabletop import mjcf, physics
from wallwm_jax.envs.tabletop.state import TabletopState
from wallwm_jax.geometry import cameras

VIEWS = ('front', 'side', 'wrist')
# (eye, target) m in the world, for the wrist camera in the gripper frame; vertical field of view,
# rad.
_EYES = np.array([[0.0, -0.44, 0.50], [0.48, 0.0, 0.44], [-0.105, 0.0, 0.055]], np.float32)
_TARGETS = np.array([[0.0, -0.01, 0.03], [0.0, 0.0, 0.04], [0.015, 0.0, -0.03]], np.float32)
_FIELDS = np.deg2rad([43.0, 43.0, 80.0])

CUBE_RGB = np.array(
  [[0.90, 0.12, 0.10], [0.25, 0.85, 0.15], [0.12, 0.30, 0.95], [0.98, 0.85, 0.10]], np.float32
)
ZONE_RGB = np.array([[0.05, 0.42, 0.18], [0.55, 0.20, 0.62], [0.88, 0.88, 0.88]], np.float32)
_TABLE_RGB = (0.42, 0.36, 0.31)
_FLOOR_RGB = (0.20, 0.19, 0.20)
_TABLE_HALF = 0.26
_GRIPPER_RGB = np.array([[0.95, 0.55, 0.20]] * 2 + [[0.30, 0.31, 0.34]] * 2, np.float32)
_LIGHT = np.array([-0.28, -0.22, 0.93], np.float32) / np.linalg.norm([-0.28, -0.22, 0.93])
_AMBIENT = 0.45
_SAMPLES = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))  # positions inside a pixel
_TINY = 1e-9
_HALVED = (511 << 20) | (511 << 10) | 511  # masks what a shift by one moves across packed channels


def intrinsics_of(image_size: tuple[int, int]) -> np.ndarray:
  height, width = image_size
  focal = height / (2 * np.tan(_FIELDS / 2))
  intrinsics = np.zeros((len(VIEWS), 3, 3), np.float32)
  intrinsics[:, 0, 0], intrinsics[:, 1, 1], intrinsics[:, 2, 2] = focal, focal, 1
  intrinsics[:, :2, 2] = width / 2, height / 2
  return intrinsics


def calibration(
  state: TabletopState, image_size: tuple[int, int]
) -> tuple[Float[Array, 'V 3 3'], Float[Array, 'V 4 4']]:
  """Intrinsics (px) for (H, W) and camera-to-world extrinsics (m, OpenCV axes) of VIEWS; the wrist
  moves.
  """
  mounts = jnp.asarray(cameras.look_at(_EYES, _TARGETS))
  stage = state.physics.qpos[: mjcf.NUM_STAGE]
  cos, sin, zero, one = jnp.cos(stage[3]), jnp.sin(stage[3]), jnp.zeros(()), jnp.ones(())
  hand = jnp.stack(
    [
      jnp.stack([cos, -sin, zero, stage[0]]),
      jnp.stack([sin, cos, zero, stage[1]]),
      jnp.stack([zero, zero, one, stage[2]]),
      jnp.stack([zero, zero, zero, one]),
    ]
  )
  wrist = (hand[:, :, None] * mounts[2][None]).sum(1)
  return jnp.asarray(intrinsics_of(image_size)), mounts.at[2].set(wrist)


def _quaternion_axes(q):
  """Rows of the world-to-box rotation: the box axes in the world, [..., 3, 3] from quaternions
  [..., 4] (w first).
  """
  w, x, y, z = (q[..., i] for i in range(4))
  rows = [
    [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)],
    [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)],
    [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)],
  ]
  return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def _boxes(state: TabletopState):
  """Cubes, fingers, palm, stem: a list of (centre [3], axes [3, 3] (rows), half size [3]).

  The gripper's boxes share one `axes` array, so that rays are turned into it once.
  """
  positions, quaternions = physics.cube_poses(state.physics)
  cube_axes = _quaternion_axes(quaternions)
  # An absent cube gets a negative size, which no ray can hit, wherever it is parked.
  cube_half = jnp.where(state.cube_present, mjcf.CUBE_HALF, -1.0)
  cubes = [
    (positions[i], cube_axes[i], jnp.full((3,), cube_half[i])) for i in range(mjcf.NUM_CUBES)
  ]
  stage = state.physics.qpos[: mjcf.NUM_STAGE]
  cos, sin, zero, one = jnp.cos(stage[3]), jnp.sin(stage[3]), jnp.zeros(()), jnp.ones(())
  axes = jnp.stack(
    [jnp.stack([cos, sin, zero]), jnp.stack([-sin, cos, zero]), jnp.stack([zero, zero, one])]
  )
  parts = [
    (0.0, stage[4] + mjcf.FINGER_HALF[1], mjcf.FINGER_CENTRE_Z, mjcf.FINGER_HALF),
    (0.0, -stage[5] - mjcf.FINGER_HALF[1], mjcf.FINGER_CENTRE_Z, mjcf.FINGER_HALF),
    (0.0, 0.0, mjcf.PALM_CENTRE_Z, mjcf.PALM_HALF),
    (0.0, 0.0, mjcf.STEM_CENTRE_Z, mjcf.STEM_HALF),
  ]
  hand = [
    (stage[:3] + x * axes[0] + y * axes[1] + z * axes[2], axes, half) for x, y, z, half in parts
  ]
  return cubes + hand


def _slab(origin, direction, half):
  """Entry distances per axis (list of 3) and the exit distance of rays against one box, all in box
  axes.
  """
  near, far = [], None
  for o, d, h in zip(origin, direction, half):
    inverse = 1.0 / jnp.where(jnp.abs(d) < _TINY, _TINY, d)
    middle = -o * inverse
    reach = h * jnp.abs(inverse)
    near.append(middle - reach)
    far = middle + reach if far is None else jnp.minimum(far, middle + reach)
  return near, far


def _to_axes(axes, vector):
  """Components of `vector` (list of 3 arrays) along box axes [3, 3] (rows): a list of 3 arrays."""
  return [
    axes[i, 0] * vector[0] + axes[i, 1] * vector[1] + axes[i, 2] * vector[2] for i in range(3)
  ]


def _pack_rgb(xp, colour):
  """RGB 0..1 (last axis) as one int32: 8 bits per channel, 10 bits apart, so that four of them can
  be added.
  """
  level = xp.round(xp.clip(colour, 0, 1) * 255).astype(xp.int32)
  return (level[..., 0] << 20) | (level[..., 1] << 10) | level[..., 2]


def _table(state: TabletopState, boxes, x, y):
  """Packed colour of the table plane at x, y [V, R] m, half as bright in the shadow of a box."""
  lit = (_AMBIENT + (1 - _AMBIENT) * _LIGHT[2]) * np.array([*ZONE_RGB, _TABLE_RGB, _FLOOR_RGB])
  *zones, table, floor = (int(c) for c in _pack_rgb(np, lit))
  colour = jnp.where(jnp.maximum(jnp.abs(x), jnp.abs(y)) < _TABLE_HALF, table, floor)
  for i, zone in enumerate(zones):
    size = jnp.where(state.zone_present[i], mjcf.ZONE_HALF, -1.0)
    inside = jnp.maximum(jnp.abs(x - state.zones[i, 0]), jnp.abs(y - state.zones[i, 1])) < size
    colour = jnp.where(inside, zone, colour)
  shadow = jnp.zeros(x.shape, bool)
  for centre, axes, half in boxes[:-1]:  # the stem stands over the palm
    light = _to_axes(axes, _LIGHT)
    near, far = _slab(_to_axes(axes, [x - centre[0], y - centre[1], -centre[2]]), light, half)
    shadow = shadow | (jnp.maximum(jnp.maximum(near[0], near[1]), near[2]) < far)
  return jnp.where(shadow, (colour >> 1) & _HALVED, colour)


def _face_colours(rgb, axes, origin):
  """Packed colours (list of 3 arrays [V, 1]) of the faces a camera at `origin` (in box axes) can
  see, per axis.

  A ray enters a box by the face on the camera's side of that axis, so the face follows from the
  origin alone.
  """
  colours = []
  for i in range(3):
    outward = jnp.sign(origin[i]) * (axes[i] * _LIGHT).sum()
    brightness = _AMBIENT + (1 - _AMBIENT) * jnp.maximum(outward, 0.0)
    colours.append(_pack_rgb(jnp, brightness[..., None] * rgb))
  return colours


def _trace(state: TabletopState, origin, ray):
  """Packed colours [V, R] along rays: origin list of 3 [V, 1], direction list of 3 [V, R]."""
  boxes = _boxes(state)
  down = jnp.minimum(ray[2], -1e-4)  # a ray that misses the plane meets it far away, on the floor
  depth = -origin[2] / down
  colour = _table(state, boxes, origin[0] + depth * ray[0], origin[1] + depth * ray[1])
  turned = {}
  for (centre, axes, half), rgb in zip(boxes, [*CUBE_RGB, *_GRIPPER_RGB]):
    local = turned.setdefault(id(axes), _to_axes(axes, ray))
    start = _to_axes(axes, [origin[i] - centre[i] for i in range(3)])
    near, far = _slab(start, local, half)
    faces = _face_colours(rgb, axes, start)
    entry = jnp.maximum(near[0], near[1])
    face = jnp.where(near[2] > entry, faces[2], jnp.where(near[1] > near[0], faces[1], faces[0]))
    entry = jnp.maximum(entry, near[2])
    closer = (entry < far) & (entry > 0) & (entry < depth)
    colour = jnp.where(closer, face, colour)
    depth = jnp.where(closer, entry, depth)
  return colour


def _local_rays(image_size: tuple[int, int]) -> np.ndarray:
  """Ray directions in camera axes of every sample of every pixel, float32 [V, S * H * W, 3] (a
  constant).
  """
  height, width = image_size
  rows, columns = np.mgrid[:height, :width]
  corner = np.stack([columns, rows], -1).reshape(-1, 2)
  pixels = np.concatenate([corner + np.asarray(s) for s in _SAMPLES])
  identity = np.tile(np.eye(4), (len(VIEWS), 1, 1))
  _, rays = cameras.pixel_rays(
    np.tile(pixels, (len(VIEWS), 1, 1)), intrinsics_of(image_size), identity
  )
  return rays.astype(np.float32)


def render(state: TabletopState, image_size: tuple[int, int]) -> UInt8[Array, 'V H W 3']:
  """The images of VIEWS at (H, W), uint8, 2x2 samples per pixel."""
  _, extrinsics = calibration(state, image_size)
  local = _local_rays(image_size)
  ray = [sum(extrinsics[:, i, j, None] * local[..., j] for j in range(3)) for i in range(3)]
  # The barrier keeps XLA from computing the trace once per colour channel.
  packed = jax.lax.optimization_barrier(
    _trace(state, [extrinsics[:, i, 3, None] for i in range(3)], ray)
  )
  packed = jax.lax.optimization_barrier(
    packed.reshape(len(VIEWS), len(_SAMPLES), *image_size).sum(1)
  )
  rgb = jnp.stack([packed >> 20, (packed >> 10) & 1023, packed & 1023], -1)
  return ((rgb + len(_SAMPLES) // 2) // len(_SAMPLES)).astype(jnp.uint8)
