"""Meta-World MT10 on event windows, both towers at once; metaworld_mt10_chunk.py is its baseline.

Recording needs Meta-World (README), training does not.

wallwm data build --reader metaworld --tasks MT10 --episodes 400 --size 64x64 --noise 0.2 \
  --heldout 0.1 --out stores/mt10
wallwm train --config experiments/metaworld_mt10_event.py --workdir runs/mt10_event \
  --config.data.store=stores/mt10
"""

import dataclasses

from wallwm_jax import presets
from wallwm_jax.config import to_config_dict


def get_config():
  config = presets.stage(presets.metaworld(), 'joint', steps=1500)
  return to_config_dict(dataclasses.replace(config, name='metaworld_mt10_event'))
