"""A few real BridgeData V2 clips in RLDS form: both towers on every window of ten-step clips,
regularised to match.

wallwm data build --reader rlds --source DIR --out stores/bridge
wallwm train --config experiments/bridge_sample.py --workdir runs/bridge
--config.data.store=stores/bridge wallwm eval openloop --workdir runs/bridge --store stores/bridge
--json runs/bridge/openloop.json
"""

import dataclasses

from wallwm_jax.config import to_config_dict
from wallwm_jax.presets import tabletop


def get_config():
  base = tabletop()
  model = dataclasses.replace(
    base.model, views=('image_0', 'image_1', 'image_2', 'image_3'), history=0, future=2
  )
  return to_config_dict(
    dataclasses.replace(
      base,
      name='bridge_sample',
      model=model,
      data=dataclasses.replace(base.data, window='chunk', buckets=(2,), batch_size=16, balance=0.0),
      diffusion=dataclasses.replace(base.diffusion, sight_cone=False),
      optim=dataclasses.replace(base.optim, lr=5e-4, weight_decay=0.3),
      train=dataclasses.replace(base.train, stage='joint', steps=150, ema=0.98),
    )
  )
