"""The embedded environment: a Cartesian gripper, coloured cubes and zones, stepped by MJX and
rendered in JAX.

`env_fns(TabletopConfig())` gives the environment as pure functions, `sample_task`/`task_suite` what
to do in it, `collect` demonstrations of the scripted expert as EpisodeRecord.
"""

from wallwm_jax.envs.tabletop.collect import MIXES, collect
from wallwm_jax.envs.tabletop.config import TabletopConfig
from wallwm_jax.envs.tabletop.env import camera_calibration, env_fns
from wallwm_jax.envs.tabletop.render import VIEWS
from wallwm_jax.envs.tabletop.state import TabletopState
from wallwm_jax.envs.tabletop.tasks import (
  CAPTIONS,
  EVENT_KINDS,
  LONG_KINDS,
  MULTI_KINDS,
  SINGLE_KINDS,
  TASK_KINDS,
  Task,
  event_caption,
  sample_task,
  task_suite,
)

__all__ = [
  'CAPTIONS',
  'EVENT_KINDS',
  'LONG_KINDS',
  'MIXES',
  'MULTI_KINDS',
  'SINGLE_KINDS',
  'TASK_KINDS',
  'VIEWS',
  'TabletopConfig',
  'TabletopState',
  'Task',
  'camera_calibration',
  'collect',
  'env_fns',
  'event_caption',
  'sample_task',
  'task_suite',
]
