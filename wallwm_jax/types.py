"""The axis glossary, array aliases and the records that cross package borders.

Axis letters used in every docstring of the project:

  B  batch (events)             V  camera views               T  raw video frames
  F  latent frames, F = 1 + N   N  future latent frames       H W  pixel rows, columns
  h w  latent rows, columns     C  latent channels            P  patches (tokens) of one view-frame
  D  model width                L  layers                     R  action noise draws over one video
  forward K  action steps, K = K_p * N  A  action (and state) width   X  text tokens
  E  text feature width         S  tokens of a sequence       J  key/value tokens, J = V * F * P
  Z  latent reasoning states    Y  tokens of an answer        M  tokens of a reasoning trace
  I  captions of a table        U  vocabulary
  G  most events of a packed row

Units: positions m, rotations as the first two columns of the rotation matrix (6D), gripper 0
(closed) to 1 (open), times in frames unless a name says `_s`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from wallwm_jax.errors import CheckpointError as CheckpointError
from wallwm_jax.errors import ConfigError as ConfigError
from wallwm_jax.errors import CorruptStoreError as CorruptStoreError
from wallwm_jax.errors import DataError as DataError
from wallwm_jax.errors import StatsMismatchError as StatsMismatchError
from wallwm_jax.errors import WallWMError as WallWMError

Params = dict[str, Any]  # nested dict of arrays; never a Flax object
PRNGKey = Array


def path_string(key_path) -> str:
  """A JAX key path as 'a/b/c': dict keys, field names and indices without decoration."""
  return jax.tree_util.keystr(key_path, simple=True, separator='/')


def nest(leaves: Mapping[str, Any]) -> Params:
  """{'a/b': x} as {'a': {'b': x}}."""
  tree: Params = {}
  for path, leaf in leaves.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def pytree_dataclass(cls):
  """A frozen dataclass whose fields are all pytree children."""
  cls = dataclasses.dataclass(frozen=True)(cls)
  fields = [f.name for f in dataclasses.fields(cls)]
  return jax.tree_util.register_dataclass(cls, data_fields=fields, meta_fields=[])


@pytree_dataclass
class Cameras:
  """Pinhole calibration per view, world frame.

  intrinsics: [B, V, 3, 3] px, for the stored image size; extrinsics: [B, V, 4, 4] camera-to-world,
  m, OpenCV axes (x right, y down, z forward); valid: [B, V], False where a view has no calibration.
  """

  intrinsics: Float[Array, 'B V 3 3']
  extrinsics: Float[Array, 'B V 4 4']
  valid: Bool[Array, 'B V']


@pytree_dataclass
class Text:
  """Frozen text-encoder features of one caption: features [B, X, E], mask [B, X] (True = real
  token).
  """

  features: Float[Array, 'B X E']
  mask: Bool[Array, 'B X']


@pytree_dataclass
class Observation:
  """What a policy may look at when it is asked to act.

  frames: [B, V, T, H, W, 3] uint8; T = 1 in event mode, 1 + 4M (history + anchor) in unified mode.
  state: [B, A] physical units, absolute end-effector pose + gripper at the last frame.
  view_mask: [B, V], False where a camera is absent (its tokens are never attended to).
  """

  frames: UInt8[Array, 'B V T H W 3']
  state: Float[Array, 'B A']
  view_mask: Bool[Array, 'B V']


@pytree_dataclass
class Packing:
  """Which event of a packed row is where; the G events of a row are counted from 1, 0 = padding.

  frame_event, frame_index: [B, F] int32, the event of each latent frame and its place in it (0 =
  the anchor). step_event, step_index: [B, K] int32, the same of action steps.
  """

  frame_event: Int[Array, 'B F']
  frame_index: Int[Array, 'B F']
  step_event: Int[Array, 'B K']
  step_index: Int[Array, 'B K']

  def frames(self, x: Float[Array, 'B G ...']) -> Float[Array, 'B F ...']:
    """What belongs to events, for each latent frame (padding: that of some event)."""
    return _of_events(x, self.frame_event)

  def steps(self, x: Float[Array, 'B G ...']) -> Float[Array, 'B K ...']:
    """What belongs to events, for each action step (padding: that of some event)."""
    return _of_events(x, self.step_event)


def _of_events(x, event):
  index = jnp.maximum(event - 1, 0)
  return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


@pytree_dataclass
class Prompt:
  """What a VLM is asked, as token ids padded behind: ids [B, S] int32, mask [B, S] (True = real).

  The digits of the robot's state are still '0'; `language.read_prompt` fills them in.
  """

  ids: Int[Array, 'B S']
  mask: Bool[Array, 'B S']


@pytree_dataclass
class PromptLayout:
  """The part that all prompts of a config share: images, then the state, then what varies.

  positions: [3, S] int32 rotary positions (time, row, column). view: [S] int32, the camera an image
  token belongs to, -1 elsewhere. channels: [A'] int32 state channels that are told, in order;
  slots: [A', 2] int32, where the two digits of each stand. digits: [10] int32 ids of '0'..'9'.
  opening: [n] int32, what every plan begins with.
  """

  positions: Int[Array, '3 S']
  view: Int[Array, 'S']
  channels: Int[Array, 'A']
  slots: Int[Array, 'A 2']
  digits: Int[Array, '10']
  opening: Int[Array, 'N']


@pytree_dataclass
class Language:
  """The frozen language side: parameters of the VLM and of the small language model (each {} where
  it is not needed), how prompts are laid out, and the captions that the next-event head may choose:
  bank [I, E], one feature vector each, and answers [I, Y], the plan that names it.
  """

  vlm: Params
  reader: Params
  layout: PromptLayout
  bank: Float[Array, 'I E']
  answers: Prompt


@pytree_dataclass
class LanguageBatch:
  """One batch of moments inside events, for the stages of the language side.

  frames: [B, V, H, W, 3] uint8 of that moment; state: [B, A] normalised; view_mask: [B, V].
  prompt: instruction of the episode. answer [B, Y]: caption of the running event, trace [B, M]:
  reasoning that leads to it, as token ids with masks; text: frozen encoder's features of that
  caption; caption: [B] its row in `Language.bank`; last: [B] that of the event completed before it,
  -1 = none. remaining: [B] s to the end of the event;
  duration: [B] s of all of it. uid: [B, 2] uint32 halves of the moment's id.
  """

  frames: UInt8[Array, 'B V H W 3']
  state: Float[Array, 'B A']
  view_mask: Bool[Array, 'B V']
  prompt: Prompt
  answer: Prompt
  trace: Prompt
  text: Text
  caption: Int[Array, 'B']
  last: Int[Array, 'B']
  remaining: Float[Array, 'B']
  duration: Float[Array, 'B']
  uid: Int[Array, 'B 2']


@pytree_dataclass
class EventBatch:
  """One training batch; every event of a batch lies in the same length bucket.

  frames: [B, V, T, H, W, 3] uint8, T = 1 + 4N (event window) or 1 + 4M + 4N (chunk window), or
  their I420 planes [B, V, T, H * 3/2, W] (`data.planes`, see geometry.yuv); None where `latents`
  [B, V, F, h, w, C] float32, the codec's unnormalised latents, stand in for them.
  num_frames: [B] valid raw frames, 1 + 4n <= T; later frames are padding.
  raw_length: [B] frames of the event before truncation to the window (drives caption drop).
  state: [B, A] normalised state at the anchor frame.
  actions: [B, K, A] normalised, relative to the anchor pose; action_mask: [B, K, A] True =
  supervised.
  text: features of the caption; view_mask: [B, V]; pixel_mask: [B, V, H, W], False on synthetic
  borders.
  cameras: calibration (valid = False where unknown); uid: [B, 2] uint32 halves of the event's id.
  prompt: what the VLM is asked at the anchor frame, where `data.text` is 'staircase'.
  """

  frames: UInt8[Array, 'B V T H W 3'] | UInt8[Array, 'B V T P W'] | None
  num_frames: Int[Array, 'B']
  raw_length: Int[Array, 'B']
  state: Float[Array, 'B A']
  actions: Float[Array, 'B K A']
  action_mask: Bool[Array, 'B K A']
  text: Text
  view_mask: Bool[Array, 'B V']
  pixel_mask: Bool[Array, 'B V H W']
  cameras: Cameras
  uid: Int[Array, 'B 2']
  latents: Float[Array, 'B V F h w C'] | None = None
  prompt: Prompt | None = None


@pytree_dataclass
class PackedBatch:
  """One training batch whose rows hold several events each, one behind the other.

  Latent frames, action steps and raw frames of a row each name their event by a segment, int32
  1..G in the same numbering for all of them, 0 = padding; attention joins only what lies in one
  segment. Event g of a row has segment g + 1, 1 + n latent frames, 1 + 4n raw frames and 4n steps.

  latents: [B, V, F, h, w, C] float32, the codec's unnormalised latents, F the budget; None where
  there are frames: [B, V, T, H, W, 3] uint8 with frame_segment [B, T], each event's on its own
  anchor. segment: [B, F]; position: [B, F] int32, restarts in every event, 0 = anchor; anchor:
  [B, F], True on the anchors.
  actions, action_mask: [B, K, A] as in EventBatch, relative to the anchor of their own event;
  step_segment, step_position: [B, K] int32.
  Per event: event_mask [B, G], num_latents [B, G] its n, raw_length [B, G], state [B, G, A], text
  [B, G, X, E], view_mask [B, G, V], pixel_mask [B, G, V, H, W], cameras [B, G, V, ...],
  uid [B, G, 2], prompt [B, G, S], all as in EventBatch; zeros behind the last event.
  """

  frames: UInt8[Array, 'B V T H W 3'] | None
  frame_segment: Int[Array, 'B T'] | None
  latents: Float[Array, 'B V F h w C'] | None
  segment: Int[Array, 'B F']
  position: Int[Array, 'B F']
  anchor: Bool[Array, 'B F']
  actions: Float[Array, 'B K A']
  action_mask: Bool[Array, 'B K A']
  step_segment: Int[Array, 'B K']
  step_position: Int[Array, 'B K']
  event_mask: Bool[Array, 'B G']
  num_latents: Int[Array, 'B G']
  raw_length: Int[Array, 'B G']
  state: Float[Array, 'B G A']
  text: Text
  view_mask: Bool[Array, 'B G V']
  pixel_mask: Bool[Array, 'B G V H W']
  cameras: Cameras
  uid: Int[Array, 'B G 2']
  prompt: Prompt | None = None


@pytree_dataclass
class ActionChunk:
  """What a policy answers: actions [B, K, A] in physical units relative to the anchor pose, mask
  [B, K].
  """

  actions: Float[Array, 'B K A']
  mask: Bool[Array, 'B K']


@pytree_dataclass
class NormStats:
  """Per-channel statistics; x_norm = (x - mean) / scale. Physical units.

  action_*: [A] relative actions; state_*: [A] absolute state; latent_*: [C] codec latents.
  """

  action_mean: Float[Array, 'A']
  action_scale: Float[Array, 'A']
  state_mean: Float[Array, 'A']
  state_scale: Float[Array, 'A']
  latent_mean: Float[Array, 'C']
  latent_scale: Float[Array, 'C']


@pytree_dataclass
class Frozen:
  """What a model was trained with and never trains.

  norm: statistics. codec: parameters of the frame codec, {} for one without weights. null_text:
  features [1, X, E] of the empty (or negative) caption; None where an empty caption is simply not
  attended to. language: the frozen language side; None for a model without one.
  """

  norm: NormStats
  codec: Params = dataclasses.field(default_factory=dict)
  null_text: Text | None = None
  language: Language | None = None


@pytree_dataclass
class InferenceParams:
  """Everything a rollout needs: model weights (EMA) and what they were trained with."""

  model: Params
  frozen: Frozen

  @property
  def norm(self) -> NormStats:
    return self.frozen.norm


class EnvFns(NamedTuple):
  """A pure-functional environment, unbatched; every field is jit- and vmap-able.

  reset(key, task) -> state; observe(state) -> Observation without the batch axis (frames [V, 1, H,
  W, 3]); step(state, target [A] absolute pose + gripper) -> state; execute(state, actions [K, A]
  relative to the pose at call time, mask [K]) -> (state, frames [V, K, H, W, 3], poses [K, A]);
  caption(state) -> int32 id of the next scripted event; task_caption(state) -> int32 id of the
  instruction; script(state) -> int32 [S] ids of the task's events in order, -1 behind the last;
  progress(state) -> float 0..100; success(state) -> bool.
  """

  reset: Callable[..., Any]
  observe: Callable[..., Any]
  step: Callable[..., Any]
  execute: Callable[..., Any]
  caption: Callable[..., Any]
  task_caption: Callable[..., Any]
  script: Callable[..., Any]
  progress: Callable[..., Any]
  success: Callable[..., Any]
