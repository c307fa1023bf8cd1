"""What the robot is asked to do: atomic events, their captions, and scripts composed of them.

An event is (kind, object, target): the object indexes CUBE_COLOURS; the target indexes ZONE_COLOURS
for move, place and release, DIRECTIONS for push, and is -1 otherwise. A task is a script of up to
MAX_EVENTS events plus an instruction. Captions are data (CAPTIONS), so that a jitted rollout can
hand out int32 ids.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wallwm_jax.envs.tabletop.mjcf import CUBE_COLOURS, NUM_CUBES, NUM_ZONES, ZONE_COLOURS
from wallwm_jax.types import ConfigError, PRNGKey, pytree_dataclass

EVENT_KINDS = ('reach', 'grasp', 'lift', 'move', 'place', 'release', 'push')
REACH, GRASP, LIFT, MOVE, PLACE, RELEASE, PUSH = range(len(EVENT_KINDS))
DIRECTIONS = ('left', 'right', 'forward', 'back')
DIRECTION_VECTORS = np.array([[-1, 0], [1, 0], [0, 1], [0, -1]], np.float32)

# Task kinds: the seven single events under their own names, then compositions.
MULTI_KINDS = ('pick', 'put', 'reach_push', 'put_push', 'put_put')
LONG_KINDS = ('put_push', 'put_put', 'put_push_reach')  # of two and three tasks
SINGLE_KINDS = EVENT_KINDS
TASK_KINDS = SINGLE_KINDS + MULTI_KINDS + ('put_push_reach',)
MAX_EVENTS = 12

_FIRST, _SECOND, _THIRD = 0, 1, 2  # object roles; the first two are zone roles too
_DIRECTION, _NONE = 2, -1


def _put(role: int) -> list[tuple[int, int, int]]:
  return [
    (REACH, role, _NONE),
    (GRASP, role, _NONE),
    (LIFT, role, _NONE),
    (MOVE, role, role),
    (PLACE, role, role),
    (RELEASE, role, role),
  ]


_SINGLE_TARGET = {MOVE: _FIRST, PLACE: _FIRST, RELEASE: _FIRST, PUSH: _DIRECTION}
_TEMPLATES = [
  [(kind, _FIRST, _SINGLE_TARGET.get(kind, _NONE))] for kind in range(len(EVENT_KINDS))
] + [
  _put(_FIRST)[:3],
  _put(_FIRST),
  [(REACH, _FIRST, _NONE), (PUSH, _FIRST, _DIRECTION)],
  _put(_FIRST) + [(REACH, _SECOND, _NONE), (PUSH, _SECOND, _DIRECTION)],
  _put(_FIRST) + _put(_SECOND),
  _put(_FIRST)
  + [(REACH, _SECOND, _NONE), (PUSH, _SECOND, _DIRECTION), (REACH, _THIRD, _NONE)],
]
_LENGTHS = np.array([len(rows) for rows in _TEMPLATES], np.int32)
_SCRIPTS = np.array(
  [rows + [(_NONE, _NONE, _NONE)] * (MAX_EVENTS - len(rows)) for rows in _TEMPLATES], np.int32
)


@pytree_dataclass
class Task:
  """kind: index into TASK_KINDS; script: [MAX_EVENTS, 3] (kind, object, target), -1 beyond
  `length`;
  instruction: index into CAPTIONS; recovery: start from a larger perturbation (reach and grasp
  only)."""

  kind: Int[Array, '']
  script: Int[Array, 'S 3']
  length: Int[Array, '']
  instruction: Int[Array, '']
  recovery: Bool[Array, '']


def _others(size: int, *taken: int) -> list[int]:
  return [i for i in range(size) if i not in taken]


def _build_captions() -> tuple[tuple[str, ...], np.ndarray]:
  """All captions, and where each family starts: the event kinds, then pick, put, put_push,
  put_put, put_push_reach.
  """
  cube, zone, way = CUBE_COLOURS, ZONE_COLOURS, DIRECTIONS
  puts = [f'put the {c} cube on the {z} zone' for c in cube for z in zone]
  families = [
    [f'reach the {c} cube' for c in cube],
    [f'grasp the {c} cube' for c in cube],
    [f'lift the {c} cube' for c in cube],
    [f'move the {c} cube over the {z} zone' for c in cube for z in zone],
    [f'place the {c} cube on the {z} zone' for c in cube for z in zone],
    [f'release the {c} cube' for c in cube],
    [f'push the {c} cube {d}' for c in cube for d in way],
    [f'pick up the {c} cube' for c in cube],
    puts,
    [
      f'{puts[a * NUM_ZONES + z]}, then push the {cube[b]} cube {d}'
      for a, z in itertools.product(range(NUM_CUBES), range(NUM_ZONES))
      for b in _others(NUM_CUBES, a)
      for d in way
    ],
    [
      f'{puts[a * NUM_ZONES + z]}, then the {cube[b]} cube on the {zone[y]} zone'
      for a, z in itertools.product(range(NUM_CUBES), range(NUM_ZONES))
      for b in _others(NUM_CUBES, a)
      for y in _others(NUM_ZONES, z)
    ],
    [
      f'{puts[a * NUM_ZONES + z]}, push the {cube[b]} cube {d}, then reach {cube[c]}'
      for a, z in itertools.product(range(NUM_CUBES), range(NUM_ZONES))
      for b in _others(NUM_CUBES, a)
      for d in way
      for c in _others(NUM_CUBES, a, b)
    ],
  ]
  offsets = np.cumsum([0] + [len(family) for family in families[:-1]]).astype(np.int32)
  return tuple(itertools.chain.from_iterable(families)), offsets


CAPTIONS, _OFFSETS = _build_captions()
_PICK, _PUT, _PUT_PUSH, _PUT_PUT, _PUT_PUSH_REACH = range(len(EVENT_KINDS), len(_OFFSETS))


def event_caption(event: Int[Array, '3']) -> Int[Array, '']:
  """Index into CAPTIONS of one event row (kind, object, target); a row of -1 gives caption 0."""
  kind, obj, target = jnp.maximum(event, 0)
  stride = jnp.asarray([1, 1, 1, NUM_ZONES, NUM_ZONES, 1, len(DIRECTIONS)])[kind]
  return (jnp.asarray(_OFFSETS)[kind] + obj * stride + jnp.where(stride > 1, target, 0)).astype(
    jnp.int32
  )


def _instruction(kind, script, objects, zones, way):
  """CAPTIONS index of a task's instruction from what was drawn for its roles."""
  a, b, c = objects
  z, y = zones
  put = a * NUM_ZONES + z
  other = b - (b > a)
  put_push = (put * (NUM_CUBES - 1) + other) * len(DIRECTIONS) + way
  put_put = (put * (NUM_CUBES - 1) + other) * (NUM_ZONES - 1) + y - (y > z)
  last = c - (c > a) - (c > b)
  put_push_reach = put_push * (NUM_CUBES - 2) + last
  single = event_caption(script[0])
  push = event_caption(jnp.stack([jnp.int32(PUSH), a, way]))
  compositions = [
    _OFFSETS[_PICK] + a,
    _OFFSETS[_PUT] + put,
    push,
    _OFFSETS[_PUT_PUSH] + put_push,
    _OFFSETS[_PUT_PUT] + put_put,
    _OFFSETS[_PUT_PUSH_REACH] + put_push_reach,
  ]
  table = jnp.stack([single] * len(EVENT_KINDS) + [jnp.asarray(c, jnp.int32) for c in compositions])
  return table[kind]


class Draws:
  """Numbers uniform in 0..1, cut one after the other from a single draw: every separate call of
  jax.random adds about half a second to compilation."""

  def __init__(self, key: PRNGKey, size: int):
    self._values = jax.random.uniform(key, (size,))
    self._used = 0

  def __call__(self, *shape: int, low=0.0, high=1.0):
    """An array [*shape] uniform in low..high."""
    count = math.prod(shape)
    if self._used + count > len(self._values):
      raise ValueError(f'Draws: {self._used + count} numbers asked for, {len(self._values)} drawn.')
    values = self._values[self._used : self._used + count].reshape(shape)
    self._used += count
    return low + (high - low) * values

  def permutation(self, size: int) -> Int[Array, 'N']:
    """A random order of 0..size-1, by counting (a sort would be slow to compile)."""
    return ranks(self(size))


def ranks(score: Float[Array, 'N']) -> Int[Array, 'N']:
  """How many entries are smaller than each entry: a permutation if all differ."""
  return (score[:, None] > score[None]).sum(1, dtype=jnp.int32)


def sample_task(
  key: PRNGKey, kind: int | str | Int[Array, ''], recovery: bool | Bool[Array, ''] = False
) -> Task:
  """A random task of one kind (a name or index of TASK_KINDS; the index may be traced).

  Raises:
    ConfigError: unknown kind name.
  """
  if isinstance(kind, str):
    if kind not in TASK_KINDS:
      raise ConfigError(f'task kind: expected one of {TASK_KINDS}, got {kind!r}.')
    kind = TASK_KINDS.index(kind)
  kind = jnp.asarray(kind, jnp.int32)
  draws = Draws(key, NUM_CUBES + NUM_ZONES + 1)
  objects, zones = draws.permutation(NUM_CUBES)[:3], draws.permutation(NUM_ZONES)[:2]
  way = jnp.minimum((draws() * len(DIRECTIONS)).astype(jnp.int32), len(DIRECTIONS) - 1)
  roles = jnp.asarray(_SCRIPTS)[kind]
  obj = jnp.where(roles[:, 1] >= 0, objects[jnp.maximum(roles[:, 1], 0)], -1)
  target = jnp.concatenate([zones, way[None]])[jnp.maximum(roles[:, 2], 0)]
  script = jnp.stack([roles[:, 0], obj, jnp.where(roles[:, 2] >= 0, target, -1)], -1)
  return Task(
    kind,
    script,
    jnp.asarray(_LENGTHS)[kind],
    _instruction(kind, script, objects, zones, way),
    jnp.asarray(recovery),
  )


def task_suite(key: PRNGKey, kinds: tuple[str, ...] = SINGLE_KINDS, per_kind: int = 8) -> Task:
  """`per_kind` random tasks of each kind, in the order of `kinds`: a Task whose leaves have a
  leading axis.
  """
  unknown = [kind for kind in kinds if kind not in TASK_KINDS]
  if unknown or not kinds:
    raise ConfigError(f'task kinds: expected some of {TASK_KINDS}, got {kinds}.')
  ids = jnp.repeat(jnp.asarray([TASK_KINDS.index(kind) for kind in kinds], jnp.int32), per_kind)
  return jax.vmap(sample_task)(jax.random.split(key, len(ids)), ids)
