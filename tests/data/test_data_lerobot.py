import collections
import dataclasses
import hashlib
import io
import json
import pathlib
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from episode_factory import make_episode, make_poses
from lerobot_factory import (
  CAMERAS,
  FPS,
  SPEC,
  make_raw,
  smooth_episode,
  write_clip,
  write_v21,
  write_v30,
)
from PIL import Image
from scipy.spatial.transform import Rotation

from wallwm_jax.data.build import build_store
from wallwm_jax.data.readers import clips
from wallwm_jax.data.readers.features import UnknownLayoutError
from wallwm_jax.data.readers.lerobot import LeRobotReader
from wallwm_jax.data.readers.spec import Camera, Caption, Text
from wallwm_jax.data.schema import Quarantined, validate
from wallwm_jax.data.writers.lerobot import WriteSettings, write_lerobot
from wallwm_jax.errors import DataError

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[1] / 'fixtures/data/lerobot_golden.json').read_text()
)
WRITERS = {'v2.1': write_v21, 'v3.0': write_v30}


def expected_poses(raw):
  """State and target of make_raw with SPEC, by SciPy."""
  state, action = raw['state'].astype(float), raw['action'].astype(float)
  measured = Rotation.from_quat(state[:, 3:7])
  position = state[:, :3] / 1000
  turned = measured * Rotation.from_rotvec(action[:, 3:6], degrees=True)
  return (
    _pose(position, measured, state[:, 7:] / 80),
    _pose(position + measured.apply(action[:, :3]), turned, 1 - action[:, 6:]),
  )


def _pose(position, rotation, gripper):
  matrix = rotation.as_matrix()
  return np.concatenate([position, matrix[:, :, 0], matrix[:, :, 1], gripper], -1)


# ---- what is read ----


@pytest.mark.parametrize('version', WRITERS)
def test_reader_agrees_with_an_independent_computation(tmp_path, version):
  raws = [make_raw(0, 7), make_raw(1, 5), make_raw(2, 9)]
  WRITERS[version](tmp_path, raws)
  reader = LeRobotReader(tmp_path, SPEC)
  records = list(reader)
  assert len(reader) == len(records) == 3
  for i, (raw, record) in enumerate(zip(raws, records)):
    validate(record)
    assert (record.episode_id, record.fps, record.times) == (f'episode_{i:06d}', FPS, None)
    for got, want in zip((record.state, record.actions), expected_poses(raw)):
      np.testing.assert_allclose(got, want, atol=2e-6)
    for camera in CAMERAS:
      grey = record.frames[camera.rsplit('.', 1)[1]].mean((1, 2, 3))
      np.testing.assert_allclose(grey, raw['level'][camera], atol=2)
    assert record.event_captions(record.events[0]) == {'L3': f'task {i}'}
    (event,) = record.events
    assert (event.start, event.end, event.label) == (0, raw['length'], 'task')


def test_each_row_group_is_read_once(tmp_path, monkeypatch):
  raws = [make_raw(i, 4 + i % 3) for i in range(6)]
  write_v30(tmp_path, raws, per_group=7)  # groups that begin and end within episodes
  groups, opened = collections.Counter(), []
  read, init = pq.ParquetFile.read_row_group, pq.ParquetFile.__init__

  def count_groups(self, group, columns):
    groups[group] += 1
    return read(self, group, columns)

  def count_files(self, source, **kwargs):
    opened.append(str(source))
    init(self, source, **kwargs)

  reader = LeRobotReader(tmp_path, SPEC)
  monkeypatch.setattr(pq.ParquetFile, 'read_row_group', count_groups)
  monkeypatch.setattr(pq.ParquetFile, '__init__', count_files)
  for raw, record in zip(raws, reader, strict=True):
    np.testing.assert_allclose(record.state, expected_poses(raw)[0], atol=2e-6)
  assert set(groups.values()) == {1} and len(groups) > 3
  assert len(opened) == 1


def test_cameras_of_the_spec_only(tmp_path):
  write_v30(tmp_path, [make_raw(0)])
  spec = dataclasses.replace(SPEC, cameras=(Camera(CAMERAS[1], 'hand'),))
  (record,) = LeRobotReader(tmp_path, spec)
  assert record.views == ('hand',) and set(record.frames) == {'hand'}


def test_images_in_the_parquet_file(tmp_path):
  raw = make_raw(0, 4)
  pixels = np.random.default_rng(3).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
  cells = []
  for k, image in enumerate(pixels):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'png')
    cells.append({'bytes': buffer.getvalue(), 'path': f'frame_{k}.png'})
  raw['columns'] = {'observation.image': cells}
  feature = {'dtype': 'image', 'shape': [3, 6, 8], 'names': ['channels', 'height', 'width']}
  write_v21(tmp_path, [raw], extra={'observation.image': feature})
  spec = dataclasses.replace(SPEC, cameras=(Camera('observation.image', 'top'),))
  (record,) = LeRobotReader(tmp_path, spec)
  np.testing.assert_array_equal(record.frames['top'], pixels)
  cells[2]['bytes'] = b'not an image'
  write_v21(tmp_path / 'bad', [raw], extra={'observation.image': feature})
  (item,) = LeRobotReader(tmp_path / 'bad', spec)
  assert 'image of frame 2' in item.reason


# ---- annotations ----


def _int_feature():
  return {'dtype': 'int64', 'shape': [1], 'names': None}


def test_subtask_table(tmp_path):
  raw = make_raw(0, 8)
  raw['columns'] = {'subtask_index': [1, 1, 1, 0, 0, -1, -1, 0]}
  write_v30(tmp_path, [raw], extra={'subtask_index': _int_feature()})
  texts = {'subtask_index': [0, 1], 'subtask': ['lift the cup', 'reach for it']}
  pq.write_table(pa.table(texts), tmp_path / 'meta/subtasks.parquet')
  (record,) = LeRobotReader(tmp_path, SPEC)
  validate(record)
  found = [(c.start, c.end, c.text) for c in record.captions if c.level == 'L2']
  assert found == [(0, 3, 'reach for it'), (3, 5, 'lift the cup'), (7, 8, 'lift the cup')]
  # Events end with the frame their last action leads to; the last frame commands nothing.
  assert [(e.start, e.end, e.label) for e in record.events] == [(0, 4, 'reach'), (3, 6, 'lift')]
  assert record.provenance['read']['events'] == 'subtask'
  raw['columns'] = {'subtask_index': [7] * 8}
  write_v30(tmp_path / 'bad', [raw], extra={'subtask_index': _int_feature()})
  pq.write_table(pa.table(texts), tmp_path / 'bad/meta/subtasks.parquet')
  (item,) = LeRobotReader(tmp_path / 'bad', SPEC)
  assert 'subtask_index [7]' in item.reason


def test_sarm_columns(tmp_path):
  columns = {
    'sparse_subtask_names': [['fetch', 'place'], None],
    'sparse_subtask_start_frames': [[0, 4], None],
    'sparse_subtask_end_frames': [[4, 9], None],
    'dense_subtask_names': [['reach it', 'grasp it', 'place it'], None],
    'dense_subtask_start_frames': [[0, 3, 6], None],
    'dense_subtask_end_frames': [[2, 5, 8], None],  # counted inclusively
  }
  write_v30(tmp_path, [make_raw(0, 9), make_raw(1, 6)], columns=columns)
  annotated, plain = LeRobotReader(tmp_path, SPEC)
  spans = {(c.level, c.start, c.end, c.text) for c in annotated.captions}
  assert spans == {
    ('L3', 0, 9, 'task 0'),
    ('L2', 0, 4, 'fetch'),
    ('L2', 4, 9, 'place'),
    ('L1', 0, 3, 'reach it'),
    ('L1', 3, 6, 'grasp it'),
    ('L1', 6, 9, 'place it'),
  }
  events = [(e.start, e.end, e.label) for e in annotated.events]
  assert events == [(0, 4, 'reach'), (3, 7, 'grasp'), (6, 9, 'place')]
  assert [e.label for e in plain.events] == ['task'] and plain.provenance['read']['events'] == ''


def test_persistent_language_rows(tmp_path):
  def row(style, content, timestamp):
    return {'role': 'user', 'content': content, 'style': style, 'timestamp': timestamp}

  rows = [
    row('subtask', 'fetch the cup', 0.0),
    row('motion', 'close the hand', 0.4),
    row('motion', 'move down', 0.0),
    row('task_aug', 'bring me the cup', 0.0),
  ]
  raw = make_raw(0, 7)
  raw['columns'] = {'language_persistent': [rows] * 7}
  feature = {'dtype': 'language', 'shape': [1], 'names': None}
  write_v30(tmp_path, [raw], extra={'language_persistent': feature})
  (record,) = LeRobotReader(tmp_path, SPEC)
  spans = [(c.level, c.start, c.end, c.text) for c in record.captions]
  assert spans == [
    ('L3', 0, 7, 'task 0'),
    ('L2', 0, 7, 'fetch the cup'),
    ('L1', 0, 4, 'move down'),
    ('L1', 4, 7, 'close the hand'),
  ]
  assert [(e.start, e.end, e.label) for e in record.events] == [(0, 5, 'move'), (4, 7, 'close')]
  assert record.provenance['read']['task_aug'] == ['bring me the cup']


def test_ids_per_frame_with_labels_from_the_spec(tmp_path):
  raw = make_raw(0, 6)
  raw['columns'] = {'skill': [3, 3, 5, 5, 5, 5]}
  write_v30(tmp_path, [raw], extra={'skill': _int_feature()})
  spec = dataclasses.replace(
    SPEC,
    events=Text('skill', labels={'3': 'reach'}),
    captions=(Caption('skill', level='L1', labels={'3': 'reach for it', '5': 'lift it'}),),
  )
  (record,) = LeRobotReader(tmp_path, spec)
  assert [(e.start, e.end, e.label) for e in record.events] == [(0, 3, 'reach'), (2, 6, 'skill_5')]
  assert [(c.start, c.end, c.text) for c in record.captions] == [
    (0, 2, 'reach for it'),
    (2, 6, 'lift it'),
  ]
  with pytest.raises(DataError, match="text in 'skil'"):
    LeRobotReader(tmp_path, dataclasses.replace(SPEC, events=Text('skil')))


# ---- faults: named, counted, never silent ----


def rewrite(path, change):
  pq.write_table(change(pq.read_table(path)), path)


def drop_frames(root):
  write_clip(root / f'videos/chunk-000/{CAMERAS[1]}/episode_000001.mp4', [50] * 4)


def add_frames(root):
  write_clip(root / f'videos/chunk-000/{CAMERAS[1]}/episode_000001.mp4', [50] * 6)


def truncate_video(root):
  path = root / f'videos/chunk-000/{CAMERAS[0]}/episode_000001.mp4'
  path.write_bytes(path.read_bytes()[:-400])


def remove_video(root):
  (root / f'videos/chunk-000/{CAMERAS[0]}/episode_000001.mp4').unlink()


def small_video(root):
  write_clip(root / f'videos/chunk-000/{CAMERAS[0]}/episode_000001.mp4', [50] * 5, (16, 32))


def drop_column(root):
  rewrite(root / 'data/chunk-000/episode_000001.parquet', lambda t: t.drop(['action']))


def cut_footer(root):
  path = root / 'data/chunk-000/episode_000001.parquet'
  path.write_bytes(path.read_bytes()[:-30])


def narrow_action(root):
  def change(t):
    column = t.schema.get_field_index('action')
    return t.set_column(column, 'action', [[row[:6] for row in t['action'].to_pylist()]])

  rewrite(root / 'data/chunk-000/episode_000001.parquet', change)


def drop_row(root):
  rewrite(root / 'data/chunk-000/episode_000001.parquet', lambda t: t.slice(0, 4))


def swap_rows(root):
  rewrite(root / 'data/chunk-000/episode_000001.parquet', lambda t: t.take([0, 2, 1, 3, 4]))


def foreign_rows(root):
  target = root / 'data/chunk-000/episode_000001.parquet'
  target.write_bytes((root / 'data/chunk-000/episode_000000.parquet').read_bytes())


def late_timestamps(root):
  def change(t):
    column = t.schema.get_field_index('timestamp')
    times = np.array([0, 0.1, 0.2, 0.36, 0.4], np.float32)
    return t.set_column(column, 'timestamp', pa.array(times))

  rewrite(root / 'data/chunk-000/episode_000001.parquet', change)


def duplicate_id(root):
  path = root / 'meta/episodes.jsonl'
  lines = path.read_text().splitlines()
  path.write_text('\n'.join([*lines, lines[1]]))


def forget_episode(root):
  path = root / 'meta/episodes.jsonl'
  lines = path.read_text().splitlines()
  path.write_text('\n'.join([lines[0], lines[2]]))


@pytest.mark.parametrize(
  'fault, reason',
  [
    (drop_frames, 'expected 5 frames .* decoded 4'),
    (add_frames, 'expected 5 frames .* decoded 6'),
    (truncate_video, 'episode_000001.mp4: (cannot be decoded|expected 5 frames)'),
    (remove_video, 'episode_000001.mp4: cannot be decoded'),
    (small_video, r'expected frames \(32, 48, 3\), got \(16, 32, 3\)'),
    (drop_column, r"expected columns \['action'\]"),
    (cut_footer, 'not a complete Parquet file'),
    (narrow_action, r'action: expected shape \[7\] in every row, got 30 numbers'),
    (drop_row, 'expected 5 rows, got 4'),
    (swap_rows, 'expected frame_index 0..4'),
    (foreign_rows, 'expected rows of episode 1, got none'),
    (late_timestamps, 'frame 3 is at 0.3000 s .* its row at 0.3600 s'),
    (duplicate_id, 'duplicate episode id 1: listed 2 times'),
    (forget_episode, 'counts 3 episodes, meta/episodes has no 1'),
  ],
)
def test_a_fault_costs_its_episode_and_says_why(tmp_path, fault, reason):
  write_v21(tmp_path, [make_raw(i, 5) for i in range(3)])
  fault(tmp_path)
  reader = LeRobotReader(tmp_path, SPEC)
  items = list(reader)
  assert len(items) == len(reader) == 3
  (bad,) = [item for item in items if isinstance(item, Quarantined)]
  assert bad.episode_id == 'episode_000001'
  assert re.search(reason, bad.reason), bad.reason
  for item in items:
    if item is not bad:
      validate(item)


def test_shared_files_are_checked_too(tmp_path):
  """v3: a boundary moved by one frame, rows of an unlisted episode, and a lost footer."""
  raws = [make_raw(i, 5) for i in range(3)]
  episodes = 'meta/episodes/chunk-000/file-000.parquet'
  write_v30(tmp_path / 'a', raws)

  def later(t):
    name = f'videos/{CAMERAS[0]}/to_timestamp'
    times = t[name].to_pylist()
    times[1] += 0.1
    return t.set_column(t.schema.get_field_index(name), name, [times])

  rewrite(tmp_path / 'a' / episodes, later)
  items = list(LeRobotReader(tmp_path / 'a', SPEC))
  assert [type(i).__name__ for i in items] == ['EpisodeRecord', 'Quarantined', 'EpisodeRecord']
  assert 'decoded 6' in items[1].reason

  write_v30(tmp_path / 'b', raws)
  rewrite(tmp_path / 'b' / episodes, lambda t: t.slice(0, 2))
  info = tmp_path / 'b/meta/info.json'
  info.write_text(info.read_text().replace('"total_episodes": 3', '"total_episodes": 2'))
  *_, orphan = LeRobotReader(tmp_path / 'b', SPEC)
  assert orphan.episode_id == 'episode_000002' and 'meta/episodes lacks it' in orphan.reason

  write_v30(tmp_path / 'c', raws)
  data = tmp_path / 'c/data/chunk-000/file-000.parquet'
  data.write_bytes(data.read_bytes()[:-8])
  report = list(LeRobotReader(tmp_path / 'c', SPEC))
  assert ['not finalised' in item.reason for item in report] == [True] * 3
  path = tmp_path / 'c' / episodes
  path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(DataError, match='not finalised'):
    LeRobotReader(tmp_path / 'c', SPEC)


def test_metadata_that_cannot_be_read(tmp_path):
  with pytest.raises(DataError, match='info.json'):
    LeRobotReader(tmp_path / 'nowhere')
  write_v21(tmp_path, [make_raw(0)])
  with pytest.raises(UnknownLayoutError, match=r'convention: TODO'):
    LeRobotReader(tmp_path)
  with pytest.raises(DataError, match='recorded at 10.0 Hz, the spec says 30'):
    LeRobotReader(tmp_path, dataclasses.replace(SPEC, fps=30.0))
  info = tmp_path / 'meta/info.json'
  text = info.read_text()
  info.write_text(text.replace('v2.1', 'v1.6'))
  with pytest.raises(DataError, match="'v1.6'"):
    LeRobotReader(tmp_path, SPEC)
  info.write_text(text.replace('"fps"', '"rate"'))
  with pytest.raises(DataError, match=r"\['fps'\]"):
    LeRobotReader(tmp_path, SPEC)


def test_gripper_outside_its_range_and_nan(tmp_path):
  raws = [make_raw(i) for i in range(2)]
  raws[0]['state'][3, 7] = 95
  raws[1]['action'][2, 4] = np.nan
  write_v30(tmp_path, raws)
  grip, nan = LeRobotReader(tmp_path, SPEC)
  assert 'gripper: expected 0..80 (80 = open)' in grip.reason
  assert np.isnan(nan.actions[2, 3:9]).all() and np.isfinite(nan.actions[[0, 1, 3]]).all()
  with pytest.raises(DataError, match='NaN'):
    validate(nan)


# ---- real samples ----


@pytest.mark.parametrize('sample', sorted(GOLDEN['samples']))
def test_frames_are_those_of_the_reference(shared_data, sample):
  golden = GOLDEN['samples'][sample]
  reader = LeRobotReader(shared_data / sample)
  records = list(reader)
  assert len(records) == len(golden)
  for entry, record, want in zip(reader.meta.episodes, records, golden):
    validate(record)
    assert record.num_frames == want['length'] and record.times is None
    np.testing.assert_allclose(
      want['timestamps'], np.arange(want['length']) / record.fps, atol=0.5 / record.fps
    )
    for camera in reader.spec.cameras:
      digest = hashlib.sha256(record.frames[camera.view].tobytes()).hexdigest()
      assert digest == want['sha256'][camera.feature], (sample, record.episode_id, camera.view)
    clip = entry.clips[camera.feature]
    _, shown = clips.decode_clip(clip.path, clip.start, clip.end, entry.length, record.fps)
    np.testing.assert_allclose(shown, want['timestamps'], atol=0.5 / record.fps)


def test_metaworld_poses_and_phases(shared_data, tmp_path):
  reader = LeRobotReader(shared_data / 'lerobot_v30_metaworld')
  raw = pq.read_table(shared_data / 'lerobot_v30_metaworld/data/chunk-000/file-000.parquet')
  records = list(reader)
  state = np.concatenate([r.state for r in records])
  actions = np.concatenate([r.actions for r in records])
  measured, command = (
    np.array(raw['observation.state'].to_pylist()),
    np.array(raw['action'].to_pylist()),
  )
  np.testing.assert_allclose(state[:, :3], measured[:, :3], atol=1e-7)
  np.testing.assert_array_equal(state[:, 9], measured[:, 3].astype(np.float32))
  np.testing.assert_array_equal(state[:, 3:9], np.tile([1, 0, 0, 0, 1, 0], (len(state), 1)))
  np.testing.assert_allclose(actions[:, :3], (measured + command / 100)[:, :3], atol=1e-7)
  np.testing.assert_allclose(actions[:, 9], (1 - command[:, 3]) / 2, atol=1e-7)
  # The targets are nearer to where the hand goes than staying put is.
  gone = [np.abs(r.actions[:-1, :3] - r.state[1:, :3]).sum() for r in records]
  stay = [np.abs(r.state[:-1, :3] - r.state[1:, :3]).sum() for r in records]
  assert (np.array(gone) < 0.55 * np.array(stay)).all()
  # Events are the expert's phases: every action in exactly one.
  for k, record in enumerate(records):
    phases = [
      p for p, e in zip(raw['phase'].to_pylist(), raw['episode_index'].to_pylist()) if e == k
    ]
    labels = [e.label for e in record.events for _ in range(e.start, e.end - 1)]
    assert labels == [f'phase_{p}' for p in phases[:-1]]
  report = build_store(iter(records), tmp_path / 'store', progress=False)
  assert (report['episodes'], report['events'], report['quarantined']) == (4, 16, 0)


# ---- the writer ----


def plain(record):
  """Everything but the pixels, comparable."""
  return dataclasses.asdict(
    dataclasses.replace(
      record,
      frames={},
      calibration={},
      pixel_mask={},
      state=None if record.state is None else record.state.tobytes(),
      actions=None if record.actions is None else record.actions.tobytes(),
      times=None if record.times is None else record.times.tobytes(),
    )
  )


@pytest.mark.parametrize('codec', ['h264', 'av1'])
def test_written_records_are_read_back(tmp_path, codec):
  mask = np.zeros((32, 48), bool)
  mask[4:28] = True
  times = np.arange(14) / 10 + 1e-3 * np.random.default_rng(0).random(14)
  records = [
    smooth_episode(0, times=times, rig='station 3', pixel_mask={'front': mask, 'side': None}),
    smooth_episode(1, provenance={'sync': {'lag': 2}}),
  ]
  report = write_lerobot(records, tmp_path / 'out', WriteSettings(codec))
  assert (report['episodes'], report['frames'], report['quarantined']) == (2, 28, 0)
  for want, got in zip(records, LeRobotReader(tmp_path / 'out'), strict=True):
    assert plain(got) == plain(want)
    for view in want.views:
      error = np.abs(got.frames[view].astype(int) - want.frames[view]).mean()
      assert error < 3, (view, error)
    camera = got.calibration['front']
    np.testing.assert_array_equal(camera.intrinsics, want.calibration['front'].intrinsics)
    np.testing.assert_array_equal(camera.extrinsics, want.calibration['front'].extrinsics)
  first = next(iter(LeRobotReader(tmp_path / 'out')))
  np.testing.assert_array_equal(first.pixel_mask['front'], mask)


def test_two_arms_and_video_only(tmp_path):
  def pair(seed):
    return np.concatenate([make_poses(14, seed), make_poses(14, seed + 1)], -1)

  both = smooth_episode(0, state=pair(0), actions=pair(2))
  write_lerobot([both], tmp_path / 'arms')
  (got,) = LeRobotReader(tmp_path / 'arms')
  assert plain(got) == plain(both)
  film = smooth_episode(0, state=None, actions=None)
  write_lerobot([film], tmp_path / 'film')
  (got,) = LeRobotReader(tmp_path / 'film')
  assert plain(got) == plain(film)


def test_files_are_numbered_on(tmp_path):
  records = [smooth_episode(i) for i in range(5)]
  settings = WriteSettings(data_mb=1e-3, video_mb=1e-3, files_per_chunk=2)
  write_lerobot(records, tmp_path / 'out', settings)
  for folder in ('data', 'meta/episodes', 'videos/observation.images.front'):
    files = sorted(
      str(p.relative_to(tmp_path / 'out' / folder)) for p in (tmp_path / 'out' / folder).glob('*/*')
    )
    assert len(files) > 2 and files[2].startswith('chunk-001/file-000'), files
  back = list(LeRobotReader(tmp_path / 'out'))
  assert [plain(r) for r in back] == [plain(r) for r in records]


def test_conventions_alone_give_text_and_poses(tmp_path):
  """What another reader sees, without the record carried along."""
  record = smooth_episode(4)
  write_lerobot([record], tmp_path / 'out')
  rewrite(
    tmp_path / 'out/meta/episodes/chunk-000/file-000.parquet',
    lambda t: t.drop(['wallwm/record']),
  )
  (got,) = LeRobotReader(tmp_path / 'out')
  np.testing.assert_array_equal(got.actions, record.actions)
  assert {(c.level, c.text) for c in got.captions} == {
    ('L3', 'task 4'),
    ('L2', 'reach it, episode 4'),
    ('L2', 'grasp it, episode 4'),
  }
  assert [e.label for e in got.events] == ['reach', 'grasp']


def test_layout_is_that_of_the_real_library(shared_data, tmp_path):
  real = shared_data / 'lerobot_v30_metaworld'
  write_lerobot([smooth_episode(i) for i in range(2)], tmp_path / 'out')
  ours = tmp_path / 'out'
  want, got = (json.loads((root / 'meta/info.json').read_text()) for root in (real, ours))
  assert set(want) - {'tools'} <= set(got)
  assert (want['data_path'], want['video_path']) == (got['data_path'], got['video_path'])
  camera = 'observation.images.corner', 'observation.images.front'
  assert set(want['features'][camera[0]]) == set(got['features'][camera[1]])

  def schema(root, path):
    names = {}
    for field in pq.read_schema(root / path):
      name = field.name.replace(camera[0], 'CAM').replace(camera[1], 'CAM')
      names[name] = str(field.type).replace('[4]', '[A]').replace('[10]', '[A]')
    return names

  for path in ('data/chunk-000/file-000.parquet', 'meta/tasks.parquet'):
    wanted, found = schema(real, path), schema(ours, path)
    wanted.pop('phase', None)
    assert wanted.items() <= found.items(), path
  wanted, found = (schema(r, 'meta/episodes/chunk-000/file-000.parquet') for r in (real, ours))
  shared = {
    k: t for k, t in wanted.items() if 'CAM2' not in k and 'gripper' not in k and '/phase/' not in k
  }
  assert shared.items() <= found.items()
  stats = [json.loads((root / 'meta/stats.json').read_text()) for root in (real, ours)]
  for a, b in (
    (stats[0]['action'], stats[1]['action']),
    (stats[0][camera[0]], stats[1][camera[1]]),
  ):
    assert set(a) == set(b)
    assert all(np.ndim(a[k]) == np.ndim(b[k]) for k in a)


def test_statistics_are_those_of_the_values(tmp_path):
  records = [smooth_episode(i) for i in range(3)]
  write_lerobot(records, tmp_path / 'out')
  stats = json.loads((tmp_path / 'out/meta/stats.json').read_text())
  actions = np.concatenate([r.actions for r in records]).astype(float)
  pixels = np.concatenate([r.frames['front'] for r in records]) / 255
  for name, x, axes in (('action', actions, 0), ('observation.images.front', pixels, (0, 1, 2))):
    for key, want in (
      ('mean', x.mean(axes)),
      ('std', x.std(axes)),
      ('min', x.min(axes)),
      ('max', x.max(axes)),
      ('q10', np.quantile(x, 0.1, axes, method='inverted_cdf' if axes else 'linear')),
    ):
      np.testing.assert_allclose(
        np.ravel(stats[name][key]), want, atol=1e-6, err_msg=f'{name} {key}'
      )


def test_what_cannot_be_written_is_reported(tmp_path):
  good, other = smooth_episode(0), make_episode(1, size=(32, 32))
  broken = dataclasses.replace(smooth_episode(2), fps=0.0)
  refused = Quarantined('gone', 'synthetic', 'sync: no motion')
  report = write_lerobot([refused, good, other, broken], tmp_path / 'out')
  assert report['episodes'] == 1 and set(report['reasons']) == {'gone', 'episode-1', 'episode-2'}
  assert 'sizes' in report['reasons']['episode-1'] and 'fps' in report['reasons']['episode-2']
  lines = (tmp_path / 'out/meta/quarantine.jsonl').read_text().splitlines()
  assert json.loads(lines[0])['reason'] == 'sync: no motion'
  with pytest.raises(DataError, match='does not exist or is empty'):
    write_lerobot([good], tmp_path / 'out')
  odd = make_episode(3, size=(16, 15))
  with pytest.raises(DataError, match='even height and width'):
    write_lerobot([odd], tmp_path / 'odd')
  assert {p.name for p in tmp_path.iterdir()} == {'out'}
