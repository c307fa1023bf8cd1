"""Solvers and their schedules: against diffusers' trajectories, closed forms and known orders."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from wallwm_jax.diffusion import samplers, schedules
from wallwm_jax.diffusion.schedules import Schedule
from wallwm_jax.types import ConfigError

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / 'fixtures' / 'data'
PUBLIC = {'diffusers_unipc': 'unipc', 'wan': 'unipc', 'diffusers_euler': 'euler'}
GRIDS = ('uniform', *PUBLIC)


def network(x, level):
  """The fake network of tests/fixtures/samplers.py."""
  mixed = jnp.roll(x, 1, -1) - 0.5 * x.mean(axis=-1, keepdims=True)
  return jnp.tanh(x * (1 + level)) - 0.4 * jnp.cos(2 * mixed) * level + 0.1


def read(grid):
  with safe_open(FIXTURES / f'samplers_{grid}.safetensors', 'numpy') as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads(file.metadata()['config'])
  cases = [(n, s) for n in config['steps'] for s in config['shifts']]
  return tensors, cases


@pytest.mark.parametrize('grid', PUBLIC)
def test_schedules_are_those_of_the_public_samplers(grid):
  tensors, cases = read(grid)
  assert len(cases) == 20
  for steps, shift in cases:
    ours, case = schedules.solver_sigmas(grid, steps, shift), f'outputs.{steps}_{shift:g}'
    assert ours.sigmas.dtype == ours.levels.dtype == np.float32
    np.testing.assert_allclose(ours.sigmas, tensors[f'{case}.sigmas'], atol=1e-7, err_msg=case)
    told = np.rint(1000 * ours.levels) if grid != 'diffusers_euler' else 1000 * ours.levels
    np.testing.assert_allclose(told, tensors[f'{case}.timesteps'], rtol=2e-7, err_msg=case)


@pytest.mark.parametrize('grid', PUBLIC)
def test_trajectories_are_those_of_the_public_samplers(grid):
  tensors, cases = read(grid)
  x = jnp.asarray(tensors['inputs.x'])
  for steps, shift in cases:
    schedule = schedules.solver_sigmas(grid, steps, shift)
    path = samplers.trajectory(lambda x, _, level: network(x, level), x, schedule, PUBLIC[grid])
    expected = tensors[f'outputs.{steps}_{shift:g}.path']
    assert path.shape == expected.shape
    for i, (got, want) in enumerate(zip(path, expected)):
      np.testing.assert_allclose(got, want, atol=1e-5, err_msg=f'{steps=} {shift=} sample {i}')


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('steps', [1, 2, 7])
def test_schedules_fall_from_noise_to_clean(grid, steps):
  sigmas, levels = schedules.solver_sigmas(grid, steps, 5.0)
  assert sigmas.shape == (steps + 1,) and levels.shape == (steps,)
  assert 0.999 < sigmas[0] <= 1 and sigmas[-1] == 0 and np.all(np.diff(sigmas) < 0)
  assert np.all(np.abs(levels - sigmas[:-1]) < 1e-3 + 1e-6)


def test_the_uniform_grid_is_the_schedule_of_training():
  sigmas, levels = schedules.solver_sigmas('uniform', 10, 3.0)
  np.testing.assert_array_equal(sigmas, schedules.shifted_sigmas(10, 3.0))
  np.testing.assert_array_equal(levels, sigmas[:-1])


@pytest.mark.parametrize('solver', ['euler', 'unipc'])
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('steps', [1, 2, 6])
def test_straight_paths_are_followed_exactly(grid, solver, steps):
  x0, eps = jnp.float32([1.0, -2.0]), jnp.float32([0.5, 3.0])
  schedule = schedules.solver_sigmas(grid, steps, 3.0)
  start = (1 - schedule.sigmas[0]) * x0 + schedule.sigmas[0] * eps
  out = samplers.integrate(lambda x, sigma, _: eps - x0, start, schedule, solver)
  np.testing.assert_allclose(out, x0, atol=1e-5)


def linear_flow(sigma, spread=0.5):
  """(velocity / x, x up to a factor) of data ~ N(0, spread^2): x is proportional to its own std."""
  variance = ((1 - sigma) * spread) ** 2 + sigma**2
  return (sigma - (1 - sigma) * spread**2) / variance, variance**0.5


def error(solver, steps):
  sigmas = np.linspace(0.95, 0.15, steps + 1)
  x = jnp.float32([1.0])
  schedule = Schedule(sigmas, sigmas[:-1])
  out = samplers.integrate(lambda x, sigma, _: linear_flow(sigma)[0] * x, x, schedule, solver)
  return abs(float(out[0]) - linear_flow(0.15)[1] / linear_flow(0.95)[1])


@pytest.mark.parametrize(('solver', 'order'), [('euler', 1), ('unipc', 2)])
def test_orders_of_convergence(solver, order):
  errors = [error(solver, steps) for steps in (8, 16, 32)]
  rates = np.log2(np.divide(errors[:-1], errors[1:]))
  np.testing.assert_allclose(rates, order, atol=0.2)


def test_unipc_makes_one_call_per_step_and_no_more():
  calls = []

  def velocity(x, sigma, level):
    jax.debug.callback(lambda s: calls.append(float(s)), sigma, ordered=True)
    return x

  schedule = schedules.solver_sigmas('wan', 5, 5.0)
  jax.block_until_ready(samplers.integrate(velocity, jnp.ones(3), schedule, 'unipc'))
  jax.effects_barrier()
  np.testing.assert_array_equal(np.float32(calls), schedule.sigmas[:-1])


def test_unipc_can_be_differentiated_down_to_level_zero():
  schedule = schedules.solver_sigmas('uniform', 4, 5.0)  # from level 1: both ends are singular

  def loss(x):
    return jnp.sum(samplers.integrate(lambda x, _, t: network(x, t), x, schedule, 'unipc') ** 2)

  assert np.all(np.isfinite(jax.grad(loss)(jnp.ones((2, 3)))))


def test_unknown_names_and_sizes_are_refused():
  schedule = schedules.solver_sigmas('wan', 2, 1.0)
  with pytest.raises(ConfigError, match='solver: expected one of'):
    samplers.integrate(lambda x, *_: x, jnp.ones(2), schedule, 'heun')
  with pytest.raises(ConfigError, match='grid: expected one of'):
    schedules.solver_sigmas('karras', 2, 1.0)
  for steps, shift in ((0, 1.0), (2, 0.0)):
    with pytest.raises(ConfigError, match='steps >= 1 and shift > 0'):
      schedules.solver_sigmas('wan', steps, shift)
