"""Metrics: averaged, one interval late, never silently wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.models import functional
from wallwm_jax.training import flops
from wallwm_jax.training.metrics import MetricLogger, NonFiniteLossError
from wallwm_jax.training.state import param_shapes, update_ema


def metrics(value: float):
  return {'loss': jnp.float32(value), 'grad_norm': jnp.float32(1.0)}


def logger(tiny, path, start=0, on_log=None, **train):
  config = tiny.config('1', train={'log_every': 2, 'steps': 9} | train)
  return MetricLogger(path, config, start, devices=2, progress=False, on_log=on_log)


def test_intervals_are_averaged_and_written_one_interval_late(tiny, tmp_path):
  seen = []
  with logger(tiny, tmp_path, on_log=seen.append) as log:
    for step in range(1, 6):
      log.add(step, metrics(step), bucket=2)
      assert len(seen) == (step >= 4), step
    with log.settled():
      assert [(r['step'], r['loss']) for r in seen] == [(2, 1.5), (4, 3.5), (5, 5.0)]
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == seen == log.history


def test_utilisation_is_model_flops_over_the_peak_of_the_mesh(tiny, tmp_path):
  with logger(tiny, tmp_path, peak_tflops=1e-3) as log:
    log.add(1, metrics(1), bucket=2)
    with log.settled():
      pass
  (record,) = log.history
  config = tiny.config('1')
  expected = flops.model_flops(config, 2) / record['step_time_s'] / (2 * 1e9)
  assert record['mfu'] == pytest.approx(expected)
  # B * V * F * P = 8 samples, 2 cameras, 3 latent frames, 2 patches.
  assert record['tokens_per_s'] * record['step_time_s'] == pytest.approx(8 * 2 * 3 * 2)


@pytest.mark.parametrize('name', ['loss', 'grad_norm'])
def test_divergence_names_the_step_and_its_interval(tiny, tmp_path, name):
  with logger(tiny, tmp_path) as log:
    log.add(1, metrics(1), bucket=2)
    log.add(2, metrics(1) | {name: jnp.float32(np.nan)}, bucket=2)
    with pytest.raises(NonFiniteLossError, match=rf'finite {name}, got nan at step 2 .*1\.\.2'):
      with log.settled():
        pytest.fail('a checkpoint would have been written')
  assert log.history == []


def test_divergence_names_the_parameter_whose_gradient_is_not_finite(tiny, tmp_path):
  config = tiny.config('1', train={'log_every': 1, 'steps': 9})
  names = ["'video/a' (2, 3)", "'video/b' (4,)"]
  with MetricLogger(tmp_path, config, 0, 1, progress=False, gradients=names) as log:
    log.add(1, metrics(1) | {'nonfinite_leaf': jnp.int32(-1)}, bucket=2)
    bad = {'grad_norm': jnp.float32(np.nan), 'nonfinite_leaf': jnp.int32(1)}
    log.add(2, metrics(1) | bad, bucket=2)
    with pytest.raises(NonFiniteLossError, match=r"step 2 .*gradient .* 'video/b' \(4,\)"):
      with log.settled():
        pass
  assert 'nonfinite_leaf' not in log.history[0]


def test_records_beyond_the_resumed_step_are_dropped(tiny, tmp_path):
  file = tmp_path / 'metrics.jsonl'
  file.write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n{"step": 6, "lo')
  with logger(tiny, tmp_path, start=3) as log:
    assert log.history == [{'step': 2, 'loss': 1.0}]
  assert file.read_text() == '{"step": 2, "loss": 1.0}\n'


def counted(function, *args) -> float:
  return jax.jit(function).lower(*args).cost_analysis()['flops']


@pytest.mark.parametrize('window', ['event', 'chunk'])
def test_analytic_flops_are_those_the_compiler_counts(tiny, window):
  """One layer (a scanned body is counted once), wide enough that matmuls are what costs."""
  c = tiny.config('1', window)
  wide = {'width': 512, 'heads': 4, 'ffn': 1024}
  model = dataclasses.replace(
    c.model,
    image_size=(64, 64),
    video=dataclasses.replace(c.model.video, layers=1, **wide),
    action=dataclasses.replace(c.model.action, **wide),
  )
  c = dataclasses.replace(c, model=model, data=dataclasses.replace(c.data, batch_size=1))
  params, batch = param_shapes(c), c.inputs_spec()
  frames = 3 if window == 'event' else 4
  latents = jax.ShapeDtypeStruct((1, 2, frames, *model.latent_size, 8), jnp.float32)
  features = jax.ShapeDtypeStruct((1, 1, 2, frames, model.patches, 512), jnp.float32)
  tau = functional.window_tau(model, window, frames)

  def video(params, z, text, view_mask):
    masks = functional.video_masks(view_mask, jnp.ones((1, frames), bool))
    return functional.video_forward(params, model, z, jnp.ones((1, frames)), text, masks)

  def action(params, features, batch):
    masks = functional.video_masks(batch.view_mask, jnp.ones((1, frames), bool))
    cache = functional.prefill_actions(params, model, features, tau, masks)
    noised = jnp.stack([batch.actions] * 3, 1)
    return functional.action_forward(
      params, model, noised, jnp.ones((1, 3)), batch.state, cache, batch.action_mask.any(-1)
    )

  found = counted(video, params['video'], latents, batch.text, batch.view_mask)
  assert 2 * flops.video_macs(c, 2) == pytest.approx(found, rel=0.05)
  found = counted(action, params['action'], features, batch)
  assert 2 * flops.action_macs(c, 2, draws=3) == pytest.approx(found, rel=0.05)


def test_average_forgets_the_random_start_of_a_short_run():
  ema = {'w': jnp.float32(100.0)}
  for step in range(50):
    ema = update_ema(ema, {'w': jnp.float32(1.0)}, step, 0.9999)
  assert float(ema['w']) == pytest.approx(1.0, abs=1e-3)
  late = update_ema({'w': jnp.float32(0.0)}, {'w': jnp.float32(1.0)}, 10**6, 0.9)
  assert float(late['w']) == pytest.approx(0.1)
