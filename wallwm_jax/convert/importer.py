"""From a public checkpoint to a weight folder, one tensor at a time."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from wallwm_jax import weights
from wallwm_jax.convert.plan import Plan
from wallwm_jax.convert.source import MappedFile, Source, Tensor

TOKENIZER = 'tokenizer.json'
_TOKENIZER_CONFIG = 'tokenizer_config.json'
_TOKENIZER_FOLDERS = ('.', '../tokenizer', 'tokenizer', 'google/umt5-xxl', '../google/umt5-xxl')
_STEP = 64  # columns moved at once: a cache line of each row, which is four times as fast as all

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def find_tokenizer(source: Source, given: str | None) -> tuple[pathlib.Path | None, list[str]]:
  """(tokenizer.json, problems): the given one, or where the public repositories keep it."""
  if given:
    path = pathlib.Path(given)
    candidates = [path / TOKENIZER if path.is_dir() else path]
  else:
    candidates = [source.folder / folder / TOKENIZER for folder in _TOKENIZER_FOLDERS]
  path = next((p for p in candidates if p.is_file()), None)
  if path is None:
    return None, [
      f'{TOKENIZER}: expected {candidates[0]}, found none. Pass --tokenizer FILE; the public Wan '
      f'repositories hold it as google/umt5-xxl/{TOKENIZER} (original) and tokenizer/{TOKENIZER} '
      '(diffusers), those of Qwen beside the weights.'
    ]
  try:
    if 'model' in json.loads(path.read_text()):
      return path, []
    reason = 'no "model" in it'
  except (ValueError, TypeError) as error:
    reason = str(error)
  return None, [f'{path}: expected the tokenizer of a Hugging Face repository, got {reason}.']


def import_weights(
  plan: Plan,
  out: str | os.PathLike,
  mesh: Mapping[str, int],
  tokenizer: pathlib.Path | None = None,
  progress: Progress = lambda done, total: None,
) -> weights.Manifest:
  """Writes the weight folder of a plan.

  In memory are one block of 64 MB per stage and the pages of the tensor at hand.

  Args:
    out: new folder. mesh: axis sizes whose shards the stored chunks follow, {} = none.
    tokenizer: copied into the folder.

  Raises:
    CheckpointError: `out` exists, or storage failed; then nothing is left of it.
    ConfigError: a parameter that the mesh does not divide.
  """
  weights.check_new(out)
  leaves = plan.leaves(mesh)
  stream = _Stream(plan, leaves, progress)
  with weights.new_folder(out) as folder:
    weights.write(folder / weights.PARAMS, leaves.values(), stream.parts())
    files = stream.files | weights.copy_files(folder, _tokenizer_files(tokenizer))
    manifest = weights.Manifest(
      component=plan.family.component,
      family=plan.family.name,
      naming=plan.naming,
      fields=plan.fields,
      leaves=_leaf_table(plan, leaves, stream.keys),
      keys=stream.keys,
      files=files,
      source_config=plan.source.config,
      prefix=plan.source.prefix,
      mesh=dict(mesh),
    )
    weights.write_manifest(folder, manifest)
  return manifest


def contiguous(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """`x` in C order as `dtype`, fast for transposed views."""
  if x.flags.c_contiguous or x.ndim < 2 or x.strides[-1] == x.itemsize:
    return np.asarray(x, dtype, order='C')
  out = np.empty(x.shape, dtype)
  for i in range(0, x.shape[-1], _STEP):
    out[..., i : i + _STEP] = x[..., i : i + _STEP]
  return out


class _Stream:
  """The parameters of a plan in the order of the source's files, and their checksums on the way."""

  def __init__(self, plan: Plan, leaves: Mapping[str, weights.Leaf], progress: Progress):
    self._plan, self._leaves, self._progress = plan, leaves, progress
    self._total = sum(file.stat().st_size for file in plan.source.files)
    self._done = 0
    self.keys: dict[str, dict] = {}
    self.files: dict[str, dict] = {}

  def parts(self) -> Iterator[weights.Part]:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      for file in self._plan.source.files:
        yield from self._file(file, pool)

  def _file(self, file: pathlib.Path, pool) -> Iterator[weights.Part]:
    mapped, whole = MappedFile(file), hashlib.sha256()
    tensors = self._plan.source.in_file(file)
    size = file.stat().st_size
    whole.update(mapped.bytes(0, tensors[0].start if tensors else size))
    for tensor in tensors:
      data = mapped.bytes(tensor.start, tensor.end)
      hashed = pool.submit(_hash, data, whole)
      if tensor.key in self._plan.used:
        yield from self._tensor(mapped, tensor)
      self.keys[tensor.key] = self._row(tensor) | {'sha256': hashed.result()}
      mapped.forget(tensor.start, tensor.end)
      self._done += tensor.nbytes
      self._progress(self._done, self._total)
    self.files[file.name] = {'size': size, 'sha256': whole.hexdigest()}

  def _tensor(self, mapped: MappedFile, tensor: Tensor) -> Iterator[weights.Part]:
    entry = self._plan.used[tensor.key]
    leaf = self._leaves[entry.path]
    x = entry.to_jax(mapped.array(tensor))
    for path, box, part in weights.parts_of(leaf, x, entry.layer):
      yield path, box, contiguous(part, leaf.dtype)

  def _row(self, tensor: Tensor) -> dict:
    """The manifest's words on one source tensor."""
    plan, key = self._plan, tensor.key
    row = {'status': plan.statuses.get(key, 'used'), 'file': tensor.file.name}
    row |= {'dtype': tensor.dtype, 'shape': list(tensor.shape)}
    if key in plan.used:
      entry = plan.used[key]
      row |= {'path': entry.path, 'layer': entry.layer}
      if entry.layout != 'same':
        row['reshaped'] = list(entry.jax_shape())
    elif row['status'] == 'alias':
      row['of'] = plan.alias_of(key)
    return row


def _hash(data: memoryview, whole) -> str:
  whole.update(data)
  return hashlib.sha256(data).hexdigest()


def _leaf_table(plan: Plan, leaves: Mapping[str, weights.Leaf], keys: Mapping[str, dict]) -> dict:
  """Manifest.leaves."""
  rows: dict[str, list[tuple[int, str]]] = {}
  for key, entry in plan.used.items():
    rows.setdefault(entry.path, []).append((entry.layer or 0, keys[key]['sha256']))
  return {
    path: {
      'shape': list(leaf.shape),
      'dtype': leaf.dtype.name,
      'sha256': hashlib.sha256(''.join(d for _, d in sorted(rows[path])).encode()).hexdigest(),
    }
    for path, leaf in leaves.items()
  }


def _tokenizer_files(tokenizer: pathlib.Path | None) -> dict[str, pathlib.Path]:
  """{name in the weight folder: file}."""
  if tokenizer is None:
    return {}
  config = tokenizer.with_name(_TOKENIZER_CONFIG)
  return {TOKENIZER: tokenizer} | ({_TOKENIZER_CONFIG: config} if config.is_file() else {})
