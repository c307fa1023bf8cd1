"""What a raw data set is, and what a spec must still say before it can be read."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from wallwm_jax.data.readers.clips import video_facts
from wallwm_jax.data.readers.features import (
  Features,
  UnknownLayoutError,
  cameras,
  example_spec,
)
from wallwm_jax.data.readers.layouts import lerobot_layout, rlds_layout
from wallwm_jax.data.readers.lerobot_meta import (
  LeRobotMeta,
  open_parquet,
  read_json,
  read_lines,
)
from wallwm_jax.data.readers.rlds import RldsInfo
from wallwm_jax.data.readers.spec import DatasetSpec, to_plain
from wallwm_jax.data.readers.video import SUFFIXES, video_files, video_folders
from wallwm_jax.errors import DataError

LANGUAGE = ('task_index', 'subtask_index', 'language_persistent', 'language_events')


def raw_format(path: str | os.PathLike) -> str | None:
  """'lerobot', 'rlds' or 'video', by the files that mark them; None: none of these."""
  path = pathlib.Path(path)
  if (path / 'meta' / 'info.json').is_file():
    return 'lerobot'
  if any(path.glob('features.json')) or any(path.glob('*/features.json')):
    return 'rlds'
  return 'video' if video_folders(path) else None


def probe(path: str | os.PathLike) -> dict[str, Any]:
  """Looks at the metadata (and one video per camera) of a LeRobot, RLDS or video folder.

  Returns:
    JSON-able {'path', 'format': 'lerobot' | 'rlds' | 'video', 'version', 'episodes', 'frames'
    (None where only reading would tell), 'fps', 'cameras': {name: {'size': [H, W], 'codec', ..}},
    'state', 'action', 'other': {feature: {'dtype', 'shape', 'names'}}, 'language': [feature, ..],
    'stats': what statistics there are, 'spec': the spec detected or None, 'missing': what a spec
    must say, 'problems': what is wrong with it, 'example_spec': text to fill in or None}.

  Raises:
    DataError: nothing of this kind at `path`, or damaged metadata.
  """
  path = pathlib.Path(path)
  kind = raw_format(path)
  if kind is None:
    raise DataError(
      f'{path}: expected a LeRobot data set (meta/info.json), RLDS (features.json) or a folder of '
      f'videos {SUFFIXES}; found none of them.'
    )
  return {'lerobot': _lerobot, 'rlds': _rlds, 'video': _videos}[kind](path)


def _lerobot(path: pathlib.Path) -> dict[str, Any]:
  meta = LeRobotMeta(path)
  found, problems = {}, [f'episode {i}: {text}' for i, text in meta.problems.items()]
  for name in cameras(meta.features):
    declared = meta.features[name]
    found[name] = {'size': list(declared.shape[:2]), 'codec': declared.dtype}
    if name in meta.videos and meta.episodes:
      try:
        found[name] |= video_facts(meta.episodes[0].clips[name].path)
        found[name].pop('frames')  # of one file
      except DataError as error:
        problems.append(str(error))
  sarm = sorted({f'{kind} (meta/episodes)' for e in meta.episodes for kind in e.subtasks})
  spec, missing = _detected(
    lambda: lerobot_layout(path, meta.features, meta.info.get('robot_type'))
  )
  return _report(
    path,
    'lerobot',
    meta.version,
    meta.features,
    episodes=len(meta.episodes) + len(meta.problems),
    frames=sum(entry.length for entry in meta.episodes),
    fps=meta.fps,
    cameras=found,
    language=[name for name in meta.features if name in LANGUAGE] + sarm,
    stats=_lerobot_stats(path),
    spec=spec,
    missing=missing,
    problems=problems,
  )


def _lerobot_stats(path: pathlib.Path) -> dict[str, Any]:
  """Which statistics lie beside the data, and the ranges they claim. They are reported, never used:
  how quantiles are merged changed within a version."""
  total, lines = path / 'meta' / 'stats.json', path / 'meta' / 'episodes_stats.jsonl'
  claims = [read_json(total)] if total.is_file() else []
  episodes = [row['stats'] for row in read_lines(lines, 'stats')] if lines.is_file() else []
  per_episode = bool(episodes)
  for table in sorted((path / 'meta' / 'episodes').glob('*/*.parquet'))[:1]:
    per_episode |= any(n.startswith('stats/') for n in open_parquet(table).schema_arrow.names)
  return {
    'files': [f'meta/{p.name}' for p in (total, lines) if p.is_file()],
    'per_episode': per_episode,
    'ranges': _ranges(claims or episodes),
  }


def _ranges(claims: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
  """{feature: {'min', 'max'}} of the vectors, over all claims."""
  ranges = {}
  for name in sorted({name for claim in claims for name in claim}):
    bounds = [claim[name] for claim in claims if name in claim]
    if not all(np.ndim(b.get(k)) == 1 for b in bounds for k in ('min', 'max')):
      continue  # cameras, and whatever has another form
    low, high = (np.array([b[k] for b in bounds], float) for k in ('min', 'max'))
    ranges[name] = {'min': low.min(0).tolist(), 'max': high.max(0).tolist()}
  return ranges


def _rlds(path: pathlib.Path) -> dict[str, Any]:
  info = RldsInfo(path)
  found = {
    name: {'size': list(info.features[name].shape[:2]), 'codec': 'image'}
    for name in cameras(info.features)
  }
  spec, missing = _detected(lambda: rlds_layout(info.folder, info.features))
  missing += [] if spec else ['fps: RLDS does not record the frame rate']
  return _report(
    path,
    'rlds',
    info.version,
    info.features,
    episodes={split: sum(shards) for split, shards in info.splits.items()},
    frames=None,
    fps=spec.fps if spec else None,
    cameras=found,
    language=[name for name, f in info.features.items() if f.kind == 'text'],
    stats={},
    spec=spec,
    missing=missing,
    problems=[],
  )


def _videos(path: pathlib.Path) -> dict[str, Any]:
  folders, found, problems, rates, frames = video_folders(path), {}, [], set(), 0
  for folder in folders:
    counts = []
    for video in video_files(folder):
      try:
        facts = video_facts(video)
      except DataError as error:
        problems.append(str(error))
        continue
      rates.add(round(facts['fps'], 3))
      counts.append(facts.pop('frames'))
      found.setdefault(video.stem, facts)
    frames = None if frames is None or not counts or None in counts else frames + min(counts)
  if len(rates) > 1:
    problems.append(f'videos of several frame rates: {sorted(rates)} Hz')
  return _report(
    path,
    'video',
    None,
    {},
    episodes=len(folders),
    frames=frames,
    fps=rates.pop() if len(rates) == 1 else None,
    cameras=found,
    language=[],
    stats={},
    spec=None,
    missing=[],
    problems=problems,
  )


def _detected(detect) -> tuple[DatasetSpec | None, list[str]]:
  """The spec of a known layout, or what has to be written."""
  try:
    return detect(), []
  except UnknownLayoutError:
    return None, [
      'cameras: which features, under which view names',
      'arms[].state: channels and units of position, rotation and gripper',
      'arms[].action: convention (absolute, delta_base or delta_tool), channels, units, gripper',
    ]


def _report(path, kind, version, features: Features, **facts) -> dict[str, Any]:
  numbers = {
    name: {'dtype': f.dtype, 'shape': list(f.shape), 'names': list(f.names)}
    for name, f in features.items()
    if f.kind == 'number'
  }
  state = {n: x for n, x in numbers.items() if 'state' in n}
  action = {n: x for n, x in numbers.items() if 'action' in n}
  spec = facts.pop('spec')
  needs_spec = bool(features) and spec is None
  return {
    'path': str(path),
    'format': kind,
    'version': version,
    **facts,
    'state': state,
    'action': action,
    'other': {n: x for n, x in numbers.items() if n not in state and n not in action},
    'spec': spec and to_plain(spec),
    'example_spec': example_spec(features) if needs_spec else None,
  }
