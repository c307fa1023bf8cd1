"""Several processes: start-up, who am I, and global arrays from per-process data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from wallwm_jax.parallel.rules import MeshRules, mesh_rules, partition_spec
from wallwm_jax.types import ConfigError


def initialize(environ: Mapping[str, str]) -> bool:
  """Joins the other processes if the environment says there are some; call it before using JAX.

  environ is the process environment. Recognised: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and
  JAX_PROCESS_ID; TPU slices of several hosts, several slices, Slurm and Open MPI jobs of several
  tasks (JAX reads the details).

  Returns:
    True if this process is one of several.

  Raises:
    ConfigError: a coordinator without the number of processes or the index of this one.
  """
  if jax.distributed.is_initialized():
    return jax.process_count() > 1
  if 'JAX_COORDINATOR_ADDRESS' in environ:
    numbers = [environ.get(name, '') for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')]
    if not all(n.isdigit() for n in numbers):
      raise ConfigError(
          'JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be '
          f'numbers, got {numbers}. Set all three or none.')
    jax.distributed.initialize(environ['JAX_COORDINATOR_ADDRESS'], *map(int, numbers))
  elif _managed_cluster(environ):
    jax.distributed.initialize()
  else:
    return False
  return jax.process_count() > 1


def is_main_process() -> bool:
  """True in the one process that writes logs, reports and other single files."""
  return jax.process_index() == 0


def data_shard(mesh: Mesh, rules: MeshRules, batch_size: int) -> tuple[int, int]:
  """Which part of a global batch this process must load.

  Processes that differ only along axes that do not split the batch load the same part.

  Returns:
    (index, count): rows [index * batch_size / count, (index + 1) * batch_size / count).
  """
  table = mesh_rules(rules, mesh)
  spec = partition_spec(('batch',), (batch_size,), table, mesh, 'config.data.batch_size')
  local = NamedSharding(mesh, spec).addressable_devices_indices_map((batch_size,))
  spans = sorted({index[0].indices(batch_size)[:2] for index in local.values()})
  start, stop = spans[0][0], spans[-1][1]
  rows = sum(b - a for a, b in spans)
  if rows != stop - start or start % rows:
    raise ConfigError(
        f'config.mesh: the batch rows of one process must be one contiguous part, got {spans}. '
        f'Order the mesh axes in config.mesh.rules for "batch" from slow to fast: replica, fsdp.')
  return start // rows, batch_size // rows


def put_batch(batch: Any, shardings: Any) -> Any:
  """Global device arrays from this process's rows (`data_shard`) of every leaf.

  Args:
    batch: tree of NumPy arrays, leading axis = rows of this process.
    shardings: tree of NamedShardings (`rules.batch_shardings` of the global batch).
  """
  return jax.tree.map(lambda x, s: jax.make_array_from_process_local_data(s, x), batch, shardings)


def _managed_cluster(environ) -> bool:
  hosts = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES') or ''
  tasks = [int(environ.get(name, '1')) for name in ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')]
  return ',' in hosts or 'MEGASCALE_COORDINATOR_ADDRESS' in environ or max(tasks) > 1
