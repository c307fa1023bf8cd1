"""Meta-World: fifty manipulation tasks of a simulated Sawyer arm (optional, extra `metaworld`).

`MetaWorldEnv` is one task in this process, `collect` gives demonstrations of the scripted experts
as EpisodeRecord. A policy sees the rendered views and the measured pose of the hand, never the
state of objects or goals.
"""

from wallwm_jax.envs.metaworld.cameras import VIEWS
from wallwm_jax.envs.metaworld.collect import Collection, collect
from wallwm_jax.envs.metaworld.control import command_of, pose_of, target_of
from wallwm_jax.envs.metaworld.env import MAX_STEPS, MetaWorldEnv, PolicyInput
from wallwm_jax.envs.metaworld.tasks import SUITES, phase_caption, select_tasks, task_of

__all__ = [
  'MAX_STEPS',
  'SUITES',
  'VIEWS',
  'Collection',
  'MetaWorldEnv',
  'PolicyInput',
  'collect',
  'command_of',
  'phase_caption',
  'pose_of',
  'select_tasks',
  'target_of',
  'task_of',
]
