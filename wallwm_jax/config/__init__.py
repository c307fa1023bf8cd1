"""Config dataclasses with validation, and their two-way bridge to ml_collections.

An experiment file defines `get_config()` returning `to_config_dict(ExperimentConfig(...))`; every
field is then overridable as `--config.section.field=value`. `from_config_dict` rebuilds the frozen
dataclasses, which is where all validation happens. Dataclasses are hashable: they are the static
arguments of jitted functions.
"""

from wallwm_jax.config.bridge import from_config_dict, nearest, to_config_dict
from wallwm_jax.config.distill import DISTILL_STAGES, DistillConfig
from wallwm_jax.config.encoders import CodecConfig, TextConfig, UMT5Config, VAEConfig
from wallwm_jax.config.language import (
  HeadsConfig,
  LanguageConfig,
  QwenConfig,
  StaircaseConfig,
  VisionTowerConfig,
)
from wallwm_jax.config.model import ActionConfig, ActionSpec, ModelConfig, VideoConfig
from wallwm_jax.config.run import (
  LANGUAGE_STAGES,
  DataConfig,
  DiffusionConfig,
  ExperimentConfig,
  InferenceConfig,
  MeshConfig,
  OptimConfig,
  TrainConfig,
)

__all__ = [
  'DISTILL_STAGES',
  'LANGUAGE_STAGES',
  'ActionConfig',
  'ActionSpec',
  'CodecConfig',
  'DataConfig',
  'DiffusionConfig',
  'DistillConfig',
  'ExperimentConfig',
  'HeadsConfig',
  'InferenceConfig',
  'LanguageConfig',
  'MeshConfig',
  'ModelConfig',
  'OptimConfig',
  'QwenConfig',
  'StaircaseConfig',
  'TextConfig',
  'TrainConfig',
  'UMT5Config',
  'VAEConfig',
  'VideoConfig',
  'VisionTowerConfig',
  'from_config_dict',
  'nearest',
  'to_config_dict',
]
