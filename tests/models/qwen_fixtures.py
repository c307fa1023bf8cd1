"""The fixtures of `tests/fixtures/qwen.py` as configs, parameters and prompts of this project."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from wallwm_jax.config import QwenConfig
from wallwm_jax.convert import qwen as convert
from wallwm_jax.convert.entries import Naming, assemble
from wallwm_jax.text import media

DATA = pathlib.Path(__file__).parents[1] / 'fixtures' / 'data'


@dataclasses.dataclass(frozen=True)
class Fixture:
  name: str
  naming: Naming
  config: QwenConfig
  params: dict
  tensors: Mapping[str, np.ndarray]

  def __getitem__(self, name):
    return self.tensors[name]

  def group(self, prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): x for k, x in self.tensors.items() if k.startswith(prefix)}

  def gradients(self) -> dict:
    """Of the parameters, in the tree of the parameters."""
    return assemble(convert.entries(self.config), self.group('grads.'), self.naming)


def load(name: str) -> Fixture:
  """'text_small', 'text_odd', 'vl_small' or 'vl_odd', in float32."""
  path = DATA / f'qwen_{name}.safetensors'
  source = json.loads(safe_open(path, 'np').metadata()['config'])
  tensors = load_file(path)
  weights = {k.removeprefix('weights.'): x for k, x in tensors.items() if k.startswith('weights.')}
  naming, fields = convert.infer({key: x.shape for key, x in weights.items()}, source)
  config = dataclasses.replace(convert.make_config(fields['config']), dtype='float32')
  params = jax.tree.map(jnp.asarray, assemble(convert.entries(config), weights, naming))
  return Fixture(name.partition('_')[2], naming, config, params, tensors)


def pictures(fixture: Fixture) -> list[media.Frames]:
  """Images and frames of videos in the order of their placeholders."""
  left = {}
  for kind, pixels, grids in (
    (1, 'pixel_values', 'image_grid_thw'),
    (2, 'pixel_values_videos', 'video_grid_thw'),
  ):
    frames, start = [], 0
    for t, h, w in fixture[f'inputs.{grids}'].tolist():
      for _ in range(t):
        patches = fixture[f'inputs.{pixels}'][start : start + h * w]
        frames.append(media.Frames(patches[None], (h, w)))
        start += h * w
    left[kind] = iter(frames)
  found = []
  for row in fixture['inputs.mm_token_type_ids']:
    found += [next(left[kind]) for kind, _ in itertools.groupby(row.tolist()) if kind]
  return found
