"""The boundary detector: a small temporal convolution network, evaluated in NumPy.

Several networks ("members") of one shape vote. A member is a 1x1 projection, then residual blocks
(dilated convolution of three taps, ReLU, 1x1 convolution), then a logit per frame. Parameters come
with the package (boundaries.npz, float16) and are fitted by benchmarks/segmentation.py.
"""

from __future__ import annotations

import functools
import importlib.resources
import io
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np

DILATIONS = (1, 2, 4, 8, 1, 2, 4, 8)
_FILE = 'boundaries.npz'
Member = Mapping[str, np.ndarray]


def network_input(directions: np.ndarray, cues: np.ndarray) -> np.ndarray:
  """float32 [T, 3 V + S] of `arm_features`."""
  return np.concatenate([directions.reshape(len(directions), -1), cues], 1)


def logits(
  member: Member, x: np.ndarray, inside: np.ndarray | float = 1.0, xp: ModuleType = np
) -> np.ndarray:
  """One network.

  Args:
    member: 'mean' [I], 'scale' [I], 'in' [I, C], 'in_bias' [C], 'taps' [L, 3 C, C], 'taps_bias'
      [L, C], 'mix' [L, C, C], 'mix_bias' [L, C], 'out' [C], 'out_bias' [].
    x: [..., T, I] features.
    inside: [..., T, 1], 1 within an episode and 0 in the padding of a shorter one.
    xp: the array library that computes, for training.

  Returns:
    [..., T], log odds of a boundary at each frame.
  """
  count, sides = x.shape[-2], [(0, 0)] * (x.ndim - 2)
  h = ((x - member['mean']) * member['scale']) @ member['in'] + member['in_bias']
  h = h * inside
  for i, dilation in enumerate(DILATIONS):
    padded = xp.pad(h, [*sides, (dilation, dilation), (0, 0)])
    taps = xp.concatenate([padded[..., :count, :], h, padded[..., 2 * dilation :, :]], -1)
    inner = xp.maximum(taps @ member['taps'][i] + member['taps_bias'][i], 0)
    h = (h + inner @ member['mix'][i] + member['mix_bias'][i]) * inside
  return xp.maximum(h, 0) @ member['out'] + member['out_bias']


def probabilities(members: Sequence[Member], x: np.ndarray) -> np.ndarray:
  """Mean vote of the members, float32 [T]: the expected number of boundaries at each frame."""
  return np.mean([1 / (1 + np.exp(-logits(member, x))) for member in members], 0)


@functools.cache
def load_members(variant: str) -> tuple[Member, ...]:
  """The networks that come with the package; variant: 'actions' or 'proprio'."""
  raw = importlib.resources.files(__package__).joinpath(_FILE).read_bytes()
  with np.load(io.BytesIO(raw)) as stored:
    fields = {name: stored[name].astype(np.float32) for name in stored.files}
  mine = {name.split('/', 1)[1]: x for name, x in fields.items() if name.startswith(variant + '/')}
  return tuple(
    {name: x[i] for name, x in mine.items()} for i in range(len(next(iter(mine.values()))))
  )


def pack(variants: Mapping[str, Sequence[Member]]) -> dict[str, np.ndarray]:
  """The arrays of boundaries.npz for np.savez_compressed."""
  return {
    f'{variant}/{name}': np.stack([member[name] for member in members]).astype(np.float16)
    for variant, members in variants.items()
    for name in members[0]
  }
