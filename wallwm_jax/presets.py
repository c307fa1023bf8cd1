"""Configs that more than one experiment starts from, and the sizes of the public models."""

from __future__ import annotations

import dataclasses

from wallwm_jax.config import (
  ActionConfig,
  CodecConfig,
  DataConfig,
  DiffusionConfig,
  DistillConfig,
  ExperimentConfig,
  HeadsConfig,
  InferenceConfig,
  LanguageConfig,
  MeshConfig,
  ModelConfig,
  OptimConfig,
  QwenConfig,
  StaircaseConfig,
  TextConfig,
  TrainConfig,
  UMT5Config,
  VAEConfig,
  VideoConfig,
  VisionTowerConfig,
)

# Video towers of the public Wan checkpoints.
VIDEO_TOWERS = {
  'wan2_1_1_3b': VideoConfig(width=1536, layers=30, heads=12, ffn=8960),
  'wan2_1_14b': VideoConfig(width=5120, layers=40, heads=40, ffn=13_824),
  'wan2_2_5b': VideoConfig(width=3072, layers=30, heads=24, ffn=14_336),
}

# Frame codecs by the name `--codec` takes. Normalisation constants: Wan2.1's and Wan2.2's
# published ones, per latent channel.
CODECS = {
  'dct': CodecConfig(),
  'wan2_1': CodecConfig(
    kind='wan',
    spatial=8,
    channels=16,
    vae=VAEConfig(
      base=96,
      decoder_base=96,
      residual=False,
      patch=1,
      # fmt: off
      latent_mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
      ),
      latent_std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
      ),
      # fmt: on
    ),
  ),
  'wan2_2': CodecConfig(
    kind='wan',
    spatial=16,
    channels=48,
    vae=VAEConfig(
      # fmt: off
      latent_mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
      ),
      latent_std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
      ),
      # fmt: on
    ),
  ),
}

# The text encoder of both.
UMT5_XXL = TextConfig(kind='umt5', tokens=512, width=4096, umt5=UMT5Config())

# Vision-language models: the small one, without its vision tower, is also the reader of stage 4.
QWEN = {
  'qwen3_5_0_8b': QwenConfig(),
  'qwen3_5_9b': QwenConfig(
    width=4096,
    ffn=12_288,
    layer_types=('linear', 'linear', 'linear', 'full') * 8,
    heads=16,
    kv_heads=4,
    linear_value_heads=32,
    tied=False,
    vision=VisionTowerConfig(layers=27, width=1152, heads=16, ffn=4304),
  ),
}


def tabletop() -> ExperimentConfig:
  """Stage 1 of the small model for the embedded tabletop: three 48x48 cameras, float32, minutes on
  two CPU cores.

  Departures from the large-model defaults, each for size: networks predict clean samples (a 64-wide
  stream cannot carry the noise of wider patches), and actions read the video tower near the noisy
  end of the schedule.
  """
  return ExperimentConfig(
    name='tabletop',
    model=ModelConfig(
      video=VideoConfig(width=128, layers=4, heads=4, ffn=384, patch=(1, 3, 3), prediction='x'),
      action=ActionConfig(width=128, heads=4, ffn=256, prediction='x'),
      codec=CodecConfig(spatial=8, channels=96),
      text=TextConfig(tokens=16, width=64),
      history=1,
      future=2,
      max_future=6,
    ),
    diffusion=DiffusionConfig(anchor_step=10, action_draws=4, shift=3.0),
    data=DataConfig(batch_size=32, buckets=(2, 4), balance=0.5),
    optim=OptimConfig(lr=4e-3, warmup_steps=40, weight_decay=0.02),
    train=TrainConfig(ema=0.99, log_every=20, checkpoint_every=500),
    inference=InferenceConfig(video_steps=2, action_steps=5),
  )


def metaworld() -> ExperimentConfig:
  """The tabletop's model for Meta-World: its three cameras at 64 px, a model frame every four
  control steps (20 Hz), so that most events are two to four latent frames long.

  Demonstrations are few, and a policy that failed is asked again in the middle of an event; half of
  the event windows begin there.
  """
  config = tabletop()
  return dataclasses.replace(
    config,
    name='metaworld',
    model=dataclasses.replace(
      config.model,
      video=dataclasses.replace(config.model.video, patch=(1, 4, 4)),
      views=('corner', 'corner2', 'gripperPOV'),
      image_size=(64, 64),
    ),
    data=dataclasses.replace(config.data, stride=4, midway=0.5),
  )


def tabletop_language(folder: str, config: ExperimentConfig | None = None) -> ExperimentConfig:
  """`tabletop` (or `config`) with a language side in Qwen3.5's architecture, small enough to be
  made from scratch on the tabletop's texts (stage 'vlm').

  Args:
    folder: has, or will have, the weights of the small VLM and of the reader in vlm/ and reader/.
  """
  layers = ('linear', 'full')
  reader = QwenConfig(
    vocab=512,
    width=128,
    ffn=384,
    layer_types=layers,
    heads=4,
    kv_heads=2,
    head_dim=32,
    linear_key_heads=2,
    linear_value_heads=4,
    linear_key_dim=32,
    linear_value_dim=32,
    rotary=0.5,
    mrope_section=(4, 2, 2),
    rope_theta=1e4,
    vision=VisionTowerConfig(layers=0),
    image_token=5,
    video_token=6,
    dtype='float32',
    weights=f'{folder}/reader',
  )
  vlm = dataclasses.replace(
    reader,
    layer_types=2 * layers,
    vision=VisionTowerConfig(
      layers=3, width=96, heads=4, ffn=256, patch=8, temporal=1, positions=36
    ),
    weights=f'{folder}/vlm',
  )
  config = config or tabletop()
  return dataclasses.replace(
    config,
    name=f'{config.name}_language',
    language=LanguageConfig(
      kind='qwen',
      vlm=vlm,
      reader=reader,
      staircase=StaircaseConfig(latents=8, relay_depth=1),
      heads=HeadsConfig(width=128, heads=4, time_unit=0.1),
      prompt_tokens=96,
      answer_tokens=16,
      trace_tokens=64,
    ),
  )


def world_action(tower: str, codec: str) -> ExperimentConfig:
  """Stage 1 of the full-size model on a public video tower: three cameras of 192 x 224, events of
  up to 65 frames, bfloat16, one fsdp axis over all devices.

  Args:
    tower: a name of VIDEO_TOWERS; codec: of CODECS. Their weights, and those of UMT5, are looked
      for in weights/, where docs/weights.md puts them.
  """
  return ExperimentConfig(
    name=f'wallwm_{tower}',
    model=ModelConfig(
      video=VIDEO_TOWERS[tower],
      # Heads of 128, as the video's: what the lanes of a TPU and its kernels hold.
      action=ActionConfig(width=1024, heads=8, ffn=4096),
      codec=dataclasses.replace(CODECS[codec], weights=f'weights/{codec}_vae'),
      text=dataclasses.replace(UMT5_XXL, weights='weights/umt5_xxl', cache='weights/captions'),
      image_size=(192, 224),
      history=1,
      future=4,
      max_future=16,
      dtype='bfloat16',
      remat='full',
    ),
    data=DataConfig(batch_size=256, buckets=(4, 8, 16), stride=2, threads=16),
    optim=OptimConfig(lr=1e-4, warmup_steps=1000, schedule='wsd'),
    mesh=MeshConfig(fsdp=-1),
    train=TrainConfig(steps=100_000, checkpoint_every=1000, init_from=f'weights/{tower}'),
    inference=InferenceConfig(video_steps=10, action_steps=10, guidance=5.0),
  )


def stage(
  config: ExperimentConfig, name: str, *, steps: int, init_from: str = '', seed: int = 0
) -> ExperimentConfig:
  """`config` as another training stage; stage 5 reads chunk windows, the others event windows."""
  train = dataclasses.replace(config.train, stage=name, steps=steps, init_from=init_from, seed=seed)
  data = config.data
  if name == '5':
    data = dataclasses.replace(data, window='chunk', buckets=(config.model.future,), midway=0.0)
  return dataclasses.replace(config, name=f'{config.name}_stage{name}', data=data, train=train)


def student(config: ExperimentConfig, teacher: str, *, steps: int) -> ExperimentConfig:
  """Distillation of the run in the workdir `teacher`, a model like `config`, into one video step.

  Small steps from where the teacher stands; the critic has half of them to itself.
  """
  config = stage(config, 'distill', steps=steps, init_from=teacher)
  return dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, batch_size=16),
    optim=dataclasses.replace(config.optim, lr=5e-4, warmup_steps=10),
    distill=DistillConfig(critic_updates=2, action_weight=10.0),
    train=dataclasses.replace(config.train, ema=0.98),
    inference=dataclasses.replace(config.inference, video_steps=1),
  )
