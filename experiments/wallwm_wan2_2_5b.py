"""Stage 1 on a pod, from the converted weights of Wan2.2-TI2V-5B (see docs/weights.md).

wallwm train --config experiments/wallwm_wan2_2_5b.py --workdir runs/wan2_2_5b
--config.data.store=STORE
"""

from wallwm_jax.config import to_config_dict
from wallwm_jax.presets import world_action


def get_config():
  return to_config_dict(world_action('wan2_2_5b', 'wan2_2'))
