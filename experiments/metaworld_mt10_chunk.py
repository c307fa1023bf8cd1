"""The fixed-chunk baseline of metaworld_mt10_event.py: same model, batch, data and steps, windows
wherever they fall in an episode, told the task's instruction.

wallwm train --config experiments/metaworld_mt10_chunk.py --workdir runs/mt10_chunk \
  --config.data.store=stores/mt10
"""

import dataclasses

from wallwm_jax import presets
from wallwm_jax.config import to_config_dict


def get_config():
  config = presets.stage(presets.metaworld(), '5', steps=1500)
  return to_config_dict(dataclasses.replace(config, name='metaworld_mt10_chunk'))
