"""Demonstrations that several modules look at."""

import pytest

from wallwm_jax.envs.tabletop import TabletopConfig, collect


@pytest.fixture(scope='session')
def episodes():
  """Twenty episodes of seed 3 without recoveries, fourteen tabletops at once."""
  return list(collect(20, 3, mix='mixed', batch=14, config=TabletopConfig(image_size=(16, 16))))
