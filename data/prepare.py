"""From what a reader yields to what a store should hold: synchronised, cleaned, cut into events,
pruned, captioned.

Lags belong to rigs, so the reader is gone through twice: once for the motion of all episodes of a
rig, once to prepare them one by one.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Protocol

from rich.progress import track

from wallwm_jax.config import nearest
from wallwm_jax.data import sync
from wallwm_jax.data.augment import AugmentSettings, prune
from wallwm_jax.data.caption import CaptionSettings, caption
from wallwm_jax.data.captioner import Captioner
from wallwm_jax.data.clean import CleanSettings, clean
from wallwm_jax.data.schema import EpisodeRecord, Quarantined
from wallwm_jax.data.segment import SegmentSettings, segment
from wallwm_jax.data.sync import Motion, RigLag, SyncSettings
from wallwm_jax.types import ConfigError, DataError

Item = EpisodeRecord | Quarantined
Rig = tuple[str, str]  # source and rig of a record


class Reader(Protocol):
  """Yields the same episodes each time."""

  def __len__(self) -> int: ...

  def __iter__(self) -> Iterator[Item]: ...


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
  """The steps in their order; None leaves one out."""

  sync: SyncSettings | None = SyncSettings()
  clean: CleanSettings | None = CleanSettings()
  segment: SegmentSettings | None = SegmentSettings()
  prune: AugmentSettings | None = None
  caption: CaptionSettings | None = CaptionSettings()

  @classmethod
  def of(cls, steps: Iterable[str]) -> PrepareSettings:
    """Only the named steps, as they are by default.

    Raises:
      ConfigError: an unknown name, or captions without events to caption.
    """
    full = cls(prune=AugmentSettings())
    every = {field.name: getattr(full, field.name) for field in dataclasses.fields(cls)}
    wanted = tuple(steps)
    for step in wanted:
      if step not in every:
        raise ConfigError(
          f'prepare: expected steps among {sorted(every)}, got {step!r}.{nearest(step, every)}'
        )
    return cls(**{step: default if step in wanted else None for step, default in every.items()})


class Prepared:
  """The episodes of a reader, prepared; an episode that a step refuses comes as Quarantined.

  Args:
    reader: of raw episodes; captioner: asked for the captions that were not given; progress: show
      how far the measurement of lags is.
  """

  def __init__(
    self,
    reader: Reader,
    settings: PrepareSettings = PrepareSettings(),
    captioner: Captioner | None = None,
    progress: bool = False,
  ):
    self._reader, self._settings, self._captioner = reader, settings, captioner
    self._progress = progress

  @functools.cached_property
  def lags(self) -> dict[Rig, RigLag]:
    """Of the rigs whose robot stream can be compared; measured on first use."""
    if self._settings.sync is None:
      return {}
    return rig_lags(self._reader, self._settings.sync, progress=self._progress)

  def __len__(self) -> int:
    return len(self._reader)

  def __iter__(self) -> Iterator[Item]:
    for item in self._reader:
      yield item if isinstance(item, Quarantined) else self._prepare(item)

  def _prepare(self, record: EpisodeRecord) -> Item:
    steps = self._settings
    aligned = record if steps.sync is None else self._aligned(record)
    if isinstance(aligned, Quarantined):
      # What keeps streams from being compared is a defect that cleaning knows by name.
      found = aligned if steps.clean is None else clean(record, steps.clean)
      return found if isinstance(found, Quarantined) else aligned
    record = aligned if steps.clean is None else clean(aligned, steps.clean)
    if isinstance(record, Quarantined):
      return record
    if steps.segment is not None:
      record = segment(record, steps.segment)
    if steps.prune is not None:
      record = prune(record, steps.prune)
    if steps.caption is not None:
      record = caption(record, steps.caption, self._captioner)
    return record

  def _aligned(self, record: EpisodeRecord) -> Item:
    lag = self.lags.get((record.source, record.rig))
    try:
      return sync.align(record, lag, self._settings.sync)
    except DataError as error:  # no episode of its rig can be compared
      return Quarantined(record.episode_id, record.source, f'sync: {error}')


def rig_lags(
  reader: Reader, settings: SyncSettings, *, progress: bool = False
) -> dict[Rig, RigLag]:
  """The lags of every rig of a reader, each from all of its episodes that can be compared."""
  motions: dict[Rig, list[Motion]] = collections.defaultdict(list)
  for item in track(reader, 'lags of the rigs', total=len(reader), disable=not progress):
    if isinstance(item, Quarantined) or item.state is None:
      continue
    try:
      found = sync.motion(item, settings)
    except DataError:
      continue  # refused, with the reason, when it is prepared
    if found.frames >= settings.min_frames:
      motions[found.rig].append(found)
  return {rig: sync.estimate(episodes, settings) for rig, episodes in motions.items()}
