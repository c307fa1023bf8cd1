"""Forward time of a scaled-down UMT5 encoder against transformers' on the same weights, float32.

wallwm bench umt5 -- --torch-python /path/to/python  (one with torch, transformers, safetensors)
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

import harness
import jax
import numpy as np
from safetensors.numpy import load_file

from wallwm_jax.config import TextConfig, UMT5Config
from wallwm_jax.convert import entries as conversion
from wallwm_jax.convert import umt5 as convert
from wallwm_jax.models import functional

CONFIG = TextConfig(
  kind='umt5',
  tokens=512,
  width=512,
  umt5=UMT5Config(vocab=1000, layers=6, heads=8, head_dim=64, ffn=1024, dtype='float32'),
)

# Writes its random weights, then runs one forward per line it reads: '<tokens>' or 'save <tokens>'.
_TORCH = """
import sys, numpy as np, torch, transformers
from safetensors.torch import save_file
folder, threads, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
torch.set_num_threads(threads)
model = transformers.UMT5EncoderModel(transformers.UMT5Config(
    vocab_size=1000, d_model=512, d_kv=64, d_ff=1024, num_layers=6, num_heads=8,
    relative_attention_num_buckets=32, relative_attention_max_distance=128)).eval()
state = {k: v for k, v in model.state_dict().items() if 'embed_tokens' not in k}
save_file(state, f'{folder}/weights.safetensors')
print(torch.__version__, transformers.__version__, flush=True)
for line in sys.stdin:
  *save, tokens = line.split()
  ids = torch.arange(batch * int(tokens)).reshape(batch, -1) % 1000
  mask = torch.arange(int(tokens)) < int(tokens) - torch.arange(batch)[:, None]
  with torch.inference_mode():
    out = model(ids, mask.long()).last_hidden_state
  if save:
    np.save(f'{folder}/out.npy', (out * mask[..., None]).numpy())
  print('done', flush=True)
"""


class Torch:
  """transformers' encoder in a process of its own, one forward per call."""

  def __init__(self, python: str, folder: str, threads: int, batch: int):
    self._process = subprocess.Popen(
      [python, '-c', _TORCH, folder, str(threads), str(batch)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {'HF_HUB_OFFLINE': '1'},
    )
    self.versions = self._read()

  def _read(self) -> str:
    line = self._process.stdout.readline()
    if not line:
      sys.exit(f'{self._process.args[0]} ended with {self._process.wait()}; its message is above.')
    return line.strip()

  def __call__(self, request: str) -> None:
    self._process.stdin.write(f'{request}\n')
    self._process.stdin.flush()
    self._read()

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--torch-python', required=True)
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--lengths', type=int, nargs='+', default=[64, 128, 256, 512])
  parser.add_argument('--out', help='also write the JSON line to this file')
  args = parser.parse_args()
  threads = len(os.sched_getaffinity(0))
  with tempfile.TemporaryDirectory() as folder:
    torch = Torch(args.torch_python, folder, threads, args.batch)
    try:
      state = load_file(pathlib.Path(folder) / 'weights.safetensors')
      params = jax.device_put(conversion.assemble(convert.entries(CONFIG), state))
      rows = [_measure(torch, params, folder, args, tokens) for tokens in args.lengths]
    finally:
      torch.close()
  harness.report(
    'UMT5 encoder (width 512, 6 layers, float32), forward time against transformers',
    'ours / theirs',
    args.rounds,
    path=args.out,
    value=rows[-1]['ratio']['value'],
    batch=args.batch,
    threads=threads,
    lengths=rows,
    torch_transformers=torch.versions,
  )


def _measure(torch: Torch, params, folder: str, args, tokens: int) -> dict:
  ids = np.arange(args.batch * tokens, dtype=np.int32).reshape(args.batch, -1) % 1000
  mask = np.arange(tokens) < tokens - np.arange(args.batch)[:, None]
  encode = jax.jit(lambda params, ids, mask: functional.encode_tokens(params, CONFIG, ids, mask))
  inputs = jax.device_put((ids, mask))
  torch(f'save {tokens}')
  want = np.load(pathlib.Path(folder) / 'out.npy')
  error = np.abs(np.asarray(encode(params, *inputs)) * mask[..., None] - want).max()
  times = harness.time_side_by_side(
    {'ours': lambda: encode(params, *inputs), 'theirs': lambda: torch(str(tokens))},
    rounds=args.rounds,
  )
  return {
    'tokens': tokens,
    'ratio': harness.ratio(times, 'ours', 'theirs'),
    'median_ms': {name: 1e3 * float(np.median(seconds)) for name, seconds in times.items()},
    'max_abs_difference': float(error),
  }


if __name__ == '__main__':
  main()
