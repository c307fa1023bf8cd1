"""From files as the public repositories hold them to latents, a training run and a video, by the
commands alone."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from wallwm_jax import cli
from wallwm_jax.commands import settings
from wallwm_jax.convert import umt5, wan_dit, wan_vae
from wallwm_jax.convert.torch_config import torch_config
from wallwm_jax.inference.export import load
from wallwm_jax.models import functional
from wallwm_jax.training.checkpoints import load_inference
from wallwm_jax.training.pretrained import load_video
from wallwm_jax.types import CheckpointError, Text

TOKENIZER = pathlib.Path(__file__).parents[1] / 'fixtures/data/umt5_tokenizer.json'
EXPERIMENT = """
from wallwm_jax import config as c

def get_config():
  return c.ExperimentConfig(
    name='public',
    model=c.ModelConfig(
      video=c.VideoConfig(width=32, layers=2, heads=2, ffn=32, freq_dim=32, eps=1e-5),
      action=c.ActionConfig(width=32, heads=2, ffn=32, freq_dim=32),
      codec=c.CodecConfig(
        kind='wan', spatial=8, channels=4, weights='{root}/vae',
        vae=c.VAEConfig(
          base=4, decoder_base=4, dim_mult=(1, 2, 2, 2), res_blocks=1, residual=False, patch=1,
          latent_mean=(0.5, 0.0, -0.5, 1.0), latent_std=(1.0, 2.0, 0.5, 1.0))),
      text=c.TextConfig(
        kind='umt5', tokens=12, width=16, weights='{root}/umt5', cache='{root}/captions',
        umt5=c.UMT5Config(vocab=100, layers=2, heads=2, head_dim=8, ffn=16, dtype='float32')),
      views=('front', 'side'), image_size=(16, 16), history=1, future=2, max_future=2),
    diffusion=c.DiffusionConfig(action_draws=1),
    data=c.DataConfig(batch_size=4, buckets=(2,), threads=1),
    train=c.TrainConfig(stage='1', steps=2, log_every=1, ema=0.5, init_from='{root}/video'),
    inference=c.InferenceConfig(video_steps=1, action_steps=2))
"""


def run(*arguments: object) -> None:
  assert cli.main([str(a) for a in arguments]) == 0


def write_public(folder, module, component: str, fields: dict, naming: str) -> None:
  """A checkpoint of random weights as one of the public repositories names it."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  tensors = {
    entry.key(naming): (0.3 * rng.standard_normal(entry.shape)).astype(np.float32)
    for entry in module.model(fields)
  }
  safetensors.numpy.save_file(tensors, folder / 'diffusion_pytorch_model.safetensors')
  (folder / 'config.json').write_text(json.dumps(torch_config(component, fields, naming)))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Folder of converted weights and the experiment file that uses them."""
  root = tmp_path_factory.mktemp('public')
  (root / 'experiment.py').write_text(EXPERIMENT.replace('{root}', str(root)))
  model = settings.load_experiment(root / 'experiment.py').model
  video = {'config': dataclasses.asdict(model.video), 'channels': 4, 'text_width': 16}
  write_public(root / 'source/dit', wan_dit, 'video', video, 'original')
  write_public(
    root / 'source/vae', wan_vae, 'codec', {'config': dataclasses.asdict(model.codec)}, 'diffusers'
  )
  write_public(
    root / 'source/text', umt5, 'text', {'config': dataclasses.asdict(model.text)}, 'diffusers'
  )
  shutil.copy(TOKENIZER, root / 'source/text/tokenizer.json')
  run('convert', 'wan-dit', '--src', root / 'source/dit', '--out', root / 'video')
  run('convert', 'wan-vae', '--src', root / 'source/vae', '--out', root / 'vae')
  run('convert', 'umt5', '--src', root / 'source/text', '--out', root / 'umt5')
  return root


@pytest.mark.slow
@pytest.mark.usefixtures('plain_states')
def test_latents_training_and_video_from_public_files(root, store, capsys, monkeypatch):
  experiment = root / 'experiment.py'
  run('data', 'encode', store.path, '--config', experiment, '--out', root / 'latents',
      '--dtype', 'float32')
  run('data', 'verify', root / 'latents')
  common = ['--config', experiment, f'--config.data.store={store.path}', '--quiet']
  run('train', *common, '--workdir', root / 'frames')
  # Where latents are at hand the codec need not be.
  run('train', *common, '--workdir', root / 'latent-run',
      f'--config.data.latents={root / "latents"}', '--config.model.codec.weights=nowhere')
  with pytest.raises(CheckpointError, match='nowhere'):
    load_inference(root / 'latent-run')
  shutil.copytree(root / 'vae', root / 'elsewhere' / 'nowhere')
  monkeypatch.chdir(root / 'elsewhere')
  losses = [
    [json.loads(line)['loss'] for line in (root / name / 'metrics.jsonl').read_text().splitlines()]
    for name in ('frames', 'latent-run')
  ]
  assert np.isfinite(losses).all()
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
  norm = load_inference(root / 'frames')[1].norm
  np.testing.assert_allclose(norm.latent_mean, (0.5, 0.0, -0.5, 1.0))
  run('rollout', '--video-only', '--config', experiment, '--prompt', 'go there', '--frames', 5,
      '--steps', 2, '--out', root / 'imagined.mp4')
  run('rollout', '--video-only', '--workdir', root / 'latent-run', '--prompt', 'go there',
      '--frames', 5, '--steps', 2, '--out', root / 'trained.mp4')
  assert (root / 'imagined.mp4').stat().st_size > 500
  run('export', root / 'latent-run', '--out', root / 'policy')
  exported = load(root / 'policy').manifest['params']['arrays']
  # The codec and the empty caption go along.
  assert 'null_text/features' in exported and any(name.startswith('codec/') for name in exported)


def test_a_run_does_not_start_from_weights_of_another_model(root, store, capsys):
  arguments = ['train', '--config', root / 'experiment.py', '--workdir', root / 'refused',
               f'--config.data.store={store.path}', '--config.model.video.eps=1e-6']
  assert cli.main([str(a) for a in arguments]) == 1
  assert 'eps: expected 1e-06, got 1e-05' in capsys.readouterr().err
  arguments[-1] = f'--config.train.init_from={root / "vae"}'
  assert cli.main([str(a) for a in arguments]) == 1
  assert 'expected weights of the video component, got codec' in capsys.readouterr().err


def test_channels_for_given_frames_start_at_zero(root):
  """A text-to-video tower under 'channel' conditioning predicts what it did without."""
  frame = settings.load_experiment(root / 'experiment.py').model
  channel = dataclasses.replace(
    frame, video=dataclasses.replace(frame.video, conditioning='channel')
  )
  rng = np.random.default_rng(0)
  z = jnp.asarray(rng.standard_normal((1, 2, 3, 2, 2, 4)), jnp.float32)
  text = Text(jnp.asarray(rng.standard_normal((1, 12, 16)), jnp.float32), jnp.ones((1, 12), bool))
  masks = functional.video_masks(jnp.ones((1, 2), bool), jnp.ones((1, 3), bool))
  outputs = []
  for model in (frame, channel):
    fresh = functional.init_params(model, jax.random.key(0))['video']
    public = load_video(root / 'video', model, jax.eval_shape(lambda x: x, fresh))
    video = functional.adopt_video(model, fresh, public)
    assert jax.tree.structure(video) == jax.tree.structure(fresh)
    inputs, t = functional.condition_video(model, z, jnp.array([0.7]), z, np.zeros(3, bool))
    outputs.append(functional.video_forward(video, model, inputs, t, text, masks)[0])
  assert inputs.shape[-1] == 4 + 4 + 4
  np.testing.assert_allclose(*outputs, atol=1e-5)
