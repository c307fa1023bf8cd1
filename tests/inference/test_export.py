"""Exported policies: the same bits, no model code, one program per platform, and refusals."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from wallwm_jax.data import stats as data_stats
from wallwm_jax.inference import export, exported, policy_functions
from wallwm_jax.inference.event import predict_event
from wallwm_jax.inference.export import Captions, Choice, export_policy, load, verify
from wallwm_jax.inference.policy_functions import export_program, flat_weights, policy_function
from wallwm_jax.types import (
  CheckpointError,
  ConfigError,
  DataError,
  InferenceParams,
  Language,
  NormStats,
  StatsMismatchError,
  Text,
)

BUCKETS = (2, 4)
HERE = Choice(('cpu',), (2,))
CAPTIONS = ('pick up the red block', 'push it away')


@pytest.fixture(scope='module')
def texts(cfg):
  rng = np.random.default_rng(5)
  features = rng.standard_normal((2, cfg.model.text.tokens, cfg.model.text.width))
  features[1, 2:] = 0
  mask = np.array([[True] * 4, [True, True, False, True]])
  return Captions(CAPTIONS, Text(features.astype(np.float32), mask))


@pytest.fixture(scope='module')
def folder(cfg, params, texts, lowered, tmp_path_factory):
  """A policy exported from a run that also has a language side."""
  path = tmp_path_factory.mktemp('policy')
  nothing = np.zeros(1)
  frozen = dataclasses.replace(params.frozen, language=Language({}, {}, nothing, nothing, nothing))
  whole = InferenceParams(params.model | {'heads': {'kernel': nothing}}, frozen)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(policy_functions, 'export_program', functools.partial(_lower_once, lowered))
    export_policy(cfg, whole, path, Choice(('cpu', 'tpu'), BUCKETS), texts)
  return path


@pytest.fixture(scope='module')
def policy(folder):
  return load(folder)


@pytest.fixture(scope='module')
def lowered():
  return {}


@pytest.fixture
def lower_once(lowered, monkeypatch):
  """Programs come from those that were lowered before: for tests of writing."""
  monkeypatch.setattr(policy_functions, 'export_program', functools.partial(_lower_once, lowered))


def _lower_once(lowered, cfg, weights, *choice):
  if choice not in lowered:
    lowered[choice] = export_program(cfg, weights, *choice)
  return lowered[choice]


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / 'copy')


@pytest.fixture
def make_rows(cfg):
  """make_rows(B, history): random inputs of B rows."""

  def make(rows: int, history: int = 0, seed: int = 0):
    rng, model = np.random.default_rng(seed), cfg.model
    shape = (rows, 2, 1 + 4 * history, 16, 16, 3)
    text = (rows, model.text.tokens, model.text.width)
    return {
      'frames': rng.integers(0, 256, shape, dtype=np.uint8),
      'state': rng.standard_normal((rows, 10)).astype(np.float32),
      'text_features': rng.standard_normal(text).astype(np.float32),
      'text_mask': np.ones(text[:2], bool),
      'key': rng.integers(0, 2**32, (rows, 2), dtype=np.uint32),
    }

  return make


def edit_manifest(folder, change):
  """Applies change(manifest) and writes it back."""
  manifest = json.loads((folder / 'manifest.json').read_text())
  change(manifest)
  (folder / 'manifest.json').write_text(json.dumps(manifest))


def sign(folder, name):
  """Makes the manifest vouch for a file as it is now."""
  data = (folder / name).read_bytes()
  entry = {'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()}
  edit_manifest(folder, lambda manifest: manifest['files'].update({name: entry}))


def committed(rows, steps, count):
  actions = np.random.default_rng(9).standard_normal((rows, steps, 10)).astype(np.float32)
  return {'committed': actions, 'committed_mask': np.tile(np.arange(steps) < count, (rows, 1))}


@pytest.mark.slow
@pytest.mark.parametrize('rows', [1, 3])
def test_an_artifact_computes_the_bits_of_the_jitted_function(cfg, params, policy, make_rows, rows):
  cases = [('event', 2, 0), ('event', 4, 0), ('unified', 2, 1)]
  for mode, bucket, history in cases:
    inputs = make_rows(rows, history) | committed(rows, 4 * bucket, 3)
    inputs['view_mask'] = np.array([[True, i % 2 == 0] for i in range(rows)])
    if mode == 'event':
      inputs['length'] = np.full(rows, bucket, np.int32)
    live = jax.jit(policy_function(cfg, policy_functions.window_of(cfg, mode, bucket)))
    want, got = live(flat_weights(params), inputs), getattr(policy, mode)(inputs)
    assert want['actions'].shape == (rows, 4 * bucket, 10) and want.keys() == got.keys()
    for name, value in want.items():
      np.testing.assert_array_equal(value, got[name], err_msg=f'{mode}-{bucket}: {name}')


def test_an_artifact_predicts_what_event_mode_does(cfg, params, policy, make_inputs):
  """Also without the inputs that have a default, by the library's own function."""
  obs, text = make_inputs()
  one = jax.tree.map(lambda x: np.asarray(x[:1]), (obs, text))
  live = jax.jit(functools.partial(predict_event, cfg=cfg, bucket=4))
  want = live(params, *one, jax.random.key(3))
  key = np.asarray(jax.random.key_data(jax.random.key(3)))[None]
  got = policy.event({
    'frames': one[0].frames, 'state': one[0].state, 'key': key,
    'text_features': one[1].features, 'text_mask': one[1].mask,
  })  # fmt: skip
  np.testing.assert_allclose(got['actions'], want.chunk.actions, atol=1e-5)
  np.testing.assert_allclose(got['latents'], want.latents, atol=1e-4)
  np.testing.assert_array_equal(got['latent_mask'], want.mask)


def test_rows_do_not_hear_their_neighbours(policy, make_rows):
  """Else requests could not be answered together."""
  many = make_rows(3) | {'length': np.array([2, 1, 2], np.int32)}
  together = policy.event(many)['actions']
  for row in range(3):
    alone = policy.event({name: x[row : row + 1] for name, x in many.items()})['actions']
    np.testing.assert_allclose(alone[0], together[row], atol=1e-5)
  assert not np.allclose(together[0], together[2])


def test_the_smallest_bucket_that_fits_answers(policy, make_rows):
  assert policy.buckets == [2, 4]
  for length, steps in ((1, 8), (2, 8), (3, 16), (4, 16)):
    assert policy.event(make_rows(1) | {'length': np.int32([length])})['actions'].shape[1] == steps
  inputs = make_rows(1) | {'length': np.int32([1])}
  held = policy.event(inputs | committed(1, 12, 9))  # nine steps need the longer one
  assert held['actions'].shape[1] == 16
  want = committed(1, 12, 9)['committed'][:, :4]  # the event is one latent long
  np.testing.assert_allclose(held['actions'][:, :4], want, atol=1e-5)


def test_what_makes_text_stays_out(params, folder):
  manifest = json.loads((folder / 'manifest.json').read_text())
  stored = dict(exported.read_tensors(folder, manifest, 'params.safetensors'))
  norm = {('norm', field.name) for field in dataclasses.fields(params.norm)}
  parts = {tuple(name.split('/')[:2]) for name in stored}
  assert parts == {('model', 'video'), ('model', 'action')} | norm
  for name, value in flat_weights(params).items():
    np.testing.assert_array_equal(stored[name], value)


def test_tensor_files_are_read_by_the_library_of_the_format(folder, tmp_path):
  numpy = pytest.importorskip('safetensors.numpy')
  assert len(numpy.load_file(folder / 'params.safetensors')) > 20
  whole = {'a': np.arange(3, dtype=np.int8), 'b': np.float32(2.5), 'c': np.zeros((0, 4), bool)}
  export.write_tensors(tmp_path / 'x', whole | {'d': jnp.ones((2, 3), jnp.bfloat16)})
  stored = numpy.load_file(tmp_path / 'x')
  assert stored['d'].dtype == ml_dtypes.bfloat16 and stored['d'].shape == (2, 3)
  for name, value in whole.items():
    np.testing.assert_array_equal(stored[name], value)


def test_parameters_keep_their_dtype(cfg, params, tmp_path):
  half = InferenceParams(
    jax.tree.map(lambda x: x.astype(jnp.bfloat16), params.model), params.frozen
  )
  export_policy(cfg, half, tmp_path / 'half', HERE)
  policy = load(tmp_path / 'half')
  kinds = {about['dtype'] for about in policy.manifest['params']['arrays'].values()}
  assert kinds == {'bfloat16', 'float32'}  # the statistics stay
  name = next(iter(flat_weights(half)))
  np.testing.assert_array_equal(policy._weights[name], flat_weights(half)[name])


def test_the_manifest_describes_the_boundary(cfg, folder, params):
  manifest = verify(folder)
  entries = {(e['mode'], e['bucket'], e['platform']): e for e in manifest['programs']}
  modes = [('event', 2), ('event', 4), ('unified', 2)]
  assert set(entries) == {(*mode, p) for mode in modes for p in ('cpu', 'tpu')}
  event = entries['event', 4, 'tpu']
  assert event['inputs']['frames']['shape'] == ['b', 2, 1, 16, 16, 3] and event['batch'] is None
  inputs = event['inputs']
  assert inputs['frames']['dtype'] == 'uint8' and 'm, rotation' in inputs['state']['unit']
  assert event['outputs']['actions']['shape'] == ['b', 16, 10]
  assert manifest['action_groups']['gripper'] == [9]
  assert manifest['config']['model']['views'] == ['front', 'wrist']
  assert manifest['requires']['jax'] == manifest['made_with']['jax'] == jax.__version__
  on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()}
  assert on_disk - {'manifest.json'} == set(manifest['files'])
  np.testing.assert_array_equal(
    np.float32(manifest['norm']['action_mean']), params.norm.action_mean
  )


def test_captions_come_along(policy, texts):
  assert policy.captions == list(CAPTIONS)
  got = policy.text(CAPTIONS)
  np.testing.assert_array_equal(got['text_features'], texts.text.features)
  np.testing.assert_array_equal(got['text_mask'], texts.text.mask)
  assert policy.text(CAPTIONS[1])['text_features'].shape == (1, 4, 8)
  message = "'pick up the rod block'.*nearest: 'pick up the red block'.*wallwm export --text"
  with pytest.raises(DataError, match=message):
    policy.text('pick up the rod block')
  with pytest.raises(DataError, match='captions: expected at least one'):
    policy.text([])


def test_captions_are_narrow_only_where_nothing_is_lost():
  exact, rough = np.float32([[[1.5, -2.0]]]), np.float32([[[1 / 3, 1.0]]])
  for features, dtype in ((exact, 'bfloat16'), (rough, 'float32')):
    stored = export._text_tensors(Captions(['a'], Text(features, np.ones((1, 1), bool))))
    assert stored['features/a'].dtype == dtype
    np.testing.assert_array_equal(stored['features/a'].astype(np.float32), features[0])


# --- platforms ---------------------------------------------------------------


def test_programs_hold_one_platform_only(folder):
  manifest = json.loads((folder / 'manifest.json').read_text())
  for entry in manifest['programs']:
    program = exported.read_program(folder, manifest, entry)
    assert program.platforms == (entry['platform'],)
    module = program.mlir_module()
    assert 'platform_index' not in module and 'stablehlo.case' not in module


def _double(x_ref, out_ref):
  out_ref[...] = 2 * x_ref[...]


def _by_row(x):
  def row(x):
    return pl.pallas_call(_double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

  return jax.vmap(row)(x.reshape(x.shape[0], 8, -1)).reshape(x.shape)


def _whole(x):
  return pl.pallas_call(_double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


@pytest.fixture
def with_kernel(monkeypatch):
  """with_kernel(kernel): the model meets a Pallas kernel on its way, on a TPU."""
  from wallwm_jax.models import functional

  normalise = functional.normalise_latents

  def install(kernel):
    def marked(latents, norm):
      other = functools.partial(jnp.multiply, 7.125)
      return jax.lax.platform_dependent(normalise(latents, norm), tpu=kernel, default=other)

    monkeypatch.setattr(functional, 'normalise_latents', marked)

  return install


def test_a_kernel_goes_into_the_program_of_its_platform_alone(cfg, params, with_kernel):
  """Of a choice of platforms nothing is left, whatever machine exports."""
  with_kernel(_by_row)
  for platform in ('tpu', 'cuda'):
    program = export_program(cfg, flat_weights(params), 'event', 2, platform, None)
    module = program.exported.mlir_module()
    assert ('@tpu_custom_call' in module) == (platform == 'tpu')
    assert ('dense<7.125' in module) == (platform == 'cuda')
    assert 'platform_index' not in module and program.batch is None


def test_a_program_that_takes_no_symbol_has_one_row(
  cfg, params, with_kernel, make_rows, tmp_path, caplog
):
  """What it could not do is told: here, in the manifest, and where other rows are asked for."""
  with_kernel(_whole)
  export_policy(cfg, params, tmp_path / 'one', HERE)
  assert 'event, bucket 2, cpu: one row per call' in caplog.text
  policy = load(tmp_path / 'one')
  assert policy.batch('event') == 1
  reason = policy.manifest['programs'][0]['batch_reason']
  assert 'no symbolic number of rows: ValueError: shape polymorphism for Pallas' in reason
  assert policy.event(make_rows(1))['actions'].shape == (1, 8, 10)
  with pytest.raises(DataError, match='expected 1 rows.*shape polymorphism.*got 2.*--batch'):
    policy.event(make_rows(2))


def test_kernels_are_kept_on_a_tpu_and_any_rows_elsewhere():
  """Of the 5B model: our kernels lay out rows by number, XLA takes a symbol."""
  from wallwm_jax.commands.export import shapes_of
  from wallwm_jax.presets import world_action

  config = world_action('wan2_2_5b', 'wan2_2')
  weights = flat_weights(shapes_of(config))
  programs = {
    platform: export_program(config, weights, 'event', 4, platform, None)
    for platform in ('cuda', 'tpu')
  }
  kernels = {
    platform: program.exported.mlir_module().count('@tpu_custom_call')
    for platform, program in programs.items()
  }
  assert programs['cuda'].batch is None and kernels['cuda'] == 0
  assert programs['tpu'].batch == 1 and kernels['tpu'] > 0
  expected = f'{kernels["tpu"]} kernel calls take no symbolic number of rows'
  assert programs['tpu'].batch_reason == expected


def test_a_program_is_refused_on_another_platform(folder, tmp_path):
  with pytest.raises(CheckpointError, match=r"platform of \['cpu', 'tpu'\].*'cuda' was asked for"):
    load(folder, platform='cuda')
  with pytest.raises(CheckpointError, match="device for platform='tpu', JAX finds none"):
    load(folder, platform='tpu')
  only = shutil.copytree(folder, tmp_path / 'only')
  edit_manifest(only, lambda manifest: manifest.update(platforms=['tpu']))
  with pytest.raises(CheckpointError, match=r"expected a platform of \['tpu'\].*'cpu' is where"):
    load(only)
  manifest = json.loads((folder / 'manifest.json').read_text())
  entry = next(e for e in manifest['programs'] if e['platform'] == 'tpu')
  program = exported.read_program(folder, manifest, entry)
  args = _arguments(program, lambda shape, dtype: np.zeros(shape, dtype))
  with pytest.raises(ValueError, match="exported for platforms.*'tpu'.*used on.*'cpu'"):
    jax.jit(program.call)(*args)


def _arguments(program, make):
  """Arguments of a program for three rows, of make(shape, dtype)."""
  shapes = [[n if isinstance(n, int) else 3 for n in a.shape] for a in program.in_avals]
  leaves = [make(shape, a.dtype) for shape, a in zip(shapes, program.in_avals)]
  return jax.tree.unflatten(program.in_tree, leaves)[0]


@pytest.mark.slow
def test_the_tpu_program_compiles_for_a_tpu(cfg, params, with_kernel):
  """As read back, with a kernel and any number of rows."""
  from wallwm_jax.parallel import aot

  with_kernel(_by_row)
  made = export_program(cfg, flat_weights(params), 'event', 2, 'tpu', None).exported
  program = jax.export.deserialize(made.serialize())
  place = jax.sharding.SingleDeviceSharding(aot.tpu_devices('v5p:2x2x1')[0])
  shapes = _arguments(program, functools.partial(jax.ShapeDtypeStruct, sharding=place))
  compiled = aot.compile_for_tpu(
    jax.jit(program.call).lower(*shapes), exec_time_optimization_effort=-1.0
  )
  text = compiled.as_text()
  assert 'custom_call_target="tpu_custom_call"' in text and 'conditional(' not in text
  assert [x.shape for x in jax.tree.leaves(compiled.out_info)][1] == (3, 8, 10)


def test_a_kernel_without_a_promise_is_noted():
  """Triton's encoding may change: its programs are bound to the JAX that wrote them."""

  def kernel(x):
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(_double, out, compiler_params=triton.CompilerParams(num_warps=4))(x)

  calls = policy_functions.UNSTABLE_CALLS
  allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in calls]
  trace = jax.export.export(jax.jit(kernel), platforms=['cuda'], disabled_checks=allowed)
  made = trace(jax.ShapeDtypeStruct((128, 128), jnp.float32))
  assert policy_functions.Program('event', 2, made, 1, '').unstable_calls == [*calls]


def test_another_fault_than_the_symbol_is_raised(cfg, params, monkeypatch):
  def broken(*args, **kwargs):
    raise ZeroDivisionError('in the model')

  monkeypatch.setattr(policy_functions.denoiser, 'predict', broken)
  with pytest.raises(ZeroDivisionError, match='in the model'):
    export_program(cfg, flat_weights(params), 'event', 2, 'cpu', None)


# --- without the package -----------------------------------------------------

_ALONE = """
import sys

allowed = {'policy', 'jax', 'jaxlib', 'numpy', 'ml_dtypes', 'opt_einsum', 'scipy', 'flatbuffers'}
allowed |= ALSO | set(sys.stdlib_module_names)

class Only:
  finders = list(sys.meta_path)

  def find_spec(self, name, path=None, target=None):
    top = name.split('.')[0]
    if top in allowed or top.startswith('_sysconfigdata'):
      found = (f.find_spec(name, path, target) for f in self.finders if hasattr(f, 'find_spec'))
      return next((spec for spec in found if spec is not None), None)

sys.meta_path[:] = [Only()]
IMPORT
policy = load(FOLDER)
import numpy as np
frames = np.full((2, 2, 1, 16, 16, 3), 7, np.uint8)
obs = {'frames': frames, 'state': np.ones((2, 10), np.float32)}
text = policy.text(['pick up the red block', 'push it away'])
answer = policy.event(obs | text | {'key': policy.keys(0, rows=2)})
np.save('actions.npy', answer['actions'])
for name in ('flax', 'optax', 'jaxtyping', 'wallwm_jax.models.functional'):
  try:
    __import__(name)
  except ImportError:
    continue
  raise AssertionError(f'{name} was not blocked')
try:
  policy.text('fly')
except ValueError as error:
  print(type(error).__name__, 'refused')
"""


@pytest.mark.slow
@pytest.mark.parametrize('how', ['policy.py alone', 'inference.export'])
def test_loads_with_jax_and_numpy_alone(folder, policy, tmp_path, how):
  """Once from the folder, where the package is not; once from the package without its libraries."""
  moved, empty = shutil.copytree(folder, tmp_path / 'moved'), tmp_path / 'empty'
  empty.mkdir()
  root, module, also = (
    (moved, 'policy', set())
    if how == 'policy.py alone'
    else (os.getcwd(), 'wallwm_jax.inference.export', {'wallwm_jax'})
  )
  script = _ALONE.replace('FOLDER', repr(str(moved))).replace('ALSO', repr(also)).replace(
    'IMPORT', f'sys.path.insert(0, {str(root)!r})\nfrom {module} import load'
  )  # fmt: skip
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  environment.pop('PYTHONPATH', None)
  result = subprocess.run(
    [sys.executable, '-c', script], cwd=empty, env=environment, capture_output=True, text=True,
    timeout=300,
  )  # fmt: skip
  assert result.returncode == 0 and 'DataError refused' in result.stdout, result.stderr
  frames = np.full((2, 2, 1, 16, 16, 3), 7, np.uint8)
  obs = {'frames': frames, 'state': np.ones((2, 10), np.float32)}
  want = policy.event(obs | policy.text(CAPTIONS) | {'key': policy.keys(0, rows=2)})
  np.testing.assert_array_equal(np.load(empty / 'actions.npy'), want['actions'])


# --- refusals ----------------------------------------------------------------


def test_other_statistics_are_refused(folder, params):
  load(folder, norm=params.norm)
  other = dataclasses.replace(params.norm, action_mean=params.norm.action_mean + 0.01)
  with pytest.raises(StatsMismatchError, match='from the caller'):
    load(folder, norm=other)
  with pytest.raises(StatsMismatchError, match='from the caller'):
    load(folder, norm=dataclasses.asdict(other))


def test_parameters_of_another_run_are_refused(copy):
  """Consistent files, but the statistics inside are not the ones the manifest promises."""
  manifest = json.loads((copy / 'manifest.json').read_text())
  arrays = dict(exported.read_tensors(copy, manifest, 'params.safetensors'))
  export.write_tensors(copy / 'params.safetensors', arrays | {
    'norm/state_scale': 2 * arrays['norm/state_scale']})
  sign(copy, 'params.safetensors')
  with pytest.raises(StatsMismatchError, match='from the parameters'):
    load(copy)
  del arrays['norm/state_scale']
  export.write_tensors(copy / 'params.safetensors', arrays)
  sign(copy, 'params.safetensors')
  with pytest.raises(CheckpointError, match='norm/state_scale.*missing'):
    load(copy)


@pytest.mark.parametrize(
  'name', ['programs/cpu/event-2.jaxexport', 'params.safetensors', 'text.safetensors']
)
def test_a_flipped_bit_is_noticed(copy, name):
  data = bytearray((copy / name).read_bytes())
  data[-9] ^= 1
  (copy / name).write_bytes(data)
  with pytest.raises(CheckpointError, match=f'{name}: expected sha256'):
    load(copy)
  data[12] ^= 0x55  # in the header of tensors
  (copy / name).write_bytes(data)
  with pytest.raises(CheckpointError, match=f'{name}: (expected sha256|damaged)'):
    load(copy)
  (copy / name).write_bytes(data[:-5])
  with pytest.raises(CheckpointError, match=f'{name}: expected .* bytes'):
    load(copy)


def test_files_of_other_platforms_may_stay_behind(copy, make_rows):
  shutil.rmtree(copy / 'programs/tpu')
  assert load(copy).event(make_rows(1))['actions'].shape == (1, 16, 10)
  with pytest.raises(CheckpointError, match='programs/tpu/.*: missing'):
    verify(copy)


@pytest.mark.parametrize(
  'name', ['manifest.json', 'programs/cpu/unified.jaxexport', 'params.safetensors']
)
def test_a_missing_file_is_named(copy, name):
  (copy / name).unlink()
  with pytest.raises(CheckpointError, match=name):
    load(copy)


def test_other_versions_are_refused(copy):
  def refused(change, message):
    original = (copy / 'manifest.json').read_text()
    edit_manifest(copy, change)
    with pytest.raises(CheckpointError, match=message):
      load(copy)
    (copy / 'manifest.json').write_text(original)

  refused(lambda m: m.update(format='wallwm-policy-9'), "format 'wallwm-policy-2', got 'wallwm-po")
  refused(lambda m: m['requires'].update(jax='9.1'), 'expected JAX 9.1 or newer')
  high = jax.export.maximum_supported_calling_convention_version
  for version, side in ((high + 1, 'Use a newer JAX'), (1, 'Use an older JAX')):
    refused(
      lambda m, v=version: m['programs'][0].update(calling_convention_version=v),
      f'calling convention of .* to {high}, which JAX .* got {version}. {side}',
    )
  kernel = '__gpu$xla.gpu.triton'

  def bind(manifest):
    manifest['programs'][0].update(unstable_calls=[kernel])
    manifest['made_with'].update(jax='0.9.9')

  refused(bind, 'run only on the JAX that wrote them, 0.9.9')

  def swap(manifest):
    first, second = (e for e in manifest['programs'] if e['mode'] == 'unified')
    first['file'], second['file'] = second['file'], first['file']

  refused(swap, 'expected a program for cpu .* got one for tpu')
  (copy / 'manifest.json').write_text('{')
  with pytest.raises(CheckpointError, match='not valid JSON'):
    load(copy)


def test_bytes_that_are_no_program_are_refused(copy):
  name = 'programs/cpu/unified.jaxexport'
  (copy / name).write_bytes(b'not a program at all, though signed for')
  sign(copy, name)
  with pytest.raises(CheckpointError, match=f'{name}: JAX .* cannot read'):
    load(copy)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'state': np.zeros((1, 10))}, r'event.state: expected float32 \[1, 10\], got float64'),
    ({'frames': np.zeros((1, 2, 3, 16, 16, 3), np.uint8)}, r'event.frames: .* uint8 \[1, 2, 1, 16'),
    ({'frames': np.zeros((0, 2, 1, 16, 16, 3), np.uint8)}, 'at least one row, got 0'),
    ({'lenght': np.int32([1])}, "not an input.*Did you mean 'length'"),
    ({'length': np.int32([5])}, r'1 to 4 future latents, got 5. .* \[2, 4\]'),
    ({'length': np.int32([0])}, '1 to 4 future latents'),
    ({'length': np.float32([1])}, 'event.length: expected int32'),
    ({'committed': np.zeros((1, 8, 10), np.float32)}, 'together with committed_mask'),
    (committed(1, 20, 20), 'at most 16 steps, got 20'),
    (committed(2, 8, 1), r'committed: expected float32 \[1, 8, 10\], got float32 \[2, 8, 10\]'),
    ({'committed': np.zeros(3, np.float32), 'committed_mask': np.True_}, 'committed: expected'),
    ({'key': np.zeros((2, 2), np.uint32)}, r'event.key: expected uint32 \[1, 2\]'),
  ],
)  # fmt: skip
def test_bad_inputs_are_refused(policy, make_rows, change, message):
  with pytest.raises(DataError, match=message):
    policy.event(make_rows(1) | change)


def test_missing_inputs_are_refused(policy, make_rows):
  inputs = make_rows(1, history=1)
  with pytest.raises(DataError, match=r"unified: \['key'\] missing"):
    policy.unified({name: x for name, x in inputs.items() if name != 'key'})
  with pytest.raises(DataError, match='unified.length: not an input'):
    policy.unified(inputs | {'length': np.int32([1])})


@pytest.mark.parametrize(
  ('choice', 'message'),
  [
    ((('gpu',), (2,)), "platforms: expected some of .* got {'gpu'}"),
    (((), (2,)), 'platforms'),
    ((('cpu', 'cpu'), (2,)), 'platforms: expected each once'),
    ((('cpu',), ()), 'buckets'),
    ((('cpu',), (2,), 0), 'batch: expected at least 1'),
  ],
)
def test_bad_choices_are_refused(choice, message):
  with pytest.raises(ConfigError, match=message):
    Choice(*choice)


# --- writing -----------------------------------------------------------------


def test_a_failed_write_leaves_the_old_policy(cfg, params, copy, lower_once, monkeypatch):
  """A disk that fills up on the way must not cost the policy that is there."""
  before = (copy / 'manifest.json').read_bytes()
  write = pathlib.Path.write_text

  def full(path, data, *args, **kwargs):
    if path.name == 'manifest.json':
      raise OSError(28, 'No space left on device')
    return write(path, data, *args, **kwargs)

  monkeypatch.setattr(pathlib.Path, 'write_text', full)
  with pytest.raises(OSError, match='No space left'):
    export_policy(cfg, params, copy, HERE)
  assert [p.name for p in copy.parent.iterdir()] == ['copy']
  assert (copy / 'manifest.json').read_bytes() == before
  verify(copy)


def test_a_policy_is_replaced_whole(cfg, params, copy, lower_once):
  (copy / '__pycache__').mkdir()  # whoever imported policy.py left it
  (copy / '__pycache__/policy.cpython-311.pyc').write_bytes(b'')
  export_policy(cfg, params, copy, HERE)
  assert verify(copy)['platforms'] == ['cpu'] and not (copy / 'programs/tpu').exists()
  assert [p.name for p in copy.parent.iterdir()] == ['copy']


def test_a_failed_rename_costs_nothing(cfg, params, copy, lower_once, monkeypatch):
  rename = os.rename

  def fails(source, target):
    if str(source).endswith('.partial'):
      raise OSError(5, 'Input/output error')
    rename(source, target)

  monkeypatch.setattr(os, 'rename', fails)
  with pytest.raises(OSError, match='Input/output'):
    export_policy(cfg, params, copy, HERE)
  assert verify(copy)['platforms'] == ['cpu', 'tpu']


def test_a_kill_between_the_renames_costs_nothing(cfg, params, copy):
  aside = copy.parent / '.copy.replaced'
  os.rename(copy, aside)
  with pytest.raises(CheckpointError, match=r'was here before is in .*\.copy\.replaced'):
    load(copy)
  with pytest.raises(ConfigError, match='event bucket'):
    export_policy(cfg, params, copy, Choice(('cpu',), (99,)))
  assert verify(copy)['platforms'] == ['cpu', 'tpu'] and not aside.exists()


def test_what_no_export_wrote_is_not_replaced(cfg, params, copy, tmp_path):
  (copy / 'notes.txt').write_text('do not lose me')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other/signature.json').write_text('{}')
  (tmp_path / 'file').write_text('')
  for out, name in (('copy', 'notes.txt'), ('other', 'signature.json'), ('file', 'file')):
    with pytest.raises(CheckpointError, match=name):
      export_policy(cfg, params, tmp_path / out, HERE)
  assert (copy / 'notes.txt').read_text() == 'do not lose me'


def test_programs_can_do_without_parameters(
  cfg, params, policy, lower_once, make_rows, tmp_path
):
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  export_policy(cfg, shapes, tmp_path / 'programs', Choice(('cpu',), (2, 4)))
  assert not (tmp_path / 'programs/params.safetensors').exists()
  with pytest.raises(CheckpointError, match='--programs-only'):
    load(tmp_path / 'programs')
  bare = load(tmp_path / 'programs', params=flat_weights(params))
  inputs = make_rows(2)
  np.testing.assert_array_equal(bare.event(inputs)['actions'], policy.event(inputs)['actions'])
  wrong = flat_weights(params) | {'norm/state_scale': np.ones(3, np.float32)}
  with pytest.raises(CheckpointError, match=r'norm/state_scale: expected float32 \[10\]'):
    load(tmp_path / 'programs', params=wrong)


def test_a_plan_tells_what_will_be_written(cfg, params, folder):
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  plan = export.describe(cfg, shapes, Choice(('cpu', 'tpu'), BUCKETS))
  manifest = verify(folder)
  assert set(plan['files']) == set(manifest['files']) - {'text.safetensors'} | {'manifest.json'}
  assert [p['inputs'] for p in plan['programs']] == [p['inputs'] for p in manifest['programs']]
  header = 8 + int.from_bytes((folder / 'params.safetensors').read_bytes()[:8], 'little')
  assert plan['params_bytes'] == manifest['files']['params.safetensors']['bytes'] - header


def test_statistics_hash_is_the_one_of_the_data_package(params):
  """Two packages that may not import each other must name the same statistics alike."""
  assert exported.stats_hash(params.norm) == data_stats.stats_hash(params.norm)
  assert exported.STATS == tuple(field.name for field in dataclasses.fields(NormStats))
