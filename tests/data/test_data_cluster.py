"""Clusters: the same labels every time, frozen to disk, tied to one store."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from episode_factory import make_episode, make_store
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import normalized_mutual_info_score
from threadpoolctl import threadpool_limits

from wallwm_jax.data.build import build_store
from wallwm_jax.data.cluster import (
  ClusterSettings,
  Labels,
  assign,
  cluster_sizes,
  cluster_store,
  examples,
  fit_centres,
)
from wallwm_jax.data.embed import DescriptorEmbedder
from wallwm_jax.data.store import EventStore
from wallwm_jax.types import ConfigError, CorruptStoreError, DataError

SMALL = ClusterSettings(vl=5, act=3, min_events=2)


@pytest.fixture(scope='module')
def embedder():
  return DescriptorEmbedder(image_dim=32, text_dim=32)


@pytest.fixture(scope='module')
def origin(tmp_path_factory, embedder):
  """A store of 27 events, of which 3 have no actions, with its clusters; do not change."""
  path = tmp_path_factory.mktemp('origin') / 'store'
  episodes = [make_episode(i, **({'actions': None} if i == 4 else {})) for i in range(9)]
  build_store(episodes, path, heldout=0.2, progress=False)
  cluster_store(EventStore(path), embedder, SMALL)
  return path


@pytest.fixture
def clustered(origin, tmp_path):
  """(store, folder of its clusters), to be changed at will."""
  shutil.copytree(origin, tmp_path / 'store')
  return EventStore(tmp_path / 'store'), tmp_path / 'store' / 'clusters' / 'default'


def zipf_mixture(count, dim, k, seed=0):
  """Unit rows [count, dim] around k directions whose sizes fall as 1 / rank, and their origin."""
  rng = np.random.default_rng(seed)
  p = 1 / np.arange(1, k + 1)
  origin = rng.choice(k, count, p=p / p.sum())
  x = rng.standard_normal((k, dim))
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  x = x[origin] + rng.normal(0, 0.9 / np.sqrt(dim), (count, dim))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), origin


# --- k-means -------------------------------------------------------------------------------------


def test_clusters_of_a_zipf_mixture_are_found():
  x, origin = zipf_mixture(12_000, 96, 64)
  centres = fit_centres(x, 64, ClusterSettings(), spherical=True)
  np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-5)
  labels, _ = assign(x, centres)
  cosine = (x * centres[labels]).sum(1).mean()
  means = np.stack([x[origin == c].mean(0) for c in range(64)])
  means /= np.linalg.norm(means, axis=1, keepdims=True)
  assert cosine > 0.99 * (x * means[origin]).sum(1).mean()
  assert normalized_mutual_info_score(origin, labels) > 0.95


def test_more_clusters_are_found_than_by_plain_mini_batches():
  x, origin = zipf_mixture(12_000, 96, 64, seed=1)
  with threadpool_limits(limits=1):
    plain = MiniBatchKMeans(64, n_init=1, max_iter=20, batch_size=8192, random_state=0).fit(x)
  theirs = plain.cluster_centers_ / np.linalg.norm(plain.cluster_centers_, axis=1, keepdims=True)
  ours = fit_centres(x, 64, ClusterSettings(), spherical=True)
  assert (x @ ours.T).max(1).mean() > (x @ theirs.T).max(1).mean() + 0.005


def test_labels_do_not_depend_on_the_run_or_the_number_of_threads():
  x, _ = zipf_mixture(9000, 64, 40)
  runs = []
  for threads in (1, 2, 2):
    with threadpool_limits(limits=threads):
      runs.append(assign(x, fit_centres(x, 40, ClusterSettings(), spherical=True))[0])
  np.testing.assert_array_equal(runs[0], runs[1])
  np.testing.assert_array_equal(runs[1], runs[2])
  other = fit_centres(x, 40, ClusterSettings(seed=1), spherical=True)
  assert (assign(x, other)[0] != runs[0]).any()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**31))
def test_assignment_is_to_the_nearest_centre(count, k, dim, seed):
  rng = np.random.default_rng(seed)
  x, centres = (rng.standard_normal((n, dim)).astype(np.float32) for n in (count, k))
  labels, distance = assign(x, centres)
  every = np.linalg.norm(x[:, None].astype(np.float64) - centres[None], axis=-1)
  np.testing.assert_allclose(distance, every.min(1), atol=1e-5)
  np.testing.assert_allclose(every[np.arange(count), labels], every.min(1), atol=1e-5)


def test_chunks_and_memory_maps_make_no_difference(tmp_path):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((20_000, 8)).astype(np.float32)
  np.save(tmp_path / 'x.npy', x)
  centres = x[:7]
  labels, distance = assign(np.load(tmp_path / 'x.npy', mmap_mode='r'), centres)
  parts = [assign(x[i : i + 999], centres) for i in range(0, len(x), 999)]
  np.testing.assert_array_equal(labels, np.concatenate([p[0] for p in parts]))
  np.testing.assert_allclose(distance, np.concatenate([p[1] for p in parts]), atol=1e-6)


@pytest.mark.parametrize('x', [np.zeros((5, 3)), np.eye(3), np.ones((1, 4))])
def test_fewer_points_than_clusters(x):
  x = x.astype(np.float32)
  labels, distance = assign(x, fit_centres(x, 9, SMALL))
  np.testing.assert_allclose(distance, 0, atol=1e-6)
  assert len(set(labels.tolist())) == len(np.unique(x, axis=0))


# --- labels of a store ---------------------------------------------------------------------------


def test_a_store_is_clustered_beside_its_data(clustered, embedder):
  store, path = clustered
  labels = Labels.load(path, store)
  np.testing.assert_array_equal(labels.uid, store.column('uid'))
  free = ~store.column('has_actions', 'episodes')[store.column('episode')].astype(bool)
  np.testing.assert_array_equal(labels.act == -1, free)
  np.testing.assert_array_equal(np.isnan(labels.act_distance), free)
  assert labels.vl.min() == 0 and labels.vl.dtype == labels.act.dtype == np.int32
  sizes = cluster_sizes(labels)
  assert sizes['vl'].sum() == 27 and sizes['act'].sum() == 24
  for name, most in (('vl', 5), ('act', 3)):
    assert len(sizes[name]) == labels.meta['clusters'][name] <= most
    assert sizes[name].min() > 0 and (np.diff(sizes[name]) <= 0).all()
  assert labels.meta['store'] == store.digest
  assert labels.meta['embedder'] == embedder.identity
  assert labels.meta['labels_sha256'] == labels.sha256
  store.verify()
  assert sorted(p.name for p in path.iterdir()) == ['labels.parquet', 'meta.json']
  assert [p.name for p in path.parent.iterdir()] == ['default']


def test_clustering_again_gives_the_same_labels(clustered, embedder, tmp_path):
  store, path = clustered
  with threadpool_limits(limits=1):
    again = cluster_store(store, embedder, SMALL, tmp_path / 'again')
  assert again.sha256 == Labels.load(path, store).sha256


def test_examples_are_the_nearest_events_of_each_cluster(clustered):
  store, path = clustered
  labels = Labels.load(path, store)
  for side in ('vl', 'act'):
    label, distance = getattr(labels, side), getattr(labels, f'{side}_distance')
    found = examples(labels, side, 3)
    assert len(found) == labels.meta['clusters'][side]
    for c, rows in enumerate(found):
      members = np.flatnonzero(label == c)
      assert len(rows) == min(3, len(members)) and set(rows) <= set(members)
      np.testing.assert_array_equal(np.sort(distance[members])[: len(rows)], distance[rows])


def test_a_small_store_gets_fewer_clusters(tmp_path, embedder):
  labels = cluster_store(make_store(tmp_path / 's', episodes=8), embedder)
  assert labels.meta['clusters'] == {'vl': 3, 'act': 3}
  alone = cluster_store(make_store(tmp_path / 'one', episodes=1, lengths=(9,)), embedder)
  assert alone.vl.tolist() == alone.act.tolist() == [0]


def test_a_store_without_actions(tmp_path, embedder):
  store = make_store(tmp_path / 's', episodes=8, actions=None)
  labels = cluster_store(store, embedder)
  assert (labels.act == -1).all() and labels.meta['clusters'] == {'vl': 3, 'act': 0}
  assert examples(labels, 'act', 2) == [] and not len(cluster_sizes(labels)['act'])


def test_centres_come_from_a_sample_of_the_training_split(origin, embedder, tmp_path, monkeypatch):
  from wallwm_jax.data import cluster

  seen = []
  fit = cluster.fit_centres
  monkeypatch.setattr(
    cluster, 'fit_centres', lambda x, *a, **k: seen.append(len(x)) or fit(x, *a, **k)
  )
  store = EventStore(origin)
  train = store.column('split') == 'train'
  cluster_store(store, embedder, SMALL, tmp_path / 'all')
  few = ClusterSettings(vl=2, act=2, min_events=1, sample=6)
  labels = cluster_store(store, embedder, few, tmp_path / 'few')
  has = store.column('has_actions', 'episodes')[store.column('episode')].astype(bool)
  assert seen == [train.sum(), (train & has).sum(), 6, 6] and train.sum() < 27
  assert len(labels.vl) == 27


# --- damage and mix-ups --------------------------------------------------------------------------


def test_labels_of_other_events_are_refused(clustered, tmp_path):
  store, path = clustered
  other = make_store(tmp_path / 'other', episodes=4)  # 12 events, of which 9 are episodes 0..3
  with pytest.raises(DataError, match='of 12 events 0 have no label.*, 15 labels are of other'):
    Labels.load(path, other)
  longer = make_store(tmp_path / 'longer', episodes=10)
  with pytest.raises(DataError, match='of 30 events 3 have no label.*Cluster this store again'):
    Labels.load(path, longer)


def test_labels_follow_the_order_of_the_store(clustered, tmp_path):
  store, path = clustered
  labels = Labels.load(path, store)
  order = np.random.default_rng(0).permutation(len(labels.uid))
  columns = [getattr(labels, n)[order] for n in ('uid', 'vl', 'act', 'vl_distance', 'act_distance')]
  Labels(*columns, labels.meta).save(tmp_path / 'shuffled')
  again = Labels.load(tmp_path / 'shuffled', store)
  np.testing.assert_array_equal(again.uid, labels.uid)
  np.testing.assert_array_equal(again.vl, labels.vl)
  np.testing.assert_array_equal(again.act_distance, labels.act_distance)


def test_every_flipped_byte_is_noticed(clustered):
  store, path = clustered
  file = path / 'labels.parquet'
  whole = file.read_bytes()
  for at in range(0, len(whole), 97):
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(CorruptStoreError, match=r'labels\.parquet'):
      Labels.load(path, store)
  file.write_bytes(whole[:-1])
  with pytest.raises(CorruptStoreError, match='truncated'):
    Labels.load(path, store)
  file.unlink()
  with pytest.raises(CorruptStoreError, match='missing'):
    Labels.load(path, store)


def test_edited_labels_are_noticed_even_with_a_matching_file_digest(clustered):
  from wallwm_jax.data import manifest

  store, path = clustered
  table = pq.read_table(path / 'labels.parquet')
  vl = table.column('vl').to_numpy().copy()
  vl[0] += 1
  place = table.schema.get_field_index('vl')
  pq.write_table(table.set_column(place, table.schema.field('vl'), [vl]), path / 'labels.parquet')
  meta = json.loads((path / 'meta.json').read_text())
  meta['files'] = [manifest.describe(path, 'labels.parquet', len(vl))]
  (path / 'meta.json').write_text(json.dumps(meta))
  with pytest.raises(CorruptStoreError, match='labels have sha256'):
    Labels.load(path, store)


@pytest.mark.parametrize(
  'change, error, message',
  [
    ({'version': 99}, DataError, 'version 99, this code reads up to 1'),
    ({'format': 'else'}, DataError, "expected format 'wallwm-clusters', got 'else'"),
    ({'labels_sha256': None}, CorruptStoreError, r"\['labels_sha256'\] missing"),
  ],
)
def test_a_wrong_meta_file_is_refused(clustered, change, error, message):
  store, path = clustered
  meta = json.loads((path / 'meta.json').read_text()) | change
  meta = {key: value for key, value in meta.items() if value is not None}
  (path / 'meta.json').write_text(json.dumps(meta))
  with pytest.raises(error, match=message):
    Labels.load(path, store)


def test_missing_and_broken_meta_files_are_named(clustered, tmp_path):
  store, path = clustered
  with pytest.raises(DataError, match='no clusters at .*Cluster the store first'):
    Labels.load(tmp_path / 'nowhere', store)
  (path / 'meta.json').write_text('{')
  with pytest.raises(CorruptStoreError, match='not valid JSON'):
    Labels.load(path, store)


def test_nothing_is_overwritten_or_left_behind(clustered, tmp_path, embedder):
  class Broken(DescriptorEmbedder):
    def images(self, frames):
      raise RuntimeError('no')

  store, path = clustered
  with pytest.raises(DataError, match='expected a new folder'):
    cluster_store(store, embedder, SMALL)
  with pytest.raises(RuntimeError):
    cluster_store(store, Broken(), SMALL, tmp_path / 'out' / 'new')
  assert list((tmp_path / 'out').iterdir()) == []


@pytest.mark.parametrize('field', ['vl', 'act', 'min_events', 'sample', 'candidates'])
def test_settings_are_checked(field):
  with pytest.raises(ConfigError, match=f'clusters.{field}: expected >= 1, got 0'):
    ClusterSettings(**{field: 0})
