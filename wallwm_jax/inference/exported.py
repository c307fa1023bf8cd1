"""Running an exported policy. JAX, NumPy and flatbuffers are enough: none of the code that made it.

Every exported folder holds a copy of this file as policy.py, beside

  manifest.json                    what follows, with shapes, units, versions and checksums
  programs/PLATFORM/*.jaxexport    `jax.export` programs: event mode per bucket, unified mode
  params.safetensors               parameters and statistics by name, in the dtypes of the run
  text.safetensors                 features of the captions that were exported, by caption

The manifest is written last. Format of the tensors: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

try:
  from wallwm_jax.errors import CheckpointError, DataError, StatsMismatchError
except ImportError:  # copied as policy.py to where the package is not

  class CheckpointError(ValueError):
    """A folder that is not, or is no longer, an exported policy that can run here."""

  class DataError(ValueError):
    """An input that the policy cannot take."""

  class StatsMismatchError(ValueError):
    """Normalisation statistics that differ from those of the policy."""


FORMAT = 'wallwm-policy-2'
MANIFEST = 'manifest.json'
DTYPES = {
  'F32': np.dtype(np.float32), 'BF16': np.dtype(jnp.bfloat16), 'F16': np.dtype(np.float16),
  'F64': np.dtype(np.float64), 'F8_E4M3': np.dtype(jnp.float8_e4m3fn),
  'F8_E5M2': np.dtype(jnp.float8_e5m2), 'I64': np.dtype(np.int64), 'I32': np.dtype(np.int32),
  'I16': np.dtype(np.int16), 'I8': np.dtype(np.int8), 'U64': np.dtype(np.uint64),
  'U32': np.dtype(np.uint32), 'U16': np.dtype(np.uint16), 'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(bool),
}  # fmt: skip
STATS = (
  'action_mean', 'action_scale', 'state_mean', 'state_scale', 'latent_mean', 'latent_scale',
)  # fmt: skip
FEATURES, MASK = 'features/', 'mask/'  # before a caption, in text.safetensors
KEYS = 'threefry2x32'  # the random number generator of the programs
_BLOCK = 1 << 24  # bytes hashed at once
_OPTIONAL = ('view_mask', 'length', 'committed', 'committed_mask')


class ExportedPolicy:
  """Event and unified mode on one device, over plain dicts of arrays; made by `load`.

  manifest: what manifest.json says. platform: of the programs that run. captions: whose features
  came along. buckets: future latents N of the event programs, ascending.
  """

  def __init__(
    self,
    manifest: dict[str, Any],
    device: jax.Device,
    platform: str,
    programs: Mapping[str, jax.export.Exported],
    weights: Mapping[str, jax.Array],
    text: Mapping[str, np.ndarray],
  ):
    self.manifest, self.platform, self.device = manifest, platform, device
    self._weights, self._features = dict(weights), text
    self._entries = {e['file']: e for e in manifest['programs'] if e['platform'] == platform}
    self._calls = {file: jax.jit(exported.call) for file, exported in programs.items()}
    self.buckets = sorted(e['bucket'] for e in self._entries.values() if e['mode'] == 'event')
    self.captions = [name.removeprefix(FEATURES) for name in text if name.startswith(FEATURES)]

  def text(self, captions: str | Sequence[str]) -> dict[str, np.ndarray]:
    """Inputs text_features [B, X, E] float32 and text_mask [B, X] of one caption or several.

    Raises:
      DataError: a caption whose features were not exported.
    """
    spec = self._entry('unified', None)['inputs']['text_features']['shape'][1:]
    captions = [captions] if isinstance(captions, str) else list(captions)
    if not captions:
      raise DataError('captions: expected at least one, got none.')
    features = np.zeros((len(captions), *spec), np.float32)
    for row, caption in zip(features, captions):
      stored = self._features.get(FEATURES + caption.strip())
      if stored is None:
        raise DataError(self._unknown(caption))
      row[: len(stored)] = stored
    masks = [self._features[MASK + caption.strip()] for caption in captions]
    return {'text_features': features, 'text_mask': np.stack(masks)}

  def keys(self, seed: int, rows: int = 1) -> np.ndarray:
    """The input `key` uint32 [B, 2]: noise of its own for each of `rows` rows."""
    keys = jax.random.split(jax.random.key(seed, impl=KEYS), rows)
    return np.asarray(jax.random.key_data(keys))

  def event(self, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Event mode: one segment of video and actions, by the smallest bucket that holds it.

    Args:
      inputs: frames uint8 [B, V, 1, H, W, 3], state float32 [B, A], text_features, text_mask (see
        `text`) and key (see `keys`); if wanted view_mask bool [B, V] (all cameras), length int32
        [B], future latents of each event (the longest bucket), and committed float32 [B, n, A] with
        committed_mask bool [B, n], actions that are being executed already (none). Units are in the
        manifest.

    Returns:
      actions [B, 4N, A] relative to the pose in `state`, action_mask [B, 4N], latents
      [B, V, 1 + N, h, w, C] and latent_mask [B, 1 + N].

    Raises:
      DataError: an input that is missing, unknown, of another shape or dtype, or longer than any
        bucket.
    """
    return self._call('event', inputs)

  def unified(self, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Unified mode: frames [B, V, 1 + 4M, H, W, 3] with history, no length; else as `event`."""
    return self._call('unified', inputs)

  def steps(self, mode: str, bucket: int | None = None) -> int:
    """K, actions of one answer; of event mode by its bucket, None = the longest."""
    return self._entry(mode, bucket)['outputs']['actions']['shape'][1]

  def batch(self, mode: str, bucket: int | None = None) -> int | None:
    """Rows that a call must have, None = any number."""
    return self._entry(mode, bucket)['batch']

  def _entry(self, mode: str, bucket: int | None) -> dict[str, Any]:
    found = {e['bucket']: e for e in self._entries.values() if e['mode'] == mode}
    return found[max(found) if bucket is None else bucket]

  def _call(self, mode: str, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    longest = self._entry(mode, None)
    _check_names(mode, inputs, longest['inputs'])
    inputs = {name: x if hasattr(x, 'dtype') else np.asarray(x) for name, x in inputs.items()}
    rows = inputs['frames'].shape[0] if inputs['frames'].ndim else 0
    entry = self._entry(mode, self._bucket(inputs)) if mode == 'event' else longest
    if rows < 1 or entry['batch'] not in (None, rows):
      why = f' ({entry["batch_reason"]})' if entry['batch_reason'] else ''
      raise DataError(
        f'{mode}.frames: expected {_rows(entry)}{why}, got {rows}. Give as many rows as that, or '
        'export again with another --batch.'
      )
    inputs = _filled(inputs, entry, rows)
    for name, spec in entry['inputs'].items():
      _check_array(f'{mode}.{name}', inputs[name], _shape(spec, rows), spec['dtype'])
    return self._calls[entry['file']](self._weights, inputs)

  def bucket(self, length: int, steps: int = 0) -> int:
    """The smallest bucket that holds an event of `length` latents and `steps` committed actions.

    Raises:
      DataError: there is none.
    """
    wanted = max(int(length), -(-int(steps) // self.manifest['steps_per_latent']))
    fitting = [bucket for bucket in self.buckets if bucket >= wanted]
    if length < 1 or not fitting:
      raise DataError(
        f'event.length: expected 1 to {self.buckets[-1]} future latents, got {wanted}. The buckets '
        f'that were exported are {self.buckets}: ask for less, or export again with --buckets.'
      )
    return fitting[0]

  def _bucket(self, inputs: Mapping[str, Any]) -> int | None:
    """That of a call's longest event; None = the longest of all."""
    if 'length' not in inputs:
      return None
    length = np.asarray(inputs['length'])
    _check_array('event.length', length, inputs['frames'].shape[:1], 'int32')
    self.bucket(length.min())
    return self.bucket(length.max(), _last(inputs.get('committed_mask', ())))

  def _unknown(self, caption: str) -> str:
    near = difflib.get_close_matches(caption, self.captions, n=3, cutoff=0.0)
    return (
      f'caption {caption!r}: expected one of the {len(self.captions)} that were exported, nearest: '
      f'{", ".join(map(repr, near)) or "none"}. To add it, put it into the file given to `wallwm '
      'export --text` and export again, or give text_features and text_mask of the text encoder '
      f'that the policy was trained with ({self.manifest["config"]["model"]["text"]["kind"]}).'
    )


def load(
  folder: str | pathlib.Path, *, norm: Any = None, platform: str | None = None,
  params: Mapping[str, Any] | None = None,
) -> ExportedPolicy:  # fmt: skip
  """The policy in `folder`, every file that it needs compared with its checksum.

  Args:
    folder: what `wallwm export` wrote. Programs of other platforms may be absent.
    norm: statistics the caller normalises or evaluates with, fields or keys as in the manifest;
      compared where given.
    platform: 'cpu', 'cuda' or 'tpu' to run on; None = where JAX runs by default.
    params: parameters by name of a folder of programs only, as its manifest lists them.

  Raises:
    CheckpointError: missing, incomplete or altered files, another format, programs that this JAX
      cannot read, or none for the platform.
    StatsMismatchError: parameters or `norm` whose statistics are not those of the manifest.
  """
  folder = pathlib.Path(folder)
  manifest = read_manifest(folder)
  device, platform = _device(folder, manifest, platform)
  programs = {
    entry['file']: read_program(folder, manifest, entry)
    for entry in manifest['programs']
    if entry['platform'] == platform
  }
  weights = _weights(folder, manifest, params, device)
  if manifest['stats_hash']:
    stored = {name: weights[f'norm/{name}'] for name in STATS}
    for where, stats in (('the parameters', stored), ('the caller', norm)):
      if stats is not None and (got := stats_hash(stats)) != manifest['stats_hash']:
        raise StatsMismatchError(
          f'{folder}: expected normalisation statistics {manifest["stats_hash"]} ({MANIFEST}), got '
          f'{got} from {where}. Use the statistics in the manifest, or export again from the right '
          'run.'
        )
  text = dict(read_tensors(folder, manifest, manifest['text'])) if manifest['text'] else {}
  return ExportedPolicy(manifest, device, platform, programs, weights, text)


def verify(folder: str | pathlib.Path) -> dict[str, Any]:
  """The manifest of a folder of which every file, of every platform, is as it was written.

  Raises:
    CheckpointError: as `load`.
  """
  folder = pathlib.Path(folder)
  manifest = read_manifest(folder)
  for entry in manifest['programs']:
    read_program(folder, manifest, entry)
  for name in manifest['files']:
    with _open(folder, manifest, name) as file:
      digest = hashlib.sha256()
      while block := file.read(_BLOCK):
        digest.update(block)
    _check_digest(folder, manifest, name, digest.hexdigest())
  return manifest


def stats_hash(norm: Any) -> str:
  """First 16 hex digits of the SHA-256 of every statistic's name, shape and float32 bytes."""
  digest = hashlib.sha256()
  for name in STATS:
    values = norm[name] if isinstance(norm, Mapping) else getattr(norm, name)
    values = np.asarray(values, np.float32)
    digest.update(f'{name}{values.shape}'.encode() + values.tobytes())
  return digest.hexdigest()[:16]


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """What manifest.json of a folder says, in the format of this file.

  Raises:
    CheckpointError: there is none, it is damaged, or of another format or a newer JAX.
  """
  path = folder / MANIFEST
  if not path.is_file():
    aside = folder.absolute().parent / f'.{folder.absolute().name}.replaced'
    hint = f' The policy that was here before is in {aside}.' if aside.exists() else ''
    raise CheckpointError(
      f'{path}: expected an exported policy, found no {MANIFEST}. It is written last: the export '
      f'or the copy was cut short, do it again.{hint}'
    )
  try:
    manifest = json.loads(path.read_text())
  except ValueError as error:
    raise CheckpointError(f'{path}: not valid JSON ({error}). Copy or export it again.') from None
  found = manifest.get('format') if isinstance(manifest, dict) else None
  if found != FORMAT:
    raise CheckpointError(
      f'{path}: expected format {FORMAT!r}, got {found!r}. Run the policy.py of that folder, or '
      'export again with this version.'
    )
  oldest = manifest['requires']['jax']
  if _version(jax.__version__) < _version(oldest):
    raise CheckpointError(
      f'{path}: expected JAX {oldest} or newer, which wrote the programs, got {jax.__version__}. '
      f"pip install -U 'jax>={oldest}'"
    )
  return manifest


def read_program(
  folder: pathlib.Path, manifest: dict[str, Any], entry: dict[str, Any]
) -> jax.export.Exported:
  """One program, its checksum, calling convention and platform checked.

  Raises:
    CheckpointError: it is missing, altered, not readable by this JAX, or not as in the manifest.
  """
  name, version = entry['file'], entry['calling_convention_version']
  here, exact = jax.__version__, manifest['made_with']['jax']
  low = jax.export.minimum_supported_calling_convention_version
  high = jax.export.maximum_supported_calling_convention_version
  if not low <= version <= high:
    side = 'an older' if version < low else 'a newer'
    raise CheckpointError(
      f'{folder / name}: expected a calling convention of {low} to {high}, which JAX {here} '
      f'understands, got {version}. Use {side} JAX ({exact} wrote it), or export again with this '
      'one.'
    )
  if entry['unstable_calls'] and here != exact:
    raise CheckpointError(
      f'{folder / name}: its kernels ({", ".join(entry["unstable_calls"])}) run only on the JAX '
      f'that wrote them, {exact}, got {here}. pip install jax=={exact}, or export again.'
    )
  with _open(folder, manifest, name) as file:
    data = file.read()
  _check_digest(folder, manifest, name, hashlib.sha256(data).hexdigest())
  try:
    exported = jax.export.deserialize(bytearray(data))
  except ModuleNotFoundError as error:
    raise CheckpointError(
      f'{folder / name}: reading programs needs {error.name}. pip install {error.name}'
    ) from None
  except Exception as error:  # whatever a reader of another version stumbles over
    raise CheckpointError(
      f'{folder / name}: JAX {here} cannot read what {exact} wrote '
      f'({type(error).__name__}: {error}). Use that JAX, or export again.'
    ) from error
  if exported.platforms != (entry['platform'],):
    raise CheckpointError(
      f'{folder / name}: expected a program for {entry["platform"]} ({MANIFEST}), got one for '
      f'{", ".join(exported.platforms)}. Copy or export the folder again.'
    )
  return exported


def read_tensors(
  folder: pathlib.Path, manifest: dict[str, Any], name: str
) -> Iterator[tuple[str, np.ndarray]]:
  """(name, array) of a file of tensors, read once and one by one; read it to the end: only then is
  its checksum known.

  Raises:
    CheckpointError: it is missing or altered.
  """
  with _open(folder, manifest, name) as file:
    digest = hashlib.sha256()

    def take(count: int) -> bytes:
      if not 0 <= count <= manifest['files'][name]['bytes']:
        raise ValueError(f'a part of {count} bytes')
      data = file.read(count)
      digest.update(data)
      return data

    try:
      header = json.loads(take(int.from_bytes(take(8), 'little')))
      header.pop('__metadata__', None)
      for tensor, about in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
        dtype, shape = DTYPES[about['dtype']], tuple(about['shape'])
        data = take(math.prod(shape) * dtype.itemsize)
        yield tensor, np.frombuffer(data, dtype).reshape(shape)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
      raise CheckpointError(
        f'{folder / name}: damaged ({type(error).__name__}: {error}), so not the file that was '
        'exported. Copy it again.'
      ) from None
    _check_digest(folder, manifest, name, digest.hexdigest())


def _weights(folder, manifest, params, device) -> dict[str, jax.Array]:
  """The parameters by name, on the device."""
  listed = manifest['params']['arrays']
  if manifest['params']['file'] is None:
    if params is None:
      raise CheckpointError(
        f'{folder}: it was exported with --programs-only and holds no parameters. Give them as '
        'params={name: array}, or export the run.'
      )
    source = iter(params.items())
  elif params is not None:
    raise CheckpointError(f'{folder}: it holds parameters of its own, so params must be None.')
  else:
    source = read_tensors(folder, manifest, manifest['params']['file'])
  weights = {name: jax.device_put(x, device) for name, x in source}
  if wrong := sorted(weights.keys() ^ listed.keys()):
    raise CheckpointError(
      f'{folder}: expected the {len(listed)} parameters that {MANIFEST} lists, {wrong[:4]} are '
      'missing or unknown. Copy or export the folder again.'
    )
  for name, about in listed.items():
    have = (list(weights[name].shape), str(weights[name].dtype))
    if have != (about['shape'], about['dtype']):
      raise CheckpointError(
        f'{folder}: parameter {name}: expected {about["dtype"]} {about["shape"]} ({MANIFEST}), got '
        f'{have[1]} {have[0]}. Copy or export the folder again.'
      )
  return weights


def _device(folder, manifest, platform: str | None) -> tuple[jax.Device, str]:
  """Where to run, and for which of the exported platforms."""
  here = jax.export.default_export_platform()
  wanted = platform or here
  if wanted not in manifest['platforms']:
    where = 'was asked for' if platform else 'is where JAX runs here'
    raise CheckpointError(
      f'{folder}: expected a platform of {manifest["platforms"]}, for which it has programs, but '
      f'{wanted!r} {where}. Run it there, name one with platform=..., or export again with '
      f'--platforms {wanted}.'
    )
  if wanted == here:
    return jax.devices()[0], wanted
  try:
    return jax.devices(wanted)[0], wanted
  except RuntimeError as error:
    raise CheckpointError(
      f'{folder}: expected a device for platform={wanted!r}, JAX finds none here ({error}). It '
      f'runs on {here!r}.'
    ) from None


def _open(folder: pathlib.Path, manifest: dict[str, Any], name: str):
  """A file that the manifest names, of the size it should have."""
  path, expected = folder / name, manifest['files'][name]['bytes']
  if not path.is_file():
    raise CheckpointError(f'{path}: missing, though {MANIFEST} names it. Copy the whole folder.')
  if (got := path.stat().st_size) != expected:
    raise CheckpointError(
      f'{path}: expected {expected} bytes, got {got}. The file is not the one that was exported: '
      'copy it again.'
    )
  return path.open('rb')


def _check_digest(folder: pathlib.Path, manifest: dict[str, Any], name: str, got: str) -> None:
  if (expected := manifest['files'][name]['sha256']) != got:
    raise CheckpointError(
      f'{folder / name}: expected sha256 {expected}, got {got}. The file is not the one that was '
      'exported: copy it again.'
    )


def _check_names(mode: str, inputs: Mapping[str, Any], specs: Mapping[str, Any]) -> None:
  for name in inputs:
    if name not in specs:
      near = difflib.get_close_matches(str(name), specs, n=1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise DataError(f'{mode}.{name}: not an input. Expected {sorted(specs)}.{hint}')
  if missing := sorted(specs.keys() - inputs.keys() - set(_OPTIONAL)):
    raise DataError(f'{mode}: {missing} missing. Expected {sorted(specs)}.')
  if ('committed' in inputs) != ('committed_mask' in inputs):
    raise DataError(f'{mode}.committed: expected it together with committed_mask, got one of them.')


def _filled(inputs: dict[str, Any], entry: dict[str, Any], rows: int) -> dict[str, Any]:
  """The inputs with those that were left out, committed actions as many as the program takes."""
  specs = {name: _shape(spec, rows) for name, spec in entry['inputs'].items()}
  filled = {
    'view_mask': np.ones(specs['view_mask'], bool),
    'committed': np.zeros(specs['committed'], np.float32),
    'committed_mask': np.zeros(specs['committed_mask'], bool),
  }
  if 'length' in specs:
    filled['length'] = np.full(specs['length'], entry['bucket'], np.int32)
  filled |= inputs
  if 'committed' in inputs:
    steps, shape = specs['committed'][1], specs['committed']
    actions, mask = np.asarray(inputs['committed']), np.asarray(inputs['committed_mask'])
    _check_array('committed', actions, (rows, *actions.shape[1:2], shape[2]), 'float32')
    _check_array('committed_mask', mask, actions.shape[:2], 'bool')
    if _last(mask) > steps:
      raise DataError(f'committed_mask: expected at most {steps} steps, got {_last(mask)}.')
    missing = max(steps - mask.shape[1], 0)
    filled['committed'] = np.pad(actions[:, :steps], ((0, 0), (0, missing), (0, 0)))
    filled['committed_mask'] = np.pad(mask[:, :steps], ((0, 0), (0, missing)))
  return filled


def _last(mask: Any) -> int:
  """Steps up to the last one that is set in any row of [B, n]."""
  mask = np.asarray(mask)
  used = np.flatnonzero(mask.any(0)) if mask.ndim == 2 else ()
  return int(used[-1]) + 1 if len(used) else 0


def _check_array(where: str, x: Any, shape: Sequence[int], dtype: str) -> None:
  if (tuple(x.shape), str(x.dtype)) != (tuple(shape), dtype):
    raise DataError(f'{where}: expected {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}.')


def _shape(spec: dict[str, Any], rows: int) -> tuple[int, ...]:
  """A shape of the manifest, whose first size is the number of rows."""
  return (rows, *spec['shape'][1:])


def _rows(entry: dict[str, Any]) -> str:
  return 'at least one row' if entry['batch'] is None else f'{entry["batch"]} rows'


def _version(text: str) -> tuple[int, ...]:
  numbers = []
  for part in text.split('.')[:3]:
    digits = ''.join(c for c in part if c.isdigit())
    numbers.append(int(digits or 0))
  return tuple(numbers)
