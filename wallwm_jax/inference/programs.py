"""Compiled programs that outlive the process: a restart neither traces nor compiles them again.

A folder holds two layers. `<name>-<digest>.program` is a lowered function (`jax.export`), so that
the model's Python is not run again; `xla/` is JAX's own compilation cache, which holds the
executables. Nothing in it is a pickle. What a lowered function was made of (versions, code,
platform, device kind, compiler flags) stands in its header and is compared, and every file has a
checksum: what does not fit is named in a warning and built anew.

Executables are code, so the folder belongs to one user: others may not write to it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jaxlib

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.inference import runtime
from wallwm_jax.inference.denoiser import Conditioning
from wallwm_jax.models.functional import ServingCache
from wallwm_jax.types import (
  ActionChunk,
  ConfigError,
  DataError,
  Frozen,
  InferenceParams,
  NormStats,
  Observation,
  Text,
)

FORMAT = 'wallwm-program-1'
_log = logging.getLogger(__name__)
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled function of fixed shapes.

  traced, compiled: whether it had to be; False = read from the folder. seconds: until it was ready.
  """

  name: str
  specs: tuple
  run: jax.stages.Compiled
  traced: bool
  compiled: bool
  seconds: float

  def __call__(self, *args):
    """Raises DataError for arguments of other fields, shapes or dtypes than it was compiled for."""
    try:
      return self.run(*args)
    except TypeError as error:
      self._check(args)
      raise error

  def _check(self, args) -> None:
    """Which of the arguments is not as compiled; looked up only once a call was refused."""
    expected, given = (jax.tree_util.tree_leaves_with_path(x) for x in (self.specs, args))
    names = [[jax.tree_util.keystr(path) for path, _ in leaves] for leaves in (expected, given)]
    if names[0] != names[1]:
      odd = sorted(set(names[0]) ^ set(names[1]))
      raise DataError(f'{self.name}: compiled for other fields of its arguments: {odd[:5]}.')
    for name, (_, want), (_, x) in zip(names[0], expected, given):
      have = jax.typeof(x)
      if (have.shape, have.dtype) != (want.shape, want.dtype):
        raise DataError(
          f'{self.name}{name}: compiled for {want.dtype} {want.shape}, got {have.dtype} '
          f'{have.shape}. Load a program of this shape first: none is made unasked.'
        )


class Programs:
  """Builds programs, and keeps them where a folder is given.

  One folder at a time serves a process: JAX's compilation cache is the whole process's, so that
  whatever else is compiled in it (a VLM, a simulator) is kept in the folder too.

  Args:
    folder: created where missing, for this user only; None = keep nothing.

  Raises:
    ConfigError: a folder that is another user's, or that others may write to.
  """

  def __init__(self, folder: str | os.PathLike | None = None):
    self.folder = None if folder is None else pathlib.Path(folder).absolute()
    if self.folder is None:
      return
    for path in (self.folder, self._xla, self._sums):
      _claim(path)
    self._drop_altered()
    jax.config.update('jax_compilation_cache_dir', str(self._xla))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()

  def load(
    self,
    name: str,
    function: Callable,
    args: Sequence[Any],
    *,
    config: ExperimentConfig,
    donate: Sequence[int] = (),
  ) -> Program:
    """`function` for arguments like `args` (arrays or ShapeDtypeStructs), on one device.

    Args:
      name: with the config, the shapes and the code it says all about `function`. donate: places of
        the arguments whose buffers it may reuse, read or not.
    """
    started = time.perf_counter()
    specs = jax.tree.map(_spec, tuple(args))
    options = {'donate_argnums': tuple(donate), 'keep_unused': bool(donate)}
    traced = True
    if self.folder is not None:
      function, traced = self._lowered(name, function, specs, config, options)
    before = self._entries()
    compiled = jax.jit(function, **options).lower(*specs).compile()
    missed = self.folder is None or self._entries() != before
    self.seal()
    seconds = time.perf_counter() - started
    return Program(name, specs, compiled, traced, missed, seconds)

  def seal(self) -> None:
    """Notes the checksum of every executable that came since; what has none is not trusted when
    the folder is opened again."""
    if self.folder is None:
      return
    for name in self._entries() - {path.name for path in self._files(self._sums)}:
      _write(self._sums / name, _digest((self._xla / name).read_bytes()).encode())

  def _lowered(self, name, function, specs, config, options) -> tuple[Callable, bool]:
    """(the function as it was lowered, whether its Python had to be run for it)."""
    made_of = {
      'format': FORMAT, 'name': name, 'config': _digest(repr(config).encode()),
      'arguments': _digest(_describe(specs, options).encode()),
    }  # fmt: skip
    path = self.folder / f'{_file_name(name)}-{_digest(json.dumps(made_of).encode())[:16]}.program'
    header = made_of | _surroundings()
    if path.exists():
      try:
        return _read(path, header).call, False
      except _Unfit as reason:
        _log.warning('%s: not used, it %s. It is built anew.', path, reason)
    try:
      data = bytes(jax.export.export(jax.jit(function, **options))(*specs).serialize())
    except (ValueError, NotImplementedError) as error:  # calls back into this process, or the like
      _log.warning(
        '%s: cannot be kept as a lowered program, so every start traces it again (%s).',
        name, str(error).splitlines()[0],
      )  # fmt: skip
      return function, True
    top = json.dumps(header | {'sha256': _digest(data)})
    _write(path, top.encode() + b'\n' + data)
    return jax.export.deserialize(bytearray(data)).call, True

  def _drop_altered(self) -> None:
    """Removes executables that are not what this class left there."""
    for path in self._files(self._xla):
      note = self._sums / path.name
      if not note.exists():
        reason = 'has no checksum: another program wrote it, or this one was stopped'
      elif note.read_text() != _digest(path.read_bytes()):
        reason = 'is not the file that its checksum was taken of'
      else:
        continue
      _log.warning('%s: not used, it %s. It is compiled anew.', path, reason)
      path.unlink()
      note.unlink(missing_ok=True)
    for note in self._files(self._sums):
      if not (self._xla / note.name).exists():
        note.unlink()

  def _entries(self) -> set[str]:
    return set() if self.folder is None else {path.name for path in self._files(self._xla)}

  @staticmethod
  def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Executables; JAX keeps their times of use beside them."""
    return [path for path in folder.iterdir() if path.name.endswith('-cache')]

  @property
  def _xla(self) -> pathlib.Path:
    return self.folder / 'xla'

  @property
  def _sums(self) -> pathlib.Path:
    return self.folder / 'sums'


class _Unfit(Exception):
  """Why an entry cannot be used."""


def _read(path: pathlib.Path, header: dict[str, str]) -> jax.export.Exported:
  top, _, data = path.read_bytes().partition(b'\n')
  try:
    found = json.loads(top)
    digest = found.pop('sha256')
  except (ValueError, KeyError, AttributeError, TypeError):
    raise _Unfit('has no header that can be read') from None
  for key, want in header.items():
    if found.get(key) != want:
      raise _Unfit(f'was made with {key} {found.get(key)!r}, here it is {want!r}')
  if digest != _digest(data):
    raise _Unfit('is cut short or altered: its checksum is another')
  return jax.export.deserialize(bytearray(data))


def _surroundings() -> dict[str, str]:
  """What a lowered program depends on beside its own arguments."""
  device = jax.devices()[0]
  return {
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'code': code_digest(),
    'platform': device.platform,
    'device_kind': device.device_kind,
    'settings': _digest(
      repr((os.environ.get('XLA_FLAGS', ''), os.environ.get('LIBTPU_INIT_ARGS', ''),
            jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision)).encode()
    ),
  }  # fmt: skip


@functools.cache
def code_digest() -> str:
  """Of all Python of this package: a program made by other code is another program."""
  digest = hashlib.sha256()
  for top in (_PACKAGE, _PACKAGE / 'data', _PACKAGE / 'kernels'):  # the two may be links
    for path in sorted(top.rglob('*.py')):
      digest.update(str(path.relative_to(top)).encode() + path.read_bytes())
  return digest.hexdigest()[:16]


def _describe(specs, options) -> str:
  """Fields, shapes and dtypes of all arguments, and which are donated."""
  leaves = jax.tree_util.tree_leaves_with_path(specs)
  return repr([(jax.tree_util.keystr(p), x.shape, str(x.dtype)) for p, x in leaves] + [options])


def _spec(x) -> jax.ShapeDtypeStruct:
  kind = jax.typeof(x) if not isinstance(x, jax.ShapeDtypeStruct) else x
  return jax.ShapeDtypeStruct(kind.shape, kind.dtype)


def _claim(folder: pathlib.Path) -> None:
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  found = folder.stat()
  if found.st_uid != os.getuid() or found.st_mode & 0o022:
    raise ConfigError(
      f'{folder}: expected a folder that only user {os.getuid()} may write to, got owner '
      f'{found.st_uid} and mode {found.st_mode & 0o777:o}: what lies in it is run as code. '
      f'Choose a folder of your own, or: chmod 700 {folder}'
    )


def _write(path: pathlib.Path, data: bytes) -> None:
  """Whole or not at all."""
  partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
  partial.write_bytes(data)
  os.replace(partial, path)


def _digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def _file_name(name: str) -> str:
  return re.sub(r'[^\w.]+', '-', name)


def _register(*kinds: type) -> None:
  """Lets `jax.export` write trees of these classes; none has anything but arrays in it."""

  def nothing(aux) -> bytes:
    if aux != ():
      raise ConfigError(f'programs: expected arrays alone in the arguments, got {aux!r} too.')
    return b''

  for kind in kinds:
    jax.export.register_pytree_node_serialization(
      kind, serialized_name=f'{kind.__module__}.{kind.__qualname__}', serialize_auxdata=nothing,
      deserialize_auxdata=lambda data: (),
    )  # fmt: skip


_register(
  ActionChunk, Conditioning, Frozen, InferenceParams, NormStats, Observation, ServingCache, Text,
  runtime.Anchor, runtime.Memory, runtime.Now, runtime.Plan, runtime.Turn,
)  # fmt: skip
