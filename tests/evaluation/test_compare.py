"""Comparisons of two evaluation files: paired tests, and what is refused."""

import copy
import itertools
import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax import cli
from wallwm_jax.evaluation import compare
from wallwm_jax.types import DataError


def closed(success, progress=None) -> dict:
  progress = [100.0 * s for s in success] if progress is None else progress
  rows = [
    {'attempt': i, 'kind': 'push', 'success': bool(s), 'progress': p, 'time_s': 1.0 if s else None}
    for i, (s, p) in enumerate(zip(success, progress))
  ]
  suite = {'kind': 'closedloop', 'seed': 0, 'tasks': 'push', 'episodes': len(rows), 'max_steps': 8}
  return {'suite': suite, 'rows': rows}


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-4, 4)), min_size=1, max_size=7))
def test_sign_flips_are_all_tried(pairs):
  groups, differences = np.array(pairs).T
  sums = [differences[groups == g].sum() for g in set(groups.tolist())]
  seen = abs(sum(sums))
  flips = [
    abs(sum(s * x for s, x in zip(signs, sums)))
    for signs in itertools.product((1, -1), repeat=len(sums))
  ]
  want = np.mean([flip >= seen for flip in flips])
  assert compare.sign_flip_test(differences, groups) == pytest.approx(want)


def test_random_sign_flips_agree_with_scipy():
  values = np.random.default_rng(0).normal(0.3, 1.0, 40)
  want = scipy.stats.permutation_test(
    (values,), np.mean, permutation_type='samples', n_resamples=20_000, rng=1
  ).pvalue
  assert compare.sign_flip_test(values, np.arange(40)) == pytest.approx(want, abs=0.02)


def test_successes_are_compared_by_mcnemar_and_times_where_both_have_one():
  first, second = [1, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 0]
  found = compare.compare(closed(first), closed(second))
  assert found['success'].p == pytest.approx(scipy.stats.binomtest(1, 6).pvalue)
  assert found['success'].change.value == pytest.approx(4 / 7)
  assert (found['time_s'].n, found['time_s'].dropped) == (1, 6)
  assert found['progress'].first == pytest.approx(200 / 7)
  assert set(found) == {'success', 'progress', 'time_s'}


def test_events_are_matched_by_uid_whatever_their_order():
  rows = [{'uid': 7 + i, 'episode': i // 2, 'action_mae': float(i)} for i in range(4)]
  first = {'suite': {'kind': 'openloop', 'seed': 0, 'store': 'here'}, 'rows': rows}
  worse = [row | {'action_mae': row['action_mae'] + 0.5} for row in reversed(rows)]
  second = {'suite': {'kind': 'openloop', 'seed': 0, 'store': 'there'}, 'rows': worse}
  found = compare.compare(first, second)['action_mae']
  assert (found.change.low, found.change.high) == pytest.approx((0.5, 0.5))
  assert found.change.n == 2 and found.p == pytest.approx(0.5)  # two episodes: 2 of 4 flips


def changed(**suite) -> dict:
  other = closed([1, 0])
  other['suite'] |= suite
  return other


@pytest.mark.parametrize(
  'other, message',
  [
    (changed(seed=1), 'seed = 0 in the first file and 1'),
    (changed(tasks='lift'), 'tasks'),
    (closed([1, 0, 1]), 'episodes = 2 in the first file and 3'),
    ({'success': 0.5}, '"suite" and "rows" in the second file'),
    (closed([1, 0]) | {'rows': closed([1])['rows']}, 'the same attempts in both'),
    (closed([1, 0]) | {'rows': 2 * closed([1])['rows']}, 'a different attempt in every row'),
  ],
)
def test_files_that_are_not_comparable_are_refused(other, message):
  with pytest.raises(DataError, match=message):
    compare.compare(closed([1, 0]), other)


def test_attempts_of_other_kinds_are_refused():
  other = copy.deepcopy(closed([1, 0]))
  other['rows'][1]['kind'] = 'lift'
  with pytest.raises(DataError, match="attempt 1: kind is 'push'"):
    compare.compare(closed([1, 0]), other)


def test_the_verb_writes_a_page_and_refuses_with_an_error(tmp_path, capsys):
  paths = [tmp_path / name for name in ('a.json', 'b.json', 'c.json')]
  for path, scores in zip(paths, (closed([1, 0]), closed([1, 1]), closed([1]))):
    path.write_text(json.dumps(scores))
  out, scores = tmp_path / 'deep' / 'compare.html', tmp_path / 'compare.json'
  argv = ['eval', 'compare', *map(str, paths[:2]), '--html', str(out), '--json', str(scores)]
  assert cli.main(argv) == 0
  printed = json.loads(capsys.readouterr().out)
  assert printed == json.loads(scores.read_text())
  assert printed['metrics']['success']['difference'] == 0.5
  page = out.read_text()
  assert 'mcnemar' in page and '<script' not in page and 'http' not in page
  assert cli.main(['eval', 'compare', str(paths[0]), str(paths[2])]) == 1
  assert 'episodes = 2' in capsys.readouterr().err
  paths[2].write_text('no json')
  assert cli.main(['eval', 'compare', str(paths[0]), str(paths[2])]) == 1
  assert 'expected the JSON' in capsys.readouterr().err
