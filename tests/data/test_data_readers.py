import dataclasses
import io
import json
import struct
import subprocess
import sys

import av
import google_crc32c
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from wallwm_jax.data.build import build_store
from wallwm_jax.data.readers.annotations import leading_verb
from wallwm_jax.data.readers.features import UnknownLayoutError
from wallwm_jax.data.readers.rlds import Episode, RldsInfo, RldsReader
from wallwm_jax.data.readers.spec import Text
from wallwm_jax.data.readers.tfrecord import parse_example, read_tfrecords
from wallwm_jax.data.readers.video import VideoReader, fixed_spans
from wallwm_jax.data.schema import Quarantined, validate
from wallwm_jax.data.store import EventStore
from wallwm_jax.types import DataError

# ---- a TFDS directory written by hand: TFRecord framing and tf.train.Example wire format ----


def _varint(n):
  out = b''
  while n > 127:
    out, n = out + bytes([n & 127 | 128]), n >> 7
  return out + bytes([n])


def _field(number, payload):
  return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _example(features):
  entries = b''
  for key, value in features.items():
    if isinstance(value, list):
      body = _field(1, b''.join(_field(1, v) for v in value))  # bytes_list
    elif np.issubdtype(value.dtype, np.floating):
      body = _field(2, _field(1, value.astype('<f4').tobytes()))  # float_list, packed
    else:
      body = _field(
        3, _field(1, b''.join(_varint(int(v) % 2**64) for v in value.ravel()))
      )  # int64_list, packed
    entries += _field(1, _field(1, key.encode()) + _field(2, body))
  return _field(1, entries)


def _masked(data):
  crc = google_crc32c.value(data)
  return struct.pack('<I', (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _frame(payload):
  length = struct.pack('<Q', len(payload))
  return length + _masked(length) + payload + _masked(payload)


def _png(x):
  buffer = io.BytesIO()
  Image.fromarray(x).save(buffer, 'png')
  return buffer.getvalue()


def make_raw(seed, steps=5, instruction='put the cup down', present=(True, True)):
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (2, steps, 8, 8, 3), dtype=np.uint8)
  state = rng.uniform(-0.6, 0.6, (steps, 7)).astype(np.float32)
  action = rng.uniform(-0.1, 0.1, (steps, 7)).astype(np.float32)
  state[:, 6], action[:, 6] = rng.uniform(0, 1, steps), rng.integers(0, 2, steps)
  return {
    'image': image,
    'state': state,
    'action': action,
    'instruction': instruction,
    'present': present,
  }


def _per_step(instruction, steps):
  texts = [instruction] * steps if isinstance(instruction, str) else instruction
  return [text.encode() for text in texts]


def write_rlds(root, episodes, file_format='tfrecord'):
  steps = {
    'observation': {
      'image_0': tfds.features.Image(shape=(8, 8, 3), encoding_format='png'),
      'image_1': tfds.features.Image(shape=(8, 8, 3), encoding_format='png'),
      'state': tfds.features.Tensor(shape=(7,), dtype=np.float32),
    },
    'action': tfds.features.Tensor(shape=(7,), dtype=np.float32),
    'language_instruction': tfds.features.Text(),
  }
  metadata = {
    'has_image_0': tfds.features.Scalar(np.bool_),
    'has_image_1': tfds.features.Scalar(np.bool_),
  }
  features = tfds.features.FeaturesDict(
    {'steps': tfds.features.Dataset(steps), 'episode_metadata': metadata}
  )
  folder = root / '1.0.0'
  folder.mkdir(parents=True)
  features.save_config(str(folder))
  raw = [
    _example(
      {
        **{f'steps/observation/image_{k}': [_png(x) for x in e['image'][k]] for k in range(2)},
        'steps/observation/state': e['state'],
        'steps/action': e['action'],
        'steps/language_instruction': _per_step(e['instruction'], len(e['state'])),
        **{
          f'episode_metadata/has_image_{k}': np.array([e['present'][k]], np.int64) for k in range(2)
        },
      }
    )
    for e in episodes
  ]
  path = folder / f'toy-train.{file_format}-00000-of-00001'
  if file_format == 'tfrecord':
    path.write_bytes(b''.join(map(_frame, raw)))
  else:
    writer = ArrayRecordWriter(str(path), 'group_size:1')
    for episode in raw:
      writer.write(episode)
    writer.close()
  (folder / 'dataset_info.json').write_text(
    json.dumps(
      {
        'name': 'toy',
        'version': '1.0.0',
        'fileFormat': file_format,
        'moduleName': 'toy.toy',
        'splits': [
          {
            'name': 'train',
            'numBytes': str(path.stat().st_size),
            'shardLengths': [str(len(raw))],
            'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
          }
        ],
      }
    )
  )
  return path


def test_reader_agrees_with_an_independent_computation(tmp_path):
  raw = [make_raw(0), make_raw(1, steps=3, instruction='Turn lever')]
  write_rlds(tmp_path, raw)
  reader = RldsReader(tmp_path)
  records = list(reader)
  assert len(reader) == len(records) == 2
  for e, record in zip(raw, records):
    validate(record)
    for k in range(2):
      np.testing.assert_array_equal(record.frames[f'image_{k}'], e['image'][k])
    measured = Rotation.from_euler('xyz', e['state'][:, 3:6])
    target = Rotation.from_euler('xyz', e['action'][:, 3:6]) * measured
    for got, position, rotation, grip in [
      (record.state, e['state'][:, :3], measured, e['state'][:, 6]),
      (record.actions, e['state'][:, :3] + e['action'][:, :3], target, e['action'][:, 6]),
    ]:
      matrix = rotation.as_matrix()
      want = np.concatenate([position, matrix[:, :, 0], matrix[:, :, 1], grip[:, None]], -1)
      np.testing.assert_allclose(got, want, atol=1e-6)
  assert (records[0].fps, records[0].events[0].label) == (5.0, 'put')
  assert records[1].event_captions(records[1].events[0]) == {'L1': 'Turn lever', 'L3': 'Turn lever'}
  assert (records[1].events[0].start, records[1].events[0].end) == (0, 3)
  absolute = RldsReader(tmp_path, spec=with_convention(reader.spec, 'absolute'))
  np.testing.assert_allclose(next(iter(absolute)).actions[:, :3], raw[0]['action'][:, :3])


def with_convention(spec, convention):
  (arm,) = spec.arms
  action = dataclasses.replace(arm.action, convention=convention)
  return dataclasses.replace(spec, arms=(dataclasses.replace(arm, action=action),))


def test_absent_cameras_are_dropped_and_blank_ones_refused(tmp_path):
  blank = make_raw(2)
  blank['image'][1] = 0
  unset = make_raw(3, present=(False, False))
  unset['image'][0] = 0
  black = make_raw(4, present=(False, False))
  black['image'][:] = 0
  write_rlds(tmp_path, [make_raw(0), make_raw(1, present=(True, False)), blank, unset, black])
  items = list(RldsReader(tmp_path))
  assert [getattr(i, 'views', None) for i in items] == [
    ('image_0', 'image_1'),
    ('image_0',),
    None,
    ('image_1',),
    None,
  ]
  assert 'flagged as present but blank' in items[2].reason
  assert 'missing camera' in items[4].reason


def test_bad_episodes_are_quarantined_with_their_reason(tmp_path):
  nan, grip, silent = make_raw(1), make_raw(2), make_raw(3, instruction='')
  nan['action'][2, 1] = np.nan
  grip['state'][0, 6] = 1.4
  write_rlds(tmp_path / 'in', [make_raw(0), nan, grip, silent])
  report = build_store(RldsReader(tmp_path / 'in'), tmp_path / 'out', progress=False)
  assert (report['read'], report['episodes'], report['quarantined']) == (4, 2, 2)
  reasons = ' | '.join(report['reasons'])
  assert 'NaN' in reasons and 'gripper: expected 0..1' in reasons
  assert EventStore(tmp_path / 'out').events['flags'].to_pylist() == [[], ['no_caption']]


def test_corrupt_tfrecords(tmp_path):
  path = write_rlds(tmp_path, [make_raw(i) for i in range(3)])
  content = path.read_bytes()
  length = struct.unpack('<Q', content[:8])[0]
  flipped = bytearray(content)
  flipped[12 + length // 2] ^= 4  # payload of record 0: that record only
  path.write_bytes(flipped)
  items = list(RldsReader(tmp_path))
  assert isinstance(items[0], Quarantined) and 'checksum' in items[0].reason
  assert [type(i).__name__ for i in items[1:]] == ['EpisodeRecord'] * 2
  flipped = bytearray(content)
  flipped[1] ^= 1  # length of record 0: everything after it is lost
  path.write_bytes(flipped)
  with pytest.raises(DataError, match='length of record 0'):
    list(RldsReader(tmp_path))
  path.write_bytes(content[:-7])
  with pytest.raises(DataError, match='truncated in record 2'):
    list(RldsReader(tmp_path))
  path.write_bytes(content[: 16 + length])
  with pytest.raises(DataError, match='expected 3 records, found 1'):
    list(RldsReader(tmp_path))


def test_valid_checksum_around_nonsense_is_quarantined(tmp_path):
  path = write_rlds(tmp_path, [make_raw(0)])
  path.write_bytes(_frame(b'\x0a\xff\xff\xff\x7fnot a protobuf'))
  (item,) = RldsReader(tmp_path)
  assert 'cannot be decoded' in item.reason


def test_foreign_layouts_are_refused(tmp_path):
  with pytest.raises(DataError, match='features.json'):
    RldsReader(tmp_path / 'nowhere')
  write_rlds(tmp_path / 'toy', [make_raw(0)])
  features = tmp_path / 'toy' / '1.0.0' / 'features.json'
  with pytest.raises(DataError, match="split 'test'"):
    RldsReader(tmp_path / 'toy', split='test')
  features.write_text(features.read_text().replace('"7"', '"8"'))
  with pytest.raises(
    UnknownLayoutError, match=r"'action' of shape \(7,\), got \(8,\)(.|\n)*--spec"
  ):
    RldsReader(tmp_path / 'toy')


def test_array_records_are_read_like_tfrecords(tmp_path):
  raw = [make_raw(i, steps=3 + i) for i in range(3)]
  write_rlds(tmp_path / 'a', raw)
  path = write_rlds(tmp_path / 'b', raw, 'array_record')
  for a, b in zip(RldsReader(tmp_path / 'a'), RldsReader(tmp_path / 'b'), strict=True):
    np.testing.assert_array_equal(a.state, b.state)
    np.testing.assert_array_equal(a.frames['image_1'], b.frames['image_1'])
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  with pytest.raises(DataError, match='ArrayRecord'):
    list(RldsReader(tmp_path / 'b'))
  path.unlink()
  with pytest.raises(DataError, match='are missing'):
    RldsReader(tmp_path / 'b')


def test_text_that_changes_is_captions_and_marks_events(tmp_path):
  raw = make_raw(0, steps=6)
  raw['instruction'] = ['reach it'] * 2 + ['grasp it'] * 3 + ['lift it']
  write_rlds(tmp_path, [raw])
  spec = dataclasses.replace(RldsReader(tmp_path).spec, events=Text('language_instruction'))
  (record,) = RldsReader(tmp_path, spec=spec)
  validate(record)
  # Action 1 leads from frame 1 to frame 2; the last frame has none and so no event of its own.
  assert [(e.start, e.end, e.label) for e in record.events] == [(0, 3, 'reach'), (2, 6, 'grasp')]
  assert [(c.level, c.start, c.end, c.text) for c in record.captions if c.level == 'L1'] == [
    ('L1', 0, 2, 'reach it'),
    ('L1', 2, 5, 'grasp it'),
    ('L1', 5, 6, 'lift it'),
  ]


def test_a_spec_needs_the_frame_rate_and_features_that_exist(tmp_path):
  write_rlds(tmp_path, [make_raw(0)])
  spec = RldsReader(tmp_path).spec
  with pytest.raises(DataError, match='fps'):
    RldsReader(tmp_path, spec=dataclasses.replace(spec, fps=None))
  camera = dataclasses.replace(spec.cameras[0], feature='observation/wrist')
  with pytest.raises(DataError, match='observation/wrist'):
    RldsReader(tmp_path, spec=dataclasses.replace(spec, cameras=(camera,)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.lists(st.binary(max_size=9)))
def test_wire_format_round_trips(integers, texts):
  floats = np.random.default_rng(len(texts)).standard_normal(5).astype(np.float32)
  parsed = parse_example(_example({'i': np.array(integers, np.int64), 'f': floats, 'b': texts}))
  assert parsed['i'].tolist() == integers and parsed['b'] == texts
  np.testing.assert_array_equal(parsed['f'], floats)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60))
def test_noise_is_refused_or_parsed_but_never_crashes(noise):
  try:
    parse_example(noise)
  except DataError:
    pass


def test_example_parser_agrees_with_tfds(shared_data):
  """Every feature of real records, decoded by tensorflow_datasets."""
  folder = shared_data / 'bridge_rlds' / '1.0.0'
  features = tfds.builder_from_directory(str(folder)).info.features
  (path,) = folder.glob('*.tfrecord*')
  for raw in list(read_tfrecords(path))[:3]:
    want = list(features.deserialize_example_np(raw)['steps'])
    got = Episode(parse_example(raw), RldsInfo(folder).features)
    for name in ('observation/state', 'action', 'language_embedding', 'is_last'):
      steps = [step['observation']['state'] if '/' in name else step[name] for step in want]
      np.testing.assert_array_equal(got.numbers(name), np.stack(steps))
    for k in range(4):
      steps = [step['observation'][f'image_{k}'] for step in want]
      np.testing.assert_array_equal(got.images(f'observation/image_{k}'), np.stack(steps))


def test_importing_readers_brings_no_framework():
  code = (
    'import sys; from wallwm_jax.data.readers import lerobot, probe, rlds, video; '
    'from wallwm_jax.data.writers import lerobot; '
    "print([m for m in ('jax', 'tensorflow', 'tensorflow_datasets', 'torch', 'pandas', 'scipy') "
    'if m in sys.modules])'
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == '[]'


def test_real_bridge_clips(shared_data, tmp_path):
  reader = RldsReader(shared_data / 'bridge_rlds')
  views = [camera.view for camera in reader.spec.cameras]
  assert views == ['image_0', 'image_1', 'image_2', 'image_3']
  report = build_store(reader, tmp_path / 's', progress=False)
  assert (report['read'], report['episodes'], report['events'], report['frames']) == (
    25,
    25,
    25,
    250,
  )
  store = EventStore(tmp_path / 's')
  assert set(store.column('label').tolist()) == {'put', 'turn', 'flip'}
  assert all(
    views == ['image_0', 'image_1', 'image_2'] for views in store.episodes['views'].to_pylist()
  )
  # The canonical target is nearer to the next measured pose than staying put is, in position and
  # rotation.
  gain = np.zeros((2, 2))
  for i in range(25):
    info = store.info(i)
    now, then, target = info.state[:-1], info.state[1:], info.actions[:-1]
    gain[0] += np.abs(target[:, :3] - then[:, :3]).sum(), np.abs(now[:, :3] - then[:, :3]).sum()
    gain[1] += np.abs(target[:, 3:9] - then[:, 3:9]).sum(), np.abs(now[:, 3:9] - then[:, 3:9]).sum()
  assert (gain[:, 0] < 0.6 * gain[:, 1]).all(), gain


# ---- video folders ----


def write_video(path, num_frames, size=(24, 40), rate=10):
  """Frame t is grey 4 t."""
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('mpeg4', rate=rate)
    stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *size, 'yuv420p', 4_000_000
    for t in range(num_frames):
      frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 4 * t, np.uint8), format='rgb24')
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


def test_video_folder(tmp_path):
  for name in ('left', 'right'):
    write_video(tmp_path / f'{name}.mp4', 40)
  (record,) = VideoReader(tmp_path, image_size=(32, 32), event_frames=17)
  validate(record)
  assert record.views == ('left', 'right') and record.actions is None and record.fps == 10
  assert record.frames['left'].shape == (40, 32, 32, 3)
  middle = record.frames['left'][:, 16, 16].astype(int)
  np.testing.assert_allclose(middle, np.repeat(4 * np.arange(40)[:, None], 3, 1), atol=4)
  mask = record.pixel_mask['left']  # 24 x 40 in 32 x 32: rows 6..24 (of 19)
  assert mask.sum() == 19 * 32 and mask[6:25].all() and not record.frames['left'][:, ~mask].any()
  assert [(e.start, e.end) for e in record.events] == [(0, 17), (16, 33), (32, 40)]
  assert all(e.flags == ('fixed_span',) and not e.captions for e in record.events)


def test_video_subsampling_keeps_the_clock(tmp_path):
  write_video(tmp_path / 'left.mp4', 40)
  (record,) = VideoReader(tmp_path, image_size=(24, 40), fps=4)
  np.testing.assert_allclose(
    record.frames['left'][:, 12, 20, 0], 4 * np.ceil(np.arange(16) * 2.5), atol=4
  )
  (item,) = VideoReader(tmp_path, fps=20)
  assert 'asked for 20 Hz' in item.reason


def test_bad_videos_are_quarantined(tmp_path):
  for folder in ('good', 'uneven', 'broken'):
    (tmp_path / folder).mkdir()
    write_video(tmp_path / folder / 'left.mp4', 12)
  write_video(tmp_path / 'uneven' / 'right.mp4', 11)
  (tmp_path / 'broken' / 'right.mp4').write_bytes(b'not a video')
  report = build_store(VideoReader(tmp_path), tmp_path / 'out', progress=False)
  assert (report['episodes'], report['quarantined']) == (1, 2)
  assert 'camera lengths differ' in ' '.join(report['reasons'])
  with pytest.raises(DataError, match='folder of videos'):
    VideoReader(tmp_path / 'nowhere')


@pytest.mark.parametrize(
  'count,spans',
  [
    (2, [(0, 2)]),
    (5, [(0, 5)]),
    (6, [(0, 5), (4, 6)]),
    (9, [(0, 5), (4, 9)]),
    (10, [(0, 5), (4, 9), (8, 10)]),
  ],
)
def test_fixed_spans_cover_everything(count, spans):
  assert [(e.start, e.end) for e in fixed_spans(count, 5)] == spans


def test_real_droid_videos(shared_data):
  (record,) = VideoReader(shared_data / 'droid_three_view', image_size=(48, 80), fps=5)
  validate(record)
  assert record.num_frames == 140 and len(record.views) == 3 and record.actions is None
  assert record.pixel_mask['wrist_image_left'].sum() == 45 * 80


def test_leading_verb():
  assert [leading_verb(x) for x in ('Put the pot', '  turn, now', '', '42')] == [
    'put',
    'turn',
    'unlabelled',
    'unlabelled',
  ]
