"""The check every config dataclass makes of its own values."""

from __future__ import annotations

from wallwm_jax.types import ConfigError


def require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)
