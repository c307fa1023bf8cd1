"""The way to the metaworld package, which is an optional dependency."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import NamedTuple

from wallwm_jax.errors import ConfigError

INSTALL = (
  "Install it into an environment of its own, `pip install -e '.[metaworld]'` (metaworld 3.1.1 "
  'needs mujoco 3.3.0, which is not the version that constraints.txt pins)'
)
GRAPHICS = (
  'rendering without a display needs the Debian package libosmesa6 and MUJOCO_GL=osmesa, or a GPU '
  'and MUJOCO_GL=egl, set before mujoco is imported'
)


class Library(NamedTuple):
  """classes, policies: {task with version suffix: class}; mujoco: the module."""

  classes: dict
  policies: dict
  mujoco: object


def load() -> Library:
  """Imports Meta-World, without a display for OSMesa where MUJOCO_GL says nothing else.

  Raises:
    ConfigError: a package is missing, and which to install.
  """
  headless = sys.platform.startswith('linux') and not os.environ.get('DISPLAY')
  if headless and importlib.util.find_spec('metaworld'):
    os.environ.setdefault('MUJOCO_GL', 'osmesa')
  try:
    import mujoco
    from metaworld.env_dict import ENV_CLS_MAP
    from metaworld.policies import ENV_POLICY_MAP
  except (ImportError, OSError, AttributeError, RuntimeError) as error:
    raise ConfigError(
      f'Meta-World cannot be used here: {error}. {INSTALL}; {GRAPHICS}.'
    ) from error
  return Library(ENV_CLS_MAP, ENV_POLICY_MAP, mujoco)


def broken(what: str, error: Exception) -> ConfigError:
  """The error for a library that is installed but does not work."""
  backend = os.environ.get('MUJOCO_GL', '(not set)')
  return ConfigError(
    f'Meta-World: {what} failed ({type(error).__name__}: {error}); MUJOCO_GL is {backend}. '
    f'{INSTALL}; {GRAPHICS}.'
  )
