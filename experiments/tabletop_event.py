"""The tabletop model on event windows, both towers at once, for longer runs than the quickstart's.

wallwm data build --reader tabletop --episodes 4000 --mix mixed --out stores/tabletop
wallwm train --config experiments/tabletop_event.py --workdir runs/tabletop_event \
  --config.data.store=stores/tabletop
"""

import dataclasses

from wallwm_jax import presets
from wallwm_jax.config import to_config_dict


def get_config():
  config = presets.stage(presets.tabletop(), 'joint', steps=4000)
  return to_config_dict(dataclasses.replace(config, name='tabletop_event'))
