"""The tabletop as anyone's robot data: what was done to it is found again, and by every run."""

import json

import numpy as np
import pytest
from rich.console import Console

from wallwm_jax.commands import data_tour
from wallwm_jax.commands.clock import Clock
from wallwm_jax.data.faults import find_faults
from wallwm_jax.types import DataError

pytestmark = pytest.mark.slow


def prepare(episodes, out):
  return data_tour.prepare(episodes, out, Clock(Console(quiet=True)))


@pytest.fixture(scope='module')
def tour(episodes, tmp_path_factory):
  out = tmp_path_factory.mktemp('tour') / 'first'
  return out, prepare(episodes, out)


def test_lags_and_broken_episodes_are_found(tour):
  _, summary = tour
  assert summary['lags']['found'] == {'tabletop/': data_tour.LATE}
  refused = summary['refused']
  assert (refused['broken'], refused['broken_refused'], refused['sound_refused']) == (2, 2, 0)
  assert [reason.split()[1] for reason in refused['reasons'].values()] == [
    'frozen',
    'kinematic_jump',
  ]
  counts = summary['ledger']
  assert counts['read'] == 20 == counts['episodes'] + counts['quarantined']


def test_boundaries_are_found(tour):
  found = tour[1]['boundaries']['within 3 frames']
  assert found['f1'] >= 0.95 > found['chance_f1']
  by_second = tour[1]['boundaries']['seconds']
  assert by_second['proposed']['mean_f1'] > by_second['chance']['mean_f1']


def test_batches_are_packed(tour):
  assert tour[1]['packing']['fill'] > 0.9
  assert tour[1]['packing']['events_per_row'] > 2


def test_a_second_run_gives_the_same_bytes(tour, episodes, tmp_path):
  out, summary = tour
  again = prepare(episodes, tmp_path / 'second')
  assert again['digests'] == summary['digests']
  assert json.loads((out / 'summary.json').read_text())['digests'] == summary['digests']


def test_results_are_complete_and_never_overwritten(tour, episodes):
  out, _ = tour
  assert not list(find_faults(out / 'store'))
  assert (out / 'data.html').stat().st_size > 10_000
  with pytest.raises(DataError, match='does not exist or is empty'):
    prepare(episodes, out)


def test_what_was_recorded_tells_nothing_but_the_task(episodes):
  record = data_tour.degraded(episodes[0], 0)
  assert {span.level for span in record.captions} == {'L3'}
  assert len(record.events) == 1 and record.events[0].label == 'unlabelled'
  np.testing.assert_array_equal(record.state[4], episodes[0].state[4])
  for view, frames in data_tour.LATE.items():
    np.testing.assert_array_equal(record.frames[view][4], episodes[0].frames[view][4 + frames])
