"""`wallwm quantize`: from a run to a quantised run, its report, and what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from wallwm_jax import cli
from wallwm_jax.commands.evaluators import Windows, action_predictor
from wallwm_jax.training.checkpoints import Checkpoints, load_inference, load_params_for_init
from wallwm_jax.training.state import TrainState
from wallwm_jax.types import CheckpointError, ConfigError

UP = 'video/blocks/ffn/up/kernel'


@pytest.fixture(scope='module')
def workdir(config, params, tmp_path_factory):
  """A run of random weights, heads included: fresh ones predict nothing."""
  rng = np.random.default_rng(0)
  model = jax.tree.map(
    lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), params.model
  )
  path = tmp_path_factory.mktemp('runs') / 'float'
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=(4,)))
  state = TrainState(np.int32(3), model, model, {}, np.zeros(2, np.uint32))
  with Checkpoints(path, keep=1) as saved:
    saved.save(state, {}, params.norm, config)
  return path


def quantise(workdir, store, *more):
  argv = ['quantize', '--workdir', workdir, '--store', store.path, '--calibrate', '4', *more]
  return cli.main([str(x) for x in argv])


@pytest.fixture(scope='module')
def written(workdir, store, tmp_path_factory):
  folder = tmp_path_factory.mktemp('quantised')
  out, found, page = folder / 'int8', folder / 'report.json', folder / 'report.html'
  assert quantise(workdir, store, '--out', out, '--report', found, page) == 0
  return out, json.loads(found.read_text()), page.read_text()


def test_a_quantised_run_is_loaded_like_any_other(workdir, written, store):
  (config, exact), (same, got) = load_inference(workdir), load_inference(written[0])
  assert same == config
  kernel = got.model['video']['blocks']['ffn']['up']['kernel']
  assert {name: str(x.dtype) for name, x in kernel.items()} == {
    'q': 'int8', 'scale': 'float32', 'smooth': 'float32'
  }  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, got.norm, exact.norm)
  batch = next(Windows(config, store, exact.norm).batches())
  old, new = (action_predictor(config, p)(batch) for p in (exact, got))
  error = np.linalg.norm(new - old) / np.linalg.norm(old)
  assert 0 < error < 0.1


def test_the_report_adds_up(written, store):
  _, report, page = written
  config = report['recipe']
  assert config['dtype'] == 'int8' and config['activations'] and report['environment']['device']
  assert report['n'] == 8 and set(report['actions']) == {
    'mae', 'position', 'rotation', 'gripper', 'endpoint'
  }  # fmt: skip
  for row in report['actions'].values():
    assert row['low'] <= row['change'] <= row['high']
    assert row['quantised'] / row['reference'] - 1 == pytest.approx(row['change'], abs=1e-6)
    assert abs(row['quantised'] - row['reference']) <= row['difference'] * (1 + 1e-6)
  before, after = (report['bytes'][name] for name in ('before', 'after'))
  assert before['matrices'] == 4 * after['eight_bits'] > 4 * after['matrices'] / 1.5
  assert before['towers'] - after['towers'] == before['matrices'] - after['matrices']
  rows = {(row['path'], row['layer']) for row in report['matrices']}
  assert len(rows) == len(report['matrices']) and (UP, 1) in rows
  assert [len(report['blocks'][tower]) for tower in ('video', 'action')] == [2, 2]
  assert page.count('<tr>') == 5 + 4 + len(rows) + 3


def edited(out, tmp_path, change):
  """A copy of a quantised run with its meta changed."""
  copy = shutil.copytree(out, tmp_path / 'copy')
  (file,) = copy.glob('checkpoints/3/meta/metadata')
  meta = json.loads(file.read_text())
  change(meta)
  file.write_text(json.dumps(meta))
  return copy


def test_changed_parameters_are_refused_by_name(written, tmp_path):
  copy = edited(written[0], tmp_path, lambda m: m['digests'].update({f'{UP}/q': '0' * 64}))
  with pytest.raises(CheckpointError, match=f'{UP}/q: expected sha256 000'):
    load_inference(copy)


def test_a_record_of_another_quantisation_is_refused_by_name(written, tmp_path):
  def change(meta):
    meta['quantized']['choices'][UP]['kept'] = True

  with pytest.raises(CheckpointError, match=f'{UP}: expected .*got absent'):
    load_inference(edited(written[0], tmp_path, change))


def test_damaged_files_are_refused(written, tmp_path):
  copy = shutil.copytree(written[0], tmp_path / 'copy')
  largest = max(copy.glob('checkpoints/3/params/**/d/*'), key=lambda p: p.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 255
  largest.write_bytes(data)
  with pytest.raises(CheckpointError, match='cannot be read|expected sha256'):
    load_inference(copy)


def test_products_that_this_device_lacks_are_refused(written, tmp_path):
  def change(meta):
    meta['quantized']['recipe']['dtype'] = 'float8_e4m3fn'

  with pytest.raises(ConfigError, match='float8_e4m3fn products are not supported on cpu'):
    load_inference(edited(written[0], tmp_path, change))


def test_training_does_not_start_from_a_quantised_run(written, params):
  with pytest.raises(CheckpointError, match='expected float weights to train'):
    load_params_for_init(written[0], jax.eval_shape(lambda: params.model))
  with (
    Checkpoints(written[0], keep=1) as saved,
    pytest.raises(CheckpointError, match='expected float weights to train'),
  ):
    saved.restore(TrainState(np.int32(3), params.model, {}, {}, np.zeros(2, np.uint32)))


@pytest.mark.parametrize(
  'more, match',
  (
    (('--report', 'report.txt'), '.json or .html'),
    ((), '--out, --report or both'),
    (('--out', 'new', '--calibrate', '0'), '--calibrate: expected at least one'),
    (('--out', 'new', '--block', '-1'), 'block: expected channels'),
    (('--out', '.'), 'expected a new folder'),
  ),
)
def test_bad_arguments_are_refused(workdir, store, more, match, capsys, tmp_path, monkeypatch):
  (tmp_path / 'something').touch()
  monkeypatch.chdir(tmp_path)
  assert quantise(workdir, store, *more) == 1
  assert match in capsys.readouterr().err


def test_a_quantised_run_is_not_quantised_again(written, store, capsys, tmp_path):
  assert quantise(written[0], store, '--out', tmp_path / 'twice') == 1
  assert 'is quantised already' in capsys.readouterr().err
  assert not (tmp_path / 'twice').exists()
