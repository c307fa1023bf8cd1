"""Quantised models: what is chosen, that they run wherever float ones do, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.inference.calibrate import calibrate, feature_errors, targets
from wallwm_jax.inference.event import predict_event
from wallwm_jax.inference.quantize import (
  RECIPES,
  Quantization,
  QuantizeConfig,
  check_device,
  quantize,
  sizes,
)
from wallwm_jax.models.quantised import pack
from wallwm_jax.types import (
  CheckpointError,
  ConfigError,
  DataError,
  InferenceParams,
  Observation,
  Text,
)

KEY = jax.random.key(3)
UP = 'video/blocks/ffn/up/kernel'


@pytest.fixture(scope='module')
def predict(cfg):
  """The jitted event mode of two rows: f(params, obs, text)."""
  length = jnp.array([1, 2], jnp.int32)
  event = functools.partial(predict_event, key=KEY, cfg=cfg, bucket=2, length=length)
  return jax.jit(lambda params, obs, text: event(params, obs, text).chunk.actions)


@pytest.fixture(scope='module')
def make_predict(predict):
  return lambda params: lambda batch: predict(params, *batch)


@pytest.fixture(scope='module')
def calibration(params, make_predict, make_inputs):
  return calibrate(params, make_predict, [make_inputs(seed=seed) for seed in range(2)])


@pytest.fixture(scope='module')
def int8(params, calibration):
  return quantize(params, RECIPES['int8'], calibration)


def leaf(params, path):
  return functools.reduce(lambda node, name: node[name], path.split('/'), params.model)


def replaced(params, path, value):
  def put(node, names):
    return node | {names[0]: put(node[names[0]], names[1:]) if names[1:] else value}

  return dataclasses.replace(params, model=put(params.model, path.split('/')))


def test_calibration_sees_every_matrix_that_runs(params, calibration, cfg):
  assert calibration.keys() == targets(params).keys()
  idle = {path for path, layers in calibration.items() if layers[0] is None}
  assert idle == {'action/blocks/state_attn/q/kernel'}  # one state token: nothing depends on x
  for path, layers in calibration.items():
    assert len(layers) == cfg.model.video.layers
    for seen in layers if path not in idle else ():
      assert seen.rows.shape == (len(seen.rows), leaf(params, path).shape[-2])
      assert (np.abs(seen.rows).max(0) <= seen.largest).all() and seen.outlier >= 1
  # Two batches: three video forwards each, or three action steps with 8 or fewer rows of tokens.
  assert len(calibration[UP][0].rows) == 2 * 3 * 32


def test_the_inputs_of_the_second_layer_are_told_from_those_of_the_first(calibration):
  first, second = calibration[UP]
  assert not np.allclose(first.largest, second.largest)


@pytest.mark.parametrize('name', ('int8', 'fp8', 'int8-weights'))
def test_recipes_keep_predictions_and_shrink_weights(
  name, params, calibration, predict, make_inputs, int8
):
  model, chosen = int8 if name == 'int8' else quantize(params, RECIPES[name], calibration)
  exact, got = (np.asarray(predict(p, *make_inputs())) for p in (params, model))
  error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
  assert 0 < error < (0.05 if name.startswith('int8') else 0.15)
  before, after = sizes(params), sizes(model)
  assert before['eight_bits'] == 0 and 4 * after['eight_bits'] == before['matrices']
  assert after['towers'] - after['matrices'] == before['towers'] - before['matrices']
  assert isinstance(leaf(model, UP), dict) and not any(c.kept for c in chosen.choices.values())
  outside = jax.tree.map(lambda x: x, params.model['video']['head'])
  jax.tree.map(np.testing.assert_array_equal, model.model['video']['head'], outside)


def test_quantising_is_deterministic(params, make_predict, make_inputs, int8):
  again = calibrate(params, make_predict, [make_inputs(seed=seed) for seed in range(2)])
  model, chosen = quantize(params, RECIPES['int8'], again)
  assert chosen == int8[1]
  jax.tree.map(np.testing.assert_array_equal, model.model, int8[0].model)


def test_smoothing_is_chosen_where_inputs_have_outliers(params, calibration):
  """The same matrix with one input channel 100 times as large: no smoothing loses the others."""
  spoilt = []
  for seen in calibration[UP]:
    factor = np.where(np.arange(len(seen.largest)) == 3, 100, 1).astype(np.float32)
    spoilt.append(type(seen)(seen.rows * factor, seen.largest * factor))
  outliers = dict(calibration) | {UP: tuple(spoilt)}
  recipe = RECIPES['int8']
  _, chosen = quantize(params, recipe, outliers)
  _, plain = quantize(params, dataclasses.replace(recipe, strengths=(0.0,)), outliers)
  assert min(chosen.choices[UP].strength) > 0
  assert max(chosen.choices[UP].error) < 0.7 * min(plain.choices[UP].error)
  assert min(chosen.choices[UP].outlier) > 20


def test_sensitive_matrices_stay_as_they_are(params, calibration, int8):
  errors = {path: max(choice.error) for path, choice in int8[1].choices.items()}
  limit = float(np.median(list(errors.values())))
  recipe = dataclasses.replace(RECIPES['int8'], tolerance=limit, keep=('^action/.*attn/o/',))
  model, chosen = quantize(params, recipe, calibration)
  kept = {path for path, choice in chosen.choices.items() if choice.kept}
  wanted = {p for p, e in errors.items() if e > limit or p.startswith('action/') and '/o/' in p}
  assert kept == wanted and 0 < len(kept) < len(errors)
  for path in kept:
    np.testing.assert_array_equal(leaf(model, path), leaf(params, path))


def test_the_record_goes_through_json_and_tells_the_shapes(params, int8):
  model, chosen = int8
  back = Quantization.from_json(json.loads(json.dumps(chosen.to_json())))
  assert back == chosen
  shapes = back.shapes(jax.eval_shape(lambda: params.model))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
    lambda x: (x.shape, x.dtype), model.model
  )
  with pytest.raises(CheckpointError, match='expected recipe and choices'):
    Quantization.from_json({'recipe': {'dtype': 'int8', 'bits': 8}, 'choices': {}})


def test_block_errors_are_those_of_the_blocks(params, make_predict, make_inputs):
  """What differs in the last video block alone is read before it only through earlier steps."""
  down = leaf(params, 'video/blocks/ffn/down/kernel')
  changed = replaced(params, 'video/blocks/ffn/down/kernel', down.at[1].multiply(1.01))
  found = feature_errors(params, changed, make_predict, [make_inputs()])
  assert {tower: len(of) for tower, of in found.items()} == {'video': 2, 'action': 2}
  assert 0 < found['video'][0] < found['video'][1] < 0.05
  assert all(0 < error < 0.05 for error in found['action'])


def test_a_quantised_model_vmaps(params, int8, cfg, make_inputs):
  obs, text = make_inputs()
  lanes = jax.tree.map(lambda x: x[:, None], (obs, text))
  one = functools.partial(predict_event, key=KEY, cfg=cfg, bucket=2)
  run = jax.jit(jax.vmap(lambda obs, text: one(int8[0], obs, text).chunk.actions))
  assert run(*lanes).shape == (2, 1, 8, 10) and np.isfinite(run(*lanes)).all()


def test_a_quantised_model_is_exported_as_it_is(params, int8, predict, make_inputs):
  """Serialised and read back, over plain dicts in eight bits: bit by bit what it was."""
  obs, text = make_inputs()

  def run(model, inputs):
    obs, text = Observation(*inputs[:3]), Text(*inputs[3:])
    return predict(InferenceParams(model, params.frozen), obs, text)

  args = int8[0].model, (obs.frames, obs.state, obs.view_mask, text.features, text.mask)
  program = jax.export.export(jax.jit(run))(*args)
  again = jax.export.deserialize(program.serialize())
  assert {'int8'} < {str(x.dtype) for x in again.in_avals}
  np.testing.assert_array_equal(again.call(*args), jax.jit(run)(*args))


@pytest.mark.parametrize(
  'spoil, match',
  (
    (lambda p: replaced(p, UP, leaf(p, UP).at[1, 0, 0].set(jnp.nan)), f'{UP}: expected finite'),
    (lambda p: replaced(p, UP, leaf(p, UP).at[0, 0, 0].set(jnp.inf)), f'{UP}: expected finite'),
    (lambda p: InferenceParams({'video': p.model['video']}, p.frozen), 'without .*action'),
    (lambda p: replaced(p, UP, leaf(p, UP)[:, :-1]), f'another model: {UP}'),
    (lambda p: replaced(p, UP, leaf(p, UP)[:1]), f'another model: {UP}: expected 1 layers'),
  ),
)
def test_weights_that_cannot_be_quantised_are_refused(params, calibration, spoil, match):
  with pytest.raises((CheckpointError, ConfigError), match=match):
    quantize(spoil(params), RECIPES['int8'], calibration)


def test_what_is_quantised_already_is_refused(int8, calibration):
  with pytest.raises(ConfigError, match='is quantised already'):
    quantize(int8[0], RECIPES['fp8'], calibration)


def test_parts_of_another_model_are_refused_when_it_runs(int8, predict, make_inputs):
  kernel = leaf(int8[0], UP)
  wrong = replaced(int8[0], UP, kernel | {'scale': kernel['scale'][..., :-1]})
  with pytest.raises(CheckpointError, match='quantised matrix blocks/ffn/up/kernel'):
    predict(wrong, *make_inputs())


def test_calibration_needs_batches_and_finite_inputs(params, make_predict, make_inputs):
  with pytest.raises(DataError, match='at least one batch'):
    calibrate(params, make_predict, [])
  table = leaf(params, 'action/state_in/bias')
  broken = replaced(params, 'action/state_in/bias', jnp.full_like(table, jnp.nan))
  with pytest.raises(DataError, match='expected finite inputs'):
    calibrate(broken, make_predict, [make_inputs()])


@pytest.mark.parametrize(
  'changed',
  ({'dtype': 'int4'}, {'block': 0}, {'strengths': ()}, {'strengths': (1.0,)}, {'tolerance': 0.0}),
)
def test_recipes_are_checked(changed):
  with pytest.raises(ConfigError, match=next(iter(changed))):
    QuantizeConfig(**changed)


def device(platform, kind, capability=''):
  return types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


@pytest.mark.parametrize(
  'where, able',
  (
    (device('tpu', 'TPU v4'), {'int8'}),
    (device('tpu', 'TPU v5'), {'int8'}),
    (device('tpu', 'TPU v5 lite'), {'int8'}),
    (device('tpu', 'TPU v6 lite'), {'int8', 'fp8'}),
    (device('tpu', 'TPU7x'), {'int8', 'fp8'}),
    (device('tpu', 'TPU v3'), set()),
    (device('gpu', 'NVIDIA A100', '8.0'), {'int8'}),
    (device('gpu', 'NVIDIA H100', '9.0'), {'int8', 'fp8'}),
    (device('gpu', 'NVIDIA B200', '10.0'), {'int8', 'fp8'}),
    (device('cpu', 'cpu'), {'int8'}),
  ),
)
@pytest.mark.parametrize('name', ('int8', 'fp8'))
def test_products_that_a_device_lacks_are_refused(where, able, name, recwarn):
  if name in able:
    check_device(RECIPES[name], where)
    check_device(RECIPES[f'{name}-weights'], where)
    assert not recwarn
    return
  with pytest.raises(ConfigError, match=f'not supported on {where.device_kind}.*{name}-weights'):
    check_device(RECIPES[name], where)
  with pytest.warns(UserWarning, match='saves memory and bandwidth, not arithmetic'):
    check_device(RECIPES[f'{name}-weights'], where)


def test_packed_matrices_do_not_depend_on_the_rest(params, int8):
  """A weights-only recipe packs what `pack` does."""
  model = int8[0]
  smooth = leaf(model, UP)['smooth']
  expected = pack(leaf(params, UP), 'int8', None, smooth)
  jax.tree.map(np.testing.assert_array_equal, leaf(model, UP), expected)
