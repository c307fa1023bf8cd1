"""The fixed-chunk baseline of tabletop_event.py: from scratch, same model, steps and batch.

Windows are one history, one anchor and two future latent frames wherever they fall in the episode,
and the text is the task's instruction.

wallwm train --config experiments/tabletop_chunk.py --workdir runs/tabletop_chunk \
  --config.data.store=stores/tabletop
"""

import dataclasses

from wallwm_jax import presets
from wallwm_jax.config import to_config_dict


def get_config():
  config = presets.stage(presets.tabletop(), '5', steps=4000)
  return to_config_dict(dataclasses.replace(config, name='tabletop_chunk'))
