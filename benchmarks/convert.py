"""A public checkpoint of full size to a weight folder and back: time, memory, exactness.

wallwm bench convert --model wan-dit --dir /somewhere/with/40GB

Random weights are written shard by shard under the names of the public files, converted in a
process of its own while its memory is sampled, converted back, and compared byte for byte. Memory:
`peak_gb` is the kernel's high-water mark of everything resident, pages of mapped source files
included; `peak_anonymous_gb` leaves those out, which the kernel may drop at any time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import time

import harness
import ml_dtypes
import numpy as np

from wallwm_jax import presets
from wallwm_jax.convert import qwen
from wallwm_jax.convert.plan import FAMILIES
from wallwm_jax.convert.source import MappedFile, open_source
from wallwm_jax.convert.torch_config import torch_config

DTYPES = {'bf16': ('BF16', ml_dtypes.bfloat16), 'float32': ('F32', np.float32)}
_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Model:
  """A public model: fields as the family's `infer` returns them, further keys that are not used,
  and which keys are float32 whatever the rest is (a regular expression)."""

  family: str
  fields: dict
  naming: str = 'original'
  unused: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  float32: str = ''


def qwen_model(name: str) -> Model:
  config = presets.QWEN[name]
  d = config.width
  one = dataclasses.replace(config, layer_types=('full',))
  layer = re.compile(r'model\.language_model\.(layers\.0\..*)')
  keys = {m[1]: e.shape for e in qwen.entries(one) if (m := layer.fullmatch(e.diffusers))}
  norms = ('norm', 'pre_fc_norm_embedding', 'pre_fc_norm_hidden')
  keys |= {'fc.weight': (d, 2 * d)} | {f'{norm}.weight': (d,) for norm in norms}
  return Model(
    family='qwen',
    fields={'config': dataclasses.asdict(config)},
    naming='diffusers',
    unused={f'mtp.{key}': shape for key, shape in keys.items()},
    float32=r'.*\.linear_attn\.(A_log|norm\.weight)',
  )


# Wan2.2-TI2V-5B's three components, and two sizes of Qwen3.5 with their multi-token heads.
MODELS = {
  'wan-dit': Model(
    'wan-dit',
    {
      'config': dataclasses.asdict(presets.VIDEO_TOWERS['wan2_2_5b']),
      'channels': 48,
      'text_width': 4096,
    },
  ),
  'wan-vae': Model('wan-vae', {'config': dataclasses.asdict(presets.CODECS['wan2_2'])}),
  'umt5': Model('umt5', {'config': dataclasses.asdict(presets.UMT5_XXL)}),
  'qwen-0.8b': qwen_model('qwen3_5_0_8b'),
  'qwen-9b': qwen_model('qwen3_5_9b'),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--dir', help='folder for the files, removed afterwards (a temporary one)')
  parser.add_argument('--model', choices=MODELS, default='wan-dit')
  parser.add_argument('--dtype', choices=DTYPES, default='bf16')
  parser.add_argument('--mesh', default='', help='as `wallwm convert --mesh`')
  parser.add_argument('--shard-gb', type=float, default=5.0)
  args = parser.parse_args()
  if args.dir:
    pathlib.Path(args.dir).mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=args.dir) as folder:
    figures = measure(pathlib.Path(folder), args)
  what = f'{args.model} ({args.dtype}) to a weight folder and back'
  harness.report(what, 's', 1, **figures)


def measure(folder: pathlib.Path, args) -> dict:
  src, out, back = (folder / name for name in ('source', 'weights', 'back'))
  model = MODELS[args.model]
  size = write_source(src, model, args)
  mesh = ['--mesh', args.mesh] if args.mesh else []
  there = run(model.family, ['--src', src, '--out', out, *mesh])
  back_again = ['--src', out, '--out', back, '--to', 'torch', '--shard-gb', args.shard_gb]
  again = run(model.family, back_again)
  different = compare(src, back, model)
  return {
    'value': there['seconds'],
    'to_weights': there,
    'to_torch': again,
    'source_gb': size / _GB,
    'weights_gb': folder_size(out) / _GB,
    'files_of_weights': sum(p.is_file() for p in out.rglob('*')),
    'tensors_that_differ': different,
  }


def write_source(folder: pathlib.Path, model: Model, args) -> int:
  """Writes the random checkpoint, one tensor in memory at a time; returns its bytes."""
  folder.mkdir()
  family = FAMILIES[model.family]
  tensors = {entry.key(model.naming): entry.shape for entry in family.module.model(model.fields)}
  shards: list[list] = [[]]
  held = 0
  for key, shape in (tensors | model.unused).items():
    name, dtype = DTYPES['float32' if re.fullmatch(model.float32, key) else args.dtype]
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if shards[-1] and held + size > args.shard_gb * _GB:
      shards.append([])
      held = 0
    shards[-1].append((key, shape, name, dtype, size))
    held += size
  rng = np.random.default_rng(0)
  for i, shard in enumerate(shards):
    path = folder / f'diffusion_pytorch_model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    header, position = {}, 0
    for key, shape, name, _, size in shard:
      offsets = [position, position + size]
      header[key] = {'dtype': name, 'shape': shape, 'data_offsets': offsets}
      position += size
    raw = json.dumps(header).encode()
    with path.open('wb') as file:
      file.write(struct.pack('<Q', len(raw)) + raw)
      for _, shape, _, dtype, _ in shard:
        x = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        file.write(x.astype(dtype).view(np.uint8).data)
  (folder / 'config.json').write_text(
    json.dumps(torch_config(family.component, model.fields, model.naming))
  )
  if family.tokenizer:  # copied, not read
    (folder / 'tokenizer.json').write_text('{"version": "1.0", "model": {"type": "Unigram"}}')
  return folder_size(folder)


def run(family: str, arguments) -> dict[str, float]:
  """Seconds and peak memory of one `wallwm convert`."""
  command = [sys.executable, '-m', 'wallwm_jax.cli', 'convert', family, *map(str, arguments)]
  start = time.perf_counter()
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  anonymous = peak = 0
  while process.poll() is None:
    status = memory(process.pid)
    anonymous = max(anonymous, status.get('RssAnon', 0))
    peak = max(peak, status.get('VmHWM', 0))
    time.sleep(0.01)
  seconds = time.perf_counter() - start
  if process.returncode:
    raise SystemExit(f'{" ".join(command)} failed with {process.returncode}.')
  return {'seconds': seconds, 'peak_gb': peak / _GB, 'peak_anonymous_gb': anonymous / _GB}


def memory(pid: int) -> dict[str, int]:
  """Bytes of the memory lines of /proc/PID/status."""
  try:
    lines = pathlib.Path(f'/proc/{pid}/status').read_text().splitlines()
  except OSError:
    return {}
  pairs = (line.split(':', 1) for line in lines if line.endswith(' kB'))
  return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def compare(a: pathlib.Path, b: pathlib.Path, model: Model) -> int:
  """Number of tensors that are absent from one side (the unused ones may be from the second) or
  differ in dtype, shape or a byte."""
  first, second = (open_source(path).restore(FAMILIES[model.family].prefix) for path in (a, b))
  different = len((first.tensors.keys() - model.unused) ^ second.tensors.keys())
  files = {file: MappedFile(file) for file in (*first.files, *second.files)}
  for key in first.tensors.keys() & second.tensors.keys():
    x, y = first.tensors[key], second.tensors[key]
    views = [files[t.file].bytes(t.start, t.end) for t in (x, y)]
    same = np.array_equal(*(np.frombuffer(view, np.uint8) for view in views))
    different += not (same and (x.dtype, x.shape) == (y.dtype, y.shape))
    for t in (x, y):
      files[t.file].forget(t.start, t.end)
  return different


def folder_size(folder: pathlib.Path) -> int:
  return sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())


if __name__ == '__main__':
  main()
