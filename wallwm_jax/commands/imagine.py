"""`wallwm rollout --video-only`: what the video tower imagines, from a caption and first frames."""

from __future__ import annotations

import argparse
import pathlib
import time
from typing import NamedTuple

from wallwm_jax.commands import common, settings

FPS = 24.0  # of a video that starts from no recording, as Wan2.2's
SAMPLING = ('solver', 'grid', 'steps', 'shift', 'guidance')
# Arguments that mean nothing without --video-only and have no default.
ONLY = ('config', 'prompt', 'negative', 'image', 'views', 'event', 'grid', 'shift', 'fps')


def add_arguments(group) -> None:
  group.add_argument(
    '--config', help='experiment file whose config.train.init_from names converted weights '
    '(instead of --workdir)'
  )  # fmt: skip
  group.add_argument('--prompt', help="caption (the stored event's)")
  group.add_argument('--negative', help='caption to move away from (config.inference.negative)')
  group.add_argument(
    '--image', action='append', metavar='[VIEW=]FILE', help='first frame, one for each view'
  )
  group.add_argument('--event', type=int, help='row of --store whose first frame is given')
  group.add_argument('--views', help='views to imagine, such as front,wrist (all)')
  group.add_argument('--frames', type=int, default=17, help='frames, 1 + 4N (17)')
  group.add_argument('--solver', choices=('unipc', 'euler'), default='unipc', help='(unipc)')
  group.add_argument(
    '--grid', choices=('wan', 'uniform', 'diffusers_unipc', 'diffusers_euler'),
    help='noise levels (unipc: wan, euler: uniform)',
  )  # fmt: skip
  group.add_argument('--steps', type=int, default=50, help='solver steps (50)')
  group.add_argument('--shift', type=float, help='timestep shift (config.diffusion.shift)')
  group.add_argument('--guidance', type=float, default=5.0, help='1 = follow the caption only (5)')
  group.add_argument('--fps', type=float, help=f"(the store's, else {FPS:g})")


def film(args: argparse.Namespace):
  """(frames uint8 [T, H, W, 3] with the views side by side, frames per second, facts to report)."""
  import numpy as np

  from wallwm_jax.inference.video import GRIDS

  _check_files(args)
  config, params = load_video_model(args)
  future = _future(args, config)
  start = opening(args, config)
  if args.shift is None:
    args.shift = config.diffusion.shift
  args.grid = args.grid or GRIDS[args.solver]
  began = time.monotonic()
  latents = _sample(args, config, params, start, future)
  films = _decode(config, params, latents, np.flatnonzero(start.view_mask))
  views = [name for name, there in zip(config.model.views, start.view_mask) if there]
  facts = {'prompt': start.prompt, 'views': views}
  facts |= {name: getattr(args, name) for name in (*SAMPLING, 'seed')}
  facts['seconds'] = round(time.monotonic() - began, 2)
  return np.concatenate(films, axis=2), args.fps or start.fps, facts


def load_video_model(args: argparse.Namespace):
  """(config, InferenceParams) of `--workdir`, or of `--config` with the converted weights that its
  train.init_from names; only the video tower is there in the latter.

  Raises:
    ConfigError: neither or both, or a config without converted weights.
    CheckpointError: weights that are not those of the config.
  """
  from wallwm_jax import weights
  from wallwm_jax.training.checkpoints import load_inference
  from wallwm_jax.training.pretrained import load_public
  from wallwm_jax.types import ConfigError

  if (args.workdir is None) == (args.config is None):
    raise ConfigError(
      'rollout --video-only: expected either --workdir RUN or --config FILE (with converted '
      f'weights), got {"neither" if args.workdir is None else "both"}.'
    )
  if args.workdir:
    return load_inference(args.workdir)
  config = settings.load_experiment(args.config, args.overrides)
  if not weights.is_weights(config.train.init_from):
    raise ConfigError(
      'config.train.init_from: expected a folder of converted weights, got '
      f'{config.train.init_from!r}. Make one with `wallwm convert`, or give a trained run as '
      '--workdir.'
    )
  return config, load_public(config)


class Opening(NamedTuple):
  """How a video starts: frames uint8 [1, V, 1, H, W, 3] or None, view_mask [V], caption, fps."""

  frames: object
  view_mask: object
  prompt: str
  fps: float


def opening(args: argparse.Namespace, config) -> Opening:
  """What --image, --store and --event, --views and --prompt say.

  Raises:
    ConfigError: an unknown view, a view without an image, no caption, images and an event at once.
    DataError: a file that is no image, an event that the store does not have.
  """
  import numpy as np

  from wallwm_jax.types import ConfigError

  names = config.model.views
  asked = tuple(args.views.split(',')) if args.views else names
  for name in asked:
    _known_view(name, names, '--views')
  mask = np.array([name in asked for name in names])
  frames, prompt, fps = None, '', FPS
  if args.image:
    frames = images_of(args.image, config, asked)
  elif args.event is not None:
    frames, there, prompt, fps = _keyframe(args.store, args.event, config)
    mask &= there
    if not mask.any():
      raise ConfigError(f'--views: event {args.event} has none of {asked}.')
  if args.prompt is None and args.event is None:
    raise ConfigError('--prompt: expected a caption, got none (only stored events have their own).')
  return Opening(frames, mask, prompt if args.prompt is None else args.prompt, fps)


def _check_files(args: argparse.Namespace) -> None:
  """What can be refused before a large model is read."""
  from wallwm_jax.types import ConfigError

  if args.image and args.event is not None:
    raise ConfigError('--image and --event both give the first frame: expected one of them.')
  if (args.event is None) != (args.store is None):
    raise ConfigError('--store and --event: expected both (a stored event) or neither.')
  for text in args.image or ():
    file = text.partition('=')[2] or text
    if not pathlib.Path(file).is_file():
      raise ConfigError(f'--image {text}: expected an image file, found none at {file}.')


def _known_view(name: str, names, where: str) -> None:
  from wallwm_jax.config import nearest
  from wallwm_jax.types import ConfigError

  if name not in names:
    raise ConfigError(
      f'{where}: unknown view {name!r}, expected one of {names} (config.model.views).'
      f'{nearest(name, names)}'
    )


def images_of(given: list[str], config, asked):
  """uint8 [1, V, 1, H, W, 3] of `VIEW=FILE` (or FILE, for a single view); zeros for other views."""
  import numpy as np
  from PIL import Image, ImageOps

  from wallwm_jax.data import images
  from wallwm_jax.types import ConfigError, DataError

  names, size = config.model.views, config.model.image_size
  files = {}
  for text in given:
    view, equals, file = text.partition('=')
    if not equals:
      view, file = asked[0] if len(asked) == 1 else '', text
    _known_view(view, names, f'--image {text}')
    files[view] = file
  missing = [name for name in asked if name not in files]
  if missing or len(files) != len(asked):
    raise ConfigError(
      f'--image: expected one for each of the views {asked}, got {tuple(files)}. Add --image '
      f'{(missing or asked)[0]}=FILE, or name the views to imagine with --views.'
    )
  frames = np.zeros((1, len(names), 1, *size, 3), np.uint8)
  for view, file in files.items():
    try:
      pixels = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert('RGB'))
    except OSError as error:
      raise DataError(f'--image {view}={file}: expected an image: {error}.') from error
    frames[0, names.index(view)] = images.letterbox(pixels[None], size)
  return frames


def _keyframe(store: str, event: int, config):
  """First frame of a stored event [1, V, 1, H, W, 3], its views [V], caption and frame rate."""
  import numpy as np

  from wallwm_jax.data import images
  from wallwm_jax.data.schema import LEVELS
  from wallwm_jax.data.store import EventStore
  from wallwm_jax.data.transforms import pick_caption
  from wallwm_jax.types import DataError

  events = EventStore(store)
  if not 0 <= event < len(events.events):
    raise DataError(f'--event: expected 0..{len(events.events) - 1} ({store}), got {event}.')
  names, size = config.model.views, config.model.image_size
  row = {name: events.column(name)[event] for name in ('episode', 'start', *LEVELS)}
  episode = int(row['episode'])
  there = np.array([name in events.info(episode).views for name in names])
  present = [name for name, has in zip(names, there) if has]
  raw = events.frames(episode, np.array([int(row['start'])]), present)
  frames = np.zeros((1, len(names), 1, *size, 3), np.uint8)
  for name in present:
    frames[0, names.index(name)] = images.letterbox(raw[name], size)
  captions = {level: row[level] for level in LEVELS}
  fps = float(events.column('fps', 'episodes')[episode]) / config.data.stride
  return frames, there, pick_caption(captions, config.data.window), fps


def _future(args: argparse.Namespace, config) -> int:
  """Latent frames after the first that `--frames` asks for."""
  from wallwm_jax.types import ConfigError

  rate = config.model.codec.temporal
  future, rest = divmod(args.frames - 1, rate)
  given = args.image or args.event is not None
  if rest or future < (1 if given else 0):
    low = 1 + rate * max(future, 1 if given else 0)
    raise ConfigError(
      f'--frames: expected 1 + {rate}N{" with N >= 1" if given else ""} '
      f'(config.model.codec.temporal={rate}), got {args.frames}. Try {low} or {low + rate}.'
    )
  return future


def _sample(args: argparse.Namespace, config, params, start: Opening, future: int):
  """Latents [1, V, 1 + N, h, w, C] in codec units; progress on stderr."""
  import functools
  import itertools

  import jax

  from wallwm_jax.inference import video
  from wallwm_jax.text.factory import make_text_encoder
  from wallwm_jax.types import Text

  negative = config.inference.negative if args.negative is None else args.negative
  both = make_text_encoder(config.model.text).encode([start.prompt, negative])
  text, null = (Text(both.features[i : i + 1], both.mask[i : i + 1]) for i in (0, 1))
  known = None
  if start.frames is not None:
    known = jax.jit(functools.partial(video.known_latents, cfg=config))(params, start.frames)
  done = itertools.count(1)
  with common.progress_bar('sampling') as progress:
    sample = functools.partial(
      video.generate_video, cfg=config, frames=1 + future,
      on_step=lambda sigma: progress(next(done), args.steps),
      **{name: getattr(args, name) for name in SAMPLING},
    )  # fmt: skip
    latents = jax.jit(sample)(
      params, text, null, known, key=jax.random.key(args.seed), view_mask=start.view_mask[None]
    )
    latents.block_until_ready()
    jax.effects_barrier()
  return latents


def _decode(config, params, latents, views) -> list:
  """uint8 frames [T, H, W, 3] of each view, one view on the device at a time."""
  import jax
  import numpy as np

  from wallwm_jax.models import functional

  @jax.jit
  def decode(codec, latents):
    return functional.decode_video(config.model, latents, codec)[0, 0]

  films = (np.asarray(decode(params.frozen.codec, latents[:, v : v + 1])) for v in views)
  return [np.rint(255 * film.clip(0, 1)).astype(np.uint8) for film in films]
