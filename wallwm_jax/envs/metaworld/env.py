"""One Meta-World task in this process: what a policy may see, how it acts, its cameras."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from wallwm_jax.data.schema import Calibration
from wallwm_jax.envs.metaworld import cameras, library
from wallwm_jax.envs.metaworld.cameras import TURNED, VIEWS
from wallwm_jax.envs.metaworld.control import command_of, pose_of
from wallwm_jax.envs.metaworld.tasks import MetaWorldTask, task_of
from wallwm_jax.errors import ConfigError

MAX_STEPS = 500  # of an episode, Meta-World's horizon
SMALLEST = 8  # px


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyInput:
  """All that a policy may look at. frames: {view: uint8 [H, W, 3]}; state: float32 [10], measured
  pose."""

  frames: dict[str, np.ndarray]
  state: np.ndarray


class MetaWorldEnv:
  """A task, stepped by absolute target poses at 80 Hz.

  `reset(seed)` starts an episode that is a function of (task, seed) alone; `observe` gives what a
  policy may see; `step(target)` acts. Success is Meta-World's: `info['success']` was 1 at any step.
  """

  def __init__(
    self, task: str, size: tuple[int, int] = (96, 96), views: Sequence[str] = VIEWS
  ):
    """task: name without version suffix; size: (H, W) px of every view; views: those to render.

    Raises:
      ConfigError: unknown task or view, a size below 8 px, or Meta-World is missing or cannot
        render.
    """
    if not views or not set(views) <= set(VIEWS):
      raise ConfigError(f'views: expected some of the cameras {VIEWS}, got {tuple(views)}.')
    if len(size) != 2 or min(size) < SMALLEST:
      raise ConfigError(f'size: expected (H, W) of at least {SMALLEST} px, got {tuple(size)}.')
    self.task: str = task
    self.words: MetaWorldTask = task_of(task)
    self.size, self.views = tuple(size), tuple(views)
    self._library = library.load()
    self._env = self._renderer = None
    self.steps, self.succeeded = 0, False
    self._observation = np.zeros((0,))

  @property
  def instruction(self) -> str:
    """What the task asks for."""
    return self.words.instruction

  @property
  def control_period(self) -> float:
    """Seconds between two actions (and frames)."""
    return float(self._env.dt)

  @property
  def over(self) -> bool:
    """Whether the horizon is reached: no further step may follow."""
    return self.steps >= MAX_STEPS

  @property
  def expert_observation(self) -> np.ndarray:
    """float64 [39], privileged (poses of objects, the goal): for scripted experts only."""
    return self._observation.copy()

  def expert_policy(self):
    """A fresh scripted expert of the task (metaworld.policies)."""
    return self._library.policies[f'{self.task}-v3']()

  def reset(self, seed: int) -> None:
    """Starts the episode of a seed. The simulator is built anew: nothing of an earlier episode can
    reach this one."""
    self.close()
    try:
      self._env = self._library.classes[f'{self.task}-v3']()
    except (ValueError, AttributeError) as error:
      raise library.broken('building the simulator', error) from error
    env = self._env
    env._partially_observable = False  # the experts need the goal
    env.__dict__.pop('sawyer_observation_space', None)  # was cached without it
    env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True
    env.seed(int(seed))
    self._observation, _ = env.reset()
    self.steps, self.succeeded = 0, False

  def observe(self) -> PolicyInput:
    """What a policy may see now: the rendered views and the pose from obs[:4]."""
    return PolicyInput(self._render(), pose_of(self._observation))

  def pose(self) -> np.ndarray:
    """Measured pose, float32 [10], without rendering."""
    return pose_of(self._observation)

  def step(self, target: np.ndarray) -> bool:
    """Moves towards an absolute target pose [10] for one control period; whether the task has been
    solved by now.

    Raises:
      ConfigError: the horizon is reached.
    """
    return self.command(command_of(self.pose(), target))

  def command(self, command: np.ndarray) -> bool:
    """`step` by Meta-World's own command [4] in -1..1."""
    if self.over:
      raise ConfigError(f'{self.task}: the horizon of {MAX_STEPS} steps is reached; reset first.')
    self._observation, _, _, _, info = self._env.step(np.clip(command, -1, 1))
    self.steps += 1
    self.succeeded = self.succeeded or bool(info['success'])
    return self.succeeded

  def calibration(self) -> dict[str, Calibration]:
    """By view, extrinsics [4, 4] at this moment (the camera on the hand moves)."""
    found = {}
    for view in VIEWS:
      number = self._env.model.camera(view).id
      pose = cameras.extrinsics_of(
        self._env.data.cam_xpos[number],
        self._env.data.cam_xmat[number].reshape(3, 3),
        view in TURNED,
      )
      fovy = float(self._env.model.cam_fovy[number])
      found[view] = Calibration(cameras.intrinsics_of(fovy, self.size), pose)
    return found

  def close(self) -> None:
    """Frees the simulator and its graphics."""
    for resource in (self._renderer, self._env):
      if resource is not None:
        resource.close()
    self._env = self._renderer = None

  def _render(self) -> dict[str, np.ndarray]:
    """Views at twice their size, averaged down: smoother than the library's multisampling, and
    cheaper without a GPU."""
    height, width = self.size
    if self._renderer is None:
      self._renderer = self._make_renderer(2 * height, 2 * width)
    frames = {}
    for view in self.views:
      self._renderer.update_scene(self._env.data, camera=view)
      large = self._renderer.render().reshape(height, 2, width, 2, 3)
      image = np.round(large.mean((1, 3), dtype=np.float32)).astype(np.uint8)
      frames[view] = image[::-1, ::-1].copy() if view in TURNED else image
    return frames

  def _make_renderer(self, height: int, width: int):
    mujoco, model = self._library.mujoco, self._env.model
    model.vis.quality.offsamples = 0
    model.vis.global_.offheight, model.vis.global_.offwidth = height, width
    try:
      renderer = mujoco.Renderer(model, height, width)
    except Exception as error:  # every backend fails in its own way
      raise library.broken('rendering', error) from error
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
      renderer.scene.flags[flag] = 0
    return renderer
