"""`wallwm rollout`: recorded attempts in a simulator, or an imagined video, as a film."""

from __future__ import annotations

import argparse
import pathlib

from wallwm_jax.commands import common, imagine, worlds

FILM_FPS = 20  # of a film, about, where a world is faster
WIDTH = 640  # least pixels of the written video, all views side by side


def add_parser(verbs) -> None:
  parser = common.add_verb(
    verbs,
    'rollout',
    'let a trained policy act in a simulator and write what the cameras saw, or, with '
    '--video-only, what the video model imagines (.mp4 or .gif)',
    'wallwm rollout --workdir runs/quickstart/stage2 --store runs/quickstart/store '
    '--tasks push --out push.gif\n'
    '  wallwm rollout --workdir runs/stage4 --store runs/store --tasks put --source planner '
    '--out put.gif\n'
    '  wallwm rollout --video-only --workdir runs/quickstart/stage1 --store runs/quickstart/store '
    '--event 3 --out event.mp4\n'
    '  wallwm rollout --video-only --config experiments/wallwm_wan2_2_5b.py '
    '--prompt "a robot arm pours tea" '
    '--image front=desk.png --frames 121 --out tea.mp4',
    run=run,
    overrides=[],
  )
  parser.add_argument('--workdir', help='trained run')
  parser.add_argument('--out', required=True, help='video file, .mp4 or .gif')
  parser.add_argument('--seed', type=int, default=0, help='scene and noise (0)')
  worlds.add_arguments(parser, required=False)  # imagining needs no store
  parser.add_argument('--video-only', action='store_true', help='imagine; nothing acts')
  imagine.add_arguments(parser.add_argument_group('what --video-only reads'))


def run(args: argparse.Namespace) -> None:
  from wallwm_jax.types import ConfigError

  out = pathlib.Path(args.out)
  if out.suffix not in WRITERS:
    raise ConfigError(f'--out: expected a file ending in {" or ".join(WRITERS)}, got {out.name!r}.')
  if args.overrides and not args.config:
    raise ConfigError(f'unknown argument {args.overrides[0]!r} (see wallwm rollout --help).')
  if not args.video_only:
    _act(args, out)
    return
  frames, fps, facts = imagine.film(args)
  _write(out, frames, fps)
  common.print_json({'out': out, 'frames': len(frames), 'fps': fps} | facts)


def _act(args: argparse.Namespace, out: pathlib.Path) -> None:
  import numpy as np

  from wallwm_jax.types import ConfigError

  for name in imagine.ONLY:
    if getattr(args, name) is not None:
      raise ConfigError(f'--{name}: expected only together with --video-only.')
  for name in ('workdir', 'store'):
    if getattr(args, name) is None:
      raise ConfigError(f'--{name}: required unless --video-only is given.')
  attempts = worlds.World(args, per_kind=1).attempt(record=True)
  turns = [turn for film in attempts.films for turn in film]
  films = [np.concatenate(list(turn), axis=2) for turn in turns]
  every = max(round(attempts.fps / FILM_FPS), 1)
  frames = np.concatenate(films)[::every]  # attempt after attempt, views side by side
  fps = attempts.fps / every
  _write(out, frames, fps)
  succeeded = attempts.rollouts.success.tolist()
  done = [
    {'instruction': text, 'success': ok, 'progress': progress, 'asked': attempts.asked(i)}
    for i, (text, ok, progress) in enumerate(
      zip(attempts.instructions, succeeded, attempts.rollouts.progress.tolist())
    )
  ]
  common.print_json({'out': out, 'frames': len(frames), 'fps': fps, 'attempts': done})


def _write(out: pathlib.Path, frames, fps: float) -> None:
  """Frames uint8 [T, H, W, 3] as a film, small ones enlarged."""
  scale = -(-WIDTH // frames.shape[2])
  frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
  out.parent.mkdir(parents=True, exist_ok=True)
  WRITERS[out.suffix](out, frames, fps)


def _write_gif(path: pathlib.Path, frames, fps: float) -> None:
  from wallwm_jax.evaluation.page import gif

  path.write_bytes(gif(frames, fps))


def _write_mp4(path: pathlib.Path, frames, fps: float) -> None:
  import fractions

  import av

  even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # chroma is halved
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('libx264', rate=fractions.Fraction(fps).limit_denominator(1000))
    stream.height, stream.width, stream.pix_fmt = *even.shape[1:3], 'yuv420p'
    stream.options = {'crf': '18'}
    for frame in even:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
    container.mux(stream.encode())


WRITERS = {'.mp4': _write_mp4, '.gif': _write_gif}
