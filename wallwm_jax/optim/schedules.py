"""Learning-rate schedules: warm-up, then constant, cosine or warmup-stable-decay."""

from __future__ import annotations

import optax

from wallwm_jax.config import OptimConfig
from wallwm_jax.types import ConfigError

_WSD_DECAY = 0.2  # part of the run that a 'wsd' schedule spends decaying


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
  """Learning rate of update number 0, 1, ..., total_steps - 1.

  Warm-up is linear over `warmup_steps` updates, from lr / warmup_steps to lr. Then 'constant' keeps
  lr, 'cosine' falls to final_lr_ratio * lr at the end of the run, 'wsd' keeps lr and falls linearly
  to final_lr_ratio * lr over the last 20 % of the run. A shorter run ends within its warm-up.

  Raises:
    ConfigError: a negative warm-up, an empty run or a final ratio outside 0..1.
  """
  if config.warmup_steps < 0 or total_steps < 1 or not 0 <= config.final_lr_ratio <= 1:
    raise ConfigError(
      'optim: expected warmup_steps >= 0, train.steps >= 1 and final_lr_ratio in 0..1, got '
      f'{config.warmup_steps}, {total_steps}, {config.final_lr_ratio}.'
    )
  lr, warmup = config.lr, config.warmup_steps
  after = max(total_steps - warmup, 1)
  final = config.final_lr_ratio * lr
  if config.schedule == 'constant':
    body = optax.constant_schedule(lr)
  elif config.schedule == 'cosine':
    body = optax.cosine_decay_schedule(lr, after, alpha=config.final_lr_ratio)
  else:
    decay = min(after, max(1, round(_WSD_DECAY * total_steps)))
    body = optax.join_schedules(
      [optax.constant_schedule(lr), optax.linear_schedule(lr, final, decay)], [after - decay]
    )
  if warmup == 0:
    return body
  return optax.join_schedules([optax.linear_schedule(lr / warmup, lr, warmup - 1), body], [warmup])
