import collections
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from episode_factory import encode_text, make_store

from wallwm_jax.config import DataConfig, ExperimentConfig, ModelConfig
from wallwm_jax.data.cluster import Labels
from wallwm_jax.data.pipeline import (
  PackedSource,
  PlanSource,
  fingerprint,
  make_dataset,
  make_reader,
  open_stream,
)
from wallwm_jax.types import CheckpointError, ConfigError, NormStats

IDENTITY = NormStats(*(np.full(n, v, np.float32) for n in (10, 10, 96) for v in (0, 1)))
MODEL = ModelConfig(image_size=(16, 16), future=4)


def _config(model=MODEL, **data):
  data = {'batch_size': 4, 'buckets': (2, 4), 'threads': 0} | data
  return ExperimentConfig(model=model, data=DataConfig(**data))


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return make_store(tmp_path_factory.mktemp('pipeline') / 's', episodes=8, heldout=0.25)


def _take(config, store, count, **hosts):
  iterator = make_dataset(config, store, IDENTITY, encode_text, **hosts)
  batches = list(itertools.islice(iterator, count))
  iterator.close()
  return batches


def _assert_equal(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_batches_have_the_bucket_shape_and_only_training_events(store):
  train = {
    tuple(np.array([u & 0xFFFFFFFF, u >> 32], np.uint32))
    for u in store.column('uid')[store.column('split') == 'train'].tolist()
  }
  shapes = set()
  for batch in _take(_config(), store, 12):
    shapes.add(batch.frames.shape)
    assert batch.actions.shape[1] == batch.frames.shape[2] - 1
    assert {tuple(u) for u in batch.uid} <= train
    assert (batch.num_frames <= batch.frames.shape[2]).all()
  assert shapes == {(4, 3, 9, 16, 16, 3), (4, 3, 17, 16, 16, 3)}


@pytest.mark.parametrize('kind', ['event', 'chunk', 'packed'])
def test_resume_continues_with_the_identical_batch(store, kind):
  config = {
    'event': _config(),
    'chunk': _config(window='chunk', buckets=(4,)),
    'packed': _config(pack=11),
  }[kind]
  want = _take(config, store, 8)
  iterator = make_dataset(config, store, IDENTITY, encode_text)
  for _ in range(5):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  iterator.close()
  fresh = make_dataset(config, store, IDENTITY, encode_text)
  next(fresh)
  fresh.set_state(state)
  assert fresh.get_state() == state
  _assert_equal([next(fresh) for _ in range(3)], want[5:])
  assert len(json.dumps(state)) < 800
  assert len(json.dumps({'position': state['position']})) <= 64


@pytest.mark.parametrize('pack', [0, 11])
def test_threads_do_not_change_batches(store, pack):
  _assert_equal(_take(_config(pack=pack), store, 6), _take(_config(pack=pack, threads=3), store, 6))


@pytest.mark.slow
@pytest.mark.parametrize('pack', [0, 11])
def test_worker_processes_do_not_change_batches_or_resume(store, pack):
  want = _take(_config(pack=pack), store, 6)
  iterator = make_dataset(_config(pack=pack, workers=2), store, IDENTITY, encode_text)
  got = [next(iterator) for _ in range(3)]
  state = iterator.get_state()
  iterator.close()
  plain = make_dataset(_config(pack=pack), store, IDENTITY, encode_text)
  plain.set_state(state)
  _assert_equal(got + [next(plain) for _ in range(3)], want)


@pytest.mark.parametrize('pack', [0, 11])
def test_hosts_hold_contiguous_parts_of_the_global_batch(store, pack):
  config = _config(pack=pack)
  want = _take(config, store, 5)
  parts = [_take(config, store, 5, process_index=h, process_count=2) for h in range(2)]
  joined = [jax.tree.map(lambda a, b: np.concatenate([a, b]), x, y) for x, y in zip(*parts)]
  _assert_equal(joined, want)


def test_state_moves_between_host_counts(store):
  want = _take(_config(), store, 6)
  host = make_dataset(_config(), store, IDENTITY, encode_text, process_index=1, process_count=4)
  for _ in range(4):
    next(host)
  single = make_dataset(_config(), store, IDENTITY, encode_text)
  single.set_state(host.get_state())
  _assert_equal([next(single), next(single)], want[4:])


SOURCES = {0: PlanSource, 23: PackedSource}


def _stream(config, store, host=0, hosts=1):
  """Batches of draws, int [rows, 6, 4], in the place of windows: the plan without the pixels."""
  source = SOURCES[config.data.pack](store, config, hosts)

  def read(element):
    draws = list(element) if config.data.pack else [element]
    return np.array(draws + [(-1,) * 4] * (11 - len(draws)))

  return open_stream(config, source, read, fingerprint(config, store, source), host, hosts)


def _digests(config, store, steps, hosts, state=None):
  """sha256 of every global batch, and the state after the last."""
  streams = [_stream(config, store, host, hosts) for host in range(hosts)]
  for stream in streams if state else ():
    stream.set_state(json.loads(json.dumps(state)))
  found = [
    hashlib.sha256(np.concatenate([next(stream) for stream in streams]).tobytes()).hexdigest()
    for _ in range(steps)
  ]
  states = [stream.get_state() for stream in streams]
  assert all(other == states[0] for other in states)
  return found, states[0]


@pytest.mark.parametrize('pack', [0, 23])
def test_global_stream_does_not_depend_on_hosts_cuts_or_changes_of_both(store, pack):
  config, steps = _config(pack=pack, batch_size=8), 150
  # From the middle of the stream, so that it crosses from one block of draws into the next.
  begin = _stream(config, store).get_state()
  begin['position'][0] = 8 * 480
  want, _ = _digests(config, store, steps, 1, begin)
  assert len(set(want)) == steps
  for hosts in (2, 4, 8):
    assert _digests(config, store, 10, hosts, begin)[0] == want[:10]
  rng = np.random.default_rng(pack)
  got, state = [], begin
  cuts = np.sort(rng.choice(np.arange(1, steps), 20, replace=False))
  for start, stop in itertools.pairwise([0, *cuts.tolist(), steps]):
    part, state = _digests(config, store, stop - start, int(rng.choice([1, 2, 4, 8])), state)
    assert len(json.dumps({'position': state['position']})) <= 64
    got += part
  assert got == want


def test_hosts_see_the_same_mixture(store):
  """No host may end up with some labels only."""
  config = _config(batch_size=8, balance=1.0, buckets=(4,))
  label, hosts = store.column('label'), 4
  for host in range(hosts):
    source = PlanSource(store, config, hosts)
    seen = collections.Counter(label[source[i].event] for i in range(host, 4096, hosts))
    assert min(seen.values()) > 0.85 * max(seen.values())


def test_packed_draws_are_whole_events_each_planned_draw_once(store):
  config = _config(pack=23, batch_size=8)
  source = PackedSource(store, config, 1)
  start, end = store.column('start'), store.column('end')
  events, latents = collections.Counter(), 0
  rows = next(r for r in itertools.count(1) if source._rows.landmark(r)[0] == 2)  # two blocks
  for index in range(rows):
    draws = source[index]
    assert sum(1 + draw.bucket for draw in draws) <= 23
    for draw in draws:
      assert draw.anchor == start[draw.event]
      assert draw.bucket == min(4, -(-(end[draw.event] - draw.anchor - 1) // 4))
      events[draw.event] += 1
      latents += 1 + draw.bucket
  plan = source._rows._plan
  want = np.bincount(np.concatenate([plan.block(0), plan.block(1)]))
  assert [events[e] for e in source._events] == want.tolist()
  assert latents / (23 * rows) > 0.95  # costs of 3, 5 and 3, four 5s and a 3 or seven 3s to a row


CHILD = """
import json, os, pathlib, sys
sys.path[:0] = {paths!r}
import numpy as np
import test_data_pipeline as here
from wallwm_jax.data.store import EventStore

log, state, steps = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
config = here._config(pack=23, batch_size=8)
stream = here._stream(config, EventStore({store!r}))
if state.exists():
  stream.set_state(json.loads(state.read_text()))
with open(log, 'a') as file:
  for step in range(stream.get_state()['position'][0] // 8, steps):
    if step % 7 == 0:  # a checkpoint
      file.flush()
      state.with_suffix('.new').write_text(json.dumps(stream.get_state()))
      os.replace(state.with_suffix('.new'), state)
    print(json.dumps([step, next(stream).tolist()]), file=file, flush=True)
"""


@pytest.mark.slow
def test_every_draw_is_seen_once_in_spite_of_kill_9(store, tmp_path):
  steps, log, state = 250, tmp_path / 'log', tmp_path / 'state'
  tests = pathlib.Path(__file__).parent
  child = CHILD.format(paths=[str(tests), str(tests.parents[1])], store=str(store.path))
  command = [sys.executable, '-c', child, str(log), str(state), str(steps)]
  run = subprocess.Popen(command, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  while not log.exists() or log.read_text().count('\n') < 60:
    assert run.poll() is None
    time.sleep(0.05)
  run.send_signal(signal.SIGKILL)
  run.wait()
  before = log.read_text()  # its last line may be cut
  assert before.count('\n') < steps
  resumed = json.loads(state.read_text())['position'][0] // 8
  assert subprocess.run(command, env=os.environ | {'JAX_PLATFORMS': 'cpu'}).returncode == 0
  first = [json.loads(line) for line in before.splitlines(keepends=True) if line.endswith('\n')]
  second = [json.loads(line) for line in log.read_text()[len(before) :].splitlines()]
  # A training run forgets what came after its last checkpoint.
  seen = {step: batch for step, batch in first if step < resumed}
  assert [step for step, _ in second] == list(range(resumed, steps))
  seen |= dict(second)
  stream = _stream(_config(pack=23, batch_size=8), store)
  assert [seen[step] for step in range(steps)] == [next(stream).tolist() for _ in range(steps)]


def test_clusters_sources_and_recovery_shape_the_draws(store, tmp_path):
  n = len(store.events)
  uid = store.column('uid')
  vl, act = (np.arange(n) % 5 == 0).astype(np.int32), np.arange(n, dtype=np.int32) % 2
  far = np.zeros(n, np.float32)
  meta = {'format': 'wallwm-clusters', 'version': 1, 'store': store.digest}
  Labels(uid, vl, act, far, far, meta).save(tmp_path / 'c')
  config = _config(clusters=str(tmp_path / 'c'), balance=1.0, buckets=(4,), batch_size=8)
  source = PlanSource(store, config, 1)
  block = source._plan._plans[0].block_size
  drawn = np.array([source[i].event for i in range(block)])
  assert abs(vl[drawn].mean() - 0.5) < 2 / block and abs(act[drawn].mean() - 0.5) < 2 / block
  moved = _config(clusters=str(tmp_path / 'd'), balance=1.0, buckets=(4,), batch_size=8)
  os.rename(tmp_path / 'c', tmp_path / 'd')
  state = _stream(moved, store).get_state()
  Labels(uid, act, vl, far, far, meta).save(tmp_path / 'c')
  with pytest.raises(CheckpointError, match='draws: '):
    _stream(dataclasses.replace(config, data=dataclasses.replace(
      config.data, balance_cap=1.0)), store).set_state(state)


def test_state_of_another_stream_is_refused(store, tmp_path):
  state = make_dataset(_config(), store, IDENTITY, encode_text).get_state()
  with pytest.raises(CheckpointError, match='seed: 0 then, 1 now'):
    make_dataset(_config(seed=1), store, IDENTITY, encode_text).set_state(state)
  other = make_store(tmp_path / 'other', episodes=3)
  with pytest.raises(CheckpointError, match='store'):
    make_dataset(_config(), other, IDENTITY, encode_text).set_state(state)
  make_dataset(_config(threads=4), store, IDENTITY, encode_text).set_state(state)


def test_chunk_anchors_cover_events_but_leave_an_action(store):
  config = _config(window='chunk', buckets=(4,), batch_size=16, balance=0.0)
  source = PlanSource(store, config, 1)
  start, end, offsets = store.column('start'), store.column('end'), {}
  for i in range(3000):
    draw = source[i]
    assert start[draw.event] <= draw.anchor < end[draw.event] - 1
    offsets.setdefault(draw.event, set()).add(draw.anchor - start[draw.event])
  assert all(offsets[e] == set(range(end[e] - start[e] - 1)) for e in offsets)


def test_a_share_of_event_windows_begins_midway_and_ends_with_its_event(store):
  plain, config = _config(batch_size=16), _config(batch_size=16, midway=0.25)
  source, begun = PlanSource(store, config, 1), PlanSource(store, plain, 1)
  start, end = store.column('start'), store.column('end')
  reader = make_reader(config, store, IDENTITY, encode_text)
  moved = 0
  for i in range(2000):
    draw, same = source[i], begun[i]
    assert (draw.event, draw.bucket) == (same.event, same.bucket)
    assert start[draw.event] <= draw.anchor < end[draw.event] - 1
    moved += draw.anchor != start[draw.event]
    assert reader.window(draw).frames.max() <= end[draw.event] - 1
  kept = np.mean(1 - 1 / (end - start - 1)[[source[i].event for i in range(2000)]])
  assert abs(moved / 2000 - 0.25 * kept) < 0.03  # 3 standard deviations of 2,000 draws


@pytest.mark.parametrize(
  'config,message',
  [
    (_config(split='trian'), "data.split='trian'.*Did you mean 'train'"),
    (_config(dataclasses.replace(MODEL, views=('top',))), "model.views.*only .'front'"),
    (
      _config(
        dataclasses.replace(MODEL, action_spec=dataclasses.replace(MODEL.action_spec, arms=2))
      ),
      'width 20',
    ),
    (_config(window='chunk', buckets=(2,)), r'expected \(4,\)'),
  ],
)
def test_config_that_does_not_fit_the_store(store, config, message):
  with pytest.raises(ConfigError, match=message):
    make_dataset(config, store, IDENTITY, encode_text)


def test_batch_must_divide_over_hosts(store):
  with pytest.raises(ConfigError, match='not a multiple of 3 hosts'):
    make_dataset(_config(), store, IDENTITY, encode_text, process_index=0, process_count=3)
