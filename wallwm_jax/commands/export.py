"""`wallwm export`: a trained policy as serialised functions that run without the model code."""

from __future__ import annotations

import argparse

from wallwm_jax.commands import common


def add_parser(verbs) -> None:
  parser = common.add_verb(
    verbs,
    'export',
    'write event and unified mode as jax.export artifacts, with weights and signature',
    'wallwm export --workdir runs/quickstart/stage2 --out runs/policy --platforms cpu,cuda',
    run=run,
  )
  parser.add_argument('--workdir', required=True, help='trained run')
  parser.add_argument('--out', required=True, help='folder of the artifacts')
  parser.add_argument('--batch', type=int, default=1, help='fixed batch size (1)')
  parser.add_argument(
    '--bucket', type=int, help="future latents of event mode (the run's longest bucket)"
  )
  parser.add_argument('--platforms', default='cpu', help='comma-separated: cpu,cuda,tpu (cpu)')


def run(args: argparse.Namespace) -> None:
  from wallwm_jax.inference.export import export_policy, load_exported
  from wallwm_jax.training.checkpoints import load_inference

  config, params = load_inference(args.workdir)
  bucket = config.data.buckets[-1] if args.bucket is None else args.bucket
  platforms = tuple(args.platforms.split(','))
  signature = export_policy(
    config, params, args.out, batch_size=args.batch, bucket=bucket, platforms=platforms
  )
  load_exported(args.out, params.norm)  # what was written can be read and has these statistics
  keys = ('format', 'platforms', 'batch_size', 'bucket', 'stats_hash')
  common.print_json({'out': args.out} | {k: signature[k] for k in keys})
