"""Stage 1 on plain multi-view video without actions, e.g. a folder of synchronised DROID cameras.

wallwm data build --reader video --source DIR --out stores/droid
wallwm train --config experiments/droid_video.py --workdir runs/droid
--config.data.store=stores/droid
"""

import dataclasses

from wallwm_jax.config import to_config_dict
from wallwm_jax.presets import tabletop


def get_config():
  base = tabletop()
  model = dataclasses.replace(
    base.model, views=('exterior_image_1_left', 'exterior_image_2_left', 'wrist_image_left')
  )
  return to_config_dict(
    dataclasses.replace(
      base,
      name='droid_video',
      model=model,
      data=dataclasses.replace(base.data, batch_size=8, buckets=(4,)),
      diffusion=dataclasses.replace(base.diffusion, sight_cone=False),
      train=dataclasses.replace(base.train, stage='1', steps=200),
    )
  )
