"""The committed VAEs of diffusers (tests/fixtures/wan_vae.py) and our models of their weights."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from wallwm_jax.config import CodecConfig
from wallwm_jax.convert import wan_vae
from wallwm_jax.convert.entries import assemble
from wallwm_jax.models.vae import WanVAE

DATA = pathlib.Path(__file__).parents[1] / 'fixtures' / 'data'
NAMES = ('2_1_small', '2_1_odd', '2_2_small', '2_2_odd')


@dataclasses.dataclass(frozen=True)
class Fixture:
  config: CodecConfig
  source: dict  # diffusers' config.json
  tensors: dict[str, np.ndarray]

  def group(self, name: str) -> dict[str, np.ndarray]:
    prefix = f'{name}.'
    return {k.removeprefix(prefix): x for k, x in self.tensors.items() if k.startswith(prefix)}

  def clip(self, name: str) -> np.ndarray:
    """A tensor [B, C, T, H, W] of the fixture, channels last."""
    return np.moveaxis(self.tensors[name], 1, -1)


@functools.cache
def fixture(name: str) -> Fixture:
  with safe_open(DATA / f'wan_vae_{name}.safetensors', 'np') as file:
    source = json.loads(file.metadata()['config'])
    tensors = {key: file.get_tensor(key) for key in file.keys()}
  shapes = {k.removeprefix('weights.'): x.shape for k, x in tensors.items() if 'weights.' in k}
  naming, fields = wan_vae.infer(shapes, source)
  assert naming == 'diffusers'
  return Fixture(wan_vae.codec_config(fields['config']), source, tensors)


def build(config: CodecConfig, params=None) -> WanVAE:
  """A VAE of random weights, or of `params`."""
  if params is None:
    return WanVAE(config, nnx.Rngs(0))
  model = nnx.eval_shape(lambda: WanVAE(config, nnx.Rngs(0)))
  graph, state = nnx.split(model)
  nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
  return nnx.merge(graph, state)


def loaded(name: str, **changes) -> WanVAE:
  """The fixture's model, its VAEConfig changed."""
  f = fixture(name)
  config = dataclasses.replace(f.config, vae=dataclasses.replace(f.config.vae, **changes))
  return build(config, assemble(wan_vae.entries(config), f.group('weights')))
