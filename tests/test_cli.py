"""The command line: help of every verb, overrides, and errors as one clear message."""

import argparse
import pathlib
import subprocess
import sys

import pytest

from wallwm_jax import cli
from wallwm_jax.commands import settings
from wallwm_jax.config import ExperimentConfig, to_config_dict
from wallwm_jax.types import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXPERIMENT = """
from wallwm_jax.config import ExperimentConfig, to_config_dict

def get_config():
  return to_config_dict(ExperimentConfig(name='tiny'))
"""


@pytest.fixture
def experiment(tmp_path) -> pathlib.Path:
  path = tmp_path / 'tiny.py'
  path.write_text(EXPERIMENT)
  return path


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()):
  """Every leaf command of the parser as its words."""
  groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
  if not groups:
    yield words
  for group in groups:
    for name, sub in group.choices.items():
      yield from commands(sub, (*words, name))


def test_every_promised_command_exists():
  found = {' '.join(words) for words in commands(cli.make_parser())}
  assert found >= {
    'quickstart',
    'convert qwen',
    'convert umt5',
    'convert wan-dit',
    'convert wan-vae',
    'data build',
    'data cluster',
    'data demo',
    'data doctor',
    'data encode',
    'data inspect',
    'data report',
    'data stats',
    'data verify',
    'tiny-vlm',
    'train',
    'eval openloop',
    'eval closedloop',
    'eval language',
    'eval video',
    'rollout',
    'export',
    'serve',
    'bench',
  }


@pytest.mark.parametrize('words', sorted(commands(cli.make_parser())), ids=' '.join)
def test_help_explains_and_shows_an_example(words, capsys):
  with pytest.raises(SystemExit) as stopped:
    cli.main([*words, '--help'])
  assert stopped.value.code == 0
  text = capsys.readouterr().out
  assert f'example:\n  wallwm {" ".join(words)}' in text


def test_help_is_quick_because_it_imports_nothing_heavy():
  program = (
    'import sys\nfrom wallwm_jax import cli\n'
    'try:\n  cli.main(["train", "--help"])\nexcept SystemExit:\n  pass\n'
    'heavy = {"jax", "flax", "grain", "numpy", "mujoco", "matplotlib"} & set(sys.modules)\n'
    'assert not heavy, heavy\n'
  )
  subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_experiments_of_the_checkout_load():
  found = sorted((ROOT / 'experiments').glob('*.py'))
  assert found
  for path in found:
    assert isinstance(settings.load_experiment(path), ExperimentConfig)


def test_overrides_reach_every_kind_of_field(experiment):
  config = settings.load_experiment(
    experiment,
    [
      '--config.optim.lr=1e-4',
      '--config.data.buckets=2,4',
      '--config.train.stage=2',
      '--config.name=other',
      '--config.data.store=/some/where=odd',
      '--config.optim.nesterov=false',
      '--config.train.steps=7',
      '--config.model.views=("front",)',
      '--config.diffusion.shift=3',
    ],
  )
  assert config.optim.lr == 1e-4 and config.data.buckets == (2, 4) and config.train.stage == '2'
  assert (
    config.name == 'other'
    and config.data.store == '/some/where=odd'
    and config.optim.nesterov is False
  )
  assert config.train.steps == 7 and config.model.views == ('front',)
  assert config.diffusion.shift == 3.0 and isinstance(config.diffusion.shift, float)
  one = settings.load_experiment(experiment, ['--config.data.buckets=3'])
  assert one.data.buckets == (3,)


@pytest.mark.parametrize(
  'override, words',
  [
    ('--config.optim.lrr=1', ['config.optim.lrr', 'unknown field', "'lr'"]),
    ('--config.optm.lr=1', ['config.optm', 'unknown section', "'optim'"]),
    ('--config.model.video.widht=64', ['config.model.video.widht', "'width'"]),
    ('--config.optim.lr=fast', ['config.optim.lr', 'expected float', "'fast'"]),
    ('--config.train.steps=1.5', ['config.train.steps', 'expected int', '1.5']),
    ('--config.train.stage=9', ['config.train.stage', "'joint'", "'9'"]),
    ('--config.model.image_size=48', ['config.model.image_size', 'expected 2 entries', '1']),
    ('--config.optim=1', ['config.optim', 'is a section', 'lr']),
    ('--config.optim.lr', ['--config.section.field=value']),
    ('--learning-rate=1', ['--learning-rate=1', '--config.section.field=value']),
  ],
)
def test_bad_overrides_say_expected_and_got(experiment, override, words):
  with pytest.raises(ConfigError) as caught:
    settings.load_experiment(experiment, [override])
  for word in words:
    assert word in str(caught.value)


def test_a_config_may_also_be_a_dataclass(tmp_path):
  path = tmp_path / 'plain.py'
  path.write_text(
    EXPERIMENT.replace(
      "to_config_dict(ExperimentConfig(name='tiny'))", "ExperimentConfig(name='x')"
    )
  )
  assert settings.load_experiment(path).name == 'x'


def test_overriding_does_not_change_the_file_s_dict():
  config = to_config_dict(ExperimentConfig())
  settings.apply_overrides(config, ['--config.optim.lr=0.5'])
  assert config.optim.lr != 0.5


def test_missing_experiment_names_the_nearest_file(experiment):
  with pytest.raises(ConfigError, match=r'expected a Python file.*tiny\.py'):
    settings.load_experiment(experiment.with_name('tinny.py'))
  broken = experiment.with_name('broken.py')
  broken.write_text('x = 1\n')
  with pytest.raises(ConfigError, match='get_config'):
    settings.load_experiment(broken)


def run(capsys, *argv: str) -> tuple[int, str]:
  code = cli.main([str(a) for a in argv])
  return code, capsys.readouterr().err


@pytest.mark.parametrize(
  'argv, words',
  [
    (('data', 'inspect', 'nowhere'), ['nowhere']),
    (('data', 'doctor', 'nowhere', '--config', 'nowhere.py'), ['nowhere.py']),
    (('data', 'verify', 'nowhere'), ['nowhere']),
    (('data', 'build', '--reader', 'rlds', '--out', 'x'), ['--source', 'rlds']),
    (('data', 'build', '--reader', 'rlds', '--source', 'nowhere', '--out', 'x'), ['nowhere']),
    (
      ('data', 'build', '--reader', 'video', '--source', '.', '--size', 'big', '--out', 'x'),
      ['--size', 'big'],
    ),
    (('data', 'build', '--reader', 'metaworld', '--tasks', 'MT11', '--out', 'x'), ['MT11']),
    (
      ('data', 'build', '--reader', 'metaworld', '--prepare', '--out', 'x'),
      ['--prepare', 'metaworld'],
    ),
    (
      ('data', 'build', '--reader', 'tabletop', '--format', 'lerobot', '--append', '--out', 'x'),
      ['--format', '--append'],
    ),
    (('train', '--config', 'nowhere.py', '--workdir', 'x'), ['nowhere.py', 'get_config']),
    (('train', '--config', ROOT / 'experiments/quickstart.py'), ['--workdir']),
    (
      ('train', '--config', ROOT / 'experiments/quickstart.py', '--workdir', 'x'),
      ['config.data.store'],
    ),
    (('train', '--config', ROOT / 'experiments/quickstart.py', '--config.optim.lrr=1'), ["'lr'"]),
    (('eval', 'openloop', '--workdir', 'x', '--store', 'nowhere'), ['nowhere']),
    (('export', 'nowhere', '--out', 'x'), ['nowhere']),
    (('bench', 'nowhere'), ['benchmarks/nowhere.py']),
  ],
)
def test_expected_errors_are_one_message_and_exit_code_1(
  argv, words, capsys, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  code, message = run(capsys, *argv)
  assert code == 1 and 'Traceback' not in message
  assert message.startswith(f'wallwm {argv[0]}: ')
  for word in words:
    assert word in message
  assert not list(tmp_path.iterdir()), 'a refused command left files behind'


def test_debug_shows_the_traceback(tmp_path):
  with pytest.raises(ConfigError):
    cli.main(['--debug', 'train', '--config', str(tmp_path / 'nowhere.py')])


@pytest.mark.parametrize(
  'argv', [(), ('fly',), ('data', 'build'), ('export', 'x', '--out', 'y', '--speed')]
)
def test_wrong_usage_exits_with_2(argv, capsys):
  with pytest.raises(SystemExit) as stopped:
    cli.main(list(argv))
  assert stopped.value.code == 2
  capsys.readouterr()


def test_console_module_runs_in_a_fresh_process():
  done = subprocess.run(
    [sys.executable, '-m', 'wallwm_jax.cli', 'data', 'inspect', 'nowhere'],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  assert done.returncode == 1 and 'nowhere' in done.stderr and 'Traceback' not in done.stderr
