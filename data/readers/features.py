"""What a raw data set declares about its features, and whether a spec fits it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from wallwm_jax.data.readers.spec import DatasetSpec
from wallwm_jax.errors import DataError


class UnknownLayoutError(DataError):
  """A data set whose metadata does not say what its numbers mean; the message has a spec to fill
  in."""


@dataclasses.dataclass(frozen=True)
class Feature:
  """One declared feature.

  kind: camera, number, text, language (rows of an annotation tool) or other; shape: of one frame
  (cameras: H, W, 3); names: of the channels, () if the data set has none.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]
  names: tuple[str, ...] = ()


Features = Mapping[str, Feature]


def cameras(features: Features) -> list[str]:
  """Names of the camera features, in order of declaration."""
  return [name for name, feature in features.items() if feature.kind == 'camera']


def channel_indices(features: Features, name: str, channels) -> list[int]:
  """Channel names or indices of a feature as indices; raises DataError."""
  feature = _declared(features, name, 'number')
  width = feature.shape[0] if feature.shape else 1
  indices = []
  for channel in channels:
    index = channel
    if isinstance(channel, str):
      if channel not in feature.names:
        raise DataError(
          f'{name}: expected a channel {channel!r}, the data set names {list(feature.names)}. '
          'Give the index where it has no names.'
        )
      index = feature.names.index(channel)
    if not 0 <= index < width:
      raise DataError(f'{name}: expected a channel in 0..{width - 1}, got {channel}.')
    indices.append(index)
  return indices


def check_spec(spec: DatasetSpec, features: Features) -> None:
  """Raises DataError where a spec names a camera or a channel that the data set does not have."""
  for camera in spec.cameras:
    _declared(features, camera.feature, 'camera')
    if camera.present:
      _declared(features, camera.present, 'number')
  for arm in spec.arms:
    for pose in (arm.state, arm.action):
      if pose is None:
        continue
      channel_indices(features, pose.position.feature, pose.position.channels)
      channel_indices(features, pose.gripper.feature, (pose.gripper.channel,))
      if pose.rotation.channels:
        channel_indices(features, pose.rotation.feature, pose.rotation.channels)


def example_spec(features: Features) -> str:
  """A spec of this data set as YAML, with TODO where only its author knows the answer."""
  lines = ['cameras:']
  lines += [f'- {{feature: {c}, view: {_view(c)}}}' for c in cameras(features)]
  vectors = [n for n, f in features.items() if f.kind == 'number' and f.shape and f.shape[0] >= 4]
  state = next((n for n in vectors if 'state' in n), 'TODO')
  action = next((n for n in vectors if 'action' in n), 'TODO')
  lines += ['arms:', '- state:', *_pose_lines(features, state), '  action:']
  lines += ['    convention: TODO  # absolute, delta_base or delta_tool']
  lines += _pose_lines(features, action)
  return '\n'.join(lines) + '\n'


def unknown_layout(where, features: Features, reasons: list[str]) -> UnknownLayoutError:
  """The error of a data set that needs a spec: which layouts were tried, and what to write."""
  return UnknownLayoutError(
    f'{where}: its metadata does not say what state and action mean (' + '; '.join(reasons) + '). '
    'Write a DatasetSpec, replace every TODO, and pass it (--spec FILE):\n' + example_spec(features)
  )


def _pose_lines(features: Features, name: str) -> list[str]:
  feature = features.get(name)
  known = list(feature.names) if feature and feature.names else None
  size = feature.shape[0] if feature else 'TODO'
  comment = f'{size} channels' + (f': {", ".join(known)}' if known else '')
  return [
    f'    # {name}: {comment}',
    f'    position: {{feature: {name}, channels: [TODO, TODO, TODO], unit: TODO}}',
    f'    rotation: {{format: TODO, feature: {name}, channels: [TODO], unit: TODO}}',
    f'    gripper: {{feature: {name}, channel: TODO, open: TODO, closed: TODO}}',
  ]


def _view(camera: str) -> str:
  return camera.replace('/', '.').rsplit('.', 1)[-1]


def _declared(features: Features, name: str, kind: str) -> Feature:
  if name not in features or features[name].kind != kind:
    got = f'a {features[name].kind} feature' if name in features else 'none'
    known = sorted(n for n, f in features.items() if f.kind == kind)
    raise DataError(f'expected a {kind} feature {name!r}, got {got}. The data set has {known}.')
  return features[name]
