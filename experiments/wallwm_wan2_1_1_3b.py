"""Stage 1 on a pod, from the converted weights of Wan2.1-T2V-1.3B (see docs/weights.md).

wallwm train --config experiments/wallwm_wan2_1_1_3b.py --workdir runs/wan2_1_1_3b
--config.data.store=STORE
"""

from wallwm_jax.config import to_config_dict
from wallwm_jax.presets import world_action


def get_config():
  return to_config_dict(world_action('wan2_1_1_3b', 'wan2_1'))
