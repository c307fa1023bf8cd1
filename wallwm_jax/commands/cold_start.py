"""How long a fresh process takes from its start to the first chunk of actions on the host.

`measure` starts processes of this module: `python -m wallwm_jax.commands.cold_start WORKDIR`.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

LIMIT = 1800  # s that one process may take


def measure(workdir: str | pathlib.Path) -> dict[str, dict[str, float]]:
  """{'empty cache' | 'warm cache': seconds} of two fresh processes, one after the other, that share
  a new folder for compiled programs (JAX_COMPILATION_CACHE_DIR, settings otherwise JAX's own).

  Returns:
    Of each: total_s from the start of the process to the first chunk, and its parts import_s (from
    the start of the process), load_s (weights), first_chunk_s (with compilation); second_chunk_ms.

  Raises:
    ConfigError: the process failed; its last words are in the message.
  """
  with tempfile.TemporaryDirectory() as cache:
    return {name: _fresh(workdir, cache) for name in ('empty cache', 'warm cache')}


def _fresh(workdir: str | pathlib.Path, cache: str) -> dict[str, float]:
  from wallwm_jax.types import ConfigError

  command = [sys.executable, '-m', 'wallwm_jax.commands.cold_start', str(workdir)]
  package = pathlib.Path(__file__).resolve().parents[2]
  paths = [str(package), *filter(None, [os.environ.get('PYTHONPATH')])]
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': cache,
    'PYTHONPATH': os.pathsep.join(paths),
  }
  started = time.time()
  done = subprocess.run(
    command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
  )
  if done.returncode:
    raise ConfigError(
      f'cold start of {workdir}: expected a prediction, got exit {done.returncode}: '
      f'{done.stderr.strip()[-500:]}'
    )
  at = json.loads(done.stdout.splitlines()[-1])
  marks = [started, at['imported'], at['loaded'], at['first'], at['second']]
  spent = [after - before for before, after in zip(marks, marks[1:])]
  return {
    'total_s': at['first'] - started,
    'import_s': spent[0],
    'load_s': spent[1],
    'first_chunk_s': spent[2],
    'second_chunk_ms': 1e3 * spent[3],
  }


def main(workdir: str) -> None:
  """Loads a run, predicts twice, prints when (s since the epoch) each step was over."""
  import jax

  from wallwm_jax.commands.evaluators import observe, one_prediction
  from wallwm_jax.training.checkpoints import load_inference

  at = {'imported': time.time()}
  config, params = load_inference(workdir)
  batch = config.fake_batch(batch_size=1)
  obs = observe(config, params.norm, batch)
  at['loaded'] = time.time()
  predict = jax.jit(one_prediction(config))
  for name in ('first', 'second'):
    jax.device_get(predict(params, obs, batch.text, jax.random.key(0)))
    at[name] = time.time()
  print(json.dumps(at))


if __name__ == '__main__':
  main(sys.argv[1])
