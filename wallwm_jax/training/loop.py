"""The training run: one function, read top to bottom."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import rich.console
import rich.table
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wallwm_jax import weights
from wallwm_jax.config import LANGUAGE_STAGES, ExperimentConfig, MeshConfig
from wallwm_jax.data import latents, moments, pipeline, stats
from wallwm_jax.data.store import EventStore
from wallwm_jax.models import language
from wallwm_jax.optim import (
  format_plan,
  format_table,
  make_muon_plan,
  newton_schulz,
  optimizer_of,
  route,
)
from wallwm_jax.parallel import distributed, rules
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.text.factory import make_text_encoder
from wallwm_jax.text.planning import make_planning_texts
from wallwm_jax.training import checkpoints
from wallwm_jax.training.metrics import MetricLogger
from wallwm_jax.training.pretrained import (
  codec_digest,
  latent_encoder,
  load_frozen,
  load_language,
  load_video,
)
from wallwm_jax.training.stages import (
  BESIDE_STUDENT,
  STAGES,
  parts,
  stage_of,
  trainable_mask,
  trained_parts,
)
from wallwm_jax.training.state import (
  TrainState,
  abstract_state,
  build_optimizer,
  count,
  init_state,
  param_shapes,
)
from wallwm_jax.training.step import make_train_step
from wallwm_jax.types import (
  EventBatch,
  Frozen,
  LanguageBatch,
  NormStats,
  Params,
  path_string,
)

NORM_FILE = 'norm_stats.json'
_PREFETCH = 2  # batches put on the devices ahead of the step that reads them


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What a run left behind: the last step, the record of every logged interval, and where it is."""

  step: int
  history: tuple[dict[str, Any], ...]
  workdir: pathlib.Path
  checkpoint: pathlib.Path


def train(
    config: ExperimentConfig, workdir: str | os.PathLike, *, progress: bool = True,
    on_log: Callable[[dict[str, Any]], None] | None = None
) -> TrainResult:
  """Trains one stage until `train.steps`, resuming from the newest checkpoint of `workdir` if any.

  A resumed run continues bit for bit: parameters, averages, optimizer, step, randomness and the
  next batch. A checkpoint is written every `train.checkpoint_every` steps and at the end.

  Args:
    workdir: created if needed; receives checkpoints/, norm_stats.json, metrics.jsonl, tensorboard/.
    progress: show a progress line. on_log: called with each record as it is written.

  Raises:
    ConfigError, DataError, CheckpointError, StatsMismatchError: see the message.
    NonFiniteLossError: the loss diverged; nothing diverged has been saved.
  """
  workdir = pathlib.Path(workdir).absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  stage_of(config)
  if config.train.compile_cache:
    jax.config.update('jax_compilation_cache_dir', config.train.compile_cache)

  mesh = make_mesh(config.mesh)
  rules.check_rules(param_shapes(config), mesh, config.mesh.rules)
  optimizer = build_optimizer(config, mesh)
  abstract = abstract_state(config, optimizer, mesh)
  step_fn = make_train_step(config, mesh, optimizer, abstract)
  store = EventStore(config.data.store)

  with checkpoints.Checkpoints(workdir, config.train.keep) as saved:
    resumed = saved.restore(abstract) if saved.latest_step() is not None else None
    norm = _norm_stats(config, workdir, store, resumed)
    batches, frozen = _open_inputs(config, store, norm, mesh)
    if resumed is not None:
      state = resumed.state
      batches.set_state(resumed.data)
    else:
      start = _initial_params(config, abstract)
      if 'staircase' in parts(config) and 'staircase' not in start:
        start['staircase'] = _staircase_of(config, frozen, mesh)
      state = init_state(config, optimizer, abstract, start)
    start = int(state.step)

    feed = prefetch(batches, functools.partial(_put, config=config, mesh=mesh), _PREFETCH)
    log = MetricLogger(
        _log_dir(workdir), config, start, mesh.size, progress, on_log, _gradient_names(abstract))
    with contextlib.closing(batches), log, jax.transfer_guard('disallow'):
      for step in range(start + 1, config.train.steps + 1):
        batch, data_state = next(feed)
        state, metrics = step_fn(state, batch, frozen)
        log.add(step, metrics, _bucket(batch, config))
        if step % config.train.checkpoint_every == 0 or step == config.train.steps:
          with log.settled(), jax.transfer_guard('allow'):
            saved.save(state, data_state, norm, config)
    final = saved.latest_step()  # steps beyond the config's, if the workdir had them already
    return TrainResult(final, tuple(log.history), workdir, saved.path / str(final))


def prefetch(
    batches: Any, put: Callable[[Any], Any], size: int
) -> Iterator[tuple[Any, Any]]:
  """Yields (batch on the devices, iterator state after that batch), `size` batches ahead.

  Steps are dispatched asynchronously, so reading the next batch overlaps the running step. The
  state belongs to the yielded batch, not to those read ahead: a resume neither drops nor repeats.
  """
  ahead: collections.deque = collections.deque()
  while True:
    while len(ahead) < size:
      batch = next(batches, None)
      if batch is None:
        break
      ahead.append((put(batch), batches.get_state()))
    if not ahead:
      return
    yield ahead.popleft()


def _bucket(batch: EventBatch | LanguageBatch, config: ExperimentConfig) -> int:
  """Future latents N of a batch of windows; 0 for one of moments."""
  if isinstance(batch, LanguageBatch):
    return 0
  return batch.actions.shape[1] // config.model.steps_per_latent


def _put(batch, *, config: ExperimentConfig, mesh):
  shardings = rules.batch_shardings(config.inputs_spec(), mesh, config.mesh.rules)
  return distributed.put_batch(batch, shardings)


def _open_inputs(
    config: ExperimentConfig, store: EventStore, norm: NormStats, mesh: Mesh
) -> tuple[pipeline.BatchIterator, Frozen]:
  """What a step reads besides its state: the batches, and on every device what never changes.

  The text encoder lives on the devices of this process only as long as this call.
  """
  if config.data.latents:
    described = latents.describe(config, store, codec_digest(config.model))
    events = pipeline.split_events(store, config)
    latents.LatentStore(config.data.latents).check(described, events, config.data.buckets[-1])
  index, count = distributed.data_shard(mesh, config.mesh.rules, config.data.batch_size)
  local = make_mesh(MeshConfig(fsdp=-1), jax.local_devices())
  text = make_text_encoder(config.model.text, mesh=local)
  here = {'process_index': index, 'process_count': count}
  frozen = jax.device_put(
      load_frozen(config, norm, text, mesh=mesh), NamedSharding(mesh, PartitionSpec()))
  reads_prompts = config.train.stage in LANGUAGE_STAGES or config.data.text == 'staircase'
  texts = make_planning_texts(config) if reads_prompts else None
  if texts is not None:
    reader = config.train.stage == '4'
    side = load_language(config, moments.caption_bank(store), text, texts, mesh, reader=reader)
    frozen = dataclasses.replace(frozen, language=side)
  if config.train.stage in LANGUAGE_STAGES:
    return moments.make_moments(config, store, norm, text.encode, texts, **here), frozen
  return pipeline.make_dataset(
      config, store, norm, text.encode, texts and texts.prompts, **here), frozen


def _gradient_names(abstract: TrainState) -> list[str]:
  """Paths and shapes of the trainable parameters (those that have an average), in tree order."""
  leaves = jax.tree_util.tree_leaves_with_path(abstract.ema)
  return [f'{path_string(path)!r} {leaf.shape}' for path, leaf in leaves]


def _log_dir(workdir: pathlib.Path) -> pathlib.Path:
  """The workdir for the main process; each other one keeps its own records inside it."""
  if distributed.is_main_process():
    return workdir
  path = workdir / 'processes' / str(jax.process_index())
  path.mkdir(parents=True, exist_ok=True)
  return path


def _staircase_of(config: ExperimentConfig, frozen: Frozen, mesh: Mesh) -> Params:
  """A new staircase: the upper layers of the VLM."""
  if frozen.language is None:
    texts = make_planning_texts(config)
    side = load_language(config, (), make_text_encoder(config.model.text), texts, mesh)
  else:
    side = frozen.language
  key = jax.random.fold_in(jax.random.key(config.train.seed), 2)
  init = functools.partial(language.init_staircase, config.language)
  return jax.jit(init)(side.vlm, key)


def _initial_params(config: ExperimentConfig, abstract: TrainState) -> Params:
  """Top-level subtrees to start from, {} for a run from scratch."""
  path = config.train.init_from
  if not path:
    return {}
  if weights.is_weights(path):
    return {'video': load_video(path, config.model, abstract.params['video'])}
  # Teacher and critic of a distillation start from its student, whatever else `path` has.
  wanted = {name: tree for name, tree in abstract.params.items() if name not in BESIDE_STUDENT}
  return checkpoints.load_params_for_init(path, wanted)


def _norm_stats(
    config: ExperimentConfig, workdir: pathlib.Path, store: EventStore,
    resumed: checkpoints.Snapshot | None
) -> NormStats:
  """The statistics of this run, also in workdir/norm_stats.json.

  A resumed run keeps those of its checkpoint. A new one computes them from its store, except for
  what the weights of `train.init_from` were trained with: latent statistics always, those of state
  and actions if that run trained the action tower (whatever the data: the weights know no other).

  Raises:
    StatsMismatchError: the file and the checkpoint to resume disagree.
  """
  path = workdir / NORM_FILE
  if resumed is not None:
    norm = resumed.norm
    if path.exists():
      stats.check_match(norm, stats.load(path))
  else:
    norm = stats.compute(store, config, latent_encoder(config.model))
    if config.train.init_from and not weights.is_weights(config.train.init_from):
      norm = _inherit(norm, *checkpoints.load_source(config.train.init_from))
  if distributed.is_main_process():
    stats.save(norm, path)
  return norm


def _inherit(norm: NormStats, source: ExperimentConfig, theirs: NormStats) -> NormStats:
  names = ['latent_mean', 'latent_scale']
  if STAGES[source.train.stage].reads_robot:
    names += ['action_mean', 'action_scale', 'state_mean', 'state_scale']
  return dataclasses.replace(norm, **{name: getattr(theirs, name) for name in names})


def dry_run(config: ExperimentConfig) -> str:
  """What a run would do, without data or allocation: every parameter's optimizer, matrices and
  sharding, and who orthogonalises what.

  Raises:
    ConfigError: everything `train` would refuse about model, stage, rules and mesh.
  """
  stage_of(config)
  shapes, mesh = param_shapes(config), make_mesh(config.mesh)
  rules.check_rules(shapes, mesh, config.mesh.rules)
  rules.batch_shardings(config.inputs_spec(), mesh, config.mesh.rules)
  labels = route(shapes, trainable_mask(shapes, config))
  placed = rules.param_shardings(shapes, mesh, config.mesh.rules)
  plan = make_muon_plan(config.optim, shapes, labels, placed)
  matrices = {leaf.path: leaf.view.shape(leaf.shape) for leaf in plan.leaves}
  table = rich.table.Table('parameter', 'shape', 'optimizer', 'matrices', 'sharding', box=None)
  for (path, leaf), label, sharding in zip(
      jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(labels),
      jax.tree.leaves(placed), strict=True):
    name = path_string(path)
    view = '{} of {} x {}'.format(*matrices[name]) if name in matrices else ''
    table.add_row(name, str(leaf.shape), optimizer_of(label), view, str(sharding.spec))
  console = rich.console.Console(width=120)
  with console.capture() as text:
    console.print(f'stage {config.train.stage} on mesh {dict(mesh.shape)}', highlight=False)
    for name, tree in shapes.items():
      kind = 'trained' if name in trained_parts(config) else 'frozen'
      console.print(f'  {name}: {count(tree):,} parameters, {kind}', highlight=False)
    console.print(format_table(labels, shapes), highlight=False, markup=False)
    if config.optim.optimizer == 'muon':
      summary = format_plan(plan, newton_schulz(config.optim))
      console.print(summary, highlight=False, markup=False, soft_wrap=True)
    console.print(table)
  return text.get()
