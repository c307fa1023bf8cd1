"""Configs of a run: noise, data, optimizer, mesh, training, inference, and the whole experiment."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import numpy as np

from wallwm_jax.config import packed
from wallwm_jax.config.base import require
from wallwm_jax.config.distill import DistillConfig, check_distill
from wallwm_jax.config.language import LanguageConfig
from wallwm_jax.config.model import ModelConfig
from wallwm_jax.types import Cameras, EventBatch, LanguageBatch, PackedBatch, Prompt, Text


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
    require(
      0 <= self.anchor_step < self.num_steps,
      f'diffusion.anchor_step: expected 0..{self.num_steps - 1}, got {self.anchor_step}.',
    )
    require(
      self.action_draws >= 1, f'diffusion.action_draws: expected >= 1, got {self.action_draws}.'
    )
    require(
      0 < self.cone_depth[0] < self.cone_depth[1],
      f'diffusion.cone_depth: empty band {self.cone_depth}.',
    )
    low, high, start, end = self.caption_drop
    require(
      0 <= low <= high <= 1 and start < end,
      'diffusion.caption_drop: expected (rho_min <= rho_max in 0..1, L_min < L_max), got '
      f'{self.caption_drop}.',
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where training data come from and how they are drawn.

  Every group of events (a label or, where `clusters` is set, an observation cluster and an action
  cluster) is drawn in proportion to its count ** (1 - balance). With clusters, no event is drawn
  more than `balance_cap` times as often as it would be naturally, `sources` are drawn in the given
  ratio, and events that show a recovery make up the share `recovery`.

  With `pack`, a row of a batch holds as many whole events as fit, each 1 + n latent frames (its
  anchor and n <= buckets[-1] future ones), and the buckets in between have no meaning.
  """

  store: str = ''
  split: str = 'train'
  batch_size: int = 32  # global
  buckets: tuple[int, ...] = (4,)  # future latent frames N of each length bucket, ascending
  window: Literal['event', 'chunk'] = 'event'
  midway: float = 0.0  # share of event windows that begin inside their event, as one replanned does
  text: Literal['caption', 'staircase'] = 'caption'  # what the towers are told by
  phrasing: Literal['canonical', 'train', 'heldout'] = 'train'  # wordings that prompts are put in
  latents: str = ''  # latents of the store's events, from `wallwm data encode`; '' = encode frames
  planes: bool = False  # frames reach the device as the I420 planes of the store's h264 clips
  balance: float = 0.5  # 0 = natural frequency, 1 = every label (or cluster) equally often
  clusters: str = ''  # folder of cluster labels, from `wallwm data cluster`; '' = balance labels
  balance_cap: float = 16.0  # most repeats of an event, relative to its natural frequency
  balance_tolerance: float = 0.05  # how far shares of clusters may stay from their targets, 0..1
  sources: tuple[tuple[str, float], ...] = ()  # (source, ratio) of every source; () = as they come
  recovery: float = 0.0  # share of events that show a recovery; 0 = as they come
  pack: int = 0  # latent frames of a row that holds several events; 0 = one event per row
  stride: int = 1  # raw frames per model frame
  normalisation: Literal['meanstd', 'quantile'] = 'meanstd'
  photometric: float = 0.0  # strength 0..1 of colour, blur and noise jitter in training; 0 = off
  crop: float = 0.0  # largest part of each image side cut away in training, 0..0.5; 0 = off
  workers: int = 0  # Grain worker processes; never changes the batches
  threads: int = 2  # Grain read threads; never changes the batches
  seed: int = 0

  def __post_init__(self):
    require(self.batch_size >= 1, f'data.batch_size: expected >= 1, got {self.batch_size}.')
    require(
      bool(self.buckets)
      and list(self.buckets) == sorted(set(self.buckets))
      and self.buckets[0] >= 1,
      f'data.buckets: expected ascending positive latent-frame counts, got {self.buckets}.',
    )
    require(
      not self.latents or self.window == 'event',
      'data.latents: precomputed latents are of whole events, but data.window is '
      f'{self.window!r}. Chunk windows are encoded as they are cut: set data.latents to \'\'.',
    )
    require(
      not (self.planes and self.latents),
      'data.planes: precomputed latents take the place of frames. Set one of data.planes and '
      'data.latents.',
    )
    require(0 <= self.balance <= 1, f'data.balance: expected 0..1, got {self.balance}.')
    require(
      self.balance_cap >= 1,
      f'data.balance_cap: expected >= 1 (inf = no cap), got {self.balance_cap}.',
    )
    require(
      0 <= self.balance_tolerance <= 1,
      f'data.balance_tolerance: expected 0..1 (1 = the closest compromise), got '
      f'{self.balance_tolerance}.',
    )
    require(0 <= self.recovery < 1, f'data.recovery: expected 0 <= x < 1, got {self.recovery}.')
    names = [name for name, _ in self.sources]
    require(
      len(set(names)) == len(names) and all(0 < ratio < np.inf for _, ratio in self.sources),
      'data.sources: expected (source, ratio > 0) with every source once, got '
      f'{self.sources}.',
    )
    require(
      bool(self.clusters) or not (self.sources or self.recovery),
      'data.sources and data.recovery are shares of clustered events, but data.clusters is empty. '
      'Make labels with `wallwm data cluster`.',
    )
    require(
      self.pack == 0 or self.pack > self.buckets[-1],
      f'data.pack: expected 0 or at least {1 + self.buckets[-1]} latent frames, the anchor and '
      f'data.buckets[-1] more, got {self.pack}.',
    )
    require(
      not self.pack or self.window == 'event',
      f'data.pack: rows hold whole events, but data.window is {self.window!r}. Set data.pack to 0.',
    )
    require(0 <= self.midway <= 1, f'data.midway: expected 0..1, got {self.midway}.')
    require(
      not self.midway or (self.window == 'event' and not self.pack and not self.latents),
      f'data.midway={self.midway}: only event windows that are cut from frames one by one begin '
      f'inside their event, got data.window={self.window!r}, data.pack={self.pack}, '
      f'data.latents={self.latents!r}. Set data.midway to 0.',
    )
    for name, most in (('photometric', 1), ('crop', 0.5)):
      value = getattr(self, name)
      require(0 <= value <= most, f'data.{name}: expected 0..{most}, got {value}.')
      require(
        not (self.latents and value),
        f'data.latents={self.latents!r} and data.{name}={value}: precomputed latents cannot be '
        f"jittered. Set data.latents='' to encode frames, or data.{name}=0.",
      )
      require(
        not (self.planes and value),
        f'data.planes and data.{name}={value}: planes cannot be jittered. Set data.planes=False, '
        f'or data.{name}=0.',
      )

  def picture(self, image_size: tuple[int, int]) -> tuple[int, ...]:
    """Shape of one frame of a batch: [H, W, 3], or its planes [H * 3/2, W]."""
    height, width = image_size
    return (height * 3 // 2, width) if self.planes else (height, width, 3)


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
    require(self.lr > 0, f'optim.lr: expected > 0, got {self.lr}.')
    require(
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

  stage: 1 video, 2 action (video frozen), 3 the heads of the frozen VLM, 4 staircase and prefix
  projector, 5 both towers on chunk windows, 'joint' both towers on event windows (the small joint
  fit), 'vlm' a small VLM and reader from scratch, in the place of public ones, 'distill' a few-step
  student of init_from, 'distill_video' the same without the action loss. unfreeze: parts that train
  beyond those of the stage. init_from: a workdir, a checkpoint or a folder of converted
  weights whose params start this run ('' = random).
  """

  stage: Literal['1', '2', '3', '4', '5', 'joint', 'vlm', 'distill', 'distill_video'] = '1'
  unfreeze: tuple[str, ...] = ()
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
    require(self.steps >= 1, f'train.steps: expected >= 1, got {self.steps}.')
    require(0 <= self.ema < 1, f'train.ema: expected 0 <= ema < 1, got {self.ema}.')


LANGUAGE_STAGES = ('3', '4', 'vlm')  # they read moments of events, not windows


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
  """Solver steps of a rollout. video_steps Euler steps run from pure noise to the anchor noise
  level.
  """

  video_steps: int = 8
  action_steps: int = 6
  guidance: float = 1.0  # classifier-free guidance on the video tower; 1 = off
  negative: str = ''  # caption that guidance moves away from
  # Of the keys and values that actions read: 'int8' halves the bytes of every action step.
  cache_dtype: Literal['compute', 'int8'] = 'compute'

  def __post_init__(self):
    require(
      self.action_steps >= 1, f'inference.action_steps: expected >= 1, got {self.action_steps}.'
    )


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """One run: everything `wallwm train --config F` needs."""

  name: str = 'experiment'
  model: ModelConfig = ModelConfig()
  language: LanguageConfig = LanguageConfig()
  diffusion: DiffusionConfig = DiffusionConfig()
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  train: TrainConfig = TrainConfig()
  distill: DistillConfig = DistillConfig()
  inference: InferenceConfig = InferenceConfig()

  def __post_init__(self):
    require(
      max(self.data.buckets) <= self.model.max_future,
      f'data.buckets: longest bucket {max(self.data.buckets)} exceeds '
      f'model.max_future={self.model.max_future}.',
    )
    require(
      not (self.data.planes and any(side % 2 for side in self.model.image_size)),
      f'data.planes: colours have half the resolution, expected an even model.image_size, got '
      f'{self.model.image_size}.',
    )
    require(
      self.language.kind != 'none'
      or (self.data.text == 'caption' and self.train.stage not in LANGUAGE_STAGES),
      f'language.kind: stage {self.train.stage!r} with data.text={self.data.text!r} needs the '
      "language side, got 'none'. Set language.kind='qwen' and its sizes.",
    )
    require(
      not self.data.pack or self.train.stage not in LANGUAGE_STAGES,
      f'data.pack: stage {self.train.stage!r} reads moments, one per row. Set data.pack to 0.',
    )
    check_distill(self)

  def window_frames(self, bucket: int) -> tuple[int, int]:
    """(T raw frames, K action steps) of one window with `bucket` future latent frames."""
    history = self.model.history if self.data.window == 'chunk' else 0
    r = self.model.steps_per_latent
    return 1 + r * (history + bucket), r * bucket

  def inputs_spec(
    self, bucket: int | None = None, batch_size: int | None = None
  ) -> EventBatch | LanguageBatch | PackedBatch:
    """The batch of ShapeDtypeStructs a training step of this config receives."""
    bucket = self.data.buckets[-1] if bucket is None else bucket
    b = self.data.batch_size if batch_size is None else batch_size
    if self.train.stage in LANGUAGE_STAGES:
      return self._moments_spec(b)
    if self.data.pack:
      prompts = self.language.prompt_tokens if self.data.text == 'staircase' else 0
      picture = () if self.data.latents else self.data.picture(self.model.image_size)
      return packed.spec(self.model, self.data.pack, b, picture=picture, prompt_tokens=prompts)
    frames, steps = self.window_frames(bucket)
    v, (height, width) = len(self.model.views), self.model.image_size
    a, x, e = self.model.action_spec.dim, self.model.text.tokens, self.model.text.width
    h, w, c = *self.model.latent_size, self.model.codec.channels
    latents = bool(self.data.latents)
    s = jax.ShapeDtypeStruct
    f32, i32 = np.dtype('float32'), np.dtype('int32')
    picture = self.data.picture(self.model.image_size)
    return EventBatch(
      frames=None if latents else s((b, v, frames, *picture), np.dtype('uint8')),
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
      latents=s((b, v, 1 + bucket, h, w, c), f32) if latents else None,
      prompt=_tokens(b, self.language.prompt_tokens) if self.data.text == 'staircase' else None,
    )

  def _moments_spec(self, b: int) -> LanguageBatch:
    s, f32, i32 = jax.ShapeDtypeStruct, np.dtype('float32'), np.dtype('int32')
    v, text, language = len(self.model.views), self.model.text, self.language
    return LanguageBatch(
      frames=s((b, v, *self.model.image_size, 3), np.dtype('uint8')),
      state=s((b, self.model.action_spec.dim), f32),
      view_mask=s((b, v), np.dtype(bool)),
      prompt=_tokens(b, language.prompt_tokens),
      answer=_tokens(b, language.answer_tokens),
      trace=_tokens(b, language.trace_tokens),
      text=Text(s((b, text.tokens, text.width), f32), s((b, text.tokens), np.dtype(bool))),
      caption=s((b,), i32),
      last=s((b,), i32),
      remaining=s((b,), f32),
      duration=s((b,), f32),
      uid=s((b, 2), np.dtype('uint32')),
    )

  def fake_batch(
    self, bucket: int | None = None, batch_size: int | None = None, seed: int = 0
  ) -> EventBatch | LanguageBatch | PackedBatch:
    """A random but valid batch (NumPy) of `inputs_spec`: full length, all views, cameras on a ring;
    prompts with the image tokens of every view.
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
    if batch.prompt is not None:
      batch = dataclasses.replace(batch, prompt=self._fake_tokens(batch.prompt, rng))
    if isinstance(batch, LanguageBatch):
      zeros = np.zeros_like(batch.caption)
      answer, trace = (self._fake_tokens(x, rng, 0) for x in (batch.answer, batch.trace))
      return dataclasses.replace(
        batch,
        answer=answer,
        trace=trace,
        caption=zeros,
        last=np.arange(len(zeros), dtype=np.int32) % 2 - 1,
        remaining=np.abs(batch.remaining),
      )
    if isinstance(batch, PackedBatch):
      cameras = self._fake_cameras(batch.event_mask.size)
      shape = batch.event_mask.shape
      cameras = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), cameras)
      batch = dataclasses.replace(batch, cameras=cameras)
      return packed.lay_out(batch, self.data.buckets[-1], self.model.steps_per_latent)
    b = batch.num_frames.shape[0]
    bucket = self.data.buckets[-1] if bucket is None else bucket
    length = np.full((b,), self.window_frames(bucket)[0], np.int32)
    return dataclasses.replace(
      batch, num_frames=length, raw_length=length, cameras=self._fake_cameras(b)
    )

  def _fake_tokens(self, tokens: Prompt, rng, images: int | None = None) -> Prompt:
    """Random text after `images` image tokens, by default those of all views."""
    vlm, shape = self.language.vlm, tokens.ids.shape
    if images is None:
      h, w = self.language.image_size or self.model.image_size
      images = len(self.model.views) * (h // vlm.vision.factor) * (w // vlm.vision.factor)
    ids = rng.integers(0, min(vlm.image_token, vlm.video_token, vlm.vocab), shape, np.int32)
    ids[..., :images] = vlm.image_token
    return Prompt(ids, np.ones(shape, bool))

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


def _tokens(batch: int, length: int) -> Prompt:
  s = jax.ShapeDtypeStruct
  return Prompt(s((batch, length), np.dtype('int32')), s((batch, length), np.dtype(bool)))
