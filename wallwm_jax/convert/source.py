"""Public checkpoints as they lie on disk: safetensors files, their index and config.json.

Headers are read and checked here byte for byte, so that a damaged or truncated file is named before
anything is converted; tensors are views of the mapped file. Format: github.com/huggingface/
safetensors (8 bytes of header length, a JSON header, then the tensors without gaps).
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from wallwm_jax.types import CheckpointError

INDEX = '.safetensors.index.json'
PICKLES = ('.pth', '.pt', '.bin', '.ckpt', '.pkl')
WRAPPERS = ('model.', 'diffusion_model.', 'module.')  # prefixes of training and interface programs

# Weights are floating point; of the other types the size is known, to check headers.
FLOATS = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(jnp.bfloat16),
}
_OTHER_BITS = {
  'BOOL': 8, 'U8': 8, 'I8': 8, 'F8_E4M3': 8, 'F8_E5M2': 8, 'F8_E8M0': 8, 'U16': 16, 'I16': 16,
  'U32': 32, 'I32': 32, 'U64': 64, 'I64': 64, 'C64': 64, 'F4': 4, 'F6_E2M3': 6, 'F6_E3M2': 6,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a file: bytes [start, end) from the file's beginning; dtype by its name there."""

  key: str
  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  start: int
  end: int

  @property
  def nbytes(self) -> int:
    return self.end - self.start


@dataclasses.dataclass
class Source:
  """A checkpoint: its files, its tensors by key (without `prefix`), what is wrong with it.

  lost: keys that an index places in a file that is absent or unreadable. config: parsed config.json
  beside the tensors, or None.
  """

  root: pathlib.Path
  files: list[pathlib.Path]
  tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
  prefix: str = ''
  config: dict[str, Any] | None = None
  problems: list[str] = dataclasses.field(default_factory=list)
  lost: set[str] = dataclasses.field(default_factory=set)

  @property
  def folder(self) -> pathlib.Path:
    return self.root if self.root.is_dir() else self.root.parent

  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in self.tensors.items()}

  def restore(self, prefix: str) -> Source:
    """The source with `prefix`, which is part of the model's own keys, put back where it was taken
    for a wrapper's."""
    if not prefix or not self.prefix.endswith(prefix):
      return self
    if any(key.startswith(prefix) for key in [*self.tensors, *self.lost]):
      return self  # `model.model.`: one of the two was a wrapper's
    return dataclasses.replace(
      self,
      prefix=self.prefix.removesuffix(prefix),
      lost={prefix + key for key in self.lost},
      tensors={
        prefix + key: dataclasses.replace(tensor, key=prefix + key)
        for key, tensor in self.tensors.items()
      },
    )

  def in_file(self, file: pathlib.Path) -> list[Tensor]:
    """Tensors of one file by position."""
    return sorted((t for t in self.tensors.values() if t.file == file), key=lambda t: t.start)


class MappedFile:
  """A safetensors file mapped into memory; the tensors it hands out are read-only views of it."""

  def __init__(self, path: pathlib.Path):
    with path.open('rb') as file:
      self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

  def bytes(self, start: int, end: int) -> memoryview:
    return memoryview(self._map)[start:end]

  def array(self, tensor: Tensor) -> np.ndarray:
    dtype = FLOATS[tensor.dtype]
    count = math.prod(tensor.shape)
    return np.frombuffer(self._map, dtype, count, tensor.start).reshape(tensor.shape)

  def forget(self, start: int, end: int) -> None:
    """Lets go of the pages read: they count as memory of this process until then."""
    start = start // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
      self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def open_source(path: str | os.PathLike, subfolder: str = '') -> Source:
  """A checkpoint by the path of a safetensors file, of an index, or of a folder with either.

  Args:
    subfolder: of a pipeline folder, where the component lies if `path` itself has no safetensors.

  Returns:
    The source. Damaged files are in `problems`, which the caller adds to and reports together.

  Raises:
    CheckpointError: no such path, no safetensors there, or pickles only.
  """
  root = pathlib.Path(path)
  if not root.exists():
    raise CheckpointError(f'{root}: expected a safetensors file or a folder, found nothing.')
  if root.is_dir() and not _candidates(root) and _candidates(root / subfolder):
    root = root / subfolder
  if root.is_file() and root.suffix in PICKLES:
    raise CheckpointError(f'{root}: expected safetensors, got a pickle.\n{resave_hint(root)}')
  if root.is_file() and not root.name.endswith(('.safetensors', INDEX)):
    raise CheckpointError(f'{root}: expected a .safetensors file or its {INDEX[1:]}.')
  indices = sorted(root.glob(f'*{INDEX}')) if root.is_dir() else []
  if root.name.endswith(INDEX):
    indices = [root]
  if len(indices) > 1:
    names = ', '.join(index.name for index in indices)
    raise CheckpointError(f'{root}: expected one index, got {names}. Name one of them as --src.')
  source = _open_index(root, indices[0]) if indices else _open_files(root)
  _strip_wrappers(source)
  source.config = _read_config(source)
  return source


def pickles(folder: pathlib.Path) -> list[pathlib.Path]:
  """Files of the folder that only torch can read."""
  return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in PICKLES)


def resave_hint(path: pathlib.Path) -> str:
  """How to turn a pickle into a file this project reads."""
  target = path.with_suffix('.safetensors').name
  return (
    'Pickles can run code when loaded and need torch. Re-save it once, where torch is:\n'
    '  import torch, safetensors.torch\n'
    '  safetensors.torch.save_file({k: v.clone().contiguous() for k, v in torch.load('
    f"'{path.name}', map_location='cpu', weights_only=True).items()}}, '{target}')"
  )


def read_header(path: pathlib.Path) -> tuple[list[Tensor], list[str]]:
  """(tensors, what is wrong) of one safetensors file; no tensor where the header is unreadable."""
  size = path.stat().st_size
  with path.open('rb') as file:
    start = file.read(8)
    length = struct.unpack('<Q', start)[0] if len(start) == 8 else 0
    if len(start) < 8 or 8 + length > size:
      return [], [
        f'{path.name}: truncated or no safetensors: expected {8 + length} bytes for its header, '
        f'got a file of {size}.'
      ]
    raw = file.read(length)
  try:
    pairs = json.loads(raw, object_pairs_hook=list)
    tensors, problems = _parse_header(path, pairs, 8 + length)
  except (ValueError, TypeError, KeyError) as error:
    return [], [f'{path.name}: unreadable safetensors header ({error}).']
  end = max((t.end for t in tensors), default=8 + length)
  if end != size:
    what = 'truncated: ' if end > size else ''
    problems.append(f'{path.name}: {what}expected {end} bytes, got {size}.')
  return tensors, problems


def _parse_header(path, pairs, base: int) -> tuple[list[Tensor], list[str]]:
  tensors, problems, seen = [], [], set()
  for key, value in pairs:
    if key == '__metadata__':
      continue
    if key in seen:
      problems.append(f'{path.name}: the key {key!r} appears twice.')
    seen.add(key)
    fields = dict(value)
    shape = tuple(fields['shape'])
    start, end = fields['data_offsets']
    tensors.append(Tensor(key, path, fields['dtype'], shape, base + start, base + end))
  position = base
  for tensor in sorted(tensors, key=lambda t: (t.start, t.end)):
    bits = _bits(tensor.dtype)
    expected = math.prod(tensor.shape) * bits // 8
    if bits and tensor.nbytes != expected:
      problems.append(
        f'{path.name}: {tensor.key!r} {tensor.dtype} {tensor.shape}: expected {expected} bytes, '
        f'its offsets say {tensor.nbytes}.'
      )
    if tensor.start != position:
      problems.append(
        f'{path.name}: {tensor.key!r} was expected at byte {position}, its offset says '
        f'{tensor.start}.'
      )
    position = tensor.end
  return tensors, problems


def _bits(dtype: str) -> int:
  return 8 * FLOATS[dtype].itemsize if dtype in FLOATS else _OTHER_BITS.get(dtype, 0)


def _candidates(folder: pathlib.Path) -> list[pathlib.Path]:
  return [*folder.glob('*.safetensors'), *folder.glob(f'*{INDEX}')]


def _open_files(root: pathlib.Path) -> Source:
  files = [root] if root.is_file() else sorted(root.glob('*.safetensors'))
  if not files:
    found = pickles(root)
    hint = f' It holds pickles:\n{resave_hint(found[0])}' if found else ''
    raise CheckpointError(f'{root}: expected .safetensors files, found none.{hint}')
  source = Source(root, files)
  for file in files:
    _add_file(source, file)
  return source


def _open_index(root: pathlib.Path, index: pathlib.Path) -> Source:
  try:
    placed = json.loads(index.read_text())['weight_map']
    shards: dict[str, list[str]] = {}
    for key, name in placed.items():
      shards.setdefault(name, []).append(key)
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise CheckpointError(f'{index}: expected an index with a weight_map ({error}).') from error
  source = Source(root, [])
  for name in sorted(shards):
    file = index.parent / name
    if not file.is_file():
      keys = ', '.join(shards[name])
      source.problems.append(f'{name}: named by {index.name}, but absent; it should hold {keys}.')
      source.lost |= set(shards[name])
      continue
    source.files.append(file)
    _check_index(source, index.name, name, set(shards[name]), _add_file(source, file))
  return source


def _check_index(source: Source, index: str, name: str, placed: set[str], found: set[str] | None):
  """What the index says of one file against the file."""
  if found is None:
    source.lost |= placed
    return
  for key in sorted(placed - found):
    source.problems.append(f'{name}: expected {key!r}, as {index} says, found no such key.')
  source.lost |= placed - found
  for key in sorted(found - placed):
    source.problems.append(f'{name}: holds {key!r}, which {index} does not place there.')


def _add_file(source: Source, file: pathlib.Path) -> set[str] | None:
  """Adds its tensors; their keys, None where the header is unreadable."""
  tensors, problems = read_header(file)
  source.problems += problems
  for tensor in tensors:
    first = source.tensors.setdefault(tensor.key, tensor)
    if first.file != file:
      source.problems.append(
        f'{tensor.key}: expected in one file, found in {first.file.name} and {file.name}.'
      )
  return {t.key for t in tensors} if tensors or not problems else None


def _strip_wrappers(source: Source) -> None:
  """Removes prefixes that all keys share, such as `model.diffusion_model.`."""
  keys = [*source.tensors, *source.lost]
  prefix = ''
  while keys and (more := next((w for w in WRAPPERS if _all_start(keys, prefix + w)), None)):
    prefix += more
  n = len(prefix)
  source.prefix = prefix
  source.lost = {key[n:] for key in source.lost}
  source.tensors = {
    key[n:]: dataclasses.replace(tensor, key=key[n:]) for key, tensor in source.tensors.items()
  }


def _all_start(keys: list[str], prefix: str) -> bool:
  return all(key.startswith(prefix) for key in keys)


def _read_config(source: Source) -> dict[str, Any] | None:
  path = source.folder / 'config.json'
  if not path.is_file():
    return None
  try:
    config = json.loads(path.read_text())
    if not isinstance(config, Mapping):
      raise ValueError(f'expected an object, got {type(config).__name__}')
  except ValueError as error:
    source.problems.append(f'config.json: unreadable ({error}).')
    return None
  return config
