"""The manifest: what files a store has, and the proof that they are the ones that were written."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib

from wallwm_jax.types import CorruptStoreError, DataError

EVENT_STORE, LATENT_STORE = 'wallwm-event-store', 'wallwm-latent-store'
# 2: clips, checksums and provenance in the index, rejected episodes
VERSIONS = {EVENT_STORE: 2, LATENT_STORE: 1}
_MADE_BY = {EVENT_STORE: 'wallwm data build', LATENT_STORE: 'wallwm data encode'}


def describe(root: pathlib.Path, name: str, count: int) -> dict:
  """The manifest entry of a finished file, which is flushed to disk first."""
  with open(root / name, 'rb') as f:
    os.fsync(f.fileno())
  return {
    'path': name,
    'bytes': (root / name).stat().st_size,
    'records': count,
    'sha256': _sha256(root / name),
  }


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _digest(manifest: dict) -> str:
  content = {k: v for k, v in manifest.items() if k != 'digest'}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(root: pathlib.Path, content: dict, kind: str = EVENT_STORE) -> None:
  """Adds format, version and a digest of the content; takes the place of an older manifest in one
  step, after everything is on disk."""
  manifest = {'format': kind, 'version': VERSIONS[kind], **content}
  manifest['digest'] = _digest(manifest)
  temporary = root / '.manifest.tmp'
  with open(temporary, 'w') as f:
    f.write(json.dumps(manifest, indent=1))
    f.flush()
    os.fsync(f.fileno())
  for folder in {(root / entry['path']).parent for entry in content['shards'] + content['files']}:
    sync_folder(folder)
  os.replace(temporary, root / 'manifest.json')
  sync_folder(root)


def sync_folder(path: pathlib.Path) -> None:
  """Flushes the names in a folder to disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def holds_store(path: str | os.PathLike) -> bool:
  """Whether there is a finished store at `path`."""
  return (pathlib.Path(path) / 'manifest.json').is_file()


def read_manifest(path: pathlib.Path, kind: str = EVENT_STORE) -> dict:
  """The manifest of the store of that kind at `path`.

  Raises:
    DataError: there is none, it is not ours or its format version is newer than this code.
    CorruptStoreError: it is damaged.
  """
  file = path / 'manifest.json'
  if not file.is_file():
    name = kind.removeprefix('wallwm-').replace('-', ' ')
    raise DataError(
      f'no {name} at {path}: {file.name} not found. Make one with `{_MADE_BY[kind]}`.'
    )
  try:
    manifest = json.loads(file.read_text())
  except ValueError as error:
    raise CorruptStoreError(f'{file}: not valid JSON ({error}).') from None
  if not isinstance(manifest, dict) or manifest.get('format') != kind:
    got = manifest.get('format') if isinstance(manifest, dict) else None
    raise DataError(f'{file}: expected format {kind!r}, got {got!r}.')
  if not isinstance(manifest.get('version'), int) or manifest['version'] > VERSIONS[kind]:
    raise DataError(
      f'{file}: format version {manifest.get("version")}, this code reads up to '
      f'{VERSIONS[kind]}. Upgrade wallwm_jax.'
    )
  if manifest.get('digest') != _digest(manifest):
    raise CorruptStoreError(f'{file}: content does not match its digest.')
  return manifest


def check_size(root: pathlib.Path, entry: dict) -> None:
  """Raises CorruptStoreError if the file of a manifest entry is missing or has another size."""
  path = root / entry['path']
  if not path.is_file():
    raise CorruptStoreError(
      f'{path}: missing ({entry["bytes"]} bytes expected). Copy it again or rebuild the store.'
    )
  if path.stat().st_size != entry['bytes']:
    raise CorruptStoreError(
      f'{path}: expected {entry["bytes"]} bytes, got {path.stat().st_size} (truncated?). '
      'Copy it again or rebuild the store.'
    )


def check_digest(root: pathlib.Path, entry: dict) -> None:
  """Raises CorruptStoreError if the bytes of a manifest entry's file have changed."""
  if _sha256(root / entry['path']) != entry['sha256']:
    raise CorruptStoreError(
      f'{root / entry["path"]}: sha256 does not match the manifest, bytes have changed. '
      'Copy it again or rebuild the store.'
    )
