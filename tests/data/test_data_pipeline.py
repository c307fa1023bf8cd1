import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from episode_factory import encode_text, make_store

from wallwm_jax.config import DataConfig, ExperimentConfig, ModelConfig
from wallwm_jax.data.pipeline import PlanSource, make_dataset
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


@pytest.mark.parametrize('window', ['event', 'chunk'])
def test_resume_continues_with_the_identical_batch(store, window):
  config = _config(window=window, buckets=(4,) if window == 'chunk' else (2, 4))
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
  assert len(json.dumps(state)) < 600


def test_threads_do_not_change_batches(store):
  _assert_equal(_take(_config(), store, 6), _take(_config(threads=3), store, 6))


@pytest.mark.slow
def test_worker_processes_do_not_change_batches_or_resume(store):
  want = _take(_config(), store, 6)
  iterator = make_dataset(_config(workers=2), store, IDENTITY, encode_text)
  got = [next(iterator) for _ in range(3)]
  state = iterator.get_state()
  iterator.close()
  plain = make_dataset(_config(), store, IDENTITY, encode_text)
  plain.set_state(state)
  _assert_equal(got + [next(plain) for _ in range(3)], want)


def test_hosts_hold_contiguous_parts_of_the_global_batch(store):
  want = _take(_config(), store, 5)
  parts = [_take(_config(), store, 5, process_index=h, process_count=2) for h in range(2)]
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
