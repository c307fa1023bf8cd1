"""Parity is measured with exact matrix products."""

import jax
import pytest


@pytest.fixture(scope='module', autouse=True)
def exact_matmuls():
  """Within a module only: set for the process, it would reach the other tests' programs."""
  with jax.default_matmul_precision('highest'):
    yield
