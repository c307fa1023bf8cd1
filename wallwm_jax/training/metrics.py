"""Training metrics without stalling the device: TensorBoard, metrics.jsonl and one progress line.

Step metrics stay on the device until the interval after theirs has been dispatched and are then
fetched together, so the host never waits for the step it has just launched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import rich.progress
import tensorboardX

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.training.flops import batch_tokens, model_flops
from wallwm_jax.types import WallWMError

FILE = 'metrics.jsonl'
NONFINITE = 'nonfinite_leaf'


class NonFiniteLossError(WallWMError, FloatingPointError):
  """The loss or a gradient became NaN or infinite."""


@dataclasses.dataclass
class _Interval:
  """Steps that are logged together, their metrics still on the device."""

  steps: list[int] = dataclasses.field(default_factory=list)
  metrics: list[dict[str, jax.Array]] = dataclasses.field(default_factory=list)
  tokens: int = 0
  flops: float = 0.0
  seconds: float = 0.0


class MetricLogger:
  """Writes the mean of every interval of `train.log_every` steps; use as a context manager.

  Records are dicts {'step', the step's metrics, 'step_time_s', 'tokens_per_s', and 'mfu' where
  train.peak_tflops is known}. The first step time includes compilation.
  """

  def __init__(self, workdir: str | os.PathLike, config: ExperimentConfig, start: int,
               devices: int, progress: bool,
               on_log: Callable[[dict[str, Any]], None] | None = None,
               gradients: Sequence[str] = ()):
    """Continues after step `start`; what an interrupted run logged beyond it is dropped.

    Args:
      gradients: names of the leaves that the metric 'nonfinite_leaf' counts.
    """
    self._config, self._devices, self._on_log = config, devices, on_log
    self._gradients = gradients
    path = pathlib.Path(workdir) / FILE
    self.history = _read_until(path, start)
    path.write_text(''.join(json.dumps(record) + '\n' for record in self.history))
    self._file = path.open('a')
    self._board = tensorboardX.SummaryWriter(
        str(path.parent / 'tensorboard'), purge_step=start + 1 if start else None)
    self._bar = _progress_bar(config, start, disable=not progress)
    self._current = _Interval()
    self._previous: _Interval | None = None
    self._clock = time.perf_counter()

  def __enter__(self) -> MetricLogger:
    self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    self._bar.stop()
    self._file.close()
    self._board.close()

  def add(self, step: int, metrics: dict[str, jax.Array], bucket: int) -> None:
    """Notes the (still running) metrics of a step that just went out; bucket is N of its batch, 0
    where it holds moments."""
    current = self._current
    current.steps.append(step)
    current.metrics.append(metrics)
    current.tokens += batch_tokens(self._config, bucket)
    current.flops += model_flops(self._config, bucket)
    if step % self._config.train.log_every == 0:
      self._write(self._previous)
      self._previous = self._close()

  @contextlib.contextmanager
  def settled(self) -> Iterator[None]:
    """Inside, every step so far is written and known finite; time spent inside is not step time.

    Raises:
      NonFiniteLossError: naming the steps.
    """
    self._write(self._previous)
    self._previous = None
    if self._current.steps:
      jax.block_until_ready(self._current.metrics)
      self._write(self._close())
    yield
    self._clock = time.perf_counter()

  def _close(self) -> _Interval:
    closed, self._current = self._current, _Interval()
    now = time.perf_counter()
    closed.seconds, self._clock = now - self._clock, now
    return closed

  def _write(self, interval: _Interval | None) -> None:
    if interval is None:
      return
    values = jax.device_get(interval.metrics)
    _check_finite(interval.steps, values, self._gradients)
    record: dict[str, Any] = {'step': interval.steps[-1]}
    names = [name for name in values[0] if name != NONFINITE]
    record |= {name: float(np.mean([v[name] for v in values])) for name in names}
    record['step_time_s'] = interval.seconds / len(values)
    record['tokens_per_s'] = interval.tokens / interval.seconds
    if self._config.train.peak_tflops > 0:
      peak = self._config.train.peak_tflops * 1e12 * self._devices
      record['mfu'] = interval.flops / interval.seconds / peak
    self._emit(record)

  def _emit(self, record: dict[str, Any]) -> None:
    self.history.append(record)
    self._file.write(json.dumps(record) + '\n')
    self._file.flush()
    for name in record.keys() - {'step'}:
      self._board.add_scalar(name, record[name], record['step'])
    self._bar.update(self._bar.task_ids[0], completed=record['step'], status=_status(record))
    if self._on_log is not None:
      with jax.transfer_guard('allow'):  # the loop's guard is not the caller's concern
        self._on_log(record)


def _check_finite(
    steps: list[int], values: list[dict[str, Any]], gradients: Sequence[str]) -> None:
  for step, metrics in zip(steps, values, strict=True):
    for name in ('loss', 'grad_norm'):
      if not np.isfinite(metrics[name]):
        leaf, first = int(metrics.get(NONFINITE, -1)), ''
        if leaf >= 0:
          first = f' The first gradient that is not finite is that of {gradients[leaf]}.'
        raise NonFiniteLossError(
            f'training diverged: expected a finite {name}, got {metrics[name]} at step {step} (in '
            f'the interval {steps[0]}..{steps[-1]}).{first} No checkpoint was written since. Lower '
            'optim.lr, or look at the data of that step.')


def _read_until(path: pathlib.Path, step: int) -> list[dict[str, Any]]:
  """Records of an earlier part of the run; a line cut off by a crash is dropped."""
  records = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      record = json.loads(line)
    except ValueError:
      break
    if record['step'] <= step:
      records.append(record)
  return records


def _progress_bar(config: ExperimentConfig, start: int, disable: bool) -> rich.progress.Progress:
  bar = rich.progress.Progress(
      rich.progress.TextColumn('{task.description}'), rich.progress.BarColumn(bar_width=20),
      rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn(),
      rich.progress.TextColumn('{task.fields[status]}'), disable=disable)
  bar.add_task(f'stage {config.train.stage}', total=config.train.steps, completed=start,
               status='compiling')
  return bar


def _status(record: dict[str, Any]) -> str:
  mfu = f'  MFU {record["mfu"]:.1%}' if 'mfu' in record else ''
  return (f'loss {record["loss"]:.4f}  {1e3 * record["step_time_s"]:.0f} ms/step  '
          f'{record["tokens_per_s"]:,.0f} tokens/s{mfu}')
