"""A few-step student of metaworld_mt10_event.py: distribution matching with the action loss kept.

Steps and the ablation without the action loss (the action tower stays the teacher's):

wallwm train --config experiments/distill_metaworld.py --workdir runs/mt10_student1 \
  --config.data.store=stores/mt10 --config.train.init_from=runs/mt10_event \
  --config.inference.video_steps=1
  ... --config.inference.video_steps=2
  ... --config.train.stage=distill_video
"""

from wallwm_jax import presets
from wallwm_jax.config import to_config_dict


def get_config():
  return to_config_dict(presets.student(presets.metaworld(), 'runs/mt10_event', steps=400))
