"""The cache of caption features: what it returns is what was put, or nothing."""

import pathlib
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest

from wallwm_jax.text.cache import FeatureCache, RecentFeatures, find_identity
from wallwm_jax.types import CheckpointError

IDENTITY = {'config': {'width': 5}, 'weights': 'a', 'tokenizer': 'b'}


def _rows(seed=0, count=3, dtype=np.float32):
  return np.random.default_rng(seed).standard_normal((count, 5)).astype(dtype)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return [path for path in folder.rglob('*.features')]


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize('text', ['', 'open the drawer', '抽屉 🤖', 'line\nbreak'])
def test_rows_come_back_bit_by_bit(tmp_path, dtype, text):
  rows = _rows(dtype=dtype)
  FeatureCache(tmp_path, IDENTITY).put(text, rows)
  got = FeatureCache(tmp_path, IDENTITY).get(text)
  assert got.dtype == rows.dtype
  np.testing.assert_array_equal(got, rows)
  assert FeatureCache(tmp_path, IDENTITY).get(text + ' ') is None


def test_another_encoder_has_other_entries(tmp_path):
  FeatureCache(tmp_path, IDENTITY).put('x', _rows())
  for change in ({'weights': 'c'}, {'tokenizer': 'c'}, {'config': {'width': 6}}):
    assert FeatureCache(tmp_path, IDENTITY | change).get('x') is None


def test_every_truncation_and_every_flipped_byte_is_a_miss(tmp_path):
  cache = FeatureCache(tmp_path, IDENTITY)
  cache.put('x', _rows())
  (path,) = _files(tmp_path)
  sound = path.read_bytes()
  for length in range(0, len(sound), 7):
    path.write_bytes(sound[:length])
    assert cache.get('x') is None
  for position in range(len(sound)):
    broken = bytearray(sound)
    broken[position] ^= 0x10
    path.write_bytes(broken)
    assert cache.get('x') is None
  path.write_bytes(sound + b'\0\0\0\0')
  assert cache.get('x') is None
  path.write_bytes(sound)
  np.testing.assert_array_equal(cache.get('x'), _rows())


def test_an_entry_moved_from_elsewhere_is_a_miss(tmp_path):
  ours, theirs = FeatureCache(tmp_path, IDENTITY), FeatureCache(tmp_path, IDENTITY | {'weights': 0})
  ours.put('x', _rows(0))
  (place,) = _files(tmp_path)
  theirs.put('x', _rows(1))
  (foreign,) = set(_files(tmp_path)) - {place}
  place.write_bytes(foreign.read_bytes())  # another encoder's
  assert ours.get('x') is None
  ours.put('x', _rows(0))
  ours.put('y', _rows(2))
  (other,) = set(_files(tmp_path)) - {place, foreign}
  other.write_bytes(place.read_bytes())  # another caption's
  assert ours.get('y') is None
  np.testing.assert_array_equal(ours.get('x'), _rows(0))


def test_a_writer_killed_half_way_leaves_no_entry(tmp_path):
  script = f"""
import os, signal
import numpy as np
from wallwm_jax.text import cache
cache.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
entries = cache.FeatureCache({str(tmp_path)!r}, {IDENTITY!r})
cache._write(entries._path('x'), b'half')
"""
  done = subprocess.run([sys.executable, '-c', script], cwd=pathlib.Path(__file__).parents[2])
  assert done.returncode == -9
  cache = FeatureCache(tmp_path, IDENTITY)
  assert not _files(tmp_path) and cache.get('x') is None
  assert len(list(tmp_path.rglob('.tmp-*'))) == 1
  cache.put('x', _rows())
  np.testing.assert_array_equal(cache.get('x'), _rows())


def test_readers_beside_writers_see_whole_entries(tmp_path):
  texts, wrong = [f'caption {n}' for n in range(4)], []
  start = threading.Barrier(5)

  def work(reader):
    cache = FeatureCache(tmp_path, IDENTITY)
    start.wait()
    for _ in range(15):
      for n, text in enumerate(texts):
        if not reader:
          cache.put(text, _rows(n, 200))
        elif (got := cache.get(text)) is not None and not (got == _rows(n, 200)).all():
          wrong.append(text)

  threads = [threading.Thread(target=work, args=(n < 2,)) for n in range(5)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong and len(_files(tmp_path)) == 4
  assert all(FeatureCache(tmp_path, IDENTITY).get(text) is not None for text in texts)
  assert not list(tmp_path.rglob('.tmp-*'))


def test_a_cache_names_its_encoder(tmp_path):
  config = IDENTITY['config']
  assert find_identity(tmp_path / 'nowhere', config) is None
  FeatureCache(tmp_path, IDENTITY).put('x', _rows())
  assert find_identity(tmp_path, config) == IDENTITY
  assert find_identity(tmp_path, {'width': 6}) is None
  FeatureCache(tmp_path, IDENTITY | {'weights': 'c'}).put('x', _rows())
  with pytest.raises(CheckpointError, match='2 encoders have this config'):
    find_identity(tmp_path, config)


def test_a_broken_name_is_written_again(tmp_path):
  cache = FeatureCache(tmp_path, IDENTITY)
  cache.put('x', _rows())
  (about,) = tmp_path.glob('*/encoder.json')
  about.write_text('{')
  assert find_identity(tmp_path, IDENTITY['config']) is None
  cache.put('y', _rows())
  assert find_identity(tmp_path, IDENTITY['config']) == IDENTITY


def test_a_folder_that_is_a_file_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(CheckpointError, match='cannot write .*model.text.cache'):
    FeatureCache(tmp_path / 'file', IDENTITY).put('x', _rows())


def test_memory_keeps_the_last_used():
  recent = RecentFeatures(limit=2 * _rows().nbytes)
  for n, text in enumerate('ab'):
    recent.put(text, _rows(n))
  recent.get('a')
  recent.put('c', _rows(2))
  assert recent.get('b') is None
  np.testing.assert_array_equal(recent.get('a'), _rows(0))
  recent.put('huge', _rows(3, 50))
  assert all(recent.get(text) is None for text in ('a', 'b', 'c', 'huge'))
