"""Wall and processor time of a closed-loop evaluation in Meta-World with random weights.

Random weights solve next to nothing, so that nearly every attempt runs to the cap of 500 steps: the
worst case. Needs the extra `metaworld`.

wallwm bench metaworld_loop -- --window event
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np

from wallwm_jax import presets
from wallwm_jax.commands import metaworld_attempts
from wallwm_jax.config import ExperimentConfig
from wallwm_jax.envs.metaworld import VIEWS, select_tasks
from wallwm_jax.envs.metaworld.tasks import CAPTIONS
from wallwm_jax.inference.sources import CaptionTable
from wallwm_jax.models import functional
from wallwm_jax.text.factory import make_text_encoder
from wallwm_jax.types import Frozen, InferenceParams, NormStats


def model(window: str, latents: int, width: int, layers: int) -> ExperimentConfig:
  """Three 64x64 cameras, one latent of history in chunk windows, turns of 4 * latents steps."""
  config = presets.tabletop()
  sizes = config.model
  video = dataclasses.replace(
    sizes.video, width=width, layers=layers, heads=width // 32, ffn=3 * width, patch=(1, 4, 4)
  )
  action = dataclasses.replace(sizes.action, width=width, heads=width // 32, ffn=2 * width)
  sizes = dataclasses.replace(
    sizes, video=video, action=action, views=VIEWS, image_size=(64, 64), future=latents,
    max_future=max(latents, sizes.max_future),
  )  # fmt: skip
  data = dataclasses.replace(config.data, window=window, buckets=(latents,))
  return dataclasses.replace(config, model=sizes, data=data)


def random_policy(config: ExperimentConfig) -> InferenceParams:
  """Fresh weights with noise everywhere (fresh heads are zero), actions of centimetres."""
  fresh = functional.init_params(config.model, jax.random.key(0))
  rng = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda x: jnp.asarray(x + 0.02 * rng.standard_normal(x.shape), x.dtype), fresh
  )
  widths = (config.model.action_spec.dim,) * 2 + (config.model.codec.channels,)
  scales = (0.05, 1.0, 1.0)
  norm = NormStats(
    *(np.full(n, x, np.float32) for n, scale in zip(widths, scales) for x in (0, scale))
  )
  return InferenceParams(weights, Frozen(norm))


def cpu_seconds() -> float:
  """Of this process and of those that it waited for."""
  used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return sum(x.ru_utime + x.ru_stime for x in used)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--tasks', default='MT10')
  parser.add_argument('--seeds', type=int, default=10, help='episodes of each task')
  parser.add_argument('--window', choices=('event', 'chunk'), default='event')
  parser.add_argument('--latents', type=int, default=4, help='of a turn')
  parser.add_argument('--width', type=int, default=192)
  parser.add_argument('--layers', type=int, default=6)
  parser.add_argument('--processes', type=int, default=os.cpu_count())
  args = parser.parse_args()
  config = model(args.window, args.latents, args.width, args.layers)
  params = random_policy(config)
  text = make_text_encoder(config.model.text).encode(CAPTIONS)
  table = CaptionTable(text, np.full(len(CAPTIONS), args.latents, np.int32))
  names = select_tasks(args.tasks)
  wall, cpu = time.perf_counter(), cpu_seconds()
  done = metaworld_attempts.attempt(
    config, params, names, table, per_task=args.seeds, processes=args.processes
  )
  wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
  steps = int(sum(done.facts['steps']))
  harness.report(
    f'Meta-World: closed-loop evaluation, {args.tasks} x {args.seeds} episodes, random weights',
    's',
    len(done.kinds),
    value=wall,
    cpu_s=cpu,
    whole=args.tasks == 'MT10' and args.seeds == 10,
    parameters=sum(x.size for x in jax.tree.leaves(params.model)),
    window=args.window,
    turn_steps=args.latents * config.model.steps_per_latent,
    processes=args.processes,
    steps=steps,
    turns=int(done.rollouts.attempted.sum()),
    solved=int(done.rollouts.success.sum()),
    load=os.getloadavg(),
  )


if __name__ == '__main__':
  main()
