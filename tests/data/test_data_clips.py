import dataclasses

import jax
import numpy as np
import pytest
from episode_factory import encode_text, make_episode
from hypothesis import given, settings
from hypothesis import strategies as st

from wallwm_jax import presets
from wallwm_jax.data import clips, pipeline, stats
from wallwm_jax.data.build import build_store
from wallwm_jax.data.store import EpisodeStoreWriter, EventStore
from wallwm_jax.geometry.yuv import i420_to_rgb
from wallwm_jax.training.stages import encode_clip
from wallwm_jax.types import ConfigError, CorruptStoreError, Frozen

VIEWS = ('front', 'side', 'wrist')


def _film(count, size, seed=0):
  """A soft square that wanders over a slope: uint8 [n, H, W, 3]."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[: size[0], : size[1]] / max(size)
  frames = []
  for t in range(count):
    centre = 0.3 + 0.02 * t
    bump = np.exp(-(((x - centre) ** 2 + (y - 0.5) ** 2) / 0.02))
    frames.append(np.stack([60 + 150 * bump, 40 + 100 * x, 90 + 60 * y], -1))
  return np.clip(np.stack(frames) + rng.normal(0, 1, (count, *size, 3)), 0, 255).astype(np.uint8)


def _episode(index=0, sizes=((32, 48), (32, 48), (16, 16)), lengths=(9, 17, 6)):
  count = sum(lengths)
  frames = {v: _film(count, s, 10 * index + i) for i, (v, s) in enumerate(zip(VIEWS, sizes))}
  return make_episode(index, lengths, VIEWS, frames=frames)


def _psnr(a, b):
  return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2))


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  path = tmp_path_factory.mktemp('clips') / 'store'
  build_store([_episode(i) for i in range(2)], path, codec='h264', crf=12, progress=False)
  return EventStore(path)


def test_the_manifest_says_how_pixels_are_kept(store):
  assert store.codec == {
    'name': 'h264', 'crf': 12, 'pixels': 'yuv420p', 'colours': 'bt601 limited'
  }  # fmt: skip
  store.verify()


def test_rgb_and_planes_are_the_film(store):
  for i in range(2):
    film = _episode(i).frames
    rgb, planes = (store.frames(i, np.arange(32), VIEWS, planes=p) for p in (False, True))
    for view in VIEWS:
      height, width = film[view].shape[1:3]
      assert planes[view].shape == (32, height * 3 // 2, width)
      assert _psnr(rgb[view], film[view]) > 33
      converted = i420_to_rgb(planes[view])
      assert _psnr(converted, film[view]) > 34
      assert np.abs(converted - rgb[view]).max() < 3


@settings(deadline=None, max_examples=40)
@given(
  indices=st.lists(st.integers(0, 31), min_size=1, max_size=20),
  views=st.sets(st.sampled_from(VIEWS), min_size=1),
)
def test_any_frames_of_any_cameras(store, indices, views):
  whole = store.frames(1, np.arange(32), VIEWS, planes=True)
  got = store.frames(1, np.array(indices), sorted(views), planes=True)
  for view in views:
    np.testing.assert_array_equal(got[view], whole[view][indices])


def test_a_window_decodes_its_blocks_up_to_its_last_frame(store, monkeypatch):
  decoded, original = [], clips._decode
  monkeypatch.setattr(
    clips, '_decode', lambda packets, size: decoded.append(len(packets)) or original(packets, size)
  )
  store.frames(0, np.arange(14, 19), ['front', 'side'])
  assert decoded == [16, 3]  # both cameras lie in one picture


def test_decoding_does_not_depend_on_what_was_decoded_before(store):
  alone = EventStore(store.path).frames(0, np.array([20]), ['front'], planes=True)
  store.frames(1, np.arange(32), VIEWS)
  again = store.frames(0, np.array([20]), ['front'], planes=True)
  np.testing.assert_array_equal(again['front'], alone['front'])


def test_encoding_is_deterministic_and_one_closed_group():
  film = {'a': _film(16, (32, 32)), 'b': _film(16, (32, 32), 1)}
  codec = clips.H264(20)
  ((views, packets),) = codec.encode(film)['clips']
  assert views == ['a', 'b'] and len(packets) == 16
  assert codec.encode(film)['clips'] == [[views, packets]]
  kinds = [[b & 31 for b in _nal_heads(packet)] for packet in packets]
  assert kinds[0] == [7, 8, 5]  # parameters and a key picture; the encoder's note is left out
  assert all(kind == [1] for kind in kinds[1:])


def _nal_heads(packet):
  """First byte of every NAL unit of an Annex B packet."""
  places = [i for i in range(len(packet) - 3) if packet[i : i + 3] == b'\0\0\1']
  return [packet[i + 3] for i in places]


def test_size_and_quality_follow_the_rate_factor():
  film = {'a': _film(16, (64, 64))}
  size, quality = {}, {}
  for crf in (10, 20, 35):
    codec = clips.H264(crf)
    payload, out = codec.encode(film), {'a': np.empty_like(film['a'])}
    codec.decode(payload, 16, {'a': (64, 64)}, np.arange(16), np.arange(16), out)
    size[crf] = sum(map(len, payload['clips'][0][1]))
    quality[crf] = _psnr(out['a'], film['a'])
  assert size[10] > 2 * size[20] > 2 * size[35] and quality[10] > quality[20] > quality[35]
  assert size[20] < film['a'].size / 50


@pytest.mark.parametrize('name, crf', [('h264', 52), ('h264', -1), ('zstd', 20), ('av1', None)])
def test_codecs_out_of_range_are_refused(tmp_path, name, crf):
  with pytest.raises(ConfigError):
    EpisodeStoreWriter(tmp_path / 's', codec=name, crf=crf)
  assert list(tmp_path.iterdir()) == []


def test_what_a_clip_cannot_hold_is_quarantined(tmp_path):
  odd = _episode(1, sizes=((15, 16), (16, 16), (16, 16)))
  snow = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
  noise = make_episode(2, frames={view: snow for view in VIEWS})
  items = [_episode(0), odd, noise]
  report = build_store(items, tmp_path / 's', codec='h264', crf=51, progress=False)
  assert report['episodes'] == 1
  reasons = ' '.join(entry.reason for entry in EventStore(tmp_path / 's').quarantine())
  assert 'even sizes, got 15x16' in reasons and 'changes the luma' in reasons


def test_planes_of_a_store_without_are_refused(tmp_path):
  build_store([_episode()], tmp_path / 's', progress=False)
  with pytest.raises(ConfigError, match='zstd store holds RGB'):
    EventStore(tmp_path / 's').frames(0, np.arange(3), ['front'], planes=True)


@pytest.mark.parametrize('change', ['drop', 'cut', 'resize'])
def test_a_clip_that_is_not_what_was_promised_is_an_error(change):
  codec, sizes = clips.H264(20), {'a': (32, 32)}
  payload = codec.encode({'a': _film(16, (32, 32))})
  packets = payload['clips'][0][1]
  if change == 'drop':
    packets.pop()
  elif change == 'cut':
    packets[0] = packets[0][:20]
  else:
    sizes = {'a': (32, 16)}
  out = {'a': np.empty((16, *sizes['a'], 3), np.uint8)}
  with pytest.raises(CorruptStoreError, match='clip|expected 16 frames'):
    codec.decode(payload, 16, sizes, np.arange(16), np.arange(16), out)


CONFIG = presets.tabletop()
CONFIG = dataclasses.replace(
  CONFIG, data=dataclasses.replace(CONFIG.data, batch_size=2, threads=0, planes=True)
)


@pytest.fixture(scope='module')
def tabletop(tmp_path_factory):
  path = tmp_path_factory.mktemp('planes') / 'store'
  size = CONFIG.model.image_size
  frames = {v: _film(32, size, i) for i, v in enumerate(CONFIG.model.views[:-1])}
  record = make_episode(0, views=tuple(frames), frames=frames, calibration={})
  build_store([record], path, codec='h264', crf=12, heldout=0, progress=False)
  return EventStore(path)


def _batch(store, config):
  config = dataclasses.replace(
    config, model=dataclasses.replace(config.model, text=dataclasses.replace(
      config.model.text, tokens=1, width=1)))  # fmt: skip
  return next(pipeline.make_dataset(config, store, stats.identity(config), encode_text))


def test_planes_go_to_the_device_and_become_the_same_latents(tabletop):
  planes = _batch(tabletop, CONFIG)
  rgb = _batch(tabletop, dataclasses.replace(
    CONFIG, data=dataclasses.replace(CONFIG.data, planes=False)))  # fmt: skip
  views, (height, width) = len(CONFIG.model.views), CONFIG.model.image_size
  assert planes.frames.shape[1:] == (views, planes.frames.shape[2], height * 3 // 2, width)
  spec = CONFIG.inputs_spec((planes.frames.shape[2] - 1) // 4, 2)
  assert planes.frames.shape == spec.frames.shape and planes.frames.dtype == spec.frames.dtype
  frozen = Frozen(stats.identity(CONFIG))
  encode = jax.jit(lambda batch: encode_clip(batch, frozen, CONFIG).latents)
  ours, theirs = np.asarray(encode(planes)), np.asarray(encode(rgb))
  # The two converters differ by 0.8 levels of 255 on average, in the constant coefficient.
  assert np.abs(ours - theirs).mean() < 0.02 * np.abs(theirs).mean() + 1e-3
  absent = ~planes.view_mask
  np.testing.assert_allclose(ours[absent], theirs[absent], atol=1e-5)


def test_planes_are_checked_before_training(tabletop, tmp_path):
  with pytest.raises(ConfigError, match='even model.image_size'):
    model = dataclasses.replace(
      CONFIG.model,
      image_size=(15, 15),
      codec=dataclasses.replace(CONFIG.model.codec, spatial=1, channels=12),
      video=dataclasses.replace(CONFIG.model.video, patch=(1, 1, 1)),
    )
    dataclasses.replace(CONFIG, model=model)
  with pytest.raises(ConfigError, match='data.planes: precomputed latents'):
    dataclasses.replace(CONFIG.data, latents='somewhere')
  build_store([_episode()], tmp_path / 'exact', progress=False)
  with pytest.raises(ConfigError, match='expected a store of h264 clips'):
    _batch(EventStore(tmp_path / 'exact'), CONFIG)
  build_store([_episode()], tmp_path / 'small', codec='h264', heldout=0, progress=False)
  with pytest.raises(ConfigError, match=r"'front' of \(32, 48\)"):
    _batch(EventStore(tmp_path / 'small'), CONFIG)


def test_real_video_loses_little(shared_data):
  import av

  film = {}
  for path in sorted((shared_data / 'droid_three_view').glob('*.mp4')):
    with av.open(str(path)) as container:
      frames = [f.reformat(96, 64, 'rgb24').to_ndarray() for f, _ in zip(
        container.decode(video=0), range(16))]  # fmt: skip
    film[path.stem] = np.stack(frames)
  codec = clips.H264(20)
  payload, sizes = codec.encode(film), {view: (64, 96) for view in film}
  out = {view: np.empty((16, 96, 96), np.uint8) for view in film}
  codec.decode(payload, 16, sizes, np.arange(16), np.arange(16), out)
  assert all(_psnr(i420_to_rgb(out[view]), film[view]) > 33 for view in film)
  assert sum(map(len, payload['clips'][0][1])) < sum(x.size for x in film.values()) / 40


@pytest.mark.parametrize('size', [(16, 16), (48, 48)])
def test_a_clip_has_the_same_bytes_every_time(size):
  rng = np.random.default_rng(4)
  ramp = np.linspace(0, 255, size[1])[None, :, None] * np.ones((*size, 3))
  still = np.stack([np.roll(ramp, i, 1) for i in range(16)]) + rng.integers(0, 8, (16, *size, 3))
  frames = {view: np.clip(still, 0, 255).astype(np.uint8) for view in ('front', 'side', 'wrist')}
  found = set()
  for _ in range(200):
    used = [np.full(rng.integers(1, 200_000), rng.integers(256), np.uint8) for _ in range(20)]
    del used  # memory that the encoder is given next, with something in it
    ((_, packets),) = clips.H264(20).encode(frames)['clips']
    found.add(b''.join(packets))
  assert len(found) == 1
