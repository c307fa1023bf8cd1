"""From observation to action: by part and by steps, against one cache, in batches, side by side,
from a cold start, and what the TPU compiler estimates for the 5B model. One JSON line per case.

wallwm bench latency -- --cases parts ratio robots refresh cold
wallwm bench latency -- --cases static --topologies v5p:2x2x1 v6e:2x2
wallwm bench latency -- --cases parts robots refresh --size 5b --device gpu     # where there is one
wallwm bench latency -- --plot docs/images --lines latency.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import static_cost
from jax.sharding import NamedSharding, PartitionSpec

from wallwm_jax import presets
from wallwm_jax.config import ExperimentConfig, MeshConfig
from wallwm_jax.evaluation import latency
from wallwm_jax.inference import denoiser, runtime
from wallwm_jax.inference.anchored import AnchoredPolicy
from wallwm_jax.inference.denoiser import Window
from wallwm_jax.inference.programs import Programs
from wallwm_jax.inference.runtime import Now
from wallwm_jax.models import functional
from wallwm_jax.parallel import aot
from wallwm_jax.parallel.constraints import activation_sharding
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.parallel.rules import param_shardings
from wallwm_jax.training import flops
from wallwm_jax.types import Frozen, InferenceParams, NormStats

N_D = 50  # action steps of the ratio
_PATIENCE_S = 120  # for the simulation of a part of the 5B model


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--cases', nargs='+', choices=_REPORTS, default=list(_REPORTS)[:-1])
  parser.add_argument('--size', choices=('small', '5b'), default='small', help='model (small)')
  parser.add_argument('--device', help='cpu, gpu or tpu (what JAX finds)')
  parser.add_argument('--calls', type=int, default=50, help='timed calls of each part (50)')
  parser.add_argument('--video-steps', type=int, nargs='+', default=[1, 2, 4])
  parser.add_argument('--action-steps', type=int, default=10)
  parser.add_argument('--window', choices=('event', 'chunk'), default='chunk')
  parser.add_argument('--patch', type=int, default=3, help='small: cells of a patch, a side (3)')
  parser.add_argument('--topologies', nargs='+', default=['v5p:2x2x1', 'v6e:2x2'])
  parser.add_argument('--chips', type=int, default=1, help='static: chips, split by tensor (1)')
  parser.add_argument('--plot', metavar='FOLDER', help='draw --lines instead of measuring')
  parser.add_argument('--lines', help='file of JSON lines that --plot reads')
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  parser.add_argument('--part', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.plot:
    return plot(pathlib.Path(args.lines), pathlib.Path(args.plot))
  if args.worker is not None:
    return _start(args.worker or None)
  if args.part:
    return print(json.dumps(static(args, args.topologies[0], args.part)))
  if args.device or set(args.cases) == {'static'}:
    jax.config.update('jax_platforms', args.device or 'cpu')  # do not look for a TPU
  for case in args.cases:
    _REPORTS[case](args)


def report_parts(args) -> None:
  """Milliseconds by part, for each number of video steps; as `wallwm eval latency`."""
  from wallwm_jax.commands.evaluators import measure_latency

  for steps in args.video_steps:
    config = model(args, steps)
    measured = measure_latency(config, random_params(config), calls=args.calls)
    times = {
      name: {q: round(getattr(t, f'{q}_ms'), 3) for q in ('p50', 'p99', 'first')}
      for name, t in measured.pop('parts').items()
    }
    whole = times['whole prediction']
    harness.report(
      f'replanning, {args.size} model, {args.window} window, {steps} video steps', 'Hz', args.calls,
      case='parts', size=args.size, value=measured.pop('replan_hz'),
      parameters=count(config), tokens=tokens(config), ms=times,
      p99_over_p50=whole['p99'] / whole['p50'], **measured, load=os.getloadavg()[0],
      goal='small: >= 10 Hz at 10 action steps on CPU; 5b on one H100: >= 20 Hz, refresh >= 80 Hz',
    )  # fmt: skip


def report_ratio(args) -> None:
  """50 action steps against one cache / the same with the video features computed at each step."""
  config = with_steps(model(args, 0), video_steps=0, action_steps=N_D)
  window, params = window_of(config), random_params(config)
  obs, text, length, _, _ = ask(config, 1)
  cond = denoiser.encode_observation(params, obs, text, length, cfg=config, window=window)
  noise = denoiser.sample_noise(jax.random.key(0), config, 1, window)

  @jax.jit
  def anchored(params, cond, noise):
    cache, _ = denoiser.anchor_cache(params, cond, noise.video, cfg=config, window=window)
    return denoiser.denoise_actions(params, cond, cache, noise.action, cfg=config)

  @jax.jit
  def recomputed(params, cond, noise):
    return denoiser.denoise_jointly(params, cond, noise, cfg=config, window=window)[1]

  calls = {
    'one cache': lambda: anchored(params, cond, noise),
    'video at each step': lambda: recomputed(params, cond, noise),
  }
  rounds = max(3, args.calls // 10)
  times = harness.time_side_by_side(calls, rounds=rounds, clock=time.process_time)
  harness.report(
    f'{N_D} action steps, one anchored cache / video features at each step', 'ratio', rounds,
    case='ratio', size=args.size, **harness.ratio(times, 'one cache', 'video at each step'),
    median_cpu_s={name: statistics.median(t) for name, t in times.items()},
    tokens=tokens(config), parameters=count(config), goal='<= 0.2',
  )  # fmt: skip


def report_robots(args) -> None:
  """Several robots in one call."""
  config = model(args, 1)
  window, params = window_of(config), random_params(config)
  run = jax.jit(functools.partial(runtime.answer, cfg=config, window=window))
  found = {}
  for robots in (1, 2, 4, 8):
    inputs = ask(config, robots)
    timed = latency.measure(
      lambda inputs=inputs: run(params, *inputs).chunk.actions, calls=max(5, args.calls // 5)
    )
    found[str(robots)] = {'p50_ms': timed.p50_ms, 'answers_per_s': 1e3 * robots / timed.p50_ms}
  harness.report(
    'robots in one call, 1 video step', 'answers/s', args.calls // 5, case='robots',
    size=args.size, value=found['8']['answers_per_s'], robots=found,
    gain_of_8=found['8']['answers_per_s'] / found['1']['answers_per_s'],
  )  # fmt: skip


def report_refresh(args) -> None:
  """Actions from the kept anchor, alone and while the next anchor is computed."""
  config = model(args, 1)
  window, params = window_of(config), random_params(config)
  programs, (obs, text, length, free, key) = Programs(), ask(config, 1)

  def load(name, *given):
    function = functools.partial(getattr(runtime, name), cfg=config, window=window)
    return programs.load(name, function, (params, *given), config=config)

  refresh = load('refresh', obs, text, length, key)
  anchor = refresh(params, obs, text, length, key)
  act = load('act', anchor, Now(obs.state, free))
  steps = window.future * config.model.steps_per_latent
  policy = AnchoredPolicy(
    lambda sight: refresh(params, *sight, length, key), functools.partial(act, params),
    steps=steps, max_age=steps - 1,
  )  # fmt: skip
  policy.look(0, (obs, text))
  policy.wait()
  alone = latency.measure(lambda: policy.act(0, obs.state).chunk.actions, calls=args.calls)
  alongside, refreshed, begun = [], 0, time.perf_counter()
  for _ in range(args.calls):
    if not policy.busy:
      refreshed += 1
      policy.look(refreshed, (obs, text))
    start = time.perf_counter()
    np.asarray(policy.act(policy.step, obs.state).chunk.actions)
    alongside.append(1e3 * (time.perf_counter() - start))
  spent = time.perf_counter() - begun
  policy.wait()
  policy.close()
  p50, p99 = np.percentile(alongside, [50, 99])
  harness.report(
    f'actions anew from the kept anchor, {args.action_steps} action steps', 'Hz', args.calls,
    case='refresh', size=args.size, value=alone.hz,
    alone={'p50_ms': alone.p50_ms, 'p99_ms': alone.p99_ms},
    while_refreshing={'p50_ms': p50, 'p99_ms': p99, 'anchors_per_s': refreshed / spent},
  )  # fmt: skip


def report_cold(args) -> None:
  """Fresh processes of the small model, from their start to the first actions on the host."""
  with tempfile.TemporaryDirectory() as folder:
    kept = str(pathlib.Path(folder) / 'programs')
    runs = [('no cache', ''), ('empty cache', kept), ('filled cache', kept), ('once more', kept)]
    found = {}
    for name, where in runs:
      begun = time.time()
      done = subprocess.run(
        [sys.executable, __file__, '--worker', where], capture_output=True, text=True, check=True
      )
      at = json.loads(done.stdout.splitlines()[-1])
      found[name] = {
        'total_s': at['first'] - begun, 'import_s': at['imported'] - begun,
        'weights_s': at['weights'] - at['imported'], 'programs_s': at['ready'] - at['weights'],
        'first_s': at['first'] - at['ready'], 'traced': at['traced'], 'compiled': at['compiled'],
      }  # fmt: skip
  harness.report(
    'cold start of the small model: process start to first actions', 's', 1, case='cold',
    value=found['filled cache']['total_s'], runs=found, load=os.getloadavg()[0],
    goal='<= 60 s with the cache',
  )  # fmt: skip


def _start(folder: str | None) -> None:
  """One fresh process: prints when (s since the epoch) each step was over."""
  at = {'imported': time.time()}
  config = with_steps(small_model('chunk', 3), video_steps=1, action_steps=10)
  params, inputs = random_params(config), ask(config, 1)
  at['weights'] = time.time()
  answer = functools.partial(runtime.answer, cfg=config, window=window_of(config))
  program = Programs(folder).load('answer', answer, (params, *inputs), config=config)
  at |= {'ready': time.time(), 'traced': program.traced, 'compiled': program.compiled}
  jax.device_get(program(params, *inputs).chunk.actions)
  at['first'] = time.time()
  print(json.dumps(at))


def report_static(args) -> None:
  """The 5B model compiled for TPUs that are not there: estimated time and memory, by part, each in
  a process of its own."""
  flags = ['--window', args.window, '--action-steps', str(args.action_steps)]
  flags += ['--chips', str(args.chips), '--cases', 'static']
  for topology in args.topologies:
    parts, video = {}, (f'video, {steps}' for steps in args.video_steps)
    for name in ('actions', 'encode', 'anchored forward', *video):
      command = [__file__, *flags, '--topologies', topology, '--part', name]
      parts[name] = static_cost.in_a_process(command, _PATIENCE_S)
      print(f'{topology} {name}: {parts[name]}', file=sys.stderr, flush=True)
    _report_static(args, topology, parts)


def _report_static(args, topology: str, parts: dict[str, dict]) -> None:
  config = with_steps(full_model(args.window), video_steps=1, action_steps=args.action_steps)
  seconds = {name: part['seconds'] for name, part in parts.items()}
  fixed = seconds['encode'] + seconds['anchored forward'] + seconds['actions']
  replan = {str(steps): fixed + seconds[f'video, {steps}'] for steps in args.video_steps}
  harness.report(
    f'static estimate of replanning, 5B, {args.window} window, {args.chips} x {topology}', 'Hz', 1,
    case='static', value=1 / min(replan.values()), topology=topology, chips=args.chips,
    action_steps=args.action_steps, seconds=seconds, replan_s=replan,
    replan_hz={steps: 1 / s for steps, s in replan.items()},
    action_refresh_hz=1 / seconds['actions'], parameters=count(config), tokens=tokens(config),
    hbm_gib={name: part['hbm_gib'] for name, part in parts.items()},
    instructions={name: part['instructions'] for name, part in parts.items()},
    roofline=roofline(config, window_of(config), topology, args.chips),
  )  # fmt: skip


def static(args, topology: str, part: str) -> dict:
  """One part of it. Shapes only: no weight is ever made.

  Returns:
    seconds: of the simulated schedule, by XLA's own model (or, kernels, by their bytes) where the
    simulation gave up; hbm_gib: what the program holds, weights included; instructions: how many
    were not simulated, and which kernels.
  """
  config = with_steps(full_model(args.window), video_steps=1, action_steps=args.action_steps)
  window = window_of(config)
  mesh_config = MeshConfig(fsdp=1, tensor=args.chips)
  mesh = make_mesh(mesh_config, aot.tpu_devices(topology)[: args.chips])
  whole = NamedSharding(mesh, PartitionSpec())

  def placed(tree, shardings=None):
    shardings = shardings or jax.tree.map(lambda _: whole, tree)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )

  params = shapes(config)
  towers = placed(params.model, param_shardings(params.model, mesh, mesh_config.rules))
  params = InferenceParams(towers, placed(params.frozen))
  obs, text, length, free, key = placed(jax.eval_shape(lambda: ask(config, 1)))
  refresh = functools.partial(runtime.refresh, cfg=config, window=window)
  anchor = placed(jax.eval_shape(refresh, params, obs, text, length, key))
  z = jax.eval_shape(lambda: denoiser.sample_noise(jax.random.key(0), config, 1, window).video)
  bound, video = {'cfg': config, 'window': window}, (anchor.cond, placed(z))
  if part.startswith('video'):
    stepped = with_steps(config, video_steps=int(part.split()[-1]))
    function, given = functools.partial(denoiser.denoise_to_anchor, cfg=stepped), video
  else:
    function, given = {
      'actions': (runtime.act, (anchor, Now(obs.state, free))),
      'anchored forward': (denoiser.anchor_cache, video),
      'encode': (denoiser.encode_observation, (obs, text, length)),
    }[part]
    function = functools.partial(function, **bound)

  def run(*given):
    with activation_sharding(mesh, mesh_config.rules):
      return function(*given)

  with aot.tracing_for(topology) if args.chips == 1 else contextlib.nullcontext():
    lowered = jax.jit(run).lower(params, *given)
  program = aot.compile_for_tpu(lowered)
  rows = tokens(config)
  moved = {  # keys and values once; queries or keys in and out
    'cached_attention': 4 * rows * config.model.action.width,
    'qk_norm_rope': 4 * rows * config.model.video.width,
    'splash': 8 * rows * config.model.video.width,
  }
  total = static_cost.Total(program.as_text(), aot.chip(topology), moved)
  used = program.memory_analysis()
  held = used.argument_size_in_bytes + used.temp_size_in_bytes + (
    used.output_size_in_bytes - used.alias_size_in_bytes)  # fmt: skip
  return {
    'seconds': total.estimate(1).mixed_us / 1e6,
    'hbm_gib': held / 2**30,
    'instructions': {'not_simulated': total.given_up, 'kernels': total.kernels,
                     'kernels_not_simulated': total.kernels_given_up},
  }  # fmt: skip


def roofline(config: ExperimentConfig, window: Window, topology: str, chips: int) -> dict:
  """Least seconds of the towers at peak FLOP/s and memory bandwidth, without the frame codec; the
  video with one step before the anchored forward."""
  data = dataclasses.replace(config.data, window=window.kind)
  config = dataclasses.replace(config, data=data)
  generation, inference = topology.partition(':')[0], config.inference
  peak, bandwidth = aot.PEAK_FLOPS[generation], aot.chip(topology).hbm_bytes_per_s
  nbytes = {name: size_of(tree) for name, tree in shapes(config).model.items()}
  model = config.model
  cache = 2 * 2 * model.video.layers * tokens(config) * model.action.width
  video = 2 * flops.video_macs(config, window.future)
  # The keys and values are made once, the rest at every step.
  once = 2 * flops.action_macs(config, window.future, 0)
  step = 2 * flops.action_macs(config, window.future, 1) - once
  forwards = len(denoiser.anchor_sigmas(config))
  parts = {
    'video': (forwards, video, nbytes['video']),
    'cache': (1, once, cache),
    'actions': (inference.action_steps, step, nbytes['action'] + cache),
  }
  return {
    name: {
      'runs': runs, 'tflop': runs * work / 1e12, 'gib': runs * moved / 2**30,
      'compute_s': runs * work / peak / chips, 'memory_s': runs * moved / bandwidth / chips,
    }
    for name, (runs, work, moved) in parts.items()
  }  # fmt: skip


def model(args, video_steps: int) -> ExperimentConfig:
  full = args.size == '5b'
  config = full_model(args.window) if full else small_model(args.window, args.patch)
  return with_steps(config, video_steps=video_steps, action_steps=args.action_steps)


def small_model(window: str, patch: int) -> ExperimentConfig:
  """The tabletop's model at some ten million weights: three cameras of 48 x 48, 6 x 6 cells."""
  config = presets.tabletop()
  video = dataclasses.replace(config.model.video, width=192, layers=6, heads=6, ffn=768)
  video = dataclasses.replace(video, patch=(1, patch, patch))
  action = dataclasses.replace(config.model.action, width=192, heads=6, ffn=512)
  size = dataclasses.replace(config.model, video=video, action=action, future=4)
  return _windowed(dataclasses.replace(config, model=size), window, 4)


def full_model(window: str) -> ExperimentConfig:
  """The 5B experiment with a student's guidance: 1, since distillation takes it in."""
  config = presets.world_action('wan2_2_5b', 'wan2_2')
  inference = dataclasses.replace(config.inference, guidance=1.0)
  return _windowed(dataclasses.replace(config, inference=inference), window, 4)


def _windowed(config: ExperimentConfig, window: str, future: int) -> ExperimentConfig:
  data = dataclasses.replace(config.data, window=window, buckets=(future,), midway=0.0)
  return dataclasses.replace(config, data=data)


def with_steps(config: ExperimentConfig, **steps: int) -> ExperimentConfig:
  return dataclasses.replace(config, inference=dataclasses.replace(config.inference, **steps))


def window_of(config: ExperimentConfig) -> Window:
  chunk = config.data.window == 'chunk'
  return Window.chunk(config) if chunk else Window.event(config, config.data.buckets[-1])


def shapes(config: ExperimentConfig) -> InferenceParams:
  """Of all weights, in the model's compute dtype, as a served model would hold them."""
  size = config.model
  key = jax.random.key(0)
  trees = (
    jax.eval_shape(functools.partial(functional.init_params, size), key),
    jax.eval_shape(functools.partial(functional.init_codec, size.codec), key),
  )
  tower, codec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, size.dtype), trees)
  a, c = size.action_spec.dim, size.codec.channels
  norm = NormStats(*(jax.ShapeDtypeStruct((n,), jnp.float32) for n in (a, a, a, a, c, c)))
  return InferenceParams(tower, Frozen(norm, codec))


def random_params(config: ExperimentConfig) -> InferenceParams:
  """Weights of `shapes` from one small draw, repeated: nothing is compiled for them; statistics of
  1."""
  draw = (0.02 * np.random.default_rng(0).standard_normal(1 << 16)).astype(np.float32)

  def fill(x):
    return jax.device_put(np.resize(draw, x.shape).astype(x.dtype))

  spec = shapes(config)
  norm = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, np.float32)), spec.norm)
  codec = jax.tree.map(fill, spec.frozen.codec)
  return InferenceParams(jax.tree.map(fill, spec.model), Frozen(norm, codec))


def ask(config: ExperimentConfig, robots: int):
  """(obs, text, length, committed, key) of `runtime.answer`, random."""
  window = window_of(config)
  obs, text = jax.tree.map(
    lambda x: jnp.ones(x.shape, x.dtype), denoiser.input_specs(config, window, robots)
  )
  free = runtime.no_targets(config, window, robots)
  keys = jax.random.split(jax.random.key(0), robots)
  return obs, text, jnp.full(robots, window.future, jnp.int32), free, keys


def count(config: ExperimentConfig) -> int:
  """Weights of both towers."""
  return sum(x.size for x in jax.tree.leaves(shapes(config).model))


def tokens(config: ExperimentConfig) -> int:
  """Of the video, all views and latent frames of a window."""
  window = window_of(config)
  return len(config.model.views) * (window.known + window.future) * config.model.patches


def size_of(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def plot(lines: pathlib.Path, folder: pathlib.Path) -> None:
  """latency_parts.png and latency_static.png, of those cases that the file of JSON lines has."""
  import matplotlib

  matplotlib.use('Agg')
  found = [json.loads(line) for line in lines.read_text().splitlines() if line.startswith('{')]
  parts = [x for x in found if x['case'] == 'parts' and x['size'] == 'small']
  estimates = [x for x in found if x['case'] == 'static']
  if parts:
    _plot_parts(parts, folder / 'latency_parts.png')
  if estimates:
    _plot_static(estimates, folder / 'latency_static.png')


def _plot_parts(found: list[dict], path: pathlib.Path) -> None:
  import matplotlib.pyplot as plt

  names = {
    'encode the observation': 'encode', 'video to the anchor step': 'video steps',
    'anchored video forward': 'anchored forward', 'actions against the cache': 'actions',
  }  # fmt: skip
  figure, axes = plt.subplots(figsize=(6.4, 2.6))
  medians = {short: [x['ms'][name]['p50'] for x in found] for name, short in names.items()}
  _stack(axes, [str(x['asked']['video_steps']) for x in found], medians)
  whole = [x['ms']['whole prediction']['p50'] for x in found]
  axes.plot(whole, range(len(found)), 'k|', markersize=18, label='one call')
  axes.set_ylabel('video steps')
  axes.set_xlabel(f'p50, ms, measured on {found[0]["device"]}')
  _save(figure, axes, path)


def _plot_static(found: list[dict], path: pathlib.Path) -> None:
  import matplotlib.pyplot as plt

  rows = [(x, steps) for x in found for steps in x['replan_s']]
  shares = {
    'encode': lambda s, _: s['encode'], 'video steps': lambda s, n: s[f'video, {n}'],
    'anchored forward': lambda s, _: s['anchored forward'], 'actions': lambda s, _: s['actions'],
  }  # fmt: skip
  seconds = {
    name: [1e3 * share(x['seconds'], n) for x, n in rows] for name, share in shares.items()
  }
  figure, axes = plt.subplots(figsize=(6.4, 3.0))
  _stack(axes, [f'{x["topology"].split(":")[0]}, {steps}' for x, steps in rows], seconds)
  axes.set_ylabel('chip, video steps')
  axes.set_xlabel('ms, static estimate of the TPU compiler (not measured)')
  _save(figure, axes, path)


def _stack(axes, labels: list[str], parts: dict[str, list[float]]) -> None:
  left = np.zeros(len(labels))
  for name, values in parts.items():
    axes.barh(range(len(labels)), values, left=left, height=0.6, label=name)
    left += values
  axes.set_yticks(range(len(labels)), labels)
  axes.invert_yaxis()


def _save(figure, axes, path: pathlib.Path) -> None:
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(loc='upper center', bbox_to_anchor=(0.5, 1.25), ncols=5, frameon=False, fontsize=8)
  figure.savefig(path, dpi=120, bbox_inches='tight')


_REPORTS = {
  'parts': report_parts,
  'ratio': report_ratio,
  'robots': report_robots,
  'refresh': report_refresh,
  'cold': report_cold,
  'static': report_static,
}


if __name__ == '__main__':
  main()
