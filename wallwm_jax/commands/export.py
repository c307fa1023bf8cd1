"""`wallwm export`: a trained policy as a folder of programs that run without the model code."""

from __future__ import annotations

import argparse
import pathlib

from wallwm_jax.commands import common


def add_parser(verbs) -> None:
  parser = common.add_verb(
    verbs,
    'export',
    'write a policy as jax.export programs with parameters, captions and a loader',
    'wallwm export runs/quickstart/stage2 --out runs/policy --platforms cpu tpu cuda '
    '--text captions.txt',
    run=run,
  )
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument('workdir', nargs='?', help='trained run')
  which.add_argument('--config', help='experiment file: programs of its shapes, no parameters')
  parser.add_argument('--out', required=True, help='folder to write, or policy to replace')
  parser.add_argument(
    '--platforms', nargs='+', default=['cpu'], help='any of cpu cuda tpu (cpu)'
  )
  parser.add_argument(
    '--buckets', nargs='+', type=int, help="event mode: future latents (all the run's buckets)"
  )
  parser.add_argument(
    '--batch', type=_batch, help='rows of every call: a number, or dynamic = any (dynamic)'
  )
  parser.add_argument('--text', help='file of captions, one a line, whose features come along')
  parser.add_argument('--programs-only', action='store_true', help='no parameters, from shapes')
  parser.add_argument('--dry-run', action='store_true', help='say what would be written')


def run(args: argparse.Namespace) -> None:
  from wallwm_jax.commands.settings import load_experiment
  from wallwm_jax.inference.export import Choice, describe, export_policy, verify
  from wallwm_jax.training.checkpoints import load_inference, load_source
  from wallwm_jax.types import ConfigError

  config = load_experiment(args.config) if args.config else load_source(args.workdir)[0]
  choice = Choice(
    tuple(args.platforms), tuple(args.buckets or config.data.buckets), args.batch or None
  )
  captions = _captions(args.text) if args.text else []
  if args.dry_run:
    plan = describe(config, shapes_of(config), choice)
    common.print_json({'out': args.out, 'captions': len(captions)} | plan)
    return
  if args.config and not args.programs_only:
    raise ConfigError('--config: an experiment has no parameters. Add --programs-only, or name the '
                      'workdir of a trained run.')
  params = shapes_of(config) if args.programs_only else load_inference(args.workdir)[1]
  text = _encoded(captions, config) if captions else None
  export_policy(config, params, args.out, choice, text)
  manifest = verify(args.out)
  keys = ('mode', 'bucket', 'platform', 'batch', 'batch_reason')
  common.print_json({
    'out': args.out,
    'bytes': sum(about['bytes'] for about in manifest['files'].values()),
    'programs': [{key: entry[key] for key in keys} for entry in manifest['programs']],
    'captions': len(captions),
    **{key: manifest[key] for key in ('format', 'requires', 'stats_hash')},
  })  # fmt: skip


def _batch(text: str) -> int:
  """Rows, 0 = any."""
  if text == 'dynamic':
    return 0
  try:
    rows = int(text)
  except ValueError:
    rows = 0
  if rows < 1:
    raise argparse.ArgumentTypeError(f'expected dynamic or a number of rows >= 1, got {text!r}')
  return rows


def _captions(path: str) -> list[str]:
  """The captions of a file, each once, in its order."""
  from wallwm_jax.types import DataError

  lines = [line.strip() for line in pathlib.Path(path).read_text(encoding='utf-8').splitlines()]
  captions = list(dict.fromkeys(line for line in lines if line))
  if not captions:
    raise DataError(f'--text {path}: expected captions, one a line, found none.')
  return captions


def _encoded(captions: list[str], config):
  from wallwm_jax.inference.export import Captions
  from wallwm_jax.text.factory import make_text_encoder

  return Captions(captions, make_text_encoder(config.model.text).encode(captions))


def shapes_of(config):
  """The parameters of a run of this config as ShapeDtypeStructs."""
  import functools

  import jax
  import numpy as np

  from wallwm_jax.models import functional
  from wallwm_jax.types import Frozen, InferenceParams, NormStats, Text

  model, key = config.model, jax.random.key(0)
  params = jax.eval_shape(functools.partial(functional.init_params, model), key)
  codec = jax.eval_shape(functools.partial(functional.init_codec, model.codec), key)
  s, f32 = jax.ShapeDtypeStruct, np.dtype(np.float32)
  width, channels = s((model.action_spec.dim,), f32), s((model.codec.channels,), f32)
  text = model.text
  null = Text(s((1, text.tokens, text.width), f32), s((1, text.tokens), np.dtype(bool)))
  frozen = Frozen(
    NormStats(*[width] * 4, *[channels] * 2), codec, None if text.kind == 'hash' else null
  )
  return InferenceParams(params, frozen)
