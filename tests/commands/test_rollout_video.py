"""`wallwm rollout --video-only`: films of a tiny model, what they show first, what is refused."""

import json
import pathlib
import shutil
import types

import av
import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from PIL import Image

from wallwm_jax import cli
from wallwm_jax.commands import imagine, rollout
from wallwm_jax.models import functional
from wallwm_jax.types import ConfigError, Frozen, InferenceParams, NormStats, Text

DATA = pathlib.Path(__file__).resolve().parents[1] / 'fixtures' / 'data'
FRAMES = 9


@pytest.fixture(scope='module')
def model(config):
  """(config, params) with random weights everywhere: a fresh tower would leave noise as it is."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: functional.init_params(config.model, jax.random.key(0)))
  weights = jax.tree.map(lambda s: np.float32(0.2 * rng.standard_normal(s.shape)), shapes)
  widths = (10, 10, config.model.codec.channels)
  norm = NormStats(*(np.full(n, value, np.float32) for n in widths for value in (0, 2)))
  return config, InferenceParams(weights, Frozen(norm))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """A smooth picture of each camera, of other sizes than the model's, as --image arguments."""
  folder, found = tmp_path_factory.mktemp('pictures'), {}
  ramp = np.linspace(20, 230, 32, dtype=np.uint8)
  front = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(90)), -1)
  for name, pixels in {'front': front, 'side': front[::-1]}.items():
    found[name] = folder / f'{name}.png'
    Image.fromarray(pixels).save(found[name])
  return found


@pytest.fixture
def film(model, tmp_path, monkeypatch, capsys):
  """film(*arguments) -> (frames uint8 [T, H, W, 3], facts, stderr) of a run that must succeed."""
  monkeypatch.setattr(imagine, 'load_video_model', lambda args: model)

  def make(*arguments, name='film.mp4'):
    out = tmp_path / name
    common = ['rollout', '--video-only', '--workdir', 'run', '--steps', '2', '--out', str(out)]
    code = cli.main([*common, '--frames', str(FRAMES), *map(str, arguments)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return decode(out), json.loads(printed.out), printed.err

  return make


def decode(path):
  with av.open(str(path)) as container:
    return np.stack([f.to_ndarray(format='rgb24') for f in container.decode(video=0)])


def given(pictures):
  return [part for name, path in pictures.items() for part in ('--image', f'{name}={path}')]


def reconstruction(config, path):
  """What the codec keeps of a picture, [H, W, 3] 0..255."""
  pixels = np.asarray(Image.open(path).resize((16, 16), Image.Resampling.BILINEAR))
  latents = functional.encode_video(config.model, pixels[None, None, None], {})
  return 255 * np.asarray(functional.decode_video(config.model, latents, {}))[0, 0, 0]


def cells(frame, config):
  """Mean colour of every pixel of an enlarged frame, [view, H, W, 3]."""
  size, views = 16, len(config.model.views)
  scale = frame.shape[0] // size
  small = frame.reshape(size, scale, views * size, scale, 3).mean((1, 3))
  return small.reshape(size, views, size, 3).swapaxes(0, 1)


def test_text_to_video_has_the_frames_it_was_asked_for(film):
  first, facts, err = film('--prompt', 'go there')
  assert first.shape == (FRAMES, 320, 640, 3)
  assert facts['frames'] == FRAMES and facts['fps'] == 24 and facts['views'] == ['front', 'side']
  assert facts['solver'] == 'unipc' and facts['grid'] == 'wan' and facts['shift'] == 5.0
  assert 'sampling' in err and '2/2' in err
  again, _, _ = film('--prompt', 'go there')
  np.testing.assert_array_equal(first, again)
  other, _, _ = film('--prompt', 'go there', '--seed', 1)
  assert np.abs(first - other.astype(float)).mean() > 5


def test_given_images_are_shown_first(film, pictures, model):
  frames, facts, _ = film('--prompt', 'go', *given(pictures), '--fps', 8)
  assert facts['fps'] == 8 and len(frames) == FRAMES
  shown = cells(frames[0], model[0])
  for view, path in zip(shown, pictures.values()):
    assert np.abs(view - reconstruction(model[0], path)).mean() < 6
  assert np.abs(cells(frames[-1], model[0]) - shown).mean() > 20


def test_views_can_be_chosen(film, pictures, model):
  frames, facts, _ = film('--prompt', 'go', '--views', 'side', '--image', pictures['side'])
  assert facts['views'] == ['side'] and frames.shape[1:3] == (640, 640)
  shown = frames[0].reshape(16, 40, 16, 40, 3).mean((1, 3))
  assert np.abs(shown - reconstruction(model[0], pictures['side'])).mean() < 6


def test_stored_events_bring_their_frame_caption_and_rate(film, store, model):
  row = int(np.flatnonzero(store.column('label') == 'come')[0])
  frames, facts, _ = film('--store', store.path, '--event', row, name='film.gif')
  assert facts['prompt'] == 'come back' and facts['fps'] == 10 and len(frames) == FRAMES
  episode, start = int(store.column('episode')[row]), int(store.column('start')[row])
  raw = store.frames(episode, np.array([start]), ['front'])['front']
  latents = functional.encode_video(model[0].model, raw[None, None], {})
  kept = 255 * np.asarray(functional.decode_video(model[0].model, latents, {}))[0, 0, 0]
  assert np.abs(cells(frames[0], model[0])[0] - kept).mean() < 16  # a palette of 256 colours
  assert film('--store', store.path, '--event', row, '--prompt', 'go')[1]['prompt'] == 'go'


def test_euler_takes_the_training_grid(film):
  _, facts, _ = film('--prompt', 'go', '--solver', 'euler', '--guidance', 1, '--shift', 3)
  assert facts['grid'] == 'uniform' and facts['shift'] == 3 and facts['guidance'] == 1


PROMPT = ('--prompt', 'go')


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (('--frames', '16', *PROMPT), ['--frames', '1 + 4N', 'got 16', 'Try 13 or 17']),
    (('--frames', '0', *PROMPT), ['--frames', 'got 0', 'Try 1 or 5']),
    (('--image', 'front=none.png', *PROMPT), ['--image front=none.png', 'found none']),
    (('--image', 'frnt={front}', *PROMPT), ["unknown view 'frnt'", "'front'"]),
    (('--image', 'front={front}', *PROMPT), ['one for each', '--image side=FILE', '--views']),
    (('--views', 'front,top', *PROMPT), ["--views: unknown view 'top'"]),
    (('--image', '{front}', '--views', 'front', '--frames', '1', *PROMPT), ['with N >= 1']),
    (('--image', 'front={text}', '--views', 'front', *PROMPT), ['expected an image']),
    (('--image', 'front={front}', '--event', '0', '--store', '{store}'), ['expected one of them']),
    (('--event', '0'), ['--store and --event: expected both']),
    (('--event', '99', '--store', '{store}'), ['--event: expected 0..15', 'got 99']),
    ((), ['--prompt: expected a caption']),
    (('--steps', '0', *PROMPT), ['steps >= 1']),
    (('--config.optim.lr=1', *PROMPT), ["unknown argument '--config.optim.lr=1'"]),
  ],
)  # fmt: skip
def test_refusals_name_the_argument(
  arguments, words, model, store, pictures, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(imagine, 'load_video_model', lambda args: model)
  text = tmp_path / 'text.png'
  text.write_text('no picture')
  names = {'store': store.path, 'text': text} | pictures
  filled = [argument.format(**names) for argument in arguments]
  out = tmp_path / 'film.mp4'
  code = cli.main(['rollout', '--video-only', '--workdir', 'run', '--out', str(out), *filled])
  err = capsys.readouterr().err
  assert code == 1 and not out.exists()
  for word in words:
    assert word in err


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (('--video-only', *PROMPT), ['--workdir', '--config', 'got neither']),
    (('--video-only', *PROMPT, '--workdir', 'a', '--config', 'b'), ['got both']),
    (('--video-only', *PROMPT, '--config', '{experiment}'), ['train.init_from', "got ''"]),
    (('--workdir', 'run', '--store', 'store', *PROMPT), ['--prompt', '--video-only']),
    (('--workdir', 'run'), ['--store: required']),
  ],
)
def test_sources_that_do_not_go_together_are_refused(
  arguments, words, experiment, tmp_path, capsys
):
  filled = [argument.format(experiment=experiment) for argument in arguments]
  assert cli.main(['rollout', '--out', str(tmp_path / 'film.mp4'), *filled]) == 1
  err = capsys.readouterr().err
  for word in words:
    assert word in err


@pytest.mark.slow
@pytest.mark.usefixtures('plain_states')
def test_a_trained_run_imagines_a_stored_event(experiment, store, tmp_path, capsys):
  workdir, out = tmp_path / 'run', tmp_path / 'film.mp4'
  argv = ['train', '--config', experiment, '--workdir', workdir, '--quiet']
  assert cli.main([*map(str, argv), f'--config.data.store={store.path}']) == 0
  capsys.readouterr()
  argv = ['rollout', '--video-only', '--workdir', workdir, '--store', store.path, '--event', 0]
  assert cli.main([*map(str, argv), '--steps', '2', '--out', str(out)]) == 0
  assert len(decode(out)) == json.loads(capsys.readouterr().out)['frames'] == 17


PUBLIC = """
from wallwm_jax import config as c

def get_config():
  return c.ExperimentConfig(
    name='public',
    model=c.ModelConfig(
      video=c.VideoConfig(width=48, layers=2, heads=2, ffn=64, freq_dim=32, cross_view=True),
      action=c.ActionConfig(width=32, heads=2, ffn=32, freq_dim=32),
      codec=c.CodecConfig(kind='wan', spatial=8, channels=4, weights={vae!r},
        vae=c.VAEConfig(base=4, decoder_base=4, residual=False, patch=1)),
      text=c.TextConfig(kind='umt5', tokens=16, width=32, weights={text!r},
        umt5=c.UMT5Config(vocab=128, layers=3, heads=4, head_dim=8, ffn=48)),
      views=('front', 'side'), image_size=(16, 16)),
    train=c.TrainConfig(init_from={video!r}))
"""


@pytest.fixture(scope='module')
def public(tmp_path_factory):
  """Experiment file of converted weights: a video tower, a VAE and a text encoder."""
  root, folders = tmp_path_factory.mktemp('public'), {}
  sources = {'wan-dit': 'wan_dit_small', 'wan-vae': 'wan_vae_2_1_small', 'umt5': 'umt5_small'}
  for family, name in sources.items():
    source, folders[family] = root / f'{family}-source', root / family
    source.mkdir()
    with safetensors.safe_open(DATA / f'{name}.safetensors', 'numpy') as file:
      names = [n for n in file.keys() if n.startswith('weights.')]  # noqa: SIM118
      tensors = {n.removeprefix('weights.'): file.get_tensor(n) for n in names}
      sizes = json.loads(file.metadata()['config'])
    if family == 'wan-dit':  # of a text encoder twice as narrow
      name = 'condition_embedder.text_embedder.linear_1.weight'
      tensors[name], sizes['text_dim'] = np.tile(tensors[name], (1, 2)), 32
    safetensors.numpy.save_file(tensors, source / 'model.safetensors')
    (source / 'config.json').write_text(json.dumps(sizes))
    if family == 'umt5':
      shutil.copy(DATA / 'umt5_tokenizer.json', source / 'tokenizer.json')
    argv = ['convert', family, '--src', source, '--out', folders[family]]
    assert cli.main([str(a) for a in argv]) == 0
  path = root / 'public.py'
  video, vae, text = (str(folders[family]) for family in sources)
  path.write_text(PUBLIC.format(video=video, vae=vae, text=text))
  return path


@pytest.mark.slow
def test_converted_weights_imagine_from_images(public, pictures, tmp_path, capsys):
  out = tmp_path / 'film.mp4'
  capsys.readouterr()
  argv = ['rollout', '--video-only', '--config', public, '--prompt', 'Pick up the red cube.']
  argv += ['--frames', '5', '--steps', '2', '--out', out, *given(pictures)]
  assert cli.main([str(a) for a in argv]) == 0
  facts = json.loads(capsys.readouterr().out)
  film = decode(out)
  assert facts['frames'] == len(film) == 5 and facts['guidance'] == 5

  args = types.SimpleNamespace(workdir=None, config=public, overrides=[])
  config, params = imagine.load_video_model(args)
  frames = imagine.images_of(given(pictures)[1::2], config, config.model.views)
  codec = params.frozen.codec
  latents = functional.encode_video(config.model, frames, codec)
  kept = 255 * np.asarray(functional.decode_video(config.model, latents, codec))[0, :, 0]
  assert np.ptp(kept) > 20
  assert np.abs(cells(film[0], config) - kept).mean() < 6


@pytest.mark.slow
def test_grafts_of_a_converted_tower_are_complete_and_add_nothing(public):
  """Public towers have no view branch: with ours added, they compute what they did without."""
  args = types.SimpleNamespace(workdir=None, config=public, overrides=[])
  outs = []
  for cross_view in (True, False):
    args.overrides = [f'--config.model.video.cross_view={cross_view}']
    config, params = imagine.load_video_model(args)
    assert set(params.model) == {'video'}
    shapes = jax.eval_shape(lambda c=config: functional.init_params(c.model, jax.random.key(0)))
    jax.tree.map(lambda x, s: np.testing.assert_equal(x.shape, s.shape), params.model['video'],
                 shapes['video'])  # fmt: skip
    rng = np.random.default_rng(0)
    z = rng.standard_normal((1, 2, 2, 2, 2, 4)).astype(np.float32)
    text = Text(rng.standard_normal((1, 16, 32)).astype(np.float32), np.ones((1, 16), bool))
    masks = functional.video_masks(np.ones((1, 2), bool), np.ones((1, 2), bool))
    level = np.full((1, 2), 0.5, np.float32)
    outs.append(
      functional.video_forward(params.model['video'], config.model, z, level, text, masks)[0]
    )
  np.testing.assert_allclose(*outs, atol=1e-5)
  assert np.abs(outs[0]).max() > 0.1


def test_films_start_as_writers_promise():
  assert set(rollout.WRITERS) == {'.mp4', '.gif'}
  with pytest.raises(ConfigError, match='ending in .mp4 or .gif'):
    rollout.run(types.SimpleNamespace(out='film.avi'))
