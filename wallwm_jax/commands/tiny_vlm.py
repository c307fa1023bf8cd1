"""`wallwm tiny-vlm`: a small VLM and reader from scratch, on the texts and pictures of a store."""

from __future__ import annotations

import argparse
import pathlib

from wallwm_jax.commands import common, settings

TOKENIZER = 'tokenizer.json'


def add_parser(verbs) -> None:
  example = (
    'wallwm tiny-vlm --config experiments/tabletop_language.py --workdir runs/tiny_vlm '
    '--config.data.store=stores/tabletop'
  )
  parser = common.add_verb(
    verbs,
    'tiny-vlm',
    'make a small VLM and reader where public ones are too large: tokenizer, language modelling '
    "(stage 'vlm') and weight folders that stages 3 and 4 read",
    example,
    run=run,
    overrides=[],
  )
  parser.add_argument('--config', required=True, help='experiment with a language side')
  parser.add_argument('--workdir', required=True, help='checkpoints and metrics of the training')
  parser.add_argument('--quiet', action='store_true', help='no progress line')


def run(args: argparse.Namespace) -> None:
  config = settings.load_experiment(args.config, args.overrides)
  with common.progress_on_stderr():
    result = make(config, args.workdir, progress=not args.quiet)
  language = config.language
  common.print_json(
    {'step': result.step, 'vlm': language.vlm.weights, 'reader': language.reader.weights}
    | {k: v for k, v in (result.history[-1] if result.history else {}).items() if k != 'step'}
  )


def make(config, workdir: str | pathlib.Path, *, progress: bool = True):
  """Trains stage 'vlm' of `config` and writes `language.vlm.weights` and `language.reader.weights`,
  each with the tokenizer; what is complete is not made again.

  Returns:
    training.loop.TrainResult.

  Raises:
    ConfigError: the config names no folders, or is no language side at all.
  """
  import dataclasses

  from wallwm_jax import presets, weights
  from wallwm_jax.data.moments import tokenizer_texts
  from wallwm_jax.data.store import EventStore
  from wallwm_jax.text.planning import train_tokenizer
  from wallwm_jax.training import loop
  from wallwm_jax.training.checkpoints import load_params_for_init
  from wallwm_jax.training.state import param_shapes
  from wallwm_jax.types import ConfigError

  language = config.language
  folders = {'vlm': language.vlm.weights, 'reader': language.reader.weights}
  for name, folder in folders.items():
    if language.kind == 'none' or not folder:
      raise ConfigError(
        f'config.language.{name}.weights: expected the folder to write, got {folder!r}.'
      )
  workdir = pathlib.Path(workdir)
  tokenizer = workdir / TOKENIZER
  if not tokenizer.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    train_tokenizer(
      tokenizer_texts(EventStore(config.data.store), config), tokenizer, language.vlm.vocab
    )
  here = dataclasses.replace(
    language, vlm=dataclasses.replace(language.vlm, weights=str(workdir))
  )
  stage = presets.stage(config, 'vlm', steps=config.train.steps, seed=config.train.seed)
  stage = dataclasses.replace(stage, language=here)
  result = loop.train(stage, workdir, progress=progress)
  params = load_params_for_init(workdir, param_shapes(stage))
  for name, folder in folders.items():
    if not weights.is_weights(folder):
      fields = {'config': dataclasses.asdict(getattr(language, name)) | {'weights': ''}}
      weights.save(folder, 'vlm', 'qwen', fields, params[name], {TOKENIZER: tokenizer})
  return result
