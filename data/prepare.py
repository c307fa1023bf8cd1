"""From what a reader yields to what a store should hold: synchronised, cleaned, pruned, cut into
events, captioned.

Lags belong to rigs, so the reader is gone through twice: once for the motion of all episodes of a
rig, once to prepare them one by one.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Protocol

from wallwm_jax.data import sync
from wallwm_jax.data.augment import AugmentSettings, prune
from wallwm_jax.data.caption import CaptionSettings, caption
from wallwm_jax.data.captioner import Captioner
from wallwm_jax.data.clean import CleanSettings, clean
from wallwm_jax.data.schema import EpisodeRecord, Quarantined
from wallwm_jax.data.segment import SegmentSettings, segment
from wallwm_jax.data.sync import RigLag, SyncSettings
from wallwm_jax.types import DataError

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
  prune: AugmentSettings | None = None
  segment: SegmentSettings | None = SegmentSettings()
  caption: CaptionSettings | None = CaptionSettings()


class Prepared:
  """The episodes of a reader, prepared; an episode that a step refuses comes as Quarantined.

  Args:
    reader: of raw episodes; captioner: asked for the captions that were not given.

  After iteration, lags: {rig: RigLag} of the rigs that have a robot stream.
  """

  def __init__(
    self,
    reader: Reader,
    settings: PrepareSettings = PrepareSettings(),
    captioner: Captioner | None = None,
  ):
    self._reader, self._settings, self._captioner = reader, settings, captioner
    self.lags: dict[Rig, RigLag] = {}

  def __len__(self) -> int:
    return len(self._reader)

  def __iter__(self) -> Iterator[Item]:
    if self._settings.sync is not None:
      self.lags = rig_lags(self._reader, self._settings.sync)
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
    if steps.prune is not None:
      record = prune(record, steps.prune)
    if steps.segment is not None:
      record = segment(record, steps.segment)
    if steps.caption is not None:
      record = caption(record, steps.caption, self._captioner)
    return record

  def _aligned(self, record: EpisodeRecord) -> Item:
    lag = self.lags.get((record.source, record.rig))
    if lag is None and (record.state is not None or record.actions is not None):
      return Quarantined(
        record.episode_id, record.source, 'sync: no episode of its rig can be compared'
      )
    return sync.align(record, lag, self._settings.sync)


def rig_lags(reader: Reader, settings: SyncSettings) -> dict[Rig, RigLag]:
  """The lags of every rig of a reader, each from all of its episodes that can be compared."""
  motions = collections.defaultdict(list)
  for item in reader:
    if isinstance(item, Quarantined) or item.state is None:
      continue
    try:
      motion = sync.motion(item, settings)
    except DataError:
      continue  # refused, with the reason, when it is prepared
    motions[motion.rig].append(motion)
  return {rig: sync.estimate(episodes, settings) for rig, episodes in motions.items()}
