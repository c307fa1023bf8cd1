"""What ships: the package list, the declared dependencies, and a wheel and sdist that import
elsewhere."""

import ast
import configparser
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DISTRIBUTIONS = {  # import name -> distribution name, where they differ
  'absl': 'absl-py',
  'array_record': 'array-record',
  'google_crc32c': 'google-crc32c',
  'ml_collections': 'ml-collections',
  'ml_dtypes': 'ml-dtypes',
  'orbax': 'orbax-checkpoint',
  'PIL': 'pillow',
  'tensorflow_datasets': 'tensorflow-datasets',
  'sklearn': 'scikit-learn',
  'yaml': 'pyyaml',
}
OPTIONAL = {'metaworld'}  # extras that are imported where they are used, with an error that helps
NEEDED_UNSEEN = {
  'flatbuffers': 'jax.export serialises with it',
  'mujoco-mjx': 'provides mujoco.mjx',
}


@pytest.fixture(scope='module')
def setup_cfg() -> configparser.ConfigParser:
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  return parser


def lines(value: str) -> list[str]:
  return [line.strip() for line in value.splitlines() if line.strip()]


def package_folders() -> dict[str, pathlib.Path]:
  """Every package on disk: folders with an __init__.py, symlinked trees under their library
  name."""
  found = {}
  trees = {'wallwm_jax': 'wallwm_jax', 'data': 'wallwm_jax.data', 'kernels': 'wallwm_jax.kernels'}
  for top, name in trees.items():
    for init in (ROOT / top).rglob('__init__.py'):
      inner = init.parent.relative_to(ROOT / top).parts
      if top != 'wallwm_jax' or not inner or inner[0] not in ('data', 'kernels'):
        found['.'.join((name, *inner))] = init.parent
  return found


def test_setup_cfg_lists_exactly_the_packages_on_disk(setup_cfg):
  assert lines(setup_cfg['options']['packages']) == sorted(package_folders())


def test_no_module_lies_outside_a_package():
  folders = set(package_folders().values())
  for top in ('wallwm_jax', 'data', 'kernels'):
    strays = [p for p in (ROOT / top).rglob('*.py') if p.parent not in folders]
    strays = [
      p for p in strays if 'wallwm_jax/data' not in str(p) and 'wallwm_jax/kernels' not in str(p)
    ]
    assert not strays, f'add an __init__.py beside {strays[0]}'


def test_declared_dependencies_are_the_imported_ones(setup_cfg):
  declared = {
    re.split(r'[<>=!~\[ ]', line)[0]: line
    for line in lines(setup_cfg['options']['install_requires'])
  }
  used = {}
  for folder in package_folders().values():
    for path in folder.glob('*.py'):
      for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
          names = [node.module]
        for name in names:
          used.setdefault(name.split('.')[0], path)
  foreign = {
    DISTRIBUTIONS.get(name, name): path
    for name, path in used.items()
    if name not in sys.stdlib_module_names and name not in ('wallwm_jax', *OPTIONAL)
  }
  missing = {name: str(path) for name, path in foreign.items() if name not in declared}
  assert not missing, f'imported, but not in setup.cfg install_requires: {missing}'
  unused = set(declared) - set(foreign) - set(NEEDED_UNSEEN)
  assert not unused, f'in setup.cfg install_requires, but imported nowhere: {sorted(unused)}'


def test_constraints_pin_every_dependency_exactly(setup_cfg):
  pins = dict(
    line.lower().split('==')
    for line in lines((ROOT / 'constraints.txt').read_text())
    if line[0] != '#'
  )
  wanted = lines(setup_cfg['options']['install_requires'])
  wanted += lines(setup_cfg['options.extras_require']['dev'])
  for requirement in wanted:
    name = re.split(r'[<>=!~\[ ]', requirement)[0].lower()
    assert name in pins, f'constraints.txt: no pin for {name}'


@pytest.fixture(scope='module')
def built(tmp_path_factory) -> pathlib.Path:
  """A wheel and an sdist built from a copy of the tracked source, so the checkout stays clean."""
  source = tmp_path_factory.mktemp('source') / 'wallwm-jax'
  source.mkdir()
  for name in ('wallwm_jax', 'data', 'kernels', 'experiments', 'tests', 'benchmarks', 'docs'):
    if (ROOT / name).is_dir():
      shutil.copytree(
        ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__')
      )
  for path in ROOT.iterdir():
    if path.is_file():
      shutil.copy(path, source)
  out = tmp_path_factory.mktemp('dist')
  command = [sys.executable, '-m', 'build', '--no-isolation', '--sdist', '--wheel', '-o', str(out)]
  done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  return out


def import_everything(target: pathlib.Path, elsewhere: pathlib.Path) -> subprocess.CompletedProcess:
  """Imports every shipped module in a fresh process that sees `target`, not the checkout."""
  program = f"""
import importlib, pathlib, sys
sys.path = [p for p in sys.path if p not in ('', {str(ROOT)!r})]
sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]
sys.path.insert(0, {str(target)!r})
import wallwm_jax
root = pathlib.Path(wallwm_jax.__file__).parent
assert root == pathlib.Path({str(target)!r}) / 'wallwm_jax', root
for path in sorted(root.rglob('*.py')):
  name = '.'.join(path.relative_to(root.parent).with_suffix('').parts).removesuffix('.__init__')
  assert str(importlib.import_module(name).__file__).startswith(str(root)), name
import wallwm_jax.data, wallwm_jax.kernels
assert 'data' not in sys.modules and 'kernels' not in sys.modules
print('imported')
"""
  return subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, cwd=elsewhere, check=False
  )


@pytest.mark.slow
def test_wheel_imports_from_another_directory(built, tmp_path):
  wheel = next(built.glob('*.whl'))
  names = zipfile.ZipFile(wheel).namelist()
  for folder in package_folders():
    assert f'{folder.replace(".", "/")}/__init__.py' in names
  assert 'wallwm_jax/data/boundaries.npz' in names
  assert all(n.startswith(('wallwm_jax/', 'wallwm_jax-')) for n in names), names
  pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target']
  subprocess.run([*pip, str(tmp_path / 'site'), str(wheel)], check=True)
  done = import_everything(tmp_path / 'site', tmp_path)
  assert done.returncode == 0 and 'imported' in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_sdist_builds_and_carries_the_checkout(built, tmp_path):
  archive = next(built.glob('*.tar.gz'))
  with tarfile.open(archive) as tar:
    tar.extractall(tmp_path, filter='data')
  source = tmp_path / archive.name.removesuffix('.tar.gz')
  for name in ('data/__init__.py', 'kernels/__init__.py', 'LICENSE', 'constraints.txt', 'Makefile'):
    assert (source / name).is_file(), name
  assert list((source / 'experiments').glob('*.py'))
  pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-build-isolation']
  subprocess.run([*pip, '--target', str(tmp_path / 'site'), str(source)], check=True)
  done = import_everything(tmp_path / 'site', tmp_path)
  assert done.returncode == 0 and 'imported' in done.stdout, done.stderr[-2000:]
