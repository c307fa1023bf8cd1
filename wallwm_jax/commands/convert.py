"""`wallwm convert FAMILY`: public torch checkpoints to weight folders, and back."""

from __future__ import annotations

import argparse
import sys
import time

from wallwm_jax.commands import common, settings

_GB = 10**9
_VERBS = (
  (
    'wan-dit',
    'Wan2.1 or Wan2.2 video transformer to the weights of the video tower, or back',
    'wallwm convert wan-dit --src Wan2.2-TI2V-5B --out weights/wan2_2_5b --mesh fsdp=8',
  ),
  (
    'wan-vae',
    'Wan2.1 or Wan2.2 video VAE to the weights of the frame codec, or back',
    'wallwm convert wan-vae --src Wan2.2-TI2V-5B-Diffusers/vae --out weights/wan2_2_vae',
  ),
  (
    'umt5',
    'UMT5 encoder to the weights of the text encoder, tokenizer included, or back',
    'wallwm convert umt5 --src text_encoder --tokenizer tokenizer.json --out weights/umt5',
  ),
  (
    'qwen',
    'Qwen3.5 (dense) to the weights of the VLM or of its reader, tokenizer included, or back',
    'wallwm convert qwen --src Qwen3.5-9B --out weights/qwen3_5_9b --mesh fsdp=8',
  ),
)
_TOKENIZERS = ('umt5', 'qwen')


def add_parser(verbs) -> None:
  group = verbs.add_parser(
    'convert', help='public checkpoints to weights of this project, and back', allow_abbrev=False
  )
  families = group.add_subparsers(dest='family', required=True, metavar='family')
  for name, summary, example in _VERBS:
    parser = common.add_verb(families, name, summary, example, run=run, overrides=[])
    parser.add_argument(
      '--src',
      required=True,
      help='safetensors file, its index, or a folder with them in the diffusers or the original '
      'naming; with --to torch a weight folder',
    )
    parser.add_argument('--out', help='new folder (not needed with --dry-run)')
    parser.add_argument('--to', choices=('jax', 'torch'), default='jax', help='direction (jax)')
    parser.add_argument(
      '--dry-run', action='store_true', help='check and print what would become of every tensor'
    )
    parser.add_argument(
      '--mesh', default='', help='store for the shards of this mesh, e.g. fsdp=8,tensor=2'
    )
    parser.add_argument('--config', help='experiment whose model the checkpoint must fit')
    parser.add_argument(
      '--naming',
      choices=('diffusers', 'original'),
      help="--to torch: names of the tensors (the source's)"
      + ('; original: of the text-only class' if name == 'qwen' else ''),
    )
    parser.add_argument(
      '--shard-gb', type=float, default=5.0, help='--to torch: largest file in GB (5)'
    )
    if name in _TOKENIZERS:
      parser.add_argument('--tokenizer', help='tokenizer.json (looked for beside --src)')


def run(args: argparse.Namespace) -> None:
  from wallwm_jax.types import ConfigError

  if not args.out and not args.dry_run:
    raise ConfigError('--out: expected a new folder to write, got none (or pass --dry-run).')
  if args.overrides and not args.config:
    raise ConfigError(f'{args.overrides[0]}: unknown argument without --config.')
  if args.shard_gb <= 0:
    raise ConfigError(f'--shard-gb: expected a size > 0, got {args.shard_gb}.')
  (_to_torch if args.to == 'torch' else _to_jax)(args)


def _to_jax(args) -> None:
  from wallwm_jax import weights
  from wallwm_jax.convert.importer import find_tokenizer, import_weights
  from wallwm_jax.convert.plan import FAMILIES, make_plan
  from wallwm_jax.convert.source import open_source

  family = FAMILIES[args.family]
  mesh = weights.parse_mesh(args.mesh)
  config = None
  if args.config:
    experiment = settings.load_experiment(args.config, args.overrides)
    config = experiment.language if family.component == 'vlm' else experiment.model
  if args.out:
    weights.check_new(args.out)
  source = open_source(args.src, family.subfolder)
  tokenizer, problems = None, []
  if family.tokenizer:
    tokenizer, problems = find_tokenizer(source, args.tokenizer)
  plan = make_plan(family, source, config, problems)
  leaves = plan.leaves(mesh)
  if args.dry_run:
    _print_table(('status', 'key', 'dtype', 'shape', 'parameter', 'shape'), plan.rows())
    return common.print_json(
      {'naming': plan.naming, 'fields': plan.fields, 'prefix': plan.source.prefix}
      | {'files': len(source.files), 'arrays': len(leaves), **plan.totals()}
    )
  manifest = import_weights(plan, args.out, mesh, tokenizer, _Progress())
  common.print_json(
    {'out': args.out, 'digest': weights.digest(args.out), 'component': manifest.component}
    | {'naming': manifest.naming, 'mesh': manifest.mesh, **plan.totals()}
  )


def _to_torch(args) -> None:
  from wallwm_jax.convert.exporter import export_table, export_weights
  from wallwm_jax.convert.plan import FAMILIES

  family = FAMILIES[args.family]
  if args.dry_run:
    table = export_table(args.src, family, args.naming)
    return _print_table(('key', 'dtype', 'shape', 'parameter'), table)
  done = export_weights(
    args.src,
    args.out,
    family=family,
    naming=args.naming,
    shard_bytes=int(args.shard_gb * _GB),
    progress=_Progress(),
  )
  common.print_json({'out': args.out} | done)


class _Progress:
  """Bytes done, on stderr at most every two seconds."""

  def __init__(self):
    self._last = time.monotonic()

  def __call__(self, done: int, total: int) -> None:
    if time.monotonic() - self._last > 2:
      self._last = time.monotonic()
      print(f'{done / _GB:.1f} of {total / _GB:.1f} GB', file=sys.stderr)


def _print_table(head, rows) -> None:
  rows = [head, *rows]
  widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
  for row in rows:
    print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
