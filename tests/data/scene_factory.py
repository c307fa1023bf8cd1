"""A textured scene that an arm moves through, so that the lag between video and robot is known.

Poses follow minimum-jerk strokes between random points, with pauses in which the gripper opens or
closes. Two cameras look at the scene from fixed places, a third one rides on the hand.
"""

import numpy as np

from wallwm_jax.data.schema import EpisodeRecord, EventSpan

VIEWS = ('front', 'side', 'wrist')
_LOOKS = {  # metres to pixels: right and down in the image, per axis of the world
  'front': np.array([[40.0, 0, 0], [0, 8.0, -40.0]]),
  'side': np.array([[0, 40.0, 4.0], [6.0, 0, -40.0]]),
}


def make_motion(num_frames, seed):
  """float64 [T, 10]: strokes of 8..20 frames inside a 0.8 m cube, a constant orientation turned
  about z, gripper 0..1."""
  rng = np.random.default_rng(seed)
  position, yaw, grip = [rng.uniform(-0.4, 0.4, 3)], [rng.uniform(-0.5, 0.5)], [1.0]
  while len(position) < num_frames:
    steps, goal, turn = rng.integers(8, 21), rng.uniform(-0.4, 0.4, 3), rng.uniform(-0.5, 0.5)
    s = np.arange(1, steps + 1) / steps
    s = s**3 * (10 - 15 * s + 6 * s**2)
    position += list(position[-1] + s[:, None] * (goal - position[-1]))
    yaw += list(yaw[-1] + s * (turn - yaw[-1]))
    grip += [grip[-1]] * int(steps)
    rest = int(rng.integers(0, 7))
    target = 1.0 - round(grip[-1]) if rest else grip[-1]
    position += [position[-1]] * rest
    yaw += [yaw[-1]] * rest
    grip += list(np.linspace(grip[-1], target, rest + 1)[1:])
  position, yaw, grip = (np.asarray(x)[:num_frames] for x in (position, yaw, grip))
  zero = np.zeros_like(yaw)
  columns = np.stack([np.cos(yaw), np.sin(yaw), zero, -np.sin(yaw), np.cos(yaw), zero], 1)
  return np.concatenate([position, columns, grip[:, None]], 1)


def _texture(rng, waves=8, finest=0.5):
  """A random smooth brightness of (right, down) px, about -1..1."""
  direction = rng.uniform(0, 2 * np.pi, waves)
  wave = rng.uniform(0.1, finest, waves) * np.stack([np.cos(direction), np.sin(direction)])
  phase = rng.uniform(0, 2 * np.pi, waves)
  wave, phase = wave.astype(np.float32), phase.astype(np.float32)

  def brightness(right, down):
    return sum(np.sin(a * right + b * down + p) for (a, b), p in zip(wave.T, phase)) / np.sqrt(
      2 * waves
    )

  return brightness


def render(poses, view, seed, size=40, noise=4.0):
  """uint8 [T, size, size, 3] of poses [T, 10]; noise: sensor noise in grey levels."""
  rng = np.random.default_rng((seed, VIEWS.index(view)))
  down, right = np.meshgrid(np.arange(size), np.arange(size), indexing='ij')
  right, down = (np.float32(x[None] - size / 2) for x in (right, down))
  scene, arm = _texture(rng), _texture(rng, finest=0.9)
  x, y, z, grip = (poses[:, i, None, None].astype(np.float32) for i in (0, 1, 2, 9))
  if view == 'wrist':
    zoom = 1 + 0.5 * z
    image = scene(right * zoom + 30 * x, down * zoom + 30 * y)
    fingers = np.abs(np.abs(right) - 4 - 6 * grip) < 2.5
    image = np.where(fingers & (down > size / 4), 1.0, image)
  else:
    u, v = np.float32(_LOOKS[view] @ poses[:, :3].T)[..., None, None]
    near = 1 / (1 + np.exp(np.hypot(right - u, down - v) - 5 - 1.5 * grip))
    column = 1 / (1 + np.exp(2 * (np.abs(right - u) - 3))) / (1 + np.exp(down - v))
    cover = np.maximum(near, column)
    image = scene(right, down) * (1 - cover) + (0.5 + arm(right - u, down - v)) * cover
  image = 128 + 70 * image.astype(np.float32)[..., None] * np.float32([1.0, 0.9, 0.8])
  image += noise * rng.standard_normal(image.shape, np.float32)
  return np.clip(np.round(image), 0, 255).astype(np.uint8)


def make_scene(index=0, num_frames=90, lags=0, views=VIEWS, noise=4.0, fps=10.0, **changes):
  """An episode whose robot stream is `lags` frames late: state row t + lag was measured at frame t.

  Args:
    lags: frames, one for all cameras or {view: lag}; either sign. changes: fields to replace.
  """
  lags = dict.fromkeys(views, lags) if isinstance(lags, int) else lags
  spare = max(abs(lag) for lag in lags.values())
  poses = make_motion(num_frames + 2 * spare, index)
  frames = {
    view: render(poses[spare + lag : spare + lag + num_frames], view, index, noise=noise)
    for view, lag in lags.items()
  }
  state = poses[spare : spare + num_frames].astype(np.float32)
  fields = {
    'episode_id': f'scene-{index}',
    'source': 'scenes',
    'fps': fps,
    'views': tuple(views),
    'frames': frames,
    'state': state,
    'actions': np.concatenate([state[1:], state[-1:]]),
    'events': (EventSpan(0, num_frames, 'move', {'L1': 'move about'}),),
    'rig': 'table',
  }
  return EpisodeRecord(**fields | changes)
