"""The video DiT against diffusers' WanTransformer3DModel in eager PyTorch, on one CPU.

`python benchmarks/dit_speed.py --torch-python PYTHON`: PYTHON is an interpreter of its own that has
torch and diffusers (extra `torch-parity`). It runs in a child process; the two take turns, one pass
each, so that whatever else the machine does meets both. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import signal
import statistics
import subprocess
import sys
import time

WIDTH, HEADS, FFN, LAYERS = 768, 12, 3072, 8
CHANNELS, WORDS, TEXT_WIDTH, FREQUENCIES = 16, 512, 4096, 256
GRIDS = {1024: (4, 16, 16), 4096: (4, 32, 32)}  # tokens: (frames, rows, columns)
PASSES = ('forward', 'train')  # train: forward and backward to every parameter
DTYPES = ('float32', 'bfloat16')


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--torch-python', help='interpreter that has torch and diffusers')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--tokens', type=int, nargs='+', choices=GRIDS, default=list(GRIDS))
  parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=list(DTYPES))
  parser.add_argument('--passes', nargs='+', choices=PASSES, default=list(PASSES))
  parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
  parser.add_argument('--out', help='also write the JSON line to this file')
  args = parser.parse_args()
  if args.serve:
    return serve_torch()
  if not args.torch_python:
    parser.error('--torch-python: expected an interpreter that has torch and diffusers')
  # One device with every core, as torch has.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  torch_call = start_torch(args.torch_python)
  cases = {}
  for dtype in args.dtypes:
    for tokens in args.tokens:
      for which in args.passes:
        cases[f'{dtype}/{tokens}/{which}'] = compare(torch_call, dtype, tokens, which, args.rounds)
  from harness import report

  report(
    'seconds of a video DiT pass, ours and eager PyTorch side by side', 's', args.rounds,
    path=args.out, model=dict(width=WIDTH, layers=LAYERS, heads=HEADS, ffn=FFN, words=WORDS),
    cores=os.cpu_count(), torch=torch_call('version'), cases=cases,
  )  # fmt: skip


def compare(torch_call, dtype, tokens, which, rounds) -> dict:
  """Alternating runs after two of each to warm up."""
  ours = jax_pass(dtype, tokens, which)
  name = f'{dtype} {tokens} {which}'
  for _ in range(2):
    ours()
    torch_call(name)
  seconds = {'ours': [], 'torch': []}
  for _ in range(rounds):
    seconds['torch'].append(torch_call(name))
    start = time.perf_counter()
    ours()
    seconds['ours'].append(time.perf_counter() - start)
  flops = model_flops(tokens) * (3 if which == 'train' else 1)
  result = {side: summary(runs, flops) for side, runs in seconds.items()}
  ratios = [a / b for a, b in zip(seconds['ours'], seconds['torch'])]
  result['ratio'] = statistics.median(ratios)
  result['ratio_range'] = [min(ratios), max(ratios)]
  result['ratio_of_fastest'] = min(seconds['ours']) / min(seconds['torch'])
  print(f'{name}: ours / torch = {result["ratio"]:.2f}', file=sys.stderr)
  return result


def summary(runs: list[float], flops: float) -> dict:
  median = statistics.median(runs)
  return {
    'median_s': median,
    'min_s': min(runs),
    'max_s': max(runs),
    'model_gflop_per_s': flops / median / 1e9,
  }


def model_flops(tokens: int) -> float:
  """Of one forward pass: matrix products only, two operations per multiplication."""
  own = tokens * (6 * WIDTH**2 + 2 * WIDTH * FFN)  # q, k, v, o; q and o of cross-attention; FFN
  text = 2 * WORDS * WIDTH**2
  attention = 2 * tokens * WIDTH * (tokens + WORDS)
  ends = WORDS * (TEXT_WIDTH + WIDTH) * WIDTH + tokens * 2 * 4 * CHANNELS * WIDTH
  return 2.0 * (LAYERS * (own + text + attention) + ends)


def jax_pass(dtype: str, tokens: int, which: str):
  """A compiled pass on fixed random inputs, as a call without arguments that waits for its end."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from wallwm_jax import config as cfg
  from wallwm_jax.models import functional as F
  from wallwm_jax.types import Text

  frames, rows, columns = GRIDS[tokens]
  config = cfg.ModelConfig(
    video=cfg.VideoConfig(
      width=WIDTH, layers=LAYERS, heads=HEADS, ffn=FFN, freq_dim=FREQUENCIES, cross_view=False
    ),
    codec=cfg.CodecConfig(channels=CHANNELS),
    text=cfg.TextConfig(tokens=WORDS, width=TEXT_WIDTH),
    views=('front',),
    image_size=(16 * rows, 16 * columns),
    dtype=dtype,
  )
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: F.init_params(config, jax.random.key(0)))['video']
  # Random everywhere and stored in the dtype of the pass, as on the other side.
  params = jax.tree.map(
    lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape, np.float32), dtype), shapes
  )
  z = rng.standard_normal((1, 1, frames, 2 * rows, 2 * columns, CHANNELS), np.float32)
  text = Text(rng.standard_normal((1, WORDS, TEXT_WIDTH), np.float32), np.ones((1, WORDS), bool))
  masks = F.video_masks(np.ones((1, 1), bool), np.ones((1, frames), bool))
  inputs = jax.device_put((z, np.full((1, frames), 0.5, np.float32), text, masks))

  def forward(params, z, t, text, masks):
    return F.video_forward(params, config, z, t, text, masks)[0]

  def loss(params, *inputs):
    return jnp.mean(jnp.square(forward(params, *inputs)))

  call = jax.jit(forward if which == 'forward' else jax.value_and_grad(loss))
  return lambda: jax.block_until_ready(call(params, *inputs))


def start_torch(python: str):
  """call(request) -> answer of the child process; a request is 'version' or 'dtype tokens pass'."""
  child = subprocess.Popen(
    [python, __file__, '--serve'],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {'HF_HUB_OFFLINE': '1'},
  )

  atexit.register(child.kill)  # a stopped process would stay

  def call(request: str):
    child.send_signal(signal.SIGCONT)
    child.stdin.write(request + '\n')
    child.stdin.flush()
    answer = child.stdout.readline()
    child.send_signal(signal.SIGSTOP)  # threads of torch spin for a while before they sleep
    if not answer:
      raise RuntimeError(f'{python} ended with status {child.wait()}; its error is above.')
    return json.loads(answer)

  return call


def serve_torch():
  """Answers every line of stdin with one line of JSON: the seconds of that pass."""
  import torch
  from diffusers import WanTransformer3DModel
  from diffusers.utils import logging

  logging.set_verbosity_error()
  torch.set_num_threads(os.cpu_count())
  torch.manual_seed(0)
  model = WanTransformer3DModel(
    num_attention_heads=HEADS,
    attention_head_dim=WIDTH // HEADS,
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    text_dim=TEXT_WIDTH,
    freq_dim=FREQUENCIES,
    ffn_dim=FFN,
    num_layers=LAYERS,
  )
  for line in sys.stdin:
    if line.strip() == 'version':
      answer = torch.__version__
    else:
      dtype, tokens, which = line.split()
      answer = torch_pass(torch, model, getattr(torch, dtype), int(tokens), which)
    print(json.dumps(answer), flush=True)


def torch_pass(torch, model, dtype, tokens: int, which: str) -> float:
  frames, rows, columns = GRIDS[tokens]
  model.to(dtype)
  z = torch.randn(1, CHANNELS, frames, 2 * rows, 2 * columns, dtype=dtype)
  text = torch.randn(1, WORDS, TEXT_WIDTH, dtype=dtype)
  t = torch.tensor([500.0])
  model.zero_grad(set_to_none=True)
  start = time.perf_counter()
  with torch.set_grad_enabled(which == 'train'):
    out = model(z, t, text).sample
    if which == 'train':
      out.square().mean().backward()
  return time.perf_counter() - start


if __name__ == '__main__':
  main()
