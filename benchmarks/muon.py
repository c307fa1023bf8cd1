"""What Muon costs: on this CPU against optax and AdamW, or for the 5B video tower on a TPU topology
by the TPU compiler's own estimate (no TPU needed, about a minute).

wallwm bench muon
wallwm bench muon --plan --topology v5p:8x8x8
wallwm bench muon --topology v5p:4x4x4 --json muon.json
wallwm bench muon --topology v5p:8x8x8 --mesh replica:32,fsdp:16 --optimizers muon adamw
wallwm bench muon --topology v5p:4x4x4 --train-step
wallwm bench muon --plot docs/images/muon_cost.png a.json b.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import re
import statistics
import time

import harness
import jax
import jax.numpy as jnp
import kernel_cases
import optax
import optax.contrib
import static_cost

from wallwm_jax.config import ExperimentConfig, MeshConfig, ModelConfig, OptimConfig, VideoConfig
from wallwm_jax.optim import (
  Matrix,
  format_plan,
  make_muon_plan,
  make_optimizer,
  newton_schulz,
  optimizer_of,
  route,
)
from wallwm_jax.parallel import aot, hlo, rules
from wallwm_jax.parallel.mesh import MESH_AXES, make_mesh
from wallwm_jax.training.state import abstract_state, build_optimizer, param_shapes
from wallwm_jax.training.step import make_train_step
from wallwm_jax.types import Frozen, NormStats, path_string

# Wan2.2-TI2V-5B without cross-view layers: 8 matrices of 3072 x 3072, 2 of 3072 x 14336 per layer
TOWER = VideoConfig(width=3072, layers=30, heads=24, ffn=14336, cross_view=False)
OPTIMIZERS = ('muon', 'adamw', 'optax.contrib.muon')
# Estimated time of a training step of that tower at 8,192 tokens a chip on v5p: matmuls by the
# compiler (823 ms) and attention at 60 % of peak (430 ms). It is proportional to the tokens.
STEP_MS, STEP_TOKENS = 1253.0, 8192
STEPS = 1000  # of the schedule; only its shape in the program matters


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--topology', help='a TPU topology, e.g. v5p:4x4x4; without it: this CPU')
  parser.add_argument('--mesh', help='mesh axes, e.g. replica:4,fsdp:16; default: fsdp over all')
  parser.add_argument('--optimizers', nargs='+', choices=OPTIMIZERS, default=OPTIMIZERS[:2])
  parser.add_argument('--plan', action='store_true', help='print who orthogonalises what, and stop')
  parser.add_argument(
    '--train-step', action='store_true', help='compile whole training steps (stage 1), low effort'
  )
  parser.add_argument('--plot', nargs='+', metavar='FILE', help='PNG to draw, then JSON lines')
  parser.add_argument('--rounds', type=int, default=9, help='timed updates on the CPU')
  parser.add_argument('--json', metavar='OUT', help='also write the JSON line to this file')
  args = parser.parse_args()
  if args.plot:
    plot(*args.plot)
    return
  if not args.topology and not args.plan:
    compare_on_cpu(args.rounds, args.json)
    return
  case = Case(args.topology or 'v5p:4x4x4', args.mesh)
  if args.plan:
    print(format_plan(case.plan(), newton_schulz(OptimConfig())))
  elif args.train_step:
    compare_train_steps(case, args.json)
  else:
    estimate(case, args.optimizers, args.json)


class Case:
  """Shapes and shardings of the tower on a mesh of a topology."""

  def __init__(self, topology: str, mesh: str | None):
    self.topology = topology
    devices = aot.tpu_devices(topology)
    sizes = _parse_mesh(mesh) if mesh else {'fsdp': len(devices)}
    self.config = MeshConfig(**sizes)
    self.mesh = make_mesh(self.config, devices)
    model = ModelConfig(video=TOWER)
    self.shapes = {'video': param_shapes(ExperimentConfig(model=model))['video']}
    self.shardings = self.place(self.shapes)

  def place(self, tree):
    """Shardings of parameters or of an optimizer state; vectors outside parameters (optax keeps its
    coefficients in the state) are replicated like scalars.
    """

    def shape(path, leaf):
      own = path_string(path).endswith('ns_coeffs')
      return jax.ShapeDtypeStruct((), leaf.dtype) if own else leaf

    shapes = jax.tree_util.tree_map_with_path(shape, tree)
    return rules.param_shardings(shapes, self.mesh, self.config.rules)

  def plan(self):
    return make_muon_plan(OptimConfig(), self.shapes, route(self.shapes), self.shardings)

  def optimizer(self, name: str) -> optax.GradientTransformation:
    """Without clipping, which costs every optimizer the same."""
    if name == 'optax.contrib.muon':
      return _optax_muon(self.shapes)
    config = OptimConfig(optimizer=name, clip_norm=0.0)
    return make_optimizer(config, self.shapes, route(self.shapes), STEPS, self.shardings)

  def compile(self, name: str):
    """One update: momentum, Newton-Schulz, new parameters; parameters and state are donated."""
    optimizer = self.optimizer(name)
    state = jax.eval_shape(optimizer.init, self.shapes)
    shardings = self.place(state)

    def step(params, state, grads):
      updates, state = optimizer.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    def placed(tree, shardings):
      return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
      )

    params = placed(self.shapes, self.shardings)
    jitted = jax.jit(
      step,
      out_shardings=(self.shardings, shardings),
      donate_argnums=(0, 1),
      compiler_options=aot.compiler_options(self.mesh),
    )
    return aot.compile_for_tpu(jitted.lower(params, placed(state, shardings), params))


def estimate(case: Case, optimizers, path: str | None) -> None:
  """Static estimates of one update per optimizer, and Muon's share of a training step."""
  chip = aot.chip(case.topology)
  rows = {}
  for name in optimizers:
    start = time.process_time()
    compiled = case.compile(name)
    seconds = functools.partial(kernel_seconds, topology=case.topology)
    cost = hlo.cost(compiled.as_text(), chip, seconds)
    memory = compiled.memory_analysis()
    wire = cost.wire_bytes()
    rows[name] = {
      'est_ms': 1e3 * cost.seconds,
      'compute_ms': 1e3 * cost.compute_s,
      'exposed_ms': 1e3 * cost.exposed_s,
      'wire_gb': sum(wire.values()) / 1e9,
      'wire_gb_by_kind': {kind: nbytes / 1e9 for kind, nbytes in wire.items()},
      'largest_other_mb': _largest_but_exchanges(cost) / 1e6,
      'flops': compiled.cost_analysis()['flops'],
      'temp_gb': memory.temp_size_in_bytes / 1e9,
      'state_and_params_gb': memory.argument_size_in_bytes / 1e9,
      'compile_cpu_s': time.process_time() - start,
    }
  first = next(iter(rows))
  figures = dict(rows[first])
  if {'muon', 'adamw'} <= rows.keys():
    extra = rows['muon']['est_ms'] - rows['adamw']['est_ms']
    figures |= {
      'adamw_est_ms': rows['adamw']['est_ms'],
      'overhead_8k_tokens_per_chip': extra / STEP_MS,
      'overhead_half_million_tokens': extra / (STEP_MS * 2**19 / case.mesh.size / STEP_TOKENS),
    }
  harness.report(
    f'one {first} update of the 5B video tower on {case.topology}, static estimate of the compiler',
    'ms',
    1,
    path=path,
    topology=case.topology,
    mesh={axis: size for axis, size in case.mesh.shape.items() if size > 1},
    **figures,
    optimizers=rows,
  )


def compare_train_steps(case: Case, path: str | None) -> None:
  """Memory and communication of a whole stage-1 step with Muon and with AdamW, one clip a chip.

  Only what the optimizer changes is of interest: the attention is XLA's, and clips are short.
  """
  chip, rows = aot.chip(case.topology), {}
  for name in ('muon', 'adamw'):
    base = ExperimentConfig(model=ModelConfig(video=TOWER), mesh=case.config)
    config = dataclasses.replace(
      base,
      optim=OptimConfig(optimizer=name),
      data=dataclasses.replace(base.data, batch_size=case.mesh.size),
    )
    optimizer = build_optimizer(config, case.mesh)
    abstract = abstract_state(config, optimizer, case.mesh)
    step = make_train_step(config, case.mesh, optimizer, abstract)
    sides = (config.model.action_spec.dim,) * 4 + (config.model.codec.channels,) * 2
    frozen = Frozen(NormStats(*(jax.ShapeDtypeStruct((n,), jnp.float32) for n in sides)))
    lowered = step.lower(abstract, config.inputs_spec(), frozen)
    compiled = aot.compile_for_tpu(lowered, exec_time_optimization_effort=-1.0)
    memory = compiled.memory_analysis()
    wire = hlo.cost(compiled.as_text(), chip, lambda op: 0.0).wire_bytes()
    rows[name] = {
      'temp_gb': memory.temp_size_in_bytes / 1e9,
      'arguments_gb': memory.argument_size_in_bytes / 1e9,
      'wire_gb_by_kind': {kind: nbytes / 1e9 for kind, nbytes in wire.items()},
    }
  harness.report(
    f'temporary memory of a whole training step on {case.topology}, Muon / AdamW',
    'ratio',
    1,
    path=path,
    value=rows['muon']['temp_gb'] / rows['adamw']['temp_gb'],
    optimizers=rows,
  )


def plot(image: str, *files: str) -> None:
  """Estimated time of one update per case, compute and exposed communication; logarithmic."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  bars = []
  for file in files:
    line = json.loads(pathlib.Path(file).read_text())
    mesh = ' x '.join(f'{axis} {size}' for axis, size in line['mesh'].items())
    for name, row in line['optimizers'].items():
      bars.append((line['topology'], mesh, name, row))
  bars.sort(key=lambda bar: (bar[0], -bar[3]['est_ms']))
  figure, axes = plt.subplots(figsize=(9, 0.42 * len(bars) + 1.2), layout='constrained')
  colors = {'muon': 'tab:blue', 'adamw': 'tab:gray', 'optax.contrib.muon': 'tab:red'}
  for y, (_, _, name, row) in enumerate(bars):
    axes.barh(y, row['est_ms'], color=colors[name])
    text = f'{row["est_ms"]:.3g} ms'
    if row['wire_gb']:
      text += f', {row["wire_gb"]:.3g} GB sent, {row["temp_gb"]:.2g} GB temporary'
    axes.text(row['est_ms'] * 1.08, y, text, va='center', fontsize=8)
  labels = [f'{topology}, {mesh}: {name}' for topology, mesh, name, _ in bars]
  axes.set_yticks(range(len(bars)), labels, fontsize=8)
  axes.set(xscale='log', xlabel='one optimizer update of the 5B video tower, ms (static estimate)')
  axes.set_xlim(right=400 * max(row['est_ms'] for *_, row in bars))
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(image, dpi=150)


def kernel_seconds(op: hlo.Instruction, *, topology: str) -> float:
  """Bundle-level estimate of a syrk kernel, at least the time its bytes take."""
  case, m = re.search(r'syrk_((\d+)x\d+(?:_c)?)', op.name).groups()
  smallest = {'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}[topology.split(':')[0]]
  matrices = op.result[0] // (2 * int(m) ** 2)
  one = static_cost.estimate('syrk', case, kernel_cases.KERNEL, smallest)
  return matrices * one.us / 1e6


def compare_on_cpu(rounds: int, path: str | None) -> None:
  """One float32 update of a 50M-parameter stack on one CPU device, optimizers side by side."""
  layers, d, f = 12, 512, 2048
  shape = {f'w{i}': (d, d) for i in range(8)} | {'up': (d, f), 'down': (f, d)}
  params = {n: jnp.zeros((layers, *s)) for n, s in shape.items()}
  keys = dict(zip(shape, jax.random.split(jax.random.key(0), len(shape)), strict=True))
  grads = {n: jax.random.normal(keys[n], p.shape) for n, p in params.items()}
  labels = jax.tree.map(lambda _: Matrix(), params)

  def ours(name):
    config = OptimConfig(
      optimizer=name, clip_norm=0.0, ns_dtype='float32', ns_coefficients='jordan'
    )
    return make_optimizer(config, params, labels, STEPS)

  optimizers = {n: ours(n) for n in OPTIMIZERS[:2]} | {OPTIMIZERS[2]: _optax_muon(params)}
  calls = {}
  for name, optimizer in optimizers.items():
    update = jax.jit(optimizer.update)
    calls[name] = functools.partial(update, grads, optimizer.init(params), params)
  times = harness.time_side_by_side(calls, rounds=rounds)
  harness.report(
    'one float32 update of 50M parameters in 120 stacked matrices, ours / optax.contrib.muon',
    'ratio',
    rounds,
    path=path,
    **harness.ratio(times, 'muon', 'optax.contrib.muon'),
    goal='<= 1.1',
    over_adamw=harness.ratio(times, 'muon', 'adamw')['value'],
    median_s={name: statistics.median(t) for name, t in times.items()},
  )


def _optax_muon(shapes) -> optax.GradientTransformation:
  """optax's, told which axes of a stack are a matrix, with AdamW on what ours gives to AdamW."""
  config = OptimConfig()
  labels = jax.tree.map(
    optimizer_of, route(shapes) if 'video' in shapes else jax.tree.map(lambda _: Matrix(), shapes)
  )
  numbers = jax.tree.map(
    lambda label: optax.contrib.MuonDimensionNumbers(1, 2) if label == 'muon' else None, labels
  )
  return optax.contrib.muon(
    config.lr,
    weight_decay=config.weight_decay,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=numbers,
  )


def _largest_but_exchanges(cost: hlo.Cost) -> float:
  return max((c.wire_bytes for c in cost.collectives if c.kind != 'all-to-all'), default=0.0)


def _parse_mesh(text: str) -> dict[str, int]:
  sizes = {}
  for part in text.split(','):
    axis, _, size = part.partition(':')
    if axis not in MESH_AXES or not size.isdigit():
      raise SystemExit(f'--mesh {text}: expected axis:size pairs of {MESH_AXES}, got {part!r}')
    sizes[axis] = int(size)
  return sizes


if __name__ == '__main__':
  main()
