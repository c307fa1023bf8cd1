"""Configs that more than one experiment starts from."""

from __future__ import annotations

import dataclasses

from wallwm_jax.config import (
  ActionConfig,
  CodecConfig,
  DataConfig,
  DiffusionConfig,
  ExperimentConfig,
  InferenceConfig,
  ModelConfig,
  OptimConfig,
  TextConfig,
  TrainConfig,
  VideoConfig,
)


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


def stage(
  config: ExperimentConfig, name: str, *, steps: int, init_from: str = '', seed: int = 0
) -> ExperimentConfig:
  """`config` as another training stage; stage 5 reads chunk windows, the others event windows."""
  train = dataclasses.replace(config.train, stage=name, steps=steps, init_from=init_from, seed=seed)
  data = config.data
  if name == '5':
    data = dataclasses.replace(data, window='chunk', buckets=(config.model.future,))
  return dataclasses.replace(config, name=f'{config.name}_stage{name}', data=data, train=train)
