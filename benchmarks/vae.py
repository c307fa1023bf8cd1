"""Wan's video VAE: what streaming saves in memory, and its encoder beside diffusers'.

`python benchmarks/vae.py memory` and `python benchmarks/vae.py speed --torch-python PYTHON`, the
latter an interpreter with torch and diffusers (extra `torch-parity`). One JSON line per claim.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx
from harness import ratio, report

from wallwm_jax.config import CodecConfig, VAEConfig
from wallwm_jax.models.vae import WanVAE
from wallwm_jax.presets import CODECS

ONE_SHOT = 10_000  # latent frames per piece: more than any clip here

# diffusers' encoder: one run per line read, seconds written back.
TORCH = """
import json, sys, time
import torch
from diffusers import AutoencoderKLWan
config, shape, dtypes = json.loads(sys.argv[1])
torch.set_num_threads(2)
torch.manual_seed(0)
models = {d: AutoencoderKLWan(**config).eval().to(getattr(torch, d)) for d in dtypes}
print(json.dumps({'torch': torch.__version__}), flush=True)
for line in sys.stdin:
  dtype = line.strip()
  x = torch.rand(shape).to(getattr(torch, dtype)) * 2 - 1
  start = time.perf_counter()
  with torch.no_grad():
    models[dtype].encode(x)
  print(time.perf_counter() - start, flush=True)
"""


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('what', choices=('memory', 'speed', 'rss'))
  parser.add_argument('--torch-python', help='interpreter with torch and diffusers')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--chunk', type=int, default=1, help='of `rss`, which `memory` starts')
  parser.add_argument('--out', help='file for the JSON line')
  args = parser.parse_args()
  if args.what == 'rss':
    print(json.dumps(peak_rss(args.chunk)))
  elif args.what == 'memory':
    memory(args.out)
  else:
    if not args.torch_python:
      parser.error('speed needs --torch-python')
    speed(args.torch_python, args.rounds, args.out)


def memory(out: str | None, frames: int = 65, size: tuple[int, int] = (192, 224)) -> None:
  """Temporary memory of the compiled encoders of the public sizes; peak RSS of a small one."""
  compiled = {}
  for name in ('wan2_1', 'wan2_2'):
    for kind, chunk in (('streaming', 1), ('one_shot', ONE_SHOT)):
      compiled[f'{name}_{kind}'] = temporary_bytes(_pieces(CODECS[name], chunk), frames, size)
  measured = {}
  for kind, chunk in (('streaming', 1), ('one_shot', ONE_SHOT)):
    command = [sys.executable, __file__, 'rss', '--chunk', str(chunk)]
    measured[kind] = json.loads(subprocess.check_output(command))
  report(
    'Memory of encoding a clip, piece by piece over all at once',
    'ratio of bytes', 1, path=out,
    value=max(compiled[f'{n}_streaming'] / compiled[f'{n}_one_shot'] for n in ('wan2_1', 'wan2_2')),
    frames=frames, size=size, compiled_temporary_bytes=compiled, small_model_rss_bytes=measured,
    small_model_rss_ratio=measured['streaming'] / measured['one_shot'],
  )  # fmt: skip


def temporary_bytes(config: CodecConfig, frames: int, size: tuple[int, int]) -> int:
  graph, state = nnx.split(nnx.eval_shape(lambda: WanVAE(config, nnx.Rngs(0))))
  x = jax.ShapeDtypeStruct((1, frames, *size, 3), jnp.float32)
  encode = jax.jit(lambda state, x: nnx.merge(graph, state).encode(x))
  return encode.lower(state, x).compile().memory_analysis().temp_size_in_bytes


def peak_rss(chunk: int) -> int:
  """Growth of this process's peak over encoding 65 frames of 96 x 128 with a small model."""
  model, encode = small(_pieces(small_config(), chunk))
  x = jnp.zeros((1, 65, 96, 128, 3))
  compiled = encode.lower(model, x).compile()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  jax.block_until_ready(compiled(model, x))
  return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def speed(torch_python: str, rounds: int, out: str | None) -> None:
  """Encoding 9 frames of 96 x 128 with a scaled-down Wan2.1 VAE, alternating with diffusers."""
  config, shape = small_config(), (1, 9, 96, 128, 3)
  vae = config.vae
  torch_config = {'base_dim': vae.base, 'z_dim': config.channels, 'dim_mult': vae.dim_mult}
  calls = {}
  for dtype in ('float32', 'bfloat16'):
    for kind, chunk in (('streaming', 1), ('one_shot', ONE_SHOT)):
      model, encode = small(_pieces(config, chunk, dtype))
      x = jnp.zeros(shape)
      calls[f'{kind}_{dtype}'] = lambda encode=encode, model=model, x=x: jax.block_until_ready(
        encode(model, x)
      )
  with torch_worker(torch_python, torch_config, shape) as (version, run):
    times = {name: [] for name in (*calls, 'torch_float32', 'torch_bfloat16')}
    for i in range(-2, rounds):  # two rounds of warmup
      for name in times:
        if name in calls:
          start = time.perf_counter()
          calls[name]()
          seconds = time.perf_counter() - start
        else:
          seconds = run(name.removeprefix('torch_'))
        if i >= 0:
          times[name].append(seconds)
  ratios = {
    name: ratio(times, name, f'torch_{name.rsplit("_", 1)[1]}') for name in calls
  }
  report(
    "Encoding with a scaled-down VAE, over diffusers' on the same two cores",
    'ratio of seconds', rounds, path=out, value=ratios['streaming_float32']['value'],
    ratios=ratios, median_s={k: statistics.median(v) for k, v in times.items()},
    clip=shape, base=vae.base, torch=version,
  )  # fmt: skip


@contextlib.contextmanager
def torch_worker(python: str, config: dict, shape: tuple[int, ...]):
  """(torch version, call that encodes once in a dtype and returns its seconds)."""
  b, t, h, w, c = shape
  argument = json.dumps([config, (b, c, t, h, w), ['float32', 'bfloat16']])
  with subprocess.Popen(
    [python, '-c', TORCH, argument], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as process:

    def run(dtype: str) -> float:
      process.stdin.write(f'{dtype}\n')
      process.stdin.flush()
      return float(process.stdout.readline())

    yield json.loads(process.stdout.readline())['torch'], run
    process.stdin.close()


def small_config() -> CodecConfig:
  vae = VAEConfig(base=32, decoder_base=32, residual=False, patch=1)
  return CodecConfig(kind='wan', spatial=8, channels=16, vae=vae)


def small(config: CodecConfig):
  """(parameters, jitted encode(parameters, frames))."""
  graph, state = nnx.split(WanVAE(config, nnx.Rngs(0)))
  return state, jax.jit(lambda state, x: nnx.merge(graph, state).encode(x))


def _pieces(config: CodecConfig, chunk: int, dtype: str = 'float32') -> CodecConfig:
  return dataclasses.replace(
    config, vae=dataclasses.replace(config.vae, chunk=chunk, dtype=dtype)
  )


if __name__ == '__main__':
  main()
