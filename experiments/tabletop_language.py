"""Language side of the tabletop: a small VLM from scratch (`wallwm tiny-vlm`), then stages 3 and 4
on what stage 2 left (`--config.train.stage=3 --config.train.init_from=...`)."""

import dataclasses

from wallwm_jax.config import to_config_dict
from wallwm_jax.presets import tabletop_language


def get_config():
  config = tabletop_language('weights/tiny')
  train = dataclasses.replace(config.train, stage='vlm', steps=3000)
  return to_config_dict(dataclasses.replace(config, train=train))
