"""Latents stand in for frames: the same numbers, whatever happens while they are written."""

import dataclasses
import functools
import pickle

import jax
import numpy as np
import pytest
from episode_factory import encode_text, make_store

from wallwm_jax.config import DataConfig, ExperimentConfig, ModelConfig, VideoConfig
from wallwm_jax.data.encode import encode_store
from wallwm_jax.data.latents import LatentStore, describe
from wallwm_jax.data.pipeline import make_dataset
from wallwm_jax.data.stats import identity
from wallwm_jax.models import functional
from wallwm_jax.types import ConfigError, CorruptStoreError, DataError

CONFIG = ExperimentConfig(
  model=ModelConfig(
    views=('front', 'side'), image_size=(16, 16), video=VideoConfig(patch=(1, 2, 2))
  ),
  data=DataConfig(batch_size=4, buckets=(2, 4), threads=1),
)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return make_store(tmp_path_factory.mktemp('store') / 'events', episodes=4)


@pytest.fixture(scope='module')
def encode():
  return jax.jit(lambda frames: functional.encode_video(CONFIG.model, frames, {}))


@pytest.fixture(scope='module')
def path(store, encode, tmp_path_factory):
  out = tmp_path_factory.mktemp('latents') / 'latents'
  report = encode_store(CONFIG, store, encode, out, dtype='float32', batch_size=3)
  assert report['events'] == len(store.events) and report['resumed'] == 0
  return out


def batches(config, store, count=6):
  data = make_dataset(config, store, identity(config), encode_text)
  return [next(data) for _ in range(count)]


def with_latents(path, **data):
  return dataclasses.replace(
    CONFIG, data=dataclasses.replace(CONFIG.data, latents=str(path), **data)
  )


def test_batches_carry_the_latents_of_their_frames(store, path, encode):
  for given, batch in zip(batches(CONFIG, store), batches(with_latents(path), store), strict=True):
    assert batch.frames is None
    latents = np.asarray(encode(given.frames))
    real = np.arange(latents.shape[2]) < 1 + (given.num_frames[:, None] - 1) // 4
    real = real[:, None, :, None, None, None]
    np.testing.assert_allclose(batch.latents, np.where(real, latents, 0), atol=2e-4)
    spec = with_latents(path).inputs_spec(bucket=latents.shape[2] - 1)
    assert (batch.latents.shape, batch.latents.dtype) == (spec.latents.shape, spec.latents.dtype)
    assert spec.frames is None
    rest = [dataclasses.replace(b, frames=None, latents=None) for b in (given, batch)]
    jax.tree.map(np.testing.assert_array_equal, *rest)


def test_shorter_buckets_read_the_first_latents(store, path):
  short = with_latents(path, buckets=(1,))
  longer = {tuple(u): b for b in batches(with_latents(path), store, 12) for u, b in
            zip(b.uid, b.latents, strict=True)}
  for batch in batches(short, store):
    for uid, latents in zip(batch.uid, batch.latents, strict=True):
      np.testing.assert_array_equal(latents, longer[tuple(uid)][:, :2])


class Killed(Exception):
  pass


def test_an_interrupted_encoding_goes_on_after_its_last_shard(store, encode, path, tmp_path):
  calls = []

  def dies(frames):
    if len(calls) == 4:
      raise Killed
    calls.append(len(frames))
    return encode(frames)

  run = functools.partial(
    encode_store, CONFIG, store, out=tmp_path / 'latents', dtype='float32', batch_size=2,
    shard_bytes=1,
  )
  with pytest.raises(Killed):
    run(encode=dies)
  assert not (tmp_path / 'latents').exists()
  with open(tmp_path / '.latents.encoding/progress.jsonl', 'a') as f:
    f.write('{"shard": ')  # a line that a crash cut short
  report = run(encode=encode)
  assert report['resumed'] == 8
  assert sorted(p.name for p in (tmp_path / 'latents').iterdir()) == [
    'index.parquet', 'manifest.json', 'shards']
  whole, pieces = LatentStore(path), pickle.loads(pickle.dumps(LatentStore(tmp_path / 'latents')))
  pieces.verify()
  for event in range(len(store.events)):
    np.testing.assert_allclose(pieces.latents(event), whole.latents(event), atol=2e-4)


def test_another_run_is_refused_by_name(store, path):
  latents, events = LatentStore(path), np.arange(len(store.events))
  latents.check(describe(CONFIG, store), events, 4)
  other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, views=('front',)))
  with pytest.raises(ConfigError, match=r"views: expected \['front'\], encoded \['front', 'side'"):
    latents.check(describe(other, store), events, 4)
  with pytest.raises(ConfigError, match='codec_digest: expected abc'):
    latents.check(describe(CONFIG, store, 'abc'), events, 4)
  with pytest.raises(ConfigError, match='1 events are missing, first.*longest bucket: expected 6'):
    latents.check(describe(CONFIG, store), np.append(events, len(events)), 6)
  with pytest.raises(ConfigError, match='data.latents.*chunk'):
    with_latents(path, window='chunk')
  with pytest.raises(DataError, match='expected format'):
    LatentStore(store.path)


def test_damage_is_found_and_named(store, encode, tmp_path):
  out = tmp_path / 'latents'
  encode_store(CONFIG, store, encode, out)
  (shard,) = (out / 'shards').iterdir()
  data = bytearray(shard.read_bytes())
  data[data.index(b'latents') + 200] ^= 1
  shard.write_bytes(data)
  with pytest.raises(CorruptStoreError, match='sha256'):
    LatentStore(out).verify()
  with pytest.raises(CorruptStoreError, match=r'record \d+ \(event \d+\)'):
    for event in range(len(store.events)):
      LatentStore(out).latents(event)
  shard.write_bytes(data[:-10])
  with pytest.raises(CorruptStoreError, match='truncated'):
    LatentStore(out)
  with pytest.raises(DataError, match='expected a new folder'):
    encode_store(CONFIG, store, encode, out)


def test_latents_too_large_for_their_type_are_refused(store, tmp_path):
  huge = lambda frames: np.full((*frames.shape[:2], 5, 2, 2, 96), 1e6, np.float32)  # noqa: E731
  with pytest.raises(DataError, match='event .*not finite in float16'):
    encode_store(CONFIG, store, huge, tmp_path / 'latents')
