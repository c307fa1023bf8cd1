"""What a page shows of latency: each part, the spread of calls, deadlines, the cold start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wallwm_jax.evaluation import page, plots


def section(title: str, measured: Mapping[str, Any]) -> str:
  """measured: of `latency.measure_parts`, and where known what the command adds to it."""
  parts = measured['parts']
  rows = [
    (name, *(f'{x:.1f}' for x in (t.p50_ms, t.p90_ms, t.p99_ms, t.max_ms)),
     f'{t.first_ms / 1000:.1f}', t.n)
    for name, t in parts.items()
  ]  # fmt: skip
  head = ('part', 'p50 [ms]', 'p90 [ms]', 'p99 [ms]', 'max [ms]', 'first call [s]', 'calls')
  blocks = [
    page.table(head, rows),
    page.figure(
      plots.latency_histogram({name: t.times_ms for name, t in parts.items()}),
      'Calls by milliseconds, one panel per part; the line is the median.',
    ),
  ]
  blocks += [table for table in (_deadlines(measured), _cold(measured)) if table]
  return page.section(
    title, f'Until the result lies in host memory, on {measured["device"]}.', *blocks
  )


def _deadlines(measured: Mapping[str, Any]) -> str:
  missed = measured.get('deadline_misses')
  if not missed:
    return ''
  rates = list(next(iter(missed.values())))
  rows = [(name, *(f'{100 * found[r]:.1f} %' for r in rates)) for name, found in missed.items()]
  return page.table(('deadline missed at', *(f'{rate} Hz' for rate in rates)), rows)


def _cold(measured: Mapping[str, Any]) -> str:
  runs = measured.get('cold_start')
  if not runs:
    return ''
  rows = [
    (name.replace('_', ' '), f'{r["total_s"]:.2f}', f'{r["import_s"]:.2f}', f'{r["load_s"]:.2f}',
     f'{r["first_chunk_s"]:.2f}', f'{r["second_chunk_ms"]:.1f}')
    for name, r in runs.items()
  ]  # fmt: skip
  head = (
    'fresh process', 'to the first chunk [s]', 'imports', 'weights', 'first prediction',
    'second [ms]',
  )  # fmt: skip
  return page.table(head, rows)
