"""Distillation of a few-step student, in which `inference.video_steps` says how few."""

from __future__ import annotations

import dataclasses

from wallwm_jax.config.base import require

DISTILL_STAGES = ('distill', 'distill_video')


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """How student and critic (the fake score) take turns, and what the student's loss is made of.

  Every step updates the critic, one in `critic_updates` the student as well.
  """

  critic_updates: int = 5
  video_weight: float = 1.0  # of the distribution-matching loss
  action_weight: float = 1.0  # of the action loss; stage 'distill_video' has none
  guidance: float = 1.0  # of the teacher (classifier-free), learnt by the student; 1 = off

  def __post_init__(self):
    require(
      self.critic_updates >= 1,
      f'distill.critic_updates: expected >= 1, got {self.critic_updates}.',
    )
    for name in ('video_weight', 'action_weight'):
      value = getattr(self, name)
      require(value > 0, f'distill.{name}: expected > 0, got {value}. The ablation without the '
              "action loss is train.stage='distill_video'.")


def check_distill(config) -> None:
  """Refuses an ExperimentConfig that cannot be distilled.

  Raises:
    ConfigError: it has no teacher, no steps to be few, or something that rollouts do otherwise.
  """
  if config.train.stage not in DISTILL_STAGES:
    return
  where = f'train.stage={config.train.stage!r}'
  require(
    bool(config.train.init_from),
    f'train.init_from: {where} expects the workdir of the teacher, got none. Train one first.',
  )
  require(
    config.inference.video_steps >= 1,
    f'inference.video_steps: {where} expects the number of steps of the student, >= 1, got '
    f'{config.inference.video_steps}.',
  )
  require(
    config.inference.guidance == 1.0,
    f'inference.guidance: {where} makes a student that needs no guidance, expected 1, got '
    f'{config.inference.guidance}. That of the teacher is distill.guidance.',
  )
  require(
    config.diffusion.mapping == 'anchor',
    f'diffusion.mapping: {where} distils the way to the anchor, expected \'anchor\', got '
    f'{config.diffusion.mapping!r}.',
  )
  require(
    not config.data.pack and config.data.text == 'caption',
    f'data.pack, data.text: {where} generates windows as a rollout does, expected pack=0 and '
    f"text='caption', got {config.data.pack} and {config.data.text!r}.",
  )
