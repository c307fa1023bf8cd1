"""wall-x's requests and replies, for any policy that understands this project's own.

A request of wall-x is known by its fields; what it asks is put into the policy's fields, and the
answer into those that wall-x's clients read. Two forms are out in the world:

  late    {views: {camera: base64 JPEG or array}, state: {follow1_pos: [7], ...} or [A],
           instruction, infer_mode, robot_action_*}
          -> {follow1_pos: [1 + K, 7], ...}, row 0 the state, or {predict_action: [K, A]}; subtask
  early   {front_view, left_wrist_view, ..., prompt, state: [A], dataset_names}
          -> {predict_action: [1, K, A], action: [K, A]}

An arm's 7 numbers are position (m), roll, pitch and yaw (rad, about fixed axes) and gripper (0..1,
as the model's own).
"""

from __future__ import annotations

import base64
import dataclasses
import io
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from wallwm_jax.geometry.poses import (
  POSE_WIDTH,
  euler_to_matrix,
  matrix_to_euler,
  matrix_to_rot6d,
  rot6d_to_matrix,
)
from wallwm_jax.inference.serve import fields
from wallwm_jax.types import DataError

ARMS = ('follow1_pos', 'follow2_pos')
_HELD = ('head_pos', 'lift')  # what no model here moves stays where it is,
_STILL = ('velocity_decomposed_odom',)  # and what would drive stands still
_SOURCES = {'flow': 'instruction', 'flow_with_subtask': 'planner'}  # infer_mode -> source of text
_RATIOS = ('robot_action_start_ratio', 'robot_action_end_ratio')
_MULTIPLIER = 'robot_action_interpolate_multiplier'


@dataclasses.dataclass(frozen=True)
class Form:
  """How a request is to be answered. arms: fields of the arms, () = a plain array; still: {field:
  values} of what else the robot has; part: share of the rows that are sent; subtask: whether the
  planned event is told; early: of the two forms."""

  arms: tuple[str, ...] = ()
  still: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  part: tuple[float, float] = (0.0, 1.0)
  subtask: bool = False
  early: bool = False


def speaks(request: Any) -> bool:
  """Whether a request is one of wall-x's."""
  return isinstance(request, Mapping) and ('views' in request or 'dataset_names' in request)


class WallX:
  """A policy that understands wall-x as well; everything else it leaves to the policy inside.

  Args:
    policy: one whose metadata tell its `fields`, `sources` and `action_dim` (ModelPolicy).
  """

  heavy = True  # pictures are decoded

  def __init__(self, policy):
    self._policy = policy
    told = policy.metadata
    self._views, self._state = told['fields']['views'], told['fields']['state']
    self._dim, self._sources = told['action_dim'], told['sources']
    # What wall-x's own server says of itself.
    names = {'model': 'wall-x', 'env': told['policy'], 'batch_enabled': True}
    self.metadata = told | names | {'dialects': ['openpi', 'wall-x']}

  def start(self) -> Any:
    """What the policy inside remembers."""
    return self._policy.start()

  def check(self, request: Mapping[str, Any], memory: Any) -> tuple[Any, Form | None]:
    """The policy's work and how to answer; errors as the policy's."""
    form = None
    if speaks(request):
      early = 'views' not in request
      request, form = (self._early if early else self._late)(dict(request))
    return self._policy.check(request, memory), form

  def infer(self, works: Sequence[tuple[Any, Form | None]]) -> list[Mapping[str, Any]]:
    """The policy's replies, each in the form of its request."""
    replies = self._policy.infer([work for work, _ in works])
    return [
      reply if form is None else _answer(form, reply)
      for (_, form), reply in zip(works, replies, strict=True)
    ]

  def _late(self, request: dict[str, Any]) -> tuple[dict[str, Any], Form]:
    views = request.pop('views')
    if not isinstance(views, dict):
      raise DataError(f'views: expected a dict of cameras, got {type(views).__name__}.')
    asked = self._pictures({f'views.{name}': (name, x) for name, x in views.items()})
    state, arms, still = self._late_state(request.pop('state', None))
    asked[self._state] = state
    instruction = request.pop('instruction', '')
    if instruction != '':
      asked['prompt'] = fields.text({'instruction': instruction}, 'instruction')
    subtask = False
    if 'infer_mode' in request:
      known = [mode for mode, source in _SOURCES.items() if source in self._sources]
      mode = fields.choice(request, 'infer_mode', known, '')
      del request['infer_mode']
      asked['source'], subtask = _SOURCES[mode], mode == 'flow_with_subtask'
    multiplier = request.pop(_MULTIPLIER, 1)
    if type(multiplier) is not int or multiplier != 1:
      raise DataError(
        f'{_MULTIPLIER}: expected 1, interpolation is left to the client, got '
        f'{reprlib.repr(multiplier)}.'
      )
    form = Form(arms, still, _part(request), subtask)
    return request | asked, form

  def _early(self, request: dict[str, Any]) -> tuple[dict[str, Any], Form]:
    del request['dataset_names']  # statistics are those of the model, see `norm_hash`
    cameras = request.keys() & self._aliases().keys()
    asked = self._pictures({name: (name, request.pop(name)) for name in sorted(cameras)})
    state = request.pop('state', None)
    if isinstance(state, np.ndarray) and state.ndim == 2 and len(state) == 1:
      state = state[0]
    given = {} if state is None else {'state': state}
    asked[self._state] = fields.numbers(given, 'state', self._dim)
    return request | asked, Form(early=True)

  def _aliases(self) -> dict[str, str]:
    """{what wall-x may call a camera: field of the policy}."""
    found = {}
    for view, field in self._views.items():
      names = [field, view, f'camera_{view}', f'{view}_view']
      found |= dict.fromkeys([*names, *(['face_view'] if view == 'front' else [])], field)
    return found

  def _pictures(self, given: Mapping[str, tuple[str, Any]]) -> dict[str, np.ndarray]:
    """{field of the policy: pixels} of {where it is in the request: (camera, picture)}."""
    aliases, found = self._aliases(), {}
    for where, (name, picture) in given.items():
      if name not in aliases:
        shown = reprlib.repr(where).strip("'")
        raise DataError(f'{shown}: not a camera of this policy. Known: {", ".join(aliases)}.')
      if aliases[name] in found:
        raise DataError(f'{where}: expected each camera once, got {aliases[name]} twice.')
      found[aliases[name]] = _picture(where, picture)
    return found

  def _late_state(self, state: Any) -> tuple[np.ndarray, tuple[str, ...], dict[str, np.ndarray]]:
    """(state [A], fields of the arms, what else the robot has)."""
    if not isinstance(state, dict):
      given = {} if state is None else {'state': state}
      return fields.numbers(given, 'state', self._dim), (), {}
    fields.check_names(
      {f'state.{name}': None for name in state},
      [f'state.{name}' for name in (*ARMS, *_HELD, *_STILL)],
    )
    arms = tuple(name for name in ARMS if name in state)
    count = self._dim // POSE_WIDTH
    if len(arms) != count:
      raise DataError(f'state: expected {count} of {list(ARMS)}, got {sorted(state)}.')
    values = {f'state.{name}': x for name, x in state.items()}
    poses = [_to_pose(fields.numbers(values, f'state.{name}', 7)) for name in arms]
    still = {}
    for name in (*_HELD, *_STILL):
      if name in state:
        here = state[name]
        here = here if isinstance(here, list | tuple | np.ndarray) else [here]
        here = fields.numbers({f'state.{name}': here}, f'state.{name}', len(here))
        still[name] = here if name in _HELD else np.zeros_like(here)
    return np.concatenate(poses), arms, still


def _picture(where: str, picture: Any) -> Any:
  """An array as it is; the RGB pixels [H, W, 3] of a base64 text."""
  if isinstance(picture, np.ndarray):
    return fields.pictures({where: picture}, where)
  if not isinstance(picture, str | bytes):
    raise DataError(
      f'{where}: expected uint8 [H, W, 3] or base64 of a JPEG or PNG, got {type(picture).__name__}.'
    )
  try:
    data = base64.b64decode(picture, validate=True)
    with Image.open(io.BytesIO(data), formats=('JPEG', 'PNG')) as image:
      return np.asarray(image.convert('RGB'))
  except Exception as error:  # the decoders raise many kinds on nonsense
    raise DataError(
      f'{where}: expected base64 of a JPEG or PNG, got {len(picture)} characters that are none '
      f'({type(error).__name__}).'
    ) from None


def _part(request: dict[str, Any]) -> tuple[float, float]:
  """Share of the rows to send, 0 <= start < end <= 1; taken out of the request."""
  start, end = (request.pop(name, default) for name, default in zip(_RATIOS, (0.0, 1.0)))
  numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (start, end))
  if not numbers or not 0 <= start < end <= 1:
    raise DataError(
      f'{_RATIOS[0]}, {_RATIOS[1]}: expected 0 <= start < end <= 1, got '
      f'{reprlib.repr(start)}, {reprlib.repr(end)}.'
    )
  return float(start), float(end)


def _answer(form: Form, reply: Mapping[str, Any]) -> dict[str, Any]:
  actions = reply['actions']
  if form.early:
    return {'predict_action': actions[None], 'action': actions}
  # A robot is told where it is, then where to go.
  rows = np.concatenate([reply['state'][None], actions]) if form.arms else actions
  start, end = (int(share * len(rows)) for share in form.part)
  rows = rows[start : max(end, start + 1)]
  if form.arms:
    arms = np.split(rows, len(form.arms), axis=1)
    answer = {name: _from_pose(x).tolist() for name, x in zip(form.arms, arms)}
    answer |= {name: np.tile(x, (len(rows), 1)).tolist() for name, x in form.still.items()}
  else:
    answer = {'predict_action': rows}
  return answer | ({'subtask': reply['event_text']} if form.subtask else {})


def _to_pose(x: np.ndarray) -> np.ndarray:
  """[..., 7] of wall-x -> pose [..., 10]."""
  rotation = matrix_to_rot6d(euler_to_matrix(x[..., 3:6]))
  return np.concatenate([x[..., :3], rotation, x[..., 6:]], -1)


def _from_pose(x: np.ndarray) -> np.ndarray:
  """Pose [..., 10] -> [..., 7] of wall-x."""
  angles = matrix_to_euler(rot6d_to_matrix(x[..., 3:9]))
  return np.concatenate([x[..., :3], angles, x[..., 9:]], -1)
