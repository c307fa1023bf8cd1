"""A few-step student of a tabletop run: distribution matching with the action loss kept.

Steps and the ablation without the action loss (the action tower stays the teacher's):

wallwm train --config experiments/tabletop_event.py --workdir runs/tabletop_event \
  --config.data.store=stores/tabletop --config.diffusion.anchor_step=45
wallwm train --config experiments/distill_tabletop.py --workdir runs/student1 \
  --config.data.store=stores/tabletop --config.train.init_from=runs/tabletop_event \
  --config.diffusion.anchor_step=45 --config.inference.video_steps=1
  ... --config.inference.video_steps=2
  ... --config.train.stage=distill_video
"""

from wallwm_jax import presets
from wallwm_jax.config import to_config_dict


def get_config():
  return to_config_dict(presets.student(presets.tabletop(), 'runs/tabletop_event', steps=400))
