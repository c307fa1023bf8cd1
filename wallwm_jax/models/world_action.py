"""The coupled world-action model: one video tower, one action tower, one-way coupling between
them.
"""

from __future__ import annotations

from flax import nnx

from wallwm_jax.config import ModelConfig
from wallwm_jax.models.action_dit import ActionTower
from wallwm_jax.models.video_dit import VideoTower


class WorldAction(nnx.Module):
  """Holder of both towers; p(V_e, a_e | V_0, s, c_e)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.video = VideoTower(config, rngs=rngs)
    self.action = ActionTower(config, rngs=rngs)
