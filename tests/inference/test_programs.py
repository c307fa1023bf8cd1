"""Programs in a folder: read back by a restart, and never trusted where they do not fit."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.inference import programs, runtime
from wallwm_jax.inference.denoiser import Window, input_specs
from wallwm_jax.inference.programs import Programs
from wallwm_jax.types import ConfigError, DataError

pytestmark = pytest.mark.usefixtures('own_cache')


def scaled(x, y):
  calls.append(1)
  return {'sum': x + 3 * y}, y * 0


calls: list[int] = []  # one for each time that Python was run
ARGS = (np.float32([1, 2]), np.float32([3, 4]))


@pytest.fixture
def folder(tmp_path, cfg):
  """A folder with one program in it."""
  path = tmp_path / 'programs'
  Programs(path).load('scaled', scaled, ARGS, config=cfg)
  jax.clear_caches()
  return path


def load(folder, cfg, function=scaled, args=ARGS, **options):
  """(program, how often its Python was run), as a restart would load it."""
  jax.clear_caches()
  calls.clear()
  program = Programs(folder).load('scaled', function, args, config=cfg, **options)
  return program, len(calls)


def only(folder):
  (path,) = folder.glob('*.program')
  return path


def test_a_restart_runs_no_python_and_compiles_nothing(folder, cfg, caplog):
  program, traces = load(folder, cfg)
  assert (traces, program.traced, program.compiled) == (0, False, False)
  out, zero = program(*ARGS)
  np.testing.assert_array_equal(out['sum'], [10, 14])
  np.testing.assert_array_equal(zero, [0, 0])
  assert not caplog.records
  assert oct((folder / 'xla').stat().st_mode)[-3:] == '700'


def test_nothing_is_kept_without_a_folder(cfg):
  before = jax.config.jax_compilation_cache_dir
  program, traces = load(None, cfg)
  assert (traces, program.traced, program.compiled) == (1, True, True)
  assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize('change', ['config', 'shape', 'dtype', 'donate'])
def test_another_program_has_an_entry_of_its_own(folder, cfg, change, caplog):
  args, options = ARGS, {}
  if change == 'config':
    cfg = dataclasses.replace(cfg, name='another')
  elif change == 'shape':
    args = tuple(np.tile(x, 2) for x in ARGS)
  elif change == 'dtype':
    args = tuple(x.astype(np.int32) for x in ARGS)
  else:
    options = {'donate': (0,)}
  program, traces = load(folder, cfg, args=args, **options)
  assert program.traced and traces == 1 and len(list(folder.glob('*.program'))) == 2
  assert not caplog.records
  np.testing.assert_array_equal(program(*args)[0]['sum'][:2], [10, 14])


@pytest.mark.parametrize(
  ('key', 'value'),
  [('jax', '0.4.1'), ('jaxlib', '0.4.1'), ('platform', 'tpu'), ('device_kind', 'TPU v5p'),
   ('code', 'ffff'), ('format', 'wallwm-program-0'), ('name', 'other'), ('settings', 'x')],
)  # fmt: skip
def test_an_entry_made_elsewhere_is_named_and_built_anew(folder, cfg, caplog, key, value):
  path = only(folder)
  top, _, data = path.read_bytes().partition(b'\n')
  path.write_bytes(json.dumps(json.loads(top) | {key: value}).encode() + b'\n' + data)
  program, traces = load(folder, cfg)
  assert program.traced and traces == 1
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  assert f'{path}: not used, it was made with {key} {value!r}, here it is' in record.getMessage()
  np.testing.assert_array_equal(program(*ARGS)[0]['sum'], [10, 14])
  caplog.clear()
  assert not load(folder, cfg)[0].traced and not caplog.records  # mended


@pytest.mark.parametrize(
  ('spoil', 'reason'),
  [
    (lambda data: data[:-100], 'cut short or altered'),
    (lambda data: data[:-60] + bytes([data[-60] ^ 1]) + data[-59:], 'cut short or altered'),
    (lambda data: b'', 'no header'),
    (lambda data: b'[1, 2]\n', 'no header'),
    (lambda data: b'\x80\x04' + data, 'no header'),
  ],
)
def test_a_spoilt_program_is_named_and_built_anew(folder, cfg, caplog, spoil, reason):
  path = only(folder)
  path.write_bytes(spoil(path.read_bytes()))
  program, traces = load(folder, cfg)
  assert program.traced and traces == 1
  (record,) = caplog.records
  assert reason in record.getMessage() and str(path) in record.getMessage()
  np.testing.assert_array_equal(program(*ARGS)[0]['sum'], [10, 14])


def test_a_spoilt_executable_is_named_and_compiled_anew(folder, cfg, caplog):
  path = next(p for p in (folder / 'xla').iterdir() if p.name.endswith('-cache'))
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  program, traces = load(folder, cfg)
  assert (traces, program.compiled) == (0, True)
  assert f'{path}: not used, it is not the file that its checksum' in caplog.text
  np.testing.assert_array_equal(program(*ARGS)[0]['sum'], [10, 14])


def test_an_executable_from_elsewhere_is_not_trusted(folder, cfg, caplog):
  source = next(p for p in (folder / 'xla').iterdir() if p.name.endswith('-cache'))
  foreign = source.with_name('jit_evil-0123-cache')
  shutil.copy(source, foreign)
  program, _ = load(folder, cfg)
  assert not foreign.exists() and f'{foreign}: not used, it has no checksum' in caplog.text
  assert not program.compiled


def test_a_folder_that_others_may_write_to_is_refused(folder):
  os.chmod(folder, 0o777)
  with pytest.raises(ConfigError, match=r'expected a folder that only user .* mode 777.*chmod 700'):
    Programs(folder)


def test_what_was_not_compiled_is_refused(folder, cfg):
  program, _ = load(folder, cfg)
  with pytest.raises(DataError, match=r'scaled\[1\]: compiled for float32 \(2,\), got float32 \('):
    program(ARGS[0], np.zeros(3, np.float32))
  with pytest.raises(DataError, match=r'scaled\[0\]: compiled for float32 .* got int32'):
    program(ARGS[0].astype(np.int32), ARGS[1])
  with pytest.raises(DataError, match='other fields'):
    program({'x': ARGS[0]}, ARGS[1])


def test_what_cannot_be_lowered_is_named(tmp_path, cfg, caplog):
  def asks(x, y):
    return jax.pure_callback(lambda x: x + 1, jax.typeof(x), x) + y

  for _ in range(2):
    program, _ = load(tmp_path / 'p', cfg, asks)
    assert program.traced
    np.testing.assert_array_equal(program(*ARGS), [5, 7])
  assert 'scaled: cannot be kept as a lowered program, so every start traces it' in caplog.text


def test_the_runtime_goes_through_a_folder_unchanged(cfg, params, make_inputs, tmp_path):
  """Trees, keys and donation survive; the numbers are those of the function itself."""
  window = Window.event(cfg, 2)
  obs, text = make_inputs()
  length, keys = np.array([2, 1], np.int32), jax.random.split(jax.random.key(0), 2)
  replan = functools.partial(runtime.replan, cfg=cfg, window=window)
  zero = jnp.zeros(2, jnp.int32)
  turn = runtime.Turn(length, zero, zero)

  def memory():
    return runtime.new_memory(params, keys, cfg=cfg, window=window)

  want = jax.jit(replan)(params, memory(), obs, text, turn)
  for restart in (False, True):
    jax.clear_caches()
    args = (params, memory(), obs, text, turn)
    program = Programs(tmp_path / 'p').load('replan', replan, args, config=cfg, donate=(1,))
    assert (program.traced, program.compiled) == (not restart, not restart)
    got = program(*args)
    plain = functools.partial(jax.tree.map, lambda x: jax.random.key_data(x)
                              if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    jax.tree.map(np.testing.assert_array_equal, plain(got), plain(want))
    assert all(x.is_deleted() for x in jax.tree.leaves(args[1]))


def test_code_is_part_of_the_key(tmp_path, monkeypatch):
  before = programs.code_digest()
  (tmp_path / 'a.py').write_text('x = 1')
  monkeypatch.setattr(programs, '_PACKAGE', tmp_path)
  programs.code_digest.cache_clear()
  first = programs.code_digest()
  (tmp_path / 'a.py').write_text('x = 2')
  programs.code_digest.cache_clear()
  assert len({before, first, programs.code_digest()}) == 3
  monkeypatch.undo()
  programs.code_digest.cache_clear()


def test_specs_are_enough(cfg, tmp_path):
  """Weights need not be there to compile."""
  window = Window.event(cfg, 2)
  obs, _ = input_specs(cfg, window, 3)
  program = Programs(tmp_path / 'p').load('sum', lambda o: o.state.sum(0), (obs,), config=cfg)
  real = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), obs)
  np.testing.assert_array_equal(program(real), np.full(10, 3))
