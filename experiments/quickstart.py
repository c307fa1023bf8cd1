"""The model that `wallwm quickstart` trains: the tabletop preset, minutes on two CPU cores."""

from wallwm_jax.config import to_config_dict
from wallwm_jax.presets import tabletop


def get_config():
  return to_config_dict(tabletop())
