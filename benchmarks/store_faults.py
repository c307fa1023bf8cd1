"""Share of injected faults of an event store that verification reports, with file, record and
reason, and how many reach a reader in silence.

wallwm bench store_faults
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import shutil
import sys
import tempfile

import harness
import numpy as np

from wallwm_jax.data.faults import find_faults

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / 'tests' / 'data'))

import fault_factory  # noqa: E402


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--faults', type=int, default=1000)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  rng = np.random.default_rng(args.seed)
  tallies: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    stores = {}
    for codec in ('zstd', 'h264'):
      (root / codec).mkdir()
      whole, other = fault_factory.make_stores(root / codec, codec)
      assert not find_faults(whole)
      stores[codec] = whole, other, fault_factory.read_everything(whole)
    for i in range(args.faults):
      kind = fault_factory.KINDS[i % len(fault_factory.KINDS)]
      tally = tallies[kind.__name__]
      tally.update(_try(kind, *stores[('zstd', 'h264')[i // len(fault_factory.KINDS) % 2]],
                        root / 'damaged', rng))  # fmt: skip
  total = sum(tallies.values(), collections.Counter())
  harness.report(
    'injected store faults that verification reports (file and reason named, and the record where '
    'one is hit)',
    'share',
    args.faults,
    value=total['reported'] / args.faults,
    file_named=total['file_named'] / args.faults,
    records_hit=total['records_hit'],
    records_named=total['records_named'],
    reads_with_other_content=total['silent'],
    kinds={name: dict(tally) for name, tally in tallies.items()},
  )


def _try(kind, whole, other, content, folder, rng) -> dict[str, int]:
  path, hit = fault_factory.damage(kind, whole, other, folder, rng)
  found = find_faults(path)
  name = hit.relative_to(path).as_posix()
  harmed = fault_factory.harmed_records(path, whole, hit)
  named = {fault.record for fault in found if fault.file == name}
  read = fault_factory.read_everything(path)
  silent = read is not None and any(
    now is not None and now != then for now, then in zip(read, content, strict=False)
  )
  shutil.rmtree(path)
  return {
    'faults': 1,
    'reported': int(bool(found) and all(fault.reason for fault in found)),
    'file_named': int(any(fault.file == name for fault in found)),
    'records_hit': len(harmed),
    'records_named': len(harmed & named),
    'silent': int(silent),
  }


if __name__ == '__main__':
  main()
