"""`wallwm convert`: the three families from the command line, there and back."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import public_files as public
import pytest

from wallwm_jax import cli, weights
from wallwm_jax.config import TextConfig, VideoConfig
from wallwm_jax.convert import wan_dit
from wallwm_jax.convert.plan import FAMILIES

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(capsys, *argv):
  code = cli.main(['convert', *map(str, argv)])
  out = capsys.readouterr()
  return code, out.out, out.err


@pytest.mark.parametrize('family', public.SMALL)
def test_there_and_back(family, tmp_path, capsys):
  src, tensors = public.small_checkpoint(tmp_path / 'src', family, shards=2, index=True)
  code, text, _ = run(capsys, family, '--src', src, '--out', tmp_path / 'out', '--mesh', 'fsdp=2')
  assert code == 0
  summary = json.loads(text)
  assert summary['component'] == FAMILIES[family].component
  assert summary['used'] == len(tensors)
  assert summary['parameters'] == sum(x.size for x in tensors.values())
  assert summary['digest'] == weights.digest(tmp_path / 'out') and summary['mesh'] == {'fsdp': 2}
  assert (tmp_path / 'out' / 'tokenizer.json').is_file() == FAMILIES[family].tokenizer

  back = ('--src', tmp_path / 'out', '--out', tmp_path / 'back', '--to', 'torch')
  code, text, _ = run(capsys, family, *back, '--shard-gb', 1e-5)
  assert code == 0
  files = json.loads(text)['files']
  assert len(files) > 1 and f'-of-{len(files):05d}.safetensors' in files[0]
  (index,) = (tmp_path / 'back').glob('*.safetensors.index.json')
  placed = json.loads(index.read_text())['weight_map']
  assert placed.keys() == tensors.keys() and {*placed.values()} == {*files}
  found = public.read_tensors(tmp_path / 'back')
  assert all(public.same_bits(found[key], x) for key, x in tensors.items())
  config = json.loads((tmp_path / 'back' / 'config.json').read_text())
  assert config == json.loads((src / 'config.json').read_text())
  assert (tmp_path / 'back' / 'tokenizer.json').is_file() == FAMILIES[family].tokenizer


@pytest.mark.parametrize('family', public.SMALL)
def test_a_dry_run_lists_every_key_and_writes_nothing(family, tmp_path, capsys):
  src, tensors = public.small_checkpoint(tmp_path / 'src', family)
  before = sorted(tmp_path.rglob('*'))
  code, text, _ = run(capsys, family, '--src', src, '--dry-run')
  assert code == 0 and sorted(tmp_path.rglob('*')) == before
  table, totals = text.split('\n{', 1)
  lines = table.splitlines()[1:]
  assert sorted(line.split()[1] for line in lines) == sorted(tensors)
  assert json.loads('{' + totals)['bytes'] == sum(x.nbytes for x in tensors.values())
  run(capsys, family, '--src', src, '--out', tmp_path / 'out')
  code, text, _ = run(capsys, family, '--src', tmp_path / 'out', '--to', 'torch', '--dry-run')
  assert code == 0 and {line.split()[0] for line in text.splitlines()[1:]} == {*tensors}


EXPERIMENT = """
import dataclasses
from wallwm_jax.config import CodecConfig, ExperimentConfig, ModelConfig, TextConfig, VideoConfig

def get_config():
  return ExperimentConfig(
    model=ModelConfig(
      video=VideoConfig(width=24, layers=3, heads=2, ffn=40, freq_dim=16),
      codec=CodecConfig(channels=5),
      text=TextConfig(width=12),
    )
  )
"""


def test_the_experiment_and_its_overrides_are_checked(tmp_path, capsys):
  src, _ = public.small_checkpoint(tmp_path / 'src', 'wan-dit')
  (tmp_path / 'tiny.py').write_text(EXPERIMENT)
  common = ('wan-dit', '--src', src, '--dry-run', '--config', tmp_path / 'tiny.py')
  assert run(capsys, *common)[0] == 0
  code, _, message = run(capsys, *common, '--config.model.video.ffn=44')
  assert code == 1
  assert 'model.video.ffn: expected 44 (the experiment), got 40 (the checkpoint).' in message


@pytest.mark.parametrize(
  'argv, words',
  [
    (('wan-dit', '--src', 'src'), ['--out']),
    (('wan-dit', '--src', 'nowhere', '--out', 'x'), ['nowhere', 'found nothing']),
    (('wan-vae', '--src', 'src', '--out', 'x'), ['cannot be converted as wan-vae']),
    (('wan-dit', '--src', 'src', '--out', 'x', '--mesh', 'fdsp=8'), ['fsdp=8,tensor=2']),
    (('wan-dit', '--src', 'src', '--out', 'x', '--mesh', 'fsdp=7'), ['not divisible by 7']),
    (('wan-dit', '--src', 'src', '--out', 'src'), ['expected a new folder']),
    (('wan-dit', '--src', 'src', '--out', 'x', '--to', 'torch'), ['manifest.json']),
    (('wan-dit', '--src', 'src', '--out', 'x', '--config.a=1'), ['without --config']),
    (('umt5', '--src', 'text', '--out', 'x'), ['tokenizer.json', '--tokenizer FILE']),
  ],
)
def test_refusals_are_one_message_and_leave_nothing(argv, words, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  public.small_checkpoint(tmp_path / 'src', 'wan-dit')
  public.small_checkpoint(tmp_path / 'text', 'umt5')
  (tmp_path / 'text' / 'tokenizer.json').unlink()
  code, _, message = run(capsys, *argv)
  assert code == 1 and message.startswith('wallwm convert: ')
  for word in words:
    assert word in message
  assert sorted(p.name for p in tmp_path.iterdir()) == ['src', 'text']


def test_weights_of_another_family_are_not_exported(tmp_path, capsys):
  src, _ = public.small_checkpoint(tmp_path / 'src', 'umt5')
  assert run(capsys, 'umt5', '--src', src, '--out', tmp_path / 'out')[0] == 0
  argv = ('--src', tmp_path / 'out', '--out', tmp_path / 'back', '--to', 'torch')
  code, _, message = run(capsys, 'wan-dit', *argv)
  assert code == 1 and 'wallwm convert umt5 --to torch' in message


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
  """Peak of everything resident, mapped pages included: 20 layers (240 MB) against one."""
  peaks = []
  for layers in (1, 20):
    config = VideoConfig(width=768, layers=layers, heads=6, ffn=1024, freq_dim=16)
    rng = np.random.default_rng(0)
    tensors = {
      e.diffusers: rng.standard_normal(e.shape, np.float32)
      for e in wan_dit.entries(config, 4, TextConfig().width)
    }
    src = public.write_checkpoint(tmp_path / f'src{layers}', tensors)
    for direction in (
      ['--src', src, '--out', tmp_path / f'out{layers}'],
      ['--src', tmp_path / f'out{layers}', '--out', tmp_path / f'back{layers}', '--to', 'torch'],
    ):
      argv = ['-m', 'wallwm_jax.cli', 'convert', 'wan-dit', *map(str, direction)]
      peaks.append(peak_memory(argv))
    size = sum(x.nbytes for x in tensors.values())
  assert size > 230e6
  growth = [(peaks[2] - peaks[0]) / 1e6, (peaks[3] - peaks[1]) / 1e6]
  assert max(growth) < 120, growth


def peak_memory(argv) -> int:
  """Bytes; measured by a process in between, which has no other child."""
  program = (
    'import resource, subprocess, sys\n'
    'subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)\n'
    'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', program, *argv], check=True, cwd=ROOT, capture_output=True, text=True
  )
  return int(done.stdout)
