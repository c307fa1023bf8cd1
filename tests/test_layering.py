"""The import table of the design, enforced on every file: packages, external libraries, no
cycles."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARY = ROOT / 'wallwm_jax'
LINKED = ('data', 'kernels')  # top-level folders that are also sub-packages, through symlinks
TOP = ('cli', 'commands')  # may import everything; only each other imports them

VOCABULARY = {'errors', 'types', 'config'}
# package -> the project modules it may import: a package name, or a dotted module inside one.
ALLOWED = {
  'errors': set(),
  'types': {'errors'},
  'config': {'errors', 'types'},
  'presets': VOCABULARY,
  'kernels': {'errors', 'types'},
  'geometry': VOCABULARY,
  'diffusion': VOCABULARY,
  'optim': VOCABULARY | {'kernels.*.api'},
  'parallel': VOCABULARY,
  'data': VOCABULARY | {'geometry'},
  'models': VOCABULARY | {'kernels.*.api', 'geometry', 'parallel.constraints'},
  'convert': VOCABULARY | {'presets', 'weights'},
  'weights': VOCABULARY | {'parallel'},
  'text': VOCABULARY | {'models.functional', 'parallel', 'weights'},
  'inference': VOCABULARY
  | {
    'models.functional',
    'models.language',
    'models.quantised',
    'diffusion',
    'kernels.*.api',
    'parallel',
    'geometry',
    'weights.staging',  # exported folders appear whole or not at all, as weight folders do
  },
  'envs': VOCABULARY | {'geometry', 'data.schema', 'data.phrases', 'data.primitives'},
  'evaluation': VOCABULARY | {'envs', 'geometry', 'data'},
  'training': VOCABULARY
  | {
    'kernels.*.api',
    'geometry',
    'diffusion',
    'optim',
    'parallel',
    'data',
    'models.functional',
    'models.language',
    'inference',
    'text',
    'weights',
  },
}
# external library -> the packages that may use it
CONFINED = {
  'flax': {'models'},
  'optax': {'optim', 'training'},
  'grain': {'data'},
  'orbax': {'training', 'weights'},
  'tensorstore': {'weights'},
  'safetensors': set(),
  'tokenizers': {'text'},
  'mujoco': {'envs'},
  'metaworld': {'envs'},
  'tensorflow': set(),
  'torch': set(),
}
PURE = {'errors', 'types', 'config', 'presets', 'kernels', 'geometry', 'diffusion', 'optim'}
PURE |= {'models'}
PURE_MAY = {'jax', 'jaxtyping', 'numpy', 'scipy', 'flax', 'optax', 'ml_collections', 'einops'}
STANDARD = {'collections', 'dataclasses', 'difflib', 'enum', 'functools', 'hashlib', 'itertools'}
STANDARD |= {'math', 're', 'sys', 'types', 'typing', 'zlib', '__future__', 'contextlib'}
STANDARD |= {'contextvars'}


def sources() -> dict[str, pathlib.Path]:
  """Every module of the library by dotted name, without the leading `wallwm_jax.`."""
  found = {}
  for top in [LIBRARY, *(ROOT / name for name in LINKED)]:
    prefix = () if top == LIBRARY else (top.name,)
    for path in sorted(top.rglob('*.py')):
      parts = path.relative_to(top).with_suffix('').parts
      if top == LIBRARY and parts[0] in LINKED:
        continue  # reached through the symlink: listed once, under its top-level folder
      parts = prefix + parts
      found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
  return found


SOURCES = sources()


def package(module: str) -> str:
  return module.split('.')[0]


@functools.cache
def imports(module: str) -> tuple[tuple[str, int, bool], ...]:
  """(imported dotted name, line, at module level) of one module; relative imports made absolute."""
  path = SOURCES[module]
  tree = ast.parse(path.read_text(), str(path))
  lazy = {
    id(node)
    for function in ast.walk(tree)
    if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for node in ast.walk(function)
  }
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = _from_names(node, module, path.name == '__init__.py')
    else:
      continue
    found += [(name, node.lineno, id(node) not in lazy) for name in names]
  return tuple(found)


def _from_names(node: ast.ImportFrom, module: str, is_package: bool) -> list[str]:
  base = node.module or ''
  if node.level:
    parts = ['wallwm_jax', *module.split('.')] if module else ['wallwm_jax']
    drop = node.level - 1 if is_package else node.level
    parts = parts[: len(parts) - drop]
    base = '.'.join([*parts, base] if base else parts)
  if not base.startswith('wallwm_jax'):
    return [base]
  inner = base.removeprefix('wallwm_jax').lstrip('.')
  names = []
  for alias in node.names:
    child = f'{inner}.{alias.name}' if inner else alias.name
    names.append(f'wallwm_jax.{child}' if child in SOURCES else base)
  return sorted(set(names))


def project_imports(module: str):
  """(target module without `wallwm_jax.`, line, at module level)."""
  for name, line, top in imports(module):
    if name == 'wallwm_jax' or name.startswith('wallwm_jax.'):
      yield name.removeprefix('wallwm_jax').lstrip('.'), line, top


def allows(entry: str, target: str) -> bool:
  """Whether a table entry covers an imported module ('*' stands for one part)."""
  want, got = entry.split('.'), target.split('.')
  if len(want) > len(got):
    return False
  return all(w in ('*', g) for w, g in zip(want, got))


def test_every_package_is_in_the_table():
  unknown = {package(m) for m in SOURCES if m} - set(ALLOWED) - set(TOP)
  assert not unknown, f'no import rule for {sorted(unknown)}: add a row to ALLOWED in {__file__}'


@pytest.mark.parametrize('module', sorted(m for m in SOURCES if m))
def test_imports_follow_the_table(module):
  if package(module) in TOP:
    return
  allowed = ALLOWED[package(module)]
  bad = [
    f'{SOURCES[module]}:{line}: {package(module)} may not import wallwm_jax.{target}; '
    f'allowed: {sorted(allowed) or "nothing of the project"}'
    for target, line, _ in project_imports(module)
    if package(target) != package(module) and not any(allows(a, target) for a in allowed)
  ]
  assert not bad, '\n'.join(bad)


@pytest.mark.parametrize('module', sorted(SOURCES))
def test_external_libraries_stay_in_their_packages(module):
  if package(module) in TOP:
    return
  bad = []
  for name, line, _ in imports(module):
    library = name.split('.')[0]
    where = f'{SOURCES[module]}:{line}'
    if library in ('data', 'kernels', 'experiments', 'tests', 'benchmarks'):
      bad.append(f'{where}: bare `import {library}`; write wallwm_jax.{library}, or turn it round')
    elif library in CONFINED and package(module) not in CONFINED[library]:
      bad.append(f'{where}: {library} may be imported only in {sorted(CONFINED[library])}')
    elif package(module) in PURE and library not in PURE_MAY | STANDARD | {'wallwm_jax'}:
      bad.append(f'{where}: {package(module)} does no I/O: {library} is not one of its libraries')
  assert not bad, '\n'.join(bad)


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
  """One cycle of a directed graph as a list of nodes that ends where it starts, or None."""
  done: set[str] = set()

  def visit(node, path):
    if node in path:
      return [*path[path.index(node) :], node]
    if node in done:
      return None
    for target in sorted(graph.get(node, ())):
      if cycle := visit(target, [*path, node]):
        return cycle
    done.add(node)
    return None

  for start in sorted(graph):
    if cycle := visit(start, []):
      return cycle
  return None


def test_find_cycle_sees_a_cycle():
  assert find_cycle({'a': {'b'}, 'b': {'c'}, 'c': {'b'}}) == ['b', 'c', 'b']
  assert find_cycle({'a': {'b', 'c'}, 'b': {'c'}}) is None


def test_packages_have_no_cycles():
  graph: dict[str, set[str]] = {}
  for module in SOURCES:
    if package(module) not in TOP:
      targets = {package(t) for t, _, _ in project_imports(module) if t}
      graph.setdefault(package(module), set()).update(targets - {package(module)})
  assert (cycle := find_cycle(graph)) is None, f'packages import in a circle: {" -> ".join(cycle)}'


def test_modules_have_no_import_time_cycles():
  graph = {
    module: {t for t, _, top in project_imports(module) if top and t in SOURCES and t != module}
    for module in SOURCES
  }
  assert (cycle := find_cycle(graph)) is None, f'modules import in a circle: {" -> ".join(cycle)}'


@pytest.mark.parametrize('name', LINKED)
def test_links_point_at_the_top_level_folders(name):
  link = LIBRARY / name
  assert link.is_symlink(), f'{link} must be a relative symlink to ../{name}'
  assert str(link.readlink()) == f'../{name}'
  assert link.resolve() == ROOT / name


@pytest.mark.parametrize('name', LINKED)
def test_linked_packages_import_under_one_name(name):
  import importlib

  module = importlib.import_module(f'wallwm_jax.{name}')
  assert module.__name__ == f'wallwm_jax.{name}'
  assert (ROOT / name) in [pathlib.Path(p).resolve() for p in module.__path__]


def test_table_entries_reject_what_they_should():
  assert allows('kernels.*.api', 'kernels.attention.api')
  assert not allows('kernels.*.api', 'kernels.attention.reference')
  assert not allows('parallel.constraints', 'parallel')
  assert allows('geometry', 'geometry.poses')
