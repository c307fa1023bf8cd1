"""Config dataclasses with validation, and their two-way bridge to ml_collections.

An experiment file defines `get_config()` returning `to_config_dict(ExperimentConfig(...))`; every
field is then overridable as `--config.section.field=value`. `from_config_dict` rebuilds the frozen
dataclasses, which is where
all validation happens. Dataclasses are hashable: they are the static arguments of jitted functions.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

import jax
import ml_collections
import numpy as np

from wallwm_jax.types import Cameras, ConfigError, EventBatch, Text


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class ActionSpec:
  """Layout of an action (and state) vector: per arm 3 position (m), 6D rotation, 1 gripper (0..1).

  Source: WALL-WM (arXiv 2606.01955); bimanual A = 20, single arm A = 10.
  """

  arms: int = 1

  def __post_init__(self):
    _require(self.arms in (1, 2), f'action.arms: expected 1 or 2, got {self.arms}.')

  @property
  def dim(self) -> int:
    return 10 * self.arms

  def groups(self) -> dict[str, tuple[int, ...]]:
    """Channel indices by group name: position, rotation, gripper."""
    base = [10 * arm for arm in range(self.arms)]
    return {
      'position': tuple(b + i for b in base for i in range(3)),
      'rotation': tuple(b + 3 + i for b in base for i in range(6)),
      'gripper': tuple(b + 9 for b in base),
    }


@dataclasses.dataclass(frozen=True)
class CodecConfig:
  """Frame codec. 'dct': orthonormal block DCT, `channels` lowest-frequency coefficients kept."""

  kind: Literal['dct'] = 'dct'
  spatial: int = 8
  temporal: int = 4
  channels: int = 96

  def __post_init__(self):
    full = self.spatial**2 * self.temporal * 3
    _require(
      0 < self.channels <= full, f'model.codec.channels: expected 1..{full}, got {self.channels}.'
    )


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Frozen text encoder. 'hash': weight-free word-hash embeddings, `tokens` long, `width` wide."""

  kind: Literal['hash'] = 'hash'
  tokens: int = 16
  width: int = 64


@dataclasses.dataclass(frozen=True)
class VideoConfig:
  """Multi-view video DiT.

  prediction: what the head regresses, 'v' = eps - z0 or 'x' = z0 (under 'frame' conditioning, its
  change since the last given frame). conditioning: given frames stand in place ('frame') or are
  extra channels ('channel').
  """

  width: int = 128
  layers: int = 4
  heads: int = 4
  ffn: int = 512
  patch: tuple[int, int, int] = (1, 2, 2)
  freq_dim: int = 256
  prediction: Literal['v', 'x'] = 'v'
  conditioning: Literal['frame', 'channel'] = 'frame'
  cross_view: bool = True
  rope_theta: float = 10_000.0

  def __post_init__(self):
    _require(
      self.width % self.heads == 0,
      f'model.video: width {self.width} is not a multiple of heads {self.heads}.',
    )
    head_dim = self.width // self.heads
    _require(
      head_dim % 2 == 0 and head_dim >= 8,
      f'model.video: head width must be even and >= 8 for 3D RoPE, got {head_dim}.',
    )
    _require(self.patch[0] == 1, f'model.video.patch: temporal patch must be 1, got {self.patch}.')

  @property
  def head_dim(self) -> int:
    return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class ActionConfig:
  """Action DiT. Depth equals the video tower's. depth_map: video layer read by each action block;
  () is the identity."""

  width: int = 128
  heads: int = 4
  ffn: int = 256
  freq_dim: int = 256
  prediction: Literal['v', 'x'] = 'v'
  depth_map: tuple[int, ...] = ()

  def __post_init__(self):
    _require(
      self.width % self.heads == 0,
      f'model.action: width {self.width} is not a multiple of heads {self.heads}.',
    )

  @property
  def head_dim(self) -> int:
    return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The coupled world-action model and its codecs."""

  video: VideoConfig = VideoConfig()
  action: ActionConfig = ActionConfig()
  codec: CodecConfig = CodecConfig()
  text: TextConfig = TextConfig()
  action_spec: ActionSpec = ActionSpec()
  views: tuple[str, ...] = ('front', 'side', 'wrist')
  image_size: tuple[int, int] = (48, 48)
  steps_per_latent: int = 4  # K_p, action steps per latent frame
  history: int = 1  # M, history latent frames of the chunk window
  future: int = 4  # N, future latent frames of the chunk window (unified mode)
  max_future: int = 16  # longest event in future latent frames (size of the tau tables)
  dtype: Literal['float32', 'bfloat16'] = (
    'float32'  # compute dtype; params, norms, softmax and losses are float32
  )
  remat: Literal['none', 'full', 'dots'] = 'none'

  def __post_init__(self):
    for axis, size, patch in zip('HW', self.image_size, self.video.patch[1:]):
      block = self.codec.spatial * patch
      _require(
        size % block == 0,
        f'model.image_size: {axis}={size} is not a multiple of codec.spatial * patch = {block}.',
      )
    _require(
      self.codec.temporal == self.steps_per_latent,
      f'model.steps_per_latent={self.steps_per_latent} must equal '
      f'codec.temporal={self.codec.temporal}.',
    )
    _require(
      len(set(self.views)) == len(self.views) > 0,
      f'model.views: expected distinct names, got {self.views}.',
    )
    depth = self.action.depth_map
    _require(
      not depth
      or (len(depth) == self.video.layers and all(0 <= i < self.video.layers for i in depth)),
      f'model.action.depth_map: expected {self.video.layers} video layer indices, got {depth}.',
    )
    _require(
      self.future <= self.max_future,
      f'model.future={self.future} is larger than model.max_future={self.max_future}.',
    )

  @property
  def latent_size(self) -> tuple[int, int]:
    return tuple(s // self.codec.spatial for s in self.image_size)

  @property
  def patches(self) -> int:
    """P, tokens of one view-frame."""
    (h, w), (_, ph, pw) = self.latent_size, self.video.patch
    return (h // ph) * (w // pw)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
  """Flow matching, the anchor protocol and the loss weights."""

  num_steps: int = 50
  anchor_step: int = 45  # s*, position in the num_steps schedule where the video tower is read
  anchor_jitter: float = 0.02  # training jitter on the anchor noise level, uniform +-
  shift: float = 5.0  # Wan timestep shift, video
  action_shift: float = 1.0
  mapping: Literal['anchor', 'symmetric'] = 'anchor'
  action_draws: int = 6  # K independent action noise levels per video forward
  weighting: Literal['uniform', 'sigma'] = 'uniform'  # w(t)
  dct_weight: float = 0.0  # w_DCT
  caption_drop: tuple[float, float, int, int] = (
    0.1,
    0.9,
    129,
    220,
  )  # rho_min, rho_max, L_min, L_max
  tube_prob: float = 0.0
  tube_cond_prob: float = 0.0
  tube_size: tuple[int, int] = (1, 3)  # l_min, l_max in patches
  tube_weight: float = 1.0  # lambda_mask
  sight_cone: bool = True
  cone_slack: float = 1.5
  cone_depth: tuple[float, float] = (0.05, 2.0)  # d_min, d_max m

  def __post_init__(self):
    _require(
      0 <= self.anchor_step < self.num_steps,
      f'diffusion.anchor_step: expected 0..{self.num_steps - 1}, got {self.anchor_step}.',
    )
    _require(
      self.action_draws >= 1, f'diffusion.action_draws: expected >= 1, got {self.action_draws}.'
    )
    _require(
      0 < self.cone_depth[0] < self.cone_depth[1],
      f'diffusion.cone_depth: empty band {self.cone_depth}.',
    )
    low, high, start, end = self.caption_drop
    _require(
      0 <= low <= high <= 1 and start < end,
      'diffusion.caption_drop: expected (rho_min <= rho_max in 0..1, L_min < L_max), got '
      f'{self.caption_drop}.',
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where training data come from and how they are drawn."""

  store: str = ''
  split: str = 'train'
  batch_size: int = 32  # global
  buckets: tuple[int, ...] = (4,)  # future latent frames N of each length bucket, ascending
  window: Literal['event', 'chunk'] = 'event'
  balance: float = 0.5  # 0 = natural frequency, 1 = every label equally often
  stride: int = 1  # raw frames per model frame
  normalisation: Literal['meanstd', 'quantile'] = 'meanstd'
  workers: int = 0  # Grain worker processes; never changes the batches
  threads: int = 2  # Grain read threads; never changes the batches
  seed: int = 0

  def __post_init__(self):
    _require(self.batch_size >= 1, f'data.batch_size: expected >= 1, got {self.batch_size}.')
    _require(
      bool(self.buckets)
      and list(self.buckets) == sorted(set(self.buckets))
      and self.buckets[0] >= 1,
      f'data.buckets: expected ascending positive latent-frame counts, got {self.buckets}.',
    )
    _require(0 <= self.balance <= 1, f'data.balance: expected 0..1, got {self.balance}.')


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """Muon for matrices, AdamW for the rest."""

  lr: float = 1e-3  # shared by Muon (with RMS-matched updates) and AdamW
  warmup_steps: int = 50
  schedule: Literal['constant', 'cosine', 'wsd'] = 'cosine'
  final_lr_ratio: float = 0.05
  weight_decay: float = 0.1
  momentum: float = 0.95
  nesterov: bool = True
  ns_steps: int = 5
  ns_coefficients: Literal['jordan', 'you', 'polar_express'] = 'polar_express'
  ns_dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  update_scale: Literal['rms', 'jordan', 'spectral'] = 'rms'
  mu_dtype: Literal['float32', 'bfloat16'] = 'float32'  # Muon's momentum
  normuon_b2: float = 0.0  # decay of NorMuon's neuron-wise second moments; 0 = plain Muon
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  adam_eps: float = 1e-8
  clip_norm: float = 1.0
  optimizer: Literal['muon', 'adamw'] = 'muon'

  def __post_init__(self):
    _require(self.lr > 0, f'optim.lr: expected > 0, got {self.lr}.')
    _require(
      0 <= self.normuon_b2 < 1, f'optim.normuon_b2: expected 0 to below 1, got {self.normuon_b2}.')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Device mesh and the logical-axis rules. -1 (one axis at most) takes the remaining devices."""

  replica: int = 1
  fsdp: int = 1
  context: int = 1
  tensor: int = 1
  rules: tuple[tuple[str, tuple[str, ...]], ...] = (
    ('batch', ('replica', 'fsdp')),
    ('patch', ('context',)),
    ('heads', ('tensor',)),
    ('mlp', ('tensor',)),
    ('embed', ('fsdp',)),
  )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """One training stage.

  stage: 1 video, 2 action (video frozen), 5 both towers on chunk windows, 'joint' both towers on
  event windows (the small joint fit). init_from: a workdir or checkpoint whose params start this
  run ('' = random).
  """

  stage: Literal['1', '2', '5', 'joint'] = '1'
  steps: int = 1000
  seed: int = 0
  ema: float = 0.9999
  log_every: int = 20
  checkpoint_every: int = 500
  keep: int = 2
  init_from: str = ''
  peak_tflops: float = 0.0  # per device, for model FLOPs utilisation; 0 = unknown
  compile_cache: str = ''  # directory of the persistent compilation cache; '' = off

  def __post_init__(self):
    _require(self.steps >= 1, f'train.steps: expected >= 1, got {self.steps}.')
    _require(0 <= self.ema < 1, f'train.ema: expected 0 <= ema < 1, got {self.ema}.')


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
  """Solver steps of a rollout. video_steps Euler steps run from pure noise to the anchor noise
  level.
  """

  video_steps: int = 8
  action_steps: int = 6
  guidance: float = 1.0  # classifier-free guidance on the video tower; 1 = off

  def __post_init__(self):
    _require(
      self.action_steps >= 1, f'inference.action_steps: expected >= 1, got {self.action_steps}.'
    )


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """One run: everything `wallwm train --config F` needs."""

  name: str = 'experiment'
  model: ModelConfig = ModelConfig()
  diffusion: DiffusionConfig = DiffusionConfig()
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  train: TrainConfig = TrainConfig()
  inference: InferenceConfig = InferenceConfig()

  def __post_init__(self):
    _require(
      max(self.data.buckets) <= self.model.max_future,
      f'data.buckets: longest bucket {max(self.data.buckets)} exceeds '
      f'model.max_future={self.model.max_future}.',
    )

  def window_frames(self, bucket: int) -> tuple[int, int]:
    """(T raw frames, K action steps) of one window with `bucket` future latent frames."""
    history = self.model.history if self.data.window == 'chunk' else 0
    r = self.model.steps_per_latent
    return 1 + r * (history + bucket), r * bucket

  def inputs_spec(self, bucket: int | None = None, batch_size: int | None = None) -> EventBatch:
    """The EventBatch of ShapeDtypeStructs a training step of this config receives."""
    bucket = self.data.buckets[-1] if bucket is None else bucket
    b = self.data.batch_size if batch_size is None else batch_size
    frames, steps = self.window_frames(bucket)
    v, (height, width) = len(self.model.views), self.model.image_size
    a, x, e = self.model.action_spec.dim, self.model.text.tokens, self.model.text.width
    s = jax.ShapeDtypeStruct
    f32, i32 = np.dtype('float32'), np.dtype('int32')
    return EventBatch(
      frames=s((b, v, frames, height, width, 3), np.dtype('uint8')),
      num_frames=s((b,), i32),
      raw_length=s((b,), i32),
      state=s((b, a), f32),
      actions=s((b, steps, a), f32),
      action_mask=s((b, steps, a), np.dtype(bool)),
      text=Text(features=s((b, x, e), f32), mask=s((b, x), np.dtype(bool))),
      view_mask=s((b, v), np.dtype(bool)),
      pixel_mask=s((b, v, height, width), np.dtype(bool)),
      cameras=Cameras(s((b, v, 3, 3), f32), s((b, v, 4, 4), f32), s((b, v), np.dtype(bool))),
      uid=s((b, 2), np.dtype('uint32')),
    )

  def fake_batch(
    self, bucket: int | None = None, batch_size: int | None = None, seed: int = 0
  ) -> EventBatch:
    """A random but valid EventBatch (NumPy) of `inputs_spec`: full length, all views, cameras on a
    ring.
    """
    rng = np.random.default_rng(seed)

    def fill(spec):
      if spec.dtype == np.uint8:
        return rng.integers(0, 256, spec.shape, dtype=np.uint8)
      if spec.dtype == bool:
        return np.ones(spec.shape, bool)
      if np.issubdtype(spec.dtype, np.integer):
        return rng.integers(1, 1000, spec.shape).astype(spec.dtype)
      return rng.standard_normal(spec.shape).astype(np.float32)

    batch = jax.tree.map(fill, self.inputs_spec(bucket, batch_size))
    b, frames = batch.num_frames.shape[0], batch.frames.shape[2]
    length = np.full((b,), frames, np.int32)
    return dataclasses.replace(
      batch, num_frames=length, raw_length=length, cameras=self._fake_cameras(b)
    )

  def _fake_cameras(self, b: int) -> Cameras:
    v, (height, width) = len(self.model.views), self.model.image_size
    intrinsics = np.tile(
      np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]], np.float32), (b, v, 1, 1)
    )
    extrinsics = np.tile(np.eye(4, dtype=np.float32), (b, v, 1, 1))
    for i in range(v):
      angle = 2 * np.pi * i / v
      forward = -np.array([np.cos(angle), np.sin(angle), 0.0])
      down = np.array([0.0, 0.0, -1.0])
      extrinsics[:, i, :3, :3] = np.stack([np.cross(down, forward), down, forward], -1)
      extrinsics[:, i, :3, 3] = -forward
    return Cameras(intrinsics, extrinsics, np.ones((b, v), bool))


def to_config_dict(config: ExperimentConfig) -> ml_collections.ConfigDict:
  """A locked, type-safe ConfigDict of every field, ready for `--config.a.b=value` overrides."""
  result = ml_collections.ConfigDict(dataclasses.asdict(config))
  return result.lock()


def from_config_dict(config: ml_collections.ConfigDict) -> ExperimentConfig:
  """The validated dataclass tree of a ConfigDict.

  Raises:
    ConfigError: unknown field (with the nearest name), wrong type or an illegal value, naming the
      field.
  """
  return _build(ExperimentConfig, config.to_dict(), 'config')


def _build(cls, values: dict[str, Any], path: str):
  hints = typing.get_type_hints(cls)
  names = [f.name for f in dataclasses.fields(cls)]
  for key in values:
    if key not in names:
      raise ConfigError(f'{path}.{key}: unknown field.{nearest(key, names)}')
  try:
    return cls(
      **{key: _coerce(hints[key], value, f'{path}.{key}') for key, value in values.items()}
    )
  except ConfigError as error:
    raise error if str(error).startswith('config') else ConfigError(f'config: {error}') from None


def _coerce(hint, value, path: str):
  """`value` as the annotated type; ints widen to floats and lists to tuples, nothing else is
  converted.
  """
  origin = typing.get_origin(hint)
  if dataclasses.is_dataclass(hint):
    return _build(hint, dict(value), path)
  if origin is Literal:
    if value not in typing.get_args(hint):
      raise ConfigError(f'{path}: expected one of {typing.get_args(hint)}, got {value!r}.')
    return value
  if origin is tuple:
    return _coerce_tuple(hint, value, path)
  if origin in (types.UnionType, typing.Union):
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise ConfigError(f'{path}: expected {hint.__name__}, got {value!r} ({type(value).__name__}).')
  return value


def _coerce_tuple(hint, value, path: str):
  if not isinstance(value, (list, tuple)):
    raise ConfigError(f'{path}: expected a tuple, got {value!r} ({type(value).__name__}).')
  args = typing.get_args(hint)
  if len(args) == 2 and args[1] is Ellipsis:
    args = (args[0],) * len(value)
  if len(args) != len(value):
    raise ConfigError(f'{path}: expected {len(args)} entries, got {len(value)}: {value!r}.')
  return tuple(_coerce(a, v, f'{path}[{i}]') for i, (a, v) in enumerate(zip(args, value)))


def nearest(name: str, options) -> str:
  """' Did you mean ...?' for the closest option, or the list of options."""
  import difflib

  close = difflib.get_close_matches(name, [str(o) for o in options], n=1)
  return f' Did you mean {close[0]!r}?' if close else f' Known: {", ".join(map(str, options))}.'
