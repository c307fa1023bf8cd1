"""Settings of the tabletop environment."""

from __future__ import annotations

import dataclasses

from wallwm_jax.envs.tabletop import mjcf
from wallwm_jax.types import ConfigError


@dataclasses.dataclass(frozen=True)
class TabletopConfig:
  """image_size: (H, W) px of every view; substeps: physics steps of mjcf.TIMESTEP per control
  period;
  yaw_range: cubes and gripper start within +- this, rad; start_spread: scale of the start
  perturbations; recovery_radius: m, of the ball around an event's contact pose in which recoveries
  begin."""

  image_size: tuple[int, int] = (48, 48)
  substeps: int = 5
  yaw_range: float = 0.3
  start_spread: float = 1.0
  recovery_radius: float = 0.03

  def __post_init__(self):
    if len(self.image_size) != 2 or min(self.image_size) < 8:
      raise ConfigError(
        f'tabletop.image_size: expected (H, W) of at least 8 px, got {self.image_size}.'
      )
    if self.substeps < 1:
      raise ConfigError(f'tabletop.substeps: expected >= 1, got {self.substeps}.')
    if not 0 <= self.yaw_range <= 0.7:
      raise ConfigError(f'tabletop.yaw_range: expected 0..0.7 rad, got {self.yaw_range}.')
    if not 0 <= self.start_spread <= 1.5:
      raise ConfigError(f'tabletop.start_spread: expected 0..1.5, got {self.start_spread}.')
    if not 0 < self.recovery_radius <= 0.06:
      raise ConfigError(
        f'tabletop.recovery_radius: expected 0..0.06 m, got {self.recovery_radius}.'
      )

  @property
  def control_period(self) -> float:
    """Seconds between two actions (and frames)."""
    return self.substeps * mjcf.TIMESTEP
