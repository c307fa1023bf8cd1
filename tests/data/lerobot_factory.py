"""Small LeRobot data sets written by hand (pyarrow, PyAV), apart from the library's own writer."""

import dataclasses
import json

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from episode_factory import make_episode

from wallwm_jax.data.readers.spec import from_plain

FPS = 10
SIZE = (32, 48)
CAMERAS = ('observation.images.front', 'observation.images.wrist')
SPEC = from_plain(
  {
    'cameras': [{'feature': c, 'view': c.rsplit('.', 1)[1]} for c in CAMERAS],
    'arms': [
      {
        'state': {
          'position': {'feature': 'observation.state', 'channels': [0, 1, 2], 'unit': 'mm'},
          'rotation': {
            'format': 'quaternion_xyzw',
            'feature': 'observation.state',
            'channels': [3, 4, 5, 6],
          },
          'gripper': {'feature': 'observation.state', 'channel': 'grip', 'open': 80, 'closed': 0},
        },
        'action': {
          'convention': 'delta_tool',
          'position': {'feature': 'action', 'channels': [0, 1, 2], 'unit': 'm'},
          'rotation': {
            'format': 'axis_angle',
            'feature': 'action',
            'channels': [3, 4, 5],
            'unit': 'deg',
          },
          'gripper': {'feature': 'action', 'channel': 6, 'open': 0, 'closed': 1},
        },
      }
    ],
  }
)


def make_raw(seed, length=7):
  """One episode: state [T, 8] (mm, quaternion, 0..80), action [T, 7]; grey of a frame: `level`."""
  rng = np.random.default_rng(seed)
  quaternion = rng.standard_normal((length, 4))
  quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
  state = np.concatenate(
    [rng.uniform(-500, 500, (length, 3)), quaternion, rng.uniform(0, 80, (length, 1))], -1
  )
  action = np.concatenate(
    [rng.uniform(-0.1, 0.1, (length, 3)), rng.uniform(-20, 20, (length, 3)), np.ones((length, 1))],
    -1,
  )
  level = {c: rng.integers(16, 240, length) for c in CAMERAS}
  return {
    'length': length,
    'state': state.astype(np.float32),
    'action': action.astype(np.float32),
    'level': level,
    'task': f'task {seed}',
    'columns': {},
  }


def features(**extra):
  video = {'dtype': 'video', 'shape': [*SIZE, 3], 'names': ['height', 'width', 'channels']}
  scalar = {'dtype': 'int64', 'shape': [1], 'names': None}
  return {
    **dict.fromkeys(CAMERAS, video),
    'observation.state': {
      'dtype': 'float32',
      'shape': [8],
      'names': {'motors': ['x', 'y', 'z', 'qx', 'qy', 'qz', 'qw', 'grip']},
    },
    'action': {'dtype': 'float32', 'shape': [7], 'names': None},
    'timestamp': {'dtype': 'float32', 'shape': [1], 'names': None},
    **dict.fromkeys(('frame_index', 'episode_index', 'index', 'task_index'), scalar),
    **extra,
  }


def write_clip(path, levels, size=SIZE):
  """Frame t is grey levels[t]."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('libx264', rate=FPS, options={'crf': '5', 'g': '5'})
    stream.height, stream.width, stream.pix_fmt = *size, 'yuv420p'
    for level in levels:
      image = np.full((*size, 3), level, np.uint8)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format='rgb24')))
    container.mux(stream.encode())


def rows(raw, episode, first):
  """The columns of one episode's rows."""
  length = raw['length']
  return {
    'observation.state': raw['state'].tolist(),
    'action': raw['action'].tolist(),
    'timestamp': (np.arange(length) / FPS).astype(np.float32),
    'frame_index': np.arange(length),
    'episode_index': np.full(length, episode),
    'index': first + np.arange(length),
    'task_index': np.full(length, episode),
    **raw['columns'],
  }


def table(raw, episode, first):
  return pa.table(rows(raw, episode, first))


def write_info(root, version, raws, extra, **paths):
  meta = root / 'meta'
  meta.mkdir(parents=True, exist_ok=True)
  info = {
    'codebase_version': version,
    'robot_type': 'toy',
    'fps': FPS,
    'total_episodes': len(raws),
    'chunks_size': 1000,
    'features': features(**extra),
    **paths,
  }
  (meta / 'info.json').write_text(json.dumps(info))


def write_v21(root, raws, extra=None):
  """One Parquet file and one video per camera for each episode."""
  write_info(
    root,
    'v2.1',
    raws,
    extra or {},
    data_path='data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet',
    video_path='videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4',
  )
  (root / 'data/chunk-000').mkdir(parents=True)
  episodes, tasks, first = [], [], 0
  for i, raw in enumerate(raws):
    pq.write_table(table(raw, i, first), root / f'data/chunk-000/episode_{i:06d}.parquet')
    for camera, levels in raw['level'].items():
      write_clip(root / f'videos/chunk-000/{camera}/episode_{i:06d}.mp4', levels)
    episodes.append({'episode_index': i, 'tasks': [raw['task']], 'length': raw['length']})
    tasks.append({'task_index': i, 'task': raw['task']})
    first += raw['length']
  for name, lines in (('episodes', episodes), ('tasks', tasks)):
    text = '\n'.join(json.dumps(line) for line in lines)
    (root / 'meta' / f'{name}.jsonl').write_text(text + '\n')


def write_v30(root, raws, extra=None, columns=None, per_group=None):
  """All episodes in one Parquet file (row groups of `per_group` rows) and one video per camera;
  columns: further ones of meta/episodes, a list per episode."""
  write_info(
    root,
    'v3.0',
    raws,
    extra or {},
    data_path='data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet',
    video_path='videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4',
  )
  starts = np.cumsum([0, *(raw['length'] for raw in raws)])
  data = pa.concat_tables([table(raw, i, starts[i]) for i, raw in enumerate(raws)])
  episodes = {
    'episode_index': list(range(len(raws))),
    'length': [raw['length'] for raw in raws],
    'data/chunk_index': [0] * len(raws),
    'data/file_index': [0] * len(raws),
    **(columns or {}),
  }
  for camera in CAMERAS:
    levels = np.concatenate([raw['level'][camera] for raw in raws])
    write_clip(root / f'videos/{camera}/chunk-000/file-000.mp4', levels)
    episodes |= {f'videos/{camera}/{k}': [0] * len(raws) for k in ('chunk_index', 'file_index')}
    episodes[f'videos/{camera}/from_timestamp'] = (starts[:-1] / FPS).tolist()
    episodes[f'videos/{camera}/to_timestamp'] = (starts[1:] / FPS).tolist()
  tasks = {'task_index': list(range(len(raws))), 'task': [raw['task'] for raw in raws]}
  for path, content in (
    ('data/chunk-000/file-000.parquet', data),
    ('meta/episodes/chunk-000/file-000.parquet', pa.table(episodes)),
    ('meta/tasks.parquet', pa.table(tasks)),
  ):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, root / path, row_group_size=per_group)


def smooth_episode(index, **changes):
  """Frames that a codec can keep."""
  record = make_episode(index, lengths=(9, 5), size=(32, 48), **changes)
  ramp = np.arange(32)[:, None, None] + np.arange(48)[None, :, None] + np.array([0, 40, 80])
  clip = (ramp[None] + 3 * np.arange(record.num_frames)[:, None, None, None]).astype(np.uint8)
  return dataclasses.replace(record, frames=dict.fromkeys(record.views, clip))
