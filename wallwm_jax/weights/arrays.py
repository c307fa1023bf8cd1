"""Parameters as an Orbax PyTree checkpoint, written and read in blocks.

Orbax itself saves trees of whole arrays. Here each leaf is a placeholder whose type handler creates
the zarr3 array that Orbax expects of an `np.ndarray` and then takes the values block by block from
one stream, in the order in which the source yields them. The result is an ordinary checkpoint.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.sharding import SingleDeviceSharding

from wallwm_jax.types import CheckpointError, Params, nest, path_string
from wallwm_jax.weights.chunks import Box, Grid, boxes
from wallwm_jax.weights.manifest import PARAMS, read_manifest

_PENDING_BYTES = 64 * 2**20  # handed to storage and not yet written
_RESTORE_GB = 8  # read at once; Orbax refuses a leaf that is larger than this, see `_concurrent_gb`

Part = tuple[str, Box, np.ndarray]  # path, where in the leaf, values


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A parameter to be written; its values come later."""

  path: str
  shape: tuple[int, ...]
  dtype: np.dtype
  grid: Grid

  @property
  def size(self) -> int:
    return int(np.prod(self.shape))

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize


def write(path: str | os.PathLike, leaves: Iterable[Leaf], parts: Iterable[Part]) -> None:
  """Writes the checkpoint of `leaves` with the values of `parts`, which must cover them.

  Args:
    path: new folder.
    parts: boxes of whole blocks of the leaf's grid; consumed once, in their order. What it raises
      is passed on.

  Raises:
    CheckpointError: the values do not cover a leaf, or storage failed (a full disk, say).
  """
  leaves = list(leaves)
  handler = _StreamHandler(parts)
  registry = ocp.type_handlers.create_type_handler_registry((Leaf, handler))
  writer = ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, type_handler_registry=registry)
  )
  tree = nest({leaf.path: leaf for leaf in leaves})
  try:
    with writer:
      writer.save(pathlib.Path(path).absolute(), args=ocp.args.PyTreeSave(tree))
  except Exception as error:
    if handler.failure is not None:
      raise handler.failure from None
    raise CheckpointError(
      f'{path} could not be written: {error}. Free some space and convert again.'
    ) from error
  short = [f'{leaf.path}: expected {leaf.size} values, got {handler.written[leaf.path]}'
           for leaf in leaves if handler.written[leaf.path] != leaf.size]  # fmt: skip
  if short:
    raise CheckpointError('Parameters not covered by the stream:\n  ' + '\n  '.join(short))


class _StreamHandler(ocp.type_handlers.TypeHandler):
  """Stores `Leaf`s as the arrays Orbax writes for `np.ndarray`s."""

  def __init__(self, parts: Iterable[Part]):
    self._parts = iter(parts)
    self.failure: Exception | None = None  # of the source, as opposed to storage
    self.written: dict[str, int] = collections.defaultdict(int)

  def typestr(self) -> str:
    return 'np.ndarray'

  async def metadata(self, infos):
    raise NotImplementedError('written here, read by the handler of np.ndarray')

  async def deserialize(self, infos, args=None):
    raise NotImplementedError('written here, read by the handler of np.ndarray')

  async def serialize(self, values, infos, args=None):
    stores = {}
    for leaf, info in zip(values, infos, strict=True):
      spec = _array_spec(info.path, leaf)
      stores[leaf.path] = await ts.open(spec, create=True, open=True, context=info.ts_context)
    pending: collections.deque = collections.deque()
    try:
      await self._write_parts(stores, pending)
    finally:  # nothing may appear on disk after an error has been reported
      await asyncio.gather(*(_finished(write) for write, _ in pending), return_exceptions=True)
    for write, _ in pending:
      write.result()
    return []

  async def _write_parts(self, stores, pending) -> None:
    """Writes every part; at the end `pending` holds the last (write, bytes), still under way."""
    held = 0
    while (part := self._next()) is not None:
      path, box, x = part
      while pending and held + x.nbytes > _PENDING_BYTES:
        await pending[0][0]
        held -= pending.popleft()[1]
      pending.append((stores[path][box].write(x), x.nbytes))
      held += x.nbytes
      self.written[path] += x.size

  def _next(self) -> Part | None:
    try:
      return next(self._parts, None)
    except Exception as error:
      self.failure = error
      raise


async def _finished(write) -> None:
  await write


def load(
  path: str | os.PathLike, component: str, target: Params, *, leave: Collection[str] = ()
) -> Params:
  """The parameters of a weight folder, read shard by shard: no process holds more than its shards.

  Args:
    component: 'video', 'codec', 'text' or 'vlm'; what the folder must hold.
    target: nested dict of ShapeDtypeStructs, with the shardings the result shall have (the default
      device where there is none). Values are cast to its dtypes.
    leave: subtrees, by the first part of their paths, that the folder may hold and the target does
      not want ('vision' of a VLM that serves as language model); they are not read.

  Raises:
    CheckpointError: no weight folder, one of another component, parameters that are missing, extra
      or of another shape (all of them named), or unreadable bytes.
  """
  stored = read_manifest(path, component).leaves
  wanted = {name: leaf for name, leaf in stored.items() if name.split('/')[0] not in leave}
  _check(wanted, target, path)
  here = SingleDeviceSharding(jax.devices()[0])
  target = jax.tree.map(
    lambda s: s if s.sharding else jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), target
  )
  args = ocp.args.PyTreeRestore(
    target,
    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
    partial_restore=len(wanted) < len(stored),
  )
  handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_concurrent_gb(target))
  try:
    with ocp.Checkpointer(handler) as reader:
      return reader.restore(pathlib.Path(path).absolute() / PARAMS, args=args)
  except Exception as error:  # tensorstore, JSON and OS errors alike mean unreadable bytes
    raise CheckpointError(f'{path} cannot be read ({error}). Convert the weights again.') from error


class Reader:
  """The stored arrays of a weight folder, one layer at a time and without JAX devices."""

  def __init__(self, path: str | os.PathLike):
    self._root = pathlib.Path(path).absolute() / PARAMS
    self._stores: dict[str, Any] = {}

  def row(self, path: str, layer: int | None) -> np.ndarray:
    """The parameter, or its given layer, in the stored dtype.

    Raises:
      CheckpointError: bytes that are absent or not those that were written.
    """
    try:
      store = self._open(path)
      x = store if layer is None else store[layer]
      out = np.empty(x.shape, store.dtype.numpy_dtype)
      steps = store.chunk_layout.write_chunk.shape
      for box in boxes(out.shape, steps[len(steps) - out.ndim :]):
        out[box] = x[box].read().result()
    except ValueError as error:  # tensorstore's own
      raise CheckpointError(
        f'{self._root}: parameter {path!r} cannot be read ({error}). Convert the weights again.'
      ) from error
    return out

  def _open(self, path: str):
    if path not in self._stores:
      spec = {'driver': 'zarr3', 'kvstore': _kvstore(self._root / _name(path))}
      self._stores[path] = ts.open(
        spec | {'fill_missing_data_reads': False}, open=True, read=True
      ).result()
    return self._stores[path]


def parts_of(leaf: Leaf, x: np.ndarray, layer: int | None) -> Iterator[Part]:
  """`x`, the whole leaf or its row `layer`, cut into the blocks of the leaf."""
  skip = 0 if layer is None else 1
  for box in boxes(x.shape, leaf.grid.block[skip:]):
    where = box if layer is None else (slice(layer, layer + 1), *box)
    part = x[box] if layer is None else x[box][None]
    yield leaf.path, where, part


def _array_spec(path, leaf: Leaf) -> dict[str, Any]:
  """Zarr3 array of one leaf. Every chunk carries a CRC-32C, so damaged bytes are refused on read;
  several chunks share a file where they are smaller than a block.
  """
  codecs: list[dict] = [
    {'name': 'bytes', 'configuration': {'endian': 'little'}},
    {'name': 'zstd', 'configuration': {'level': 1}},
    {'name': 'crc32c'},
  ]
  grid = leaf.grid
  if grid.chunk != grid.block:
    index = [codecs[0], {'name': 'crc32c'}]
    inner = {'chunk_shape': grid.chunk, 'codecs': codecs, 'index_codecs': index}
    codecs = [{'name': 'sharding_indexed', 'configuration': inner}]
  return {
    'driver': 'zarr3',
    'kvstore': _kvstore(path),
    'metadata': {
      'shape': leaf.shape,
      'data_type': leaf.dtype.name,
      'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': grid.block}},
      'codecs': codecs,
    },
    'store_data_equal_to_fill_value': True,  # an absent file then is a lost one
    'recheck_cached_data': False,
    'recheck_cached_metadata': False,
  }


def _kvstore(path) -> dict[str, Any]:
  # Not forced to the disk file by file, which takes longer than all else: the checksums of the
  # chunks find what a power failure would lose.
  return {'driver': 'file', 'path': f'{path}/', 'file_io_sync': False}


def _name(path: str) -> str:
  """Orbax's folder of a leaf."""
  return path.replace('/', '.')


def _concurrent_gb(target: Params) -> int:
  """Budget of one restore, at least the largest leaf in float64."""
  largest = max((leaf.size for leaf in jax.tree.leaves(target)), default=0) * 8
  return max(_RESTORE_GB, largest // 10**9 + 1)


def _check(stored: Mapping[str, dict], target: Params, where) -> None:
  """Raises CheckpointError unless both have the same paths and shapes, naming those that differ."""
  shapes = {path: tuple(leaf['shape']) for path, leaf in stored.items()}
  here = {path_string(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(target)}
  absent = 'absent'
  differing = [
    f'  {path}: expected {here.get(path, absent)}, got {shapes.get(path, absent)}'
    for path in sorted(shapes.keys() | here.keys())
    if shapes.get(path) != here.get(path)
  ]
  if differing:
    raise CheckpointError(
      f'{where} does not hold the weights of this model, {len(differing)} parameters differ:\n'
      + '\n'.join(differing)
      + '\nUse the config of these weights, or convert the checkpoint that belongs to this config.'
    )
