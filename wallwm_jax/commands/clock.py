"""How far a long command is, for people, and what each part of it took."""

from __future__ import annotations

import time

from rich.console import Console


class Clock:
  """Numbered headlines and the seconds each part took."""

  def __init__(self, console: Console):
    self._console, self._begun, self._parts = console, time.monotonic(), []

  def start(self, name: str) -> None:
    self._parts.append((name, time.monotonic()))
    self._console.rule(
      f'[{len(self._parts)}] {name}  ({self.total() / 60:.1f} min so far)', align='left'
    )

  def total(self) -> float:
    """Seconds since it was made."""
    return time.monotonic() - self._begun

  def parts(self) -> dict[str, float]:
    """Seconds by part."""
    ends = [begun for _, begun in self._parts[1:]] + [time.monotonic()]
    return {
      name: round(end - begun, 1) for (name, begun), end in zip(self._parts, ends, strict=True)
    }
